"""Which launch each problem of the channel family gets: the tiles of each pass, and how far a program walks.

Sizes are those of the view that a pass has of x (kernels/channel_tiles.py). Nothing here is measured yet but that tiles of
2048 to 4096 elements by 4 warps reach .62 to .64 of the copy in three launches (H200, bf16, 42 to 268 MB).
"""

from __future__ import annotations

import functools

from ..launch import Device
from .kinds import ChannelCombine, ChannelWalk, ChannelWhole, Tile

# Elements of a tile of 2-byte numbers, and its warps: of a pass with accumulators in registers, and of one without.
_WALK = (2048, 4)
_APPLY = (4096, 4)

# Positions of a tile, channels first: no more than these, as what is ragged at a channel's end is idle.
_POSITIONS = 1024

# Channels of a tile, channels last: a line of memory of 2-byte numbers.
_CHANNELS = 64

# Programs of a walking pass that a multiprocessor is to have before one takes more than a tile; and the most that it takes,
# as a lane's sums are one after the other.
_WALKING = 16
_MOST_TILES = 32


# Of a pass whose programs have a statistic each: (statistics to a multiprocessor from, elements of a tile, warps). µs of
# forward and backward on an H200, bf16, of a sweep of 14: GroupNorm 16x320x64x64 31.7, 52.2 (2048 by 4 warps: 38.1, 53.3)
# and BatchNorm 256x512x2048 390, 620; GroupNorm 8x640x32x32 11.4, 16.7 and BatchNorm 64x256x56x56 94.8, 131.9 (by 4 warps:
# 12.5 or more, 15.8; 99.4, 142.5); GroupNorm 4x512x128x128 58.9, 83.5 (by 16 warps: 60.1, 84.8).
_WHOLE = ((3, 4096, 4), (1.5, 4096, 8), (0, 8192, 8))

# Statistics of no more elements than this go by single warps: InstanceNorm 64x256x1024 30.2, 32.9 (by 4: 124.5, 56.2);
# BatchNorm 32x1024x14x14 18.6, 19.2 or more (of 2048 by 4: 26.8, 20.1).
_SMALL = 8192
_SMALL_WHOLE = (1024, 1)

# The share of the multiprocessors, 1 over this, that statistics should keep at work.
_LEAST_SHARE = 2

# Bytes of a tile for each of its warps, at least.
_LEAST_OF_WARP = 1024

# Positions that lie together in a tile, at least: 128 bytes of 2-byte numbers.
_RUN = 64


def choose_apply(width: int, s: int, itemsize: int, last: bool) -> Tile:
    """The tile of a pass whose programs have one each, over samples of ``width`` channels by s positions."""
    return _tile(width, s, itemsize, last, *_APPLY)


@functools.lru_cache(maxsize=1024)
def choose_walk(
    samples: int, width: int, s: int, itemsize: int, last: bool, over_samples: bool, device: Device
) -> ChannelWalk:
    """The launch of a pass that sums. over_samples: a program may walk through them, if a tile has all positions."""
    tile = _tile(width, s, itemsize, last, *_WALK)
    columns = -(-s // tile.chunk)
    tiles = samples * -(-width // tile.rows) * columns
    steps = max(1, min(_MOST_TILES, tiles // (_WALKING * device.multiprocessors)))
    if over_samples and columns == 1:
        return ChannelWalk(tile, tile.chunk, min(steps, samples))
    return ChannelWalk(tile, tile.chunk * min(steps, columns), 1)


@functools.lru_cache(maxsize=1024)
def choose_whole(sets: int, runs: int, s: int, itemsize: int, device: Device) -> ChannelWhole | None:
    """The launch of a pass whose programs have a statistic each, of ``runs`` runs of s positions; None where there are too
    few statistics for the device.
    """
    if sets * _LEAST_SHARE < device.multiprocessors:
        return None
    small = runs * s <= _SMALL and sets >= _WHOLE[0][0] * device.multiprocessors
    of_share = next(shape for share, *shape in _WHOLE if sets >= share * device.multiprocessors)
    elements, warps = _SMALL_WHOLE if small else of_share
    elements = elements * 2 // max(2, itemsize)
    # Tiles that divide what they tile, where there are such of some length: what is ragged is idle, and counted.
    even = s & -s
    positions = min(even if even >= _RUN else _power_of_two(s), elements)
    rows = min(elements // positions, _power_of_two(runs))
    if rows > 1 and (runs & -runs) * 4 >= rows:
        rows = min(rows, runs & -runs)
    warps = min(warps, max(1, rows * positions * itemsize // _LEAST_OF_WARP))
    return ChannelWhole(Tile(rows, positions, warps), 3, ragged=s % positions != 0 or runs % rows != 0)


def choose_combine(d: int) -> ChannelCombine:
    """The combining of partials into statistics of d channels each: side by side, or, of one statistic, all along."""
    return ChannelCombine(128, 8, 4) if d == 1 else ChannelCombine(1024, 1, 4)


@functools.lru_cache(maxsize=1024)
def _tile(width: int, s: int, itemsize: int, last: bool, elements: int, warps: int) -> Tile:
    elements = elements * 2 // max(2, itemsize)
    if last:
        rows = min(_power_of_two(width), _CHANNELS)
        return Tile(rows, min(_power_of_two(s), elements // rows), warps)
    chunk = min(_power_of_two(s), _POSITIONS, elements)
    return Tile(min(_power_of_two(width), elements // chunk), chunk, warps)


def _power_of_two(n: int) -> int:
    """The least that is >= n."""
    return 1 << (n - 1).bit_length()
