"""What test_distributed.py checks of conditioned norms."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Placement, Replicate, Shard, distribute_module

from trinorm import functional, nn
from trinorm.ops import road
from trinorm.ops.conditioned import MOST_OF_ROW
from trinorm.spec import LAYER_NORM, RMS_NORM, ROW_NORMS, RowNorm
from two_ranks import assert_same, by_kernels, lay, lay_each, results

SIZE = 8
X, HEADS = (2, 4, SIZE), (2, 3, 4, SIZE)
R, P = Replicate(), Partial()
S = tuple(Shard(dim) for dim in range(4))

Norm = Callable[..., Tensor]


def modulated(spec: RowNorm) -> Norm:
    return lambda x, *given: getattr(functional, f"modulated_{spec.name}")(x, (SIZE,), *given, eps=1e-5)


def gated(spec: RowNorm, **how: Any) -> Norm:
    return lambda x, *given: getattr(functional, f"gated_{spec.name}")(x, *given, eps=1e-5, **how)


def of_heads(spec: RowNorm) -> Norm:
    return lambda x, weight: functional.per_head_rms_norm(x, weight, 1e-5)


def l2(spec: RowNorm) -> Norm:
    return functional.l2_norm


def scaled(spec: RowNorm) -> Norm:
    return functional.scale_norm


def partial(spec: RowNorm) -> Norm:
    return lambda x, weight: functional.partial_rms_norm(x, (SIZE,), weight, count=3)


# Those of RMSNorm alone.
OF_RMS_NORM = (of_heads, l2, scaled, partial)


def mamba(spec: RowNorm) -> Norm:
    return gated(spec, group_size=4, norm_before_gate=False)


# The norm, its tensors' shapes, how they lie, and how their gradients do; the result and its gradient lie as x.
LAYOUTS: list[
    tuple[Callable[[RowNorm], Norm], tuple[tuple[int, ...], ...], tuple[Placement, ...], tuple[Placement, ...]]
] = [
    # Scale and shift of each sample, with their samples, or whole beside tokens; of each token; of all.
    (modulated, (X, (2, 1, SIZE), (2, 1, SIZE)), (S[0],) * 3, (S[0],) * 3),
    (modulated, (X, (2, 1, SIZE), (2, 1, SIZE)), (S[1], R, R), (S[1], P, P)),
    (modulated, (X, X, X), (S[1],) * 3, (S[1],) * 3),
    (modulated, (X, (4, SIZE), (4, SIZE)), (S[1], S[0], S[0]), (S[1], S[0], S[0])),
    (modulated, (X, (SIZE,), (SIZE,)), (S[0], R, R), (S[0], P, P)),
    (modulated, (X, (2, 1, SIZE)), (R, R), (R, R)),
    # A gate beside its rows, behind the norm and before it.
    (gated, (X, X, (SIZE,)), (S[0], S[0], R), (S[0], S[0], P)),
    (mamba, (X, X, (SIZE,)), (S[1], S[1], R), (S[1], S[1], P)),
    # Heads, with their weights, as tensor parallel layers have them; tokens, which share these.
    (of_heads, (HEADS, (4, SIZE)), (S[2], S[0]), (S[2], S[0])),
    (of_heads, (HEADS, (4, SIZE)), (S[1], R), (S[1], P)),
    # Another statistic, of whole rows too.
    (l2, (HEADS,), (S[2],), (S[2],)),
    (partial, (X, (SIZE,)), (S[1], R), (S[1], P)),
    (scaled, (X, ()), (S[0], R), (S[0], P)),
]
# Others, of which DTensor is free to choose the results' layouts: columns that are sharded, also by whole groups, sums not
# yet taken, weights as FSDP has them, and tensors that lie each in its own way.
FREE: list[tuple[Callable[[RowNorm], Norm], tuple[tuple[int, ...], ...], tuple[Placement, ...]]] = [
    (modulated, (X, (2, 1, SIZE), (2, 1, SIZE)), (S[2], S[2], S[2])),
    (modulated, (X, (2, 1, SIZE), (2, 1, SIZE)), (S[0], R, S[0])),
    (mamba, (X, X, (SIZE,)), (S[2], S[2], S[0])),
    (gated, (X, X, (SIZE,)), (P, S[0], S[0])),
    (of_heads, (HEADS, (4, SIZE)), (S[2], R)),
    (of_heads, (HEADS, (4, SIZE)), (S[3], S[1])),
    (partial, (X, (SIZE,)), (S[2], S[0])),
    (scaled, (X, (1,)), (S[0], S[0])),
]


def drawn(mesh: DeviceMesh, *shapes: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
    """(dy, x and the others), the same on each rank."""
    dy, *inputs = (torch.randn(shape, dtype=torch.float64).to(mesh.device_type) for shape in (shapes[0], *shapes))
    return dy, inputs


def every_layout_of_conditions(spec: RowNorm, mesh: DeviceMesh) -> None:
    for of, shapes, placements, *laid in [*LAYOUTS, *FREE][:: 2 if road.INTERPRETED else 1]:
        if of in OF_RMS_NORM and spec is not RMS_NORM:
            continue
        dy, inputs = drawn(mesh, *shapes)
        there = lay_each(inputs, mesh, *placements)
        with by_kernels():
            found = results(of(spec), lay(dy, mesh, placements[0]), there)
        if laid:
            assert [t.placements for t in found] == [(p,) for p in (placements[0], *laid[0])], (of, placements)
        assert_same(found, results(of(spec), dy, inputs))


# Of a gated sum: how x and the residual lie; how gate, scale and shift, which are of this shape, do; and their gradients.
OF_GATED_SUMS: list[tuple[Placement, tuple[int, ...], Placement, Placement]] = [
    (S[0], (2, 1, SIZE), S[0], S[0]),
    (S[1], (2, 1, SIZE), R, P),
    (S[1], X, S[1], S[1]),
    (S[0], (SIZE,), R, P),
    (R, (2, 1, SIZE), R, R),
]


def every_layout_of_gated_sums(spec: RowNorm, mesh: DeviceMesh) -> None:
    function = getattr(functional, f"add_modulated_{spec.name}")

    def norm(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        return function(x, residual, gate, (SIZE,), scale, shift, eps=1e-5)

    wanted = (True,) * 5
    for of_x, shape, of_parameters, of_sums in OF_GATED_SUMS:
        dy, inputs = drawn(mesh, X, X, shape, shape, shape)
        given = dy, torch.randn_like(dy)
        there = lay_each(inputs, mesh, of_x, of_x, *[of_parameters] * 3)
        with by_kernels():
            found = results(norm, tuple(lay(t, mesh, of_x) for t in given), there, wanted)
        assert [t.placements for t in found] == [(p,) for p in (*[of_x] * 4, *[of_sums] * 3)], (of_x, shape)
        assert_same(found, results(norm, given, inputs, wanted))


def ranks_with_more_samples_and_with_none(spec: RowNorm, mesh: DeviceMesh) -> None:
    """Samples, tokens and heads that two ranks cannot share evenly."""
    for samples, tokens, dim in ((3, 2, 0), (1, 3, 0), (2, 3, 1), (2, 1, 1)):
        dy, inputs = drawn(mesh, (samples, tokens, SIZE), (samples, 1, SIZE), (samples, 1, SIZE))
        of_condition = S[0] if dim == 0 and samples > 1 else R
        there = lay_each(inputs, mesh, S[dim], of_condition, of_condition)
        assert_same(results(modulated(spec), lay(dy, mesh, S[dim]), there), results(modulated(spec), dy, inputs))
    dy, inputs = drawn(mesh, (2, 3, 3, SIZE), (3, SIZE))
    there = lay_each(inputs, mesh, S[2], S[0])
    assert_same(results(of_heads(RMS_NORM), lay(dy, mesh, S[2]), there), results(of_heads(RMS_NORM), dy, inputs))


def gradients_of_conditions_wanted_in_any_order(spec: RowNorm, mesh: DeviceMesh) -> None:
    """DTensor asks for a rule once, and these calls have the same layouts."""
    norm = gated(spec)
    dy, inputs = drawn(mesh, X, X, (SIZE,), (SIZE,))
    there = lay_each(inputs, mesh, S[0], S[0], R, R)
    for wanted in itertools.product((False, True), repeat=4):
        if any(wanted):
            assert_same(results(norm, lay(dy, mesh, S[0]), there, wanted), results(norm, dy, inputs, wanted))


def another_order_of_the_gate_and_other_groups(spec: RowNorm, mesh: DeviceMesh) -> None:
    """The same layouts, of another norm."""
    dy, inputs = drawn(mesh, X, X, (SIZE,))
    there = lay_each(inputs, mesh, S[0], S[0], R)
    for norm in (gated(spec), mamba(spec), gated(spec, activation="sigmoid", group_size=2)):
        assert_same(results(norm, lay(dy, mesh, S[0]), there), results(norm, dy, inputs))


def second_derivatives_of_conditions(spec: RowNorm, mesh: DeviceMesh) -> None:
    def second(inputs: list[Tensor]) -> list[Any]:
        inputs = [t.detach().requires_grad_() for t in inputs]
        first = torch.autograd.grad(mamba(spec)(*inputs).sin().sum(), inputs, create_graph=True)
        return [*first, *torch.autograd.grad(first[0].cos().sum(), inputs)]

    _, inputs = drawn(mesh, X, X, (SIZE,))
    assert_same(second(lay_each(inputs, mesh, S[0], S[0], R)), second(inputs))


def rows_too_long_for_the_kernels(spec: RowNorm, mesh: DeviceMesh) -> None:
    """Which torch's operators compute, of DTensors too."""
    shape = 2, MOST_OF_ROW + 8
    dy, inputs = drawn(mesh, shape, shape)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*a row has over 1048576 elements", UserWarning)  # as a GPU says
        found = results(gated(spec), lay(dy, mesh, S[0]), lay_each(inputs, mesh, S[0], S[0]))
        assert_same(found, results(gated(spec), dy, inputs))


def compiled_conditions(spec: RowNorm, mesh: DeviceMesh) -> None:
    torch._dynamo.reset()
    dy, inputs = drawn(mesh, X, (2, 1, SIZE), (2, 1, SIZE))

    def f(x: Tensor, *others: Tensor) -> Tensor:
        return modulated(spec)(x * 2, *others)

    there, dy_there = lay_each(inputs, mesh, S[0], S[0], S[0]), lay(dy, mesh, S[0])
    graph = results(torch.compile(f, fullgraph=True, backend="aot_eager"), dy_there, there)
    eager = results(f, dy_there, there)
    assert [t.placements for t in graph] == [t.placements for t in eager]
    assert all(torch.equal(a.to_local(), b.to_local()) for a, b in zip(graph, eager, strict=True))


def module_of_gates(spec: RowNorm, mesh: DeviceMesh) -> None:
    """With parameters on every device, between layers whose tokens are sharded."""
    made = nn.GatedLayerNorm if spec.center else nn.GatedRMSNorm
    alone = made(SIZE, device=torch.device(mesh.device_type), dtype=torch.float64)
    parallel = distribute_module(copy.deepcopy(alone), mesh)
    dy, (x, gate) = drawn(mesh, X, X)
    found = []
    for module, place in ((alone, lambda t: t), (parallel, lambda t: lay(t, mesh, S[1]))):
        leaves = [place(t).detach().requires_grad_() for t in (x, gate)]
        y = module(*leaves)
        y.backward(place(dy))
        found.append([y, *(t.grad for t in leaves), *(p.grad for p in module.parameters())])
    assert_same(found[1], found[0])
    assert found[1][0].placements == (S[1],)


# As test_distributed.CHECKS.
CHECKS: dict[Callable[[Any, DeviceMesh], None], tuple[tuple[RowNorm, ...], tuple[RowNorm, ...]]] = {
    every_layout_of_conditions: (ROW_NORMS, (RMS_NORM,)),
    every_layout_of_gated_sums: (ROW_NORMS, (LAYER_NORM,)),
    ranks_with_more_samples_and_with_none: ((RMS_NORM,), (LAYER_NORM,)),
    gradients_of_conditions_wanted_in_any_order: ((LAYER_NORM,), ()),
    another_order_of_the_gate_and_other_groups: ((RMS_NORM,), ()),
    second_derivatives_of_conditions: ((RMS_NORM,), ()),
    rows_too_long_for_the_kernels: ((RMS_NORM,), ()),
    compiled_conditions: ((LAYER_NORM,), ()),
    module_of_gates: ((RMS_NORM,), ()),
}
