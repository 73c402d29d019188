"""Conditioned norms, backward, in conditioned.py's names. With g = dn·(w + OFFSET):

    dn = dy,  or, with a gate that is not first, dy·a(z)
    ds = rstd·(g - [i < K]·x̂·Σ(g·x̂)/D - [CENTER]·mean(g)),  of element i of a row
    dx = ds,  or, with GATE_FIRST, ds·a(z)
    dz = dy·n·a'(z),  or, with GATE_FIRST, ds·x·a'(z)
    dw = Σ dn·x̂,  db = Σ dn,  over the rows that have this w and b

docs/mathematics.md derives them. s, x̂ and a(z) are made again of x, z and the statistics. The rows are [outer, sets,
repeat]: those of a set, one middle index, have one w and b. A program has rows of one set alone, so that it reads w and b
once, and its
sums over rows are those of one set: in a fixed order, in fp32, with no atomics. Where several programs share a set, each
makes a partial, which partials.sum_partials adds up. DX, DZ, DW and DB may be None: only what is asked for is computed.
"""

import triton
import triton.language as tl

from .activation import activated_backward, gate_of
from .affine import NO_BIAS, NO_WEIGHT, affine_backward
from .conditioned import gated, load_rows, load_rows_or, weighted
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
def ds_of(g, xhat, rstd, c1, c2, columns, END: tl.constexpr, N: tl.constexpr, K: tl.constexpr, CENTER: tl.constexpr):
    """dx_of of a chunk that ends before column END; rstd·g alone behind the first K, as rstd does not move with those."""
    ds = dx_of(g, xhat, rstd, c1, c2, CENTER)
    if K == N or END <= K:
        return ds
    else:
        return tl.where(columns < K, ds, rstd * g)


@triton.jit
def store_gradients_of_chunk(
    outs,
    held,
    i: tl.constexpr,
    mean,
    rstd,
    c1,
    c2,
    rows,
    columns,
    mask,
    END: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    CENTER: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND: tl.constexpr,
    ROUND_N: tl.constexpr,
    GATE: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    dtype: tl.constexpr,
    ACC: tl.constexpr,
    STREAM: tl.constexpr,
):
    """dx and dz of the ``columns`` of some rows, which are chunk i of what is held and end before column END."""
    DX, DZ = outs
    xs, zs, ss, dys, dns, ws, bs = held
    at = rows * N + columns
    xhat = normalized(ss[i], mean, rstd, ACC)
    if DX is not None or GATE_FIRST:
        g = affine_backward(dns[i].to(ACC), ws[i], OFFSET)
        ds = ds_of(g, xhat, rstd, c1, c2, columns, END, N, K, CENTER)
    if DZ is not None:
        z = widened(zs[i], ACC)
        if GATE_FIRST:
            da = ds * widened(xs[i], ACC)
        else:
            da = widened(dys[i], ACC) * weighted(xhat, ws[i], bs[i], dtype, OFFSET, ROUND, ROUND_N)
        store_once(DZ + at, activated_backward(da, z, GATE), mask, STREAM)
    if DX is not None:
        if GATE_FIRST:
            ds *= gate_of(widened(zs[i], ACC), GATE)
        store_once(DX + at, ds, mask, STREAM)


@triton.jit
def store_conditioned_gradients(
    outs,
    held,
    mean,
    rstd,
    rows,
    live,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    CENTER: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND: tl.constexpr,
    ROUND_N: tl.constexpr,
    GATE: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    dtype: tl.constexpr,
    ACC: tl.constexpr,
    STREAM: tl.constexpr,
):
    """dx and dz of a tile of whole rows. outs: (DX, DZ); held: (x, z, s, dy, dn, w, b), each as chunks; dtype: y's."""
    xs, _, ss, _, dns, ws, bs = held
    CHUNK: tl.constexpr = xs[0].shape[1]
    c1, c2 = None, None
    if outs[0] is not None or GATE_FIRST:
        means, rstds = undoing_row(mean, rstd, ws, bs, OFFSET, False, ACC)
        c1, c2 = dx_sums(ss, dns, ws, means, rstds, CENTER, OFFSET, ACC)
        c1, c2 = mean_of(c1, D), mean_of(c2, N)
    for i in tl.static_range(len(xs)):
        columns = chunk_columns(i * CHUNK, CHUNK)
        mask = live & columns_live(columns, (i + 1) * CHUNK, N)
        store_gradients_of_chunk(
            outs,
            held,
            i,
            mean,
            rstd,
            c1,
            c2,
            rows,
            columns,
            mask,
            (i + 1) * CHUNK,
            N,
            K,
            CENTER,
            OFFSET,
            ROUND,
            ROUND_N,
            GATE,
            GATE_FIRST,
            dtype,
            ACC,
            STREAM,
        )


@triton.jit(do_not_specialize=["members", "sets", "repeat"])
def conditioned_backward(
    DX,
    DZ,
    DW,
    DB,
    DY,
    X,
    Z,
    W,
    B,
    MEAN,
    RSTD,
    members: tl.int64,
    sets,
    repeat: tl.int64,
    row_odd_sizes,
    row_strides,
    dy_odd_sizes,
    dy_strides,
    x_odd_sizes,
    x_strides,
    z_odd_sizes,
    z_strides,
    w_odd_sizes,
    w_strides,
    b_odd_sizes,
    b_strides,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    CENTER: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND: tl.constexpr,
    ROUND_N: tl.constexpr,
    GATE: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    STREAM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Persistent programs, as many to each set, walk tiles of its ``members`` rows; DW and DB are ``[programs of a set,
    sets, N]`` partials, or, where a set has one program, dw and db. The row sizes and strides are those of a set's rows
    among all, the others' those of all rows, w's and b's of the sets.
    """
    wait_for_previous(PDL)
    own = first_program() % sets
    every = tl.full([ROWS, 1], True, tl.int1)
    ws = load_rows_or(W, row_offsets(own, w_odd_sizes, w_strides), every, N, CHUNK, NO_WEIGHT)
    bs = load_rows_or(B, row_offsets(own, b_odd_sizes, b_strides), every, N, CHUNK, NO_BIAS)
    dw = zero_chunks(N, ROWS, CHUNK, ACC)
    db = zero_chunks(N, ROWS, CHUNK, ACC)
    DTYPE: tl.constexpr = DY.dtype.element_ty
    for tile in tl.range(first_program() // sets, tl.cdiv(members, ROWS), program_count() // sets, num_stages=STAGES):
        of_set = tile_rows(tile, ROWS)
        live = rows_live(of_set, members, ROWS)
        rows = own * repeat + row_offsets(of_set, row_odd_sizes, row_strides)
        xs = load_rows(X, row_offsets(rows, x_odd_sizes, x_strides), live, N, CHUNK, STREAM)
        zs = load_rows(Z, row_offsets(rows, z_odd_sizes, z_strides), live, N, CHUNK, STREAM)
        dys = load_rows(DY, row_offsets(rows, dy_odd_sizes, dy_strides), live, N, CHUNK, STREAM)
        mean, rstd = load_stats(MEAN, RSTD, rows, live)
        ss = gated(xs, zs, GATE if GATE_FIRST else None, ACC)
        dns = gated(dys, zs, None if GATE_FIRST else GATE, ACC)
        if DW is not None:
            means, rstds = undoing_row(mean, rstd, ws, bs, OFFSET, False, ACC)
            dw = add_dw(dw, ss, dns, means, rstds, DTYPE, ROUND, ACC)
        if DB is not None:
            db = add_db(db, dns, ACC)
        if DX is not None or DZ is not None:
            held = xs, zs, ss, dys, dns, ws, bs
            store_conditioned_gradients(
                (DX, DZ),
                held,
                mean,
                rstd,
                rows,
                live,
                N,
                K,
                D,
                CENTER,
                OFFSET,
                ROUND,
                ROUND_N,
                GATE,
                GATE_FIRST,
                DTYPE,
                ACC,
                STREAM,
            )
    let_next_launch(PDL)

    if DW is not None:
        store_column_sums(DW, first_program() * N, dw, N)
    if DB is not None:
        store_column_sums(DB, first_program() * N, db, N)
