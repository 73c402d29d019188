"""What test_distributed.py checks of DyT, Derf, PolyNorm and weight normalization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Placement, Replicate, Shard

from inputs_only_norms import ELEMENTS, example
from two_ranks import assert_same, by_kernels, lay, lay_each, results

R, P = Replicate(), Partial()
S = tuple(Shard(dim) for dim in range(3))

# How x lies, and the parameters; how y and dx do, and the parameters' gradients: None where DTensor is free to choose.
LAYOUTS: list[tuple[Placement, Placement, tuple[Placement, Placement] | None]] = [
    (S[0], R, (S[0], P)),
    (S[1], R, (S[1], P)),
    (R, R, (R, R)),
    # Columns that are sharded, parameters as FSDP has them, and sums not yet taken, are brought together first.
    (S[2], R, None),
    (S[0], S[0], None),
    (P, R, None),
]


def every_layout_of_elements(kind: str, mesh: DeviceMesh) -> None:
    call = example(kind, torch.float64, torch.device(mesh.device_type), (2, 4))
    dy = torch.randn_like(call.x)

    def norm(*tensors: Tensor) -> Tensor:
        return call.given(tensors)()

    given = call.present
    wanted = (True,) * len(given)
    for of_x, of_parameters, laid in LAYOUTS:
        there = lay_each(given, mesh, of_x, *[of_parameters] * (len(given) - 1))
        with by_kernels():
            found = results(norm, lay(dy, mesh, R if of_x == P else of_x), there, wanted)
        if laid:
            of_y, of_sums = laid
            expected = [(of_y,)] * 2 + [(of_sums,)] * (len(given) - 1)
            assert [t.placements for t in found] == expected, (kind, of_x)
        assert_same(found, results(norm, dy, given, wanted))


# How v and g lie; how all results do, None where DTensor is free to choose.
OF_WEIGHTS: list[tuple[Placement, Placement, Placement | None]] = [
    (S[0], S[0], S[0]),
    (R, R, R),
    # What is not of whole slices, or not beside its g, is brought together first.
    (S[1], R, None),
    (S[0], R, None),
    (P, R, None),
]


def every_layout_of_weights(kind: str, mesh: DeviceMesh) -> None:
    call = example(kind, torch.float64, torch.device(mesh.device_type), (4,), 6)
    dy = torch.randn_like(call.x)

    def norm(*tensors: Tensor) -> Tensor:
        return call.given(tensors)()

    for of_v, of_g, laid in OF_WEIGHTS:
        there = lay_each(call.present, mesh, of_v, of_g)
        with by_kernels():
            found = results(norm, lay(dy, mesh, R if of_v == P else of_v), there, (True, True))
        if laid:
            assert [t.placements for t in found] == [(laid,)] * 3, of_v
        assert_same(found, results(norm, dy, call.present, (True, True)))


# As test_distributed.CHECKS.
CHECKS: dict[Callable[[Any, DeviceMesh], None], tuple[tuple[str, ...], tuple[str, ...]]] = {
    every_layout_of_elements: (ELEMENTS, ELEMENTS[1:]),
    every_layout_of_weights: (("weight_norm",), ("weight_norm",)),
}
