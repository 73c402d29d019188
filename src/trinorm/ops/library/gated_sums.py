"""Conditioned norms of a gated sum as registered ops. For each spec::

    add_modulated_layer_norm(
        input, residual, gate, weight?, bias?, dims, size, eps, modulated, dtype, batch_invariant
    ) -> (y, sum, mean, rstd)
    add_modulated_rms_norm(the same) -> (y, sum, rstd)
    <norm>_backward(
        sum, rstd, input, gate, dy, dsum?, weight?, bias?, mean?, dims, size, eps, modulated, dresidual's dtype or None,
        whether dinput, dgate, dweight and dbias are wanted, batch_invariant
    ) -> (dinput, dresidual, dgate, dweight, dbias)

The last ``dims`` dims hold a row of ``size`` elements; gate, weight and bias are broadcast to the input. dtype is y's. The
statistics are as rows.py's. The sum has a gradient of its own, dsum.
"""

from __future__ import annotations

import functools
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import reference
from ...ops import road
from ...reference import conditioned as conditioned_reference
from ...spec import ROW_NORMS, ConditionedNorm, RowNorm
from ..conditioned import broadcasts
from ..gated_sum import CALLS, GatedSumCall, are_held, composite, composite_gradients, read, unused
from ..problems.conditioned import Conditioned, shared_sets
from ..problems.gated_sum import GatedSum, problem_of
from .names import GATED_SUMS
from .registering import Op, know_distributed, out_of_autocast, register

if TYPE_CHECKING:
    from ...replay import Results


def norm(problem: GatedSum, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    """(y, sum) of (x, residual, gate, weight, bias), by the registered op."""
    spec, dims, size, eps, dtype, batch_invariant = problem.norm
    know_distributed(*tensors)
    op, x = getattr(torch.ops.trinorm, GATED_SUMS[spec.norm.name]), tensors[0]
    assert x is not None
    with reference.keeping_dtype(x.device.type):
        y, total, *_ = op(*tensors, dims, size, eps, spec.modulated, dtype, batch_invariant)
    return y, total


class _Forward(Op):
    differentiable = True

    def __init__(self, spec: RowNorm, backward: _Backward) -> None:
        self._spec = spec
        mean = "Tensor, " if spec.center else ""
        self.name = GATED_SUMS[spec.name]
        self.schema = (
            "(Tensor input, Tensor residual, Tensor gate, Tensor? weight, Tensor? bias, int dims, SymInt size, float eps, "
            f"bool modulated, ScalarType dtype, bool batch_invariant) -> (Tensor, Tensor, {mean}Tensor)"
        )
        self._backward = backward

    def autocast(self, key: str, *args: Any) -> Results:
        """y is in fp32 where torch's own op gives that."""
        *before, dtype, batch_invariant = args
        if args[0].dtype != torch.float64 and reference.autocast_to_fp32(self._spec, args[0].device.type):
            dtype = torch.float32
        with out_of_autocast(key):
            return self(*before, dtype, batch_invariant)

    def save(self, ctx: Any, results: Results, *args: Any) -> None:
        x, residual, *parameters = args[:5]
        _, total, *statistics = results
        ctx.save_for_backward(total, x, *parameters, *statistics)
        ctx.mark_non_differentiable(*statistics)
        ctx.by, ctx.dtype, ctx.batch_invariant = args[5:9], args[9], args[10]
        ctx.of_residual = residual.dtype

    def differentiate(self, ctx: Any, *gradients: Tensor | None) -> Results:
        dy, dsum, *_ = gradients
        total, x, gate, weight, bias, *mean, rstd = ctx.saved_tensors
        dx, dresidual, dgate, dw, db = ctx.needs_input_grad[3:8]
        if dy is None:
            assert dsum is not None
            dy, dw, db = unused(dsum, ctx.dtype), False, False
        saved = total, rstd, x, gate, dy, dsum, weight, bias, mean[0] if mean else None
        wanted = ctx.of_residual if dresidual else None, dx, dgate, dw, db
        return *self._backward(*saved, *ctx.by, *wanted, ctx.batch_invariant), *(None,) * 6

    def composite(self, *args: Any) -> Results:
        problem, inputs = _problem(self._spec, args)
        _check(self.name, problem, *inputs)
        y, total = composite(problem, *inputs)
        norm = problem.norm
        found = conditioned_reference.statistics(norm.spec, norm.dims, norm.size, total, None, norm.eps)
        stats = road.accumulator_dtype(*inputs)
        return self._results(y, total, *(t.detach().to(stats).reshape(norm.rows(total)) for t in found))

    def anew(self, *args: Any) -> Results:
        problem, tensors = _problem(self._spec, args)
        _check(self.name, problem, *tensors)
        x, _, *parameters = tensors
        if not _is_launched(problem, x, *parameters):
            return self.composite(*args)
        call = GatedSumCall(problem, road.accumulator_dtype(*tensors), differentiated=True)
        again = lambda *inputs: self._results(*call.results(*inputs))  # noqa: E731
        return self.do_and_keep(args, again, functools.partial(read, problem))

    def fake(self, *args: Any) -> Results:
        problem, inputs = _problem(self._spec, args)
        _check(self.name, problem, *inputs)
        x, stats = inputs[0], road.accumulator_dtype(*inputs)
        mean, rstd = (x.new_empty(problem.norm.rows(x), dtype=stats) for _ in range(2))
        y, total = (x.new_empty(x.shape, dtype=dtype) for dtype in (problem.norm.y, problem.sum))
        return self._results(y, total, mean, rstd)

    def _results(self, y: Tensor | None, total: Tensor | None, mean: Tensor | None, rstd: Tensor | None) -> Results:
        return (y, total, mean, rstd) if self._spec.center else (y, total, rstd)


class _Backward(Op):
    schema = (
        "(Tensor sum, Tensor rstd, Tensor input, Tensor gate, Tensor dy, Tensor? dsum, Tensor? weight, Tensor? bias, "
        "Tensor? mean, int dims, SymInt size, float eps, bool modulated, ScalarType? dresidual, bool dinput, bool dgate, "
        "bool dweight, bool dbias, bool batch_invariant) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    )

    def __init__(self, spec: RowNorm) -> None:
        self._spec = spec
        self.name = f"{GATED_SUMS[spec.name]}_backward"

    def composite(self, *args: Any) -> Results:
        problem, inputs, wanted = self._asked(args)
        total, rstd, dy, dsum, mean = args[0], args[1], args[4], args[5], args[8]
        found = composite_gradients(problem, wanted, dy, *inputs, total, mean, rstd, dsum)
        # Where nothing is added a gradient is an argument, which an op's may not be.
        return tuple(None if t is None else t.clone(memory_format=torch.contiguous_format) for t in found)

    def anew(self, *args: Any) -> Results:
        problem, inputs, wanted = self._asked(args)
        total, rstd, dy, dsum, mean = args[0], args[1], args[4], args[5], args[8]
        x, gate, *parameters = inputs
        _check(self.name, problem, x, total, gate, *parameters)
        rows = problem.norm.rows(x)
        fits = all(t is None or t.shape == x.shape for t in (dy, dsum)) and rstd.shape == rows
        fits = fits and (mean is None or mean.shape == rows) and self._spec.center == (mean is not None)
        given = [t for t in (dy, dsum, mean, rstd) if t is not None]
        fits = fits and all(t.device == x.device and t.dtype in road.KERNEL_DTYPES for t in given)
        fits = fits and rstd.dtype in (torch.float32, torch.float64) and (mean is None or mean.dtype == rstd.dtype)
        torch._check(fits, lambda: f"trinorm::{self.name}: dy, dsum, mean and rstd are not as the forward gives them")
        known = all(not want or t is not None for want, t in zip(wanted[3:], parameters, strict=True))
        torch._check(known, lambda: f"trinorm::{self.name}: a gradient is asked for of what is not there")
        if not _is_launched(problem, x, gate, *parameters):
            return self.composite(*args)
        call = GatedSumCall(problem, rstd.dtype, differentiated=True)
        # (sum, rstd, input, gate, dy, dsum, weight, bias, mean) as the call takes them.
        return self.do_and_keep_gradients(args, call, wanted, itemgetter(4, 2, 3, 6, 7, 0, 8, 1, 5))

    def fake(self, *args: Any) -> Results:
        problem, (x, *parameters), (dx, dresidual, *others) = self._asked(args)
        return (
            x.new_empty(x.shape) if dx else None,
            x.new_empty(x.shape, dtype=problem.residual) if dresidual else None,
            *(t.new_empty(t.shape) if want else None for t, want in zip(parameters, others, strict=True)),
        )

    def _asked(self, args: Any) -> tuple[GatedSum, Any, tuple[bool, ...]]:
        """What was computed; of which (x, gate, weight, bias); and which gradients are wanted. y has dy's dtype."""
        total, _, x, gate, dy, _, weight, bias, _, dims, size, eps, modulated, of_residual, *wanted, batch_invariant = args
        dx, *others = wanted
        norm = Conditioned(ConditionedNorm(self._spec, modulated=modulated), dims, size, eps, dy.dtype, batch_invariant)
        problem = GatedSum(norm, of_residual or total.dtype, total.dtype)
        return problem, (x, gate, weight, bias), (dx, of_residual is not None, *others)


def _problem(spec: RowNorm, args: Any) -> tuple[GatedSum, Any]:
    """What the forward computes, and of which tensors."""
    *inputs, dims, size, eps, modulated, dtype, batch_invariant = args
    norm = Conditioned(ConditionedNorm(spec, modulated=modulated), dims, size, eps, dtype, batch_invariant)
    return problem_of(norm, *inputs[:2]), inputs


def _is_launched(problem: GatedSum, x: Tensor, *parameters: Tensor | None) -> bool:
    held = bool(x.numel()) and road.has_kernels(x) and are_held(problem.norm, x, *parameters)
    return held and shared_sets(problem.norm, x, *parameters) is not None


def _check(op: str, problem: GatedSum, x: Tensor, residual: Tensor, *parameters: Tensor | None) -> None:
    """That the kernels read nothing but these tensors, in a way that there is."""
    dims, size = problem.norm.dims, problem.norm.size
    fits = 1 <= dims <= x.dim() and x.shape[-dims:].numel() == size
    torch._check(fits, lambda: f"trinorm::{op}: the input's last {dims} dims do not hold a row of {size} elements")
    torch._check(residual.shape == x.shape, lambda: f"trinorm::{op}: residual or sum is not of the input's shape")
    fits = parameters[0] is not None and all(t is None or broadcasts(t, x, dims) for t in parameters)
    torch._check(fits, lambda: f"trinorm::{op}: gate, weight or bias is not broadcast to the input")
    given = [t for t in (x, residual, *parameters) if t is not None]
    torch._check(all(t.device == x.device for t in given), lambda: f"trinorm::{op}: not all tensors are on one device")
    known = all(t.dtype in road.KERNEL_DTYPES for t in given) and problem.norm.y in road.KERNEL_DTYPES
    torch._check_not_implemented(known, lambda: f"trinorm::{op}: a dtype other than {road.KERNEL_DTYPES}")


def _register(spec: RowNorm) -> None:
    backward = _Backward(spec)
    register(_Forward(spec, backward), CALLS)
    register(backward, CALLS)


for _spec in ROW_NORMS:
    _register(_spec)
