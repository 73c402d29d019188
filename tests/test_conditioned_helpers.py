"""The jit helpers of kernels/conditioned.py and kernels/conditioned_backward.py, each alone, in the smallest kernel that
calls it; and a gate's of kernels/activation.py.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from trinorm.kernels import activation, affine, conditioned, conditioned_backward, index
from trinorm.spec import GATE_ACTIVATIONS

ROWS, CHUNK, N = 4, 8, 14


@triton.jit
def _rows_kernel(OUT, X, strides, N: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    rows, columns = index.tile_rows(0, ROWS), index.chunk_columns(0, CHUNK)
    offsets = index.row_offsets(rows, (), strides)
    xs = conditioned.load_rows(X, offsets, rows < 3, N, CHUNK, False)
    ws = conditioned.load_rows_or(X, offsets, rows < 3, N, CHUNK, affine.NO_WEIGHT)
    for i in tl.static_range(len(ws)):
        at = OUT + rows * 2 * CHUNK + i * CHUNK + columns
        tl.store(at, ws[i] + tl.zeros([ROWS, CHUNK], tl.float32))
        if X is not None:
            tl.store(at + ROWS * 2 * CHUNK, xs[i])


def test_rows(device: torch.device) -> None:
    """With strides of their own, 0 among them; and what is not there is the constant."""
    x = torch.randn(ROWS, 20, device=device)
    for stride in (20, 0):
        out = torch.empty(2, ROWS, 2 * CHUNK, device=device)
        _rows_kernel[(1,)](out, x, (stride,), N=N, ROWS=ROWS, CHUNK=CHUNK)
        expected = x[:, :N] if stride else x[:1, :N].expand(ROWS, N)
        assert torch.equal(out[:, :3, :N], expected[:3].expand(2, 3, N))
        assert torch.equal(out[:, 3:, :N], torch.tensor([1.0, 0.0], device=device).view(2, 1, 1).expand(2, 1, N))
    _rows_kernel[(1,)](out, None, (20,), N=N, ROWS=ROWS, CHUNK=CHUNK)
    assert torch.equal(out[0], torch.ones_like(out[0]))


@triton.jit
def _gate_kernel(OUT, X, Z, DY, GATE: tl.constexpr, CHUNK: tl.constexpr):
    columns = index.chunk_columns(0, CHUNK)
    x, z, dy = tl.load(X + columns), tl.load(Z + columns), tl.load(DY + columns)
    (product,) = conditioned.gated((x,), (z,), GATE, tl.float32)
    (same,) = conditioned.gated((x,), (), None, tl.float32)
    tl.store(OUT + columns, activation.gate_of(z.to(tl.float32), GATE))
    tl.store(OUT + CHUNK + columns, product)
    tl.store(OUT + 2 * CHUNK + columns, same.to(tl.float32))
    tl.store(OUT + 3 * CHUNK + columns, activation.activated_backward(dy, z.to(tl.float32), GATE))


@pytest.mark.parametrize("gate", GATE_ACTIVATIONS)
def test_gates(gate: str, device: torch.device) -> None:
    n = 64
    x, z = torch.randn(2, n, device=device).bfloat16()
    z[:6] = torch.tensor([0.0, 30.0, -30.0, 200.0, -200.0, torch.nan])
    dy, out = torch.randn(n, device=device), torch.empty(4, n, device=device)
    _gate_kernel[(1,)](out, x, z, dy, GATE=gate, CHUNK=n)
    wide = z.double().requires_grad_()
    a = torch.sigmoid(wide) if gate == "sigmoid" else torch.nn.functional.silu(wide)
    (dz,) = torch.autograd.grad(a, wide, dy.double())
    expected = torch.stack([a.detach(), a.detach() * x.double(), x.double(), dz])
    torch.testing.assert_close(out.double(), expected, rtol=3e-6, atol=2.0**-24, equal_nan=True)


@triton.jit
def _stats_kernel(
    OUT,
    GOOD,
    X,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    CENTER: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    rows = index.tile_rows(0, ROWS)
    xs = index.load_row(X + rows * N, rows >= 0, N, CHUNK, False)
    eps = tl.full([1, 1], eps, tl.float32)
    mean, rstd, good = conditioned.held_stats(xs, eps, N, K, D, CENTER, tl.float32, SCALED)
    tl.store(OUT + rows, mean)
    tl.store(OUT + ROWS + rows, rstd)
    tl.store(GOOD + rows, good.to(tl.int8))


@pytest.mark.parametrize(
    ("center", "count", "divisor"),
    [(False, N, N), (True, N, N), (False, N, 1), (False, 5, 5), (False, 8, 1), (False, 9, 3)],
)
def test_statistics_of_squares_out_of_range(center: bool, count: int, divisor: int, device: torch.device) -> None:
    """What does not count may be anything."""
    x = torch.randn(ROWS, N, device=device)
    x[:, count:] = torch.tensor([torch.nan, torch.inf, 1e38, 1e-38], device=device)[:, None]
    scales = torch.tensor([1.0, 2.0**100, 2.0**-100, 2.0**-120], device=device)[:, None]
    mean = x.double().mean(1) if center else torch.zeros(ROWS, device=device, dtype=torch.float64)
    squares = (x[:, :count].double() - mean[:, None]).square().sum(1)
    rstd = (squares / divisor).rsqrt() / scales[:, 0].double()
    how = dict(N=N, K=count, D=divisor, CENTER=center, ROWS=ROWS, CHUNK=CHUNK)
    for scaled in (False, True):
        out, good = torch.empty(2, ROWS, device=device), torch.empty(ROWS, dtype=torch.int8, device=device)
        _stats_kernel[(1,)](out, good, x * scales, 0.0, SCALED=scaled, **how)
        right = [True] * 4 if scaled else [True, False, False, False]
        assert ((out[1].double() / rstd - 1).abs() < 2**-20).tolist() == right
        assert good.bool().tolist() == right
        torch.testing.assert_close(out[0].double() / scales[:, 0].double(), mean, rtol=1e-5, atol=1e-7)
    _stats_kernel[(1,)](out, good, torch.zeros_like(x), 1e-36, SCALED=True, **how)
    torch.testing.assert_close(out[1], torch.full_like(out[1], 1e18), rtol=1e-6, atol=0)


@triton.jit
def _weighted_kernel(OUT, X, W, B, ROUND: tl.constexpr, ROUND_N: tl.constexpr, CHUNK: tl.constexpr):
    columns = index.chunk_columns(0, CHUNK)
    x, w, b = tl.load(X + columns), tl.load(W + columns), tl.load(B + columns)
    tl.store(OUT + columns, conditioned.weighted(x, w, b, tl.bfloat16, 1.0, ROUND, ROUND_N))


@pytest.mark.parametrize("rounds", [(False, False), (True, False), (True, True)], ids=str)
def test_weighted(rounds: tuple[bool, bool], device: torch.device) -> None:
    x, w, b = torch.randn(3, CHUNK, device=device)
    out = torch.empty(CHUNK, device=device)
    _weighted_kernel[(1,)](out, x, w, b, ROUND=rounds[0], ROUND_N=rounds[1], CHUNK=CHUNK)
    n = (x.bfloat16().float() if rounds[0] else x) * (w + 1) + b
    if rounds[1]:
        assert torch.equal(out, out.bfloat16().float())
        torch.testing.assert_close(out, n, rtol=2**-8, atol=1e-6)
    else:
        torch.testing.assert_close(out, n, rtol=1e-6, atol=1e-6)


@triton.jit
def _gradients_kernel(
    DX,
    DZ,
    TENSORS,
    mean,
    rstd,
    K: tl.constexpr,
    D: tl.constexpr,
    CENTER: tl.constexpr,
    GATE: tl.constexpr,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    rows, columns = index.tile_rows(0, ROWS), index.chunk_columns(0, CHUNK)
    at = TENSORS + rows * CHUNK + columns
    x, z, dy = tl.load(at), tl.load(at + ROWS * CHUNK), tl.load(at + 2 * ROWS * CHUNK)
    w, b = tl.load(at + 3 * ROWS * CHUNK), tl.load(at + 4 * ROWS * CHUNK)
    ss = conditioned.gated((x,), (z,), GATE if FIRST else None, tl.float32)
    dns = conditioned.gated((dy,), (z,), None if FIRST else GATE, tl.float32)
    means, rstds = tl.full([ROWS, 1], mean, tl.float32), tl.full([ROWS, 1], rstd, tl.float32)
    held = (x,), (z,), ss, (dy,), dns, (w,), (b,)
    conditioned_backward.store_conditioned_gradients(
        (DX, DZ),
        held,
        means,
        rstds,
        rows,
        rows < 3,
        CHUNK,
        K,
        D,
        CENTER,
        1.0,
        False,
        False,
        GATE,
        FIRST,
        tl.float32,
        tl.float32,
        False,
    )


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("asked", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize(("count", "divisor"), [(CHUNK, CHUNK), (CHUNK, 1), (3, 3)])
def test_gradients(first: bool, asked: tuple[bool, bool], count: int, divisor: int, device: torch.device) -> None:
    """Of given statistics, which are taken to be the rows'; rows that are not there are left alone."""
    center = count == divisor == CHUNK
    tensors = torch.randn(5, ROWS, CHUNK, device=device)
    x, z, dy, w, b = tensors.double()
    outs = [torch.full((ROWS, CHUNK), torch.nan, device=device) if want else None for want in asked]
    how = dict(K=count, D=divisor, CENTER=center, GATE="silu", FIRST=first, ROWS=ROWS, CHUNK=CHUNK)
    _gradients_kernel[(1,)](*outs, tensors, 0.25, 1.5, **how)
    s = z.sigmoid()
    a, slope = z * s, s + z * s * (1 - s)
    xhat = ((x * a if first else x) - 0.25) * 1.5
    dn = dy if first else dy * a
    g = dn * (w + 1)
    moved = xhat * (g * xhat).sum(1, keepdim=True) / divisor
    moved[:, count:] = 0
    ds = 1.5 * (g - moved - center * g.mean(1, keepdim=True))
    expected = (ds * a, ds * x * slope) if first else (ds, dy * (xhat * (w + 1) + b) * slope)
    for got, want in zip(outs, expected, strict=True):
        if got is not None:
            torch.testing.assert_close(got[:3].double(), want[:3], rtol=1e-5, atol=1e-5)
            assert got[3:].isnan().all()
