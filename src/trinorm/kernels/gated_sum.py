"""Conditioned norms of a gated sum: what adaLN-Zero, and LayerScale, do between a branch and the next.

    s = r + a·x
    y = x̂·(w + OFFSET) + b,   x̂ = (s - mean)·rstd   over the N elements of a row

a, w and b are chosen by the row, as conditioned.py's w and b are. s is rounded to its dtype before anything else is made of
it, so that y is what adding first and normalizing then gives. Backward, of y's gradient and of s's own, ds:

    dr = rstd·(g - x̂·mean(g·x̂) - [CENTER]·mean(g)) + ds,   g = dy·(w + OFFSET)
    dx = dr·a
    da = Σ dr·x,   dw = Σ dy·x̂,   db = Σ dy,   over the rows that have this a, w and b

W, B, MEAN, RSTD and DS may be None, and each gradient that nobody asks for, X too where nobody asks for da. Sums over rows
are conditioned_backward.py's: of sets, in a fixed order, in fp32, with no atomics.
"""

import triton
import triton.language as tl

from .affine import NO_BIAS, NO_WEIGHT, affine_backward
from .conditioned import load_rows, load_rows_or, normalize_held
from .index import (
    chunk_columns,
    columns_live,
    first_program,
    program_count,
    row_offsets,
    rows_live,
    store_once,
    tile_rows,
    widened,
)
from .overlap import let_next_launch, wait_for_previous
from .row_backward import (
    add_db,
    add_dw,
    dx_of,
    dx_sums,
    load_stats,
    normalized,
    store_column_sums,
    undoing_row,
    zero_chunks,
)
from .stats import mean_of


@triton.jit
def gated_sums(SUM, xs, residuals, gates, rows, live, N: tl.constexpr, ACC: tl.constexpr, STREAM: tl.constexpr):
    """s of a tile of rows, stored, and as it is stored."""
    CHUNK: tl.constexpr = xs[0].shape[1]
    sums = ()
    for i in tl.static_range(len(xs)):
        columns = chunk_columns(i * CHUNK, CHUNK)
        s = tl.fma(widened(xs[i], ACC), widened(gates[i], ACC), widened(residuals[i], ACC)).to(SUM.dtype.element_ty)
        store_once(SUM + rows * N + columns, s, live & columns_live(columns, (i + 1) * CHUNK, N), STREAM)
        sums = sums + (s,)
    return sums


@triton.jit(do_not_specialize=["M"])
def gated_sum_forward(
    Y,
    SUM,
    MEAN,
    RSTD,
    X,
    RESIDUAL,
    A,
    W,
    B,
    M: tl.int64,
    x_odd_sizes,
    x_strides,
    residual_odd_sizes,
    residual_strides,
    a_odd_sizes,
    a_strides,
    w_odd_sizes,
    w_strides,
    b_odd_sizes,
    b_strides,
    eps: tl.float64,
    N: tl.constexpr,
    CENTER: tl.constexpr,
    OFFSET: tl.constexpr,
    ACC: tl.constexpr,
    RESCUE: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STREAM: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile of ROWS rows, each read once and held. Those whose squares fp32 did not hold are done again, scaled."""
    wait_for_previous(PDL)
    let_next_launch(PDL)
    eps = tl.full([1, 1], eps, ACC)
    rows = tile_rows(first_program(), ROWS)
    live = rows_live(rows, M, ROWS)
    xs = load_rows(X, row_offsets(rows, x_odd_sizes, x_strides), live, N, CHUNK, STREAM)
    residuals = load_rows(RESIDUAL, row_offsets(rows, residual_odd_sizes, residual_strides), live, N, CHUNK, STREAM)
    gates = load_rows_or(A, row_offsets(rows, a_odd_sizes, a_strides), live, N, CHUNK, NO_WEIGHT)
    ws = load_rows_or(W, row_offsets(rows, w_odd_sizes, w_strides), live, N, CHUNK, NO_WEIGHT)
    bs = load_rows_or(B, row_offsets(rows, b_odd_sizes, b_strides), live, N, CHUNK, NO_BIAS)
    ss = gated_sums(SUM, xs, residuals, gates, rows, live, N, ACC, STREAM)
    outs, held = (Y, MEAN, RSTD), (ss, (), ws, bs)
    good = normalize_held(
        outs, held, rows, live, eps, N, N, N, CENTER, OFFSET, False, False, None, ACC, RESCUE, STREAM, False
    )
    if RESCUE:
        bad = live & (good == 0)
        if tl.max(bad.to(tl.int32)) == 1:
            normalize_held(
                outs, held, rows, bad, eps, N, N, N, CENTER, OFFSET, False, False, None, ACC, RESCUE, STREAM, True
            )


@triton.jit
def store_gated_gradients(
    outs,
    da,
    held,
    mean,
    rstd,
    rows,
    live,
    N: tl.constexpr,
    CENTER: tl.constexpr,
    OFFSET: tl.constexpr,
    ACC: tl.constexpr,
    STREAM: tl.constexpr,
):
    """dx and dr of a tile of whole rows; returns da + dr·x, still one sum for each row. outs: (DX, DRESIDUAL); held: (x, s,
    dy, ds, a, w), each as chunks.
    """
    DX, DRESIDUAL = outs
    xs, ss, dys, dss, gates, ws = held
    CHUNK: tl.constexpr = ss[0].shape[1]
    means, rstds = undoing_row(mean, rstd, ws, ws, OFFSET, False, ACC)
    c1, c2 = dx_sums(ss, dys, ws, means, rstds, CENTER, OFFSET, ACC)
    c1, c2 = mean_of(c1, N), mean_of(c2, N)
    sums = ()
    for i in tl.static_range(len(ss)):
        columns = chunk_columns(i * CHUNK, CHUNK)
        mask = live & columns_live(columns, (i + 1) * CHUNK, N)
        g = affine_backward(dys[i].to(ACC), ws[i], OFFSET)
        dr = dx_of(g, normalized(ss[i], mean, rstd, ACC), rstd, c1, c2, CENTER)
        if len(dss) > 0:
            dr += widened(dss[i], ACC)
        if DRESIDUAL is not None:
            store_once(DRESIDUAL + rows * N + columns, dr, mask, STREAM)
        if DX is not None:
            store_once(DX + rows * N + columns, dr * widened(gates[i], ACC), mask, STREAM)
        if len(xs) > 0:
            sums = sums + (da[i] + dr * widened(xs[i], ACC),)
    return sums


@triton.jit(do_not_specialize=["members", "sets", "repeat"])
def gated_sum_backward(
    DX,
    DRESIDUAL,
    DA,
    DW,
    DB,
    DY,
    DS,
    X,
    A,
    W,
    SUM,
    MEAN,
    RSTD,
    members: tl.int64,
    sets,
    repeat: tl.int64,
    row_odd_sizes,
    row_strides,
    dy_odd_sizes,
    dy_strides,
    ds_odd_sizes,
    ds_strides,
    x_odd_sizes,
    x_strides,
    a_odd_sizes,
    a_strides,
    w_odd_sizes,
    w_strides,
    N: tl.constexpr,
    CENTER: tl.constexpr,
    OFFSET: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    STREAM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Persistent programs, as many to each set, as conditioned_backward's, whose sizes and strides these are. SUM, which is
    the forward's own, lies row by row.
    """
    wait_for_previous(PDL)
    own = first_program() % sets
    every = tl.full([ROWS, 1], True, tl.int1)
    gates = load_rows_or(A, row_offsets(own, a_odd_sizes, a_strides), every, N, CHUNK, NO_WEIGHT)
    ws = load_rows_or(W, row_offsets(own, w_odd_sizes, w_strides), every, N, CHUNK, NO_WEIGHT)
    da = zero_chunks(N, ROWS, CHUNK, ACC)
    dw = zero_chunks(N, ROWS, CHUNK, ACC)
    db = zero_chunks(N, ROWS, CHUNK, ACC)
    for tile in tl.range(first_program() // sets, tl.cdiv(members, ROWS), program_count() // sets, num_stages=STAGES):
        of_set = tile_rows(tile, ROWS)
        live = rows_live(of_set, members, ROWS)
        rows = own * repeat + row_offsets(of_set, row_odd_sizes, row_strides)
        ss = load_rows(SUM, rows * N, live, N, CHUNK, STREAM)
        dys = load_rows(DY, row_offsets(rows, dy_odd_sizes, dy_strides), live, N, CHUNK, STREAM)
        dss = load_rows(DS, row_offsets(rows, ds_odd_sizes, ds_strides), live, N, CHUNK, STREAM)
        xs = load_rows(X, row_offsets(rows, x_odd_sizes, x_strides), live, N, CHUNK, STREAM)
        mean, rstd = load_stats(MEAN, RSTD, rows, live)
        if DW is not None:
            means, rstds = undoing_row(mean, rstd, ws, ws, OFFSET, False, ACC)
            dw = add_dw(dw, ss, dys, means, rstds, DY.dtype.element_ty, False, ACC)
        if DB is not None:
            db = add_db(db, dys, ACC)
        if DX is not None or DRESIDUAL is not None or DA is not None:
            outs, held = (DX, DRESIDUAL), (xs, ss, dys, dss, gates, ws)
            sums = store_gated_gradients(outs, da, held, mean, rstd, rows, live, N, CENTER, OFFSET, ACC, STREAM)
            if DA is not None:
                da = sums
    let_next_launch(PDL)

    if DA is not None:
        store_column_sums(DA, first_program() * N, da, N)
    if DW is not None:
        store_column_sums(DW, first_program() * N, dw, N)
    if DB is not None:
        store_column_sums(DB, first_program() * N, db, N)
