"""The channel norms as registered ops, as rows.py has the row norms::

    group_norm(input, num_groups, weight?, bias?, residual?, eps, activation?, batch_invariant) -> (y, mean, rstd)
    batch_norm(input, weight?, bias?, residual?, eps, activation?) -> (y, mean, rstd, var)
    channel_layer_norm(input, weight?, bias?, eps, batch_invariant) -> (y, mean, rstd)
    <norm>_backward(
        dy, input, <num_groups,> weight?, <bias?, residual?,> mean, rstd, eps, <activation?, batch_invariant,>
        dx, dw, db?, <dr>
    ) -> (dx, dw, db, <dr>)

InstanceNorm is a GroupNorm with a group for each channel. Statistics are those of the input: a norm of given ones is
pointwise, and left to Inductor. They have the input's dims that they are told apart by (samples and groups; channels;
samples and positions) and the accumulator's dtype, and carry no gradients. Running ones are kept up in ATen's ops, of the
few numbers that they are, BatchNorm's of var: the unbiased variance in fp64, as of one that is small beside eps there is
little in rstd. weight and bias: a channel's, or each sample's, both.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...ops import road
from ...reference import autocasts_to_fp32, in_fp32, keeping_dtype
from ...reference import channel as reference
from ...spec import ACTIVATIONS, BATCH_NORM, CHANNEL_LAYER_NORM, GROUP_NORM, INSTANCE_NORM, ChannelNorm
from ..channel import CALLS, ChannelCall
from ..layout import beside, channels_readable, dense, in_order_of
from ..problems.channel import Problem, statistics_shape
from .registering import Op, know_distributed, out_of_autocast, register

if TYPE_CHECKING:
    from ...reference.channel import Averages
    from ...replay import Results
    from ...spec import Activation


def norm(
    spec: ChannelNorm,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: Activation | None,
    averages: Averages | None,
    batch_invariant: bool,
) -> Tensor:
    """y, by the registered op."""
    know_distributed(x, weight, bias)
    name = GROUP_NORM.name if spec.name == INSTANCE_NORM.name else spec.name
    if spec.name != name and x.dtype != torch.float64 and autocasts_to_fp32(spec.name, x.device.type):
        x, weight, bias, residual = in_fp32(x, weight, bias, residual)
    with keeping_dtype(x.device.type) if spec.name == name else torch.autocast(x.device.type, enabled=False):
        if spec.of_positions:
            y, *_ = torch.ops.trinorm.channel_layer_norm(x, weight, bias, eps, batch_invariant)
        elif spec.over_samples:
            y, mean, _, *var = torch.ops.trinorm.batch_norm(x, weight, bias, residual, eps, activation)
        else:
            how = residual, eps, activation, batch_invariant
            y, mean, _ = torch.ops.trinorm.group_norm(x, num_groups, weight, bias, *how)
            var = [] if averages is None else [x.detach().flatten(2).double().var(2)]
    if averages is not None and x.numel():
        reference.keep_up(averages, mean, *var)
    return y


class _ChannelOp(Op):
    """An op of one spec: of the arguments, those that the spec leaves open."""

    strided = True
    arguments: str
    tensors: tuple[str, ...]
    results = 3

    def __init__(self, spec: ChannelNorm, *settled: str) -> None:
        self._spec = spec
        if spec.name != GROUP_NORM.name:
            settled += ("num_groups",)
        if spec.of_positions:
            settled += ("residual", "activation")
        if spec.over_samples:
            settled += ("batch_invariant",)
        arguments = self.arguments.split(", ")
        names = [argument.split()[1] for argument in arguments]
        self._input, self._groups = names.index("input"), names.index("num_groups")
        self._open = [name not in settled for name in names]
        given = [name for name in self._given(*names) if name in self.tensors]
        # As a call takes them, with the None behind the op's for those that it does not have.
        self._places = itemgetter(*(given.index(name) if name in given else -1 for name in self.tensors))
        self.schema = f"({', '.join(self._given(*arguments))}) -> ({', '.join(['Tensor'] * self.results)})"

    def _given(self, *of_all: Any) -> list[Any]:
        """Of something for each argument, what is for those that the op has."""
        return list(compress(of_all, self._open))

    def _all(self, of_given: Sequence[Any]) -> list[Any]:
        """The reverse, with None for the others."""
        found = iter(of_given)
        return [next(found) if is_open else None for is_open in self._open]

    def _named(self, *args: Any) -> list[Any]:
        """All the arguments."""
        named = self._all(args)
        if named[self._groups] is None:
            named[self._groups] = named[self._input].shape[1] if self._spec.over_samples else 1
        return named

    def _like(self, x: Tensor) -> Tensor:
        """A tensor as x, in the order of memory that the kernels write: x's where it is one of those that they read."""
        last = x.movedim(1, -1)
        if self._spec.of_positions or x.is_contiguous() or not last.is_contiguous():
            return x.new_empty(x.shape)
        return last.new_empty(last.shape).movedim(-1, 1)

    def _check(
        self,
        x: Tensor,
        num_groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        activation: str | None,
    ) -> None:
        """That the kernels read nothing but these tensors, in a way that there is."""
        op = f"trinorm::{self.name}"
        known = activation is None or activation in ACTIVATIONS
        torch._check(known, lambda: f"{op}: activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
        given = [t for t in (weight, bias) if t is not None]
        fits = x.ndim >= 2 and num_groups > 0 and x.shape[1] % num_groups == 0
        of_samples = not (self._spec.of_positions or self._spec.over_samples)
        shapes: Sequence[Any] = [x.shape[1:2], x.shape[:2]] if of_samples else [x.shape[1:2]]
        fits = fits and all(t.device == x.device and t.shape == given[0].shape and t.shape in shapes for t in given)
        torch._check(fits, lambda: f"{op}: num_groups, weight or bias does not fit the input's shape {list(x.shape)}")
        fits = residual is None or (residual.shape == x.shape and residual.dtype == x.dtype and residual.device == x.device)
        torch._check(fits, lambda: f"{op}: residual is not of the input's shape {list(x.shape)}, dtype and device")
        known = all(t.dtype in road.KERNEL_DTYPES for t in (x, *given))
        torch._check_not_implemented(known, lambda: f"{op}: a dtype other than {road.KERNEL_DTYPES}")

    def _ordered(self, tensors: Sequence[Any]) -> tuple[Any, ...]:
        """The op's tensors as a call takes them."""
        return self._places((*tensors, None))


class _Forward(_ChannelOp):
    differentiable = True
    arguments = (
        "Tensor input, SymInt num_groups, Tensor? weight, Tensor? bias, Tensor? residual, float eps, str? activation, "
        "bool batch_invariant"
    )
    tensors = "input", "weight", "bias", "mean", "var", "residual"

    def __init__(self, spec: ChannelNorm, backward: _Backward) -> None:
        self.results = 4 if spec.over_samples else 3
        super().__init__(spec)
        self.name, self._backward = spec.name, backward

    def autocast(self, key: str, *args: Any) -> Results:
        """In fp32 where torch's own op is."""
        x, num_groups, *tensors, eps, activation, batch_invariant = self._named(*args)
        if x.dtype != torch.float64 and autocasts_to_fp32(self.name, x.device.type):
            x, *tensors = in_fp32(x, *tensors)
        with out_of_autocast(key):
            return self(*self._given(x, num_groups, *tensors, eps, activation, batch_invariant))

    def save(self, ctx: Any, results: Results, *args: Any) -> None:
        x, num_groups, weight, bias, residual, eps, activation, batch_invariant = self._named(*args)
        activated = (None, None) if activation is None else (bias, residual)
        ctx.save_for_backward(x, weight, *activated, *results[1:3])
        ctx.mark_non_differentiable(*results[1:])
        ctx.num_groups, ctx.how = num_groups, (eps, activation, batch_invariant)
        ctx.bias_dtype = None if bias is None else bias.dtype

    def differentiate(self, ctx: Any, *gradients: Tensor | None) -> Results:
        x, *saved = ctx.saved_tensors
        dx, _, dw, db, dr, *_ = self._all(ctx.needs_input_grad[3:])
        # Without an activation a residual's gradient is y's own, which an op may not return.
        wanted = dx, dw, ctx.bias_dtype if db else None, bool(dr) and ctx.how[1] is not None
        args = gradients[0], x, ctx.num_groups, *saved, *ctx.how, *wanted
        dx, dw, db, *dz = self._backward(*self._backward._given(*args))
        dr = dz[0] if wanted[3] else gradients[0] if dr else None
        return tuple(self._given(dx, None, dw, db, dr, None, None, None))

    def composite(self, *args: Any) -> Results:
        x, num_groups, weight, bias, residual, eps, activation, _ = self._named(*args)
        self._check(x, num_groups, weight, bias, residual, activation)
        y = reference.composite(self._spec, x, num_groups, weight, bias, eps, None, None, activation, residual)
        mean, rstd, var = reference.statistics(self._spec, x, num_groups, eps)
        stats, shape = road.accumulator_dtype(x, weight, bias), statistics_shape(self._spec, x, num_groups)
        found = *(t.detach().to(stats).view(shape) for t in (mean, rstd)), var.detach().view(shape)
        if not x.numel():
            found = tuple(torch.zeros_like(t) for t in found)  # NaN is unequal to itself
        return in_order_of(self._like(x), y), *found[: self.results - 1]

    def anew(self, *args: Any) -> Results:
        x, num_groups, weight, bias, residual, eps, activation, batch_invariant = self._named(*args)
        self._check(x, num_groups, weight, bias, residual, activation)
        paired = (weight is None or weight.dim() == 1) and (bias is None or bias.dim() == 1)
        paired = paired or not (weight is None or bias is None)
        torch._check(paired, lambda: f"trinorm::{self.name}: of each sample's own there must be both weight and bias")
        if not road.has_kernels(x) or not x.numel():
            return self.composite(*args)
        problem = Problem(self._spec, num_groups, eps, activation, batch_invariant=bool(batch_invariant))
        call = ChannelCall(problem, None, None, differentiated=True, variance=self._spec.over_samples)

        def read(x: Tensor, *others: Tensor | None) -> Sequence[Tensor | None]:
            *statistics, residual = others
            x = channels_readable(x)
            return x, *(None if t is None else dense(t) for t in statistics), beside(x, residual)

        return self.do_and_keep(args, lambda *inputs: call.results(*inputs)[: self.results], read, self._ordered)

    def fake(self, *args: Any) -> Results:
        x, num_groups, weight, bias, residual, _, activation, _ = self._named(*args)
        self._check(x, num_groups, weight, bias, residual, activation)
        stats, shape = road.accumulator_dtype(x, weight, bias), statistics_shape(self._spec, x, num_groups)
        found = (*(x.new_empty(shape, dtype=dtype) for dtype in (stats, stats, torch.float64)),)
        return self._like(x), *found[: self.results - 1]


class _Backward(_ChannelOp):
    arguments = (
        "Tensor dy, Tensor input, SymInt num_groups, Tensor? weight, Tensor? bias, Tensor? residual, Tensor mean, "
        "Tensor rstd, float eps, str? activation, bool batch_invariant, bool dx, bool dw, ScalarType? db, bool dr"
    )
    tensors = "dy", "input", "weight", "bias", "mean", "rstd", "residual"

    def __init__(self, spec: ChannelNorm) -> None:
        self.results = 3 if spec.of_positions else 4
        super().__init__(spec, *(("bias", "dr") if spec.of_positions else ()))  # the bias is for the activation
        self.name = f"{spec.name}_backward"

    def composite(self, *args: Any) -> Results:
        dy, x, num_groups, weight, bias, residual, _, _, eps, activation, _, dx, dw, db, dr = self._named(*args)
        how: Any = db, eps, dy, None, activation, residual
        found: Any = reference.composite_gradients(self._spec, x, num_groups, weight, bias, *how)
        dx, dr = (in_order_of(self._like(x), t) if wanted else None for t, wanted in ((found.dx, dx), (found.dr, dr)))
        return (dx, found.dw if dw else None, found.db, dr)[: self.results]

    def anew(self, *args: Any) -> Results:
        dy, x, num_groups, weight, bias, residual, mean, rstd, eps, activation, *how, dr = self._named(*args)
        batch_invariant, dx, dw, db = how
        fits = dy.shape == x.shape and dy.device == x.device and dy.dtype in road.KERNEL_DTYPES
        fits = fits and not (dw and weight is None) and not (dr and (activation is None or residual is None))
        shape = statistics_shape(self._spec, x, num_groups) if x.ndim > 1 else ()
        fits = fits and mean.shape == shape and rstd.shape == shape and mean.device == rstd.device == x.device
        fits = fits and mean.dtype == rstd.dtype and rstd.dtype in (torch.float32, torch.float64)
        if not fits:
            raise RuntimeError(f"trinorm::{self.name}: dy, mean or rstd is not as the forward gives it")
        self._check(x, num_groups, weight, bias, residual, activation)
        if not road.has_kernels(x) or not x.numel():
            return self.composite(*args)
        problem = Problem(self._spec, num_groups, eps, activation, batch_invariant=bool(batch_invariant))
        wanted = dx, dw, db is not None, bool(dr)
        gradients = ChannelCall(problem, None, db, differentiated=True).gradients(wanted)

        def read(dy: Tensor, x: Tensor, *others: Tensor | None) -> Sequence[Tensor | None]:
            *saved, residual = others
            x = channels_readable(x)
            return in_order_of(x, dy), x, *(None if t is None else dense(t) for t in saved), beside(x, residual)

        return self.do_and_keep(args, lambda *inputs: gradients(*inputs)[: self.results], read, self._ordered)

    def fake(self, *args: Any) -> Results:
        _, x, _, weight, bias, *_, dx, dw, db, dr = self._named(*args)
        of_samples = any(t is not None and t.dim() == 2 for t in (weight, bias))
        parameters = x.shape[:2] if of_samples else x.shape[1:2]
        found = (
            self._like(x) if dx else None,
            weight.new_empty(parameters) if dw else None,
            None if db is None else x.new_empty(parameters, dtype=db),
            self._like(x) if dr else None,
        )
        return found[: self.results]


for _spec in (GROUP_NORM, BATCH_NORM, CHANNEL_LAYER_NORM):
    _backward = _Backward(_spec)
    register(_Forward(_spec, _backward), CALLS)
    register(_backward, CALLS)
