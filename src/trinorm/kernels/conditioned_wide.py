"""Conditioned norms of rows that no program holds, forward, in conditioned.py's names: a row is read twice, chunk by chunk,
for its statistics and for y. A chunk is loaded as the short kernels load a row: as one of CHUNK columns.
"""

import triton
import triton.language as tl

from .activation import gate_of
from .affine import NO_BIAS, NO_WEIGHT
from .conditioned import gated, load_rows, load_rows_or, rstd_of_scaled, weighted
from .heads import rsqrt_rounded
from .index import (
    chunk_columns,
    columns_live,
    first_program,
    rounded_up,
    row_offsets,
    rows_live,
    store_once,
    tile_rows,
    widened,
)
from .overlap import let_next_launch, wait_for_previous
from .row import store_stats
from .stats import add_to_moments, columns_of_lanes, mean_of, merged_lanes, power_of_two_below, row_sum, trusted


@triton.jit
def load_s(X, Z, offsets, start, END: tl.constexpr, GATE: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr):
    """(s of the chunk of a row from column ``start`` on, which of its columns are before END). Others are 0. offsets: where
    the row begins in x and z.
    """
    of_x, of_z = offsets
    live = columns_live(chunk_columns(start, CHUNK), rounded_up(END, CHUNK), END)
    xs = load_rows(X, of_x + start, live, CHUNK, CHUNK, False)
    zs = load_rows(None if GATE is None else Z, of_z + start, live, CHUNK, CHUNK, False)
    (s,) = gated(xs, zs, GATE, ACC)
    return widened(s, ACC), live


@triton.jit
def walked_mean(X, Z, offsets, scale, N: tl.constexpr, GATE: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr):
    """The mean of ``scale * s`` of a row: a plain sum, infinite where s is."""
    total = tl.zeros([1, CHUNK], ACC)
    for start in tl.range(0, N, CHUNK):
        s, _ = load_s(X, Z, offsets, start, N, GATE, ACC, CHUNK)
        total += s * scale
    return mean_of(row_sum(total), N)


@triton.jit
def walked_moments(
    X,
    Z,
    offsets,
    scale,
    K: tl.constexpr,
    D: tl.constexpr,
    CENTER: tl.constexpr,
    GATE: tl.constexpr,
    ACC: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """(mean, power) of the first K of ``scale * s`` of a row: each lane's, which Chan's rule merges."""
    mean = tl.zeros([1, CHUNK], ACC)
    squares = tl.zeros([1, CHUNK], ACC)
    step = tl.zeros([1, 1], ACC)
    for start in tl.range(0, K, CHUNK):
        s, live = load_s(X, Z, offsets, start, K, GATE, ACC, CHUNK)
        mean, squares, step = add_to_moments(mean, squares, step, s * scale, live, CENTER)
    return merged_lanes(mean, squares, columns_of_lanes(step, K, CHUNK), D, CENTER)


@triton.jit
def walked_stats(
    X,
    Z,
    offsets,
    eps,
    K: tl.constexpr,
    D: tl.constexpr,
    CENTER: tl.constexpr,
    GATE: tl.constexpr,
    ACC: tl.constexpr,
    CHUNK: tl.constexpr,
    SCALED: tl.constexpr,
):
    """held_stats of a row that is read chunk by chunk; SCALED, twice. GATE: that of s."""
    scale = 1.0
    if SCALED:
        largest = tl.zeros([1, CHUNK], ACC)
        for start in tl.range(0, K, CHUNK):
            s, _ = load_s(X, Z, offsets, start, K, GATE, ACC, CHUNK)
            largest = tl.maximum(largest, tl.abs(s))
        unit = power_of_two_below(tl.maximum(tl.max(largest, axis=1, keep_dims=True), tl.sqrt(eps)))
        scale = 1.0 / unit
    mean, power = walked_moments(X, Z, offsets, scale, K, D, CENTER, GATE, ACC, CHUNK)
    if CENTER and (SCALED or tl.float64 == ACC):
        # The recurrence makes NaN of Inf.
        if tl.max((mean != mean).to(tl.int32)) == 1:
            mean = walked_mean(X, Z, offsets, scale, K, GATE, ACC, CHUNK)
    if SCALED:
        return mean * unit, rstd_of_scaled(power, eps, scale), tl.full(power.shape, True, tl.int1)
    else:
        return mean, rsqrt_rounded(power + eps), trusted(power + eps)


@triton.jit
def conditioned_forward_wide(
    Y,
    MEAN,
    RSTD,
    X,
    Z,
    W,
    B,
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
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row a program. ALIKE: as conditioned_forward's. A row whose squares fp32 does not hold has its statistics taken
    again.
    """
    wait_for_previous(PDL)
    let_next_launch(PDL)
    eps = tl.full([1, 1], eps, ACC)
    row = tile_rows(first_program(), 1)
    of_x = row_offsets(row, x_odd_sizes, x_strides)
    of_z = row_offsets(row, z_odd_sizes, z_strides)
    of_w = row_offsets(row, w_odd_sizes, w_strides)
    of_b = of_w if ALIKE else row_offsets(row, b_odd_sizes, b_strides)
    OF_S: tl.constexpr = GATE if GATE_FIRST else None
    mean, rstd, good = walked_stats(X, Z, (of_x, of_z), eps, K, D, CENTER, OF_S, ACC, CHUNK, False)
    if RESCUE:
        if tl.min(good.to(tl.int32)) == 0:
            mean, rstd, _ = walked_stats(X, Z, (of_x, of_z), eps, K, D, CENTER, OF_S, ACC, CHUNK, True)
    store_stats(MEAN, RSTD, row, mean, rstd, rows_live(row, 0, 1), CENTER)
    for start in tl.range(0, N, CHUNK):
        columns = chunk_columns(start, CHUNK)
        live = columns_live(columns, rounded_up(N, CHUNK), N)
        xs = load_rows(X, of_x + start, live, CHUNK, CHUNK, True)
        zs = load_rows(Z, of_z + start, live, CHUNK, CHUNK, True)
        (w,) = load_rows_or(W, of_w + start, live, CHUNK, CHUNK, NO_WEIGHT)
        (b,) = load_rows_or(B, of_b + start, live, CHUNK, CHUNK, NO_BIAS)
        (s,) = gated(xs, zs, OF_S, ACC)
        y = weighted((widened(s, ACC) - mean) * rstd, w, b, Y.dtype.element_ty, OFFSET, ROUND, ROUND_N)
        if GATE is not None and not GATE_FIRST:
            y *= gate_of(widened(zs[0], ACC), GATE)
        store_once(Y + row * N + columns, y, live, True)
