"""Conditioned norms as registered ops. For each spec::

    conditioned_layer_norm(
        input, gate?, weight?, bias?, dims, size, eps, activation?, gate_first, modulated, dtype, batch_invariant, cast
    ) -> (y, mean, rstd)
    conditioned_rms_norm(the same) -> (y, rstd)
    <norm>_backward(
        dy, input, gate?, weight?, bias?, mean?, rstd, dims, size, eps, activation?, gate_first, modulated,
        whether dinput, dgate, dweight and dbias are wanted, batch_invariant, cast
    ) -> (dinput, dgate, dweight, dbias)

The last ``dims`` dims hold rows of ``size`` elements; gate has the input's shape, to which weight and bias are broadcast.
dtype is y's. The statistics are as rows.py's, of every row.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import reference
from ...ops import road
from ...reference import conditioned as conditioned_reference
from ...spec import CASTS, GATE_ACTIVATIONS, ROW_NORMS, ConditionedNorm, RowNorm
from ..conditioned import CALLS, ConditionedCall, broadcasts, composite, composite_gradients, lacking, read
from ..problems.conditioned import Conditioned
from .names import CONDITIONED_NORMS
from .registering import Op, out_of_autocast, register

if TYPE_CHECKING:
    from ...replay import Results


def norm(problem: Conditioned, *tensors: Tensor | None) -> Tensor:
    """y of (x, gate, weight, bias), by the registered op."""
    spec, dims, size, eps, dtype, batch_invariant = problem
    op = getattr(torch.ops.trinorm, CONDITIONED_NORMS[spec.norm.name])
    x = tensors[0]
    assert x is not None
    with reference.keeping_dtype(x.device.type):
        by = dims, size, spec.counted, spec.divisor, eps, spec.gate, spec.gate_first, spec.modulated
        return op(*tensors, *by, dtype, batch_invariant, spec.norm.cast)[0]


class _Forward(Op):
    differentiable = True

    def __init__(self, spec: RowNorm, backward: _Backward) -> None:
        self._spec = spec
        mean = "Tensor, " if spec.center else ""
        self.name = CONDITIONED_NORMS[spec.name]
        self.schema = (
            "(Tensor input, Tensor? gate, Tensor? weight, Tensor? bias, int dims, SymInt size, SymInt? count, "
            "SymInt? divisor, float eps, str? activation, bool gate_first, bool modulated, ScalarType dtype, "
            f"bool batch_invariant, str cast) -> (Tensor, {mean}Tensor)"
        )
        self._backward = backward

    def autocast(self, key: str, *args: Any) -> Results:
        """y is in fp32 where torch's own op gives that."""
        *before, dtype, batch_invariant, cast = args
        if args[0].dtype != torch.float64 and reference.autocast_to_fp32(self._spec.with_cast(cast), args[0].device.type):
            dtype = torch.float32
        with out_of_autocast(key):
            return self(*before, dtype, batch_invariant, cast)

    def save(self, ctx: Any, results: Results, *args: Any) -> None:
        inputs, by, (_, *how) = args[:4], args[4:12], args[12:]
        statistics = results[1:]
        ctx.save_for_backward(*inputs, *statistics)
        ctx.mark_non_differentiable(*statistics)
        ctx.by, ctx.how = by, how

    def differentiate(self, ctx: Any, *gradients: Tensor | None) -> Results:
        *inputs, rstd = ctx.saved_tensors
        inputs, mean = (inputs[:4], inputs[4]) if self._spec.center else (inputs, None)
        wanted = ctx.needs_input_grad[3:7]
        found = self._backward(gradients[0], *inputs, mean, rstd, *ctx.by, *wanted, *ctx.how)
        return *found, *(None,) * 11

    def composite(self, *args: Any) -> Results:
        problem, inputs = _problem(self._spec, args)
        _check(self.name, problem, *inputs)
        y, (x, gate, *_) = composite(problem, *inputs), inputs
        of = problem.spec, problem.dims, problem.size
        stats = road.accumulator_dtype(*inputs)
        found = conditioned_reference.statistics(*of, x, gate, problem.eps)
        return self._results(y, *(t.detach().to(stats) for t in found))

    def anew(self, *args: Any) -> Results:
        problem, tensors = _problem(self._spec, args)
        _check(self.name, problem, *tensors)
        if not tensors[0].numel() or lacking(problem, *tensors) or not road.has_kernels(tensors[0]):
            return self.composite(*args)
        call = ConditionedCall(problem, road.accumulator_dtype(*tensors), differentiated=True)
        again = lambda *inputs: self._results(*call.results(*inputs))  # noqa: E731
        return self.do_and_keep(args, again, functools.partial(read, problem))

    def fake(self, *args: Any) -> Results:
        problem, inputs = _problem(self._spec, args)
        _check(self.name, problem, *inputs)
        x, stats = inputs[0], road.accumulator_dtype(*inputs)
        mean, rstd = (x.new_empty(problem.rows(x), dtype=stats) for _ in range(2))
        return self._results(x.new_empty(x.shape, dtype=problem.y), mean, rstd)

    def _results(self, y: Tensor | None, mean: Tensor | None, rstd: Tensor | None) -> Results:
        return (y, mean, rstd) if self._spec.center else (y, rstd)


class _Backward(Op):
    schema = (
        "(Tensor dy, Tensor input, Tensor? gate, Tensor? weight, Tensor? bias, Tensor? mean, Tensor rstd, int dims, "
        "SymInt size, SymInt? count, SymInt? divisor, float eps, str? activation, bool gate_first, bool modulated, "
        "bool dinput, bool dgate, bool dweight, bool dbias, bool batch_invariant, str cast) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    )

    def __init__(self, spec: RowNorm) -> None:
        self._spec = spec
        self.name = f"{CONDITIONED_NORMS[spec.name]}_backward"

    def composite(self, *args: Any) -> Results:
        problem, inputs, wanted = self._asked(args)
        found = composite_gradients(problem, wanted, args[0], *inputs)
        return tuple(None if t is None else t.contiguous() for t in found)

    def anew(self, *args: Any) -> Results:
        problem, inputs, wanted = self._asked(args)
        dy, mean, rstd = args[0], *args[5:7]
        _check(self.name, problem, *inputs)
        x, rows = inputs[0], problem.rows(inputs[0])
        fits = dy.shape == x.shape and all(t is None or t.shape == rows for t in (mean, rstd))
        torch._check(fits, lambda: f"trinorm::{self.name}: dy, mean or rstd is not of the input's shape")
        fits = self._spec.center == (mean is not None) and rstd.dtype in (torch.float32, torch.float64)
        fits = fits and (mean is None or mean.dtype == rstd.dtype)
        given = [t for t in (dy, mean, rstd) if t is not None]
        fits = fits and all(t.device == x.device and t.dtype in road.KERNEL_DTYPES for t in given)
        torch._check(fits, lambda: f"trinorm::{self.name}: dy, mean and rstd are not as the forward gives them")
        known = all(not want or t is not None for want, t in zip(wanted, inputs, strict=True))
        torch._check(known, lambda: f"trinorm::{self.name}: a gradient is asked for of what is not there")
        if not x.numel() or lacking(problem, *inputs) or not road.has_kernels(x):
            return self.composite(*args)
        return self.do_and_keep_gradients(args, ConditionedCall(problem, rstd.dtype, differentiated=True), wanted)

    def fake(self, *args: Any) -> Results:
        _, inputs, wanted = self._asked(args)
        return tuple(t.new_empty(t.shape) if want else None for t, want in zip(inputs, wanted, strict=True))

    def _asked(self, args: Any) -> tuple[Conditioned, Any, tuple[bool, ...]]:
        """What was computed, of which tensors, and which gradients are wanted. y has dy's dtype."""
        dy, *inputs = args[:5]
        problem, _ = _problem(self._spec, (*inputs, *args[7:15], dy.dtype, *args[19:]))
        return problem, inputs, tuple(args[15:19])


def _problem(spec: RowNorm, args: Any) -> tuple[Conditioned, Any]:
    """What the forward computes, and of which tensors."""
    *inputs, dims, size, count, divisor, eps, activation, gate_first, modulated, dtype, batch_invariant, cast = args
    known = cast in CASTS and activation in (None, *GATE_ACTIVATIONS)
    torch._check(
        known, lambda: f"trinorm::{CONDITIONED_NORMS[spec.name]}: cast is {cast!r} and activation is {activation!r}"
    )
    of = ConditionedNorm(spec.with_cast(cast), activation, gate_first, modulated, count, divisor)
    return Conditioned(of, dims, size, eps, dtype, batch_invariant), inputs


def _check(
    op: str, problem: Conditioned, x: Tensor, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> None:
    """That the kernels read nothing but these tensors, in a way that there is."""
    dims, size = problem.dims, problem.size
    fits = 1 <= dims <= x.dim() and size >= 0
    # Whether there are elements last: how many rows there are may be known when a compiled graph runs.
    held = fits and size > 0 and (x.shape[-1] % size == 0 if dims == 1 else x.shape[-dims:].numel() == size)
    fits = fits and (held or not x.numel())
    torch._check(fits, lambda: f"trinorm::{op}: the input's last {dims} dims do not hold rows of {size} elements")
    count, divisor = problem.spec.counted, problem.spec.divisor
    fits = (count is None or 1 <= count <= size) and (divisor is None or divisor >= 1)
    fits = fits and not (problem.spec.norm.center and (count, divisor) != (None, None))
    torch._check(fits, lambda: f"trinorm::{op}: there is no statistic of {count} elements of {size}, over {divisor}")
    fits = (gate is None) == (problem.spec.gate is None) and (gate is None or gate.shape == x.shape)
    torch._check(fits, lambda: f"trinorm::{op}: gate is not of the input's shape, or has no activation")
    fits = all(t is None or broadcasts(t, x, dims) for t in (weight, bias))
    torch._check(fits, lambda: f"trinorm::{op}: weight or bias is not broadcast to the input")
    given = [t for t in (x, gate, weight, bias) if t is not None]
    fits = all(t.device == x.device for t in given)
    torch._check(fits, lambda: f"trinorm::{op}: not all tensors are on one device")
    known = all(t.dtype in road.KERNEL_DTYPES for t in given) and problem.y in road.KERNEL_DTYPES
    torch._check_not_implemented(known, lambda: f"trinorm::{op}: a dtype other than {road.KERNEL_DTYPES}")


def _register(spec: RowNorm) -> None:
    backward = _Backward(spec)
    register(_Forward(spec, backward), CALLS)
    register(backward, CALLS)


for _spec in ROW_NORMS:
    _register(_spec)
