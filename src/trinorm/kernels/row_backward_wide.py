"""Row norms, backward, of rows that no program holds and no team shares: x and dy are read twice.

- ``row_backward_moments``   c1 and c2 of each row,
- ``row_backward_apply``     then dx, dw and db, the columns split over programs
"""

import triton
import triton.language as tl

from .added import store_input_gradients
from .affine import NO_BIAS, NO_WEIGHT, affine_backward, rounded
from .index import (
    chunk_columns,
    columns_live,
    first_program,
    load,
    load_once,
    load_or,
    program_count,
    rounded_up,
    row_offsets,
    rows_live,
    second_program,
    tile_rows,
)
from .overlap import let_next_launch, wait_for_previous
from .row_backward import dx_of, load_stats, normalized, undoing
from .stats import mean_of, row_sum


@triton.jit
def row_backward_moments(
    C1,
    C2,
    DY,
    KEPT,
    W,
    B,
    MEAN,
    RSTD,
    kept_odd_sizes,
    kept_strides,
    dy_odd_sizes,
    dy_strides,
    N: tl.constexpr,
    CENTER: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
    ACC: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """c1 and, with CENTER, c2 of one row a program."""
    wait_for_previous(PDL)
    let_next_launch(PDL)
    row = tile_rows(first_program(), 1)
    kept_row = KEPT + row_offsets(row, kept_odd_sizes, kept_strides)
    dy_row = DY + row_offsets(row, dy_odd_sizes, dy_strides)
    mean, rstd = load_stats(MEAN, RSTD, row, rows_live(row, 0, 1))

    g_xhat = tl.zeros([1, CHUNK], ACC)
    g_sum = tl.zeros([1, CHUNK], ACC)
    for start in tl.range(0, N, CHUNK):
        columns = chunk_columns(start, CHUNK)
        live = columns_live(columns, rounded_up(N, CHUNK), N)
        w = load_or(W, columns, live, NO_WEIGHT, False)
        b = load_or(B, columns, live, NO_BIAS, False)
        shift, scale = undoing(mean, rstd, w, b, OFFSET, FROM_OUTPUT, ACC)
        g = affine_backward(load(dy_row + columns, live).to(ACC), w, OFFSET)
        g_xhat += g * normalized(load(kept_row + columns, live), shift, scale, ACC)
        if CENTER:
            g_sum += g

    tl.store(C1 + row, mean_of(row_sum(g_xhat), N))
    if CENTER:
        tl.store(C2 + row, mean_of(row_sum(g_sum), N))


@triton.jit(do_not_specialize=["M"])
def row_backward_apply(
    DX,
    DRESIDUAL,
    DW,
    DB,
    DY,
    DSUM,
    SEED,
    ROW_SCALE,
    KEPT,
    W,
    B,
    MEAN,
    RSTD,
    C1,
    C2,
    M: tl.int64,  # M + ROWS passes 2^31 before M does
    kept_odd_sizes,
    kept_strides,
    dy_odd_sizes,
    dy_strides,
    N: tl.constexpr,
    CENTER: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
    ALPHA: tl.constexpr,
    DROP: tl.constexpr,
    ACC: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """dx, dw and db of one chunk of columns (grid axis 1), over the rows of a persistent program (axis 0)."""
    wait_for_previous(PDL)
    columns = chunk_columns(second_program() * CHUNK, CHUNK)
    in_row = columns_live(columns, rounded_up(N, CHUNK), N)
    w = load_or(W, columns, in_row, NO_WEIGHT, False)
    b = load_or(B, columns, in_row, NO_BIAS, False)
    dw = tl.zeros([1, CHUNK], ACC)
    db = tl.zeros([1, CHUNK], ACC)

    for row_number in tl.range(first_program(), M, program_count(), num_stages=STAGES):
        row = tile_rows(row_number, 1)
        live = rows_live(row, 0, 1)
        mean, rstd = load_stats(MEAN, RSTD, row, live)
        dy = load_once(DY + row_offsets(row, dy_odd_sizes, dy_strides) + columns, in_row, True).to(ACC)
        kept = load_once(KEPT + row_offsets(row, kept_odd_sizes, kept_strides) + columns, in_row, True)
        shift, scale = undoing(mean, rstd, w, b, OFFSET, FROM_OUTPUT, ACC)
        xhat = normalized(kept, shift, scale, ACC)
        if DW is not None:
            dw += dy * rounded(xhat, DY.dtype.element_ty, ROUND)
        if DB is not None:
            db += dy
        if DX is not None:
            c2, c1 = load_stats(C2, C1, row, live)
            dx = dx_of(affine_backward(dy, w, OFFSET), xhat, rstd, c1, c2, CENTER)
            outs, start = (DX, DRESIDUAL, DSUM, SEED, ROW_SCALE), second_program() * CHUNK
            store_input_gradients(outs, dx, row, start, live, in_row, N, ALPHA, DROP, ACC, True)
    let_next_launch(PDL)

    if DW is not None:
        tl.store(DW + first_program() * N + columns, dw, mask=in_row)
    if DB is not None:
        tl.store(DB + first_program() * N + columns, db, mask=in_row)
