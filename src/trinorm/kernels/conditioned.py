"""Conditioned norms, forward: LayerNorm or RMSNorm of rows that have parameters of their own, and a gate a(z).

    s = x,  or, with GATE_FIRST, x·a(z)
    n = x̂·(w + OFFSET) + b,   x̂ = (s - mean)·rstd   over the N elements of a row
    y = n,  or, with a gate that is not first, n·a(z)

Without CENTER rstd = (Σ s²/D + eps)^-1/2, of the first K of a row's elements: RMSNorm has K = D = N, the L2 norm D = 1,
partial RMSNorm K = D < N.

w and b are chosen by the row, as x and z are: odd_sizes and strides describe each over x's rows (index.row_offsets), with
strides of 0 where it is broadcast. Z, W, B, MEAN and RSTD may be None. GATE is a of activation.py. With ROUND x̂ is rounded
to y's dtype first, and with ROUND_N n is before the gate (LLaMA; affine.py). STREAM: as row.py's. The backward is
conditioned_backward.py's.
"""

import triton
import triton.language as tl

from .activation import gate_of
from .affine import NO_BIAS, NO_WEIGHT, affine, rounded
from .heads import rsqrt_rounded
from .index import (
    chunk_columns,
    chunks_of,
    columns_live,
    first_program,
    load_row,
    load_row_or,
    row_offsets,
    rows_live,
    store_once,
    tile_rows,
    widened,
)
from .overlap import let_next_launch, wait_for_previous
from .row import store_stats
from .stats import held_moments, mean_of, power_of_two_below, row_sum, trusted


@triton.jit
def load_rows(POINTER, offsets, live, N: tl.constexpr, CHUNK: tl.constexpr, STREAM: tl.constexpr):
    """The rows that begin at ``offsets``, as index.load_row; nothing where POINTER is None."""
    if POINTER is None:
        return ()
    else:
        return load_row(POINTER + offsets, live, N, CHUNK, STREAM)


@triton.jit
def load_rows_or(POINTER, offsets, live, N: tl.constexpr, CHUNK: tl.constexpr, absent: tl.constexpr):
    """The same as index.load_row_or: constants where POINTER is None."""
    if POINTER is None:
        return load_row_or(POINTER, live, N, CHUNK, absent)
    else:
        return load_row_or(POINTER + offsets, live, N, CHUNK, absent)


@triton.jit
def gated(xs, zs, GATE: tl.constexpr, ACC: tl.constexpr):
    """x·a(z), chunk by chunk, in the accumulator's dtype; without GATE x as it is stored.

    By an fma: a product could become part of one with what is subtracted next, unrounded, and s would differ from the s
    that the mean was taken of (LayerNorm of one element: s - mean, which is 0, came out as what rounding s had left).
    """
    if GATE is None:
        return xs
    else:
        chunks = ()
        for i in tl.static_range(len(xs)):
            chunks = chunks + (
                tl.fma(widened(xs[i], ACC), gate_of(widened(zs[i], ACC), GATE), tl.zeros_like(xs[i].to(ACC))),
            )
        return chunks


@triton.jit
def counted(x, start: tl.constexpr, N: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr):
    """The chunk of a row from column ``start`` on, in the accumulator's dtype; 0 behind the first K columns."""
    if K == N or start + x.shape[1] <= K:
        return widened(x, ACC)
    else:
        return tl.where(chunk_columns(start, x.shape[1]) < K, widened(x, ACC), 0.0)


@triton.jit
def moments(xs, N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, CENTER: tl.constexpr, ACC: tl.constexpr):
    """(mean, power) of rows held as chunks: held_moments', or, without CENTER, 0 and the squares of K columns over D."""
    if K == N and D == N:
        return held_moments(xs, N, CENTER, ACC)
    else:
        CHUNK: tl.constexpr = xs[0].shape[1]
        squares = tl.zeros([xs[0].shape[0], CHUNK], ACC)
        for i in tl.static_range(chunks_of(K, CHUNK)):
            x = counted(xs[i], i * CHUNK, N, K, ACC)
            squares += x * x
        return tl.zeros([xs[0].shape[0], 1], ACC), mean_of(row_sum(squares), D)


@triton.jit
def rstd_of_scaled(power, eps, scale):
    """rstd of a row from the power of the row times ``scale``."""
    # Where nothing deviates eps alone is left, and its share of the scaled sum may be below fp32.
    return tl.where(power == 0.0, rsqrt_rounded(eps), rsqrt_rounded(power + eps * scale * scale) * scale)


@triton.jit
def held_stats(
    xs,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    CENTER: tl.constexpr,
    ACC: tl.constexpr,
    SCALED: tl.constexpr,
):
    """(mean, rstd, where fp32 held the squares) of rows held as chunks. SCALED: of each over a power of two near its
    largest element, of those that count, which is exact, and scaled back (stats.rescued_stats).
    """
    if SCALED:
        CHUNK: tl.constexpr = xs[0].shape[1]
        largest = tl.zeros([xs[0].shape[0], CHUNK], ACC)
        for i in tl.static_range(chunks_of(K, CHUNK)):
            largest = tl.maximum(largest, tl.abs(counted(xs[i], i * CHUNK, N, K, ACC)))
        unit = power_of_two_below(tl.maximum(tl.max(largest, axis=1, keep_dims=True), tl.sqrt(eps)))
        scale = 1.0 / unit
        scaled = ()
        for i in tl.static_range(len(xs)):
            scaled = scaled + (widened(xs[i], ACC) * scale,)
        mean, power = moments(scaled, N, K, D, CENTER, ACC)
        rstd = rstd_of_scaled(power, eps, scale)
        return mean * unit, rstd, tl.full(rstd.shape, True, tl.int1)
    else:
        mean, power = moments(xs, N, K, D, CENTER, ACC)
        return mean, rsqrt_rounded(power + eps), trusted(power + eps)


@triton.jit
def weighted(xhat, w, b, dtype: tl.constexpr, OFFSET: tl.constexpr, ROUND: tl.constexpr, ROUND_N: tl.constexpr):
    """n of x̂, each rounded to ``dtype`` or not."""
    return rounded(affine(rounded(xhat, dtype, ROUND), w, b, OFFSET), dtype, ROUND_N)


@triton.jit
def normalize_held(
    outs,
    held,
    rows,
    live,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    CENTER: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND: tl.constexpr,
    ROUND_N: tl.constexpr,
    GATE: tl.constexpr,
    ACC: tl.constexpr,
    RESCUE: tl.constexpr,
    STREAM: tl.constexpr,
    SCALED: tl.constexpr,
):
    """y and the statistics of the ``live`` rows of a tile, stored where fp32 held the squares; returns where it did. outs:
    (Y, MEAN, RSTD); held: (s, z, w, b), each as chunks. GATE: what y is multiplied by.
    """
    Y, MEAN, RSTD = outs
    ss, zs, ws, bs = held
    CHUNK: tl.constexpr = ss[0].shape[1]
    mean, rstd, good = held_stats(ss, eps, N, K, D, CENTER, ACC, SCALED)
    if not RESCUE:
        good = rows >= 0
    store_stats(MEAN, RSTD, rows, mean, rstd, live & good, CENTER)
    for i in tl.static_range(len(ss)):
        columns = chunk_columns(i * CHUNK, CHUNK)
        mask = live & good & columns_live(columns, (i + 1) * CHUNK, N)
        xhat = (widened(ss[i], ACC) - mean) * rstd
        y = weighted(xhat, ws[i], bs[i], Y.dtype.element_ty, OFFSET, ROUND, ROUND_N)
        if GATE is not None:
            y *= gate_of(widened(zs[i], ACC), GATE)
        store_once(Y + rows * N + columns, y, mask, STREAM)
    return good


@triton.jit
def normalize_tile(
    outs,
    given,
    offsets,
    rows,
    live,
    eps,
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
    RESCUE: tl.constexpr,
    CHUNK: tl.constexpr,
    STREAM: tl.constexpr,
    SCALED: tl.constexpr,
):
    """normalize_held of rows in memory. given: (X, Z, W, B); offsets: where the rows of each begin."""
    X, Z, W, B = given
    of_x, of_z, of_w, of_b = offsets
    xs = load_rows(X, of_x, live, N, CHUNK, STREAM)
    zs = load_rows(Z, of_z, live, N, CHUNK, STREAM)
    ws = load_rows_or(W, of_w, live, N, CHUNK, NO_WEIGHT)
    bs = load_rows_or(B, of_b, live, N, CHUNK, NO_BIAS)
    ss = gated(xs, zs, GATE if GATE_FIRST else None, ACC)
    behind: tl.constexpr = None if GATE_FIRST else GATE
    held = ss, zs, ws, bs
    return normalize_held(
        outs,
        held,
        rows,
        live,
        eps,
        N,
        K,
        D,
        CENTER,
        OFFSET,
        ROUND,
        ROUND_N,
        behind,
        ACC,
        RESCUE,
        STREAM,
        SCALED,
    )


@triton.jit(do_not_specialize=["M"])
def conditioned_forward(
    Y,
    MEAN,
    RSTD,
    X,
    Z,
    W,
    B,
    M: tl.int64,
    x_odd_sizes,
    x_strides,
    z_odd_sizes,
    z_strides,
    w_odd_sizes,
    w_strides,
    b_odd_sizes,
    b_strides,
    eps: tl.float64,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    CENTER: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND: tl.constexpr,
    ROUND_N: tl.constexpr,
    GATE: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    ALIKE: tl.constexpr,
    ACC: tl.constexpr,
    RESCUE: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STREAM: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile of ROWS rows, each read once and held. ALIKE: b's rows lie as w's, as chunks of one projection do. Those whose
    squares fp32 did not hold are done again, scaled, from
    memory: apart, so that the others pay one comparison.
    """
    wait_for_previous(PDL)
    let_next_launch(PDL)
    eps = tl.full([1, 1], eps, ACC)
    rows = tile_rows(first_program(), ROWS)
    live = rows_live(rows, M, ROWS)
    outs, given = (Y, MEAN, RSTD), (X, Z, W, B)
    of_w = row_offsets(rows, w_odd_sizes, w_strides)
    offsets = (
        row_offsets(rows, x_odd_sizes, x_strides),
        row_offsets(rows, z_odd_sizes, z_strides),
        of_w,
        of_w if ALIKE else row_offsets(rows, b_odd_sizes, b_strides),
    )
    good = normalize_tile(
        outs,
        given,
        offsets,
        rows,
        live,
        eps,
        N,
        K,
        D,
        CENTER,
        OFFSET,
        ROUND,
        ROUND_N,
        GATE,
        GATE_FIRST,
        ACC,
        RESCUE,
        CHUNK,
        STREAM,
        False,
    )
    if RESCUE:
        bad = live & (good == 0)
        if tl.max(bad.to(tl.int32)) == 1:
            normalize_tile(
                outs,
                given,
                offsets,
                rows,
                bad,
                eps,
                N,
                K,
                D,
                CENTER,
                OFFSET,
                ROUND,
                ROUND_N,
                GATE,
                GATE_FIRST,
                ACC,
                RESCUE,
                CHUNK,
                STREAM,
                True,
            )
