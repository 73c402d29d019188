"""Which launch each norm with a quantized result gets: the row norms' own, which reads what this reads and writes more, but
for tiles that give a thread more to do: what is done for a row, or a block, is done by each thread that has a part of it.
"""

from __future__ import annotations

import dataclasses

from ..launch import Device
from ..spec import RowNorm
from .kinds import RowForward, Tile
from .row import _EARLY_WARPS, choose_forward, forward_turns

# Instructions an element on sm_90, of bf16, by the row norms' own tile and by these; not yet timed.
#
# 1025 to 2048 columns, of formats and norms that have the most: LayerNorm to fp8_block 21.3 → 17.3, RMSNorm to nvfp4 25 →
# 21. The others keep the row norms' tile, by which an H200 had fp8 at 0.99 of the copy.
_LONG_CODE = Tile(1, 512, 2)
_LONG_CODE_COLUMNS = 1025, 2048

# 4096 columns, RMSNorm to fp8_token 16.4 → 11.8, int8_token 16.9 → 12.3, fp8_block 20.2 → 13.4, mxfp8 18.1 → 12.3. With 4
# elements of a chunk to a thread (1024 by 8 warps) loads have 64 bits, and the scale of a block twice as many threads.
_MANY_ROWS: tuple[tuple[int, Tile], ...] = (
    (5120, Tile(1, 1024, 4)),
    (8192, Tile(1, 2048, 8)),
    (16384, Tile(1, 4096, 16)),
)

# Few rows of blocks: by the row norms' (1, 512, 4) a thread has 4 elements of a chunk as well.
_FEW_ROWS_OF_BLOCKS = {4096: Tile(1, 1024, 4)}

# Blocks so short have more instructions for each scale than for its elements' norm.
_SHORT_BLOCK = 16


def choose_quantized(spec: RowNorm, m: int | None, n: int, itemsize: int, device: Device, block: int) -> RowForward:
    """The launch for m rows of n elements that a program holds as ``itemsize`` bytes each: of one tile a program. m None:
    one for any number of rows. block: how many elements have a scale of their own; 0: a row.
    """
    plan = choose_forward(spec, m, n, itemsize, device)
    assert isinstance(plan, RowForward)
    scarce_below, _ = forward_turns(n, itemsize, device)
    scarce = m is not None and m < scarce_below
    tile = plan.tile
    if itemsize <= 4:
        if scarce:
            tile = _FEW_ROWS_OF_BLOCKS.get(n, tile) if block and not spec.center else tile
        elif n > _LONG_CODE_COLUMNS[1]:
            wider = next(wider for most, wider in _MANY_ROWS if n <= most)
            tile = wider if n % wider.chunk == 0 else tile
        elif n >= _LONG_CODE_COLUMNS[0] and (spec.center or 0 < block <= _SHORT_BLOCK):
            tile = _LONG_CODE
    early = plan.early and tile.warps >= min(plan.tile.warps, _EARLY_WARPS)
    return dataclasses.replace(plan, tile=tile, tiles=1, early=early)
