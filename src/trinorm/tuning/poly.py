"""Which launch each problem of PolyNorm gets. So far by what was compiled, and not by what was measured."""

from __future__ import annotations

import functools

from ..launch import Device
from .kinds import RowBackward, RowForward, Tile
from .row import _STREAM_COLUMNS, _large_from, _narrowed

# (N up to, tile of rows): as conditioned norms', but that lanes beyond a row of 1152 or 1536 elements are few.
_FORWARD = (
    (64, Tile(16, 64, 4)),
    (128, Tile(8, 128, 4)),
    (1024, Tile(4, 256, 4)),
    (1536, Tile(1, 512, 2)),
    (2048, Tile(1, 2048, 8)),
    (3072, Tile(1, 1024, 4)),
    (4096, Tile(1, 2048, 8)),
    (8192, Tile(1, 4096, 16)),
)

# (N up to, tile of rows, programs per multiprocessor). A row's sums are numbers, and take no registers of a column.
_BACKWARD = (
    (64, Tile(16, 64, 4), 4),
    (128, Tile(8, 128, 4), 4),
    (1024, Tile(1, 1024, 4), 6),
    (1536, Tile(1, 512, 2), 8),
    (2048, Tile(1, 2048, 8), 3),
    (3072, Tile(1, 1024, 4), 4),
    (4096, Tile(1, 2048, 8), 2),
    (8192, Tile(1, 4096, 16), 1),
)

# The sum of the programs' three numbers, and of one.
OF_THREE_NUMBERS = Tile(256, 4, 4)


@functools.lru_cache(maxsize=1024)
def choose_poly_forward(m: int, n: int, itemsize: int, device: Device) -> RowForward:
    """The forward's launch for m rows of n elements of ``itemsize`` bytes: of one tile, whatever m is."""
    tile = _fp64(next(tile for most, tile in _FORWARD if n <= most), itemsize)
    stream = n >= _STREAM_COLUMNS and m >= _large_from(2 * n * itemsize, device)
    return RowForward(_narrowed(tile, n), 1, stream, preload=True, early=True)


@functools.lru_cache(maxsize=1024)
def choose_poly_backward(m: int, n: int, itemsize: int, device: Device) -> RowBackward:
    """The backward's launch: of one tile too, so that a row's bits do not depend on how many there are."""
    tile, per_sm = next(row[1:] for row in _BACKWARD if n <= row[0])
    stream = m >= _large_from(3 * n * itemsize, device)
    return RowBackward(_narrowed(_fp64(tile, itemsize), n), 1, 1, per_sm, stream)


def _fp64(tile: Tile, itemsize: int) -> Tile:
    """Each element of which has two registers."""
    return Tile(max(1, tile.rows * 4 // max(4, itemsize)), tile.chunk, tile.warps)
