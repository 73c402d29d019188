"""Channel norms, forward: y = (x - mean)·rstd·w + b with the statistics of a group of channels of a sample (GroupNorm,
InstanceNorm), or of a channel over all samples (BatchNorm).

- ``channel_moments``  mean and sum of squares about it, of each channel in a slab of positions (or of samples)
- ``channel_combine``  those of a statistic's channels and slabs, by Chan's rule: mean and rstd, and running statistics
- ``channel_apply``    y, in a second reading of x

channel_tiles.py says what a program owns. Partials are ``[parts, width]``. Partial means and sums of squares are fp64,
whatever x is: they are few, nothing is lost where a mean is large and a variance small, and squares beyond fp32's range
fit.
"""

import triton
import triton.language as tl

from .affine import NO_BIAS, NO_WEIGHT, affine
from .channel_tiles import (
    inner_in_units,
    lane_counts,
    lanes_there,
    load_channel_stats,
    load_parameter,
    statistics_of,
    store_partial,
    tile_of_program,
    walk_of_program,
)
from .index import first_program, load, widened
from .overlap import let_next_launch, wait_for_previous
from .row_backward import normalized
from .stats import power_of_two_below, row_sum, trusted


@triton.jit
def walked_moments(
    X, live, walk, scale, SAMPLES: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, POSITIONS: tl.constexpr
):
    """(mean, sum of squares about it, count) of ``scale·x`` in each of a program's channels, fp64; scale may be None.

    Each lane runs Welford's recurrence over its own elements; lanes are merged once, at the end.
    """
    first, step, steps, there = walk
    mean = tl.zeros([ROWS, POSITIONS], ACC)
    squares = tl.zeros([ROWS, POSITIONS], ACC)
    turn = tl.zeros([1, 1], ACC)
    for i in tl.range(0, steps):
        here = lanes_there(i, there, SAMPLES, POSITIONS)
        x = widened(load(X + first + i * step, live & here), ACC)
        if scale is not None:
            x *= scale
        x = tl.where(here, x, mean)  # so that a lane without an element has no distance
        turn += 1.0
        delta = x - mean
        mean += delta * (1.0 / turn)
        squares += delta * (x - mean)
    count = lane_counts(steps, there, SAMPLES, ACC, POSITIONS)
    return merged_positions(mean, squares, count, tl.zeros([1, 1], tl.float64) + there * (1 if SAMPLES == 1 else steps))


@triton.jit
def walked_largest(X, live, walk, SAMPLES: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, POSITIONS: tl.constexpr):
    """max |x|, ``[ROWS, 1]``, of each of a program's channels."""
    first, step, steps, there = walk
    largest = tl.zeros([ROWS, POSITIONS], ACC)
    for i in tl.range(0, steps):
        mask = live & lanes_there(i, there, SAMPLES, POSITIONS)
        largest = tl.maximum(largest, tl.abs(widened(load(X + first + i * step, mask), ACC)))
    return tl.max(largest, axis=1, keep_dims=True)


@triton.jit
def merged_positions(mean, squares, count, n):
    """Chan's rule over lanes: the mean and the sum of squares about it of each row, and its count n, in fp64.

    What rounding left in the mean is the lanes' mean distance from it. n is given, as Triton (3.6) has every thread add up
    a whole row of numbers that are made of lane numbers alone: 2048 additions, and 40 µs where the norm takes 45.
    """
    n = tl.maximum(n.to(tl.float64), 1.0)
    center = row_sum(mean * count) / n.to(mean.dtype)
    shift = mean - center
    moved = row_sum(shift * count).to(tl.float64) / n
    total = row_sum(squares + shift * shift * count).to(tl.float64) - moved * moved * n
    return center.to(tl.float64) + moved, tl.where(total < 0.0, 0.0, total), n


@triton.jit
def merged_rows(mean, squares, count):
    """The same over the rows of a tile, whose values are fp64: those of each column."""
    total = tl.sum(count, axis=0, keep_dims=True)
    center = tl.sum(mean * count, axis=0, keep_dims=True) / total
    shift = mean - center
    return center, tl.sum(squares + shift * shift * count, axis=0, keep_dims=True), total


@triton.jit(do_not_specialize=["A", "width", "S", "slab", "slabs"])
def channel_moments(
    MEANS,
    SQUARES,
    X,
    A,
    width,
    S,
    slab,
    slabs,
    eps: tl.float64,
    LAST: tl.constexpr,
    UNIT: tl.constexpr,
    SAMPLES: tl.constexpr,
    ACC: tl.constexpr,
    RESCUE: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A block of ROWS channels a program, and of each a slab of one sample's positions, or all of SAMPLES samples'."""
    wait_for_previous(PDL)
    let_next_launch(PDL)
    width, S = inner_in_units(width, S, LAST, UNIT)
    part, _, channels, live, walk = walk_of_program(A, width, S, slab, slabs, LAST, UNIT, SAMPLES, ROWS, POSITIONS)
    mean, squares, count = walked_moments(X, live, walk, None, SAMPLES, ACC, ROWS, POSITIONS)
    if RESCUE:
        # Squares that leave fp32's range are taken again, of those channels times a power of two: exact, and rare.
        good = trusted(squares / count + eps) | ~live
        if tl.min(good.to(tl.int32)) == 0:
            unit = power_of_two_below(walked_largest(X, live, walk, SAMPLES, ACC, ROWS, POSITIONS))
            again, squares_again, _same = walked_moments(X, live, walk, 1.0 / unit, SAMPLES, ACC, ROWS, POSITIONS)
            unit = unit.to(tl.float64)
            mean = tl.where(good, mean, again * unit)
            squares = tl.where(good, squares, squares_again * unit * unit)
    store_partial(MEANS, part, width, channels, mean, live)
    store_partial(SQUARES, part, width, channels, squares, live)


@triton.jit
def partials_of(start, outer, sets, R, D, C, K: tl.constexpr):
    """(part, its offset, its mask), each ``[K, SETS]``, of K of the partials that some statistics are made of.

    A statistic has R parts of each of its D channels. Partials are ``[outer, R, C]``.
    """
    k = start + tl.arange(0, K)[:, None]
    part = k // D
    offsets = (outer.to(tl.int64) * R + part) * C + sets * D + k % D
    return part, offsets, (k < R * D) & (sets < C // D)


@triton.jit
def sets_of_program(program, C, D, SETS: tl.constexpr):
    """(outer, statistics ``[1, SETS]`` of it) of a program that combines partials."""
    blocks = tl.cdiv(C // D, SETS)
    return program // blocks, program % blocks * SETS + tl.arange(0, SETS)[None, :]


@triton.jit
def combined_moments(MEANS, SQUARES, outer, sets, A, S, slab, slabs, R, D, C, SAMPLES, K: tl.constexpr):
    """(mean, sum of squares about it, count), each ``[1, SETS]`` and fp64: Chan's rule, along k and then over lanes."""
    count = tl.zeros([K, sets.shape[1]], tl.float64)
    mean = tl.zeros([K, sets.shape[1]], tl.float64)
    squares = tl.zeros([K, sets.shape[1]], tl.float64)
    for start in tl.range(0, R * D, K):
        part, offsets, live = partials_of(start, outer, sets, R, D, C, K)
        positions = tl.minimum(S - (part % slabs).to(tl.int64) * slab, slab)
        samples = tl.minimum(A - part // slabs * SAMPLES, SAMPLES)
        n = tl.where(live, (positions * samples).to(tl.float64), 0.0)
        delta = tl.where(live, load(MEANS + offsets, live) - mean, 0.0)
        share = n / tl.maximum(count + n, 1.0)
        mean += delta * share
        squares += load(SQUARES + offsets, live) + delta * delta * count * share
        count += n
    return merged_rows(mean, squares, count)


@triton.jit
def update_running(RUNNING, sets, value, momentum, mask):
    """running·(1 - momentum) + value·momentum, in place."""
    if RUNNING is not None:
        running = load(RUNNING + sets, mask).to(tl.float64)
        kept = running * (1.0 - momentum) + value * momentum
        tl.store(RUNNING + sets, kept.to(RUNNING.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["A", "S", "slab", "slabs", "R", "D", "C", "SAMPLES"])
def channel_combine(
    MEAN,
    RSTD,
    VAR,
    RUNNING_MEAN,
    RUNNING_VAR,
    MEANS,
    SQUARES,
    A,
    S,
    slab,
    slabs,
    R,
    D,
    C,
    SAMPLES,
    eps: tl.float64,
    momentum: tl.float64,
    K: tl.constexpr,
    SETS: tl.constexpr,
    PDL: tl.constexpr,
):
    """SETS statistics a program, of R parts of D channels each: mean and rstd; VAR (unbiased), running ones if given."""
    wait_for_previous(PDL)
    let_next_launch(PDL)
    outer, sets = sets_of_program(first_program().to(tl.int32), C, D, SETS)
    mask = sets < C // D
    mean, squares, count = combined_moments(MEANS, SQUARES, outer, sets, A, S, slab, slabs, R, D, C, SAMPLES, K)
    where = outer.to(tl.int64) * (C // D) + sets
    tl.store(MEAN + where, mean.to(MEAN.dtype.element_ty), mask=mask)
    tl.store(RSTD + where, tl.rsqrt(squares / count + eps).to(RSTD.dtype.element_ty), mask=mask)
    unbiased = squares / (count - 1.0)
    if VAR is not None:
        tl.store(VAR + where, unbiased, mask=mask)
    update_running(RUNNING_MEAN, sets, mean, momentum, mask)
    update_running(RUNNING_VAR, sets, unbiased, momentum, mask)


@triton.jit(do_not_specialize=["width", "S", "slabs", "C", "D"])
def channel_apply(
    Y,
    X,
    MEAN,
    RSTD,
    W,
    B,
    width,
    S,
    slabs,
    C,
    D,
    eps: tl.float64,
    GROUPED: tl.constexpr,
    VARIANCE: tl.constexpr,
    LAST: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile a program. Statistics, weight and bias are vectors of its rows."""
    wait_for_previous(PDL)
    let_next_launch(PDL)
    width, S = inner_in_units(width, S, LAST, UNIT)
    sample, channels, live, offsets, mask = tile_of_program(width, S, slabs, LAST, ROWS, POSITIONS)
    x = load(X + offsets, mask)
    sets = statistics_of(sample, channels, width, C, D, GROUPED)
    mean, rstd = load_channel_stats(MEAN, RSTD, sets, live, eps, VARIANCE, ACC)
    w = load_parameter(W, channels, C, live, NO_WEIGHT)
    b = load_parameter(B, channels, C, live, NO_BIAS)
    y = affine(normalized(x, mean, rstd, ACC), w, b, 0.0)
    tl.store(Y + offsets, y.to(Y.dtype.element_ty), mask=mask)
