"""Launches of the row family.

Every figure is device time on an H200 (bf16 in and out), as a ratio to the copy (forward) or the add (backward) of the
same run; it stands beside the row that it decided. N counts elements; another dtype takes the row of its own N, as far as
its rows can be held.

The sweeps behind them came before a row's mean was corrected for its own rounding (stats.settled), which costs LayerNorm
where rows are short: at 128 columns 0.85 since, for the 0.91 below.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ..launch import Device
from ..spec import RowNorm


@dataclass(frozen=True)
class Tile:
    """``rows`` rows at a time, in chunks of ``chunk`` columns, by ``warps`` warps."""

    rows: int
    chunk: int
    warps: int


@dataclass(frozen=True)
class RowForward:
    """A program holds a tile of whole rows.

    stream: x and y pass through L2 without staying. preload: w and b are asked for together with x.
    """

    tile: Tile
    stream: bool
    preload: bool


@dataclass(frozen=True)
class RowForwardWide:
    """A program reads its one row twice."""

    tile: Tile


@dataclass(frozen=True)
class RowBackward:
    """Persistent programs, ``per_sm`` on each multiprocessor, walk tiles of whole rows ``stages`` deep."""

    tile: Tile
    stages: int
    per_sm: int
    stream: bool

    def programs(self, m: int, n: int, device: Device) -> int:
        """How many programs share m rows."""
        return min(-(-m // self.tile.rows), self.per_sm * device.multiprocessors)


@dataclass(frozen=True)
class RowBackwardFew:
    """One launch: ``tile`` of whole rows for dx, ``sums`` of columns for dw and db. Both have the tile's warps."""

    tile: Tile
    sums: Tile


@dataclass(frozen=True)
class RowBackwardWide:
    """Moments of each row, then single rows in chunks of columns, ``per_sm`` programs on each multiprocessor."""

    tile: Tile
    stages: int
    per_sm: int

    def programs(self, m: int, n: int, device: Device) -> int:
        """How many programs share m rows of each chunk of columns."""
        chunks = -(-n // self.tile.chunk)
        return max(1, min(m, self.per_sm * device.multiprocessors // chunks))


# (N up to, LayerNorm's tile, RMSNorm's tile)                  ratio to the copy: LayerNorm, RMSNorm
_FORWARD: tuple[tuple[int, Tile, Tile], ...] = (
    (64, Tile(16, 64, 1), Tile(16, 64, 2)),  #                 0.87, 0.94
    (128, Tile(8, 128, 1), Tile(16, 128, 4)),  #               0.91, 0.98
    (256, Tile(4, 256, 1), Tile(8, 256, 4)),  #                0.92, 0.99
    (768, Tile(4, 256, 4), Tile(4, 256, 4)),  #                0.94, 1.01
    (1024, Tile(1, 512, 2), Tile(1, 512, 2)),  #               0.98, 1.00
    (3072, Tile(1, 1024, 4), Tile(1, 1024, 4)),  #             2048: 0.99, 1.00; 3072: 0.97, 0.99
    (4096, Tile(1, 512, 4), Tile(1, 1024, 8)),  #              0.96, 1.00 (one chunk wider: 0.95, 0.98)
    (7168, Tile(1, 1024, 8), Tile(1, 1024, 8)),  #             5120: 0.95, 1.00; 7168: 0.96, 0.99
    (8192, Tile(1, 2048, 8), Tile(1, 2048, 8)),  #             0.98, 0.98
    (12288, Tile(1, 2048, 8), Tile(1, 4096, 16)),  #           0.95, 0.98
    (16384, Tile(1, 4096, 16), Tile(1, 4096, 16)),  #          0.95, 0.99
)

# Rows that no tile holds: 0.82, 0.94 at 32768 columns (held: 0.81, 0.93), 0.75, 0.86 at 65536.
_FORWARD_WIDE = (Tile(1, 4096, 16), Tile(1, 8192, 32))

# Above this much of x and y, half of an H200's L2, nothing stays there for the next op anyway.
_STREAM_BYTES = 32 << 20

# What a program can hold of a row in registers, forward.
_HELD_BYTES = 64 << 10


def choose_forward(spec: RowNorm, m: int, n: int, itemsize: int) -> RowForward | RowForwardWide:
    """The forward's launch for m rows of n elements of ``itemsize`` bytes."""
    return _choose_forward(spec, n, itemsize, 2 * m * n * itemsize > _STREAM_BYTES)


@functools.lru_cache(maxsize=1024)
def _choose_forward(spec: RowNorm, n: int, itemsize: int, stream: bool) -> RowForward | RowForwardWide:
    if n > _FORWARD[-1][0] or n * itemsize > _HELD_BYTES:
        return RowForwardWide(_FORWARD_WIDE[0 if spec.center else 1])
    _, layer_norm, rms_norm = next(row for row in _FORWARD if n <= row[0])
    # Asking early for w and b hides their latency (128x768: LayerNorm 1.78 µs against 2.04), but LayerNorm's registers
    # then cost occupancy where that counts (8192x8192: 0.98 against 0.73).
    return RowForward(_narrowed(layer_norm if spec.center else rms_norm, n), stream, preload=not (spec.center and stream))


# (N up to, LayerNorm: tile, stages, programs per multiprocessor; RMSNorm: the same)   ratio to the add: LayerNorm, RMSNorm
_BACKWARD: tuple[tuple[int, tuple[Tile, int, int], tuple[Tile, int, int]], ...] = (
    (64, (Tile(64, 64, 8), 3, 2), (Tile(64, 64, 8), 3, 2)),  #                          0.71, 0.79
    (128, (Tile(64, 128, 8), 3, 1), (Tile(64, 128, 8), 3, 1)),  #                       0.82, 0.88
    (256, (Tile(32, 256, 8), 3, 1), (Tile(32, 256, 8), 3, 1)),  #                       0.79, 0.86
    (1024, (Tile(2, 1024, 4), 3, 3), (Tile(2, 1024, 4), 3, 3)),  #                      768: 0.63, 0.69; 1024: 0.78, 0.87
    (3072, (Tile(2, 1024, 4), 3, 2), (Tile(2, 1024, 4), 3, 2)),  #                      2048: 0.83, 0.87; 3072: 0.79, 0.84
    (4096, (Tile(1, 1024, 4), 3, 2), (Tile(1, 1024, 4), 3, 2)),  #                      0.82, 0.86
    (5120, (Tile(1, 1024, 4), 3, 2), (Tile(1, 1024, 8), 3, 2)),  #                      0.84, 0.87
    (7168, (Tile(1, 1024, 8), 3, 1), (Tile(1, 1024, 4), 3, 2)),  #                      0.71, 0.82
    (12288, (Tile(1, 2048, 8), 3, 1), (Tile(1, 2048, 8), 3, 1)),  #                     8192: 0.87, 0.92; 12288: 0.84, 0.83
    (16384, (Tile(1, 4096, 16), 3, 1), (Tile(1, 4096, 16), 3, 1)),  #                   0.36 (so: wide), 0.72
)

# LayerNorm 0.55 at 16384 columns, 0.53 at 65536; RMSNorm 0.56 at 65536. Deeper, wider and more programs: within 3%.
_BACKWARD_WIDE = RowBackwardWide(Tile(1, 2048, 8), 3, 4)

# fp64 takes twice the registers of every accumulator, so its rows are held up to this many elements.
_BACKWARD_HELD_FP64 = 2048

# One launch beats two until the columns' second reading outweighs a launch: 256x4096 5.3 µs against 11.8, 2048x4096 34
# against 22. Up to so many rows: the rows of the columns' tile, which should be about as many (128x768 2.7 µs with 128,
# 3.4 with 32; 16x4096 2.4 with 32).
_FEW_ROWS = {64: 32, 512: 128}

# With fewer warps the columns' tile of 128 rows spills.
_FEW_WARPS = 4

# What sums over rows exchange between warps, at the most; and a mean or an rstd.
_REDUCTION_BYTES = 16 << 10
_STATISTIC_BYTES = 8

# The last step over the partials.
TOTAL = Tile(64, 32, 4)


def choose_backward(
    spec: RowNorm, m: int, n: int, itemsize: int, device: Device
) -> RowBackward | RowBackwardFew | RowBackwardWide:
    """The backward's launch for m rows of n elements of ``itemsize`` bytes."""
    few = next((rows for rows in _FEW_ROWS if m <= rows), None)
    return _choose_backward(spec, n, itemsize, device, few, 3 * m * n * itemsize > _STREAM_BYTES)


@functools.lru_cache(maxsize=1024)
def _choose_backward(
    spec: RowNorm, n: int, itemsize: int, device: Device, few: int | None, stream: bool
) -> RowBackward | RowBackwardFew | RowBackwardWide:
    held = _BACKWARD_HELD_FP64 if itemsize == 8 else 12288 if spec.center else 16384
    if n > held:
        return _BACKWARD_WIDE
    if few is not None:
        tile = next(row for row in _FORWARD if n <= row[0])[1]
        tile = _narrowed(_with_warps(tile, max(tile.warps, _FEW_WARPS)), n)
        return RowBackwardFew(tile, sums=Tile(_FEW_ROWS[few], 32, tile.warps))
    _, layer_norm, rms_norm = next(row for row in _BACKWARD if n <= row[0])
    tile, stages, per_sm = layer_norm if spec.center else rms_norm
    tile = _narrowed(tile, n)
    # All stages but one of x, dy, mean and rstd wait in shared memory; where they do not fit, loads go to registers.
    row_bytes = 2 * -(-n // tile.chunk) * tile.chunk * itemsize + 2 * _STATISTIC_BYTES
    if (stages - 1) * tile.rows * row_bytes + _REDUCTION_BYTES > device.shared_memory:
        stages = 1
    return RowBackward(tile, stages, per_sm, stream)


def _with_warps(tile: Tile, warps: int) -> Tile:
    """The tile by more warps, with as many times the rows."""
    return Tile(tile.rows * warps // tile.warps, tile.chunk, warps)


def _narrowed(tile: Tile, n: int) -> Tile:
    """The tile with its chunk no wider than n needs, and as many more rows."""
    chunk = min(tile.chunk, 1 << (n - 1).bit_length())
    return Tile(tile.rows * tile.chunk // chunk, chunk, tile.warps)
