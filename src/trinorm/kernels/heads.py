"""QK-norm: RMSNorm of each query head and key head of a token, in one launch, and the rotary embedding behind it.

    n = x̂·(w + OFFSET),   x̂ = x·rstd,   rstd = (mean(x²) + eps)^-1/2   over the D elements of a head
    y[j] = n[j]·cos[j] ∓ n[p(j)]·sin[j],   - where j is the first of its pair, + where it is the second

p(j) is the other of the pair: of the first R elements j + R/2 for the first half and j - R/2 for the second; INTERLEAVED,
neighbours. From R on y = n.

A tile is ROWS tokens of one head, and a program has that of several heads, for which it reads weight, cos and sin once.
Offsets count elements; odd_sizes and strides describe a tensor's tokens (index.row_offsets), and the last of strides is the
heads'. QW, KW, COS, SIN and what nobody asks for may be None. With ROUND every step is rounded to y's dtype (LLaMA;
affine.py), and the rotation's too where cos has that dtype. The backward is heads_backward.py's.
"""

import triton
import triton.language as tl

from .affine import NO_WEIGHT, offset_by, rounded
from .index import (
    chunk_columns,
    columns_live,
    first_program,
    load,
    load_or,
    row_offsets,
    rows_live,
    tile_rows,
    widened,
    widened_anew,
)
from .overlap import let_next_launch, wait_for_previous
from .stats import held_moments, power_of_two_below, trusted


@triton.jit
def rsqrt_rounded(power):
    """power^-1/2, to about half a unit in the last place; tl.rsqrt's is two off in fp32, and of a head of few elements dx
    has all of that.
    """
    r = tl.rsqrt(power)
    if power.dtype == tl.float32:  # Newton's step
        product = power * r
        left = tl.fma(-product, r, tl.full(r.shape, 1.0, tl.float32)) - tl.fma(power, r, -product) * r
        r = tl.where(left == left, tl.fma(0.5 * r, left, r), r)  # not of 0 or infinity
    return r


@triton.jit
def head_rstd(x, eps, N: tl.constexpr, ACC: tl.constexpr, SCALED: tl.constexpr):
    """(rstd, whether fp32 held the squares) of the rows of a held tile. SCALED: of each over a power of two near its
    largest element, which is exact, and scaled back (stats.rescued_stats).
    """
    if SCALED:
        largest = tl.max(tl.abs(x), axis=1, keep_dims=True)
        scale = 1.0 / power_of_two_below(tl.maximum(largest, tl.sqrt(eps)))
        _, power = held_moments((x * scale,), N, False, ACC)
        return rsqrt_rounded(power + eps * scale * scale) * scale, power == power
    else:
        _, power = held_moments((x,), N, False, ACC)
        return rsqrt_rounded(power + eps), trusted(power + eps)


@triton.jit
def head_weight(W, columns, mask, OFFSET: tl.constexpr, ACC: tl.constexpr):
    """w + OFFSET of some columns; 1 where there is no weight."""
    w = widened(load_or(W, columns, mask, NO_WEIGHT, False), ACC)
    if W is None:
        return w
    else:
        return offset_by(w, OFFSET)


@triton.jit
def other_half(columns, R: tl.constexpr):
    """p of each column, of pairs that lie R/2 apart."""
    return tl.where(columns < R // 2, columns + R // 2, columns - R // 2)


@triton.jit
def swapped(x):
    """Every pair of neighbours the other way around. A thread has both."""
    first, second = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    return tl.reshape(tl.join(second, first), [x.shape[0], x.shape[1]])


@triton.jit
def others(x, pointers, live, R: tl.constexpr, INTERLEAVED: tl.constexpr, ACC: tl.constexpr):
    """What the partner of each column has, 0 from R on: x's neighbours, or those of the other half, read again, from L1.

    pointers: where x lies.
    """
    columns = chunk_columns(0, x.shape[1])
    mask = live & columns_live(columns, x.shape[1], R)
    if INTERLEAVED:
        return tl.where(mask, swapped(x), 0.0)
    else:
        return widened(load(pointers + other_half(columns, R), mask), ACC)


@triton.jit
def others_weight(w, W, columns, mask, R: tl.constexpr, INTERLEAVED: tl.constexpr, OFFSET: tl.constexpr, ACC: tl.constexpr):
    """head_weight of each column's partner."""
    if INTERLEAVED:
        return swapped(w)
    else:
        return head_weight(W, other_half(columns, R), mask & (columns < R), OFFSET, ACC)


@triton.jit
def angles(
    turn,
    rows,
    live,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BACK: tl.constexpr,
    ACC: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """(cos, sin with its sign) of some tokens, 1 and 0 from R on. BACK: of the rotation's transpose, where sin is the
    partner's. turn: (COS, SIN, odd_sizes, strides).
    """
    COS, SIN, odd_sizes, strides = turn
    columns = chunk_columns(0, CHUNK)
    mask = live & columns_live(columns, CHUNK, R)
    offsets = row_offsets(rows, odd_sizes, strides)
    cos = widened(tl.load(COS + offsets + columns, mask=mask, other=1.0), ACC)
    sin = widened(load(SIN + offsets + columns, mask), ACC)
    is_first = columns % 2 == 0 if INTERLEAVED else columns < R // 2
    if BACK:
        return cos, tl.where(is_first, 1.0, -1.0) * others(sin, SIN + offsets, live, R, INTERLEAVED, ACC)
    else:
        return cos, tl.where(is_first, -sin, sin)


@triton.jit
def rounded_apart(x, dtype: tl.constexpr, ROUND: tl.constexpr):
    """affine.rounded, of a product that is added to another: in fp16 the compiler would make one fma of both."""
    if ROUND:
        return widened_anew(x.to(dtype), x.dtype)
    else:
        return x


@triton.jit
def turned(xhat, other, w, w_other, cos, sin, dtype: tl.constexpr, ROUND: tl.constexpr, ROUND_TURN: tl.constexpr):
    """y of x̂ and its partners, which are weighted first. Without roundings what is multiplied with is every head's."""
    if ROUND:
        n, n_other = rounded(xhat * w, dtype, True), rounded(other * w_other, dtype, True)
        return rounded_apart(n * cos, dtype, ROUND_TURN) + rounded_apart(n_other * sin, dtype, ROUND_TURN)
    else:
        return xhat * (w * cos) + other * (w_other * sin)


@triton.jit
def load_heads(pointers, step, mask, HEADS: tl.constexpr):
    """The tiles of HEADS heads, ``step`` apart, as stored: all are asked for at once."""
    tiles = ()
    for h in tl.static_range(HEADS):
        tiles = tiles + (load(pointers + h * step, mask),)
    return tiles


@triton.jit
def normalize_head(
    outs,
    x,
    pointers,
    rows,
    by,
    live,
    mask,
    eps,
    N: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROUND: tl.constexpr,
    ROUND_TURN: tl.constexpr,
    ACC: tl.constexpr,
    SCALED: tl.constexpr,
):
    """y and rstd of one head of a tile's tokens, stored as the ``rows``-th; returns where rstd is right, as head_rstd.
    pointers: where x lies; by: (w, its partners', cos, sin).
    """
    Y, RSTD = outs
    w, w_other, cos, sin = by
    DTYPE: tl.constexpr = Y.dtype.element_ty
    x = widened(x, ACC)
    rstd, good = head_rstd(x, tl.full([1, 1], eps, ACC), N, ACC, SCALED)
    if RSTD is not None:
        tl.store(RSTD + rows, rstd, mask=live)
    xhat = rounded(x * rstd, DTYPE, ROUND)
    if R == 0:
        y = xhat * w
    else:
        other = rounded(others(x, pointers, live, R, INTERLEAVED, ACC) * rstd, DTYPE, ROUND)
        y = turned(xhat, other, w, w_other, cos, sin, DTYPE, ROUND, ROUND_TURN)
    tl.store(Y + rows * N + chunk_columns(0, x.shape[1]), y.to(DTYPE), mask=mask)
    return good


@triton.jit
def normalize_heads(
    outs,
    given,
    turn,
    program,
    tokens,
    eps,
    OF: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND: tl.constexpr,
    ACC: tl.constexpr,
    RESCUE: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """y and rstd of some heads of ROWS tokens. outs: (Y, RSTD); given: (X, W, odd_sizes, strides); turn: as angles'.

    Where fp32 does not hold a square all is done again, of rows that are scaled: apart, so that one comparison is paid.
    """
    X, W, odd_sizes, strides = given
    COS, _, _, _ = turn
    H: tl.constexpr = OF[0]
    HEADS: tl.constexpr = OF[1]
    rows = tile_rows(program // (H // HEADS), ROWS)
    head = program % (H // HEADS) * HEADS
    live = rows_live(rows, tokens, ROWS)
    columns = chunk_columns(0, CHUNK)
    mask = live & columns_live(columns, CHUNK, N)
    step = strides[len(odd_sizes) + 1]
    x_row = X + row_offsets(rows, odd_sizes, strides) + head * step
    xs = load_heads(x_row + columns, step, mask, HEADS)
    w = head_weight(W, columns, mask, OFFSET, ACC)
    if COS is None:
        ROUND_TURN: tl.constexpr = False
        by = w, w, w, w
    else:
        ROUND_TURN: tl.constexpr = ROUND and COS.dtype.element_ty == outs[0].dtype.element_ty
        cos, sin = angles(turn, rows, live, R, INTERLEAVED, False, ACC, CHUNK)
        by = w, w if W is None else others_weight(w, W, columns, mask, R, INTERLEAVED, OFFSET, ACC), cos, sin

    good = tl.full([ROWS, 1], True, tl.int1)
    first = rows * H + head
    for h in tl.static_range(HEADS):
        pointers = x_row + h * step
        good &= normalize_head(
            outs, xs[h], pointers, first + h, by, live, mask, eps, N, R, INTERLEAVED, ROUND, ROUND_TURN, ACC, False
        )
    if RESCUE:
        if tl.min((good | ~live).to(tl.int32)) == 0:
            tl.debug_barrier()  # other threads may have stored what is stored anew
            for i in tl.range(0, HEADS):
                pointers = x_row + i * step
                x = load(pointers + columns, mask)
                normalize_head(
                    outs, x, pointers, first + i, by, live, mask, eps, N, R, INTERLEAVED, ROUND, ROUND_TURN, ACC, True
                )


@triton.jit(do_not_specialize=["tokens"])
def heads_forward(
    QY,
    KY,
    Q_RSTD,
    K_RSTD,
    Q,
    K,
    QW,
    KW,
    COS,
    SIN,
    tokens: tl.int64,
    q_odd_sizes,
    q_strides,
    k_odd_sizes,
    k_strides,
    cos_odd_sizes,
    cos_strides,
    eps: tl.float64,
    Q_OF: tl.constexpr,
    K_OF: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND: tl.constexpr,
    ACC: tl.constexpr,
    RESCUE: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Q_OF, K_OF: (how many heads there are, how many of them a program has)."""
    wait_for_previous(PDL)
    let_next_launch(PDL)
    program = first_program()
    turn = COS, SIN, cos_odd_sizes, cos_strides
    of_queries = tl.cdiv(tokens, ROWS) * (Q_OF[0] // Q_OF[1])
    if program < of_queries:
        query = Q, QW, q_odd_sizes, q_strides
        normalize_heads(
            (QY, Q_RSTD),
            query,
            turn,
            program,
            tokens,
            eps,
            Q_OF,
            N,
            R,
            INTERLEAVED,
            OFFSET,
            ROUND,
            ACC,
            RESCUE,
            ROWS,
            CHUNK,
        )
    else:
        key, program = (K, KW, k_odd_sizes, k_strides), program - of_queries
        normalize_heads(
            (KY, K_RSTD), key, turn, program, tokens, eps, K_OF, N, R, INTERLEAVED, OFFSET, ROUND, ACC, RESCUE, ROWS, CHUNK
        )
