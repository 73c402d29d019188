"""Launches of the row family.

Every figure is device time on an H200 (bf16 in and out), as a ratio to the copy (forward) or the add (backward) of the
same run; it stands beside the row that it decided. N counts elements; another dtype takes the row of its own N, as far as
its rows can be held.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import TypeVar

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
    """A program holds ``tiles`` tiles of whole rows.

    stream: x and y pass through L2 without staying. preload: w and b are asked for together with x. early: programs may
    be put on the device before the kernel ahead of them ends (kernels/overlap.py).
    """

    tile: Tile
    tiles: int
    stream: bool
    preload: bool
    early: bool


@dataclass(frozen=True)
class RowForwardSplit:
    """A team of programs holds a row, ``block`` columns each."""

    tile: Tile
    block: int

    @property
    def lanes(self) -> int:
        """How many threads read the team's words (kernels/row_split.awaited): all, of which one warp has any to read."""
        return 32 * self.tile.warps


@dataclass(frozen=True)
class RowForwardWide:
    """A program reads its one row twice."""

    tile: Tile


@dataclass(frozen=True)
class RowBackward:
    """Persistent programs, ``per_sm`` on each multiprocessor, walk ``tiles`` tiles of rows at a time, ``stages`` deep."""

    tile: Tile
    tiles: int
    stages: int
    per_sm: int
    stream: bool

    def most_partials(self, n: int, device: Device) -> int:
        """At most how many programs there are, each with its partial of dw and db."""
        return self.per_sm * device.multiprocessors

    def partials(self, m: int, n: int, device: Device) -> int:
        """How many programs share m rows."""
        return min(-(-m // (self.tile.rows * self.tiles)), self.most_partials(n, device))


@dataclass(frozen=True)
class RowBackwardFew:
    """One launch: ``tile`` of whole rows for dx, ``sums`` of columns for dw and db. Both have the tile's warps."""

    tile: Tile
    sums: Tile


@dataclass(frozen=True)
class RowBackwardSplit:
    """Persistent teams, ``per_sm`` programs on each multiprocessor, walk rows ``stages`` deep, ``block`` columns each."""

    tile: Tile
    block: int
    stages: int
    per_sm: int

    def most_partials(self, n: int, device: Device) -> int:
        """At most how many teams there are, each with its partial of dw and db."""
        return max(1, self.per_sm * device.multiprocessors // (n // self.block))

    def partials(self, m: int, n: int, device: Device) -> int:
        """How many teams share m rows."""
        return min(m, self.most_partials(n, device))

    def lanes(self, n: int) -> int:
        """How many threads read the team's words: those of each warp, or, when one cannot hold them, of all."""
        return 32 if n // self.block <= 32 else 32 * self.tile.warps


@dataclass(frozen=True)
class RowBackwardWide:
    """Moments of each row, then single rows in chunks of columns, ``per_sm`` programs on each multiprocessor."""

    tile: Tile
    stages: int
    per_sm: int

    def most_partials(self, n: int, device: Device) -> int:
        """At most how many programs there are for each chunk of columns, each with its partial of dw and db."""
        return max(1, self.per_sm * device.multiprocessors // -(-n // self.tile.chunk))

    def partials(self, m: int, n: int, device: Device) -> int:
        """How many programs share m rows of each chunk of columns."""
        return min(m, self.most_partials(n, device))


# Making a team's words none.
FORGET = Tile(1, 1024, 4)

# (N up to, LayerNorm's tile and how many at once, RMSNorm's)          ratio to the copy: LayerNorm, RMSNorm
_FORWARD: tuple[tuple[int, tuple[Tile, int], tuple[Tile, int]], ...] = (
    (64, (Tile(8, 64, 2), 4), (Tile(8, 64, 2), 4)),  #                   0.89, 0.93
    (128, (Tile(8, 128, 4), 4), (Tile(16, 128, 4), 1)),  #               0.97, 1.00
    (256, (Tile(4, 256, 4), 4), (Tile(8, 256, 4), 1)),  #                0.95, 1.01
    (768, (Tile(4, 256, 4), 1), (Tile(4, 256, 4), 1)),  #                1.01, 1.04
    (1024, (Tile(4, 256, 4), 1), (Tile(2, 512, 4), 1)),  #               0.98, 1.00
    (3072, (Tile(1, 1024, 4), 1), (Tile(1, 1024, 4), 1)),  #             2048: 0.99, 1.01; 3072: 0.97, 1.02
    (4096, (Tile(1, 2048, 8), 1), (Tile(1, 1024, 8), 1)),  #             0.95, 1.00
    (7168, (Tile(1, 1024, 8), 1), (Tile(1, 1024, 8), 1)),  #             5120: 0.96, 1.01; 7168: 0.95, 1.00
    (8192, (Tile(1, 2048, 8), 1), (Tile(1, 1024, 8), 1)),  #             0.98, 0.99
    (12288, (Tile(1, 2048, 8), 1), (Tile(1, 4096, 16), 1)),  #           0.92, 0.95
    (16384, (Tile(1, 4096, 16), 1), (Tile(1, 2048, 16), 1)),  #          0.94, 0.99
)

# Rows split over a team, the first that fits: one team to a device, one word to a thread. (Elements of 2 bytes; of wider
# ones a block holds fewer.)                               at 32768, 65536, 131072, 262144 columns
_FORWARD_SPLIT = (
    RowForwardSplit(Tile(1, 1024, 4), 4096),  #            LayerNorm 0.89, 0.86, 0.82, 0.78; RMSNorm 0.93, 0.92, 0.90, 0.87
    RowForwardSplit(Tile(1, 2048, 8), 8192),  #            LayerNorm 0.82, 0.79, 0.76, 0.75; RMSNorm 0.92, 0.92, 0.90, 0.88
)

# Rows that no tile holds and no team shares: 0.82, 0.94 at 32768 columns (held: 0.81, 0.93), 0.75, 0.86 at 65536.
_FORWARD_WIDE = (Tile(1, 4096, 16), Tile(1, 8192, 32))

# Above this much of x and y, half of an H200's L2, nothing stays there for the next op anyway. Rows of these lengths are
# then passed through it (LayerNorm at 8192 columns 0.98 against 0.97, 2048: 0.99 against 0.96); narrow rows are not
# (LayerNorm at 128 columns: 0.97 against 0.93).
_STREAM_BYTES = 32 << 20
_STREAM_COLUMNS = 2048

# What a program can hold of a row in registers, forward.
_HELD_BYTES = 64 << 10


def choose_forward(
    spec: RowNorm, m: int, n: int, itemsize: int, device: Device
) -> RowForward | RowForwardSplit | RowForwardWide:
    """The forward's launch for m rows of n elements of ``itemsize`` bytes."""
    scarce = m < _SCARCE_ROWS * device.multiprocessors
    return _choose_forward(spec, n, itemsize, device, scarce, 2 * m * n * itemsize > _STREAM_BYTES)


@functools.lru_cache(maxsize=1024)
def _choose_forward(
    spec: RowNorm, n: int, itemsize: int, device: Device, scarce: bool, large: bool
) -> RowForward | RowForwardSplit | RowForwardWide:
    if n > _FORWARD[-1][0] or n * itemsize > _HELD_BYTES:
        split = _first_split(_FORWARD_SPLIT, n, itemsize, device)
        return split or RowForwardWide(_FORWARD_WIDE[0 if spec.center else 1])
    _, layer_norm, rms_norm = next(row for row in _FORWARD if n <= row[0])
    tile, tiles = layer_norm if spec.center else rms_norm
    if scarce:
        tile, tiles = _of_one_row(tile), 1
    # Asking early for w and b hides their latency (128x768: LayerNorm 1.78 µs against 2.04), but of long rows LayerNorm's
    # registers then cost occupancy where that counts (8192x8192: 0.98 against 0.73).
    stream = large and n >= _STREAM_COLUMNS
    early = scarce or tile.warps >= _EARLY_WARPS
    return RowForward(_narrowed(tile, n), tiles, stream, preload=not (spec.center and stream), early=early)


# Of many programs smaller than this, those put on the device early take places from the last ones of the kernel ahead
# (32768x1024 by programs of 2 warps: 41 µs against 35; by programs of 4 it gains, 33 against 34).
_EARLY_WARPS = 4

# With fewer rows than this to a multiprocessor, a program takes one (LayerNorm at 128x768: 1.20 µs against 1.40).
_SCARCE_ROWS = 4

# (N up to, LayerNorm: tile, how many at once, stages, programs per multiprocessor; RMSNorm: the same)      ratio to the add
_BACKWARD: tuple[tuple[int, tuple[Tile, int, int, int] | None, tuple[Tile, int, int, int]], ...] = (
    (64, (Tile(32, 64, 8), 2, 3, 2), (Tile(32, 64, 8), 4, 3, 1)),  #                      0.84, 0.86
    (128, (Tile(16, 128, 8), 2, 3, 2), (Tile(64, 128, 16), 1, 3, 1)),  #                  0.90, 0.92
    (256, (Tile(8, 256, 8), 2, 3, 2), (Tile(16, 256, 16), 2, 3, 1)),  #                   0.90, 0.92
    (768, (Tile(4, 256, 4), 1, 3, 3), (Tile(8, 256, 8), 2, 3, 1)),  #                     0.81, 0.85
    (1024, (Tile(4, 512, 8), 1, 3, 2), (Tile(4, 512, 8), 2, 3, 1)),  #                    0.90, 0.91
    (2048, (Tile(2, 1024, 8), 1, 3, 2), (Tile(4, 512, 8), 1, 3, 1)),  #                   0.89, 0.91
    (3072, (Tile(1, 1024, 4), 1, 3, 3), (Tile(4, 512, 8), 1, 3, 1)),  #                   0.83, 0.88
    (4096, (Tile(2, 1024, 8), 1, 3, 1), (Tile(2, 2048, 16), 1, 3, 1)),  #                 0.87, 0.91
    (5120, (Tile(2, 1024, 8), 1, 3, 1), (Tile(2, 1024, 8), 1, 3, 1)),  #                  0.88, 0.91
    (7168, (Tile(1, 2048, 8), 1, 4, 1), (Tile(1, 2048, 8), 1, 3, 1)),  #                  0.88, 0.88
    (
        12288,
        (Tile(1, 2048, 8), 1, 3, 1),
        (Tile(1, 2048, 8), 1, 3, 1),
    ),  #                 8192: 0.89, 0.93; 12288: 0.82, 0.84
    (16384, None, (Tile(1, 4096, 16), 1, 3, 1)),  #                                       0.47 (so: split or wide), 0.71
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

# Rows split over a team, as forward. LayerNorm at 16384, 32768, 65536, 131072, 262144 columns: 0.76, 0.74, 0.73, 0.68,
# 0.60 (3 stages: 0.74 at the first); RMSNorm: 0.84, 0.83, 0.82, 0.77, 0.72.
_BACKWARD_SPLIT = (
    (RowBackwardSplit(Tile(1, 1024, 4), 4096, 4, 2),),
    (RowBackwardSplit(Tile(1, 1024, 4), 2048, 3, 4), RowBackwardSplit(Tile(1, 1024, 4), 4096, 3, 2)),
)

# Rows from here on are split if they can be: RMSNorm at 16384 columns is 0.72 held.
_BACKWARD_HELD = 12288

S = TypeVar("S", RowForwardSplit, RowBackwardSplit)


def _first_split(splits: tuple[S, ...], n: int, itemsize: int, device: Device) -> S | None:
    """The first that can split rows of n: into whole blocks, a thread for each of the team; two teams fit."""
    if not device.programs_wait or itemsize > 4:
        return None
    for split in splits:
        fitted = dataclasses.replace(split, block=max(split.tile.chunk, split.block * 2 // itemsize))
        if n % fitted.block == 0 and n // fitted.block <= min(32 * split.tile.warps, device.multiprocessors // 2):
            return fitted
    return None


def choose_total(programs: int) -> Tile:
    """The last step over the partials of so many programs."""
    return next((tile for tile in _TOTAL if programs <= tile.rows), _TOTAL[-1])


# The last step over the partials: rows for all programs at once.
_TOTAL = (Tile(128, 32, 4), Tile(256, 32, 8), Tile(512, 32, 16))


def choose_backward(
    spec: RowNorm, m: int, n: int, itemsize: int, device: Device
) -> RowBackward | RowBackwardFew | RowBackwardSplit | RowBackwardWide:
    """The backward's launch for m rows of n elements of ``itemsize`` bytes."""
    few = next((rows for rows in _FEW_ROWS if m <= rows), None)
    return _choose_backward(spec, n, itemsize, device, few, 3 * m * n * itemsize > _STREAM_BYTES)


@functools.lru_cache(maxsize=1024)
def _choose_backward(
    spec: RowNorm, n: int, itemsize: int, device: Device, few: int | None, stream: bool
) -> RowBackward | RowBackwardFew | RowBackwardSplit | RowBackwardWide:
    if n > _BACKWARD_HELD and (split := _first_split(_BACKWARD_SPLIT[0 if spec.center else 1], n, itemsize, device)):
        return split
    held = _BACKWARD_HELD_FP64 if itemsize == 8 else _BACKWARD_HELD if spec.center else _BACKWARD[-1][0]
    if n > held:
        return _BACKWARD_WIDE
    if few is not None:
        tile, _ = next(row for row in _FORWARD if n <= row[0])[1]
        tile = _narrowed(_with_warps(tile, max(tile.warps, _FEW_WARPS)), n)
        return RowBackwardFew(tile, sums=Tile(_FEW_ROWS[few], 32, tile.warps))
    _, layer_norm, rms_norm = next(row for row in _BACKWARD if n <= row[0])
    launch = layer_norm if spec.center else rms_norm
    assert launch is not None, "n is one that the table holds"
    tile, tiles, stages, per_sm = launch
    tile = _narrowed(tile, n)
    # All stages but one of x, dy, mean and rstd wait in shared memory; where they do not fit, loads go to registers.
    row_bytes = 2 * -(-n // tile.chunk) * tile.chunk * itemsize + 2 * _STATISTIC_BYTES
    if (stages - 1) * tiles * tile.rows * row_bytes + _REDUCTION_BYTES > device.shared_memory:
        stages = 1
    return RowBackward(tile, tiles, stages, per_sm, stream)


def _of_one_row(tile: Tile) -> Tile:
    """The tile of one row, by as many fewer warps."""
    return Tile(1, tile.chunk, max(1, tile.warps // tile.rows))


def _with_warps(tile: Tile, warps: int) -> Tile:
    """The tile by more warps, with as many times the rows."""
    return Tile(tile.rows * warps // tile.warps, tile.chunk, warps)


def _narrowed(tile: Tile, n: int) -> Tile:
    """The tile with its chunk no wider than n needs, and as many more rows."""
    chunk = min(tile.chunk, 1 << (n - 1).bit_length())
    return Tile(tile.rows * tile.chunk // chunk, chunk, tile.warps)
