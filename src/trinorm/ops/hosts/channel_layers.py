"""The host side of LayerNorm over channels that are first in memory: outputs and scratch, and which kernels with what."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...kernels.channel_layer import (
    channel_layer_apply,
    channel_layer_backward,
    channel_layer_forward,
    channel_layer_forward_streamed,
    channel_layer_moments,
)
from ...launch import describe, empty, empty_like, launch
from ...tuning import ChannelLayer, choose_layer_backward, choose_layer_forward
from ..layout import dense
from ..road import accumulator_dtype
from .rows import Normalized, add_up
from .start import ACCUMULATOR, started_by, widest


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, save: bool, batch_invariant: bool = False
) -> Normalized:
    """Normalize the channels of x, read as contiguous, as y is. mean and rstd are of each position of each sample, where a
    backward will ask for them (``save``).
    """
    x, device = dense(x), x.device
    y = empty_like(x)
    stats = accumulator_dtype(x, weight, bias)
    m, c, s = _sizes(x)
    shape = x.shape[0], *x.shape[2:]
    mean, rstd = (empty(shape, stats, device) if save else None for _ in range(2))
    if x.numel() == 0:
        return Normalized(y, mean, rstd)
    how_many = None if batch_invariant else m
    plan = choose_layer_forward(how_many, c, _unit(s), widest(x.dtype, stats), describe(device))
    args = y, mean, rstd, x, weight, bias, m, s, eps
    options = _tiled(plan, c, s, stats, device) | dict(RESCUE=stats == torch.float32)
    if plan.held:
        launch(channel_layer_forward, (plan.tiles(m),), device, args, options)
    else:
        launch(channel_layer_forward_streamed, (plan.tiles(m),), device, args, options)
    return Normalized(y, mean, rstd)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *,
    dx: bool,
    dw: torch.dtype | None,
    db: torch.dtype | None,
    batch_invariant: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dw, db) for dy and x, read as contiguous, as dx is: it where asked for, dw and db in the dtype asked for."""
    dy, x = dense(dy), dense(x)
    device, stats = x.device, rstd.dtype
    m, c, s = _sizes(x)
    dx_out = empty_like(x) if dx else None
    dw_out, db_out = (None if dtype is None else empty((c,), dtype, device) for dtype in (dw, db))
    if x.numel() == 0:
        for t in (dw_out, db_out):
            if t is not None:
                t.zero_()
    if x.numel() == 0 or not (dx or dw or db):
        return dx_out, dw_out, db_out

    size = describe(device)
    plan = choose_layer_backward(None if batch_invariant else m, c, _unit(s), widest(x.dtype, stats), size)
    programs = plan.partials(m, c, size)
    dw_partials, db_partials = (None if out is None else empty((programs, c), stats, device) for out in (dw_out, db_out))
    operands = dy, x, weight, mean, rstd
    tiled = _tiled(plan, c, s, stats, device)
    walked = tiled | dict(RUN=plan.run, STAGES=plan.stages)
    args: tuple[Any, ...] = (dx_out, dw_partials, db_partials, *operands)
    if plan.held:
        launch(channel_layer_backward, (programs,), device, (*args, m, s), walked)
    else:
        c1, c2 = (empty_like(rstd) if dx else None for _ in range(2))
        if dx:
            launch(channel_layer_moments, (plan.tiles(m),), device, (c1, c2, *operands, m, s), tiled)
        chunks = -(-c // plan.tile.chunk)
        launch(channel_layer_apply, (programs, chunks), device, (*args, c1, c2, m, s), walked)
    add_up(dw_out, db_out, dw_partials, db_partials, programs, plan.most_partials(c, size), stats)
    return dx_out, dw_out, db_out


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """How many positions there are of all samples, channels, and positions of a sample."""
    s = math.prod(x.shape[2:])
    return x.shape[0] * s, x.shape[1], s


def _unit(s: int) -> int:
    """The positions that divide those of a sample, as far as a wide access asks."""
    return math.gcd(s, 16)


def _tiled(plan: ChannelLayer, c: int, s: int, stats: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What every kernel is told of its tiles."""
    tile = plan.tile
    unit = math.gcd(_unit(s), tile.rows)
    return dict(
        C=c, UNIT=unit, ACC=ACCUMULATOR[stats], ROWS=tile.rows, CHUNK=tile.chunk, **started_by(tile, describe(device))
    )
