"""What test_distributed.py checks of QK-norm."""

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
from trinorm.spec import RMS_NORM, RowNorm
from two_ranks import assert_same, by_kernels, lay, lay_each, results

# Samples × tokens × heads × elements.
TOKENS, QUERIES, KEYS, SIZE = (2, 4), 4, 2, 8

R, P = Replicate(), Partial()
S = tuple(Shard(dim) for dim in range(4))

# The leading dims of cos; how queries, keys, weights, cos and sin, and both gradients lie; how the gradients of queries, of
# keys and of their weights do, and the results as the first two.
LAYOUTS: list[tuple[tuple[int, ...], tuple[Placement, ...], tuple[Placement, ...]]] = [
    # Heads, as tensor parallel layers have them: every device has all places.
    ((4,), (S[2], S[2], R, R, S[2], S[2]), (S[2], S[2], P, P)),
    ((2, 4), (S[2], S[2], R, R, S[2], S[2]), (S[2], S[2], P, P)),
    # Keys that are fewer than devices, whole on each.
    ((4,), (S[2], R, R, R, S[2], R), (S[2], R, P, R)),
    # Tokens, with cos and sin beside them; samples, which share these or have their own.
    ((4,), (S[1], S[1], R, S[0], S[1], S[1]), (S[1], S[1], P, P)),
    ((1, 4), (S[1], S[1], R, S[1], S[1], S[1]), (S[1], S[1], P, P)),
    ((4,), (S[0], S[0], R, R, S[0], S[0]), (S[0], S[0], P, P)),
    ((1, 4), (S[0], S[0], R, R, S[0], S[0]), (S[0], S[0], P, P)),
    ((2, 4), (S[0], S[0], R, S[0], S[0], S[0]), (S[0], S[0], P, P)),
    ((2, 1), (S[1], S[1], R, R, S[1], S[1]), (S[1], S[1], P, P)),
    # cos and sin that are whole are cut, where tokens are not.
    ((4,), (S[1], S[1], R, R, S[1], S[1]), (S[1], S[1], P, P)),
    # All of all, and weights as FSDP has them.
    ((4,), (R,) * 6, (R,) * 4),
    ((4,), (S[2], S[2], S[0], R, S[2], S[2]), (S[2], S[2], P, P)),
]
# Others, of which DTensor is free to choose the results' layouts: elements that are sharded, sums not yet taken, sides and
# gradients that lie each in its own way.
FREE: list[tuple[tuple[int, ...], tuple[Placement, ...]]] = [
    ((4,), (S[3], S[3], R, S[1], S[3], S[3])),
    ((4,), (P, S[2], R, R, S[2], P)),
    ((4,), (S[0], S[2], R, R, S[1], R)),
    ((4,), (R, S[2], R, R, R, S[2])),
]


def norm(angles: list[Tensor], interleaved: bool = False) -> Callable[..., tuple[Tensor, Tensor]]:
    turn: dict[str, Any] = dict(zip(("cos", "sin"), angles, strict=False))
    return lambda *given: functional.qk_norm(*given, eps=1e-5, interleaved=interleaved, **turn)


def drawn(
    mesh: DeviceMesh,
    of_cos: tuple[int, ...] = (4,),
    tokens: tuple[int, ...] = TOKENS,
    heads: tuple[int, int] = (QUERIES, KEYS),
) -> tuple[tuple[Tensor, ...], list[Tensor], list[Tensor]]:
    """(both gradients, [query, key, query_weight, key_weight], [cos, sin] of six elements), the same on each rank."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(mesh.device_type)

    sides = [(*tokens, n, SIZE) for n in heads]
    gradients = normal(*sides[0]), normal(*sides[1])
    return gradients, [*(normal(*side) for side in sides), normal(SIZE), normal(SIZE)], [normal(*of_cos, 6) for _ in "cs"]


def every_layout_of_heads(spec: RowNorm, mesh: DeviceMesh) -> None:
    every = [*LAYOUTS, *((of_cos, placements, ()) for of_cos, placements in FREE)]
    for of_cos, (of_query, of_key, of_weights, of_angles, *of_dys), laid in every[:: 2 if road.INTERPRETED else 1]:
        dys, inputs, angles = drawn(mesh, of_cos)
        there = lay_each(inputs, mesh, of_query, of_key, of_weights, of_weights)
        angles_there = lay_each(angles, mesh, of_angles, of_angles)
        dys_there = tuple(lay_each(dys, mesh, *of_dys))
        for interleaved in (False, True):
            with by_kernels():
                found = results(norm(angles_there, interleaved), dys_there, there)
            if laid:
                expected = [(p,) for p in (*laid[:2], *laid)]
                assert [t.placements for t in found] == expected, (of_cos, of_query, of_key, of_angles, of_dys)
            assert_same(found, results(norm(angles, interleaved), dys, inputs))


def heads_without_a_rotation(spec: RowNorm, mesh: DeviceMesh) -> None:
    dys, inputs, _ = drawn(mesh)
    for dim in range(3):
        there = lay_each(inputs, mesh, S[dim], S[dim], R, R)
        found = results(norm([]), tuple(lay_each(dys, mesh, S[dim], S[dim])), there)
        assert [t.placements for t in found] == [(p,) for p in (*[S[dim]] * 4, P, P)]
        assert_same(found, results(norm([]), dys, inputs))
        (query, key, *_), without = there, inputs[:2]
        assert_same(list(norm([])(query, key)), list(norm([])(*without)))


def ranks_with_more_heads_and_with_none(spec: RowNorm, mesh: DeviceMesh) -> None:
    """Heads, and tokens, that two ranks cannot share evenly."""
    for tokens, heads, dim in (((2, 4), (3, 1), 2), ((2, 3), (4, 2), 1), ((1, 4), (4, 2), 0), ((3,), (2, 1), 0)):
        dys, inputs, angles = drawn(mesh, tokens[-1:], tokens, heads)
        there = lay_each(inputs, mesh, S[dim], S[dim], R, R)
        found = results(norm(lay_each(angles, mesh, R, R)), tuple(lay_each(dys, mesh, S[dim], S[dim])), there)
        assert_same(found, results(norm(angles), dys, inputs))


def gradients_of_heads_wanted_in_any_order(spec: RowNorm, mesh: DeviceMesh) -> None:
    """DTensor asks for a rule once, and these calls have the same layouts; of one result the other's gradient is none."""
    dys, inputs, angles = drawn(mesh)
    there, dys_there = lay_each(inputs, mesh, S[2], S[2], R, R), lay_each(dys, mesh, S[2], S[2])
    angles_there = lay_each(angles, mesh, R, R)
    for wanted in itertools.product((False, True), repeat=4):
        kept = [i for i in range(2) if wanted[i] or wanted[2 + i]]
        if not kept:
            continue

        def some(angles: list[Tensor], kept: list[int] = kept) -> Callable[..., tuple[Tensor, ...]]:
            return lambda *given: tuple(norm(angles)(*given)[i] for i in kept)

        with by_kernels():
            found = results(some(angles_there), tuple(dys_there[i] for i in kept), there, wanted)
        assert_same(found, results(some(angles), tuple(dys[i] for i in kept), inputs, wanted))


def second_derivatives_of_heads(spec: RowNorm, mesh: DeviceMesh) -> None:
    def second(inputs: list[Tensor], angles: list[Tensor]) -> list[Any]:
        inputs = [t.detach().requires_grad_() for t in inputs]
        total: Any = sum(y.sin().sum() for y in norm(angles)(*inputs))
        first = torch.autograd.grad(total, inputs, create_graph=True)
        return [*first, *torch.autograd.grad(sum(t.cos().sum() for t in first[:2]), inputs)]

    _, inputs, angles = drawn(mesh)
    found = second(lay_each(inputs, mesh, S[2], S[2], R, R), lay_each(angles, mesh, R, R))
    assert_same(found, second(inputs, angles))


def angles_that_require_gradients(spec: RowNorm, mesh: DeviceMesh) -> None:
    """Which torch's operators compute, of DTensors too."""

    def all_given(*given: Tensor) -> tuple[Tensor, Tensor]:
        return norm(list(given[4:]))(*given[:4])

    dys, inputs, angles = drawn(mesh)
    there = lay_each([*inputs, *angles], mesh, S[0], S[0], R, R, R, R)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*cos or sin requires a gradient")  # as a GPU says
        found = results(all_given, tuple(lay_each(dys, mesh, S[0], S[0])), there, (True,) * 6)
        assert_same(found, results(all_given, dys, [*inputs, *angles], (True,) * 6))


def compiled_heads(spec: RowNorm, mesh: DeviceMesh) -> None:
    torch._dynamo.reset()
    dys, inputs, angles = drawn(mesh)
    angles_there = lay_each(angles, mesh, R, R)

    def f(query: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        return norm(angles_there)(query * 2, *others)

    there, dys_there = lay_each(inputs, mesh, S[2], S[2], R, R), tuple(lay_each(dys, mesh, S[2], S[2]))
    graph = results(torch.compile(f, fullgraph=True, backend="aot_eager"), dys_there, there)
    eager = results(f, dys_there, there)
    assert [t.placements for t in graph] == [t.placements for t in eager]
    assert all(torch.equal(a.to_local(), b.to_local()) for a, b in zip(graph, eager, strict=True))


def module_of_heads(spec: RowNorm, mesh: DeviceMesh) -> None:
    """With parameters on every device, between tensor-parallel projections, whose heads are sharded."""
    alone = nn.QKNorm(SIZE, device=torch.device(mesh.device_type), dtype=torch.float64)
    parallel = distribute_module(copy.deepcopy(alone), mesh)
    dys, (query, key, *_), angles = drawn(mesh)
    found = []
    for module, dim in ((alone, None), (parallel, 2)):

        def place(t: Tensor, dim: int | None = dim, to: int | None = None) -> Tensor:
            return t if dim is None else lay(t, mesh, R if to is None else S[to])

        leaves = [place(t, to=2).detach().requires_grad_() for t in (query, key)]
        outs = module(*leaves, *(place(t) for t in angles))
        torch.autograd.backward(outs, [place(t, to=2) for t in dys])
        found.append([*outs, *(t.grad for t in leaves), *(p.grad for p in module.parameters())])
    assert_same(found[1], found[0])
    assert [t.placements for t in found[1][:4]] == [(S[2],)] * 4


# As test_distributed.CHECKS.
CHECKS: dict[Callable[[Any, DeviceMesh], None], tuple[tuple[RowNorm, ...], tuple[RowNorm, ...]]] = {
    check: ((RMS_NORM,), (RMS_NORM,) if interpreted else ())
    for check, interpreted in (
        (every_layout_of_heads, True),
        (heads_without_a_rotation, True),
        (ranks_with_more_heads_and_with_none, True),
        (gradients_of_heads_wanted_in_any_order, False),
        (second_derivatives_of_heads, False),
        (angles_that_require_gradients, False),
        (compiled_heads, False),
        (module_of_heads, True),
    )
}
