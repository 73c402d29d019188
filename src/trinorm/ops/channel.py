"""The channel family under autograd."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import channel_reference as reference
from ..channel_reference import Averages, Given
from ..reference import autocasts_to_fp32, in_fp32
from ..spec import Activation, ChannelNorm
from . import channel_library, road
from .layout import channels_readable, dense
from .row import are_plain

if TYPE_CHECKING:
    from .channels import Normalized, Problem


class Call(NamedTuple):
    """What a norm is told besides its tensors. bias_dtype: db's."""

    spec: ChannelNorm
    num_groups: int
    eps: float
    activation: Activation | None
    given: Given | None
    averages: Averages | None
    bias_dtype: torch.dtype | None

    @property
    def problem(self) -> Problem:
        from .channels import Problem

        return Problem(*self[:4], self.given is not None)


def channel_norm(
    spec: ChannelNorm,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: Activation | None = None,
    given: Given | None = None,
    averages: Averages | None = None,
) -> Tensor:
    """The norm of checked arguments: by the kernels, or, where they do not serve, by the composite."""
    statistics = given or (averages[:2] if averages is not None else ())
    if given is None and road.takes_op(x, weight, bias, whole=False) and not road.are_distributed(x, weight, bias):
        return channel_library.norm(spec, x, num_groups, weight, bias, eps, activation, averages)
    if not road.kernels_serve(spec.name, x, weight, bias) or any(type(t) not in road.PLAIN for t in statistics):
        return reference.composite(spec, x, num_groups, weight, bias, eps, given, averages, activation)
    if x.dtype != torch.float64 and autocasts_to_fp32(spec.name, x.device.type):
        x, weight, bias = in_fp32(x, weight, bias)
    x = channels_readable(x)
    weight, bias = (None if t is None else dense(t) for t in (weight, bias))
    call = Call(spec, num_groups, eps, activation, given, averages, None if bias is None else bias.dtype)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _ChannelNorm.apply(x, weight, bias, call)
    return _forward(call, x, weight, bias).y


def _forward(call: Call, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Normalized:
    from . import channels

    problem, given, averages = call.problem, call.given, call.averages
    if given is not None:
        mean, var = (dense(t) for t in given)
        return channels.Normalized(channels.apply(problem, x, weight, bias, mean, var), mean, var)
    if averages is None:
        return channels.forward(problem, x, weight, bias)
    running = Averages(dense(averages.mean), dense(averages.var), averages.momentum)
    found = channels.forward(problem, x, weight, bias, running=running)
    for t, now in ((averages.mean, running.mean), (averages.var, running.var)):
        if t is not now:
            t.copy_(now)
        else:
            increment_version(t)  # a kernel wrote it, which autograd is to know
    return found


class _ChannelNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, call: Call) -> Tensor:
        y, mean, rstd = _forward(call, x, weight, bias)
        if call.given is not None:
            # The running ones may go on running before the backward, which is of what they were.
            mean, rstd = mean.clone(), rstd.clone()
        ctx.save_for_backward(x, weight, None if call.activation is None else bias, mean, rstd)
        ctx.call = call
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        call: Call = ctx.call
        if torch.is_grad_enabled() or not are_plain(dy, x, weight, mean, rstd) or road.observer() is not None:
            # Someone differentiates this backward, to whom a kernel's result would silently be a constant, or maps over it.
            statistics = None if call.given is None else Given(mean, rstd)
            how = call.bias_dtype, call.eps, dy, statistics, call.activation
            return *reference.composite_gradients(call.spec, x, call.num_groups, weight, bias, *how), None
        from . import channels

        dx, dw, db, _ = ctx.needs_input_grad
        return *channels.backward(
            call.problem,
            dy,
            channels_readable(x),
            weight,
            bias,
            mean,
            rstd,
            dx=dx,
            dw=weight.dtype if dw else None,
            db=call.bias_dtype if db else None,
        ), None
