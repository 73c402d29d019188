"""What every kernel is told at its launch, of whichever family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...kernels.team import forget_words
from ...launch import Device, describe, empty, of_rows
from ...tuning import FORGET, ChannelCombine, Tile

# ACC: what a kernel computes in, by the dtype of its statistics.
ACCUMULATOR = {torch.float32: tl.float32, torch.float64: tl.float64}


def started_by(tile: Tile | ChannelCombine, device: Device, early: bool = True) -> dict[str, Any]:
    """The options of every launch. early: it may be put on the device before the kernel ahead of it ends."""
    started: dict[str, Any] = dict(PDL=False, num_warps=tile.warps, enable_fp_fusion=True)
    if early and device.dependent_launch:
        started.update(PDL=True, launch_pdl=True)
    return started


def widest(x: torch.dtype, accumulator: torch.dtype) -> int:
    """The bytes of an element where it takes the most room."""
    return max(x.itemsize, 8 if accumulator == torch.float64 else 0)


def words_of_teams(launch: Callable[..., None], m: int, words: int, device: torch.device) -> Tensor:
    """A table in which the team of each of m statistics tells itself so many words, none of them there yet. launch: the
    caller's.
    """
    table = empty((of_rows(m), words), torch.int64, device)
    options = dict(CHUNK=FORGET.chunk, **started_by(FORGET, describe(device)))
    grid = of_rows(m, lambda m: -(-m * words // FORGET.chunk))
    launch(forget_words, (grid,), device, (table, of_rows(m, lambda m: m * words)), options)
    return table
