"""The channel family's host side: how x is seen, outputs and scratch, and which kernels with what."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.channel import channel_apply, channel_moments
from ...kernels.channel_backward import channel_apply_backward, channel_combine_backward, channel_sums
from ...kernels.channel_combine import channel_combine
from ...kernels.channel_held import held_backward, held_forward
from ...kernels.channel_split import EXCHANGES, split_backward, split_forward
from ...kernels.channel_whole import channel_backward, channel_forward
from ...launch import Device, describe, empty, empty_like, launch
from ...reference.channel import Averages, ChannelGradients, keep_up
from ...tuning import (
    ChannelCombine,
    ChannelHeld,
    ChannelSplit,
    ChannelWalk,
    ChannelWhole,
    choose_apply,
    choose_combine,
    choose_sums,
    choose_whole,
    streams,
)
from ..layout import in_order_of
from ..problems.channel import Problem, View, statistics_shape, view_of
from ..road import accumulator_dtype
from .start import ACCUMULATOR, started_by, widest, words_of_teams


class Normalized(NamedTuple):
    """y, and the statistics that it was made with, of channel_problem.statistics_shape."""

    y: Tensor
    mean: Tensor | None
    rstd: Tensor | None


def forward(
    problem: Problem,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    running: Averages | None = None,
    save: bool = True,
    var: Tensor | None = None,
) -> Normalized:
    """Normalize x, which is in one of the two orders, as y then is. weight and bias: ``(C,)``, or ``(N, C)`` both.
    residual: of x's shape, in x's order. save: a backward will ask for statistics; positions, which are many, have none
    otherwise. var: where the unbiased variance goes, fp64.
    """
    spec, num_groups = problem[:2]
    if spec.of_positions:
        from ..hosts import channel_layers

        how = dict(save=save, batch_invariant=problem.batch_invariant)
        return Normalized(*channel_layers.forward(x, weight, bias, problem.eps, **how))
    device, shape = x.device, statistics_shape(spec, x, num_groups)
    stats = accumulator_dtype(x, weight, bias)
    mean, rstd = (empty(shape, stats, device) for _ in range(2))
    if x.numel() == 0:
        return Normalized(torch.empty_like(x), mean, rstd)
    averaged = running is not None and not spec.over_samples
    var = empty(shape, torch.float64, device) if averaged else var
    in_place = (running.mean, running.var) if running is not None and not averaged else (None, None)
    statistics = mean, rstd, var, *in_place
    momentum = 0.0 if running is None else running.momentum

    if (whole := _whole(problem, x, stats, 1)) is not None:
        y = empty_like(x)
        args = (
            y,
            *statistics,
            *whole.words(EXCHANGES.value, device),
            x,
            weight,
            bias,
            residual,
            *whole.shape,
            problem.eps,
            momentum,
        )
        options = whole.options | dict(RESCUE=stats == torch.float32)
        options.update(PER_SAMPLE=_is_of_samples(weight, bias), ACTIVATION=problem.activation)
        if isinstance(whole.plan, ChannelWhole):
            options.update(UNEVEN=whole.plan.uneven(view_of(spec, x).s))
        launch(_WHOLE[type(whole.plan)][0], (whole.programs,), device, args, options)
    else:
        _take_statistics(problem, x, statistics, stats, momentum)
        y = apply(problem, x, weight, bias, mean, rstd, residual)
    if averaged and running is not None and var is not None:  # of all samples (InstanceNorm)
        keep_up(running, mean, var)
    return Normalized(y, mean, rstd)


def _take_statistics(
    problem: Problem, x: Tensor, statistics: tuple[Tensor | None, ...], stats: torch.dtype, momentum: float
) -> None:
    """statistics: mean, rstd, and, each or not, unbiased variance and running mean and variance."""
    spec, device, size, view = problem.spec, x.device, describe(x.device), view_of(problem.spec, x)
    d = 1 if spec.over_samples else x.shape[1] // problem.num_groups
    if not (spec.over_samples or view.last):
        # A group's channels lie one after the other: one channel of as many times the positions.
        view, d = problem.together(View(view.samples, problem.num_groups, view.s * d, False)), 1
    plan = choose_sums(*problem.planned(view), widest(x.dtype, stats), 1, view.last, spec.over_samples, size)
    parts, outer = plan.partials(view.samples), 1 if spec.over_samples else view.samples
    totals, squares = (empty((parts, view.width), torch.float64, device) for _ in range(2))
    counts = empty((parts,), torch.float64, device) if stats == torch.float64 else None
    sums = totals, squares, empty((outer, view.width), stats, device), counts
    args: tuple[Any, ...] = (*sums, x, *view[:3], plan.shares, problem.eps)
    options = _walked(view, plan, stats, size) | dict(SAMPLES=plan.samples, RESCUE=stats == torch.float32)
    options.update(OVER_SAMPLES=spec.over_samples)
    launch(channel_moments, (plan.programs(*view[:2]),), device, args, options)

    parts //= outer
    combine, sets = choose_combine(d, parts), view.width // d
    n = float(x.numel() // (outer * view.width))
    args = (*statistics, *sums, parts, d, combine.bits, sets, n, 1.0 / (n * d), problem.eps, momentum)
    launch(channel_combine, (outer * -(-sets // combine.sets),), device, args, _combining(combine, size))


def apply(
    problem: Problem,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    residual: Tensor | None = None,
) -> Tensor:
    """y of these statistics."""
    y = empty_like(x)
    if x.numel() == 0:
        return y
    view, size = problem.together(view_of(problem.spec, x)), describe(x.device)
    stats = accumulator_dtype(x, weight, bias, mean, rstd)
    plan = choose_apply(*problem.planned(view), widest(x.dtype, stats), 1, view.last, size)
    channels = x.shape[1]
    shape = view.width, view.s, plan.shares, channels, channels // problem.num_groups
    args = (y, x, mean, rstd, weight, bias, residual, *shape, problem.eps)
    options = _walked(view, plan, stats, size) | _of_channels(problem, weight, bias)
    options.update(STREAM=streams(problem.nbytes(x), 1, size))
    launch(channel_apply, (plan.programs(*view[:2]),), x.device, args, options)
    return y


def backward(
    problem: Problem,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    residual: Tensor | None = None,
    *,
    dx: bool,
    dw: torch.dtype | None,
    db: torch.dtype | None,
    dr: bool = False,
) -> ChannelGradients:
    """dx and dr where asked for, in x's order; dw and db in the dtype asked for. bias, residual: for the activation,
    without which a residual's gradient is dy, and not asked for here.
    """
    if problem.spec.of_positions:
        from ..hosts import channel_layers

        wanted: dict[str, Any] = dict(dx=dx, dw=dw, db=db, batch_invariant=problem.batch_invariant)
        return ChannelGradients(*channel_layers.backward(dy, x, weight, mean, rstd, **wanted), None)
    dy = in_order_of(x, dy)
    if problem.activation is None:
        bias = residual = None
    dz = empty_like(x) if dr else None
    dx_out = empty_like(x) if dx else None
    of_parameters = tuple(x.shape[:2] if _is_of_samples(weight, bias) else x.shape[1:2])
    dw_out, db_out = (None if t is None else empty(of_parameters, t, x.device) for t in (dw, db))
    if x.numel() == 0:
        for t in (dw_out, db_out):
            if t is not None:
                t.zero_()
    found = ChannelGradients(dx_out, dw_out, db_out, dz)
    if x.numel() == 0 or not (dx or dw or db or dr):
        return found
    # The bias has a part in db alone.
    stats = torch.float64 if db is torch.float64 else accumulator_dtype(x, weight, mean, rstd)
    tensors = dy, x, mean, rstd, weight, bias, residual
    taken = dx and not problem.given  # dx depends on the statistics
    if taken and (whole := _whole(problem, x, stats, 2)) is not None:
        _backward_of_whole(problem, whole, found, *tensors)
        return found
    c1, c2 = (empty_like(rstd) if taken else None for _ in range(2))
    if residual is not None and dz is None and dx:
        dz = empty_like(x)
    if taken or dw or db or residual is not None:
        _sum(problem, (dw_out, db_out, c1, c2), None if residual is None else dz, *tensors, stats)
    if dx_out is not None:
        if residual is not None and dz is not None:  # dL/dz is there by now
            problem, dy, bias = problem._replace(activation=None), dz, None
        size, view, channels = describe(x.device), problem.together(view_of(problem.spec, x)), x.shape[1]
        plan = choose_apply(*problem.planned(view), widest(x.dtype, stats), 2, view.last, size)
        shape = view.width, view.s, plan.shares, channels, channels // problem.num_groups
        args = (dx_out, dy, x, mean, rstd, c1, c2, weight, bias, *shape, problem.eps)
        options = _walked(view, plan, stats, size) | _of_channels(problem, weight, bias)
        options.update(STREAM=streams(problem.nbytes(x), 2, size))
        launch(channel_apply_backward, (plan.programs(*view[:2]),), x.device, args, options)
    return found


def _sum(
    problem: Problem,
    sums: tuple[Tensor | None, ...],
    dz: Tensor | None,
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    stats: torch.dtype,
) -> None:
    """sums: dw, db, c1 and c2, each or not; c1 and c2 together. dz: to be written, or None."""
    device, channels, size = x.device, x.shape[1], describe(x.device)
    dw, db, c1, _ = sums
    across = problem.spec.over_samples or problem.given
    of_samples = _is_of_samples(weight, bias)
    view = view_of(problem.spec, x)
    if not across or of_samples:
        view = problem.together(view)
    plan = choose_sums(*problem.planned(view), widest(x.dtype, stats), 2, view.last, across and not of_samples, size)
    partials = plan.partials(view.samples), view.width
    dy_xhat, dy_sum = (
        empty(partials, torch.float64, device) if c1 is not None or asked is not None else None for asked in (dw, db)
    )
    d = channels // problem.num_groups
    args: tuple[Any, ...] = (dy_xhat, dy_sum, dz, dy, x, mean, rstd, weight, bias, residual)
    args = (*args, *view[:3], plan.shares, channels, d, problem.eps)
    options = _walked(view, plan, stats, size) | _of_channels(problem, weight, bias) | dict(SAMPLES=plan.samples)
    launch(channel_sums, (plan.programs(*view[:2]),), device, args, options)

    if dy_xhat is None and dy_sum is None:
        return
    # dw and db are sums over all parts, or over those of a sample.
    outers, wide = (view.samples, view.width) if of_samples else (1, channels)
    parts = math.prod(partials) // (outers * wide)
    sets, of_channels = choose_combine(d, plan.shares), choose_combine(1, None if problem.batch_invariant else parts)
    grouped = c1 is not None and not across
    set_programs = view.samples * -(-(view.width // d) // sets.sets) if grouped else 0
    channel_programs = outers * -(-wide // of_channels.sets) if dw is not None or db is not None or not grouped else 0
    weights = 1 if weight is None else weight.numel()
    shape: tuple[int | float, ...] = plan.shares, d, sets.bits, view.width // d, parts, wide, weights, set_programs
    shape = *shape, 1.0 / (x.numel() // mean.numel())
    options = dict(GROUPED=not across, **_combining_backward(sets, of_channels, size))
    args = (*sums, dy_xhat, dy_sum, weight, *shape)
    launch(channel_combine_backward, (set_programs + channel_programs,), device, args, options)


# Of programs, or teams, with whole statistics: the kernels of each kind of launch, forward and backward.
_WHOLE: dict[type, tuple[Any, Any]] = {
    ChannelHeld: (held_forward, held_backward),
    ChannelWhole: (channel_forward, channel_backward),
    ChannelSplit: (split_forward, split_backward),
}


class _Whole(NamedTuple):
    """A launch of those: of how many statistics, the sizes that the kernel is told, and its options."""

    plan: ChannelWhole | ChannelHeld | ChannelSplit
    sets: int
    shape: tuple[int | float, ...]
    options: dict[str, Any]

    @property
    def programs(self) -> int:
        return self.plan.programs(self.sets)

    def words(self, exchanges: int, device: torch.device) -> tuple[Tensor, ...]:
        """What a team's programs tell each other goes in there."""
        if not isinstance(self.plan, ChannelSplit):
            return ()
        return (words_of_teams(launch, self.sets, 2 * exchanges * self.plan.team, device),)


def _whole(problem: Problem, x: Tensor, stats: torch.dtype, tensors: int) -> _Whole | None:
    """None where it does not serve. tensors: how many of x's size are read."""
    spec, view, size = problem.spec, view_of(problem.spec, x), describe(x.device)
    if view.last:
        return None
    sets, runs = view.width, view.samples
    if not spec.over_samples:
        sets, runs = view.samples * problem.num_groups, view.width // problem.num_groups
    how_many = None if problem.batch_invariant else sets
    plan = choose_whole(
        how_many, runs, view.s, widest(x.dtype, stats), tensors, spec.over_samples, problem.activation is None, size
    )
    if plan is None:
        return None
    options = dict(
        OVER_SAMPLES=spec.over_samples,
        UNIT=view.unit,
        RAGGED=plan.ragged,
        ACC=ACCUMULATOR[stats],
        ROWS=plan.tile.rows,
        POSITIONS=plan.tile.chunk,
        **started_by(plan.tile, size),
    )
    shape: tuple[int | float, ...] = x.shape[1], runs, view.s
    if isinstance(plan, ChannelHeld):
        shape = x.shape[1], sets, runs, view.s
        options.update(APART=plan.apart)
    elif isinstance(plan, ChannelSplit):
        shape = *shape, 1.0 / (runs * view.s)
        options.update(LANES=plan.lanes)
    else:
        options.update(STAGES=plan.stages)
    if not isinstance(plan, ChannelWhole) and plan.registers:
        options.update(maxnreg=plan.registers)
    options.update(STREAM=streams(problem.nbytes(x), tensors, size))
    return _Whole(plan, sets, shape, options)


def _backward_of_whole(
    problem: Problem,
    whole: _Whole,
    gradients: ChannelGradients,
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> None:
    device, (samples, channels) = x.device, x.shape[:2]
    dx, dw, db, dr = gradients
    dz = None if residual is None else dr
    # Sums of the statistics' own channels are dw and db; those of each run of a sample are to be added up.
    over_samples, of_samples = problem.spec.over_samples, _is_of_samples(weight, bias)
    of_statistics = (dw, db) if over_samples else (None, None)
    parts = samples * (whole.plan.members(int(whole.shape[2])) if isinstance(whole.plan, ChannelSplit) else 1)
    of_runs = tuple(
        None if over_samples or out is None else empty((parts, channels), rstd.dtype, device) for out in (dw, db)
    )
    inputs = dy, x, mean, rstd, weight, bias, residual
    args: tuple[Any, ...] = (dx, *of_statistics, dz, *of_runs, *whole.words(1, device), *inputs, *whole.shape)
    options = whole.options | dict(PER_SAMPLE=of_samples, ACTIVATION=problem.activation)
    launch(_WHOLE[type(whole.plan)][1], (whole.programs,), device, args, options)
    if any(t is not None for t in of_runs):
        outers = samples if of_samples else 1
        combine = choose_combine(1, parts // outers)
        shape = 1, 1, 0, channels, parts // outers, channels, channels, 0, 1.0
        args = (dw, db, None, None, *of_runs, None, *shape)
        options = dict(GROUPED=True, **_combining_backward(combine, combine, describe(device)))
        launch(channel_combine_backward, (outers * -(-channels // combine.sets),), device, args, options)


def _is_of_samples(weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether each sample has parameters of its own."""
    return any(t is not None and t.dim() == 2 for t in (weight, bias))


def _of_channels(problem: Problem, weight: Tensor | None, bias: Tensor | None) -> dict[str, Any]:
    """What a kernel is told of the statistics and parameters of a tile's channels."""
    return dict(
        GROUPED=not (problem.spec.over_samples or problem.given),
        VARIANCE=problem.given,
        PER_SAMPLE=_is_of_samples(weight, bias),
        ACTIVATION=problem.activation,
    )


def _combining(plan: ChannelCombine, device: Device) -> dict[str, Any]:
    """What a combining kernel is told of its tiles."""
    return dict(SINGLE=plan.bits == 0, K=plan.k, SETS=plan.sets, ONCE=plan.once, **started_by(plan, device))


def _combining_backward(sets: ChannelCombine, channels: ChannelCombine, device: Device) -> dict[str, Any]:
    """And of those of dw and db, by the launch's other programs."""
    of_channels = dict(PARTS=channels.k, CHANNELS=channels.sets, PARTS_ONCE=channels.once)
    return _combining(sets, device) | of_channels | dict(num_warps=max(sets.warps, channels.warps))


def _walked(view: View, plan: ChannelWalk, stats: torch.dtype, device: Device) -> dict[str, Any]:
    """What a walking kernel is told of its tiles."""
    tile = dict(ROWS=plan.tile.rows, POSITIONS=plan.tile.chunk, STAGES=plan.stages, **started_by(plan.tile, device))
    even = view.width % plan.tile.rows == 0 and view.s % plan.tile.chunk == 0
    return dict(LAST=view.last, UNIT=view.unit, EVEN=even, ACC=ACCUMULATOR[stats], **tile)
