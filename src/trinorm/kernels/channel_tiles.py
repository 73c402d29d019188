"""Which channels and positions a program of the channel family owns.

x is seen as samples of ``width`` channels by S positions, in one of two orders: channels first (an element is at
``(sample·width + channel)·S + position``) or LAST (``(sample·S + position)·width + channel``). Where a kernel need not tell
samples apart, channels-first ones are one sample of all their channels, so that small images share a tile.

Tiles are ``[ROWS, POSITIONS]``: a row is a channel. UNIT divides the size that runs through memory, S or LAST's width, so
that accesses are as wide as the alignment allows. Sizes are 32-bit where they can be, as the device divides those in a
quarter of the time; offsets are 64-bit.
"""

import triton
import triton.language as tl

from .index import first_program, load, load_or, rows_live


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
def share_of_program(slabs):
    """(block of channels, slab of positions) of this program: the slabs of a block lie side by side."""
    program = first_program().to(tl.int32)
    return program // slabs, program % slabs


@triton.jit
def channels_of_block(block, width, ROWS: tl.constexpr):
    """(sample, channel numbers ``[ROWS, 1]`` within it, which of them exist) of a block of ROWS channels."""
    blocks = tl.cdiv(width, ROWS)
    channels = (block % blocks) * ROWS + tl.arange(0, ROWS)[:, None]
    return block // blocks, channels, rows_live(channels, width, ROWS)


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
def statistics_of(sample, channels, width, C, D, GROUPED: tl.constexpr):
    """Where the statistics of these channels are: of their sample's groups of D channels, or of the channel itself."""
    if GROUPED:
        return sample.to(tl.int64) * (width // D) + channels // D
    else:
        return channels % C


@triton.jit
def load_channel_stats(MEAN, RSTD, sets, live, eps, VARIANCE: tl.constexpr, ACC: tl.constexpr):
    """(mean, rstd) of a tile's channels in the accumulator's dtype. VARIANCE: what RSTD has is the variance."""
    mean = load(MEAN + sets, live).to(ACC)
    rstd = load(RSTD + sets, live).to(ACC)
    if VARIANCE:
        rstd = tl.rsqrt(rstd + tl.full([1, 1], eps, ACC))
    return mean, rstd


@triton.jit
def load_parameter(POINTER, channels, C, live, absent: tl.constexpr):
    """The weight or bias of a tile's channels; the identity of bits ``absent`` where POINTER is None."""
    return load_or(POINTER, channels % C, live, absent, False)


@triton.jit
def tile_of_program(width, S, slabs, LAST: tl.constexpr, ROWS: tl.constexpr, POSITIONS: tl.constexpr):
    """(sample, channels, their mask, element offsets, the elements' mask) of a program that has one tile."""
    block, slab = share_of_program(slabs)
    sample, channels, live = channels_of_block(block, width, ROWS)
    start = slab.to(tl.int64) * POSITIONS
    mask = live & (start + tl.arange(0, POSITIONS)[None, :] < S)
    return sample, channels, live, tile_offsets(sample, channels, start, width, S, LAST, POSITIONS), mask


@triton.jit
def walk_of_program(
    A,
    width,
    S,
    slab,
    slabs,
    LAST: tl.constexpr,
    UNIT: tl.constexpr,
    SAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """(row of the partials, sample, channels, their mask, walk) of a program that walks tiles; walk: the first one's
    element offsets, elements from one to the next, how many there are, and how many positions lie before the program's end.

    With SAMPLES == 1 they lie along a slab of one sample's positions; otherwise they are all positions of the channels, a
    tile for each of SAMPLES samples.
    """
    block, piece = share_of_program(slabs)
    team, channels, live = channels_of_block(block, width, ROWS)
    part = team.to(tl.int64) * slabs + piece
    start = piece.to(tl.int64) * in_units(slab, POSITIONS)
    if SAMPLES == 1:
        there = tl.minimum(S - start, slab).to(tl.int32)
        step = tl.full([], POSITIONS, tl.int64) * (width if LAST else 1)
        steps = tl.cdiv(there, POSITIONS)
        there = there if LAST else in_units(there, UNIT)
    else:
        there = S
        step = tl.full([], 1, tl.int64) * width * S
        steps = tl.minimum(A - team * SAMPLES, SAMPLES)
    first = tile_offsets(team * SAMPLES, channels, start, width, S, LAST, POSITIONS)
    return part, team * SAMPLES, channels, live, (first, step, steps, there)


@triton.jit
def lanes_there(turn, there, SAMPLES: tl.constexpr, POSITIONS: tl.constexpr):
    """Which lanes of a walk's tile ``turn`` have an element, ``[1, POSITIONS]``."""
    lanes = tl.arange(0, POSITIONS)[None, :]
    if SAMPLES == 1:
        return lanes < there - turn * POSITIONS
    else:
        return lanes < there


@triton.jit
def lane_counts(steps, there, SAMPLES: tl.constexpr, ACC: tl.constexpr, POSITIONS: tl.constexpr):
    """How many elements of a row each lane of a walk has, ``[1, POSITIONS]``: one of all tiles but perhaps the last, or, of
    samples, one of all or none.
    """
    missed = 1 if SAMPLES == 1 else steps
    return (steps - tl.where(lanes_there(steps - 1, there, SAMPLES, POSITIONS), 0, missed)).to(ACC)


@triton.jit
def store_partial(OUT, part, width, channels, value, live):
    """A program's value of each of its channels, in row ``part`` of ``[parts, width]``."""
    tl.store(OUT + part * width + channels, value, mask=live)
