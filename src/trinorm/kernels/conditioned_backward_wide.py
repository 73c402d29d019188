"""Conditioned norms of rows that no program holds, backward, in conditioned_backward.py's names.

- ``conditioned_inputs_backward_wide``       dx and dz: a row is read twice, chunk by chunk, for c1 and c2 and for these
- ``conditioned_parameters_backward_wide``   dw and db: a program walks rows of a set, of a chunk of columns

A chunk is loaded as the short kernels load a row: as one of CHUNK columns.
"""

import triton
import triton.language as tl

from .affine import NO_BIAS, NO_WEIGHT, affine_backward
from .conditioned import gated, load_rows, load_rows_or
from .conditioned_backward import store_gradients_of_chunk
from .index import (
    chunk_columns,
    chunks_of,
    columns_live,
    first_program,
    program_count,
    rounded_up,
    row_offsets,
    rows_live,
    tile_rows,
)
from .overlap import let_next_launch, wait_for_previous
from .row_backward import add_db, add_dw, load_stats, normalized, zero_chunks
from .stats import mean_of, row_sum


@triton.jit
def load_chunk(
    given,
    offsets,
    start,
    live,
    CHUNK: tl.constexpr,
    GATE: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    ACC: tl.constexpr,
    STREAM: tl.constexpr,
):
    """(x, z, s, dy, dn, w, b) of the chunk of a row from column ``start`` on, each as the one chunk that is held. given:
    (DY, X, Z, W, B); offsets: where the row begins in each.
    """
    DY, X, Z, W, B = given
    of_dy, of_x, of_z, of_w, of_b = offsets
    xs = load_rows(X, of_x + start, live, CHUNK, CHUNK, STREAM)
    zs = load_rows(Z, of_z + start, live, CHUNK, CHUNK, STREAM)
    dys = load_rows(DY, of_dy + start, live, CHUNK, CHUNK, STREAM)
    ws = load_rows_or(W, of_w + start, live, CHUNK, CHUNK, NO_WEIGHT)
    bs = load_rows_or(B, of_b + start, live, CHUNK, CHUNK, NO_BIAS)
    ss = gated(xs, zs, GATE if GATE_FIRST else None, ACC)
    dns = gated(dys, zs, None if GATE_FIRST else GATE, ACC)
    return xs, zs, ss, dys, dns, ws, bs


@triton.jit
def conditioned_inputs_backward_wide(
    DX,
    DZ,
    DY,
    X,
    Z,
    W,
    B,
    MEAN,
    RSTD,
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
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row a program; w's and b's strides, too, are over x's rows."""
    wait_for_previous(PDL)
    let_next_launch(PDL)
    row = tile_rows(first_program(), 1)
    mean, rstd = load_stats(MEAN, RSTD, row, rows_live(row, 0, 1))
    given = DY, X, Z, W, B
    offsets = (
        row_offsets(row, dy_odd_sizes, dy_strides),
        row_offsets(row, x_odd_sizes, x_strides),
        row_offsets(row, z_odd_sizes, z_strides),
        row_offsets(row, w_odd_sizes, w_strides),
        row_offsets(row, b_odd_sizes, b_strides),
    )
    c1, c2 = None, None
    if DX is not None or GATE_FIRST:
        g_xhat = tl.zeros([1, CHUNK], ACC)
        g_sum = tl.zeros([1, CHUNK], ACC)
        for start in tl.range(0, N, CHUNK):
            live = columns_live(chunk_columns(start, CHUNK), rounded_up(N, CHUNK), N)
            _, _, ss, _, dns, ws, _ = load_chunk(given, offsets, start, live, CHUNK, GATE, GATE_FIRST, ACC, False)
            g = affine_backward(dns[0].to(ACC), ws[0], OFFSET)
            g_xhat += g * normalized(ss[0], mean, rstd, ACC)
            if CENTER:
                g_sum += g
        c1 = mean_of(row_sum(g_xhat), D)
        if CENTER:
            c2 = mean_of(row_sum(g_sum), N)
    for start in tl.range(0, N, CHUNK):
        columns = chunk_columns(start, CHUNK)
        live = columns_live(columns, rounded_up(N, CHUNK), N)
        store_gradients_of_chunk(
            (DX, DZ),
            load_chunk(given, offsets, start, live, CHUNK, GATE, GATE_FIRST, ACC, True),
            0,
            mean,
            rstd,
            c1,
            c2,
            row,
            columns,
            live,
            rounded_up(N, CHUNK),
            N,
            K,
            CENTER,
            OFFSET,
            ROUND,
            ROUND_N,
            GATE,
            GATE_FIRST,
            DY.dtype.element_ty,
            ACC,
            True,
        )


@triton.jit(do_not_specialize=["members", "sets", "repeat"])
def conditioned_parameters_backward_wide(
    DW,
    DB,
    DY,
    X,
    Z,
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
    N: tl.constexpr,
    ROUND: tl.constexpr,
    GATE: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    ACC: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Persistent programs, as many to each CHUNK columns of each set, walk its ``members`` rows; DW, DB, the row sizes and
    strides are as conditioned_backward's.
    """
    wait_for_previous(PDL)
    CHUNKS: tl.constexpr = chunks_of(N, CHUNK)
    columns = chunk_columns(first_program() % CHUNKS * CHUNK, CHUNK)
    in_row = columns_live(columns, rounded_up(N, CHUNK), N)
    of_columns = first_program() // CHUNKS  # among the programs of these columns
    own, walkers = of_columns % sets, program_count() // CHUNKS // sets
    dw = zero_chunks(CHUNK, 1, CHUNK, ACC)
    db = zero_chunks(CHUNK, 1, CHUNK, ACC)
    for of_set in tl.range(of_columns // sets, members, walkers, num_stages=STAGES):
        row = own * repeat + row_offsets(tile_rows(of_set, 1), row_odd_sizes, row_strides)
        start = first_program() % CHUNKS * CHUNK
        xs = load_rows(X, row_offsets(row, x_odd_sizes, x_strides) + start, in_row, CHUNK, CHUNK, True)
        zs = load_rows(Z, row_offsets(row, z_odd_sizes, z_strides) + start, in_row, CHUNK, CHUNK, True)
        dys = load_rows(DY, row_offsets(row, dy_odd_sizes, dy_strides) + start, in_row, CHUNK, CHUNK, True)
        mean, rstd = load_stats(MEAN, RSTD, row, rows_live(row, 0, 1))
        dns = gated(dys, zs, None if GATE_FIRST else GATE, ACC)
        if DW is not None:
            ss = gated(xs, zs, GATE if GATE_FIRST else None, ACC)
            dw = add_dw(dw, ss, dns, (mean,), (rstd,), DY.dtype.element_ty, ROUND, ACC)
        if DB is not None:
            db = add_db(db, dns, ACC)
    let_next_launch(PDL)

    if DW is not None:
        tl.store(DW + of_columns * N + columns, dw[0].to(DW.dtype.element_ty), mask=in_row)
    if DB is not None:
        tl.store(DB + of_columns * N + columns, db[0].to(DB.dtype.element_ty), mask=in_row)
