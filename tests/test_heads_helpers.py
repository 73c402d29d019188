"""The jit helpers of kernels/heads.py, each alone, in the smallest kernel that calls it."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from trinorm.kernels import heads, index

ROWS, CHUNK = 4, 16


@triton.jit
def _pairs_kernel(OUT, X, R: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    rows, columns = index.tile_rows(0, ROWS), index.chunk_columns(0, CHUNK)
    x = tl.load(X + rows * CHUNK + columns)
    tl.store(OUT + rows * CHUNK + columns, heads.others(x, X + rows * CHUNK, rows < 3, R, INTERLEAVED, tl.float32))
    tl.store(OUT + (ROWS + rows) * CHUNK + columns, heads.swapped(x))
    tl.store(OUT + (2 * ROWS + rows) * CHUNK + columns, (heads.other_half(columns, R) + rows * 0).to(tl.float32))


@pytest.mark.parametrize("r", [2, 6, 16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_partners(r: int, interleaved: bool, device: torch.device) -> None:
    x = torch.arange(ROWS * CHUNK, device=device).float().view(ROWS, CHUNK)
    out = torch.empty(3, ROWS, CHUNK, device=device)
    _pairs_kernel[(1,)](out, x, R=r, INTERLEAVED=interleaved, ROWS=ROWS, CHUNK=CHUNK)
    neighbours = torch.arange(CHUNK, device=device) ^ 1
    halves = (torch.arange(r, device=device) + r // 2) % r
    expected = torch.zeros_like(x)
    expected[:3, :r] = x[:3, neighbours[:r] if interleaved else halves]
    assert torch.equal(out[0], expected)
    assert torch.equal(out[1], x[:, neighbours])
    assert torch.equal(out[2][:, :r], halves.float().expand(ROWS, r))


@triton.jit
def _angles_kernel(
    OUT,
    COS,
    SIN,
    strides,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BACK: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    rows, columns = index.tile_rows(0, ROWS), index.chunk_columns(0, CHUNK)
    cos, sin = heads.angles((COS, SIN, (), strides), rows, rows < 3, R, INTERLEAVED, BACK, tl.float32, CHUNK)
    tl.store(OUT + rows * CHUNK + columns, cos)
    tl.store(OUT + (ROWS + rows) * CHUNK + columns, sin)


@pytest.mark.parametrize("r", [2, 6, 16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_angles(r: int, interleaved: bool, device: torch.device) -> None:
    """cos, and sin with its sign; of the transpose the partner's sin with the partner's sign."""
    cos, sin = torch.randn(2, ROWS, r, device=device).bfloat16()
    places = torch.arange(r, device=device)
    partners = places ^ 1 if interleaved else (places + r // 2) % r
    for back in (False, True):
        out = torch.empty(2, ROWS, CHUNK, device=device)
        given = dict(R=r, INTERLEAVED=interleaved, BACK=back, ROWS=ROWS, CHUNK=CHUNK)
        _angles_kernel[(1,)](out, cos, sin, (r,), **given)
        assert torch.equal(out[0, :3, :r], cos[:3].float())
        assert torch.equal(out[0, :, r:], torch.ones_like(out[0, :, r:]))
        assert not out[1, :, r:].any()
        signed = torch.where(partners > places, -sin.float(), sin.float())
        assert torch.equal(out[1, :3, :r], (signed[:, partners] if back else signed)[:3])


@triton.jit
def _rstd_kernel(OUT, GOOD, X, eps, N: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    rows, columns = index.tile_rows(0, ROWS), index.chunk_columns(0, CHUNK)
    x = tl.load(X + rows * N + columns, mask=columns < N, other=0.0)
    rstd, good = heads.head_rstd(x, tl.full([1, 1], eps, tl.float32), N, tl.float32, SCALED)
    tl.store(OUT + rows, rstd)
    tl.store(GOOD + rows, good.to(tl.int8))


def test_rstd_of_squares_out_of_range(device: torch.device) -> None:
    x = torch.randn(ROWS, 10, device=device)
    scales = torch.tensor([1.0, 2.0**100, 2.0**-100, 2.0**-126], device=device)[:, None]
    exact = x.double().square().mean(1).rsqrt() / scales[:, 0].double()
    for scaled, right in ((True, [True] * 4), (False, [True, False, False, False])):
        out, good = torch.empty(ROWS, device=device), torch.empty(ROWS, dtype=torch.int8, device=device)
        _rstd_kernel[(1,)](out, good, x * scales, 0.0, N=10, SCALED=scaled, ROWS=ROWS, CHUNK=CHUNK)
        assert ((out.double() / exact - 1).abs() < 2**-20).tolist() == right
        assert good.bool().tolist() == right
    _rstd_kernel[(1,)](out, good, torch.zeros_like(x), 1e-36, N=10, SCALED=True, ROWS=ROWS, CHUNK=CHUNK)
    torch.testing.assert_close(out, torch.full_like(out, 1e18), rtol=1e-6, atol=0)


@triton.jit
def _weights_kernel(
    OUT, W, N: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr
):
    rows, columns = index.tile_rows(0, ROWS), index.chunk_columns(0, CHUNK)
    mask = (rows >= 0) & (columns < N)
    w = heads.head_weight(W, columns, mask, 1.0, tl.float32)
    tl.store(OUT + rows * CHUNK + columns, w + tl.zeros([ROWS, CHUNK], tl.float32))
    if W is not None:
        other = heads.others_weight(w, W, columns, mask, R, INTERLEAVED, 1.0, tl.float32)
        tl.store(OUT + (ROWS + rows) * CHUNK + columns, other)


@pytest.mark.parametrize("interleaved", [False, True])
def test_weights(interleaved: bool, device: torch.device) -> None:
    w, out = torch.randn(10, device=device).bfloat16(), torch.empty(2, ROWS, CHUNK, device=device)
    given = dict(N=10, R=6, INTERLEAVED=interleaved, ROWS=ROWS, CHUNK=CHUNK)
    _weights_kernel[(1,)](out, w, **given)
    places = torch.arange(6, device=device)
    assert torch.equal(out[0, :, :10], (w.float() + 1).expand(ROWS, 10))
    assert torch.equal(out[1, :, :6], out[0][:, places ^ 1 if interleaved else (places + 3) % 6])
    _weights_kernel[(1,)](out, None, **given)
    assert torch.equal(out[0], torch.ones_like(out[0]))


@triton.jit
def _turned_kernel(Y, X, ROUND: tl.constexpr, ROUND_TURN: tl.constexpr, CHUNK: tl.constexpr):
    columns = index.chunk_columns(0, CHUNK)
    x, other, w, w_other, cos, sin = heads.load_heads(X + columns, CHUNK, columns >= 0, 6)
    tl.store(Y + columns, heads.turned(x, other, w, w_other, cos, sin, tl.bfloat16, ROUND, ROUND_TURN))


@pytest.mark.parametrize("round_", [False, True])
@pytest.mark.parametrize("round_turn", [False, True])
def test_turned(round_: bool, round_turn: bool, device: torch.device) -> None:
    given = torch.randn(6, CHUNK, device=device)
    y = torch.empty(1, CHUNK, device=device)
    _turned_kernel[(1,)](y, given, ROUND=round_, ROUND_TURN=round_turn, CHUNK=CHUNK)
    x, other, w, w_other, cos, sin = given
    n, n_other = x * w, other * w_other
    if round_:
        n, n_other = n.bfloat16().float(), n_other.bfloat16().float()
    products = n * cos, n_other * sin
    if round_ and round_turn:
        products = products[0].bfloat16().float(), products[1].bfloat16().float()
    torch.testing.assert_close(y[0], products[0] + products[1], rtol=1e-6, atol=1e-6)
