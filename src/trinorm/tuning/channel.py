"""Which launch each problem of the channel family gets: the tiles of each pass, and how far a program walks.

Sizes are those of the view that a pass has of x (kernels/channel_tiles.py). Figures are device times on an H200, bf16.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

from ..launch import Device
from .kinds import ChannelCombine, ChannelHeld, ChannelLayer, ChannelSplit, ChannelWalk, ChannelWhole, Tile

# Of a pass that walks: elements of a tile of 2-byte numbers, its warps, its stages, the programs that a multiprocessor is
# to have before one takes more than a tile. By whether channels are last, and how many tensors are read.
_Pass = tuple[int, int, int, int]
_SUMS: dict[tuple[bool, int], _Pass] = {
    (False, 1): (2048, 4, 3, 16),
    (False, 2): (4096, 4, 3, 16),
    (True, 1): (4096, 4, 4, 2),
    (True, 2): (4096, 4, 4, 2),
}
_APPLY: dict[tuple[bool, int], _Pass] = {
    (False, 1): (4096, 4, 1, 1 << 20),
    (False, 2): (4096, 4, 1, 1 << 20),
    (True, 1): (4096, 4, 1, 1 << 20),
    (True, 2): (4096, 4, 4, 8),
}

# Channels last, forward, by the one above and by these: of what streams GroupNorm 16x320x64x64 40.3 and 39.4, 4x512x128x128
# 55.1 and 55.0, BatchNorm 64x256x56x56 84.7 and 83.0; of what L2 holds GroupNorm 8x640x32x32 14.1 and 12.9, BatchNorm
# 32x1024x14x14 15.7 and 15.9.
_APPLY_STREAMED = {(True, 1): (8192, 4, 1, 1 << 20)}
_APPLY_OF_L2 = {(True, 1): (4096, 4, 4, 8)}

# What is read for the last time, and what is written, passes through L2 without staying (STREAM), so that more of x is
# there for the second reading, where a pass moves more than the first share of L2 (as rows do, row.py) and x is at most so
# many times L2. µs without and with: channels last, forward, GroupNorm 16x320x64x64 41.4, 40.4, 4x512x128x128 57.6, 55.1,
# BatchNorm 64x256x56x56 87.9, 86.5; first, backward, by teams, BatchNorm 64x256x56x56 94.0, 91.0, InstanceNorm
# 16x64x256x256 117.8, 112.1. Of twice as much and more 1 to 2% slower: GroupNorm 1x128x1024x1024 last 200, 205.
_STREAMED = 8 / 15, 3

# Positions of a tile, channels first: no more than these, as what is ragged at a channel's end is idle.
_POSITIONS = 1024

# Channels of a tile, channels last: a line or two of memory of 2-byte numbers, if they are all there. µs with one and with
# two, forward and backward: BatchNorm 65536x1024 124, 185 and 118, 176; 64x256x56x56 100, 145 and 100, 138; GroupNorm
# 4x512x128x128 64.8, 92.1 and 65.7, 92.7; 16x320x64x64 44.5, 60.3 and, with half a tile idle, 50.0, 77.9.
_CHANNELS = 64

# The most tiles that a program walks, as a lane's sums are one after the other.
_MOST_TILES = 64

# Of a pass whose programs have a statistic each: (statistics to a multiprocessor from, elements of a tile, warps). µs of
# forward and backward on an H200, bf16, of a sweep of 14: GroupNorm 16x320x64x64 31.7, 52.2 (2048 by 4 warps: 38.1, 53.3)
# and BatchNorm 256x512x2048 390, 620; GroupNorm 8x640x32x32 11.4, 16.7 and BatchNorm 64x256x56x56 94.8, 131.9 (by 4 warps:
# 12.5 or more, 15.8; 99.4, 142.5); GroupNorm 4x512x128x128 58.9, 83.5 (by 16 warps: 60.1, 84.8).
_WHOLE = ((3, 4096, 4), (1.5, 4096, 8), (0, 8192, 8))

# Statistics of no more elements than this go by single warps: InstanceNorm 64x256x1024 30.2, 32.9 (by 4: 124.5, 56.2);
# BatchNorm 32x1024x14x14 18.6, 19.2 or more (of 2048 by 4: 26.8, 20.1).
_SMALL = 8192
_SMALL_WHOLE = (1024, 1)

# Of 2-byte numbers in runs of even length, with no activation, which would spill: of a backward of several runs bytes for
# each of its warps, warps at most, registers of a thread at most (BatchNorm 32x1024x14x14 18.4 and so 17.7, GroupNorm
# 32x512x16x16 10.9, 9.8, 16x256x32x32 11.8, 11.4, 64x256x16x16 11.1, 10.0; but of odd length, 64x2048x7x7, 43.0, 56.9); and
# registers of a forward (32x1024x14x14 12.4, 11.3; 16x256x32x32 6.25, 6.29).
_HELD_EVEN = 2048, 8, 80
_HELD_REGISTERS = 128

# What a program holds of one tensor, and of two: bytes at most; where statistics are single runs, bytes of a tile of them;
# bytes for each of its warps then, and otherwise; warps at most. µs, as above, of forwards: InstanceNorm 64x256x1024 18.3
# (by one run 20.3), GroupNorm 32x512x16x16 6.7 (read again 10), BatchNorm 64x512x7x7 11.5 (by twice the warps 16),
# 32x1024x14x14 20.1 where reading it again takes 17.0. Backwards: 27.5, 11.2, 11.2, and 20.1 by 4 warps (by 8 warps 25.5,
# read again 22.9).
# By sums over the whole tile, on an H100, forwards: BatchNorm 32x1024x14x14 14.2 where reading it again takes 17.9,
# GroupNorm 16x256x32x32 7.6 and 10.2, both of 16 KB by 4 warps.
_HELD = {1: (16 << 10, 4096, 2048, 4096), 2: (32 << 10, 2048, 4096, 4096)}
_HELD_WARPS = 4

# Of a pass by teams: elements of a program's tile of 2-byte numbers, its warps, registers of a thread, and the least
# elements of a statistic. Ratios to the copy and the add, and in brackets those of the best other launch: GroupNorm
# 16x320x64x64 0.69 (0.67), 0.74 (0.58); 4x512x128x128 0.74 (0.56), 0.79 (0.56); 2x320x128x128 0.74 (0.48), 0.72 (0.53);
# BatchNorm 64x256x56x56 0.70 (0.53), 0.76 (0.53); 256x512x2048, by twice the tile, 1.04 (0.99), 0.80 (0.58); InstanceNorm
# 16x64x256x256 0.73 (0.66), 0.79 (0.57); 64x256x8192 0.79 (0.75), 0.92 (0.61). As many registers as the compiler likes cost
# programs at work: 4x512x128x128 0.69, 0.72. Of 20480 elements (8x640x32x32) 11.2 µs and 16.6, read again 11.1 and 16.4.
_SPLIT = 4096, 4, 64, 1 << 15

# The share of the multiprocessors, 1 over this, that statistics should keep at work.
_LEAST_SHARE = 2

# Bytes of a tile for each of its warps, at least.
_LEAST_OF_WARP = 1024

# Of a program that combines: partials of its tile at most, and to a warp; warps at most. So in the designs timed on an H100
# that docs/performance.md has; by 4 warps, whatever the tile, before them.
_COMBINED = 1024
_OF_COMBINING_WARP = 64
_COMBINING_WARPS = 8

# Positions that lie together in a tile, at least: 128 bytes of 2-byte numbers.
_RUN = 64

# LayerNorm over channels: by the tensors that are read, elements of a tile of 2-byte numbers, while it has more positions
# than it should; bytes of a channel's positions that it must have; bytes that a program holds at the most; those of a
# thread from which there are more warps; and those of a chunk. Forward, µs by half the bytes of a thread and of a chunk,
# and by these: 64x96x56x56 35.0, 24.1; 64x384x14x14 14.0, 10.7; 64x768x7x7 13.2, 10.7; 4x256x64x64 10.4, 7.0; 64x128x32x32
# 21.7, 14.2; 8x1536x16x16 9.5, 9.6. (bf16 backward: 24 elements of a thread at 128 registers.)
_LAYER = {1: (8192, 32, 64 << 10, 128, 32), 2: (4096, 16, 72 << 10, 80, 16)}

# Bytes of a channel's positions that a tile should have, also where there are few; most positions, where channels are few.
_LAYER_RUN = 64
_LAYER_RUN_OF_FEW = 32
_MOST_LAYER_ROWS = 1024
_MOST_LAYER_THREADS = 512

# Where all channels are too many: elements of a tile of 2-byte numbers, its warps, and a backward's stages and programs.
_LAYER_STREAMED = (2048, 4, 3, 4)

# Warps on a multiprocessor that a backward's registers leave room for.
_LAYER_WARPS = 16

# Bytes of a thread's widest access.
_WIDE = 16


def choose_apply(samples: int, width: int, s: int, itemsize: int, tensors: int, last: bool, device: Device) -> ChannelWalk:
    """The launch of a pass that writes each element, over samples of ``width`` channels by s positions."""
    nbytes, kind = samples * width * s * itemsize, (last, tensors)
    how = _APPLY[kind]
    if streams(nbytes, tensors, device):
        how = _APPLY_STREAMED.get(kind, how)
    elif nbytes <= device.l2:
        how = _APPLY_OF_L2.get(kind, how)
    return _walk(how, samples, width, s, itemsize * tensors, last, False, device)


def streams(nbytes: int, tensors: int, device: Device) -> bool:
    """Whether a pass that reads so many tensors of ``nbytes``, and writes one, has them pass through L2 without staying."""
    least, most = _STREAMED
    return nbytes * (tensors + 1) > least * device.l2 and nbytes <= most * device.l2


def choose_sums(
    samples: int, width: int, s: int, itemsize: int, tensors: int, last: bool, over_samples: bool, device: Device
) -> ChannelWalk:
    """The launch of a pass that sums. over_samples: a program may walk through them, if a tile has all positions."""
    return _walk(_SUMS[last, tensors], samples, width, s, itemsize * tensors, last, over_samples, device)


@functools.lru_cache(maxsize=1024)
def _walk(
    how: _Pass, samples: int, width: int, s: int, itemsize: int, last: bool, over_samples: bool, device: Device
) -> ChannelWalk:
    elements, warps, stages, per_sm = how
    tile = _tile(width, s, itemsize, last, elements, warps)
    columns = -(-s // tile.chunk)
    blocks = samples * -(-width // tile.rows)
    programs = per_sm * device.multiprocessors
    if over_samples and columns == 1:
        together = min(samples, _MOST_TILES, max(1, int(blocks // programs)))
        return ChannelWalk(tile, 1, together, stages if together > 1 else 1)
    # As many programs as are at work at once, if each has a tile, with shares as equal as they can be.
    shares = min(columns, max(-(-columns // _MOST_TILES), int(programs // blocks)))
    steps = -(-columns // shares)
    return ChannelWalk(tile, -(-columns // steps), 1, stages if steps > 1 else 1)


@functools.lru_cache(maxsize=1024)
def choose_whole(
    sets: int | None, runs: int, s: int, itemsize: int, tensors: int, over_samples: bool, plain: bool, device: Device
) -> ChannelWhole | ChannelHeld | ChannelSplit | None:
    """The launch of a pass whose programs, or teams, have whole statistics, of ``runs`` runs of s positions of so many
    tensors; None where there are too few statistics for the device. plain: there is no activation.

    For sets None, one for any number of statistics: that of many, but of those large enough for a team, of which few would
    take long by a program each, and many take two readings by either launch.
    """
    share = math.inf if sets is None else sets / device.multiprocessors
    enough = sets is None or share * _LEAST_SHARE >= 1
    if enough and (held := _held(runs, s, itemsize, tensors, over_samples, plain, device)) is not None:
        return held
    if (split := _split(runs, s, itemsize, plain, device)) is not None:
        return split
    if not enough or (sets is None and runs * s >= _SPLIT[-1]):
        return None
    small = runs * s <= _SMALL and share >= _WHOLE[0][0]
    of_share = next(shape for least, *shape in _WHOLE if share >= least)
    elements, warps = _SMALL_WHOLE if small else of_share
    tile, ragged = _tile_of_runs(runs, s, elements * 2 // max(2, itemsize))
    warps = min(warps, max(1, tile.rows * tile.chunk * itemsize // _LEAST_OF_WARP))
    return ChannelWhole(replace(tile, warps=warps), 3, ragged)


def _split(runs: int, s: int, itemsize: int, plain: bool, device: Device) -> ChannelSplit | None:
    """The launch whose teams hold their statistics; None where they are too small to be worth it, or too large."""
    elements, warps, registers, least = _SPLIT
    if not device.programs_wait or runs * s < least:
        return None
    for times in (1, 2, 4):
        tile, ragged = _tile_of_runs(runs, s, times * elements * 2 // max(2, itemsize))
        team = -(-runs // tile.rows) * -(-s // tile.chunk)
        if team <= min(32 * warps * times, device.multiprocessors // 2):
            # An activation's registers, and fp64's, spill where others fit.
            most = registers if plain and itemsize <= 4 else None
            return ChannelSplit(replace(tile, warps=warps * times), team, ragged, most)
    return None


def _held(
    runs: int, s: int, itemsize: int, tensors: int, over_samples: bool, plain: bool, device: Device
) -> ChannelHeld | None:
    """The launch whose programs hold their statistics; None where one is too large."""
    most, together, of_warp_apart, of_warp = _HELD[tensors]
    positions, rows = _power_of_two(s), _power_of_two(runs)
    if rows * positions * itemsize * tensors > most:
        return None
    apart = runs == 1 and not over_samples
    if apart:
        rows = max(1, together // (positions * itemsize))
    held = rows * positions * itemsize * tensors
    least, most_warps, registers = of_warp_apart if apart else of_warp, _HELD_WARPS, None
    if plain and not apart and itemsize <= 2 and s % 2 == 0 and device.programs_wait:
        if tensors == 1:
            registers = _HELD_REGISTERS
        else:
            least, most_warps, registers = _HELD_EVEN
    warps = min(most_warps, max(1, held // least))
    ragged = positions != s or rows != runs
    return ChannelHeld(Tile(rows, positions, warps), apart, ragged, registers)


def _tile_of_runs(runs: int, s: int, elements: int) -> tuple[Tile, bool]:
    """A tile of at most so many elements of a statistic, and whether some lanes have none. Tiles divide what they tile,
    where there are such of some length: what is ragged is idle, and counted.
    """
    even = s & -s
    positions = min(even if even >= _RUN else _power_of_two(s), elements)
    rows = min(elements // positions, _power_of_two(runs))
    if rows > 1 and (runs & -runs) * 4 >= rows:
        rows = min(rows, runs & -runs)
    return Tile(rows, positions, 1), s % positions != 0 or runs % rows != 0


def choose_combine(d: int, parts: int | None) -> ChannelCombine:
    """The combining of statistics of d channels each, of so many parts of each channel, side by side or one all along; for
    parts None, one for any number of parts.
    """
    sets, bits = 4 if d == 1 else 1, (d - 1).bit_length()
    most = _COMBINED // sets
    partials = most + 1 if parts is None else parts << bits
    k = max(_OF_COMBINING_WARP // sets, min(_power_of_two(partials), most))
    return ChannelCombine(bits, k, sets, partials <= k, min(_COMBINING_WARPS, k * sets // _OF_COMBINING_WARP))


@functools.lru_cache(maxsize=1024)
def choose_layer_forward(m: int | None, c: int, unit: int, itemsize: int, device: Device) -> ChannelLayer:
    """The launch of LayerNorm over c channels at m positions; for m None, one for any number of them. unit: how many of
    those surely lie together, up to 16.
    """
    return _layer(m, c, unit, itemsize, 1, itemsize, device)


@functools.lru_cache(maxsize=1024)
def choose_layer_backward(m: int | None, c: int, unit: int, itemsize: int, device: Device) -> ChannelLayer:
    """The same of its backward."""
    sums = 2 * max(4, itemsize) // min(unit, _WIDE // itemsize)
    plan = _layer(m, c, unit, itemsize, 2, 2 * itemsize + sums, device)
    if not plan.held:
        return plan
    # Two tiles are on their way while one is computed, where there is room beside what the loop shares at the most.
    per_sm, chunk = max(1, _LAYER_WARPS // plan.tile.warps), plan.tile.rows * plan.tile.chunk
    shared = device.shared // per_sm - device.shared_reserved - 2 * chunk * max(4, itemsize)
    ahead = shared // (2 * -(-c // plan.tile.chunk) * chunk * itemsize)
    return replace(plan, stages=1 + max(0, min(2, ahead)), per_sm=per_sm)


def _layer(m: int | None, c: int, unit: int, itemsize: int, tensors: int, held: int, device: Device) -> ChannelLayer:
    """held: bytes that an element takes of a thread."""
    elements, run, most, of_thread, of_chunk = _LAYER[tensors]
    least = _LAYER_RUN // itemsize
    rows = min(_MOST_LAYER_ROWS, max(least, _power_of_two(elements * 2 // itemsize // c + 1) // 2))
    while m is not None and rows * itemsize > _LAYER_RUN_OF_FEW and -(-m // rows) < device.multiprocessors:
        rows //= 2
    while rows * itemsize > run and rows * c * held > most:
        rows //= 2
    if rows * c * held > most:
        elements, warps, stages, per_sm = _LAYER_STREAMED
        tile = Tile(least, elements * 2 // itemsize // least, warps)
        return ChannelLayer(tile, False, min(unit, _WIDE // itemsize), stages, per_sm)
    lanes = 32 if device.programs_wait else 64  # AMD's
    threads = max(lanes, min(_MOST_LAYER_THREADS, _power_of_two(rows * c * held // of_thread + 1) // 2))
    chunk = max(1, min(_power_of_two(c), threads * of_chunk // itemsize // rows))
    return ChannelLayer(Tile(rows, chunk, threads // lanes), True, min(unit, _WIDE // itemsize))


@functools.lru_cache(maxsize=1024)
def _tile(width: int, s: int, itemsize: int, last: bool, elements: int, warps: int) -> Tile:
    elements = elements * 2 // max(2, itemsize)
    if last:
        rows = min(_power_of_two(width), _CHANNELS if width % (2 * _CHANNELS) else 2 * _CHANNELS)
        return Tile(rows, min(_power_of_two(s), elements // rows), warps)
    chunk = min(_power_of_two(s), _POSITIONS, elements)
    return Tile(min(_power_of_two(width), elements // chunk), chunk, warps)


def _power_of_two(n: int) -> int:
    """The least that is >= n."""
    return 1 << (n - 1).bit_length()
