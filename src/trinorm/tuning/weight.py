"""Which launch each problem of weight normalization gets. So far by what was compiled, and not by what was measured."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ..launch import Device
from .kinds import Tile
from .row import _large_from, _narrowed


@dataclass(frozen=True)
class WeightRows:
    """A program has ``tile.rows`` whole rows. With ``parts`` it has a chunk of one, of which so many programs take the sums
    first. stream: what is read and written passes through L2 without staying.
    """

    tile: Tile
    parts: int | None
    stream: bool

    def programs(self, m: int, n: int) -> int:
        """Of the launch that writes m rows of n elements."""
        return -(-m // self.tile.rows) if self.parts is None else m * -(-n // self.tile.chunk)


# (N up to, tile of rows), forward and backward: as PolyNorm's, and for 512 channels of 3×3, 4608 columns, three chunks.
_HELD = (
    (64, Tile(16, 64, 4)),
    (128, Tile(8, 128, 4)),
    (1024, Tile(4, 256, 4)),
    (1536, Tile(1, 512, 2)),
    (2048, Tile(1, 2048, 8)),
    (3072, Tile(1, 1024, 4)),
    (4096, Tile(1, 2048, 8)),
    (6144, Tile(1, 2048, 8)),
    (8192, Tile(1, 4096, 16)),
)

# Of longer rows: a program's chunk, and at most how many programs share a row's sums, which each program that writes reads
# again.
_CHUNK, _MOST_PARTS = Tile(1, 4096, 8), 512


@functools.lru_cache(maxsize=1024)
def choose_weight(m: int, n: int, tensors: int, itemsize: int, device: Device) -> WeightRows:
    """The launch for m rows of n elements of ``itemsize`` bytes in each of so many tensors, read and written. A row's bits
    do not depend on how many there are.
    """
    tile = next((tile for most, tile in _HELD if n <= most), None)
    if tile is None:
        return WeightRows(_CHUNK, min(-(-n // _CHUNK.chunk), _MOST_PARTS), stream=False)
    tile = Tile(max(1, tile.rows * 4 // max(4, itemsize)), tile.chunk, tile.warps)  # fp64 has two registers
    return WeightRows(_narrowed(tile, n), None, stream=m >= _large_from(tensors * n * itemsize, device))
