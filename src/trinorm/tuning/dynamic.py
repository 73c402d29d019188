"""Which launch each problem of norms without statistics gets. So far by what was compiled, and not by what was measured."""

from __future__ import annotations

import functools

from ..launch import Device
from .kinds import RowBackward, RowForward, Tile, _sharing
from .row import _MOST_ROWS, _large_from

# Elements of a tile, forward and backward, by 4 warps: of a thread 8, which are one load where they have 16 bits, in one or
# two rows, which then share w and b; of fp64 half as many.
_FORWARD, _BACKWARD, _WARPS = 2048, 1024, 4

# Widths of a chunk, the better first where two leave as few lanes beyond a row.
_CHUNKS = (1024, 512, 256, 128)

# Compiled for sm_90, bf16: 96 registers.
_STAGES, _PER_SM = 3, 5

# The sum of the partials of one number.
OF_ONE_NUMBER = Tile(256, 1, 4)


@functools.lru_cache(maxsize=1024)
def choose_dynamic_forward(m: int, n: int, itemsize: int, device: Device) -> RowForward:
    """The forward's launch for m rows of n elements of ``itemsize`` bytes."""
    return RowForward(
        _tile(_FORWARD, m, n, itemsize), 1, m >= _large_from(2 * n * itemsize, device), preload=True, early=True
    )


@functools.lru_cache(maxsize=1024)
def choose_dynamic_backward(m: int, n: int, itemsize: int, device: Device) -> RowBackward:
    """The backward's launch: programs walk the rows of a chunk of columns."""
    tile, stream = _tile(_BACKWARD, m, n, itemsize), m >= _large_from(3 * n * itemsize, device)
    plan = RowBackward(tile, 1, _STAGES, _PER_SM, stream)
    # A program with one turn has nothing to fetch ahead.
    one_turn = -(-m // tile.rows) <= programs_of_a_chunk(plan, m, n, device)
    return RowBackward(tile, 1, 1, _PER_SM, stream) if one_turn else plan


def programs_of_a_chunk(plan: RowBackward, m: int, n: int, device: Device) -> int:
    """How many programs share the rows of each chunk of columns."""
    at_once = max(1, plan.most_partials(n, device) // -(-n // plan.tile.chunk))
    return _sharing(-(-m // plan.tile.rows), at_once, device)


def _tile(elements: int, m: int, n: int, itemsize: int) -> Tile:
    """The chunk that leaves the fewest lanes beyond the row, and as many rows as fill a tile."""
    elements //= 2 if itemsize == 8 else 1
    least, narrowest = 1 << (n - 1).bit_length(), _CHUNKS[-1]
    chunk = least if least <= narrowest else min(_CHUNKS, key=lambda chunk: -(-n // chunk) * chunk)
    chunk = min(chunk, elements)
    return Tile(min(elements // chunk, _MOST_ROWS, 1 << (m - 1).bit_length()), chunk, _WARPS)
