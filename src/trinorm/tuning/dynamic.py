"""Which launch each problem of norms without statistics gets."""

from __future__ import annotations

import dataclasses
import functools

from ..launch import Device
from .kinds import RowBackward, RowForward, Tile, _sharing
from .row import _MOST_ROWS, _large_from

# Elements of a tile, forward and backward, by 4 warps; of fp64 half as many. Forward a thread has 32, in rows that share w
# and b (compiled for sm_90, instructions an element of DyT in bf16: 15.4, by tiles half the size 17.5); backward 8, with
# sums over rows of each. There have to be some programs for each multiprocessor, so that where elements are few the
# forward's tiles are smaller, down to the third.
_FORWARD, _BACKWARD, _LEAST, _WARPS = 4096, 1024, 512, 4

# Up to so many rows the backward's tiles are of so many rows and of few columns, that programs have all of their columns'
# rows: up to so many elements. No sum of partials is left then but those of alpha and s.
_FEW_ROWS, _TOGETHER, _OF_ONE_PROGRAM = 64, 16, 2048

# Widths of a chunk, the better first where two leave as few lanes beyond a row. Backward the fewer columns a program has,
# the fewer partials there are of each: H200, DyT 8192×4096 in bf16, 54.1 µs by 1024 columns, 51.6 by 256, 51.8 by 128.
_FORWARD_CHUNKS, _BACKWARD_CHUNKS = (1024, 512, 256, 128), (256, 512, 1024, 128)

# Compiled for sm_90, bf16: 95 registers.
_STAGES, _PER_SM = 3, 5

# The sum of the partials of one number.
OF_ONE_NUMBER = Tile(256, 1, 4)


@functools.lru_cache(maxsize=1024)
def choose_dynamic_forward(m: int, n: int, itemsize: int, device: Device) -> RowForward:
    """The forward's launch for m rows of n elements of ``itemsize`` bytes."""
    elements = _FORWARD
    while elements > _LEAST and m * n < 4 * device.multiprocessors * elements:
        elements //= 2
    stream = m >= _large_from(2 * n * itemsize, device)
    return RowForward(_tile(elements, _FORWARD_CHUNKS, m, n, itemsize), 1, stream, preload=True, early=True)


@functools.lru_cache(maxsize=1024)
def choose_dynamic_backward(m: int, n: int, itemsize: int, device: Device) -> RowBackward:
    """The backward's launch: programs walk the rows of a chunk of columns."""
    stream = m >= _large_from(3 * n * itemsize, device)
    few = _tile_of_few_rows(m, n, itemsize)
    if m <= _FEW_ROWS and -(-n // few.chunk) <= 4 * device.multiprocessors:
        return RowBackward(few, 1, 1, _PER_SM, stream)
    plan = RowBackward(_tile(_BACKWARD, _BACKWARD_CHUNKS, m, n, itemsize), 1, _STAGES, _PER_SM, stream)
    # A program with one turn has nothing to fetch ahead.
    one_turn = -(-m // plan.tile.rows) <= programs_of_a_chunk(plan, m, n, device)
    return dataclasses.replace(plan, stages=1) if one_turn else plan


def programs_of_a_chunk(plan: RowBackward, m: int, n: int, device: Device) -> int:
    """How many programs share the rows of each chunk of columns."""
    if m * plan.tile.chunk <= _OF_ONE_PROGRAM:
        return 1
    at_once = max(1, plan.most_partials(n, device) // -(-n // plan.tile.chunk))
    return _sharing(-(-m // plan.tile.rows), at_once, device)


def _tile(elements: int, chunks: tuple[int, ...], m: int, n: int, itemsize: int) -> Tile:
    """The chunk that leaves the fewest lanes beyond the row, and as many rows as fill a tile."""
    elements //= 2 if itemsize == 8 else 1
    least, narrowest = 1 << (n - 1).bit_length(), min(chunks)
    chunk = least if least <= narrowest else min(chunks, key=lambda chunk: -(-n // chunk) * chunk)
    chunk = min(chunk, elements)
    return Tile(min(elements // chunk, _MOST_ROWS, 1 << (m - 1).bit_length()), chunk, _WARPS)


def _tile_of_few_rows(m: int, n: int, itemsize: int) -> Tile:
    """Of all rows, up to _TOGETHER, and of the fewer columns the more rows."""
    rows = min(_TOGETHER, 1 << (m - 1).bit_length())
    elements = _LEAST // (2 if itemsize == 8 else 1)
    return Tile(rows, min(elements // rows, 1 << (n - 1).bit_length()), _WARPS)
