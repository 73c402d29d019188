"""The row family's jit helpers that read and write rows, each alone, in the smallest kernel that calls it."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from trinorm.kernels import affine, index, partials, row, row_backward, row_split, stats, team

ROWS, CHUNK, N = 4, 16, 40  # three chunks, the last one ragged


@triton.jit
def _held(X, N: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Rows, a mask of them all, their pointers, and they as chunks."""
    rows = index.tile_rows(0, ROWS)
    every = rows >= 0
    return rows, every, X + rows * N, index.load_row(X + rows * N, every, N, CHUNK, False)


@triton.jit
def _statistics_kernel(OUT, X, N: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    rows, _, pointers, xs = _held(X, N, ROWS, CHUNK)
    tl.store(OUT + rows, stats.row_sum(xs[0]))
    if N % CHUNK == 0:
        mean, power = stats.pairwise_moments(xs, N, True, tl.float32)
        _, mean_square = stats.pairwise_moments(xs, N, False, tl.float32)
    else:
        mean, power = stats.held_moments(xs, N, True, tl.float32)
        _, mean_square = stats.held_moments(xs, N, False, tl.float32)
    tl.store(OUT + ROWS + rows, mean)
    tl.store(OUT + 2 * ROWS + rows, power)
    tl.store(OUT + 3 * ROWS + rows, stats.streamed_mean(pointers, 2.0, N, tl.float32, CHUNK))
    tl.store(OUT + 4 * ROWS + rows, stats.largest_of(pointers, N, tl.float32, CHUNK))
    tl.store(OUT + 5 * ROWS + rows, mean_square)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("n", [5, N, CHUNK, 48])  # chunks of which the last is ragged, and one and three full ones
def test_statistics_of_rows(n: int, compiled: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """compiled: with the reductions that only the compiler makes well, as the interpreter sees them."""
    if compiled and not torch.cuda.is_available():
        monkeypatch.setattr(stats, "is_interpreted", lambda: False)
    x = torch.randint(-8, 8, (ROWS, n), device=device).float()
    x[1] += 1 << 10
    x[2] = 3.140625
    x[3, n // 2 :] = 1 << 10
    out = torch.empty(6, ROWS, device=device)
    _statistics_kernel[(1,)](out, x, N=n, ROWS=ROWS, CHUNK=CHUNK)
    total, mean, power, twice, largest, mean_square = out
    assert torch.equal(total[[0, 1, 3]], x[[0, 1, 3], :CHUNK].sum(1))
    # Rounded, and settled by the mean of distances that are rounded too.
    off, widest = (mean - x.mean(1)).abs(), (x - x.mean(1, keepdim=True)).abs().amax(1)
    assert (off <= 2**-23 * mean.abs() + 2**-24 * widest).all()
    assert mean[2] == x[2, 0] and power[2] == 0
    torch.testing.assert_close(power, x.double().var(1, correction=0).float(), rtol=2**-20, atol=0)
    torch.testing.assert_close(twice, 2 * x.mean(1), rtol=2**-23, atol=0)
    assert torch.equal(largest, x.abs().amax(1))
    torch.testing.assert_close(mean_square, x.double().square().mean(1).float(), rtol=2**-22, atol=0)


@triton.jit
def _output_kernel(
    Y, MEAN, RSTD, X, W, B, mean, rstd, N: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, BY_CHUNKS: tl.constexpr
):
    rows, _, pointers, xs = _held(X, N, ROWS, CHUNK)
    some = rows != 1
    mean = tl.zeros([ROWS, 1], tl.float32) + mean
    rstd = tl.zeros([ROWS, 1], tl.float32) + rstd
    row.store_stats(MEAN, RSTD, rows, mean, rstd, some, True)
    if BY_CHUNKS:
        for i in tl.static_range(len(xs)):
            columns = index.chunk_columns(i * CHUNK, CHUNK)
            mask = some & index.columns_live(columns, (i + 1) * CHUNK, N)
            w = affine.offset_by(index.load_once(W + columns, columns < N, True), 0.0)
            b = index.load_once(B + columns, columns < N, False)
            row.store_y(Y, rows * N + columns, xs[i], mean, rstd, w, b, mask, 1.0, False, tl.float32, True)
    else:
        row.normalize_streamed(Y, pointers, W, B, rows, 0, N, mean, rstd, some, N, 1.0, False, tl.float32, CHUNK, False)


@pytest.mark.parametrize("by_chunks", [True, False], ids=["store_y", "normalize_streamed"])
def test_outputs_of_rows(by_chunks: bool, device: torch.device) -> None:
    """Of numbers of few digits, so that every step is exact; a row that is masked out is left as it is."""
    x = torch.randint(-8, 8, (ROWS, N), device=device).float()
    w, b = (torch.randint(-4, 4, (N,), device=device).float() for _ in range(2))
    y, statistics = torch.full_like(x, torch.nan), torch.full((2, ROWS), torch.nan, device=device)
    _output_kernel[(1,)](y, *statistics, x, w, b, 1.5, 0.25, N=N, ROWS=ROWS, CHUNK=CHUNK, BY_CHUNKS=by_chunks)
    some = [0, 2, 3]
    assert torch.equal(y[some], ((x - 1.5) * 0.25 * (w + 1) + b)[some])
    assert statistics[:, some].tolist() == [[1.5] * 3, [0.25] * 3]
    assert y[1].isnan().all() and statistics[:, 1].isnan().all()


@triton.jit
def _backward_kernel(
    OUT,
    DX,
    DX_OF_ROWS,
    DY,
    X,
    W,
    MEAN,
    RSTD,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    CENTER: tl.constexpr,
):
    rows, every, _, xs = _held(X, N, ROWS, CHUNK)
    dys = index.load_row(DY + rows * N, every, N, CHUNK, False)
    ws = row_split.widened_chunks(index.load_row_or(W, every, N, CHUNK, affine.NO_WEIGHT), tl.float32)
    mean, rstd = row_backward.load_stats(MEAN, RSTD, rows, every)
    shifts = (mean, mean, mean)
    scales = (rstd, rstd, rstd)
    c1, c2 = row_backward.dx_sums(xs, dys, ws, shifts, scales, CENTER, 0.0, tl.float32)
    tl.store(OUT + rows, c1)
    tl.store(OUT + ROWS + rows, c2)
    c1, c2 = stats.mean_of(c1, N), stats.mean_of(c2, N)
    how: tl.constexpr = tl.float32
    held = xs, dys, ws, shifts, scales
    outs = DX, None, None, None, None
    row_backward.store_dx(outs, held, rstd, c1, c2, rows, every, 0, N, N, CENTER, 0.0, 1.0, 0.0, how, False)
    outs = DX_OF_ROWS, None, None, None, None
    row_backward.store_dx_of_rows(outs, held, rstd, rows, every, N, CENTER, 0.0, 1.0, 0.0, how, False)


@pytest.mark.parametrize("center", [True, False])
def test_gradients_of_rows(center: bool, device: torch.device) -> None:
    x, dy = (torch.randn(ROWS, N, device=device) for _ in range(2))
    w = torch.randn(N, device=device).bfloat16()
    mean = x.mean(1) if center else None
    rstd = torch.rand(ROWS, device=device) + 0.5
    out, dx = torch.empty(2, ROWS, device=device), torch.empty(2, ROWS, N, device=device)
    _backward_kernel[(1,)](out, *dx, dy, x, w, mean, rstd, N=N, ROWS=ROWS, CHUNK=CHUNK, CENTER=center)
    g = dy.double() * w.double()
    xhat = (x.double() - (x.double().mean(1, keepdim=True) if center else 0)) * rstd[:, None]
    c1, c2 = (g * xhat).sum(1, keepdim=True), g.sum(1, keepdim=True) * center
    torch.testing.assert_close(out.double(), torch.stack([c1[:, 0], c2[:, 0]]), rtol=1e-5, atol=1e-5)
    exact = rstd[:, None] * (g - xhat * c1 / N - c2 / N)
    for found in dx:
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@triton.jit
def _sum_kernel(OUT, PARTIAL, P, sets, N: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    partials.sum_partial(OUT, PARTIAL, P, sets, N, tl.float32, ROWS, CHUNK)


@pytest.mark.parametrize("p", [1, 4, 7])
@pytest.mark.parametrize("sets", [None, 1, 3])
def test_partials_are_summed(p: int, sets: int | None, device: torch.device) -> None:
    partial = torch.randint(-8, 8, (p, sets or 1, N), device=device).float()
    out = torch.empty(sets or 1, N, device=device)
    _sum_kernel[(-(-N // CHUNK) * (sets or 1),)](out, partial, p, sets, N=N, ROWS=ROWS, CHUNK=CHUNK)
    assert torch.equal(out, partial.sum(0))


@triton.jit
def _told_kernel(WORDS, COUNT, a, b):
    one = tl.zeros([1, 1], tl.float32)
    member = index.first_program()
    team.publish(WORDS + member, one + a, one + b, member != 1)
    tl.store(COUNT + member, index.program_count())


def test_a_word_carries_two_numbers(device: torch.device) -> None:
    words, count = torch.full((3,), -1, dtype=torch.int64, device=device), torch.zeros(3, dtype=torch.int32, device=device)
    _told_kernel[(3,)](words, count, 1.25, -3.5)
    told: Tensor = words.view(torch.float32).view(3, 2)
    assert told[[0, 2]].tolist() == [[1.25, -3.5]] * 2
    assert words[1] == -1
    assert count.tolist() == [3] * 3
