"""Which launch each problem of conditioned norms gets: by what was compiled, but where a ratio stands beside it (H200,
bf16, to the copy or the add of the same run).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TypeVar

from ..launch import Device
from .kinds import RowBackward, RowBackwardWide, RowForward, RowForwardWide, Tile, _sharing
from .row import _fitted, _large_from, _narrowed

# (N up to, tile of rows): 8 elements of a thread, which are one load where they have 16 bits, or chunks of 8; up to 1024 a
# row is a warp's, as is best for the row norms: its masked part is small, and no sum crosses warps.
_FORWARD = (
    (64, Tile(16, 64, 4)),
    (128, Tile(8, 128, 4)),
    (1024, Tile(4, 256, 4)),
    # modulated: 1152 columns 0.89 of the copy, 1536 0.95; by Tile(4, 256, 4) 0.73, 0.88, by Tile(1, 2048, 8) 0.46, 0.57
    (1536, Tile(1, 256, 2)),
    (3072, Tile(1, 1024, 4)),  # modulated: 0.94 to 0.96
    (4096, Tile(1, 2048, 8)),
    (8192, Tile(1, 4096, 16)),
)

# Longer rows of a large problem pass through L2 (modulated, 1152 columns: 21.7 µs, not so 22.8).
_STREAM_ABOVE = 1024

# (N up to, without a gate: tile of rows, stages, programs per multiprocessor; with one: the same). As many programs as
# their registers leave room for: compiled for sm_90, of bf16, up to 128 of a thread; without a gate 168 at 3072 columns and
# 246 at 8192; with one 255 above 4096, where at 8192 RMSNorm spills 56 bytes and LayerNorm 368 (by 16 warps without stages
# 0 and 192).
_BACKWARD: tuple[tuple[int, tuple[Tile, int, int], tuple[Tile, int, int]], ...] = (
    (64, (Tile(32, 64, 8), 3, 2), (Tile(32, 64, 8), 3, 2)),
    (128, (Tile(16, 128, 8), 3, 2), (Tile(16, 128, 8), 3, 2)),
    (256, (Tile(8, 256, 8), 3, 2), (Tile(8, 256, 8), 3, 2)),
    (1024, (Tile(1, 1024, 4), 3, 6), (Tile(1, 1024, 4), 3, 4)),
    # modulated: 1536 columns 0.78, with 3 stages 0.71; by Tile(1, 2048, 8), 3, 3 0.56; of 1152 columns those below
    (2048, (Tile(4, 512, 8), 4, 1), (Tile(1, 2048, 8), 3, 2)),
    (3072, (Tile(1, 1024, 4), 3, 3), (Tile(1, 4096, 16), 3, 1)),
    (4096, (Tile(1, 2048, 8), 3, 2), (Tile(1, 4096, 16), 3, 1)),
    (8192, (Tile(1, 2048, 8), 3, 1), (Tile(1, 2048, 8), 3, 1)),
)
_BACKWARD_FP64 = Tile(1, 1024, 8), 1, 1

# Modulated, 1152 columns 0.75 of the add; by Tile(4, 512, 8), 3, 1 0.66, by Tile(1, 2048, 8), 3, 3 0.42. A thread has 255
# registers, and would spill of fp32 (sm_90: 224 bytes) and of what is not loaded 8 at a time (1025 columns: 192).
_BACKWARD_1152 = Tile(8, 256, 8), 3, 1

# Rows that no program holds: longer ones than those above, and of fp64 than this; forward and backward, and those of fp64.
# By chunks of 8 elements of a thread, compiled for sm_90 and bf16: up to 56 registers forward and 80 backward, 48 of the
# programs that sum.
_HELD_FP64 = 2048
_WIDE = RowForwardWide(Tile(1, 4096, 16)), RowBackwardWide(Tile(1, 2048, 8), 3, 4)
_WIDE_FP64 = RowForwardWide(Tile(1, 2048, 16)), RowBackwardWide(Tile(1, 1024, 8), 1, 2)

# The sum over the programs of a set, which are few where sets are many.
_TOTAL = (Tile(16, 128, 4), Tile(32, 64, 4))


@functools.lru_cache(maxsize=1024)
def choose_conditioned_forward(m: int, n: int, itemsize: int, device: Device) -> RowForward | RowForwardWide:
    """The forward's launch for m rows of n elements of ``itemsize`` bytes: of one tile, whatever m is."""
    if not _held(n, itemsize):
        return (_WIDE_FP64 if itemsize == 8 else _WIDE)[0]
    tile = next(tile for most, tile in _FORWARD if n <= most)
    tile = Tile(max(1, tile.rows * 4 // max(4, itemsize)), tile.chunk, tile.warps)  # fp64 has two registers
    stream = n > _STREAM_ABOVE and m >= _large_from(2 * n * itemsize, device)
    return RowForward(_narrowed(tile, n), 1, stream, preload=True, early=True)


@functools.lru_cache(maxsize=1024)
def choose_conditioned_backward(
    members: int, sets: int, n: int, itemsize: int, device: Device, gated: bool, any_members: bool
) -> RowBackward | RowBackwardWide:
    """The backward's launch for ``sets`` of ``members`` rows. any_members: the tile is that of many rows, so that a row's
    bits do not depend on how many there are.
    """
    tensors = 2 + gated
    if not _held(n, itemsize):
        wide = (_WIDE_FP64 if itemsize == 8 else _WIDE)[1]
        return _started(wide, members, sets, n, itemsize, device, tensors)
    held = next(row[1:][gated] for row in _BACKWARD if n <= row[0])
    if 1024 < n <= 1152 and n % 8 == 0 and itemsize == 2 and not gated:
        held = _BACKWARD_1152
    tile, stages, per_sm = _BACKWARD_FP64 if itemsize == 8 else held
    tile = _narrowed(tile, n)
    while not any_members and tile.rows >= 2 * members:
        tile = Tile(tile.rows // 2, tile.chunk, max(1, tile.warps // 2))
    stream = members * sets >= _large_from((tensors + 1) * n * itemsize, device)
    return _started(RowBackward(tile, 1, stages, per_sm, stream), members, sets, n, itemsize, device, tensors)


P = TypeVar("P", RowBackward, RowBackwardWide)


def _started(wish: P, members: int, sets: int, n: int, itemsize: int, device: Device, tensors: int) -> P:
    """The launch with as many stages as there is room for, and one where a program has one turn: there is nothing to fetch
    ahead.
    """
    if -(-members // wish.tile.rows) <= programs_of_a_set(wish, members, sets, n, device):
        return dataclasses.replace(wish, stages=1)
    return _fitted(wish, n, itemsize, device, tensors)


def _held(n: int, itemsize: int) -> bool:
    """Whether a program holds a whole row."""
    return n <= (_HELD_FP64 if itemsize == 8 else _FORWARD[-1][0])


def programs_of_a_set(plan: RowBackward | RowBackwardWide, members: int, sets: int, n: int, device: Device) -> int:
    """How many programs share the rows of each set, or of each chunk of its columns."""
    at_once = max(1, plan.most_partials(n, device) // sets)
    return _sharing(-(-members // plan.tile.rows), at_once, device)


def choose_conditioned_total(programs: int) -> Tile | None:
    """The sum over so many programs of a set; None where that of the row norms is right."""
    return next((tile for tile in _TOTAL if programs <= tile.rows), None)
