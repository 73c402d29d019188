"""Which launch each problem of a gated sum gets: by what was compiled for sm_90, in bf16, but where a ratio stands beside
it (H200, bf16, LayerNorm modulated; to two copies forward, to three backward, of the same run).
"""

from __future__ import annotations

import dataclasses
import functools

from ..launch import Device
from .conditioned import _STREAM_ABOVE, programs_of_a_set
from .kinds import RowBackward, RowForward, Tile
from .row import _fitted, _large_from, _narrowed

# (N up to, tile of rows): as conditioned norms', but for two warps to a row from 257 columns on, which by one take 152 to
# 221 registers.
_FORWARD = (
    (64, Tile(16, 64, 4)),
    (128, Tile(8, 128, 4)),
    (256, Tile(4, 256, 4)),
    (1024, Tile(2, 512, 4)),
    (1536, Tile(1, 256, 2)),  # 1152: 0.93; by Tile(2, 512, 4), and not through L2, 0.78
    (3072, Tile(1, 1024, 4)),
    (4096, Tile(1, 2048, 8)),
    (8192, Tile(1, 4096, 16)),
)

# (N up to, tile of rows, stages, programs per multiprocessor): as conditioned norms' without a gate, with room for the sums
# of a third parameter row and for x beside the sum.
_BACKWARD = (
    (64, Tile(32, 64, 8), 3, 2),
    (128, Tile(16, 128, 8), 3, 2),
    (256, Tile(8, 256, 8), 3, 2),
    (1024, Tile(1, 1024, 4), 3, 4),
    (1152, Tile(1, 256, 2), 3, 4),  # 0.81; by Tile(1, 2048, 8), 3, 2 0.69
    (2048, Tile(1, 2048, 8), 3, 2),
    (4096, Tile(1, 4096, 16), 3, 1),
    (8192, Tile(1, 4096, 16), 3, 1),
)
_BACKWARD_FP64 = Tile(1, 1024, 8), 1, 1

# Read and written by a forward, and read by a backward, of a row: x, residual, sum and y; dy, ds, x and sum.
_TENSORS = 4


@functools.lru_cache(maxsize=1024)
def choose_gated_sum_forward(m: int, n: int, itemsize: int, device: Device) -> RowForward:
    """The forward's launch for m rows of n elements of ``itemsize`` bytes: of one tile, whatever m is."""
    tile = next(tile for most, tile in _FORWARD if n <= most)
    tile = Tile(max(1, tile.rows * 4 // max(4, itemsize)), tile.chunk, tile.warps)  # fp64 has two registers
    stream = n > _STREAM_ABOVE and m >= _large_from(_TENSORS * n * itemsize, device)
    return RowForward(_narrowed(tile, n), 1, stream, preload=True, early=True)


@functools.lru_cache(maxsize=1024)
def choose_gated_sum_backward(
    members: int, sets: int, n: int, itemsize: int, device: Device, any_members: bool
) -> RowBackward:
    """The backward's launch for ``sets`` of ``members`` rows. any_members: as choose_conditioned_backward's."""
    tile, stages, per_sm = _BACKWARD_FP64 if itemsize == 8 else next(row[1:] for row in _BACKWARD if n <= row[0])
    tile = _narrowed(tile, n)
    while not any_members and tile.rows >= 2 * members:
        tile = Tile(tile.rows // 2, tile.chunk, max(1, tile.warps // 2))
    stream = members * sets >= _large_from((_TENSORS + 1) * n * itemsize, device)
    plan = RowBackward(tile, 1, stages, per_sm, stream)
    if -(-members // tile.rows) <= programs_of_a_set(plan, members, sets, n, device):
        return dataclasses.replace(plan, stages=1)  # a program with one turn has nothing to fetch ahead
    return _fitted(plan, n, itemsize, device, _TENSORS)
