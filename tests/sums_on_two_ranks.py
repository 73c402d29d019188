"""What test_distributed.py checks of the norms of a sum."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Placement, Replicate, Shard, distribute_module

from trinorm import functional, nn
from trinorm.ops import road
from trinorm.spec import LAYER_NORM, ROW_NORMS, RowNorm
from two_ranks import assert_same, by_kernels, lay, results, tensors

# normalized_shape; how x, the residual, the parameters, dy and the sum's gradient lie; how y and the sum, dx and dresidual,
# and the parameters' gradients do.
LAYOUTS: list[tuple[tuple[int, ...], tuple[Placement, ...], tuple[Placement, ...]]] = [
    ((8,), (Shard(0), Shard(0), Replicate(), Shard(0), Shard(0)), (Shard(0), Shard(0), Partial())),
    ((8,), (Shard(1), Shard(1), Replicate(), Shard(1), Shard(1)), (Shard(1), Shard(1), Partial())),
    ((4, 8), (Shard(0), Shard(0), Replicate(), Shard(0), Shard(0)), (Shard(0), Shard(0), Partial())),
    ((8,), (Replicate(),) * 5, (Replicate(),) * 3),
    # Parameters sharded as FSDP does are gathered, and so is what is sharded by a normalized dim.
    ((8,), (Shard(0),) * 5, (Shard(0), Shard(0), Partial())),
    ((8,), (Shard(2), Shard(2), Replicate(), Shard(2), Shard(2)), (Replicate(), Replicate(), Replicate())),
    # A sum that a tensor-parallel layer left is taken first.
    ((8,), (Partial(), Shard(1), Replicate(), Shard(1), Shard(1)), (Shard(1), Shard(1), Partial())),
    ((8,), (Shard(0), Shard(0), Replicate(), Shard(0), Partial()), (Shard(0), Shard(0), Partial())),
    # The residual, and the gradients, need not lie as x does.
    ((8,), (Shard(0), Replicate(), Replicate(), Shard(0), Replicate()), (Shard(0), Shard(0), Partial())),
]


def norm(spec: RowNorm, shape: tuple[int, ...] = (8,), alpha: float = 1.0) -> Callable[..., tuple[Tensor, Tensor]]:
    function = getattr(functional, f"add_{spec.name}")
    return lambda x, residual, *parameters: function(
        x, residual, *parameters, eps=1e-5, normalized_shape=shape, alpha=alpha
    )


def drawn(spec: RowNorm, mesh: DeviceMesh, shape: tuple[int, ...] = (8,)) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    """((dy, dsum), [x, residual, weight, bias where there is one])."""
    dy, (x, *parameters) = tensors(spec, mesh, shape)
    dsum, residual = (torch.randn(x.shape, dtype=x.dtype).to(x.device) for _ in range(2))
    return (dy, dsum), [x, residual, *parameters]


def every_layout_of_sums(spec: RowNorm, mesh: DeviceMesh) -> None:
    for shape, (of_x, of_residual, of_parameters, *of_gradients), laid in LAYOUTS[:: -6 if road.INTERPRETED else 1]:
        gradients, inputs = drawn(spec, mesh, shape)
        placements = of_x, of_residual, *[of_parameters] * (len(inputs) - 2)
        there = [lay(t, mesh, placement) for t, placement in zip(inputs, placements, strict=True)]
        gradients_there = tuple(lay(t, mesh, placement) for t, placement in zip(gradients, of_gradients, strict=True))
        for count, alpha in ((2, 1.0), (1, 1.0), (2, 0.5)):  # both gradients, dy alone; and two that differ
            with by_kernels():
                found = results(norm(spec, shape, alpha), gradients_there[:count], there)
            of_results, of_gradients_found, of_sums = laid
            expected = [of_results] * 2 + [of_gradients_found] * 2 + [of_sums] * (len(inputs) - 2)
            assert [t.placements for t in found] == [(p,) for p in expected], (spec, shape, placements, of_gradients)
            assert_same(found, results(norm(spec, shape, alpha), gradients[:count], inputs))


def gradients_of_sums_wanted_in_any_order(spec: RowNorm, mesh: DeviceMesh) -> None:
    """DTensor asks for a rule once, and these calls have the same layouts."""
    gradients, inputs = drawn(spec, mesh)
    placements = Shard(0), Shard(0), Replicate(), Replicate()
    there = [lay(t, mesh, placement) for t, placement in zip(inputs, placements, strict=False)]
    gradients_there = tuple(lay(t, mesh, Shard(0)) for t in gradients)
    for wanted in itertools.product((False, True), repeat=len(inputs)):
        count = 2 if wanted[0] or wanted[1] else 1  # of parameters the sum knows nothing
        if any(wanted):
            found = results(norm(spec), gradients_there[:count], there, wanted)
            assert_same(found, results(norm(spec), gradients[:count], inputs, wanted))
        if wanted[0] or wanted[1]:  # the sum alone is used
            some = tuple(want and i < 2 for i, want in enumerate(wanted))
            found = results(lambda *given: norm(spec)(*given)[1:], gradients_there[1:], there, some)
            assert_same(found, results(lambda *given: norm(spec)(*given)[1:], gradients[1:], inputs, some))


def compiled_sums(spec: RowNorm, mesh: DeviceMesh) -> None:
    torch._dynamo.reset()

    def f(x: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        return norm(spec)(x * 2, *others)

    gradients, inputs = drawn(spec, mesh)
    placements = Shard(0), Shard(0), Replicate(), Replicate()
    there = [lay(t, mesh, placement) for t, placement in zip(inputs, placements, strict=False)]
    gradients_there = tuple(lay(t, mesh, Shard(0)) for t in gradients)
    graph = results(torch.compile(f, fullgraph=True, backend="aot_eager"), gradients_there, there)
    eager = results(f, gradients_there, there)
    assert [t.placements for t in graph] == [t.placements for t in eager]
    assert all(torch.equal(a.to_local(), b.to_local()) for a, b in zip(graph, eager, strict=True))


def sequence_parallel_sums(spec: RowNorm, mesh: DeviceMesh) -> None:
    """A module whose parameters are replicated, between tensor-parallel layers: torch's SequenceParallel has one input."""
    kind: Any = nn.AddLayerNorm if spec.center else nn.AddRMSNorm
    alone = kind(8, device=mesh.device_type, dtype=torch.float64)
    parallel = distribute_module(copy.deepcopy(alone), mesh)
    gradients, (x, residual, *_) = drawn(spec, mesh)
    found = []
    for module, place in ((alone, lambda t: t), (parallel, lambda t: lay(t, mesh, Shard(1)))):
        leaves = [place(t).detach().requires_grad_() for t in (x, residual)]
        outs = module(*leaves)
        torch.autograd.backward(outs, [place(t) for t in gradients])
        found.append([*outs, *(t.grad for t in leaves), *(p.grad for p in module.parameters())])
    assert_same(found[1], found[0])
    assert [t.placements for t in found[1][:4]] == [(Shard(1),)] * 4


# As test_distributed.CHECKS.
CHECKS: dict[Callable[[Any, DeviceMesh], None], tuple[tuple[RowNorm, ...], tuple[RowNorm, ...]]] = {
    every_layout_of_sums: (ROW_NORMS, ROW_NORMS),
    gradients_of_sums_wanted_in_any_order: (ROW_NORMS, ()),
    compiled_sums: (ROW_NORMS, (LAYER_NORM,)),
    sequence_parallel_sums: (ROW_NORMS, ROW_NORMS),
}
