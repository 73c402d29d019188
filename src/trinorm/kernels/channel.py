"""Channel norms, forward: y = (x - mean)·rstd·w + b with the statistics of a group of channels of a sample (GroupNorm,
InstanceNorm), or of a channel over all samples (BatchNorm).

- ``channel_moments``  sums of distances from a pivot, and of their squares, of each channel in a share of the positions
                       (or of samples)
- ``channel_apply``    y, in a second reading of x

Between them channel_combine.py makes statistics of the partials. channel_tiles.py says what a program owns. Partials are
``[parts, width]``, and fp64 whatever x is: they are few, nothing is lost in adding them up, and squares beyond fp32's range
fit.
"""

import triton
import triton.language as tl

from .activation import activated, before_activation
from .channel_tiles import (
    inner_in_units,
    lane_counts,
    lanes_there,
    last_ones_first,
    load_center,
    load_channel_stats,
    load_parameters,
    load_pivot,
    statistics_of,
    store_partial,
    tile_offsets,
    walk_of_program,
    walked_count,
)
from .index import first_program, load, load_once, store_once, widened
from .overlap import let_next_launch, wait_for_previous
from .row_backward import normalized
from .stats import TRUSTED_MIN, power_of_two_below, row_sum, row_sums, trusted

# A mean whose square is so many times the variance, both from the pivot on, costs the variance as many of its digits.
_FAR: tl.constexpr = tl.constexpr(16.0)

# What 16-bit numbers are multiplied by whose squares are too small for fp32, or too large.
_LIFT: tl.constexpr = tl.constexpr(2.0**100)
_SINK: tl.constexpr = tl.constexpr(2.0**-70)


@triton.jit
def walked_sums(
    X,
    origin,
    stride,
    S,
    live,
    walk,
    n,
    eps,
    EVEN: tl.constexpr,
    SAMPLES: tl.constexpr,
    ACC: tl.constexpr,
    RESCUE: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """(sum of the distances from the pivot, of their squares, pivot) of each of a program's channels; the sums are fp64,
    and where ACC is that, squares are about the mean. origin: where the pivots come from; stride: from there to the next of
    S positions; n: elements of each channel. RESCUE: also where squares leave fp32's range.
    """
    if X.dtype.element_ty.primitive_bitwidth == 16:
        pivot = load_center(X, origin, stride, S, live, ACC)
        scale = tl.full([ROWS, 1], 1.0, ACC)
        sum_, squared = plain_sums(X, live, walk, pivot, scale, EVEN, ACC, ROWS, POSITIONS, STAGES)
        total, squares = sum_.to(tl.float64), squared.to(tl.float64)
        share = (1.0 / n).to(ACC)
        shift, power = sum_ * share, squared * share
        far = shift * shift > (power - shift * shift) * _FAR
        good = ~far
        if RESCUE and X.dtype.element_ty != tl.float16:
            power += tl.full([1, 1], eps, ACC)
            good = good & trusted(power)
            # Of what is 1 or larger, distances are 0 or have squares that are large enough.
            lifted = tl.where(tl.abs(pivot) < 1.0, _LIFT, 1.0)
            scale = tl.where(trusted(power), 1.0, tl.where(power < TRUSTED_MIN, lifted, _SINK))
        if tl.min((good | ~live).to(tl.int32)) == 0:
            # Once more about a center that is nearer, and times a power of two.
            center = tl.where(far, (pivot + shift).to(X.dtype.element_ty).to(ACC), pivot)
            sum_, squared = plain_sums(X, live, walk, center, scale, EVEN, ACC, ROWS, POSITIONS, 1)
            unit = 1.0 / scale.to(tl.float64)
            moved = center.to(tl.float64) - pivot.to(tl.float64)
            total = sum_.to(tl.float64) * unit
            squares = squared.to(tl.float64) * unit * unit + moved * (2.0 * total + n * moved)
            total += n * moved
        if tl.float64 == ACC:
            squares -= total * total / n
    else:
        lanes = tl.arange(0, POSITIONS)[None, :]
        pivot = load_pivot(X, origin, lanes.to(tl.int64) * stride, live, live & (lanes < S), ACC)
        mean, squares = recurrent_moments(X, live, walk, n, pivot, EVEN, SAMPLES, ACC, ROWS, POSITIONS, STAGES)
        if RESCUE:
            good = trusted(squares / n + eps) | ~live
            if tl.min(good.to(tl.int32)) == 0:
                mean_again, squares_again = rescued_walk(X, live, walk, n, EVEN, ACC, ROWS, POSITIONS)
                mean = tl.where(good, mean, mean_again - pivot.to(tl.float64))
                squares = tl.where(good, squares, squares_again)
        total = mean * n
        if tl.float64 != ACC:
            squares += mean * total
    return total, squares, pivot


@triton.jit
def plain_sums(
    X,
    live,
    walk,
    pivot,
    scale,
    EVEN: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sums of the distances from the pivot, times a power of two for each row, and of their squares. Of 16-bit numbers,
    whose distances are exact in fp32.
    """
    first, step, steps, left, pace = walk
    total = tl.zeros([ROWS, POSITIONS], ACC)
    squares = tl.zeros([ROWS, POSITIONS], ACC)
    for i in tl.range(0, steps, num_stages=STAGES):
        here = lanes_there(i, left, pace, EVEN, POSITIONS)
        x = tl.where(here, widened(load(X + first + i * step, live & here), ACC) * scale - pivot * scale, 0.0)
        total += x
        squares += x * x
    return row_sums(total, squares)


@triton.jit
def recurrent_moments(
    X,
    live,
    walk,
    n,
    pivot,
    EVEN: tl.constexpr,
    SAMPLES: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """(mean from the pivot on, sum of squares about it), fp64, of wider numbers: by Welford's recurrence in each lane over
    its own elements, and lanes merged at the end.
    """
    first, step, steps, left, pace = walk
    mean = tl.zeros([ROWS, POSITIONS], ACC)
    squares = tl.zeros([ROWS, POSITIONS], ACC)
    turn = tl.zeros([1, 1], ACC)
    for i in tl.range(0, steps, num_stages=STAGES):
        here = lanes_there(i, left, pace, EVEN, POSITIONS)
        x = widened(load(X + first + i * step, live & here), ACC) - pivot
        x = tl.where(here, x, mean)  # so that a lane without an element has no distance
        turn += 1.0
        delta = x - mean
        mean += delta * (1.0 / turn)
        squares += delta * (x - mean)
    count = lane_counts(steps, left, pace, EVEN, SAMPLES, ACC, POSITIONS)
    return merged_positions(mean, squares, count, n)


@triton.jit
def rescued_walk(
    X,
    live,
    walk,
    n,
    EVEN: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """(mean, sum of squares about it) where squares leave fp32's range: of x times a power of two, scaled back.

    It is rare, so it takes three plain readings, which need fewer registers than the recurrence: those of what is rare are
    kept for it always.
    """
    first, step, steps, left, pace = walk
    largest = tl.zeros([ROWS, POSITIONS], ACC)
    for i in tl.range(0, steps):
        mask = live & lanes_there(i, left, pace, EVEN, POSITIONS)
        largest = tl.maximum(largest, tl.abs(widened(load(X + first + i * step, mask), ACC)))
    unit = power_of_two_below(tl.max(largest, axis=1, keep_dims=True))
    total = tl.zeros([ROWS, POSITIONS], ACC)
    for i in tl.range(0, steps):
        mask = live & lanes_there(i, left, pace, EVEN, POSITIONS)
        total += widened(load(X + first + i * step, mask), ACC) * (1.0 / unit)
    mean = row_sum(total).to(tl.float64) / n
    center = mean.to(ACC)
    squares = tl.zeros([ROWS, POSITIONS], ACC)
    for i in tl.range(0, steps):
        mask = live & lanes_there(i, left, pace, EVEN, POSITIONS)
        distance = tl.where(mask, widened(load(X + first + i * step, mask), ACC) * (1.0 / unit) - center, 0.0)
        squares += distance * distance
    return scaled_back(mean, center, row_sum(squares).to(tl.float64), n, unit)


@triton.jit
def scaled_back(mean, center, squares, n, unit):
    """(mean, sum of squares about it), fp64, of x, from those of x / unit, whose squares were taken about ``center``."""
    moved = mean - center.to(tl.float64)
    left = squares - moved * moved * n
    unit = unit.to(tl.float64)
    return mean * unit, tl.where(left < 0.0, 0.0, left) * unit * unit


@triton.jit
def merged_positions(mean, squares, count, n):
    """Chan's rule over lanes: the mean and the sum of squares about it of each row of n elements, in fp64.

    What rounding left in the mean is the lanes' mean distance from it. n is given, as Triton (3.6) has every thread add up
    a whole row of numbers that are made of lane numbers alone: 2048 additions, and 40 µs where the norm takes 45.
    """
    n = tl.maximum(n, 1.0)
    center = row_sum(mean * count) / n.to(mean.dtype)
    shift = mean - center
    moved = row_sum(shift * count).to(tl.float64) / n
    total = row_sum(squares + shift * shift * count).to(tl.float64) - moved * moved * n
    return center.to(tl.float64) + moved, tl.where(total < 0.0, 0.0, total)


@triton.jit(do_not_specialize=["A", "width", "S", "shares"])
def channel_moments(
    TOTALS,
    SQUARES,
    PIVOTS,
    COUNTS,
    X,
    A,
    width,
    S,
    shares,
    eps: tl.float64,
    OVER_SAMPLES: tl.constexpr,
    LAST: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN: tl.constexpr,
    SAMPLES: tl.constexpr,
    ACC: tl.constexpr,
    RESCUE: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """A block of ROWS channels a program, and of each a share of one sample's positions, or all of SAMPLES samples'.

    PIVOTS: what the distances of each channel are taken from, of each sample, or OVER_SAMPLES of all, ``[samples, width]``;
    all programs that have the channel find the same one. COUNTS: elements of a channel's parts, ``[parts]``, where ACC
    is fp64; SQUARES are then about the parts' own means, as there is no wider dtype for a distant pivot to leave digits in.
    """
    wait_for_previous(PDL)
    let_next_launch(PDL)
    width, S = inner_in_units(width, S, LAST, UNIT)
    program = first_program().to(tl.int32)
    part, sample, channels, live, walk = walk_of_program(
        program, A, width, S, shares, LAST, UNIT, EVEN, SAMPLES, ROWS, POSITIONS
    )
    whose = sample * 0 if OVER_SAMPLES else sample
    origin = tile_offsets(whose, channels, 0, width, S, LAST, 1)
    stride = width if LAST else 1
    _, _, steps, left, pace = walk
    n = walked_count(steps, left, pace, SAMPLES, POSITIONS)
    total, squares, pivot = walked_sums(
        X, origin, stride, S, live, walk, n, eps, EVEN, SAMPLES, ACC, RESCUE, ROWS, POSITIONS, STAGES
    )
    store_partial(TOTALS, part, width, channels, total, live)
    store_partial(SQUARES, part, width, channels, squares, live)
    if COUNTS is not None:
        first_block = tl.min(channels, axis=0, keep_dims=True) == 0
        tl.store(COUNTS + part + tl.zeros([1, 1], tl.int64), n, mask=first_block)
    store_partial(PIVOTS, whose.to(tl.int64), width, channels, pivot, live & (part == whose.to(tl.int64) * shares))


@triton.jit(do_not_specialize=["width", "S", "shares", "C", "D"])
def channel_apply(
    Y,
    X,
    MEAN,
    RSTD,
    W,
    B,
    RESIDUAL,
    width,
    S,
    shares,
    C,
    D,
    eps: tl.float64,
    GROUPED: tl.constexpr,
    VARIANCE: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LAST: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    STAGES: tl.constexpr,
    STREAM: tl.constexpr,
    PDL: tl.constexpr,
):
    """A block of ROWS channels a program, and a share of positions. Statistics, weight and bias are vectors of its rows."""
    wait_for_previous(PDL)
    let_next_launch(PDL)
    width, S = inner_in_units(width, S, LAST, UNIT)
    _, sample, channels, live, walk = walk_of_program(
        last_ones_first(), 0, width, S, shares, LAST, UNIT, EVEN, 1, ROWS, POSITIONS
    )
    first, step, steps, left, pace = walk
    sets = statistics_of(sample, channels, width, C, D, LAST, GROUPED)
    mean, rstd = load_channel_stats(MEAN, RSTD, sets, live, eps, VARIANCE, ACC)
    w, b = load_parameters(W, B, sample, channels, width, C, live, LAST, PER_SAMPLE)
    for turn in tl.range(0, steps, num_stages=STAGES):
        i = steps - 1 - turn
        offsets = first + i * step
        mask = live & lanes_there(i, left, pace, EVEN, POSITIONS)
        xhat = normalized(load_once(X + offsets, mask, STREAM), mean, rstd, ACC)
        z = before_activation(xhat, w, b, RESIDUAL, offsets, mask)
        store_once(Y + offsets, activated(z, ACTIVATION), mask, STREAM)
