"""PolyNorm: a polynomial of an element, each of whose powers is normalized over the row.

    n_k = x^k·r_k,   r_k = 1/√(mean(x^2k) + eps)   over the N elements of a row
    y = w0·n_3 + w1·n_2 + w2·n_1 + b

and backward, with a_k = Σ dy·n_k over the row and w_k the weight of n_k:

    dx = Σ_k k·x^(k-1)·r_k·w_k·(dy - n_k·a_k/N),   dw_k = Σ_rows a_k,   db = Σ dy

of which both sums are polynomials of x: dx = dy·P(x) - x·Q(x²), whose coefficients are a row's.
docs/mathematics.md derives them. fp32 has x⁶ of no x beyond 2e6, so all is of s = x·scale, whose scale is a power of two
that brings the row's largest element to 1..2, and changes no digit: n_k = s^k·r'_k with r'_k = 1/√(mean(s^2k) +
eps·scale^2k). The backward makes all of this again, of a row that it holds anyway. Its sums over rows are taken in a fixed
order, in fp32, with no atomics: each program makes partials, which partials.sum_partials adds up.
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
from .stats import mean_of, power_of_two_below, row_sum, row_sums


@triton.jit
def row_scale(xs, eps, ACC: tl.constexpr):
    """What the rows are multiplied by. eps has a say in it, so that eps·scale⁶ stays within the range. fp64 needs none."""
    if tl.float64 == ACC:
        return tl.full([xs[0].shape[0], 1], 1.0, ACC)
    else:
        largest = tl.zeros([xs[0].shape[0], xs[0].shape[1]], ACC)
        for i in tl.static_range(len(xs)):
            largest = tl.maximum(largest, tl.abs(widened(xs[i], ACC)))
        sixth_root = tl.exp(tl.log(eps) * (1.0 / 6.0))
        return 1.0 / power_of_two_below(tl.maximum(tl.max(largest, axis=1, keep_dims=True), sixth_root))


@triton.jit
def poly_stats(xs, eps, N: tl.constexpr, ACC: tl.constexpr):
    """(scale, r'_3, r'_2, r'_1), each ``[ROWS, 1]``, of rows held as chunks."""
    scale = row_scale(xs, eps, ACC)
    sum1 = tl.zeros([xs[0].shape[0], xs[0].shape[1]], ACC)
    sum2 = tl.zeros([xs[0].shape[0], xs[0].shape[1]], ACC)
    sum3 = tl.zeros([xs[0].shape[0], xs[0].shape[1]], ACC)
    for i in tl.static_range(len(xs)):
        s = widened(xs[i], ACC) * scale
        square = s * s
        sum1 += square
        sum2 += square * square
        sum3 += square * square * square
    total2, total3 = row_sums(sum2, sum3)
    # By one factor after the other: scale² alone may leave the range, beside an eps of 0 too.
    eps1 = eps * scale * scale
    eps2 = eps1 * scale * scale
    eps3 = eps2 * scale * scale
    r1 = rsqrt_rounded(mean_of(row_sum(sum1), N) + eps1)
    r2 = rsqrt_rounded(mean_of(total2, N) + eps2)
    r3 = rsqrt_rounded(mean_of(total3, N) + eps3)
    return scale, r3, r2, r1


@triton.jit
def load_weight(W, ACC: tl.constexpr):
    """(w0, w1, w2)."""
    return tl.load(W).to(ACC), tl.load(W + 1).to(ACC), tl.load(W + 2).to(ACC)


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
    w0, w1, w2 = load_weight(W, ACC)
    scale, r3, r2, r1 = poly_stats(xs, tl.full([1, 1], eps, ACC), N, ACC)
    for i in tl.static_range(len(xs)):
        columns = chunk_columns(i * CHUNK, CHUNK)
        s = widened(xs[i], ACC) * scale
        y = ((w0 * r3 * s + w1 * r2) * s + w2 * r1) * s
        if B is not None:
            y += tl.load(B).to(ACC)
        store_once(Y + rows * N + columns, y, live & columns_live(columns, (i + 1) * CHUNK, N), STREAM)


@triton.jit
def poly_sums(xs, dys, stats, ACC: tl.constexpr):
    """(a_3, a_2, a_1, Σ dy), each ``[ROWS, 1]``."""
    scale, r3, r2, r1 = stats
    sum3 = tl.zeros([xs[0].shape[0], xs[0].shape[1]], ACC)
    sum2 = tl.zeros([xs[0].shape[0], xs[0].shape[1]], ACC)
    sum1 = tl.zeros([xs[0].shape[0], xs[0].shape[1]], ACC)
    sum0 = tl.zeros([xs[0].shape[0], xs[0].shape[1]], ACC)
    for i in tl.static_range(len(xs)):
        s, dy = widened(xs[i], ACC) * scale, widened(dys[i], ACC)
        square = s * s
        sum3 += dy * (square * s)
        sum2 += dy * square
        sum1 += dy * s
        sum0 += dy
    a3, a2 = row_sums(sum3, sum2)
    a1, total = row_sums(sum1, sum0)
    return a3 * r3, a2 * r2, a1 * r1, total


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
    w0, w1, w2 = load_weight(W, ACC)
    dw0 = tl.zeros([ROWS, 1], ACC)
    dw1 = tl.zeros([ROWS, 1], ACC)
    dw2 = tl.zeros([ROWS, 1], ACC)
    db = tl.zeros([ROWS, 1], ACC)
    for tile in tl.range(first_program(), tl.cdiv(M, ROWS), program_count(), num_stages=STAGES):
        rows = tile_rows(tile, ROWS)
        live = rows_live(rows, M, ROWS)
        xs = load_row(X + row_offsets(rows, x_odd_sizes, x_strides), live, N, CHUNK, STREAM)
        dys = load_row(DY + row_offsets(rows, dy_odd_sizes, dy_strides), live, N, CHUNK, STREAM)
        stats = poly_stats(xs, tl.full([1, 1], eps, ACC), N, ACC)
        a3, a2, a1, total = poly_sums(xs, dys, stats, ACC)
        # A row that is not there is of zeros, which eps = 0 makes NaN of.
        dw0 += tl.where(live, a3, 0.0)
        dw1 += tl.where(live, a2, 0.0)
        dw2 += tl.where(live, a1, 0.0)
        db += total
        if DX is not None:
            scale, r3, r2, r1 = stats
            p3, p2, p1 = 3.0 * w0 * r3 * scale, 2.0 * w1 * r2 * scale, w2 * r1 * scale
            q3, q2, q1 = p3 * r3 * mean_of(a3, N), p2 * r2 * mean_of(a2, N), p1 * r1 * mean_of(a1, N)
            for i in tl.static_range(len(xs)):
                columns = chunk_columns(i * CHUNK, CHUNK)
                s, dy = widened(xs[i], ACC) * scale, widened(dys[i], ACC)
                square = s * s
                dx = dy * ((p3 * s + p2) * s + p1) - s * ((q3 * square + q2) * square + q1)
                store_once(DX + rows * N + columns, dx, live & columns_live(columns, (i + 1) * CHUNK, N), STREAM)
    let_next_launch(PDL)

    zero = tl.arange(0, 1)[None, :]
    if DW is not None:
        at = DW + first_program() * 3 + zero
        tl.store(at, column_sums(dw0).to(DW.dtype.element_ty))
        tl.store(at + 1, column_sums(dw1).to(DW.dtype.element_ty))
        tl.store(at + 2, column_sums(dw2).to(DW.dtype.element_ty))
    if DB is not None:
        tl.store(DB + first_program() + zero, column_sums(db).to(DB.dtype.element_ty))
