"""QK-norm, backward: the rotation's transpose (heads.py), and RMSNorm's own backward (row_backward.py) of what that gives.

    dn[j] = dy[j]·cos[j] ± dy[p(j)]·sin[p(j)],   + where j is the first of its pair, - where it is the second; dy from R on
    dx = rstd·(g - x̂·mean(g·x̂)) with g = dn·(w + OFFSET),   dw = Σ dn·x̂ over tokens and heads

The sums over tokens are taken in a fixed order, in fp32, with no atomics: each program makes a partial of its share, which
partials.sum_partials adds up.
"""

import triton
import triton.language as tl

from .affine import rounded
from .heads import angles, head_weight, load_heads, others
from .index import (
    chunk_columns,
    columns_live,
    first_program,
    load,
    program_count,
    row_offsets,
    rows_live,
    tile_rows,
    widened,
)
from .overlap import let_next_launch, wait_for_previous
from .row_backward import dx_of, store_column_sums
from .stats import mean_of, row_sum


@triton.jit
def walk_heads(
    outs,
    given,
    turn,
    tokens,
    OF: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx of this program's share of tokens and heads, and its partial of dw. outs: (DX, DW); given: (DY, X, W, RSTD, and
    the odd_sizes and strides of dy and of x); turn: as angles'.
    """
    DX, DW = outs
    DY, X, W, RSTD, dy_odd_sizes, dy_strides, x_odd_sizes, x_strides = given
    COS, _, _, _ = turn
    H: tl.constexpr = OF[0]
    HEADS: tl.constexpr = OF[1]
    GROUPS: tl.constexpr = H // HEADS
    DTYPE: tl.constexpr = DY.dtype.element_ty
    columns = chunk_columns(0, CHUNK)
    in_head = columns_live(columns, CHUNK, N)
    w = head_weight(W, columns, tl.full([ROWS, 1], True, tl.int1) & in_head, OFFSET, ACC)
    dy_step, x_step = dy_strides[len(dy_odd_sizes) + 1], x_strides[len(x_odd_sizes) + 1]
    dw = tl.zeros([ROWS, CHUNK], ACC)
    for item in tl.range(first_program(), tl.cdiv(tokens, ROWS) * GROUPS, program_count(), num_stages=STAGES):
        rows = tile_rows(item // GROUPS, ROWS)
        head = item % GROUPS * HEADS
        live = rows_live(rows, tokens, ROWS)
        mask = live & in_head
        dy_row = DY + row_offsets(rows, dy_odd_sizes, dy_strides) + head * dy_step
        x_row = X + row_offsets(rows, x_odd_sizes, x_strides) + head * x_step
        dys = load_heads(dy_row + columns, dy_step, mask, HEADS)
        xs = load_heads(x_row + columns, x_step, mask, HEADS)
        if COS is not None:
            cos, sin = angles(turn, rows, live, R, INTERLEAVED, True, ACC, CHUNK)

        for h in tl.static_range(HEADS):
            dn = widened(dys[h], ACC)
            if COS is not None:
                dn = dn * cos + others(dn, dy_row + h * dy_step, live, R, INTERLEAVED, ACC) * sin
            rstd = load(RSTD + rows * H + (head + h), live)
            xhat = widened(xs[h], ACC) * rstd
            if DW is not None:
                dw += dn * rounded(xhat, DTYPE, ROUND)
            if DX is not None:
                g = dn * w
                c1 = mean_of(row_sum(g * xhat), N)
                dx = dx_of(g, xhat, rstd, c1, c1, False)
                tl.store(DX + (rows * H + (head + h)) * N + columns, dx.to(DX.dtype.element_ty), mask=mask)
    if DW is not None:
        store_column_sums(DW, first_program() * N, (dw,), N)


@triton.jit(do_not_specialize=["tokens"])
def heads_backward(
    DQ,
    DK,
    DQW,
    DKW,
    QDY,
    KDY,
    Q,
    K,
    QW,
    KW,
    Q_RSTD,
    K_RSTD,
    COS,
    SIN,
    tokens: tl.int64,
    qdy_odd_sizes,
    qdy_strides,
    kdy_odd_sizes,
    kdy_strides,
    q_odd_sizes,
    q_strides,
    k_odd_sizes,
    k_strides,
    cos_odd_sizes,
    cos_strides,
    Q_OF: tl.constexpr,
    K_OF: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Persistent programs walk the queries' tiles and then the keys'; DQW and DKW are ``[programs, N]`` partials. Of a side
    without a gradient, QDY or KDY is None.
    """
    wait_for_previous(PDL)
    turn = COS, SIN, cos_odd_sizes, cos_strides
    if QDY is not None:
        given = QDY, Q, QW, Q_RSTD, qdy_odd_sizes, qdy_strides, q_odd_sizes, q_strides
        walk_heads((DQ, DQW), given, turn, tokens, Q_OF, N, R, INTERLEAVED, OFFSET, ROUND, ACC, ROWS, CHUNK, STAGES)
    let_next_launch(PDL)
    if KDY is not None:
        given = KDY, K, KW, K_RSTD, kdy_odd_sizes, kdy_strides, k_odd_sizes, k_strides
        walk_heads((DK, DKW), given, turn, tokens, K_OF, N, R, INTERLEAVED, OFFSET, ROUND, ACC, ROWS, CHUNK, STAGES)
