"""Norms without statistics: a function that saturates, of each element alone.

    v = α·x + s,   y = f(v)·w + b,   f = tanh (DyT) or erf (Derf)

and backward, with dv = dy·w·f'(v):

    dx = dv·α,   dα = Σ dv·x,   ds = Σ dv,   dw = Σ_rows dy·f(v),   db = Σ_rows dy

docs/mathematics.md derives them. No element needs another, so a tile is of any rows and of any columns: a program has CHUNK
columns, and a row has as many programs as it takes. α and s are one number each. S, W and B may be None, and of what a
backward makes, DX, DALPHA, DS, DW and DB. Its sums are taken in a fixed order, in fp32, with no atomics: each program makes
partials, which partials.sum_columns_and_numbers adds up.
"""

import triton
import triton.language as tl

from .affine import NO_BIAS, NO_WEIGHT, affine
from .index import (
    chunk_columns,
    chunks_of,
    columns_live,
    first_program,
    load_once,
    load_or,
    program_count,
    rounded_up,
    row_offsets,
    rows_live,
    store_once,
    tile_rows,
    widened,
)
from .overlap import let_next_launch, wait_for_previous
from .row_backward import column_sums
from .saturating import saturated, saturated_slope


@triton.constexpr_function
def is_coarse(dtype, ACC):
    """Whether what is rounded to ``dtype`` needs no more digits than COARSE functions have."""
    return dtype.primitive_bitwidth == 16 and tl.float32 == ACC


@triton.jit
def number(POINTER, absent: tl.constexpr, ACC: tl.constexpr):
    """alpha or s; as load_or the fp32 of bits ``absent`` where there is none."""
    if POINTER is None:
        return widened(tl.full([1, 1], absent, tl.int32).to(tl.float32, bitcast=True), ACC)
    else:
        return tl.load(POINTER).to(ACC)


@triton.jit(do_not_specialize=["M"])
def dynamic_forward(
    Y,
    X,
    ALPHA,
    S,
    W,
    B,
    M: tl.int64,
    x_odd_sizes,
    x_strides,
    N: tl.constexpr,
    FUNCTION: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STREAM: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile of ROWS rows by CHUNK columns."""
    wait_for_previous(PDL)
    let_next_launch(PDL)
    CHUNKS: tl.constexpr = chunks_of(N, CHUNK)
    columns = chunk_columns(first_program() % CHUNKS * CHUNK, CHUNK)
    in_row = columns_live(columns, rounded_up(N, CHUNK), N)
    rows = tile_rows(first_program() // CHUNKS, ROWS)
    mask = rows_live(rows, M, ROWS) & in_row
    x = widened(load_once(X + row_offsets(rows, x_odd_sizes, x_strides) + columns, mask, STREAM), ACC)
    w = load_or(W, columns, in_row, NO_WEIGHT, False)
    b = load_or(B, columns, in_row, NO_BIAS, False)
    v = x * number(ALPHA, NO_WEIGHT, ACC) + number(S, NO_BIAS, ACC)
    y = affine(saturated(v, FUNCTION, is_coarse(Y.dtype.element_ty, ACC), False), w, b, 0.0)
    store_once(Y + rows * N + columns, y, mask, STREAM)


@triton.jit(do_not_specialize=["M"])
def dynamic_backward(
    DX,
    DALPHA,
    DS,
    DW,
    DB,
    DY,
    X,
    ALPHA,
    S,
    W,
    M: tl.int64,
    dy_odd_sizes,
    dy_strides,
    x_odd_sizes,
    x_strides,
    N: tl.constexpr,
    FUNCTION: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    STREAM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Persistent programs, as many to each CHUNK columns, walk tiles of ROWS rows. DW and DB are ``[programs
    of a chunk, N]`` partials, DALPHA and DS one number of each program.

    w is of a column, so that its product with alpha is taken once, and those with the sums over x and s after the loop.
    """
    wait_for_previous(PDL)
    CHUNKS: tl.constexpr = chunks_of(N, CHUNK)
    columns = chunk_columns(first_program() % CHUNKS * CHUNK, CHUNK)
    in_row = columns_live(columns, rounded_up(N, CHUNK), N)
    alpha, s = number(ALPHA, NO_WEIGHT, ACC), number(S, NO_BIAS, ACC)
    w_alpha = widened(load_or(W, columns, in_row, NO_WEIGHT, False), ACC) * alpha
    COARSE: tl.constexpr = is_coarse(X.dtype.element_ty, ACC)
    FINE: tl.constexpr = W is not None and not is_coarse(W.dtype.element_ty, ACC)
    dalpha = tl.zeros([ROWS, CHUNK], ACC)
    ds = tl.zeros([ROWS, CHUNK], ACC)
    dw = tl.zeros([ROWS, CHUNK], ACC)
    db = tl.zeros([ROWS, CHUNK], ACC)
    for tile in tl.range(first_program() // CHUNKS, tl.cdiv(M, ROWS), program_count() // CHUNKS, num_stages=STAGES):
        rows = tile_rows(tile, ROWS)
        mask = rows_live(rows, M, ROWS) & in_row
        x = widened(load_once(X + row_offsets(rows, x_odd_sizes, x_strides) + columns, mask, STREAM), ACC)
        dy = widened(load_once(DY + row_offsets(rows, dy_odd_sizes, dy_strides) + columns, mask, STREAM), ACC)
        v = x * alpha + s
        g = dy * saturated_slope(v, FUNCTION, COARSE)
        if DX is not None:
            store_once(DX + rows * N + columns, g * w_alpha, mask, STREAM)
        if DALPHA is not None:
            dalpha += g * x
        if DS is not None:
            ds += g
        if DW is not None:
            dw += dy * saturated(v, FUNCTION, COARSE, FINE)
        if DB is not None:
            db += dy
    let_next_launch(PDL)

    of_columns = first_program() // CHUNKS * N + columns
    if DW is not None:
        tl.store(DW + of_columns, column_sums(dw).to(DW.dtype.element_ty), mask=in_row)
    if DB is not None:
        tl.store(DB + of_columns, column_sums(db).to(DB.dtype.element_ty), mask=in_row)
    if DALPHA is not None:
        tl.store(DALPHA + first_program(), weighted_sum(dalpha, W, columns, in_row, DALPHA.dtype.element_ty))
    if DS is not None:
        tl.store(DS + first_program(), weighted_sum(ds, W, columns, in_row, DS.dtype.element_ty))


@triton.jit
def weighted_sum(sums, W, columns, mask, dtype: tl.constexpr):
    """The sum of some columns' sums times w."""
    w = widened(load_or(W, columns, mask, NO_WEIGHT, False), sums.dtype)
    return tl.sum(column_sums(sums) * w).to(dtype)
