"""The channel family under autograd."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import channel_reference as reference
from ..channel_reference import Averages, Given
from ..spec import ChannelNorm
from ..switches import when_set
from . import road
from .calls import Bounded, Known
from .layout import beside, channels_readable, dense, in_order_of
from .row import RECORDED_FROM, are_plain

if TYPE_CHECKING:
    from ..replay import Function, Results
    from .channel_problem import Problem


class ChannelCall:
    """The norm, and its gradients, of arguments that differ from those of one call in their values alone.

    momentum: of running statistics to be kept up, None where there are none. bias_dtype: db's. kept: others will come that
    are like these, so launches are recorded (replay.py). differentiated: a backward will ask for statistics. variance: it
    is among the results.
    """

    __slots__ = (
        "_again",
        "_bias_dtype",
        "_differentiated",
        "_gradients",
        "_kept",
        "_met",
        "_momentum",
        "_problem",
        "_variance",
    )

    def __init__(
        self,
        problem: Problem,
        momentum: float | None,
        bias_dtype: torch.dtype | None,
        *,
        kept: bool,
        differentiated: bool,
        variance: bool = False,
    ) -> None:
        self._variance = variance
        self._problem, self._momentum, self._bias_dtype = problem, momentum, bias_dtype
        self._kept, self._differentiated = kept, differentiated
        self._again: Function | None = None
        self._gradients: Bounded[Function] = Bounded(8)
        self._met: Bounded[int] = Bounded(16)

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """Of (x, weight, bias, mean, variance, residual): given statistics, or running ones."""
        if self._differentiated:
            return _apply(*inputs, self)
        return self.results(*inputs)[0]  # type: ignore[return-value]

    def results(self, *inputs: Tensor | None) -> Results:
        """(y, mean, rstd), and the variance if asked; of given statistics y alone."""
        results = (self._again or self._forward)(*inputs)
        if self._momentum is not None:
            increment_version([t for t in inputs[3:5] if t is not None])  # a kernel wrote them, which autograd is to know
        return results

    def _forward(self, *inputs: Tensor | None) -> Results:
        from .. import launch
        from . import channels

        problem, momentum = self._problem, self._momentum

        def forward(*inputs: Any) -> Results:
            x, weight, bias, mean, var, residual = inputs
            if problem.given:
                return (channels.apply(problem, x, weight, bias, mean, var, residual),)
            running = None if mean is None or var is None or momentum is None else Averages(mean, var, momentum)
            how: Any = dict(running=running, save=self._differentiated)
            if not self._variance:
                return channels.forward(problem, x, weight, bias, residual, **how)
            var = launch.empty(tuple(x.shape[1:2]), torch.float64, x.device)
            return *channels.forward(problem, x, weight, bias, residual, **how, var=var), var

        # Over samples (InstanceNorm) running statistics are averaged in ATen's ops, which would not be repeated.
        averaged = momentum is not None and not problem.spec.over_samples
        results, self._again = self._record(None if averaged else "forward", forward, *inputs)
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
        inputs = in_order_of(x, dy), x, weight, bias, mean, rstd, beside(x, residual)
        return self.gradients((wanted, *[None if t is None else (t.dtype, t.stride()) for t in inputs]), wanted, *inputs)

    def gradients(self, key: Hashable, wanted: tuple[bool, ...], *inputs: Tensor | None) -> Results:
        """Of (dy, x, weight, bias, mean, rstd, residual), as the kernels read them. key: what tells these from others."""
        if (again := self._gradients.get(key)) is not None:
            return again(*inputs)
        from . import channels

        problem, (dx, dw, db, dr), weight = self._problem, wanted, inputs[2]
        dw_dtype = weight.dtype if dw and weight is not None else None
        db_dtype = self._bias_dtype if db else None

        def gradients(*inputs: Tensor | None) -> Results:
            return channels.backward(problem, *inputs, dx=dx, dw=dw_dtype, db=db_dtype, dr=dr)  # type: ignore[arg-type]

        saved = [None if t is None else dense(t) for t in inputs[2:6]]
        if any(t is not given for t, given in zip(saved, inputs[2:6], strict=True)):  # strided, by a hook
            return gradients(*inputs[:2], *saved, inputs[6])
        results, again = self._record(key, gradients, *inputs)
        if again is not None:
            self._gradients[key] = again
        return results

    def _record(
        self, what: Hashable, function: Callable[..., Results], *inputs: Tensor | None
    ) -> tuple[Results, Function | None]:
        """``function(*inputs)``, and its repetition from the RECORDED_FROM-th such call on. what: None if it has none.

        Nothing is repeated past someone who put a launch of his own in the host's place, to see them all.
        """
        from .. import replay

        self._met[what] = met = self._met.get(what, 0) + 1
        if what is None or not self._kept or met < RECORDED_FROM or _is_watched(self._problem.spec):
            return function(*inputs), None
        return replay.record(function, *inputs)


def _is_watched(spec: ChannelNorm) -> bool:
    from .. import launch

    if spec.of_positions:
        from . import channel_layers, rows

        return not (channel_layers.launch is rows.launch is launch.launch)
    from . import channels

    return channels.launch is not launch.launch


class _ChannelNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        residual: Tensor | None,
        call: ChannelCall,
    ) -> Tensor | None:
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
        x, weight, bias, _, _, residual, _ = ctx.needs_input_grad
        dx, dw, db, dr = ctx.call.backward((x, weight, bias, residual), dy, *ctx.saved_tensors)
        return dx, dw, db, None, None, dr, None


# As row._apply: without the Python part, which looks for torch.func.
_apply = super(torch.autograd.Function, _ChannelNorm).apply

# By what functional is told a ChannelCall, by what an op is told the results of one.
CALLS: Known[Callable[..., Any]] = Known(1024)
when_set(CALLS.clear)
