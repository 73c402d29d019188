"""RMSNorm's relatives by their statistic: functional/relatives.py, and what kernels/conditioned.py and
reference/conditioned.py do for them. test_relatives_in_torch.py has what torch sees of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from conditioned_norms import DTYPES, EPS, Call, assert_right, relative
from machine import ON_GPU
from trinorm import functional
from trinorm.compare import assert_no_worse
from trinorm.ops.hosts import conditioned_rows
from trinorm.ops.problems.conditioned import Conditioned
from trinorm.reference import conditioned as conditioned_reference
from trinorm.spec import CASTS, RMS_NORM, Cast, ConditionedNorm
from trinorm.tuning import RowBackward, RowForward, Tile

# At the edges of tiles, and within them.
SIZES = (1, 2, 65, 200, 1025)


def draw(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device) -> tuple[Tensor, Tensor]:
    """x, and a weight of its last dim."""
    x, weight = (torch.randn(s, device=device).to(dtype) for s in (shape, shape[-1:]))
    return x, weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_every_size(dtype: torch.dtype, n: int, device: torch.device) -> None:
    x, weight = draw(40 if n < 100 else 3, n, dtype=dtype, device=device)  # torch's error, of few numbers, is chance
    assert_right(relative(x, divisor=1))
    assert_right(relative(x, weight, divisor=1))
    for count in {1, -(-n // 3), n}:
        assert_right(relative(x, weight, count=count))


@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("count", [1, 15, 16, 17, 32, 40, None], ids=str)
def test_counts_at_the_edges_of_chunks(
    count: int | None, programs: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None: the L2 norm. By programs that walk, in chunks, with lanes to spare."""
    tile = Tile(2, 16, 1)
    forward, backward = RowForward(tile, 1, True, True, True), RowBackward(tile, 1, 3, 1, True)
    monkeypatch.setattr(conditioned_rows, "choose_conditioned_forward", lambda *_: forward)
    monkeypatch.setattr(conditioned_rows, "choose_conditioned_backward", lambda *_: backward)
    monkeypatch.setattr(conditioned_rows, "programs_of_a_set", lambda *_: programs)
    x, weight = draw(7, 40, device=device)
    assert_right(relative(x, weight, count=count, divisor=1 if count is None else None))


def test_any_sum_over_anything_before_and_behind_a_gate(device: torch.device) -> None:
    """The family's kernels take the statistic beside all else: of groups, of a gate, of a scale and a shift."""
    x, gate, weight, bias = torch.randn(4, 3, 24, device=device)
    for spec in (
        ConditionedNorm(RMS_NORM, "silu", counted=5, divisor=3),
        ConditionedNorm(RMS_NORM, "sigmoid", gate_first=True, counted=8, divisor=1),
        ConditionedNorm(RMS_NORM, modulated=True, counted=7, divisor=7),
    ):
        given = None if spec.gate is None else gate
        call = Call(spec, 1, 8 if spec.gate else 24, x, given, weight[0], bias[0])
        problem = Conditioned(spec, 1, call.size, EPS, x.dtype)
        y, mean, rstd = conditioned_rows.forward(problem, conditioned_rows.Inputs(*call.tensors), save=True)
        assert y is not None and rstd is not None
        assert_no_worse("y", y, conditioned_reference.oracle(*call).y, conditioned_reference.composite(*call, x.dtype))
        wanted = tuple(t is not None for t in call.tensors)
        dy = torch.randn_like(x)
        found = conditioned_rows.backward(problem, conditioned_rows.Inputs(*call.tensors), dy, mean, rstd, wanted)
        leaves = [t.double().requires_grad_() for t in call.tensors if t is not None]
        there = iter(leaves)
        exact = conditioned_reference.composite(*call.of(next(there) if w else None for w in wanted), torch.float64)
        expected = torch.autograd.grad(exact, leaves, dy.double())
        closed = conditioned_reference.oracle_gradients(*call, dy)
        for got, want, by_formula in zip(
            (t for t in found if t is not None), expected, (t for t in closed if t is not None), strict=True
        ):
            torch.testing.assert_close(by_formula, want, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_casting_modes(cast: Cast, weight_dtype: torch.dtype, device: torch.device) -> None:
    x, weight = draw(4, 48, dtype=torch.bfloat16, device=device)
    assert_right(relative(x, weight.to(weight_dtype), divisor=1, cast=cast))
    assert_right(relative(x, weight.to(weight_dtype), count=5, cast=cast))


def test_heads_where_they_lie(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a packed projection, with no copy, forward and backward; and in layouts that are copied."""
    read: list[int] = []
    for name in ("forward", "backward"):
        honest: Callable[..., Any] = getattr(conditioned_rows, name)

        def watched(problem: Any, inputs: Any, *args: Any, honest: Any = honest, **how: Any) -> Any:
            read.append(inputs.x.data_ptr())
            return honest(problem, inputs, *args, **how)

        monkeypatch.setattr(conditioned_rows, name, watched)
    packed = torch.randn(2, 7, 6, 16, device=device).bfloat16()
    for x in (packed[..., 2:4, :], packed[0, :, 5], packed[..., :8]):
        read.clear()
        assert_right(relative(x, divisor=1))
        assert_right(relative(x, count=3))
        assert read == [x.data_ptr()] * 4
    for x in (packed.movedim(0, -2), packed.transpose(2, 3), torch._neg_view(packed), packed[:1].expand(2, 7, 6, 16)):
        assert_right(relative(x, divisor=1))


def test_rows_of_several_dims(device: torch.device) -> None:
    x, weight = torch.randn(2, 3, 4, 5, device=device), torch.randn(4, 5, device=device)
    assert_right(relative(x, weight, divisor=1, dims=2))
    for count in (1, 7, 20):
        assert_right(relative(x, weight, count=count, dims=2))


# --- squares that fp32 does not hold ---

POWERS = pytest.mark.parametrize("power", [70, -70, 110, -110])


def assert_as_within(call: Call, factors: Tensor) -> None:
    """y and every gradient of rows times powers of two, with eps 0: torch's own of the rows without are the yardstick."""
    problem = call._replace(eps=0.0)
    scaled = problem._replace(x=call.x * factors)
    dy = torch.randn_like(call.x)
    leaves = [t.detach().requires_grad_() for t in scaled.tensors if t is not None]
    plain = [t.detach().requires_grad_() for t in problem.tensors if t is not None]
    y = scaled._replace(**dict(zip(("x", "weight"), leaves, strict=False)))()
    by_torch = conditioned_reference.composite(
        *problem._replace(**dict(zip(("x", "weight"), plain, strict=False))), y.dtype
    )
    assert_no_worse("y", y.detach(), conditioned_reference.oracle(*scaled).y, by_torch.detach())
    exact = [t for t in conditioned_reference.oracle_gradients(*scaled, dy) if t is not None]
    found, torchs = torch.autograd.grad(y, leaves, dy), torch.autograd.grad(by_torch, plain, dy)
    terms = problem.x.double().square().mean(-1, keepdim=True).rsqrt().expand_as(call.x) * dy.abs().amax()
    assert_no_worse("dx", found[0] * factors, exact[0] * factors.double(), torchs[0], terms)
    for got, want, theirs in zip(found[1:], exact[1:], torchs[1:], strict=True):
        assert_no_worse("dw", got, want, theirs, theirs.abs() + y.detach().abs().amax())


@POWERS
def test_rows_beyond_the_squares_of_fp32(power: int, device: torch.device) -> None:
    """Beside rows within them."""
    x, weight = draw(4, 100, device=device)
    factors = torch.tensor([0, power, power, 0], device=device).float().exp2()[:, None]
    assert_as_within(relative(x, divisor=1), factors)
    assert_as_within(relative(x, weight[:1], divisor=1), factors)
    assert_as_within(relative(x, weight, count=9), factors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("power", [70, -60])
def test_what_does_not_count_is_of_another_size(power: int, dtype: torch.dtype, device: torch.device) -> None:
    """The rescue scales by what counts: over the row's largest element the squares that count would be 2^-240, and so 0."""
    x = torch.randn(3, 100, device=device)
    x[:, :9] *= 2.0**power
    x[:, 9:] *= 2.0**-power
    call = relative(x.to(dtype), count=9, eps=0.0)
    by_torch = conditioned_reference.composite(*call._replace(x=call.x.double()), torch.float64).to(dtype)
    assert_no_worse("y", call(), conditioned_reference.oracle(*call).y, by_torch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [1e-6, 1e-12])
def test_a_row_of_zeros(dtype: torch.dtype, eps: float, device: torch.device) -> None:
    """Gives zeros, and a gradient of 1/√eps; twice differentiated too. An overflow of fp16 is the dtype's."""
    x, weight = draw(3, 40, dtype=dtype, device=device)
    x[1] = 0
    dy = torch.randn_like(x) / 64
    for call in (relative(x, divisor=1, eps=eps), relative(x, weight, count=7, eps=eps)):
        x = call.x.detach().requires_grad_()
        y = call._replace(x=x)()
        assert torch.equal(y[1], torch.zeros_like(y[1]))
        exact = conditioned_reference.oracle_gradients(*call, dy)[0]
        assert exact is not None and exact.isfinite().all()
        of_torch = call.x.detach().requires_grad_()
        by_torch = conditioned_reference.composite(*call._replace(x=of_torch), dtype)
        found, theirs = (torch.autograd.grad(r, t, dy)[0] for r, t in ((y, x), (by_torch, of_torch)))
        assert_no_worse("dx", found[1], exact[1], theirs[1])
        (first,) = torch.autograd.grad(call._replace(x=x)(), x, dy, create_graph=True)
        (second,) = torch.autograd.grad(first.float().square().sum(), x)
        assert dtype == torch.float16 or second.isfinite().all()


# --- by others' definitions ---


def test_beside_torchs_normalize(device: torch.device) -> None:
    """Whose epsilon bounds the norm: the same where neither shows, and not where the norm is small."""
    x = torch.randn(4, 32, device=device)
    torch.testing.assert_close(functional.l2_norm(x), torch.nn.functional.normalize(x, dim=-1), rtol=1e-6, atol=1e-7)
    small = functional.l2_norm(x * 1e-4)
    assert (small.norm(dim=-1) < 0.9).all()
    torch.testing.assert_close(functional.l2_norm(x * 1e-4, eps=0.0), torch.nn.functional.normalize(x, dim=-1))


def test_the_whole_of_a_row_is_rms_norm(device: torch.device) -> None:
    """To the bit, forward and backward."""
    x, weight = draw(6, 70, device=device)
    dy = torch.randn_like(x)
    found = []
    for norm in (
        lambda x, w: functional.partial_rms_norm(x, (70,), w, p=1.0),
        lambda x, w: functional.partial_rms_norm(x, (70,), w, count=70),
        lambda x, w: functional.per_head_rms_norm(x.unsqueeze(-2), w[None]).squeeze(-2),
    ):
        leaves = [t.detach().requires_grad_() for t in (x, weight)]
        y = norm(*leaves)
        found.append([y, *torch.autograd.grad(y, leaves, dy)])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize(
    ("p", "n", "count"), [(None, 64, 4), (None, 65, 5), (0.1, 70, 7), (0.3, 10, 3), (0.7, 10, 7), (1e-9, 40, 1), (1, 9, 9)]
)
def test_a_part_rounded_up(p: float | None, n: int, count: int, device: torch.device) -> None:
    """And not because p·n is: .1·70 is 7.000000000000001."""
    x, _ = draw(3, n, device=device)
    y = functional.partial_rms_norm(x, (n,), p=p)
    assert torch.equal(y, functional.partial_rms_norm(x, (n,), count=count))
    assert count == n or not torch.equal(y, functional.partial_rms_norm(x, (n,), count=count + 1))


# --- ScaleNorm ---


DRAWS = 32  # of one number, torch's error is chance


@pytest.mark.parametrize(
    ("shape", "dtypes"),
    [((), (torch.bfloat16, torch.float32)), ((1,), (torch.float32, torch.bfloat16)), ((), (torch.float64, torch.float64))],
    ids=str,
)
def test_one_weight_for_all(shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    """Of either shape, and of another dtype; its gradient's sum, too, is no worse than torch's."""
    of_x, of_weight = dtypes
    found: list[list[Tensor]] = []
    for _ in range(DRAWS):
        x, weight = torch.randn(9, 24, device=device).to(of_x), torch.randn(shape, device=device).to(of_weight)
        call, dy = relative(x, weight, divisor=1), torch.randn_like(x)
        results = [conditioned_reference.oracle(*call).y, *conditioned_reference.oracle_gradients(*call, dy)[::2]]
        for norm in (Call.__call__, lambda call: conditioned_reference.composite(*call, of_x)):
            leaves = [t.detach().requires_grad_() for t in (x, weight)]
            y = norm(call._replace(x=leaves[0], weight=leaves[1]))
            results += [y.detach(), *torch.autograd.grad(y, leaves, dy)]
        found.append([t for t in results if t is not None])
        assert found[-1][5].shape == shape and found[-1][5].dtype == of_weight
    exact, ours, torchs = (list(map(torch.stack, zip(*(of[i : i + 3] for of in found), strict=True))) for i in (0, 3, 6))
    for name, got, want, theirs in zip(("y", "dx", "dg"), ours, exact, torchs, strict=True):
        assert_no_worse(name, got, want, theirs)


def test_the_gradient_of_one_weight_has_the_same_bits_on_every_run(device: torch.device) -> None:
    x, dy = torch.randn(2, 300, 24, device=device)
    found = []
    for _ in range(3):
        g = torch.ones((), device=device, requires_grad=True)
        found += torch.autograd.grad(functional.scale_norm(x, g), g, dy)
    assert all(torch.equal(found[0], other) for other in found)


# --- which rows ---


def test_batch_invariant(device: torch.device) -> None:
    x, weight = draw(65, 48, device=device)
    dy = torch.randn_like(x)

    def everything(norm: Callable[..., Tensor], rows: slice) -> list[Tensor]:
        leaf = x[rows].detach().requires_grad_()
        y = norm(leaf, batch_invariant=True)
        return [y.detach(), *torch.autograd.grad(y, leaf, dy[rows])]

    for norm in (
        functional.l2_norm,
        lambda x, **how: functional.scale_norm(x, weight[0], **how),
        lambda x, **how: functional.partial_rms_norm(x, (48,), weight, **how),
    ):
        whole = everything(norm, slice(None))
        for rows in (slice(7, 8), slice(0, 33)):
            assert all(torch.equal(got, want[rows]) for got, want in zip(everything(norm, rows), whole, strict=True))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0)], ids=str)
def test_nothing_to_normalize(shape: tuple[int, ...], device: torch.device, launched: list[object]) -> None:
    x, weight = (t.requires_grad_() for t in draw(*shape, device=device))
    for y in (functional.l2_norm(x), functional.partial_rms_norm(x, shape[1:], weight)):
        assert y.shape == shape
        assert torch.autograd.grad(y, x, torch.randn_like(y))[0].shape == shape
    g = torch.ones((), device=device, requires_grad=True)
    y = functional.scale_norm(x, g)
    assert torch.equal(torch.autograd.grad(y, g, torch.randn_like(y))[0], torch.zeros_like(g))
    assert launched == []


@pytest.mark.skipif(not ON_GPU, reason="the interpreter takes minutes")
@pytest.mark.parametrize("n", [128, 1024, 4096, 8192])
def test_the_launches_of_real_sizes(n: int, device: torch.device) -> None:
    x, weight = draw(4, 1024, n, dtype=torch.bfloat16, device=device)
    for call in (relative(x, divisor=1), relative(x, weight[:1], divisor=1), relative(x, weight, count=n // 16)):
        assert_right(call)
