"""LayerNorm over the channels at each position, channels first in memory: y = (x - mean)·rstd·w + b, and its gradients.

A position is a row of the row family, whose columns are the C channels, S elements apart; so the row family's helpers do
the mathematics (row_backward.py has the equations). What differs is the tile, ``[ROWS, CHUNK]``: its rows lie side by side
in memory, so that a thread reads several of one channel at once. Positions are numbered through all M of all samples, that
small images share a tile. UNIT divides S, as far as a wide access asks, and ROWS.

- ``channel_layer_forward``           a program holds a tile of positions with all their channels
- ``channel_layer_forward_streamed``  more channels than that: x is read twice, the second time from L2
- ``channel_layer_backward``          persistent programs walk held tiles, dw and db in registers
- ``channel_layer_moments``, ``channel_layer_apply``  more channels: c1 and c2 of each position, then dx, dw and db

DW and DB are ``[programs, C]`` partials (partials.sum_partials). DX, DW and DB may each be None: not asked for.
"""

import triton
import triton.language as tl

from .affine import NO_BIAS, NO_WEIGHT, affine_backward
from .channel_tiles import in_units
from .index import (
    chunk_columns,
    columns_live,
    first_program,
    load,
    load_or,
    load_row,
    load_row_or,
    program_count,
    rounded_up,
    rows_live,
    second_program,
    tile_rows,
)
from .overlap import let_next_launch, wait_for_previous
from .row import store_stats, store_y
from .row_backward import (
    column_sums,
    dx_of,
    dx_sums,
    load_stats,
    normalized,
    store_column_sums,
    undoing_row,
    zero_chunks,
)
from .stats import held_moments, mean_of, rescued_stats, row_sums, streamed_moments, trusted


@triton.jit
def tile_positions(tile, M, S, C: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr):
    """(the numbers of a tile's positions, which of them exist, the offsets of their first channels), each ``[ROWS, 1]``.

    The division that finds a position's sample is one of units, which a thread's positions share, in 32 bits where M has
    those.
    """
    positions = tile_rows(tile, ROWS)
    units = (tile * (ROWS // UNIT) + tl.arange(0, ROWS)[:, None] // UNIT).to(M.dtype)
    samples = (units // (S // UNIT)).to(tl.int64)
    return positions, rows_live(positions, in_units(M, UNIT), ROWS), positions + samples * (C - 1) * in_units(S, UNIT)


@triton.jit
def channel_stride(S, UNIT: tl.constexpr):
    """Elements from a channel to the next."""
    return in_units(S, UNIT).to(tl.int64)


@triton.jit
def store_y_streamed(
    Y, X, W, B, first, stride, mean, rstd, live, mask, C: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr
):
    """y of the positions in ``mask``, of x read (again) chunk by chunk."""
    for start in tl.range(0, C, CHUNK):
        channels = chunk_columns(start, CHUNK)
        there = columns_live(channels, rounded_up(C, CHUNK), C)
        w = load_or(W, channels, there, NO_WEIGHT, False)
        b = load_or(B, channels, there, NO_BIAS, False)
        offsets = first + channels * stride
        x = load(X + offsets, live & there)
        store_y(Y, offsets, x, mean, rstd, w, b, mask & there, 0.0, False, ACC, False)


@triton.jit(do_not_specialize=["M", "S"])
def channel_layer_forward(
    Y,
    MEAN,
    RSTD,
    X,
    W,
    B,
    M,
    S,
    eps: tl.float64,
    C: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
    RESCUE: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile a program. MEAN and RSTD may be None: no backward will ask for them."""
    wait_for_previous(PDL)
    let_next_launch(PDL)
    eps = tl.full([1, 1], eps, ACC)
    positions, live, first = tile_positions(first_program(), M, S, C, UNIT, ROWS)
    stride = channel_stride(S, UNIT)
    xs = load_row(X + first, live, C, CHUNK, False, stride)
    mean, power = held_moments(xs, C, True, ACC)
    rstd = tl.rsqrt(power + eps)
    store_stats(MEAN, RSTD, positions, mean, rstd, live, True)
    for i in tl.static_range(len(xs)):
        channels = chunk_columns(i * CHUNK, CHUNK)
        there = columns_live(channels, (i + 1) * CHUNK, C)
        w = load_or(W, channels, there, NO_WEIGHT, False)
        b = load_or(B, channels, there, NO_BIAS, False)
        store_y(Y, first + channels * stride, xs[i], mean, rstd, w, b, live & there, 0.0, False, ACC, False)
    if RESCUE:
        STEP: tl.constexpr = CHUNK // 4 if CHUNK >= 4 else 1  # for few registers beside the common path's
        bad = live & ~trusted(power + eps)
        if tl.max(bad.to(tl.int32)) == 1:
            # A mask that leaves them out above would part the accesses of their neighbours: they are written over.
            tl.debug_barrier()
            mean, rstd = rescued_stats(X + first, eps, C, True, ACC, STEP, live, stride)
            store_stats(MEAN, RSTD, positions, mean, rstd, bad, True)
            store_y_streamed(Y, X, W, B, first, stride, mean, rstd, live, bad, C, ACC, STEP)


@triton.jit(do_not_specialize=["M", "S"])
def channel_layer_forward_streamed(
    Y,
    MEAN,
    RSTD,
    X,
    W,
    B,
    M,
    S,
    eps: tl.float64,
    C: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
    RESCUE: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """As channel_layer_forward."""
    wait_for_previous(PDL)
    let_next_launch(PDL)
    eps = tl.full([1, 1], eps, ACC)
    positions, live, first = tile_positions(first_program(), M, S, C, UNIT, ROWS)
    stride = channel_stride(S, UNIT)
    mean, power = streamed_moments(X + first, C, True, ACC, CHUNK, live, stride)
    rstd = tl.rsqrt(power + eps)
    if RESCUE:
        good = trusted(power + eps) | ~live
        if tl.min(good.to(tl.int32)) == 0:
            mean_again, rstd_again = rescued_stats(X + first, eps, C, True, ACC, CHUNK, live, stride)
            mean, rstd = tl.where(good, mean, mean_again), tl.where(good, rstd, rstd_again)
    store_stats(MEAN, RSTD, positions, mean, rstd, live, True)
    store_y_streamed(Y, X, W, B, first, stride, mean, rstd, live, live, C, ACC, CHUNK)


@triton.jit
def run_sums(x, RUN: tl.constexpr):
    """The sums of each RUN rows of a tile, ``[ROWS // RUN, CHUNK]``: those that a thread has, for which no lane waits."""
    if RUN == 1:
        return x
    else:
        return tl.sum(tl.reshape(x, [x.shape[0] // RUN, RUN, x.shape[1]]), axis=1)


@triton.jit
def add_runs_of_products(dw, xs, dys, mean, rstd, RUN: tl.constexpr, ACC: tl.constexpr):
    """dw + dy·x̂, chunk by chunk, still one sum for each run of the tile's rows."""
    chunks = ()
    for i in tl.static_range(len(xs)):
        product = dys[i].to(ACC) * normalized(xs[i], mean, rstd, ACC)
        chunks = chunks + (dw[i] + run_sums(product, RUN),)
    return chunks


@triton.jit
def add_runs(db, dys, RUN: tl.constexpr, ACC: tl.constexpr):
    """db + dy, in the same way."""
    chunks = ()
    for i in tl.static_range(len(dys)):
        chunks = chunks + (db[i] + run_sums(dys[i].to(ACC), RUN),)
    return chunks


@triton.jit(do_not_specialize=["M", "S"])
def channel_layer_backward(
    DX,
    DW,
    DB,
    DY,
    X,
    W,
    MEAN,
    RSTD,
    M,
    S,
    C: tl.constexpr,
    UNIT: tl.constexpr,
    RUN: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """RUN: how many positions a thread has beside each other."""
    wait_for_previous(PDL)
    stride = channel_stride(S, UNIT)
    ws = load_row_or(W, tl.full([1, 1], True, tl.int1), C, CHUNK, NO_WEIGHT)
    dw = zero_chunks(C, ROWS // RUN, CHUNK, ACC)
    db = zero_chunks(C, ROWS // RUN, CHUNK, ACC)
    for tile in tl.range(first_program(), tl.cdiv(M, ROWS), program_count(), num_stages=STAGES):
        positions, live, first = tile_positions(tile, M, S, C, UNIT, ROWS)
        xs = load_row(X + first, live, C, CHUNK, False, stride)
        dys = load_row(DY + first, live, C, CHUNK, False, stride)
        mean, rstd = load_stats(MEAN, RSTD, positions, live)
        if DW is not None:
            dw = add_runs_of_products(dw, xs, dys, mean, rstd, RUN, ACC)
        if DB is not None:
            db = add_runs(db, dys, RUN, ACC)
        if DX is not None:
            shifts, scales = undoing_row(mean, rstd, ws, ws, 0.0, False, ACC)
            c1, c2 = dx_sums(xs, dys, ws, shifts, scales, True, 0.0, ACC)
            c1, c2 = mean_of(c1, C), mean_of(c2, C)
            for i in tl.static_range(len(xs)):
                channels = chunk_columns(i * CHUNK, CHUNK)
                g = affine_backward(dys[i].to(ACC), ws[i], 0.0)
                dx = dx_of(g, normalized(xs[i], mean, rstd, ACC), rstd, c1, c2, True).to(DX.dtype.element_ty)
                tl.store(DX + first + channels * stride, dx, mask=live & columns_live(channels, (i + 1) * CHUNK, C))
    let_next_launch(PDL)
    if DW is not None:
        store_column_sums(DW, first_program() * C, dw, C)
    if DB is not None:
        store_column_sums(DB, first_program() * C, db, C)


@triton.jit(do_not_specialize=["M", "S"])
def channel_layer_moments(
    C1,
    C2,
    DY,
    X,
    W,
    MEAN,
    RSTD,
    M,
    S,
    C: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """c1 and c2 of a tile a program."""
    wait_for_previous(PDL)
    let_next_launch(PDL)
    positions, live, first = tile_positions(first_program(), M, S, C, UNIT, ROWS)
    stride = channel_stride(S, UNIT)
    mean, rstd = load_stats(MEAN, RSTD, positions, live)
    g_xhat = tl.zeros([ROWS, CHUNK], ACC)
    g_sum = tl.zeros([ROWS, CHUNK], ACC)
    for start in tl.range(0, C, CHUNK):
        channels = chunk_columns(start, CHUNK)
        there = columns_live(channels, rounded_up(C, CHUNK), C)
        w = load_or(W, channels, there, NO_WEIGHT, False)
        offsets = first + channels * stride
        g = affine_backward(load(DY + offsets, live & there).to(ACC), w, 0.0)
        g_xhat += g * normalized(load(X + offsets, live & there), mean, rstd, ACC)
        g_sum += g
    c1, c2 = row_sums(g_xhat, g_sum)
    tl.store(C1 + positions, mean_of(c1, C), mask=live)
    tl.store(C2 + positions, mean_of(c2, C), mask=live)


@triton.jit(do_not_specialize=["M", "S"])
def channel_layer_apply(
    DX,
    DW,
    DB,
    DY,
    X,
    W,
    MEAN,
    RSTD,
    C1,
    C2,
    M,
    S,
    C: tl.constexpr,
    UNIT: tl.constexpr,
    RUN: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """CHUNK channels (grid axis 1), of the tiles of a persistent program (axis 0)."""
    wait_for_previous(PDL)
    channels = chunk_columns(second_program() * CHUNK, CHUNK)
    there = columns_live(channels, rounded_up(C, CHUNK), C)
    w = load_or(W, channels, there, NO_WEIGHT, False)
    dw = tl.zeros([ROWS // RUN, CHUNK], ACC)
    db = tl.zeros([ROWS // RUN, CHUNK], ACC)
    for tile in tl.range(first_program(), tl.cdiv(M, ROWS), program_count(), num_stages=STAGES):
        positions, live, first = tile_positions(tile, M, S, C, UNIT, ROWS)
        offsets = first + channels * channel_stride(S, UNIT)
        mean, rstd = load_stats(MEAN, RSTD, positions, live)
        dy = load(DY + offsets, live & there).to(ACC)
        xhat = normalized(load(X + offsets, live & there), mean, rstd, ACC)
        if DW is not None:
            dw += run_sums(dy * xhat, RUN)
        if DB is not None:
            db += run_sums(dy, RUN)
        if DX is not None:
            c2, c1 = load_stats(C2, C1, positions, live)
            dx = dx_of(affine_backward(dy, w, 0.0), xhat, rstd, c1, c2, True)
            tl.store(DX + offsets, dx.to(DX.dtype.element_ty), mask=live & there)
    let_next_launch(PDL)
    if DW is not None:
        tl.store(DW + first_program() * C + channels, column_sums(dw), mask=there)
    if DB is not None:
        tl.store(DB + first_program() * C + channels, column_sums(db), mask=there)
