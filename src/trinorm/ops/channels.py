"""The channel family's host side: how x is seen, outputs and scratch, and which kernels with what."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..channel_reference import Averages
from ..kernels.channel import channel_apply, channel_combine, channel_moments
from ..kernels.channel_backward import channel_apply_backward, channel_combine_backward, channel_sums
from ..kernels.channel_whole import channel_backward, channel_forward
from ..launch import describe, launch
from ..spec import ChannelNorm
from ..tuning import ChannelWhole, Tile, choose_apply, choose_combine, choose_walk, choose_whole
from .layout import in_order_of, is_channels_last
from .road import accumulator_dtype
from .start import ACCUMULATOR, started_by, widest


class Normalized(NamedTuple):
    """y, and the statistics that it was made with: those of each group of a sample, or of each channel."""

    y: Tensor
    mean: Tensor
    rstd: Tensor


class View(NamedTuple):
    """Samples of ``width`` channels by s positions, the channels last in memory or first (kernels/channel_tiles.py)."""

    samples: int
    width: int
    s: int
    last: bool

    @property
    def unit(self) -> int:
        """The elements that divide what runs through memory, as far as a wide access asks."""
        return math.gcd(self.width if self.last else self.s, 16)

    def one_sample(self) -> View:
        """The same where samples need not be told apart: of channels-first ones, one of all channels."""
        if self.last or self.samples * self.width >= 1 << 31:
            return self
        return View(1, self.samples * self.width, self.s, False)


def view_of(spec: ChannelNorm, x: Tensor) -> View:
    """x, which has one of the two orders (layout.channels_readable), as the kernels see it."""
    last = is_channels_last(x)
    samples, width, s = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    if last and spec.over_samples:
        return View(1, width, samples * s, True)
    return View(samples, width, s, last)


def forward(
    spec: ChannelNorm,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    running: Averages | None = None,
) -> Normalized:
    """Normalize x, which is in one of the two orders, as y then is. num_groups: 1 to a channel but for GroupNorm."""
    device, channels = x.device, x.shape[1]
    view = view_of(spec, x)
    sets = channels if spec.over_samples else x.shape[0] * num_groups
    stats = accumulator_dtype(x, weight, bias)
    mean, rstd = (torch.empty(sets, dtype=stats, device=device) for _ in range(2))
    if x.numel() == 0:
        return Normalized(torch.empty_like(x), mean, rstd)

    averaged = running is not None and not spec.over_samples
    var = torch.empty_like(rstd, dtype=torch.float64) if averaged else None
    in_place = (running.mean, running.var) if running is not None and not averaged else (None, None)
    momentum = 0.0 if running is None else running.momentum
    if (alone := _whole(spec, view, num_groups, widest(x.dtype, stats), device)) is not None:
        y = torch.empty_like(x)
        runs, plan_whole = alone
        args: tuple[Any, ...] = (y, mean, rstd, var, *in_place, x, weight, bias, channels, runs, view.s, eps, momentum)
        options = _of_whole(spec, view, plan_whole, stats, device) | dict(
            RESCUE=stats == torch.float32, UNEVEN=plan_whole.uneven(view.s)
        )
        launch(channel_forward, (sets,), device, args, options)
        if running is not None and var is not None:
            _average(running, mean, var, x.shape[0])
        return Normalized(y, mean, rstd)

    d = 1 if spec.over_samples else channels // num_groups
    whole = view
    if not (spec.over_samples or view.last):
        # A group's channels lie one after the other: one channel of as many times the positions.
        whole, d = View(view.samples, num_groups, view.s * d, False).one_sample(), 1
    size = describe(device)
    plan = choose_walk(*whole[:3], widest(x.dtype, stats), whole.last, spec.over_samples, size)
    teams, blocks, slabs = plan.programs(*whole[:3])
    means, squares = (torch.empty(teams * slabs, whole.width, dtype=torch.float64, device=device) for _ in range(2))
    common = dict(ACC=ACCUMULATOR[stats])
    args = (means, squares, x, *whole[:3], plan.slab, slabs, eps)
    options = _tiled(whole, plan.tile) | common | started_by(plan.tile, size)
    options.update(SAMPLES=plan.samples, RESCUE=stats == torch.float32)
    launch(channel_moments, (teams * blocks * slabs,), device, args, options)

    outer, parts = (1, teams * slabs) if spec.over_samples else (whole.samples, slabs)
    samples = (whole.samples, plan.samples) if spec.over_samples else (1, 1)
    combine = choose_combine(d)
    shape = samples[0], whole.s, plan.slab, slabs, parts, d, whole.width, samples[1]
    args = (mean, rstd, var, *in_place, means, squares, *shape, eps, momentum)
    options = dict(K=combine.k, SETS=combine.sets, **started_by(combine, size))
    launch(channel_combine, (outer * -(-(whole.width // d) // combine.sets),), device, args, options)
    if running is not None and var is not None:
        _average(running, mean, var, x.shape[0])
    return Normalized(apply(spec, x, num_groups, weight, bias, mean, rstd, eps, given=False), mean, rstd)


def apply(
    spec: ChannelNorm,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    *,
    given: bool,
) -> Tensor:
    """y of these statistics. given: they are each channel's, and for rstd there is a variance."""
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    view = view_of(spec, x).one_sample()
    stats = accumulator_dtype(x, weight, bias, mean, rstd)
    tile = choose_apply(view.width, view.s, widest(x.dtype, stats), view.last)
    slabs = -(-view.s // tile.chunk)
    args = (y, x, mean, rstd, weight, bias, view.width, view.s, slabs, x.shape[1], x.shape[1] // num_groups, eps)
    options = _tiled(view, tile) | started_by(tile, describe(x.device))
    options.update(GROUPED=not (spec.over_samples or given), VARIANCE=given, ACC=ACCUMULATOR[stats])
    launch(channel_apply, (view.samples * -(-view.width // tile.rows) * slabs,), x.device, args, options)
    return y


def backward(
    spec: ChannelNorm,
    dy: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    *,
    given: bool,
    dx: bool,
    dw: torch.dtype | None,
    db: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dw, db): dx where asked for, in x's order; dw and db in the dtype asked for. given: as apply's."""
    device, channels = x.device, x.shape[1]
    dy = in_order_of(x, dy)
    empty = x.numel() == 0
    make = torch.zeros if empty else torch.empty
    dx_out = torch.empty_like(x) if dx else None
    dw_out, db_out = (None if t is None else make(channels, dtype=t, device=device) for t in (dw, db))
    if empty or not (dx or dw or db):
        return dx_out, dw_out, db_out

    stats = accumulator_dtype(x, weight, mean, rstd)
    size, view = describe(device), view_of(spec, x)
    d = channels // num_groups
    common = dict(GROUPED=not (spec.over_samples or given), VARIANCE=given, ACC=ACCUMULATOR[stats])
    through = dx and not given  # dx depends on the statistics
    c1, c2 = (torch.empty(mean.shape, dtype=stats, device=device) if through else None for _ in range(2))
    if through and (alone := _whole(spec, view, num_groups, widest(x.dtype, stats), device)) is not None:
        _backward_of_whole(spec, dx_out, dw_out, db_out, dy, x, num_groups, weight, mean, rstd, alone)
        return dx_out, dw_out, db_out
    if through or dw or db:
        across = spec.over_samples or given
        seen = view if across else view.one_sample()
        plan = choose_walk(*seen[:3], widest(x.dtype, stats), seen.last, across, size)
        teams, blocks, slabs = plan.programs(*seen[:3])
        dy_xhat, dy_sum = (
            torch.empty(teams * slabs, seen.width, dtype=stats, device=device) if through or asked else None
            for asked in (dw, db)
        )
        args: tuple[Any, ...] = (dy_xhat, dy_sum, dy, x, mean, rstd, *seen[:3], plan.slab, slabs, channels, d, eps)
        options = _tiled(seen, plan.tile) | common | started_by(plan.tile, size) | dict(SAMPLES=plan.samples)
        launch(channel_sums, (teams * blocks * slabs,), device, args, options)

        sets, of_channels = choose_combine(d), choose_combine(1)
        grouped = through and not across
        set_programs = seen.samples * -(-(seen.width // d) // sets.sets) if grouped else 0
        channel_programs = -(-channels // of_channels.sets) if dw or db or not grouped else 0
        parts = teams * slabs * (seen.width // channels)
        shape = slabs, d, seen.width, parts, channels, set_programs, float(x.numel() // mean.numel())
        args = (dw_out, db_out, c1, c2, dy_xhat, dy_sum, weight, *shape)
        options = dict(GROUPED=common["GROUPED"], K=sets.k, SETS=sets.sets, PARTS=of_channels.k, CHANNELS=of_channels.sets)
        options.update(started_by(sets, size))
        launch(channel_combine_backward, (set_programs + channel_programs,), device, args, options)

    if dx:
        seen = view.one_sample()
        tile = choose_apply(seen.width, seen.s, widest(x.dtype, stats), seen.last)
        slabs = -(-seen.s // tile.chunk)
        args = (dx_out, dy, x, mean, rstd, c1, c2, weight, seen.width, seen.s, slabs, channels, d, eps)
        options = _tiled(seen, tile) | common | started_by(tile, size)
        launch(channel_apply_backward, (seen.samples * -(-seen.width // tile.rows) * slabs,), device, args, options)
    return dx_out, dw_out, db_out


def _whole(
    spec: ChannelNorm, view: View, num_groups: int, itemsize: int, device: torch.device
) -> tuple[int, ChannelWhole] | None:
    """(runs of a statistic, the launch) by which a program has a whole one, where that serves."""
    if view.last:
        return None
    over_samples = spec.over_samples
    sets, runs = (view.width, view.samples) if over_samples else (view.samples * num_groups, view.width // num_groups)
    plan = choose_whole(sets, runs, view.s, itemsize, describe(device))
    return None if plan is None else (runs, plan)


def _of_whole(
    spec: ChannelNorm, view: View, plan: ChannelWhole, stats: torch.dtype, device: torch.device
) -> dict[str, Any]:
    return dict(
        OVER_SAMPLES=spec.over_samples,
        UNIT=view.unit,
        RAGGED=plan.ragged,
        ACC=ACCUMULATOR[stats],
        ROWS=plan.tile.rows,
        POSITIONS=plan.tile.chunk,
        STAGES=plan.stages,
        **started_by(plan.tile, describe(device)),
    )


def _backward_of_whole(
    spec: ChannelNorm,
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
    dy: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    alone: tuple[int, ChannelWhole],
) -> None:
    device, channels, view = x.device, x.shape[1], view_of(spec, x)
    runs, plan = alone
    size, stats = describe(device), rstd.dtype
    dy_xhat, dy_sum = (
        None if out is None or spec.over_samples else torch.empty(x.shape[:2], dtype=stats, device=device)
        for out in (dw, db)
    )
    of_statistic = (dw, db) if spec.over_samples else (None, None)
    args: tuple[Any, ...] = (dx, *of_statistic, dy_xhat, dy_sum, dy, x, mean, rstd, weight, channels, runs, view.s)
    launch(channel_backward, (mean.numel(),), device, args, _of_whole(spec, view, plan, stats, device))
    if dy_xhat is not None or dy_sum is not None:
        combine = choose_combine(1)
        samples = x.shape[0]
        args = (dw, db, None, None, dy_xhat, dy_sum, weight, 1, 1, channels, samples, channels, 0, 1.0)
        tile = dict(K=combine.k, SETS=combine.sets, PARTS=combine.k, CHANNELS=combine.sets)
        options = dict(GROUPED=True, **tile, **started_by(combine, size))
        launch(channel_combine_backward, (-(-channels // combine.sets),), device, args, options)


def _tiled(view: View, tile: Tile) -> dict[str, Any]:
    return dict(LAST=view.last, UNIT=view.unit, ROWS=tile.rows, POSITIONS=tile.chunk)


def _average(running: Averages, mean: Tensor, var: Tensor, samples: int) -> None:
    """Let running statistics, which are a channel's, have the mean of those of all samples (InstanceNorm)."""
    for kept, now in ((running.mean, mean), (running.var, var)):
        kept.copy_(torch.lerp(kept.double(), now.view(samples, -1).mean(0).double(), running.momentum))
