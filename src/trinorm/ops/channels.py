"""The channel family's host side: how x is seen, outputs and scratch, and which kernels with what."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..channel_reference import Averages
from ..kernels.channel import channel_apply, channel_combine, channel_moments
from ..kernels.channel_backward import channel_apply_backward, channel_combine_backward, channel_sums
from ..kernels.channel_held import held_backward, held_forward
from ..kernels.channel_whole import channel_backward, channel_forward
from ..launch import Device, describe, empty, empty_like, launch
from ..spec import Activation, ChannelNorm
from ..tuning import ChannelHeld, ChannelWalk, ChannelWhole, choose_apply, choose_combine, choose_sums, choose_whole
from .layout import in_order_of, is_channels_last
from .road import accumulator_dtype
from .start import ACCUMULATOR, started_by, widest


class Problem(NamedTuple):
    """What is computed of the tensors. num_groups: 1 to a channel but for GroupNorm, and for a position, which is 1.
    given: statistics are given and not taken: each channel's, and for rstd there is a variance.
    """

    spec: ChannelNorm
    num_groups: int
    eps: float
    activation: Activation | None = None
    given: bool = False


class Normalized(NamedTuple):
    """y, and the statistics that it was made with: of each group or position of a sample, or of each channel."""

    y: Tensor
    mean: Tensor | None
    rstd: Tensor | None


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
    problem: Problem,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    running: Averages | None = None,
    save: bool = True,
) -> Normalized:
    """Normalize x, which is in one of the two orders, as y then is. weight and bias: ``(C,)``, or ``(N, C)`` both.

    save: a backward will ask for statistics; positions, which are many, have none otherwise.
    """
    spec, num_groups = problem[:2]
    if spec.of_positions:
        from . import channel_layers

        return Normalized(*channel_layers.forward(x, weight, bias, problem.eps, save=save))
    device, channels = x.device, x.shape[1]
    sets = channels if spec.over_samples else x.shape[0] * num_groups
    stats = accumulator_dtype(x, weight, bias)
    mean, rstd = (empty((sets,), stats, device) for _ in range(2))
    if x.numel() == 0:
        return Normalized(torch.empty_like(x), mean, rstd)
    averaged = running is not None and not spec.over_samples
    var = empty((sets,), torch.float64, device) if averaged else None
    in_place = (running.mean, running.var) if running is not None and not averaged else (None, None)
    statistics = mean, rstd, var, *in_place
    momentum = 0.0 if running is None else running.momentum

    if (whole := _whole(problem, x, stats, 1)) is not None:
        y = empty_like(x)
        args = y, *statistics, x, weight, bias, *whole.shape, problem.eps, momentum
        options = whole.options | dict(RESCUE=stats == torch.float32)
        options.update(PER_SAMPLE=_is_of_samples(weight, bias), ACTIVATION=problem.activation)
        if isinstance(whole.plan, ChannelHeld):
            launch(held_forward, (whole.programs,), device, args, options)
        else:
            options.update(UNEVEN=whole.plan.uneven(view_of(spec, x).s))
            launch(channel_forward, (whole.programs,), device, args, options)
    else:
        _take_statistics(problem, x, statistics, stats, momentum)
        y = apply(problem, x, weight, bias, mean, rstd)
    if running is not None and var is not None:
        # Running statistics, which are a channel's, have the mean of those of all samples (InstanceNorm).
        for kept, now in ((running.mean, mean), (running.var, var)):
            kept.copy_(torch.lerp(kept.double(), now.view(x.shape[0], -1).mean(0).double(), momentum))
    return Normalized(y, mean, rstd)


def _take_statistics(
    problem: Problem, x: Tensor, statistics: tuple[Tensor | None, ...], stats: torch.dtype, momentum: float
) -> None:
    """statistics: mean, rstd, and, each or not, unbiased variance and running mean and variance."""
    spec, device, size, view = problem.spec, x.device, describe(x.device), view_of(problem.spec, x)
    d = 1 if spec.over_samples else x.shape[1] // problem.num_groups
    if not (spec.over_samples or view.last):
        # A group's channels lie one after the other: one channel of as many times the positions.
        view, d = View(view.samples, problem.num_groups, view.s * d, False).one_sample(), 1
    plan = choose_sums(*view[:3], widest(x.dtype, stats), 1, view.last, spec.over_samples, size)
    teams, blocks, slabs = plan.programs(*view[:3])
    means, squares = (empty((teams * slabs, view.width), torch.float64, device) for _ in range(2))
    args: tuple[Any, ...] = (means, squares, x, *view[:3], plan.slab, slabs, problem.eps)
    options = _walked(view, plan, stats, size) | dict(SAMPLES=plan.samples, RESCUE=stats == torch.float32)
    launch(channel_moments, (teams * blocks * slabs,), device, args, options)

    outer, parts = (1, teams * slabs) if spec.over_samples else (view.samples, slabs)
    samples = (view.samples, plan.samples) if spec.over_samples else (1, 1)
    combine = choose_combine(d, parts * d)
    shape = samples[0], view.s, plan.slab, slabs, parts, d, view.width, samples[1]
    args = (*statistics, means, squares, *shape, problem.eps, momentum)
    options = dict(K=combine.k, SETS=combine.sets, **started_by(combine, size))
    launch(channel_combine, (outer * -(-(view.width // d) // combine.sets),), device, args, options)


def apply(problem: Problem, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor) -> Tensor:
    """y of these statistics."""
    y = empty_like(x)
    if x.numel() == 0:
        return y
    view, size = view_of(problem.spec, x).one_sample(), describe(x.device)
    stats = accumulator_dtype(x, weight, bias, mean, rstd)
    plan = choose_apply(*view[:3], widest(x.dtype, stats), 1, view.last, size)
    teams, blocks, slabs = plan.programs(*view[:3])
    channels = x.shape[1]
    shape = view.width, view.s, plan.slab, slabs, channels, channels // problem.num_groups
    args = (y, x, mean, rstd, weight, bias, *shape, problem.eps)
    options = _walked(view, plan, stats, size) | _of_channels(problem, weight, bias)
    launch(channel_apply, (teams * blocks * slabs,), x.device, args, options)
    return y


def backward(
    problem: Problem,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *,
    dx: bool,
    dw: torch.dtype | None,
    db: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dw, db): dx where asked for, in x's order; dw and db in the dtype asked for. bias: for the activation."""
    if problem.spec.of_positions:
        from . import channel_layers

        return channel_layers.backward(dy, x, weight, mean, rstd, dx=dx, dw=dw, db=db)
    dy = in_order_of(x, dy)
    dx_out = empty_like(x) if dx else None
    of_parameters = tuple(x.shape[:2] if _is_of_samples(weight, bias) else x.shape[1:2])
    dw_out, db_out = (None if t is None else empty(of_parameters, t, x.device) for t in (dw, db))
    if x.numel() == 0:
        for t in (dw_out, db_out):
            if t is not None:
                t.zero_()
    if x.numel() == 0 or not (dx or dw or db):
        return dx_out, dw_out, db_out
    if problem.activation is None:
        bias = None
    stats = accumulator_dtype(x, weight, mean, rstd)
    tensors = dy, x, mean, rstd, weight, bias
    taken = dx and not problem.given  # dx depends on the statistics
    if taken and (whole := _whole(problem, x, stats, 2)) is not None:
        _backward_of_whole(problem, whole, (dx_out, dw_out, db_out), *tensors)
        return dx_out, dw_out, db_out
    c1, c2 = (empty_like(rstd) if taken else None for _ in range(2))
    if taken or dw or db:
        _sum(problem, (dw_out, db_out, c1, c2), *tensors, stats)
    if dx_out is not None:
        size, view, channels = describe(x.device), view_of(problem.spec, x).one_sample(), x.shape[1]
        plan = choose_apply(*view[:3], widest(x.dtype, stats), 2, view.last, size)
        teams, blocks, slabs = plan.programs(*view[:3])
        shape = view.width, view.s, plan.slab, slabs, channels, channels // problem.num_groups
        args = (dx_out, dy, x, mean, rstd, c1, c2, weight, bias, *shape, problem.eps)
        options = _walked(view, plan, stats, size) | _of_channels(problem, weight, bias)
        launch(channel_apply_backward, (teams * blocks * slabs,), x.device, args, options)
    return dx_out, dw_out, db_out


def _sum(
    problem: Problem,
    sums: tuple[Tensor | None, ...],
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: torch.dtype,
) -> None:
    """sums: dw, db, c1 and c2, each or not; c1 and c2 together."""
    device, channels, size = x.device, x.shape[1], describe(x.device)
    dw, db, c1, _ = sums
    across = problem.spec.over_samples or problem.given
    of_samples = _is_of_samples(weight, bias)
    view = view_of(problem.spec, x)
    if not across or of_samples:
        view = view.one_sample()
    plan = choose_sums(*view[:3], widest(x.dtype, stats), 2, view.last, across and not of_samples, size)
    teams, blocks, slabs = plan.programs(*view[:3])
    dy_xhat, dy_sum = (
        empty((teams * slabs, view.width), stats, device) if c1 is not None or asked is not None else None
        for asked in (dw, db)
    )
    d = channels // problem.num_groups
    args: tuple[Any, ...] = (dy_xhat, dy_sum, dy, x, mean, rstd, weight, bias)
    args = (*args, *view[:3], plan.slab, slabs, channels, d, problem.eps)
    options = _walked(view, plan, stats, size) | _of_channels(problem, weight, bias) | dict(SAMPLES=plan.samples)
    launch(channel_sums, (teams * blocks * slabs,), device, args, options)

    # dw and db are sums over all parts, or over those of a sample.
    outers, wide = (view.samples, view.width) if of_samples else (1, channels)
    parts = teams * slabs * view.width // (outers * wide)
    sets, of_channels = choose_combine(d, slabs * d), choose_combine(1, parts)
    grouped = c1 is not None and not across
    set_programs = view.samples * -(-(view.width // d) // sets.sets) if grouped else 0
    channel_programs = outers * -(-wide // of_channels.sets) if dw is not None or db is not None or not grouped else 0
    weights = 1 if weight is None else weight.numel()
    shape = slabs, d, view.width, parts, wide, weights, set_programs, float(x.numel() // mean.numel())
    tile = dict(K=sets.k, SETS=sets.sets, PARTS=of_channels.k, CHANNELS=of_channels.sets)
    options = dict(GROUPED=not across, **tile, **started_by(sets, size))
    options.update(num_warps=max(sets.warps, of_channels.warps))
    args = (*sums, dy_xhat, dy_sum, weight, *shape)
    launch(channel_combine_backward, (set_programs + channel_programs,), device, args, options)


class _Whole(NamedTuple):
    """A launch whose programs have whole statistics: how many, the sizes that the kernel is told, and its options."""

    plan: ChannelWhole | ChannelHeld
    programs: int
    shape: tuple[int, ...]
    options: dict[str, Any]


def _whole(problem: Problem, x: Tensor, stats: torch.dtype, tensors: int) -> _Whole | None:
    """None where it does not serve. tensors: how many of x's size are read."""
    spec, view, size = problem.spec, view_of(problem.spec, x), describe(x.device)
    if view.last:
        return None
    sets, runs = view.width, view.samples
    if not spec.over_samples:
        sets, runs = view.samples * problem.num_groups, view.width // problem.num_groups
    plan = choose_whole(sets, runs, view.s, widest(x.dtype, stats), tensors, spec.over_samples, size)
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
    channels, programs = x.shape[1], plan.programs(sets)
    if isinstance(plan, ChannelHeld):
        return _Whole(plan, programs, (channels, sets, runs, view.s), options | dict(APART=plan.apart))
    return _Whole(plan, programs, (channels, runs, view.s), options | dict(STAGES=plan.stages))


def _backward_of_whole(
    problem: Problem,
    whole: _Whole,
    gradients: tuple[Tensor | None, ...],
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    device, (samples, channels) = x.device, x.shape[:2]
    dx, dw, db = gradients
    # Sums of the statistics' own channels are dw and db; of each run of a sample they are, or are to be added up.
    over_samples, of_samples = problem.spec.over_samples, _is_of_samples(weight, bias)
    of_statistics = (dw, db) if over_samples else (None, None)
    of_runs: list[Tensor | None] = [None, None]
    if not over_samples:
        make = [out is not None and (not of_samples or out.dtype != rstd.dtype) for out in (dw, db)]
        of_runs = [
            empty(tuple(x.shape[:2]), rstd.dtype, device) if apart else out
            for apart, out in zip(make, (dw, db), strict=True)
        ]
    args: tuple[Any, ...] = (dx, *of_statistics, *of_runs, dy, x, mean, rstd, weight, bias, *whole.shape)
    options = whole.options | dict(PER_SAMPLE=of_samples, ACTIVATION=problem.activation)
    if isinstance(whole.plan, ChannelHeld):
        launch(held_backward, (whole.programs,), device, args, options)
    else:
        launch(channel_backward, (whole.programs,), device, args, options)
    if of_samples:
        for out, found in zip((dw, db), of_runs, strict=True):
            if out is not None and found is not None and out is not found:
                out.copy_(found)
    elif any(t is not None for t in of_runs):
        combine = choose_combine(1, samples)
        args = (dw, db, None, None, *of_runs, weight, 1, 1, channels, samples, channels, channels, 0, 1.0)
        tile = dict(K=combine.k, SETS=combine.sets, PARTS=combine.k, CHANNELS=combine.sets)
        options = dict(GROUPED=True, **tile, **started_by(combine, describe(device)))
        launch(channel_combine_backward, (-(-channels // combine.sets),), device, args, options)


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


def _walked(view: View, plan: ChannelWalk, stats: torch.dtype, device: Device) -> dict[str, Any]:
    """What a walking kernel is told of its tiles."""
    tile = dict(ROWS=plan.tile.rows, POSITIONS=plan.tile.chunk, STAGES=plan.stages, **started_by(plan.tile, device))
    even = view.width % plan.tile.rows == 0 and view.s % plan.tile.chunk == 0
    return dict(LAST=view.last, UNIT=view.unit, EVEN=even, ACC=ACCUMULATOR[stats], **tile)
