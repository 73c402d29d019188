"""The channel family under autograd."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import channel_reference as reference
from ..channel_reference import Averages, Given
from ..reference import autocasts_to_fp32, in_fp32
from ..spec import ChannelNorm
from . import road
from .layout import channels_readable, dense
from .row import are_plain

if TYPE_CHECKING:
    from .channels import Normalized


class Call(NamedTuple):
    """What a norm is told besides its tensors. bias_dtype: db's."""

    spec: ChannelNorm
    num_groups: int
    eps: float
    given: Given | None
    averages: Averages | None
    bias_dtype: torch.dtype | None


def channel_norm(
    spec: ChannelNorm,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    given: Given | None = None,
    averages: Averages | None = None,
) -> Tensor | None:
    """The norm of checked arguments by the kernels; None where they do not serve, and torch's own op is to run."""
    statistics = given or (averages[:2] if averages is not None else ())
    if not road.kernels_serve(spec.name, x, weight, bias) or any(type(t) not in road.PLAIN for t in statistics):
        return None
    if x.dtype != torch.float64 and autocasts_to_fp32(spec.name, x.device.type):
        x, weight, bias = in_fp32(x, weight, bias)
    x = channels_readable(x)
    weight, bias = (None if t is None else dense(t) for t in (weight, bias))
    call = Call(spec, num_groups, eps, given, averages, None if bias is None else bias.dtype)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _ChannelNorm.apply(x, weight, bias, call)
    return _forward(call, x, weight, bias).y


def _forward(call: Call, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Normalized:
    from . import channels

    spec, num_groups, eps, given, averages, _ = call
    if given is not None:
        mean, var = (dense(t) for t in given)
        y = channels.apply(spec, x, num_groups, weight, bias, mean, var, eps, given=True)
        return channels.Normalized(y, mean, var)
    if averages is None:
        return channels.forward(spec, x, num_groups, weight, bias, eps)
    running = Averages(dense(averages.mean), dense(averages.var), averages.momentum)
    found = channels.forward(spec, x, num_groups, weight, bias, eps, running=running)
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
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.call = call
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        call: Call = ctx.call
        spec, num_groups, eps, given, _, bias_dtype = call
        if torch.is_grad_enabled() or not are_plain(dy, x, weight, mean, rstd) or road.observer() is not None:
            # Someone differentiates this backward, to whom a kernel's result would silently be a constant, or maps over it.
            statistics = None if given is None else Given(mean, rstd)
            found = reference.composite_gradients(spec, x, num_groups, weight, bias_dtype, eps, dy, statistics)
            return *found, None
        from . import channels

        dx, dw, db, _ = ctx.needs_input_grad
        return *channels.backward(
            spec,
            dy,
            channels_readable(x),
            num_groups,
            weight,
            mean,
            rstd,
            eps,
            given=given is not None,
            dx=dx,
            dw=weight.dtype if dw else None,
            db=bias_dtype if db else None,
        ), None
