"""PolyNorm: functional/poly.py, ops/poly.py, kernels/poly.py. What it shares with DyT and Derf is test_inputs_only.py's."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from inputs_only_norms import DTYPES, Call, assert_right, gradients, poly
from machine import ON_GPU
from trinorm import functional
from trinorm.kernels import index
from trinorm.kernels import poly as kernels
from trinorm.ops.hosts import poly_rows
from trinorm.tuning import RowBackward, RowForward, Tile

# At the edges of tiles, and within them.
SIZES = [(33, 1), (5, 2), (70, 65), (3, 129), (3, 1025), (2, 3073)]
EVERY_SIZE = [(*of, dtype) for of in SIZES for dtype in (DTYPES if of[1] in (2, 65) else DTYPES[:1])]


def draw(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device) -> list[Tensor]:
    """x, and a weight and a bias."""
    return [torch.randn(s, device=device).to(dtype) for s in (shape, (3,), (1,))]


@pytest.mark.parametrize(("m", "n", "dtype"), EVERY_SIZE, ids=str)
def test_every_size(m: int, n: int, dtype: torch.dtype, device: torch.device) -> None:
    assert_right(poly(*draw(m, n, dtype=dtype, device=device)))


@pytest.mark.parametrize(
    "dtypes", [d for d in itertools.product(DTYPES[::-1][:3], repeat=3) if len(set(d)) > 1][::3], ids=str
)
def test_weights_of_other_dtypes(dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    assert_right(poly(*(t.to(dtype) for t, dtype in zip(draw(6, 24, device=device), dtypes, strict=True))))


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1.0])
def test_without_a_bias_and_with_other_epsilons(eps: float, device: torch.device) -> None:
    x, weight, bias = draw(2, 3, 40, dtype=torch.bfloat16, device=device)
    assert_right(poly(x, weight, None, eps))
    call, flat = (poly(x, weight, b, eps) for b in (bias, bias.reshape(())))
    assert torch.equal(flat(), call())
    found = gradients(Call.__call__, flat, torch.ones_like(x))[1][2]
    assert found is not None and found.shape == ()


def test_where_tensors_lie(device: torch.device) -> None:
    """Strided rows, aligned or not; and layouts that are copied."""
    for n, offset in ((64, 0), (64, 1), (50, 3)):
        packed = torch.randn(2, 7, 2 * n + offset, device=device).bfloat16()
        weight = torch.randn(4, device=device).bfloat16()[1:]
        assert_right(poly(packed[..., offset : offset + n], weight), packed[..., -n:])
    x, weight, bias = draw(3, 4, 32, device=device)
    for view in (
        lambda t: t.movedim(0, -2).contiguous().movedim(-2, 0) if t.dim() > 1 else t,
        lambda t: torch.stack((t, t), -1)[..., 0],
        lambda t: torch._neg_view(-t),
    ):
        assert_right(poly(view(x), view(weight), bias), view(torch.randn_like(x)))
    assert_right(poly(x[:1].expand(3, 4, 32), weight), torch.randn(32, device=device).expand(3, 4, 32))


@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("tile", [Tile(2, 32, 1), Tile(4, 16, 4)], ids=str)
def test_programs_that_walk(programs: int, tile: Tile, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more than one turn each; in chunks, with lanes to spare. A row that is not there adds nothing, whatever eps is."""
    forward, backward = RowForward(tile, 1, True, True, True), RowBackward(tile, 1, 3, 1, True)
    monkeypatch.setattr(RowBackward, "partials", lambda *_: programs)
    monkeypatch.setattr(poly_rows, "choose_poly_forward", lambda *_: forward)
    monkeypatch.setattr(poly_rows, "choose_poly_backward", lambda *_: backward)
    for eps in (1e-6, 0.0):
        assert_right(poly(*draw(13, 40, device=device), eps))


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-40, 2.0**-22, 2.0**22, 2.0**100])
def test_rows_whose_sixth_powers_fp32_has_not(scale: float, device: torch.device) -> None:
    """Without eps as the same rows within its range, beside rows that are."""
    x, weight, bias = draw(4, 100, device=device)
    factors = torch.tensor([1.0, scale, scale, 1.0], device=device)[:, None]
    dy = torch.randn_like(x)
    (y, (dx, dw, _)), (of_plain, (dx_of_plain, dw_of_plain, _)) = (
        gradients(Call.__call__, poly(t, weight, bias, 0.0), dy) for t in (x * factors, x)
    )
    assert dx is not None and dw is not None and dx_of_plain is not None and dw_of_plain is not None
    torch.testing.assert_close(y, of_plain, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dx * factors, dx_of_plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dw, dw_of_plain, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e-3, 1e6, 1e30])
def test_epsilon_beside_small_and_large_rows(scale: float, device: torch.device) -> None:
    """It outweighs each power of small ones, and each mean square has its own share of it."""
    x, weight, _ = draw(4, 100, device=device)
    x, dy = x * scale, torch.randn_like(x)
    y, (dx, *_) = gradients(Call.__call__, poly(x, weight), dy)
    exact, of_x = poly(x, weight).oracle(), poly(x, weight).oracle_gradients(dy)[0]
    assert dx is not None and of_x is not None
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())
    torch.testing.assert_close(dx.double(), of_x, rtol=1e-5, atol=1e-5 * of_x.abs().max().item())


def test_what_is_no_number_stays_in_its_row(device: torch.device) -> None:
    x, weight, bias = draw(5, 33, device=device)
    x[0, 3], x[1, 20], x[2] = torch.nan, torch.inf, 0.0
    y, by_torch = poly(x, weight, bias)(), poly(x, weight, bias).composite()
    assert y[0].isnan().all()
    torch.testing.assert_close(y, by_torch, equal_nan=True)


def test_the_same_bits_on_every_run_and_beside_any_rows(device: torch.device) -> None:
    x, weight, bias = draw(60, 96, dtype=torch.bfloat16, device=device)
    dy = torch.randn_like(x)

    def everything(rows: slice) -> list[Tensor]:
        y, found = gradients(Call.__call__, poly(x[rows], weight, bias), dy[rows])
        return [y, *(t for t in found if t is not None)]

    whole = everything(slice(None))
    for got, want in zip(everything(slice(None)), whole, strict=True):
        assert torch.equal(got, want)
    for rows in (slice(7, 8), slice(0, 33)):
        for got, want in zip(everything(rows)[:2], whole[:2], strict=True):
            assert torch.equal(got, want[rows])


@pytest.mark.parametrize(
    "wanted", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)], ids=str
)
def test_only_what_is_asked_for(wanted: tuple[bool, ...], device: torch.device, launched: list[Any]) -> None:
    given = poly(*draw(40, 24, device=device))
    dy = torch.randn_like(given.x)
    for _ in range(3):  # the third is a repetition of the second
        launched.clear()
        found = []
        for by in (Call.__call__, Call.composite):
            leaves = [t.detach().requires_grad_(want) for t, want in zip(given.present, wanted, strict=True)]
            found.append(torch.autograd.grad(by(given.given(leaves)), [t for t in leaves if t.requires_grad], dy))
        sums = ["sum_columns_and_numbers"] * (wanted[1] or wanted[2])
        assert [kernel.fn.__name__ for kernel in launched] == ["poly_forward", "poly_backward", *sums]
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*over 8192 elements")
def test_wider_rows_have_torchs_operators(device: torch.device, launched: list[Any]) -> None:
    assert_right(poly(*draw(2, 8200, device=device)))
    assert launched == []
    if ON_GPU:
        with pytest.warns(UserWarning, match="over 2048 elements"):
            poly(*draw(2, 2049, dtype=torch.float64, device=device))()


@pytest.mark.skipif(not ON_GPU, reason="its kernel needs a GPU")
def test_in_liger(device: torch.device) -> None:
    """The order of the weight, and eps."""
    of = pytest.importorskip("liger_kernel.transformers.functional")
    x, weight, bias = draw(4, 96, device=device)
    found = functional.poly_norm(x, weight, bias, 1e-6)
    torch.testing.assert_close(found, of.liger_poly_norm(x, weight, bias, 1e-6), rtol=1e-4, atol=1e-4)


# --- the helpers, each alone ---

ROWS, CHUNK, N = 4, 8, 14


@triton.jit
def _stats_kernel(OUT, X, eps, SCALED: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    rows = index.tile_rows(0, ROWS)
    xs = index.load_row(X + rows * N, rows >= 0, N, CHUNK, False)
    eps = tl.full([1, 1], eps, tl.float32)
    scale = kernels.row_scale(xs, eps, tl.float32)
    r3, r2, r1, held = kernels.poly_stats(xs, scale if SCALED else None, eps, N, tl.float32)
    tl.store(OUT + rows, scale)
    tl.store(OUT + ROWS + rows, r3)
    tl.store(OUT + 2 * ROWS + rows, r2)
    tl.store(OUT + 3 * ROWS + rows, r1)
    tl.store(OUT + 4 * ROWS + rows, held.to(tl.float32))


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("scaled", [True, False])
def test_statistics(scaled: bool, eps: float, device: torch.device) -> None:
    """Of rows as they are, and of scaled ones, whose scale is a power of two that eps too has a say in."""
    factors = torch.tensor([1.0, 2.0**100, 2.0**-100, 2.0**-4], device=device)
    x = torch.randn(ROWS, N, device=device) * factors[:, None]
    out = torch.empty(5, ROWS, device=device)
    _stats_kernel[(1,)](out, x, eps, SCALED=scaled, N=N, ROWS=ROWS, CHUNK=CHUNK)
    scale, *found, held = out.double()
    largest = torch.maximum(x.double().abs().amax(1), torch.tensor(eps, dtype=torch.float64, device=device) ** (1 / 6))
    assert ((largest * scale >= 1) & (largest * scale < 2.0001)).all()
    assert (scale.log2() == scale.log2().round()).all()
    if not scaled:
        assert held.tolist() == [1, 0, eps > 0, 1]
        scale = torch.where(held == 1, torch.ones_like(scale), torch.nan)
    s = x.double() * scale[:, None]
    for k, r in zip((3, 2, 1), found, strict=True):
        exact = ((s**k).square().mean(1) + eps * scale ** (2 * k)).rsqrt()
        torch.testing.assert_close(r[held == 1], exact[held == 1], rtol=2**-21, atol=0.0)


@triton.jit
def _sums_kernel(OUT, X, DY, scale, N: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    rows = index.tile_rows(0, ROWS)
    xs = index.load_row(X + rows * N, rows >= 0, N, CHUNK, False)
    dys = index.load_row(DY + rows * N, rows >= 0, N, CHUNK, False)
    eps = tl.full([1, 1], 1e-6, tl.float32)
    scales = None if scale is None else tl.full([ROWS, 1], scale, tl.float32)
    stats, sums = kernels.poly_stats_and_sums(xs, dys, scales, eps, N, tl.float32)  # Triton 3.6: no tuples of tuples
    r3, r2, r1, _ = stats
    a3, a2, a1, total = sums
    tl.store(OUT + rows, a3)
    tl.store(OUT + ROWS + rows, a2)
    tl.store(OUT + 2 * ROWS + rows, a1)
    tl.store(OUT + 3 * ROWS + rows, total)
    tl.store(OUT + 4 * ROWS + rows, r3)
    tl.store(OUT + 5 * ROWS + rows, r2)
    tl.store(OUT + 6 * ROWS + rows, r1)


@pytest.mark.parametrize("scale", [None, 0.5])
def test_sums(scale: float | None, device: torch.device) -> None:
    """Beside the statistics, of which they are sums."""
    x, dy = torch.randn(2, ROWS, N, device=device)
    out = torch.empty(7, ROWS, device=device)
    _sums_kernel[(1,)](out, x, dy, scale, N=N, ROWS=ROWS, CHUNK=CHUNK)
    of_scale = scale or 1.0
    s, g = x.double() * of_scale, dy.double()
    rs = [((s**k).square().mean(1) + 1e-6 * of_scale ** (2 * k)).rsqrt() for k in (3, 2, 1)]
    sums = [(g * s**k).sum(1) * r for k, r in zip((3, 2, 1), rs, strict=True)]
    torch.testing.assert_close(out.double(), torch.stack([*sums, g.sum(1), *rs]), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not ON_GPU, reason="the interpreter takes minutes")
@pytest.mark.parametrize(("m", "n"), [(65536, 128), (16384, 1152), (4096, 8192)], ids=str)
def test_the_launches_of_real_sizes(m: int, n: int, device: torch.device) -> None:
    assert_right(poly(*draw(m, n, dtype=torch.bfloat16, device=device)))
