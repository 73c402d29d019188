"""Which launch each problem of PolyNorm gets: by what was compiled, and not measured, where nothing else is said."""

from __future__ import annotations

import functools

from ..launch import Device
from .kinds import RowBackward, RowForward, Tile
from .row import _STREAM_COLUMNS, _fitted, _large_from, _narrowed

# (N up to, tile of rows of 16 bits; of wider elements). Where 32 elements of 16 bits are a thread's, a sum over lanes is
# shared by as many. Compiled for sm_90, instructions an element of 16 bits: 2048 columns 15.3 by Tile(2, 512, 4), 19.2 by
# Tile(1, 1024, 4), 29.5 by Tile(1, 2048, 8); 4096 columns 14.6 by Tile(1, 1024, 4), 19.5 by Tile(1, 2048, 8).
_FORWARD = (
    (64, Tile(16, 64, 4), Tile(16, 64, 4)),
    (128, Tile(8, 128, 4), Tile(8, 128, 4)),
    (1024, Tile(4, 256, 4), Tile(4, 256, 4)),
    (1536, Tile(2, 512, 4), Tile(1, 512, 2)),
    (2048, Tile(2, 512, 4), Tile(1, 2048, 8)),
    (3072, Tile(1, 1024, 4), Tile(1, 1024, 4)),
    (4096, Tile(1, 1024, 4), Tile(1, 2048, 8)),
    (8192, Tile(1, 2048, 8), Tile(1, 4096, 16)),
)

# (N up to, tile of rows, stages, programs per multiprocessor, of 16 bits; of wider elements). A row's sums are numbers, and
# take no registers of a column. Instructions an element of 16 bits: 1024 columns 24.8 by Tile(1, 256, 1), 32.4 by
# Tile(1, 512, 2); 2048 columns 26.0 by Tile(1, 512, 2), 44.8 by Tile(1, 2048, 8); 4096 columns 26.2 by Tile(1, 1024, 4),
# 31.7 by Tile(1, 2048, 8). Measured on an H100, of the add: 4096 columns 0.87 by Tile(1, 1024, 4) in 3 stages, 0.94 by
# chunks of 2048 or 4096 without (8192x4096; 34 launches).
_BACKWARD = (
    (64, (Tile(16, 64, 4), 1, 4), (Tile(16, 64, 4), 1, 4)),
    (128, (Tile(8, 128, 4), 1, 4), (Tile(8, 128, 4), 1, 4)),
    (1024, (Tile(1, 256, 1), 3, 12), (Tile(1, 1024, 4), 1, 5)),
    (1536, (Tile(1, 512, 2), 3, 8), (Tile(1, 512, 2), 1, 8)),
    (2048, (Tile(1, 512, 2), 3, 8), (Tile(1, 2048, 8), 1, 3)),
    (3072, (Tile(1, 1024, 4), 3, 4), (Tile(1, 1024, 4), 1, 4)),
    (4096, (Tile(1, 2048, 4), 1, 4), (Tile(1, 2048, 8), 1, 2)),
    (8192, (Tile(1, 2048, 8), 3, 2), (Tile(1, 4096, 16), 1, 1)),
)

# The sum of the programs' three numbers, and of one beside it.
OF_THREE_NUMBERS = Tile(512, 4, 8)

# A multiprocessor's registers.
_REGISTERS = 1 << 16


@functools.lru_cache(maxsize=1024)
def choose_poly_forward(m: int, n: int, itemsize: int, device: Device) -> RowForward:
    """The forward's launch for m rows of n elements of ``itemsize`` bytes: of one tile, whatever m is."""
    tile = _fp64(next(row[1:][_column(itemsize)] for row in _FORWARD if n <= row[0]), itemsize)
    stream = n >= _STREAM_COLUMNS and m >= _large_from(2 * n * itemsize, device)
    return RowForward(_narrowed(tile, n), 1, stream, preload=True, early=True)


@functools.lru_cache(maxsize=1024)
def choose_poly_backward(m: int, n: int, itemsize: int, device: Device) -> RowBackward:
    """The backward's launch: of one tile too, so that a row's bits do not depend on how many there are."""
    tile, stages, per_sm = next(row[1:][_column(itemsize)] for row in _BACKWARD if n <= row[0])
    tile, stream = _narrowed(_fp64(tile, itemsize), n), m >= _large_from(3 * n * itemsize, device)
    if -(-m // tile.rows) <= per_sm * device.multiprocessors:  # a program with one turn has nothing to fetch ahead
        return RowBackward(tile, 1, 1, per_sm, stream)
    return _fitted(RowBackward(tile, 1, stages, per_sm, stream), n, itemsize, device, 2)


def registers_of(plan: RowBackward, itemsize: int, device: Device) -> int | None:
    """At most how many registers a thread of the backward may have, that all persistent programs are at work at once; None
    leaves it to the compiler, as where elements of ``itemsize`` bytes have two each.
    """
    if itemsize == 8 or not device.programs_wait:
        return None
    return min(255, _REGISTERS // (32 * plan.tile.warps * plan.per_sm) // 8 * 8)


def _column(itemsize: int) -> int:
    """Where the tables have the launch of elements of so many bytes."""
    return 0 if itemsize == 2 else 1


def _fp64(tile: Tile, itemsize: int) -> Tile:
    """Each element of which has two registers."""
    return Tile(max(1, tile.rows * 4 // max(4, itemsize)), tile.chunk, tile.warps)
