"""Which launch each problem of the row family gets.

Every figure is device time on an H200 (bf16 in and out), as a ratio to the copy (forward) or the add (backward) of the
same run; it stands beside the row that it decided. N counts elements; another dtype takes the row of its own N, as far as
its rows can be held. docs/performance.md has the runs. Other GPUs get the same launches, with as many programs and stages
as they have room for (``_fitted``), and what is large by their own L2 (``_large_from``).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TypeVar

from ..launch import Device
from ..spec import RowNorm
from .kinds import (
    RowBackward,
    RowBackwardFew,
    RowBackwardSplit,
    RowBackwardWide,
    RowForward,
    RowForwardSplit,
    RowForwardWide,
    Tile,
)

# --- forward ---

# (N up to, LayerNorm: tile and how many at once, RMSNorm: the same)           ratio to the copy: LayerNorm, RMSNorm
_FORWARD: tuple[tuple[int, tuple[Tile, int], tuple[Tile, int]], ...] = (
    (64, (Tile(32, 64, 4), 2), (Tile(32, 64, 4), 1)),  #                       0.97, 1.00
    (128, (Tile(8, 128, 4), 4), (Tile(16, 128, 4), 1)),  #                     0.98, 0.99
    (256, (Tile(4, 256, 4), 4), (Tile(8, 256, 4), 1)),  #                      0.97, 0.99
    (768, (Tile(4, 256, 4), 1), (Tile(4, 256, 4), 1)),  #                      1.02, 1.01
    (1024, (Tile(4, 256, 4), 1), (Tile(2, 512, 4), 1)),  #                     1.00, 1.00
    (3072, (Tile(1, 1024, 4), 1), (Tile(1, 1024, 4), 1)),  #                   2048: 0.98, 1.00; 3072: 0.94, 0.98
    (4096, (Tile(1, 2048, 8), 1), (Tile(1, 1024, 8), 1)),  #                   0.96, 1.00
    (7168, (Tile(1, 1024, 8), 1), (Tile(1, 1024, 8), 1)),  #                   5120: 0.95, 1.01; 7168: 0.97, 1.01
    (8192, (Tile(1, 2048, 8), 1), (Tile(1, 1024, 8), 1)),  #                   0.97, 0.99
    (12288, (Tile(1, 2048, 8), 1), (Tile(1, 4096, 16), 1)),  #                 0.95, 0.94
    (16384, (Tile(1, 4096, 16), 1), (Tile(1, 2048, 16), 1)),  #                0.94, 0.98
)

# Of many rows, where a program of the table above holds much of a row's last chunk for nothing, or another is better:
# (N from, N up to, LayerNorm: tile and how many at once, RMSNorm: the same)        ratio to the copy by that above, by this
_FORWARD_BETWEEN: tuple[tuple[int, int, tuple[Tile, int] | None, tuple[Tile, int] | None], ...] = (
    (1025, 1280, (Tile(1, 256, 2), 2), (Tile(2, 512, 4), 1)),  #   1152: LayerNorm 0.75, 0.99; RMSNorm 0.89, 1.01
    (2049, 2304, (Tile(1, 512, 4), 1), None),  #                   2304: 0.93, 0.97
    (5121, 5376, (Tile(1, 2048, 4), 1), None),  #                  5376: 0.94, 0.97
    (5377, 6144, (Tile(1, 2048, 8), 1), None),  #                  6144: 0.97, 0.99
)

# What a program can hold of a row in registers.
_HELD_BYTES = 64 << 10

# Rows of a large problem pass through L2 from this length on (LayerNorm at 8192 columns 0.98 against 0.97, at 2048 0.99
# against 0.96); narrow rows do not (LayerNorm at 128 columns: 0.97 not, 0.93 so).
_STREAM_COLUMNS = 2048

# With fewer rows than this to a multiprocessor, a program takes one (LayerNorm at 128x768: 1.20 µs against 1.40), or so
# many that its warp has this many elements (H100, LayerNorm and RMSNorm at 128x64: 4 rows 0.85 and 0.79 µs, 1 row 0.98 and
# 0.90).
_SCARCE_ROWS = 4
_LEAST_OF_WARP = 256

# Of many programs with less to do than this, warps for each tile, those put on the device early take places from the last
# ones of the kernel ahead (32768x1024 by programs of 2 warps: 41 µs against 35; by programs of 4 it gains, 33 against 34,
# and by 2 warps that take two tiles: LayerNorm 32768x1152 37 against 40).
_EARLY_WARPS = 4

# Rows split over a team, LayerNorm's and RMSNorm's: the first that fits of those for rows up to so long. A block of wider
# elements than 2 bytes has fewer of them.
_FORWARD_SPLIT: tuple[tuple[int, RowForwardSplit, RowForwardSplit], ...] = (
    # 32768, 65536, 131072 columns: LayerNorm 0.89, 0.87, 0.84; RMSNorm 0.96, 0.96, 0.93
    (131072, RowForwardSplit(Tile(1, 1024, 4), 4096), RowForwardSplit(Tile(1, 1024, 4), 4096)),
    (262144, RowForwardSplit(Tile(1, 1024, 4), 4096), RowForwardSplit(Tile(1, 2048, 8), 8192)),  # 0.78; 0.91
    (1 << 20, RowForwardSplit(Tile(1, 2048, 8), 8192), RowForwardSplit(Tile(1, 2048, 8), 8192)),
)

# Rows that no program holds and no team shares: LayerNorm 0.82 at 32768 columns, 0.75 at 65536; RMSNorm 0.94, 0.86.
_FORWARD_WIDE = (RowForwardWide(Tile(1, 4096, 16)), RowForwardWide(Tile(1, 8192, 32)))


# Few rows of 1025 to so many columns, LayerNorm's and RMSNorm's, have their moments merged, by tiles that give each lane
# its eight neighbours. On an H100, µs in a chain, by what was there and merged: RMSNorm 1x4096 1.19 → 1.23, 16 rows 1.27 →
# 1.27, 64 1.44 → 1.28, 256 2.15 → 1.79; 64x8192 1.70 → 1.64, 64x12288 2.10 → 1.98 (64x16384 2.44 → 2.55); LayerNorm 64x8192
# 2.08 → 1.90, 256x12288 4.13 → 4.53. Of 1024 columns, by 4 warps for 2, RMSNorm's 16 rows 0.97 → 0.86, 256 1.22 → 1.32.
_PAIRWISE = 8192, 12288
_PAIRWISE_OF_WARP = 256

# (N up to, so many rows): more of them let the next kernel on behind x, and not behind w and b. 2048 columns, rows for rows
# by the two, late first: RMSNorm 16 0.95, 1.23, 64 1.07, 1.26, 256 1.39, 1.34; LayerNorm 16 1.15, 1.26, 256 1.82, 1.51.
# 4096: RMSNorm 1 row 1.40, 1.23, 64 1.44, 1.28, 256 2.20, 1.79.
_MANY = (3072, 64), (1 << 20, 0)

# RMSNorm's tile of few rows of so many columns of 16-bit numbers, where another is better than that of many. On an H100, µs
# in a chain, by that of many: 16x4096 1.54, 256 rows 2.31; 64x5120 1.64, merged by this one 1.41.
_FEW_RMS = {4096: Tile(1, 2048, 8), 5120: Tile(1, 1024, 4), 8192: Tile(1, 4096, 16)}


def choose_forward(
    spec: RowNorm, m: int | None, n: int, itemsize: int, device: Device
) -> RowForward | RowForwardSplit | RowForwardWide:
    """The forward's launch for m rows of n elements of ``itemsize`` bytes; for m None, one for any number of rows."""
    scarce_below, large_from = forward_turns(n, itemsize, device)
    return _choose_forward(spec, n, itemsize, device, m is not None and m < scarce_below, m is None or m >= large_from)


def forward_turns(n: int, itemsize: int, device: Device) -> tuple[int, int]:
    """From how many rows on the forward's launch changes: those are not scarce, and those are large."""
    return _SCARCE_ROWS * device.multiprocessors, _large_from(2 * n * itemsize, device)


@functools.lru_cache(maxsize=1024)
def _choose_forward(
    spec: RowNorm, n: int, itemsize: int, device: Device, scarce: bool, large: bool
) -> RowForward | RowForwardSplit | RowForwardWide:
    if n > _FORWARD[-1][0] or n * itemsize > _HELD_BYTES:
        return _first_split(_FORWARD_SPLIT, spec, n, itemsize, device) or _FORWARD_WIDE[_column(spec)]
    tile, tiles = next(row[1:][_column(spec)] for row in _FORWARD if n <= row[0])
    if scarce:
        tile, tiles = (None if spec.center or itemsize > 2 else _FEW_RMS.get(n)) or _of_few_rows(tile), 1
    elif itemsize < 8:  # fp64 has two registers
        tile, tiles = _between(_FORWARD_BETWEEN, spec, n) or (tile, tiles)
    stream = large and n >= _STREAM_COLUMNS
    # Asking early for w and b hides their latency (128x768: LayerNorm 1.78 µs against 2.04), but of long rows LayerNorm's
    # registers then cost occupancy where that counts (8192x8192: 0.98 against 0.73), and RMSNorm's of the longest that a
    # program holds (fp32, 4096x16384: 0.96 against 0.90).
    preload = not (stream and (spec.center or n * itemsize >= _HELD_BYTES))
    early = scarce or tile.warps * tiles >= _EARLY_WARPS
    pairwise = scarce and 1024 < n <= _PAIRWISE[_column(spec)] and tile.chunk == tile.warps * _PAIRWISE_OF_WARP
    many = next(rows for most, rows in _MANY if n <= most)
    return RowForward(_narrowed(tile, n), tiles, stream, preload, early, pairwise, many)


# --- backward ---

# (N up to, LayerNorm: tile, how many at once, stages, programs per multiprocessor; RMSNorm: the same)
_BACKWARD: tuple[tuple[int, tuple[Tile, int, int, int] | None, tuple[Tile, int, int, int]], ...] = (
    #                                                                              ratio to the add: LayerNorm, RMSNorm
    (64, (Tile(32, 64, 8), 2, 3, 2), (Tile(32, 64, 8), 4, 3, 1)),  #               0.84, 0.86
    (128, (Tile(16, 128, 8), 2, 3, 2), (Tile(64, 128, 16), 1, 3, 1)),  #           0.90, 0.92
    (256, (Tile(8, 256, 8), 2, 3, 2), (Tile(16, 256, 16), 2, 3, 1)),  #            0.90, 0.92
    (768, (Tile(4, 256, 4), 1, 3, 3), (Tile(8, 256, 8), 1, 3, 1)),  #              0.81, 0.84
    (1024, (Tile(4, 512, 8), 1, 3, 2), (Tile(4, 512, 8), 2, 3, 1)),  #             0.90, 0.91
    (2048, (Tile(4, 512, 8), 1, 3, 1), (Tile(4, 512, 8), 1, 3, 1)),  #             0.89, 0.91
    (3072, (Tile(1, 1024, 4), 1, 3, 3), (Tile(4, 512, 8), 1, 3, 1)),  #            0.83, 0.88
    (4096, (Tile(2, 1024, 8), 1, 3, 1), (Tile(2, 2048, 16), 1, 3, 1)),  #          0.87, 0.91
    (5120, (Tile(2, 1024, 8), 1, 3, 1), (Tile(2, 1024, 8), 1, 3, 1)),  #           0.88, 0.91
    (7168, (Tile(1, 2048, 8), 1, 4, 1), (Tile(1, 2048, 8), 1, 3, 1)),  #           0.88, 0.88
    (12288, (Tile(1, 2048, 8), 1, 3, 1), (Tile(1, 2048, 8), 1, 3, 1)),  #          8192: 0.89, 0.93
    (16384, None, (Tile(1, 4096, 16), 1, 3, 1)),  #                                0.47 (so: split or wide), 0.71
)  # 12288: 0.82, 0.84

# As forward, of 16 bits: by more bytes or with a sum's gradient 1152 columns would spill 16 to 304 bytes. Where memory is
# slower (below) they were not tried; by those above an H100 has 0.86 to 1.03.
_BACKWARD_BETWEEN: tuple[tuple[int, int, tuple[Tile, int, int, int] | None, tuple[Tile, int, int, int]], ...] = (
    #                                                                              ratio to the add by that above, by this
    (1025, 1280, (Tile(8, 256, 8), 1, 3, 1), (Tile(8, 256, 8), 1, 3, 1)),  #       1152: 0.75, 0.89; RMSNorm 0.78, 0.91
    (2049, 2304, None, (Tile(2, 1024, 8), 2, 3, 1)),  #                            2304: 0.72, 0.90
    (5121, 5376, None, (Tile(1, 8192, 8), 1, 4, 1)),  #                            5376: 0.67, 0.92
    (5377, 6144, None, (Tile(2, 2048, 16), 1, 3, 2)),  #                           6144: 0.73, 0.85
)

# Of these rows of the table, where memory is slower than this. On an H100 (3.35 TB/s, an H200 has 4.9) by the launch above,
# then by this one; on an H200 those of 768, 1024 and 3072 columns were 1 to 5% slower (2026-11-22).
_SLOW_MEMORY = 4e12
_BACKWARD_SLOW_MEMORY = {
    (768, True): (Tile(4, 256, 8), 1, 3, 2),  #   0.86, 0.88
    (1024, True): (Tile(8, 256, 8), 1, 3, 1),  #  0.87, 0.92
    (3072, True): (Tile(2, 1024, 8), 1, 3, 1),  #  0.84, 0.91
    (3072, False): (Tile(2, 1024, 8), 1, 3, 1),  # 0.90, 0.93
    (5120, True): (Tile(2, 1024, 16), 1, 3, 1),  #  0.86, 0.88
    (5120, False): (Tile(2, 1024, 16), 1, 3, 1),  # 0.88, 0.92
}

# fp64 takes twice the registers of every accumulator, so that it has a launch of its own, up to this many elements.
_HELD_FP64 = 2048
_BACKWARD_FP64 = Tile(2, 1024, 8), 1, 3, 1

# Besides its stages a loop shares sums of a row between warps, and what it writes where that is not aligned: at the most.
# (Sums over rows come after the loop, in the stages' place.) And a mean or an rstd.
_SUMS_BYTES = 512
_UNALIGNED_BYTES = 16 << 10
_STATISTIC_BYTES = 8

# One launch beats two until the columns' second reading outweighs a launch: 256x4096 5.3 µs against 11.8, 2048x4096 34
# against 22. Up to so many rows: the rows of the columns' tile, which should be about as many (128x768 2.7 µs with 128,
# 3.4 with 32; 16x4096 2.4 with 32).
_FEW_ROWS = {64: 32, 512: 128}

# With fewer warps the columns' tile of 128 rows spills.
_FEW_WARPS = 4

# Longer rows are split if they can be, and held if they cannot (RMSNorm at 16384 columns: 0.90 split, 0.72 held).
_SPLIT_ABOVE = 12288

# Rows split over a team, as forward.
_BACKWARD_SPLIT: tuple[tuple[int, RowBackwardSplit, RowBackwardSplit], ...] = (
    # 16384, 32768, 65536, 131072 columns: LayerNorm by blocks of 4096 and 4 stages 0.78, 0.78, 0.75, 0.72; RMSNorm 0.90,
    # 0.89, 0.87, 0.83. On an H100 LayerNorm so 0.907, 0.904, 0.882, 0.853; with 3 stages 0.910, 0.907, 0.884, 0.858; by
    # blocks of 2048 and 3 stages 0.920, 0.915, 0.894, 0.835.
    (65536, RowBackwardSplit(Tile(1, 1024, 4), 2048, 3, 4), RowBackwardSplit(Tile(1, 1024, 4), 2048, 3, 5, registers=96)),
    (131072, RowBackwardSplit(Tile(1, 1024, 4), 4096, 3, 2), RowBackwardSplit(Tile(1, 1024, 4), 2048, 3, 5, registers=96)),
    (1 << 20, RowBackwardSplit(Tile(1, 2048, 8), 8192, 3, 1), RowBackwardSplit(Tile(1, 2048, 8), 8192, 3, 1)),
    # 262144 columns: 0.62; 0.71
)

# Of sums, whose own gradient is a third tensor to be read: LayerNorm's more registers would cost programs at work. On an
# H100, ratios to torch.addcmul, by the launch of two tensors and by this one: 768 columns 0.83 → 0.89 (RMSNorm's 0.89 →
# 0.91); 16384 and 65536 0.78, 0.75 → 0.94, 0.93 by 128 registers (3 programs for 4 0.93, 0.92; 5 at 96 registers 0.66).
# On an H200 LayerNorm's 1024 columns 0.83 → 0.91 (8 rows by 8 warps 0.91, 4 rows in chunks of 512 0.90).
_BACKWARD_OF_SUMS = {
    (768, True): (Tile(8, 256, 8), 1, 3, 1),
    (768, False): (Tile(8, 256, 8), 1, 3, 1),
    (1024, True): (Tile(4, 256, 4), 1, 3, 2),
}
_BACKWARD_SPLIT_OF_SUMS = (
    (65536, RowBackwardSplit(Tile(1, 1024, 4), 2048, 3, 4, registers=128), _BACKWARD_SPLIT[0][2]),
    *_BACKWARD_SPLIT[1:],
)

# Rows that no program holds and no team shares: LayerNorm 0.55 at 16384 columns, 0.53 at 65536; RMSNorm 0.56 at 65536.
_BACKWARD_WIDE = RowBackwardWide(Tile(1, 2048, 8), 3, 4)

# The last step over the partials of up to so many programs; of more, the last tile. On an H100, the whole backward's time
# by the tile before it, of 128, 256 or 512 rows and 32 columns, over that by this one: of 4 partials (LayerNorm's 262144
# columns) 1.12, of 8 1.06, of 10 and 16 1.02, of 33 to 82 up to 1.01, of 264 and 396 1.00 to 1.04. A tile that is taller
# than there are partials adds up what is masked; and wide tiles are few programs, each with a long wait.
_TOTAL = ((8, Tile(4, 512, 4)), (16, Tile(8, 256, 4)), (32, Tile(16, 64, 2)), (128, Tile(64, 32, 4)))
_TOTAL_OF_MANY = Tile(128, 16, 8)


def choose_backward(
    spec: RowNorm, m: int | None, n: int, itemsize: int, device: Device, tensors: int = 2
) -> RowBackward | RowBackwardFew | RowBackwardSplit | RowBackwardWide:
    """The backward's launch for m rows of n elements of ``itemsize`` bytes; for m None, one for any number of rows.
    tensors: how many of x's size are read.
    """
    *_, large_from = backward_turns(n, itemsize, device)
    few = next((rows for rows in _FEW_ROWS if m is not None and m <= rows), None)
    return _choose_backward(spec, n, itemsize, device, few, m is None or m >= large_from, tensors)


def backward_turns(n: int, itemsize: int, device: Device) -> tuple[int, ...]:
    """From how many rows on the backward's launch changes; the last: from how many on they are large."""
    return *(rows + 1 for rows in _FEW_ROWS), _large_from(3 * n * itemsize, device)


@functools.lru_cache(maxsize=1024)
def _choose_backward(
    spec: RowNorm, n: int, itemsize: int, device: Device, few: int | None, stream: bool, tensors: int
) -> RowBackward | RowBackwardFew | RowBackwardSplit | RowBackwardWide:
    of_sums = tensors > 2
    table = _BACKWARD_SPLIT_OF_SUMS if of_sums else _BACKWARD_SPLIT
    if n > _SPLIT_ABOVE and (split := _first_split(table, spec, n, itemsize, device)):
        return _fitted(split, n, itemsize, device, tensors)
    most, held = next(((row[0], row[1:][_column(spec)]) for row in _BACKWARD if n <= row[0]), (n, None))
    if held is None or (itemsize == 8 and n > _HELD_FP64):
        return _fitted(_BACKWARD_WIDE, n, itemsize, device, tensors)
    if few is not None:
        tile, _ = next(row[1] for row in _FORWARD if n <= row[0])
        tile = _narrowed(_with_warps(tile, max(tile.warps, _FEW_WARPS)), n)
        return RowBackwardFew(tile, sums=Tile(_FEW_ROWS[few] // (2 if itemsize == 8 else 1), 32, tile.warps))
    if of_sums:
        held = _BACKWARD_OF_SUMS.get((n, spec.center), held)
    elif device.memory < _SLOW_MEMORY:
        held = _BACKWARD_SLOW_MEMORY.get((most, spec.center), held)
    elif itemsize == 2:
        held = _between(_BACKWARD_BETWEEN, spec, n) or held
    tile, tiles, stages, per_sm = _BACKWARD_FP64 if itemsize == 8 else held
    return _fitted(RowBackward(_narrowed(tile, n), tiles, stages, per_sm, stream), n, itemsize, device, tensors)


P = TypeVar("P", RowBackward, RowBackwardSplit, RowBackwardWide)


def _fitted(wish: P, n: int, itemsize: int, device: Device, tensors: int) -> P:
    """The launch with as many programs, and then stages, as a multiprocessor has room for at once.

    All stages but one of x, dy, a sum's gradient, mean and rstd wait in shared memory; where they do not fit, loads go to
    registers.
    """
    per_sm = min(wish.per_sm, device.warps // wish.tile.warps)
    besides = _SUMS_BYTES if n * itemsize % 16 == 0 else _UNALIGNED_BYTES
    room = device.shared // per_sm - device.shared_reserved - besides
    rows, columns = wish.stage(n)
    stage_bytes = rows * (tensors * columns * itemsize + 2 * _STATISTIC_BYTES)
    # Not 2 stages in place of more: they are often worse than 1 (kernels/row_backward.py).
    stages = next((stages for stages in (wish.stages, 3) if (stages - 1) * stage_bytes <= room), 1)
    return dataclasses.replace(wish, stages=stages, per_sm=per_sm)


def choose_total(programs: int) -> Tile:
    """The last step over the partials of so many programs."""
    return next((tile for most, tile in _TOTAL if programs <= most), _TOTAL_OF_MANY)


# --- both ---

# Making a team's words none.
FORGET = Tile(1, 1024, 4)


def _large_from(row_bytes: int, device: Device) -> int:
    """How many rows it takes until nothing stays in L2 for the next op anyway: over 32 of an H200's 60 MB, of
    ``row_bytes`` read and written for each.
    """
    return 8 * device.l2 // (15 * max(1, row_bytes)) + 1


# Of a tile: the backward by 2048 rows of one element took 105 s to compile, by 512 4 s, by 256 1.6.
_MOST_ROWS = 256

S = TypeVar("S", RowForwardSplit, RowBackwardSplit)


def _first_split(table: tuple[tuple[int, S, S], ...], spec: RowNorm, n: int, itemsize: int, device: Device) -> S | None:
    """The first that can split rows of n: into whole blocks, a thread for each of the team; two teams fit the device."""
    if not device.programs_wait or itemsize > 4:
        return None
    for most, of_layer_norm, of_rms_norm in table:
        split = (of_layer_norm, of_rms_norm)[_column(spec)]
        fitted = dataclasses.replace(split, block=max(split.tile.chunk, split.block * 2 // itemsize))
        team = n / fitted.block
        if n <= most and team.is_integer() and team <= min(32 * split.tile.warps, device.multiprocessors // 2):
            return fitted
    return None


def _column(spec: RowNorm) -> int:
    """Where a table has this spec's launches: LayerNorm's first."""
    return 0 if spec.center else 1


H = TypeVar("H")


def _between(table: tuple[tuple[int, int, H | None, H | None], ...], spec: RowNorm, n: int) -> H | None:
    """What the table has for rows of n elements, where it has anything."""
    return next((row[2:][_column(spec)] for row in table if row[0] <= n <= row[1]), None)


def _of_few_rows(tile: Tile) -> Tile:
    """The tile of one row, by as many fewer warps; of more where a row is less than a warp's work."""
    return Tile(max(1, min(tile.rows, _LEAST_OF_WARP // tile.chunk)), tile.chunk, max(1, tile.warps // tile.rows))


def _with_warps(tile: Tile, warps: int) -> Tile:
    """The tile by more warps, with as many times the rows."""
    return Tile(tile.rows * warps // tile.warps, tile.chunk, warps)


def _narrowed(tile: Tile, n: int) -> Tile:
    """The tile with its chunk no wider than n needs, and as many more rows, up to _MOST_ROWS."""
    chunk = min(tile.chunk, 1 << (n - 1).bit_length())
    return Tile(max(tile.rows, min(tile.rows * tile.chunk // chunk, _MOST_ROWS)), chunk, tile.warps)
