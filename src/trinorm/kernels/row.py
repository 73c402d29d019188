"""Row norms, forward: y = (x - mean)·rstd·(w + OFFSET) + b over the last N elements of each row.

``row_forward`` reads a row once and holds it; ``row_forward_streamed`` reads it twice, the second time from L2, for
rows too wide to hold. LayerNorm is CENTER, RMSNorm is not; OFFSET and ROUND are affine.py's, RESIDUAL, SUM, SEED,
ROW_SCALE, ALPHA and DROP added.py's. W, B, MEAN, RSTD and RESIDUAL may be None: absent, or not asked for. Offsets, strides
and N count elements; ``x_odd_sizes`` and ``x_strides`` describe x's leading dims (index.row_offsets).
STREAM says that x and y are too large for L2: they pass through it and leave w and b there (H200, bf16, 8192 columns:
LayerNorm 0.97 of the copy against 0.95, RMSNorm 0.97 against 0.95; 1024 columns: 0.98 and 1.00 against 0.96 and 0.97).
"""

import triton
import triton.language as tl

from .added import add_row, add_streamed, rows_in_memory
from .affine import NO_BIAS, NO_WEIGHT, affine, rounded
from .index import (
    chunk_columns,
    columns_live,
    first_program,
    load_once,
    load_or,
    load_row,
    load_row_or,
    rounded_up,
    row_offsets,
    rows_live,
    tile_rows,
    widened,
)
from .overlap import let_next_launch, wait_for_previous
from .stats import held_moments, pairwise_moments, rescued_stats, streamed_moments, trusted


@triton.jit
def store_stats(MEAN, RSTD, rows, mean, rstd, mask, CENTER: tl.constexpr):
    """Save the statistics that the backward will ask for; RSTD None means that none will be."""
    if RSTD is not None:
        tl.store(RSTD + rows, rstd, mask=mask)
        if CENTER:
            tl.store(MEAN + rows, mean, mask=mask)


@triton.jit
def store_y(
    Y,
    offsets,
    x,
    mean,
    rstd,
    w,
    b,
    mask,
    OFFSET: tl.constexpr,
    ROUND: tl.constexpr,
    ACC: tl.constexpr,
    STREAM: tl.constexpr,
):
    """y of some elements from x and its row's statistics."""
    xhat = rounded((widened(x, ACC) - mean) * rstd, Y.dtype.element_ty, ROUND)
    y = affine(xhat, w, b, OFFSET)
    tl.store(Y + offsets, y.to(Y.dtype.element_ty), mask=mask, cache_modifier=".cs" if STREAM else "")


@triton.jit
def normalize_streamed(
    Y,
    x_row,
    W,
    B,
    row,
    first,
    end,
    mean,
    rstd,
    mask,
    N: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND: tl.constexpr,
    ACC: tl.constexpr,
    CHUNK: tl.constexpr,
    STREAM: tl.constexpr,
):
    """y of the columns of one row from ``first`` to ``end``, reading x (again) chunk by chunk, where ``mask`` is true."""
    for start in tl.range(first, end, CHUNK):
        columns = chunk_columns(start, CHUNK)
        live = columns_live(columns, rounded_up(N, CHUNK), N)
        w = load_or(W, columns, live, NO_WEIGHT, STREAM)
        b = load_or(B, columns, live, NO_BIAS, STREAM)
        x = load_once(x_row + columns, live, STREAM)
        store_y(Y, row * N + columns, x, mean, rstd, w, b, mask & live, OFFSET, ROUND, ACC, STREAM)


@triton.jit
def rescue(
    Y,
    MEAN,
    RSTD,
    SUM,
    X,
    W,
    B,
    good,
    first_row,
    x_odd_sizes,
    x_strides,
    eps,
    N: tl.constexpr,
    CENTER: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Do the rows of a tile that are not ``good`` again, one by one: their squares leave fp32's range.

    Apart from the common path, which has stored nothing for them, and from memory: a branch that needed the held rows
    would cost every row the registers (LayerNorm at 8192 columns: 56 a thread against 40, and 0.89 of the copy against
    0.95).
    """
    if SUM is not None:
        tl.debug_barrier()  # other threads have stored what is to be read
    STEP: tl.constexpr = CHUNK if CHUNK < 1024 else 1024  # short steps, for few registers beside the common path's
    for r in tl.range(0, ROWS):
        row = tile_rows(first_row + r, 1)
        bad = tl.max(tl.where(tile_rows(0, ROWS) == r, good.to(tl.int32), 1) ^ 1, axis=0, keep_dims=True) == 1
        if tl.max(bad.to(tl.int32)) == 1:
            x_row = rows_in_memory(X, SUM, row, x_odd_sizes, x_strides, N)
            mean, rstd = rescued_stats(x_row, eps, N, CENTER, ACC, STEP)
            store_stats(MEAN, RSTD, row, mean, rstd, bad, CENTER)
            normalize_streamed(Y, x_row, W, B, row, 0, N, mean, rstd, bad, N, OFFSET, ROUND, ACC, STEP, False)


@triton.jit(do_not_specialize=["M"])
def row_forward(
    Y,
    MEAN,
    RSTD,
    SUM,
    X,
    W,
    B,
    RESIDUAL,
    SEED,
    ROW_SCALE,
    M,
    x_odd_sizes,
    x_strides,
    eps: tl.float64,
    N: tl.constexpr,
    CENTER: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND: tl.constexpr,
    ALPHA: tl.constexpr,
    DROP: tl.constexpr,
    ACC: tl.constexpr,
    RESCUE: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILES: tl.constexpr,
    STREAM: tl.constexpr,
    PRELOAD: tl.constexpr,
    PAIRWISE: tl.constexpr,
    MANY: tl.constexpr,
    PDL: tl.constexpr,
):
    """TILES tiles of ROWS rows, each read once and held as chunks.

    PRELOAD asks for w and b before the statistics are known: their latency hides behind x's, for registers. It is
    worth 0.2 µs of 1.9 where a launch is short, and costs occupancy where it is long. PAIRWISE: mean and power by one
    barrier; of more rows than MANY the next kernel is let on behind x.
    """
    wait_for_previous(PDL)
    eps = tl.full([1, 1], eps, ACC)
    first = first_program() * TILES
    tiles = ()
    for t in tl.static_range(TILES):
        rows = tile_rows(first + t, ROWS)
        live = rows_live(rows, M, ROWS * TILES)
        xs = load_row(X + row_offsets(rows, x_odd_sizes, x_strides), live, N, CHUNK, STREAM)
        added = SUM, RESIDUAL, SEED, ROW_SCALE
        tiles = tiles + (add_row(added, xs, rows, 0, live, N, N, ALPHA, DROP, ACC, STREAM),)
    if PAIRWISE:
        # The one below waits for x, as ptxas puts the first sums of it ahead; it stays, as it keeps w and b ahead of them.
        if M > MANY:
            let_next_launch(PDL)
    if PRELOAD:
        every = tl.full([ROWS, 1], True, tl.int1)
        ws = load_row_or(W, every, N, CHUNK, NO_WEIGHT)
        bs = load_row_or(B, every, N, CHUNK, NO_BIAS)
    let_next_launch(PDL)

    goods = ()
    all_good = tl.full([ROWS, 1], True, tl.int1)
    for t in tl.static_range(TILES):
        xs = tiles[t]
        rows = tile_rows(first + t, ROWS)
        live = rows_live(rows, M, ROWS * TILES)
        if PAIRWISE:
            mean, power = pairwise_moments(xs, N, CENTER, ACC)
            good = trusted(power + eps) & (tl.abs(mean) < float("inf"))
        else:
            mean, power = held_moments(xs, N, CENTER, ACC)
            good = trusted(power + eps) if RESCUE else rows >= 0
        rstd = tl.rsqrt(power + eps)
        store_stats(MEAN, RSTD, rows, mean, rstd, live & good, CENTER)

        for i in tl.static_range(len(xs)):
            columns = chunk_columns(i * CHUNK, CHUNK)
            mask = live & columns_live(columns, (i + 1) * CHUNK, N)
            if PRELOAD:
                w = ws[i]
                b = bs[i]
            else:
                w = load_or(W, columns, mask, NO_WEIGHT, STREAM)
                b = load_or(B, columns, mask, NO_BIAS, STREAM)
            store_y(Y, rows * N + columns, xs[i], mean, rstd, w, b, mask & good, OFFSET, ROUND, ACC, STREAM)

        good = good | ~live
        goods = goods + (good,)
        all_good = all_good & good

    if RESCUE:
        if tl.min(all_good.to(tl.int32)) == 0:
            for tile in tl.range(0, TILES):
                good = goods[0]
                for other in tl.static_range(1, TILES):
                    good = tl.where(tile == other, goods[other], good)
                row = (first + tile) * ROWS
                rescue(
                    Y,
                    MEAN,
                    RSTD,
                    SUM,
                    X,
                    W,
                    B,
                    good,
                    row,
                    x_odd_sizes,
                    x_strides,
                    eps,
                    N,
                    CENTER,
                    OFFSET,
                    ROUND,
                    ACC,
                    ROWS,
                    CHUNK,
                )


@triton.jit
def row_forward_streamed(
    Y,
    MEAN,
    RSTD,
    SUM,
    X,
    W,
    B,
    RESIDUAL,
    SEED,
    ROW_SCALE,
    x_odd_sizes,
    x_strides,
    eps: tl.float64,
    N: tl.constexpr,
    CENTER: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND: tl.constexpr,
    ALPHA: tl.constexpr,
    DROP: tl.constexpr,
    ACC: tl.constexpr,
    RESCUE: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row a program: statistics in a first reading, y in a second."""
    wait_for_previous(PDL)
    let_next_launch(PDL)
    eps = tl.full([1, 1], eps, ACC)
    row = tile_rows(first_program(), 1)
    if RESIDUAL is not None:
        x_row = X + row_offsets(row, x_odd_sizes, x_strides)
        add_streamed((SUM, RESIDUAL, SEED, ROW_SCALE), x_row, row, N, ALPHA, DROP, ACC, CHUNK)
    x_row = rows_in_memory(X, SUM, row, x_odd_sizes, x_strides, N)
    mean, power = streamed_moments(x_row, N, CENTER, ACC, CHUNK)
    good = trusted(power + eps) if RESCUE else row >= 0
    rstd = tl.rsqrt(power + eps)
    store_stats(MEAN, RSTD, row, mean, rstd, good, CENTER)
    normalize_streamed(Y, x_row, W, B, row, 0, N, mean, rstd, good, N, OFFSET, ROUND, ACC, CHUNK, True)
    if RESCUE:
        if tl.min(good.to(tl.int32)) == 0:
            first = first_program()
            rescue(
                Y,
                MEAN,
                RSTD,
                SUM,
                X,
                W,
                B,
                good,
                first,
                x_odd_sizes,
                x_strides,
                eps,
                N,
                CENTER,
                OFFSET,
                ROUND,
                ACC,
                1,
                CHUNK,
            )
