"""The channel family under autograd."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..ops import road
from ..reference import channel as reference
from ..reference.channel import Averages, Given
from ..spec import ChannelNorm
from ..switches import when_set
from .calls import Known
from .layout import beside, channels_readable, dense, in_order_of
from .node import apply_of
from .repeated import Repeated
from .row import are_plain

if TYPE_CHECKING:
    from ..replay import Function, Results
    from .problems.channel import Problem


class ChannelCall:
    """The norm, and its gradients, of arguments that differ from those of one call in their values alone.

    momentum: of running statistics to be kept up, None where there are none. bias_dtype: db's. differentiated: a backward
    will ask for statistics. variance: it is among the results.
    """

    __slots__ = ("_bias_dtype", "_differentiated", "_forward", "_gradients", "_momentum", "_problem")

    def __init__(
        self,
        problem: Problem,
        momentum: float | None,
        bias_dtype: torch.dtype | None,
        *,
        differentiated: bool,
        variance: bool = False,
    ) -> None:
        self._problem, self._momentum, self._bias_dtype = problem, momentum, bias_dtype
        self._differentiated = differentiated
        forward = functools.partial(_forward, problem, momentum, differentiated, variance)
        # Over samples (InstanceNorm) running statistics are averaged in ATen's ops, which would not be repeated.
        averaged = momentum is not None and not problem.spec.over_samples
        self._forward: Function = forward if averaged else Repeated(forward, functools.partial(_is_watched, problem.spec))
        self._gradients: Known[Function] = Known(8)

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """Of (x, weight, bias, mean, variance, residual): given statistics, or running ones."""
        if self._differentiated:
            x, weight, bias, mean, var, residual = inputs
            return _apply(x, weight, bias, residual, (self, mean, var))
        return self.results(*inputs)[0]  # type: ignore[return-value]

    def results(self, *inputs: Tensor | None) -> Results:
        """y, and mean and rstd where a backward will ask for them and they are not given; and the variance if asked."""
        results = self._forward(*inputs)
        if self._momentum is not None:
            increment_version(inputs[3:5])  # type: ignore[arg-type]  # a kernel wrote them, which autograd is to know
        return results

    def backward(
        self,
        wanted: tuple[bool, ...],
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
    ) -> Results:
        """(dx, dw, db, dr), those that are wanted. What was saved may come back in another layout or dtype, from a hook."""
        inputs: tuple[Tensor | None, ...] = dy, x, weight, bias, mean, rstd, residual
        if (gradients := self._gradients.recall(wanted, *inputs)) is not None:
            return gradients(*inputs)
        problem, (dx, dw, db, dr) = self._problem, wanted
        if problem.activation is None and dr:
            return *self.backward((dx, dw, db, False), dy, x, weight, bias, residual, mean, rstd)[:3], dy
        if not any(wanted):
            return (None,) * 4
        plain = are_plain(dy, x, weight, bias, residual, mean, rstd)
        if torch.is_grad_enabled() or not plain or road.observer() is not None:
            # Someone differentiates this backward, to whom a kernel's result would silently be a constant, or maps over it.
            statistics = Given(mean, rstd) if problem.given else None
            how = self._bias_dtype, problem.eps, dy, statistics, problem.activation, residual
            return reference.composite_gradients(problem.spec, x, problem.num_groups, weight, bias, *how)
        x = channels_readable(x)
        saved = (None if t is None else dense(t) for t in (weight, bias, mean, rstd))
        inputs = in_order_of(x, dy), x, *saved, beside(x, residual)
        # Of copies too: those of the next call will be like them.
        if (gradients := self._gradients.recall(wanted, *inputs)) is None:
            gradients = self.gradients(wanted)
            self._gradients.keep(wanted, gradients, *inputs)
        return gradients(*inputs)

    def gradients(self, wanted: tuple[bool, ...]) -> Function:
        """Those of (dy, x, weight, bias, mean, rstd, residual) that are wanted, as the kernels read them; all are alike."""
        problem, (dx, dw, db, dr), db_dtype = self._problem, wanted, self._bias_dtype

        def gradients(*inputs: Tensor | None) -> Results:
            from .hosts import channels

            weight = inputs[2]
            dtypes: Any = dict(dw=weight.dtype if dw and weight is not None else None, db=db_dtype if db else None)
            return channels.backward(problem, *inputs, dx=dx, dr=dr, **dtypes)  # type: ignore[arg-type]

        return Repeated(gradients, functools.partial(_is_watched, problem.spec))


def _forward(problem: Problem, momentum: float | None, differentiated: bool, variance: bool, *inputs: Any) -> Results:
    """The results of a ChannelCall."""
    from .. import launch
    from .hosts import channels

    x, weight, bias, mean, var, residual = inputs
    if problem.given:
        return (channels.apply(problem, x, weight, bias, mean, var, residual),)
    running = None if momentum is None else Averages(mean, var, momentum)
    var = launch.empty(tuple(x.shape[1:2]), torch.float64, x.device) if variance else None
    results = channels.forward(problem, x, weight, bias, residual, running=running, save=differentiated, var=var)
    return (*results, *([var] if variance else [])) if differentiated else results[:1]


def _is_watched(spec: ChannelNorm) -> bool:
    from .. import launch

    if spec.of_positions:
        from .hosts import channel_layers, rows

        return not (channel_layers.launch is rows.launch is launch.launch)
    from .hosts import channels

    return channels.launch is not launch.launch


class _ChannelNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        of: tuple[ChannelCall, Tensor | None, Tensor | None],
    ) -> Tensor | None:
        # Given or running statistics have no gradient, and are no inputs of the node, as each costs .3 µs.
        call, mean, var = of
        y, *statistics = call.results(x, weight, bias, mean, var, residual)
        if call._problem.given:
            # The running ones may go on running before the backward, which is of what they were.
            statistics = [t.clone() for t in (mean, var) if t is not None]
        activated = call._problem.activation is not None
        ctx.save_for_backward(x, weight, *((bias, residual) if activated else (None, None)), *statistics)
        ctx.call = call
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.call.backward(ctx.needs_input_grad[:4], dy, *ctx.saved_tensors), None


_apply = apply_of(_ChannelNorm)

CALLS: Known[ChannelCall] = Known(1024)
when_set(CALLS.clear)
