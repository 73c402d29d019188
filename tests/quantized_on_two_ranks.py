"""What test_distributed.py checks of norms with a quantized result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Placement, Replicate, Shard

from test_quantized import ours
from trinorm.spec import ROW_NORMS, RowNorm
from two_ranks import assert_same, lay_each, results, whole

R, P = Replicate(), Partial()
S = tuple(Shard(dim) for dim in range(3))

# How x, the residual and the weight lie, and dy; how data and scale then do, and the gradients of x and of the weight.
LAYOUTS: list[tuple[tuple[Placement, ...], Placement, tuple[Placement, Placement]]] = [
    ((S[0], S[0], R), S[0], (S[0], P)),
    ((S[1], S[1], R), S[1], (S[1], P)),
    ((R, R, R), R, (R, R)),
    ((S[1], R, S[0]), S[1], (S[1], P)),
]


def every_layout_of_formats(spec: RowNorm, mesh: DeviceMesh) -> None:
    """Codes and scales are those of one device, bit for bit; gradients are the norm's."""
    tensors = [torch.randn(s, dtype=torch.float64).to(mesh.device_type) for s in ((4, 4, 8), (4, 4, 8), (8,))]
    dy, dsum = (torch.randn(4, 4, 8, dtype=torch.float64).to(mesh.device_type) for _ in range(2))
    for name, scale in (("fp8_token", None), ("int8_token", None), ("fp8", torch.ones(1, device=mesh.device_type))):
        for placements, of_dy, (of_x, of_sums) in LAYOUTS:
            there = lay_each(tensors, mesh, *placements)
            given = None if scale is None else lay_each([scale], mesh, R)[0]
            with torch.no_grad():
                found = ours(spec, there[0], (8,), there[2], format=name, scale=given, residual=there[1])
                alone = ours(spec, tensors[0], (8,), tensors[2], format=name, scale=scale, residual=tensors[1])
            assert found.data.placements == (of_x,)  # type: ignore[attr-defined]
            assert torch.equal(whole(found.data.float()), alone.data.float())  # gloo gathers no fp8
            assert torch.equal(whole(found.scale), alone.scale)

            def both(x: Tensor, residual: Tensor, weight: Tensor, given: Any = given, name: Any = name) -> Any:
                found = ours(spec, x, (8,), weight, format=name, scale=given, residual=residual)
                return found.straight, found.residual

            gradients = results(both, tuple(lay_each((dy, dsum), mesh, of_dy, of_dy)), there)
            assert [t.placements for t in gradients[2:]] == [(of_x,), (of_x,), (of_sums,)]
            assert_same(gradients, results(lambda *t: both(*t, given=scale), (dy, dsum), tensors))  # noqa: B023


def swizzled_scales(spec: RowNorm, mesh: DeviceMesh) -> None:
    """They lie beside the rows, by the first dim, where each rank then has whole tiles of these; else all are on each.

    Rows shared out by another dim may go to either: torch takes what it thinks is sent sooner, of so many columns the first
    dim's; of 96 that is so on a CPU, and on GPUs of one host all are on each.
    """
    for leading, of_x, of_result in (
        ((4, 64), S[0], S[0]),
        ((4, 64), S[1], S[0]),
        ((4, 60), S[0], R),
        ((3, 256), S[1], R),
        ((4, 64), R, R),
    ):
        x = torch.randn(*leading, 512).to(mesh.device_type)
        how: dict[str, Any] = dict(format="mxfp8", scale_layout="swizzled")
        with torch.no_grad():
            alone, found = (ours(spec, t, (512,), **how) for t in (x, lay_each([x], mesh, of_x)[0]))
        for there, t in ((found.data, alone.data), (found.scale, alone.scale)):
            assert there.placements == (of_result,), (leading, of_x)  # type: ignore[attr-defined]
            part = t if of_result == R else t.chunk(2)[mesh.get_local_rank()]
            mine = there.to_local()  # type: ignore[attr-defined]
            assert mine.shape == part.shape and torch.equal(mine.view(torch.uint8), part.view(torch.uint8))


# As test_distributed.CHECKS.
CHECKS: dict[Callable[[Any, DeviceMesh], None], tuple[tuple[RowNorm, ...], tuple[RowNorm, ...]]] = {
    every_layout_of_formats: (ROW_NORMS, ROW_NORMS),
    swizzled_scales: (ROW_NORMS, ()),
}
