"""The channel family under autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import channel_reference as reference
from ..channel_reference import Averages, Given
from ..reference import autocasts_to_fp32, in_fp32
from ..spec import Activation, ChannelNorm
from . import channel_library, road
from .calls import Bounded
from .layout import channels_readable, dense, in_order_of
from .row import RECORDED_FROM, are_plain

if TYPE_CHECKING:
    from ..replay import Function, Results
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

        def apply(*inputs: Tensor | None) -> Results:
            return (channels.apply(problem, *inputs),)  # type: ignore[arg-type]

        (y,) = _repeated(("apply", problem), apply, x, weight, bias, mean, var)
        return channels.Normalized(y, mean, var)  # type: ignore[arg-type]
    momentum = None if averages is None else averages.momentum

    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None = None, var: Tensor | None = None
    ) -> Results:
        running = None if mean is None or var is None or momentum is None else Averages(mean, var, momentum)
        return channels.forward(problem, x, weight, bias, running=running)

    if averages is None:
        return channels.Normalized(*_repeated(("forward", problem), forward, x, weight, bias))  # type: ignore[arg-type]
    running = Averages(dense(averages.mean), dense(averages.var), averages.momentum)
    inputs = x, weight, bias, *running[:2]
    # Over samples (InstanceNorm) they are averaged in ATen's ops, which would not be repeated.
    how = ("forward", problem, momentum) if call.spec.over_samples else None
    found = channels.Normalized(*_repeated(how, forward, *inputs))  # type: ignore[arg-type]
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
        problem, wanted = call.problem, dict(dx=dx, dw=weight.dtype if dw else None, db=call.bias_dtype if db else None)

        def gradients(*inputs: Tensor | None) -> Results:
            return channels.backward(problem, *inputs, **wanted)  # type: ignore[arg-type]

        x = channels_readable(x)
        key = "backward", problem, *wanted.values()
        return *_repeated(key, gradients, in_order_of(x, dy), x, weight, bias, mean, rstd), None


def _repeated(how: tuple[Any, ...] | None, function: Callable[..., Results], x: Tensor, *others: Tensor | None) -> Results:
    """``function(x, *others)``, from the second time on by its repetition (replay.py).

    how: what the function does to inputs of these sizes, strides, dtypes and device, where it only makes memory and
    launches; else None.
    """
    inputs = x, *others
    if how is None:
        return function(*inputs)
    seen = [None if t is None else (t.dtype, t.shape, t.stride()) for t in inputs]
    key = *how, x.device, *seen
    if (again := _REPETITIONS.get(key)) is not None:
        return again(*inputs)
    from .. import launch, replay
    from . import channels

    _MET[key] = met = _MET.get(key, 0) + 1
    if met < RECORDED_FROM or channels.launch is not launch.launch:
        return function(*inputs)
    results, again = replay.record(function, *inputs)
    if again is not None:
        _REPETITIONS[key] = again
    return results


_REPETITIONS: Bounded[Function] = Bounded(1024)
_MET: Bounded[int] = Bounded(4096)
