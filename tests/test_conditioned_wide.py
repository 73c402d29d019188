"""Conditioned norms of rows that no program holds: kernels/conditioned_wide.py, kernels/conditioned_backward_wide.py and
what ops/hosts/conditioned_rows.py asks of them. What they share with shorter rows is test_modulated.py's and others'.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from conditioned_norms import DTYPES, EPS, NORMS, Call, assert_right, gated, modulated, of_heads, relative, sets
from machine import ON_GPU
from trinorm import functional
from trinorm.compare import assert_no_worse
from trinorm.forced import forced
from trinorm.ops.conditioned import MOST_OF_ROW
from trinorm.ops.hosts import conditioned_rows
from trinorm.reference import conditioned as conditioned_reference
from trinorm.spec import CASTS, LAYER_NORM, RMS_NORM, Cast, RowNorm
from trinorm.tuning import (
    RowBackwardWide,
    RowForwardWide,
    Tile,
    choose_conditioned_backward,
    choose_conditioned_forward,
)

CHUNK = 16
FORWARD, BACKWARD = RowForwardWide(Tile(1, CHUNK, 1)), RowBackwardWide(Tile(1, CHUNK, 1), stages=3, per_sm=1)

# At the edges of chunks, and within them.
SIZES = (CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 5)


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rows of any size go the long rows' way, in short chunks; two programs share a set's."""
    monkeypatch.setattr(conditioned_rows, "programs_of_a_set", lambda *_: 2)
    with forced(conditioned_forward=FORWARD, conditioned_backward=BACKWARD):
        yield


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.name)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.usefixtures("walked")
def test_every_size(norm: RowNorm, n: int, device: torch.device) -> None:
    dtype = DTYPES[SIZES.index(n) % len(DTYPES)]
    x, gate = (torch.randn(2, 4, n, device=device).to(dtype) for _ in range(2))
    assert_right(modulated(norm, x, sets(x, (2, 1)), sets(x, (2, 1))))
    weight, bias = sets(x, ()), sets(x, ()) if norm.center else None
    for first in (False, True):
        assert_right(gated(norm, x, gate, weight, bias, first=first))


# The leading sizes of x, and of its scale and shift.
SHARED = (
    ((), ()),
    ((11,), (1,)),
    ((3, 5), (3, 1)),
    ((3, 5), (1, 5)),
    ((3, 5), (3, 5)),
    ((2, 2, 3), (2, 1)),
    ((2, 2, 3), (2, 1, 3)),  # which is expanded
)


@pytest.mark.parametrize(("lead", "own"), SHARED, ids=str)
@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.usefixtures("walked")
def test_every_sharing(
    lead: tuple[int, ...],
    own: tuple[int, ...],
    programs: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each set's rows by one program and by several, of more than one turn each, or of none."""
    monkeypatch.setattr(conditioned_rows, "programs_of_a_set", lambda *_: programs)
    x = torch.randn(*lead, 3 * CHUNK, device=device).bfloat16()[..., 3 : 2 * CHUNK + 4]
    assert_right(modulated(LAYER_NORM, x, sets(x, own), sets(x, own)))


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.usefixtures("walked")
def test_groups_heads_and_casting_modes(cast: Cast, device: torch.device) -> None:
    x, gate = (torch.randn(2, 3, 40, device=device).bfloat16() for _ in range(2))
    of_x, wide = sets(x, (2,)), torch.randn(40, device=device)
    for first in (False, True):
        for weight in (of_x[0], wide):
            assert_right(gated(RMS_NORM, x, gate, weight, size=20, first=first, cast=cast))
        assert_right(gated(LAYER_NORM, x, gate, *of_x, first=first, cast=cast, activation="sigmoid"))
    assert_right(of_heads(RMS_NORM, x, wide.expand(3, 40), cast=cast))


@pytest.mark.parametrize("count", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 40, None], ids=str)
@pytest.mark.usefixtures("walked")
def test_counts_at_the_edges_of_chunks(count: int | None, device: torch.device) -> None:
    """None: the L2 norm, and ScaleNorm."""
    x, weight = (torch.randn(s, device=device) for s in ((7, 40), (40,)))
    assert_right(relative(x, weight, count=count, divisor=1 if count is None else None))
    if count is None:
        assert_right(relative(x, weight[:1], divisor=1))


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.name)
@pytest.mark.parametrize("scale", [2.0**70, 2.0**-70, 2.0**-125])
@pytest.mark.parametrize("first", [False, True], ids=["norm first", "gate first"])
@pytest.mark.usefixtures("walked")
def test_rows_beyond_the_squares_of_fp32(norm: RowNorm, scale: float, first: bool, device: torch.device) -> None:
    """As the same rows within them: a power of two is exact, and rstd is as far the other way. Beside rows that are."""
    x, gate = torch.randn(2, 4, 40, device=device)
    call = gated(norm, x, gate + 1, sets(x, ()), first=first, activation="sigmoid", eps=0.0)
    factors = torch.tensor([1.0, scale, scale, 1.0], device=device)[:, None]
    dy, found = torch.randn_like(x), []
    for scaled in (x, x * factors):
        leaves = [None if t is None else t.detach().requires_grad_() for t in call._replace(x=scaled).tensors]
        y = call.of(leaves)()
        asked = [t for t in leaves if t is not None]
        found.append([y.detach(), *torch.autograd.grad(y, asked, dy)])
    plain, of_scaled = found
    if scale > 2.0**-100:  # else dx is beyond fp32
        torch.testing.assert_close(of_scaled[1] * factors, plain[1], rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(of_scaled[2:], plain[2:], rtol=2e-5, atol=2e-6)
    # Of s's products near fp32's denormals some digits are lost before the norm has them.
    rtol = 1e-6 if scale > 2.0**-100 or not first else 1e-4
    torch.testing.assert_close(of_scaled[0], plain[0], rtol=rtol, atol=rtol)


@pytest.mark.parametrize("power", [70, -60])
@pytest.mark.usefixtures("walked")
def test_what_does_not_count_is_of_another_size(power: int, device: torch.device) -> None:
    x = torch.randn(3, 100, device=device)
    x[:, :9] *= 2.0**power
    x[:, 9:] *= 2.0**-power
    call = relative(x, count=9, eps=0.0)
    by_torch = conditioned_reference.composite(*call._replace(x=call.x.double()), torch.float64).float()
    assert_no_worse("y", call(), conditioned_reference.oracle(*call).y, by_torch)


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.usefixtures("walked")
def test_what_is_no_number_stays_where_it_is(norm: RowNorm, dtype: torch.dtype, device: torch.device) -> None:
    """And the mean of a row with infinity is infinite, for who asks."""
    x = torch.randn(6, 33, device=device, dtype=dtype)
    x[0, 3], x[1, 20], x[2, 31], x[3] = torch.nan, torch.inf, -torch.inf, 0.0
    gate, weight, bias = torch.randn_like(x), sets(x, (6,)), sets(x, (6,))
    gate[4, 2] = torch.nan
    weight[0, 0], bias[1, 0] = torch.nan, torch.inf
    call = modulated(norm, x, weight, bias)
    for of in (call, gated(norm, x, gate), gated(norm, x, gate, first=True)):
        by_torch = conditioned_reference.composite(*of, dtype)
        assert_no_worse("y", of(), conditioned_reference.oracle(*of).y, by_torch)
    if norm.center:
        how = 1, 33, None, None, EPS, None, False, True, dtype, False, "output"
        _, mean, _ = torch.ops.trinorm.conditioned_layer_norm(x, None, weight, bias, *how)
        assert mean.flatten()[:4].tolist()[1:] == [torch.inf, -torch.inf, 0.0] and mean.flatten()[0].isnan()


@pytest.mark.usefixtures("walked")
def test_rows_whose_mean_is_large_or_all_that_there_is(device: torch.device) -> None:
    x = torch.randn(4, 300, device=device) + 1e4
    assert_right(modulated(LAYER_NORM, x, sets(x, (1,)), sets(x, (1,))))
    y = functional.modulated_layer_norm(torch.full_like(x, 1e4 + 1 / 3), (300,), torch.ones(300, device=device), eps=1e-12)
    assert not y.any()


def everything(tensors: tuple[Tensor, ...], dy: Tensor) -> list[Tensor]:
    """Of a gated norm: y and every gradient."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = functional.gated_rms_norm(*leaves, batch_invariant=True)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def test_the_same_bits_on_every_run_and_beside_any_rows(device: torch.device) -> None:
    n = 9000 if ON_GPU else 8200
    x, gate, dy = (torch.randn(9, n, device=device).bfloat16() for _ in range(3))
    weight = sets(x, ())
    whole = everything((x, gate, weight), dy)
    for got, want in zip(everything((x, gate, weight), dy), whole, strict=True):
        assert torch.equal(got, want)
    for rows in (slice(7, 8), slice(0, 5)):
        part = everything((x[rows], gate[rows], weight), dy[rows])
        for got, want in zip(part[:3], whole[:3], strict=True):
            assert torch.equal(got, want[rows])
    size = conditioned_rows.describe(device)
    plans = [choose_conditioned_backward(m, 1, n, 2, size, True, True) for m in (1, 1 << 16)]
    assert isinstance(plans[0], RowBackwardWide) and plans[0].tile == plans[1].tile
    assert choose_conditioned_forward(1, n, 2, size) == choose_conditioned_forward(1 << 16, n, 2, size)


OF_INPUTS, OF_PARAMETERS = "conditioned_inputs_backward_wide", "conditioned_parameters_backward_wide"


@pytest.mark.parametrize("wanted", [w for w in itertools.product((False, True), repeat=4) if any(w)], ids=str)
@pytest.mark.parametrize("first", [False, True], ids=["norm first", "gate first"])
def test_only_what_is_asked_for(wanted: tuple[bool, ...], first: bool, device: torch.device, launched: list[Any]) -> None:
    x, gate = torch.randn(2, 3, CHUNK + 4, device=device)
    given, dy = (x, gate, *torch.randn(2, CHUNK + 4, device=device)), torch.randn_like(x)
    with forced(conditioned_forward=FORWARD, conditioned_backward=BACKWARD):
        for _ in range(3 if ON_GPU or all(wanted) else 1):  # the third is a repetition of the second
            launched.clear()
            found = []
            for norm in ("kernels", "torch"):
                leaves = [t.detach().requires_grad_(want) for t, want in zip(given, wanted, strict=True)]
                call = gated(LAYER_NORM, *leaves, first=first)
                y = call() if norm == "kernels" else conditioned_reference.composite(*call, torch.float32)
                found.append(torch.autograd.grad(y, [t for t in leaves if t.requires_grad], dy))
            names = [OF_INPUTS] * any(wanted[:2]) + [OF_PARAMETERS, "sum_partials"] * any(wanted[2:])
            assert [kernel.fn.__name__ for kernel in launched] == ["conditioned_forward_wide", *names]
            for got, want in zip(*found, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


REAL = [(8192, torch.bfloat16, False), (8193, torch.bfloat16, True), (2048, torch.float64, False)]
REAL += [(2049, torch.float64, True), (20000, torch.float32, True)]


@pytest.mark.parametrize(("n", "dtype", "wide"), REAL, ids=str)
def test_real_sizes(n: int, dtype: torch.dtype, wide: bool, device: torch.device, launched: list[Any]) -> None:
    """From the first on that no program holds."""

    def kernels(call: Call) -> list[str]:
        launched.clear()
        assert_right(call)
        return [kernel.fn.__name__ for kernel in launched]

    x, gate = (torch.randn(2, 2, n, device=device).to(dtype) for _ in range(2))
    short, long = ["conditioned_forward", "conditioned_backward"], ["conditioned_forward_wide", OF_INPUTS, OF_PARAMETERS]
    assert kernels(modulated(LAYER_NORM, x, sets(x, (2, 2)), sets(x, (2, 2)))) == (long if wide else short)
    assert kernels(gated(RMS_NORM, x, gate, sets(x, ())))[:2] == (long if wide else short)[:2]
    assert kernels(relative(x, divisor=1)) == (long[:2] if wide else short)


@pytest.mark.filterwarnings("ignore:.*over 1048576 elements")
def test_rows_without_a_kernel(device: torch.device, launched: list[object]) -> None:
    for n, kernels in ((MOST_OF_ROW, 1), (MOST_OF_ROW + 1, 0)):
        x = torch.randn(1, n, device=device)
        for call in (relative(x, count=9), relative(x, divisor=1)):
            launched.clear()
            by_torch = conditioned_reference.composite(*call, x.dtype)
            assert_no_worse("y", call(), conditioned_reference.oracle(*call).y, by_torch)
            assert len(launched) == kernels


@pytest.mark.skipif(not ON_GPU, reason="the interpreter takes minutes")
@pytest.mark.parametrize("own", [(4, 1), (4, 300), (1, 1)], ids=str)
@pytest.mark.parametrize("n", [10000, 16384, 65536])
def test_the_launches_of_real_sizes(own: tuple[int, ...], n: int, device: torch.device) -> None:
    x, gate = (torch.randn(4, 300, n, device=device).bfloat16() for _ in range(2))
    assert_right(modulated(LAYER_NORM, x, sets(x, own), sets(x, own)))
    if own == (1, 1):
        assert_right(gated(RMS_NORM, x, gate, sets(x, ())))
        assert_right(relative(x, sets(x, ()), count=n // 16))
