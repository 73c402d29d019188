"""Which channels and positions a program of the channel family owns.

x is seen as samples of ``width`` channels by S positions, in one of two orders: channels first (an element is at
``(sample·width + channel)·S + position``) or LAST (``(sample·S + position)·width + channel``). Where a kernel need not tell
samples apart, channels-first ones are one sample of all their channels, so that small images share a tile.

Tiles are ``[ROWS, POSITIONS]``: a row is a channel. UNIT divides the size that runs through memory, S or LAST's width, so
that accesses are as wide as the alignment allows. EVEN: tiles divide channels and positions, so that no mask exists. Sizes
are 32-bit where they can be, as the device divides those in a quarter of the time; offsets are 64-bit.
"""

import triton
import triton.language as tl

from .affine import NO_BIAS, NO_WEIGHT
from .index import first_program, load, load_or, program_count, rows_live, widened
from .stats import row_sum, row_sums

# Of the difference of two fp32 numbers, each of some operations.
_NOISE: tl.constexpr = tl.constexpr(2.0**-20)


@triton.jit
def in_units(size, UNIT: tl.constexpr):
    """size, which the compiler then knows for a multiple of UNIT."""
    return size // UNIT * UNIT


@triton.jit
def inner_in_units(width, S, LAST: tl.constexpr, UNIT: tl.constexpr):
    """(width, S), of which the one that runs through memory is in units."""
    if LAST:
        return in_units(width, UNIT), S
    else:
        return width, in_units(S, UNIT)


@triton.jit
def last_ones_first():
    """This program's number, counted from the end: what the kernel before read last is what L2 still has."""
    return (program_count() - 1 - first_program()).to(tl.int32)


@triton.jit
def tile_offsets(sample, channels, start, width, S, LAST: tl.constexpr, POSITIONS: tl.constexpr):
    """Element offsets ``[ROWS, POSITIONS]`` of these channels at the positions from ``start`` on."""
    sample = sample.to(tl.int64)
    lanes = tl.arange(0, POSITIONS)[None, :]
    if LAST:
        return (sample * S + start) * width + channels + lanes.to(tl.int64) * width
    else:
        return (sample * width + channels) * S + start + lanes


@triton.jit
def statistics_of(sample, channels, width, C, D, LAST: tl.constexpr, GROUPED: tl.constexpr):
    """Where the statistics of these channels are: of their sample's groups of D channels, or of the channel itself."""
    if GROUPED:
        return sample.to(tl.int64) * (width // D) + channels // D
    elif LAST:
        return channels
    else:
        return channels % C


@triton.jit
def load_channel_stats(MEAN, RSTD, sets, live, eps, VARIANCE: tl.constexpr, ACC: tl.constexpr):
    """(mean, rstd) of a tile's channels in the accumulator's dtype. VARIANCE: what RSTD has is the variance."""
    mean = load(MEAN + sets, live).to(ACC)
    rstd = load(RSTD + sets, live).to(ACC)
    if VARIANCE:
        power = rstd + tl.full([1, 1], eps, ACC)
        # Correctly rounded (tl.rsqrt is off by two units): all of a channel's x̂ are off by as much, and so is its dw.
        rstd = 1.0 / tl.sqrt(power) if tl.float64 == ACC else tl.div_rn(1.0, tl.sqrt_rn(power))
    return mean, rstd


@triton.jit
def load_parameters(W, B, sample, channels, width, C, live, LAST: tl.constexpr, PER_SAMPLE: tl.constexpr):
    """(weight, bias) of a tile's channels, which are C's or, PER_SAMPLE, each sample's own; identities where None."""
    if PER_SAMPLE:
        which = sample.to(tl.int64) * width + channels
    elif LAST:
        which = channels
    else:
        which = channels % C
    return load_or(W, which, live, NO_WEIGHT, False), load_or(B, which, live, NO_BIAS, False)


@triton.jit
def walk_of_program(
    program,
    A,
    width,
    S,
    shares,
    LAST: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN: tl.constexpr,
    SAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """(row of the partials, sample, channels ``[ROWS, 1]``, their mask, walk) of a program; walk: the first tile's element
    offsets, elements from one to the next, how many there are, how many positions lie from the first one's on, and how many
    of them a turn leaves behind.

    With SAMPLES == 1 they are every ``shares``-th tile of one sample's positions, so that programs at work side by side
    read what lies together, and what was read last is the end of it all; otherwise they are all positions of the channels,
    a tile for each of SAMPLES samples.
    """
    blocks = tl.cdiv(width, ROWS)
    if LAST:  # programs side by side have the channels of the same positions
        block, share, team = program % blocks, program // blocks % shares, program // blocks // shares
    else:
        share, block, team = program % shares, program // shares % blocks, program // shares // blocks
    channels = block * ROWS + tl.arange(0, ROWS)[:, None]
    live = tl.full([ROWS, 1], True, tl.int1) if EVEN else rows_live(channels, width, ROWS)
    part = team.to(tl.int64) * shares + share
    start = share.to(tl.int64) * POSITIONS
    if SAMPLES == 1:
        # In S's own dtype nothing overflows: a turn after the first begins before S's end. (tl.cdiv would, near 2^31.)
        left = (S - start).to(S.dtype)
        pace = shares.to(S.dtype) * POSITIONS
        step = tl.full([], POSITIONS, tl.int64) * shares * (width if LAST else 1)
        steps = tl.cdiv(((S - 1) // POSITIONS + 1).to(tl.int32) - share, shares)
    else:
        left = S
        pace = 0
        step = tl.full([], 1, tl.int64) * width * S
        steps = tl.minimum(A - team * SAMPLES, SAMPLES)
    first = tile_offsets(team * SAMPLES, channels, start, width, S, LAST, POSITIONS)
    return part, team * SAMPLES, channels, live, (first, step, steps, left, pace)


@triton.jit
def centered_moments(x, mask, share):
    """(center, from it to the mean, variance) of each row's elements where ``mask`` is, and x is 0 where it is not; share:
    1 over how many they are. The center is the mean of a plain sum.

    What rounding left in that is the mean distance from it. Not so where it is small beside the distances: they are rounded
    more than it, and those of 16-bit numbers all alike (BatchNorm 8x320x32x32, fp16: 8e-8 off, where torch's mean is off by
    3e-9); there it stands.
    """
    center = row_sum(x) * share
    distance = tl.where(mask, x - center, 0.0)
    squares, drift = row_sums(distance * distance, distance)
    moved = drift * share
    variance = less_shift(squares * share, moved * moved)
    return center, tl.where(center * center > variance, moved, 0.0), variance


@triton.jit
def less_shift(power, shift):
    """power - shift, of a mean square about a center, and of the square of its distance from the mean. What rounding leaves
    is 0: of equal elements, whose center may be off by a rounding, there is nothing else, and beside it eps would be lost.

    An infinite power stands, beside an infinite shift too: a device that takes the product and the difference in one step
    finds infinity, not NaN.
    """
    left = power - shift
    return tl.where(left < shift * _NOISE, 0.0, left)


@triton.jit
def load_pivot(X, first, others, live, mask, ACC: tl.constexpr):
    """An element of each statistic, 0 if it is not finite. Taken off all of them first, it leaves the digits of deviations
    that are small beside the mean: a recurrence's own mean is rounded at each step, to as many as the mean has.

    first: where the statistics begin, ``live``. In fp64, which has no wider dtype to add it again in, it is the mean of the
    elements at first + ``others`` where ``mask`` is, so that less is left to be added to it.
    """
    if tl.float64 == ACC:
        x = row_sum(load(X + first + others, mask).to(ACC)) / tl.maximum(row_sum(mask.to(ACC)), 1.0)
    else:
        x = widened(load(X + first, live), ACC)
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def load_center(X, origin, stride, S, live, ACC: tl.constexpr):
    """What distances of 16-bit numbers are taken from, so that they are exact: the mean of four elements of each statistic,
    or of one where positions are fewer, to as many bits as they have. Or 0, where it is not larger than half their mean
    size (nearer 0 its own last bit is below what the distances have room for), or not finite.

    origin: where the statistics begin, ``live``; stride: from there to the next of S positions. Four, as they need no sum
    over lanes, for which the walk would wait (4.5 µs of 12.8 of BatchNorm 32x1024x14x14, by a whole tile).
    """
    total = tl.zeros(origin.shape, ACC)
    size = tl.zeros(origin.shape, ACC)
    for i in tl.static_range(4):
        x = widened(load(X + origin + (i * stride if i < S else 0), live), ACC)
        total += x
        size += tl.abs(x)
    center = (total * 0.25).to(X.dtype.element_ty).to(ACC)
    return tl.where((tl.abs(total) > 0.5 * size) & (tl.abs(center) < float("inf")), center, 0.0)


@triton.jit
def lanes_there(turn, left, pace, EVEN: tl.constexpr, POSITIONS: tl.constexpr):
    """Which lanes of a walk's tile ``turn`` have an element, ``[1, POSITIONS]``."""
    if EVEN:
        return tl.full([1, POSITIONS], True, tl.int1)
    else:
        return tl.arange(0, POSITIONS)[None, :] < left - turn * pace


@triton.jit
def lane_counts(steps, left, pace, EVEN: tl.constexpr, SAMPLES: tl.constexpr, ACC: tl.constexpr, POSITIONS: tl.constexpr):
    """How many elements of a row each lane of a walk has, ``[1, POSITIONS]``: one of all tiles but perhaps the last, or, of
    samples, one of all or none.
    """
    missed = 1 if SAMPLES == 1 else steps
    return (steps - tl.where(lanes_there(steps - 1, left, pace, EVEN, POSITIONS), 0, missed)).to(ACC)


@triton.jit
def walked_count(steps, left, pace, SAMPLES: tl.constexpr, POSITIONS: tl.constexpr):
    """How many elements of a row a program has, ``[1, 1]`` and fp64."""
    n = tl.zeros([1, 1], tl.float64)
    if SAMPLES == 1:
        return n + (steps - 1) * POSITIONS + tl.minimum(left - (steps - 1) * pace, POSITIONS)
    else:
        return n + left * steps


@triton.jit
def store_partial(OUT, part, width, channels, value, live):
    """A program's value of each of its channels, in row ``part`` of ``[parts, width]``."""
    tl.store(OUT + part * width + channels, value, mask=live)
