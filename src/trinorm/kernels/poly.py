"""PolyNorm: a polynomial of an element, each of whose powers is normalized over the row.

    n_k = x^k·r_k,   r_k = 1/√(mean(x^2k) + eps)   over the N elements of a row
    y = w0·n_3 + w1·n_2 + w2·n_1 + b

and backward, with a_k = Σ dy·n_k over the row and w_k the weight of n_k:

    dx = Σ_k k·x^(k-1)·r_k·w_k·(dy - n_k·a_k/N),   dw_k = Σ_rows a_k,   db = Σ dy

of which both sums are polynomials of x: dx = dy·P(x) - x·Q(x²), whose coefficients are a row's.
docs/mathematics.md derives them. fp32 has x⁶ of no x beyond 2e6. Rows beyond that, and rows so small that their powers are
lost, are done again (RESCUE), of s = x·scale, whose scale is a power of two that brings the row's largest element to 1..2,
and changes no digit: n_k = s^k·r'_k with r'_k = 1/√(mean(s^2k) + eps·scale^2k). Of other rows s is x. The backward makes
all of this again, of a row that it holds anyway. Its sums over rows are taken in a fixed order, in fp32, with no atomics:
each program makes partials, which partials.sum_columns_and_numbers adds up.
"""

import triton
import triton.language as tl

from .heads import rsqrt_rounded
from .index import (
    chunk_columns,
    columns_live,
    first_program,
    load_row,
    program_count,
    row_offsets,
    rows_live,
    store_once,
    tile_rows,
    widened,
)
from .overlap import let_next_launch, wait_for_previous
from .row_backward import column_sums
from .stats import mean_of, power_of_two_below

# Where the mean of sixth powers, with eps, is within these, no power and no product of the backward leaves fp32's range.
_TRUSTED_MIN: tl.constexpr = tl.constexpr(1e-30)
_TRUSTED_MAX: tl.constexpr = tl.constexpr(1e30)


@triton.jit
def row_scale(xs, eps, ACC: tl.constexpr):
    """What the rows are multiplied by. eps has a say in it, so that eps·scale⁶ stays within the range."""
    largest = tl.zeros([xs[0].shape[0], xs[0].shape[1]], ACC)
    for i in tl.static_range(len(xs)):
        largest = tl.maximum(largest, tl.abs(widened(xs[i], ACC)))
    sixth_root = tl.exp(tl.log(eps) * (1.0 / 6.0))
    return 1.0 / power_of_two_below(tl.maximum(tl.max(largest, axis=1, keep_dims=True), sixth_root))


@triton.jit
def scaled_element(x, scale, ACC: tl.constexpr):
    """s. A scale of None is 1."""
    if scale is None:
        return widened(x, ACC)
    else:
        return widened(x, ACC) * scale


@triton.jit
def power_sums(xs, scale, ACC: tl.constexpr):
    """(Σ s², Σ s⁴, Σ s⁶), each lane's columns'."""
    sum1 = tl.zeros([xs[0].shape[0], xs[0].shape[1]], ACC)
    sum2 = tl.zeros([xs[0].shape[0], xs[0].shape[1]], ACC)
    sum3 = tl.zeros([xs[0].shape[0], xs[0].shape[1]], ACC)
    for i in tl.static_range(len(xs)):
        s = scaled_element(xs[i], scale, ACC)
        square = s * s
        cube = square * s
        sum1 += square
        sum2 += square * square
        sum3 += cube * cube
    return sum1, sum2, sum3


@triton.jit
def power_and_gradient_sums(xs, dys, scale, ACC: tl.constexpr):
    """(Σ s², Σ s⁴, Σ s⁶), (Σ dy·s³, Σ dy·s², Σ dy·s, Σ dy), each lane's columns'."""
    ROWS: tl.constexpr = xs[0].shape[0]
    CHUNK: tl.constexpr = xs[0].shape[1]
    sum1, sum2, sum3 = tl.zeros([ROWS, CHUNK], ACC), tl.zeros([ROWS, CHUNK], ACC), tl.zeros([ROWS, CHUNK], ACC)
    dy0, dy1 = tl.zeros([ROWS, CHUNK], ACC), tl.zeros([ROWS, CHUNK], ACC)
    dy2, dy3 = tl.zeros([ROWS, CHUNK], ACC), tl.zeros([ROWS, CHUNK], ACC)
    for i in tl.static_range(len(xs)):
        s, dy = scaled_element(xs[i], scale, ACC), widened(dys[i], ACC)
        square = s * s
        cube = square * s
        sum1 += square
        sum2 += square * square
        sum3 += cube * cube
        dy0 += dy
        dy1 += dy * s
        dy2 += dy * square
        dy3 += dy * cube
    return (sum1, sum2, sum3), (dy3, dy2, dy1, dy0)


@triton.jit
def joined(a, b, c, d):
    """Four as one, to be summed in one exchange between warps."""
    return tl.join(tl.join(a, b), tl.join(c, d))


@triton.jit
def parted(abcd):
    """What was joined."""
    ab, cd = tl.split(abcd)
    a, b = tl.split(ab)
    c, d = tl.split(cd)
    return a, b, c, d


@triton.jit
def reciprocal_roots(total1, total2, total3, eps, scale, N: tl.constexpr):
    """(r'_3, r'_2, r'_1, whether fp32 held the powers) of the rows' sums of powers."""
    eps1, eps2, eps3 = eps, eps, eps
    if scale is not None:
        # By one factor after the other: scale² alone may leave the range, beside an eps of 0 too.
        eps1 = eps * scale * scale
        eps2 = eps1 * scale * scale
        eps3 = eps2 * scale * scale
    power = mean_of(total3, N) + eps3
    r1, r2 = rsqrt_rounded(mean_of(total1, N) + eps1), rsqrt_rounded(mean_of(total2, N) + eps2)
    return rsqrt_rounded(power), r2, r1, (power >= _TRUSTED_MIN) & (power <= _TRUSTED_MAX)


@triton.jit
def poly_stats(xs, scale, eps, N: tl.constexpr, ACC: tl.constexpr):
    """(r'_3, r'_2, r'_1, whether fp32 held the powers), each ``[ROWS, 1]``, of rows held as chunks."""
    sum1, sum2, sum3 = power_sums(xs, scale, ACC)
    sums = tl.sum(joined(sum1, sum2, sum3, sum3), axis=1, keep_dims=True)
    total1, total2, total3, _ = parted(sums)
    return reciprocal_roots(total1, total2, total3, eps, scale, N)


@triton.jit
def poly_stats_and_sums(xs, dys, scale, eps, N: tl.constexpr, ACC: tl.constexpr):
    """The same, and (a_3, a_2, a_1, Σ dy): one exchange between warps for all."""
    of_x, of_dy = power_and_gradient_sums(xs, dys, scale, ACC)
    sums = tl.sum(tl.join(joined(*of_x, of_x[2]), joined(*of_dy)), axis=1, keep_dims=True)
    powers, gradients = tl.split(sums)
    total1, total2, total3, _ = parted(powers)
    a3, a2, a1, total = parted(gradients)
    r3, r2, r1, held = reciprocal_roots(total1, total2, total3, eps, scale, N)
    return (r3, r2, r1, held), (a3 * r3, a2 * r2, a1 * r1, total)


@triton.jit
def load_weight(W, ACC: tl.constexpr):
    """(w0, w1, w2)."""
    return tl.load(W).to(ACC), tl.load(W + 1).to(ACC), tl.load(W + 2).to(ACC)


@triton.jit
def store_polynomial(Y, xs, scale, stats, weight, b, rows, live, N: tl.constexpr, ACC: tl.constexpr, STREAM: tl.constexpr):
    """y of the rows that are live."""
    r3, r2, r1, _ = stats
    w0, w1, w2 = weight
    c3, c2, c1 = w0 * r3, w1 * r2, w2 * r1
    CHUNK: tl.constexpr = xs[0].shape[1]
    for i in tl.static_range(len(xs)):
        columns = chunk_columns(i * CHUNK, CHUNK)
        s = scaled_element(xs[i], scale, ACC)
        y = ((c3 * s + c2) * s + c1) * s
        if b is not None:
            y += b
        store_once(Y + rows * N + columns, y, live & columns_live(columns, (i + 1) * CHUNK, N), STREAM)


@triton.jit(do_not_specialize=["M"])
def poly_forward(
    Y,
    X,
    W,
    B,
    M: tl.int64,
    x_odd_sizes,
    x_strides,
    eps: tl.float64,
    N: tl.constexpr,
    ACC: tl.constexpr,
    RESCUE: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STREAM: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile of ROWS rows, each read once and held."""
    wait_for_previous(PDL)
    let_next_launch(PDL)
    rows = tile_rows(first_program(), ROWS)
    live = rows_live(rows, M, ROWS)
    xs = load_row(X + row_offsets(rows, x_odd_sizes, x_strides), live, N, CHUNK, STREAM)
    weight = load_weight(W, ACC)
    b = None if B is None else tl.load(B).to(ACC)
    eps = tl.full([1, 1], eps, ACC)
    stats = poly_stats(xs, None, eps, N, ACC)
    held = live & stats[3] if RESCUE else live
    store_polynomial(Y, xs, None, stats, weight, b, rows, held, N, ACC, STREAM)
    if RESCUE:
        lost = live & (stats[3] == 0)
        if tl.max(lost.to(tl.int32)) == 1:
            scale = row_scale(xs, eps, ACC)
            stats = poly_stats(xs, scale, eps, N, ACC)
            store_polynomial(Y, xs, scale, stats, weight, b, rows, lost, N, ACC, STREAM)


@triton.jit
def store_poly_dx(
    DX, xs, dys, scale, stats, sums, weight, rows, live, N: tl.constexpr, ACC: tl.constexpr, STREAM: tl.constexpr
):
    """dx of the rows that are live."""
    r3, r2, r1, _ = stats
    a3, a2, a1, _ = sums
    w0, w1, w2 = weight
    p3, p2, p1 = 3.0 * w0 * r3, 2.0 * w1 * r2, w2 * r1
    if scale is not None:
        p3, p2, p1 = p3 * scale, p2 * scale, p1 * scale
    q3, q2, q1 = p3 * r3 * mean_of(a3, N), p2 * r2 * mean_of(a2, N), p1 * r1 * mean_of(a1, N)
    CHUNK: tl.constexpr = xs[0].shape[1]
    for i in tl.static_range(len(xs)):
        columns = chunk_columns(i * CHUNK, CHUNK)
        s, dy = scaled_element(xs[i], scale, ACC), widened(dys[i], ACC)
        square = s * s
        dx = dy * ((p3 * s + p2) * s + p1) - s * ((q3 * square + q2) * square + q1)
        store_once(DX + rows * N + columns, dx, live & columns_live(columns, (i + 1) * CHUNK, N), STREAM)


@triton.jit
def add_row_sums(totals, sums, live):
    """dw and db of each row of a tile with those of the rows that are live. Others may be NaN."""
    dw0, dw1, dw2, db = totals
    a3, a2, a1, total = sums
    dw0 += tl.where(live, a3, 0.0)
    dw1 += tl.where(live, a2, 0.0)
    dw2 += tl.where(live, a1, 0.0)
    db += tl.where(live, total, 0.0)
    return dw0, dw1, dw2, db


@triton.jit(do_not_specialize=["M"])
def poly_backward(
    DX,
    DW,
    DB,
    DY,
    X,
    W,
    M: tl.int64,
    dy_odd_sizes,
    dy_strides,
    x_odd_sizes,
    x_strides,
    eps: tl.float64,
    N: tl.constexpr,
    ACC: tl.constexpr,
    RESCUE: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    STREAM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Persistent programs walk tiles of ROWS rows; DW is ``[programs, 3]`` partials, DB one number of each program. DX, DW
    and DB may be None: only what is asked for is computed.
    """
    wait_for_previous(PDL)
    weight = load_weight(W, ACC)
    eps = tl.full([1, 1], eps, ACC)
    zeros = tl.zeros([ROWS, 1], ACC)
    totals = (zeros, zeros, zeros, zeros)
    for tile in tl.range(first_program(), tl.cdiv(M, ROWS), program_count(), num_stages=STAGES):
        rows = tile_rows(tile, ROWS)
        live = rows_live(rows, M, ROWS)
        xs = load_row(X + row_offsets(rows, x_odd_sizes, x_strides), live, N, CHUNK, STREAM)
        dys = load_row(DY + row_offsets(rows, dy_odd_sizes, dy_strides), live, N, CHUNK, STREAM)
        stats, sums = poly_stats_and_sums(xs, dys, None, eps, N, ACC)
        held = live & stats[3] if RESCUE else live
        totals = add_row_sums(totals, sums, held)
        if DX is not None:
            store_poly_dx(DX, xs, dys, None, stats, sums, weight, rows, held, N, ACC, STREAM)
        if RESCUE:
            lost = live & (stats[3] == 0)
            if tl.max(lost.to(tl.int32)) == 1:
                scale = row_scale(xs, eps, ACC)
                stats, sums = poly_stats_and_sums(xs, dys, scale, eps, N, ACC)
                totals = add_row_sums(totals, sums, lost)
                if DX is not None:
                    store_poly_dx(DX, xs, dys, scale, stats, sums, weight, rows, lost, N, ACC, STREAM)
    let_next_launch(PDL)

    dw0, dw1, dw2, db = totals
    zero = tl.arange(0, 1)[None, :]
    if DW is not None:
        at = DW + first_program() * 3 + zero
        tl.store(at, column_sums(dw0).to(DW.dtype.element_ty))
        tl.store(at + 1, column_sums(dw1).to(DW.dtype.element_ty))
        tl.store(at + 2, column_sums(dw2).to(DW.dtype.element_ty))
    if DB is not None:
        tl.store(DB + first_program() + zero, column_sums(db).to(DB.dtype.element_ty))
