"""Each jit helper of kernels/ alone, in the smallest kernel that calls it."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl

from trinorm.kernels import affine, index, row_backward, row_split, stats, team

ROWS, CHUNK = 4, 16


@triton.jit
def _tile_kernel(OUT, M, N: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Which (row, column) pairs of a [M, N] matrix the tiles of a grid cover, counted."""
    rows = index.tile_rows(index.first_program(), ROWS)
    columns = index.chunk_columns(index.second_program() * CHUNK, CHUNK)
    mask = index.rows_live(rows, M, ROWS) & index.columns_live(columns, index.rounded_up(N, CHUNK), N)
    ones = tl.full([ROWS, CHUNK], 1, tl.int32)
    tl.store(OUT + rows * N + columns, tl.load(OUT + rows * N + columns, mask=mask, other=0) + ones, mask=mask)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (4, 16), (5, 17), (7, 33), (8, 32)])
@pytest.mark.parametrize("rows", [1, 4])
def test_tiles_cover_every_element_once(m: int, n: int, rows: int, device: torch.device) -> None:
    out = torch.zeros(m + rows, n, dtype=torch.int32, device=device)
    _tile_kernel[(-(-m // rows), -(-n // CHUNK))](out, m, N=n, ROWS=rows, CHUNK=CHUNK)
    assert torch.equal(out[:m], torch.ones_like(out[:m]))
    assert torch.equal(out[m:], torch.zeros_like(out[m:]))


@triton.jit
def _offsets_kernel(OUT, odd_sizes, strides, ROWS: tl.constexpr):
    rows = index.tile_rows(index.first_program(), ROWS)
    tl.store(OUT + rows, index.row_offsets(rows, odd_sizes, strides))


def test_row_offsets_of_a_permuted_tensor(device: torch.device) -> None:
    x = torch.arange(2 * 4 * 8).reshape(2, 4, 8).permute(2, 0, 1)
    out = torch.empty(64, dtype=torch.int64, device=device)
    _offsets_kernel[(16,)](out, (5, 9), x.stride(), ROWS=4)
    assert torch.equal(out.cpu(), x.flatten())


def test_row_offsets_pass_2_to_the_31(device: torch.device) -> None:
    out = torch.empty(4, dtype=torch.int64, device=device)
    _offsets_kernel[(1,)](out, (), (1 << 31,), ROWS=4)
    assert out.tolist() == [i << 31 for i in range(4)]


@triton.jit
def _load_kernel(OUT, X, N: tl.constexpr, CHUNK: tl.constexpr, ABSENT: tl.constexpr):
    live = index.rows_live(index.tile_rows(0, 1), 1, 1)
    chunks = index.load_row_or(X, live, N, CHUNK, ABSENT)
    for i in tl.static_range(len(chunks)):
        columns = index.chunk_columns(i * CHUNK, CHUNK)
        tl.store(OUT + columns, tl.broadcast_to(chunks[i].to(tl.float32), [1, CHUNK]))


@pytest.mark.parametrize("n", [1, 15, 16, 17, 40])
def test_lanes_outside_the_row_read_the_identity_as_absent_vectors_do(n: int, device: torch.device) -> None:
    x = torch.randn(n, device=device)
    out = torch.full((48,), torch.nan, device=device)
    _load_kernel[(1,)](out, x, N=n, CHUNK=CHUNK, ABSENT=0x3F800000)
    end = -(-n // CHUNK) * CHUNK
    assert torch.equal(out[:n], x)
    assert torch.equal(out[n:end], torch.ones(end - n, device=device))
    _load_kernel[(1,)](out, None, N=n, CHUNK=CHUNK, ABSENT=0x3F800000)
    assert torch.equal(out[:end], torch.ones(end, device=device))


@triton.jit
def _affine_kernel(Y, G, X, W, B, N: tl.constexpr, OFFSET: tl.constexpr):
    columns = index.chunk_columns(0, N)
    mask = index.columns_live(columns, N, N)
    w = index.load_or(W, columns, mask, affine.NO_WEIGHT, False)
    b = index.load_or(B, columns, mask, affine.NO_BIAS, False)
    x = tl.load(X + columns)
    tl.store(Y + columns, affine.affine(x, w, b, OFFSET))
    tl.store(G + columns, affine.affine_backward(x, w, OFFSET))


@pytest.mark.parametrize("has_weight", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_affine(has_weight: bool, has_bias: bool, offset: float, device: torch.device) -> None:
    x = torch.randn(32, device=device)
    x[:4] = torch.tensor([-0.0, 0.0, torch.inf, torch.nan], device=device)
    w = torch.randn(32, device=device) if has_weight else None
    b = torch.randn(32, device=device).bfloat16() if has_bias else None
    y, g = torch.empty_like(x), torch.empty_like(x)
    _affine_kernel[(1,)](y, g, x, w, b, N=32, OFFSET=offset if has_weight else 0.0)
    w = None if w is None else w + offset
    product = x if w is None else x * w
    assert torch.equal(g.view(torch.int32)[:3], product.view(torch.int32)[:3])
    torch.testing.assert_close(g, product, rtol=0, atol=0, equal_nan=True)
    # One multiply-add rounds once where torch rounds twice.
    expected = product.double() if w is None else x.double() * w.double()
    expected = expected if b is None else expected + b.double()
    torch.testing.assert_close(y.double(), expected.float().double(), rtol=2**-23, atol=2**-23, equal_nan=True)
    if w is None and b is None:
        assert torch.equal(y.view(torch.int32)[:2], x.view(torch.int32)[:2]), "-0.0 and 0.0 pass unchanged"


@triton.jit
def _moments_kernel(MEAN, POWER, X, N: tl.constexpr, CENTER: tl.constexpr, CHUNK: tl.constexpr, HELD: tl.constexpr):
    row = index.tile_rows(index.first_program(), 1)
    if HELD:
        xs = index.load_row(X + row * N, index.rows_live(row, 0, 1), N, CHUNK, False)
        mean, power = stats.held_moments(xs, N, CENTER, tl.float32)
    else:
        mean, power = stats.streamed_moments(X + row * N, N, CENTER, tl.float32, CHUNK)
    tl.store(MEAN + row, mean)
    tl.store(POWER + row, power)


@pytest.mark.parametrize("n", [1, 3, 16, 17, 100, 1000])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("held", [False, True])
def test_moments(n: int, center: bool, held: bool, device: torch.device) -> None:
    """Masked lanes never enter, and a mean of 1e4 does not swallow a deviation of 1e-2."""
    x = torch.randn(4, n, device=device) * 1e-2 + (1e4 if center else 0.0)
    mean, power = torch.empty(4, device=device), torch.empty(4, device=device)
    _moments_kernel[(4,)](mean, power, x, N=n, CENTER=center, CHUNK=16, HELD=held)
    exact = x.double()
    exact_mean = exact.mean(1) if center else torch.zeros(4, device=device).double()
    # Each of the steps that a lane's and then the tree's sum take rounds by half a place of the mean at most.
    shift = (n.bit_length() + n / CHUNK) * 2**-24 * exact_mean.abs()
    assert ((mean.double() - exact_mean).abs() <= shift).all()
    # The power is taken about the mean as it was rounded, which adds the square of that shift.
    exact_power = (exact - exact_mean[:, None]).square().mean(1)
    assert ((power.double() - exact_power).abs() <= shift**2 + exact_power * (n.bit_length() + n / CHUNK) * 2**-22).all()


@triton.jit
def _rescue_kernel(MEAN, RSTD, X, eps: tl.float64, N: tl.constexpr, CENTER: tl.constexpr, CHUNK: tl.constexpr):
    row = index.tile_rows(index.first_program(), 1)
    mean, rstd = stats.rescued_stats(X + row * N, tl.full([1, 1], eps, tl.float32), N, CENTER, tl.float32, CHUNK)
    tl.store(MEAN + row, mean)
    tl.store(RSTD + row, rstd)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("scale", [1e30, 3e37, 1e-25, 1.0])
def test_rescued_stats_where_squares_leave_fp32(center: bool, scale: float, device: torch.device) -> None:
    x = (torch.rand(3, 50, device=device) + 0.5) * scale
    mean, rstd = torch.empty(3, device=device), torch.empty(3, device=device)
    _rescue_kernel[(3,)](mean, rstd, x, 0.0, N=50, CENTER=center, CHUNK=16)
    exact = x.double()
    exact_mean = exact.mean(1, keepdim=True) if center else torch.zeros(3, 1, device=device).double()
    exact_rstd = (exact - exact_mean).square().mean(1).rsqrt()
    torch.testing.assert_close(mean.double(), exact_mean.flatten(), rtol=2**-22, atol=0)
    torch.testing.assert_close(rstd.double(), exact_rstd, rtol=2**-20, atol=0)


@triton.jit
def _lost_kernel(OUT, X, STEPS, LANES: tl.constexpr, PRECISE: tl.constexpr):
    lanes = index.chunk_columns(0, LANES)
    total, lost = tl.zeros([1, LANES], tl.float32), tl.zeros([1, LANES], tl.float32)
    for i in tl.range(0, STEPS):
        total, lost = stats.add_to_sum(total, lost, tl.load(X + i * LANES + lanes), PRECISE)
    tl.store(OUT + tl.zeros([1, 1], tl.int32), stats.row_sum_with_lost(total, lost, PRECISE).to(tl.float64))


def _summed(x: torch.Tensor, precise: bool) -> float:
    """The sum of x, ``[steps, lanes]``, a step at a time."""
    out = torch.empty(1, dtype=torch.float64, device=x.device)
    _lost_kernel[(1,)](out, x, x.shape[0], LANES=x.shape[1], PRECISE=precise)
    return out.item()


@pytest.mark.parametrize("first", ["largest first", "largest last", "largest amid"])
def test_a_sum_keeps_what_rounding_loses(first: str, device: torch.device) -> None:
    """fp32 loses every 1 that is added to 2^24 + 2, and the last place of a smaller sum that this is added to."""
    x = torch.ones(50, 16, device=device)
    x[{"largest first": 0, "largest last": 49, "largest amid": 24}[first]] = 2.0**24 + 2
    assert _summed(x, precise=True) == x.double().sum().item()
    assert _summed(x, precise=False) != x.double().sum().item()


@pytest.mark.parametrize("precise", [False, True])
def test_a_sum_that_is_not_finite(precise: bool, device: torch.device) -> None:
    x = torch.ones(5, 16, device=device)
    x[2, 3] = torch.inf
    assert _summed(x, precise) == torch.inf
    x[3, 3] = -torch.inf
    assert math.isnan(_summed(x, precise))
    assert _summed(torch.full((5, 16), -3e38, device=device), precise) == -torch.inf


@triton.jit
def _mean_kernel(OUT, X, LANES: tl.constexpr, N: tl.constexpr):
    lanes = tl.arange(0, LANES)
    tl.store(OUT + lanes, stats.mean_of(tl.load(X + lanes), N))


@pytest.mark.parametrize("n", [1, 3, 7, 64, 1000, 4097, 66000])
def test_a_mean_is_rounded_correctly(n: int, device: torch.device) -> None:
    x = torch.randn(1024, device=device) * torch.logspace(-10, 10, 1024, device=device)
    x[:4] = torch.tensor([0.0, torch.inf, -torch.inf, torch.nan])
    out = torch.empty_like(x)
    _mean_kernel[(1,)](out, x, LANES=1024, N=n)
    torch.testing.assert_close(out, (x.double() / n).float(), rtol=0, atol=0, equal_nan=True)


@triton.jit
def _row_sums_kernel(OUT, X, Y, ROWS: tl.constexpr, N: tl.constexpr):
    rows = index.tile_rows(0, ROWS)
    places = rows * N + index.chunk_columns(0, N)
    x, y = stats.row_sums(tl.load(X + places), tl.load(Y + places))
    tl.store(OUT + rows, x)
    tl.store(OUT + ROWS + rows, y)


@pytest.mark.parametrize("rows", [1, 4])
def test_two_sums_of_rows_at_once(rows: int, device: torch.device) -> None:
    x, y = (torch.randint(-8, 8, (rows, 32), device=device).float() for _ in range(2))
    out = torch.empty(2, rows, device=device)
    _row_sums_kernel[(1,)](out, x, y, ROWS=rows, N=32)
    assert torch.equal(out, torch.stack((x.sum(1), y.sum(1))))


@triton.jit
def _trusted_kernel(OUT, X, LANES: tl.constexpr):
    lanes = tl.arange(0, LANES)
    tl.store(OUT + lanes, stats.trusted(tl.load(X + lanes)).to(tl.int32))


def test_which_powers_are_trusted(device: torch.device) -> None:
    x = [1e-5, 1.0, 1e38, 2e-30, 0.0, 5e-31, torch.inf, torch.nan]
    out = torch.empty(8, dtype=torch.int32, device=device)
    _trusted_kernel[(1,)](out, torch.tensor(x, device=device), LANES=8)
    assert out.tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(("dtype", "largest", "n"), [(tl.bfloat16, 255, 65536), (tl.float16, 2047, 8192)])
def test_which_sums_of_equal_numbers_are_exact(dtype: tl.dtype, largest: int, n: int) -> None:
    """largest: of the dtype's significands, as whole numbers. Of fp32 two are not exact in fp32, and all in fp64."""
    sums = torch.arange(n + 1) * largest
    assert torch.equal(sums.float().long(), sums)
    assert [stats.sums_exactly(dtype, columns, tl.float32) for columns in (1, n, n + 1)] == [True, True, False]
    assert [stats.sums_exactly(tl.float32, n, acc) for acc in (tl.float32, tl.float64)] == [False, True]


@triton.jit
def _team_sum_kernel(OUT, X, LANES: tl.constexpr):
    tl.store(OUT + tl.zeros([1, 1], tl.int32), team.team_sum(tl.load(X + tl.arange(0, LANES))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shares_of_a_team_are_summed(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randint(-8, 8, (32,), device=device, dtype=dtype) + 2.0 ** (-40 if dtype == torch.float64 else -10)
    out = torch.empty(1, dtype=dtype, device=device)
    _team_sum_kernel[(1,)](out, x, LANES=32)
    assert torch.equal(out[0], x.sum())


@triton.jit
def _power_kernel(OUT, X, N: tl.constexpr):
    lanes = tl.arange(0, N)
    tl.store(OUT + lanes, stats.power_of_two_below(tl.load(X + lanes)))


def test_power_of_two_below(device: torch.device) -> None:
    x = torch.tensor([1.0, 1.5, 2.0, 1e30, 3e38, torch.inf, 1e-42, 0.0], device=device)
    out = torch.empty_like(x)
    _power_kernel[(1,)](out, x, N=8)
    assert out.tolist() == [1.0, 1.0, 2.0, 2.0**99, 2.0**126, 2.0**126, 2.0**-126, 2.0**-126]
    assert torch.isfinite(1 / out).all()
    x = torch.tensor([1.0, 1.5, 2.0, 1e300, 1.7e308, torch.inf, 1e-320, 0.0], device=device, dtype=torch.float64)
    out = torch.empty_like(x)
    _power_kernel[(1,)](out, x, N=8)
    assert out.tolist() == [1.0, 1.0, 2.0, 2.0**996, 2.0**1022, 2.0**1022, 2.0**-1022, 2.0**-1022]


@triton.jit
def _dx_kernel(OUT, G, XHAT, RSTD, C1, C2, N: tl.constexpr, CENTER: tl.constexpr):
    lanes = tl.arange(0, N)
    g, xhat, rstd = tl.load(G + lanes), tl.load(XHAT + lanes), tl.load(RSTD)
    tl.store(OUT + lanes, row_backward.dx_of(g, xhat, rstd, tl.load(C1), tl.load(C2), CENTER))


@pytest.mark.parametrize("center", [False, True])
def test_dx(center: bool, device: torch.device) -> None:
    g, xhat = torch.randn(64, device=device), torch.randn(64, device=device)
    rstd, c1, c2 = (torch.rand(1, device=device) + 0.5 for _ in range(3))
    out = torch.empty_like(g)
    _dx_kernel[(1,)](out, g, xhat, rstd, c1, c2, N=64, CENTER=center)
    exact = rstd.double() * (g.double() - xhat.double() * c1.double() - (c2.double() if center else 0.0))
    terms = rstd.double() * (g.double().abs() + (xhat.double() * c1.double()).abs() + c2.double())
    assert ((out.double() - exact).abs() <= 4 * 2**-24 * terms).all()


@triton.jit
def _sums_kernel(OUT, X, DY, N: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, ROUND: tl.constexpr):
    live = tl.full([ROWS, 1], True, tl.int1)
    rows = index.tile_rows(0, ROWS)
    xs = index.load_row(X + rows * N, live, N, CHUNK, False)
    dys = index.load_row(DY + rows * N, live, N, CHUNK, False)
    mean = tl.zeros([ROWS, 1], tl.float32)
    zero = row_backward.zero_chunks(N, ROWS, CHUNK, tl.float32)
    means, rstds = row_backward.undoing_row(mean, mean + 1.0, xs, xs, 0.0, False, tl.float32)
    dw = row_backward.add_dw(zero, xs, dys, means, rstds, tl.bfloat16, False, tl.float32)
    dw = row_backward.add_dw(dw, xs, dys, means, rstds, tl.bfloat16, ROUND, tl.float32)
    row_backward.store_column_sums(OUT, 0, dw, N)
    row_backward.store_column_sums(OUT, N, row_backward.add_db(zero, dys, tl.float32), N)


@pytest.mark.parametrize("rounds", [False, True])
def test_column_sums(rounds: bool, device: torch.device) -> None:
    x, dy = (torch.randint(-8, 8, (4, 40), device=device).float() for _ in range(2))
    x += 1 + 2**-7 + 2**-9  # more digits than bf16 has
    out = torch.empty(2, 40, device=device)
    _sums_kernel[(1,)](out, x, dy, N=40, ROWS=4, CHUNK=16, ROUND=rounds)
    again = x.bfloat16().float() if rounds else x
    assert torch.equal(out[0], (x * dy).sum(0) + (again * dy).sum(0)), "few digits add exactly"
    assert torch.equal(out[1], dy.sum(0))


@triton.jit
def _widened_kernel(OUT, X, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(OUT + places, index.widened(tl.load(X + places, mask=places < SIZE), tl.float32), mask=places < SIZE)


@pytest.mark.parametrize("block", [1, 2, 1 << 12])
def test_every_bf16_widens_to_itself(block: int, device: torch.device) -> None:
    x = torch.arange(-(1 << 15), 1 << 15, device=device).short().view(torch.bfloat16)
    x = x if block > 2 else x[::521].contiguous()
    out = torch.empty(x.shape, device=device)
    _widened_kernel[(-(-len(x) // block),)](out, x, SIZE=len(x), BLOCK=block)
    # Bit for bit, but for what is in a NaN.
    assert torch.equal(out[~x.isnan()].view(torch.int32), x.float()[~x.isnan()].view(torch.int32))
    assert torch.equal(out.isnan(), x.isnan())


@triton.jit
def _blocks_kernel(OUT, MEANS, SQUARES, N: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    lanes = tl.arange(0, LANES)
    means = tl.load(MEANS + lanes, mask=lanes < N // BLOCK, other=0.0)
    squares = tl.load(SQUARES + lanes, mask=lanes < N // BLOCK, other=0.0)
    mean, power = row_split.merged_blocks(means, squares, N, BLOCK, True)
    tl.store(OUT + tl.zeros([1, 1], tl.int32), mean)
    tl.store(OUT + 1 + tl.zeros([1, 1], tl.int32), power)


def _merged(means: torch.Tensor, squares: torch.Tensor, block: int) -> list[float]:
    out = torch.empty(2, device=means.device)
    _blocks_kernel[(1,)](out, means, squares, N=len(means) * block, BLOCK=block, LANES=32)
    return out.tolist()


@pytest.mark.parametrize("team", [1, 2, 3, 7, 10, 18, 32])
def test_blocks_of_one_value_have_no_deviation(team: int, device: torch.device) -> None:
    for value in (19151.94, 13074.23, 1 / 3, -1e-3):
        mean, power = _merged(torch.full((team,), value, device=device), torch.zeros(team, device=device), 2048)
        assert mean == torch.tensor(value).item()
        assert power == 0


def test_blocks_merge_to_the_moments_of_the_row(device: torch.device) -> None:
    x = (torch.randint(-8, 8, (3, 64), device=device)).float()  # integers: every step but the last division is exact
    mean, power = _merged(x.mean(1), (x - x.mean(1, keepdim=True)).square().sum(1), 64)
    exact = x.double().flatten()
    assert mean == pytest.approx(exact.mean().item(), rel=2**-22, abs=2**-22)
    assert power == pytest.approx(exact.var(correction=0).item(), rel=2**-21)
