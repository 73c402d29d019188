"""Norms with a quantized result as registered ops. For each spec::

    quantized_layer_norm(
        input, input_scale?, residual?, weight?, bias?, scale?, dims, eps, format, scale_layout, batch_invariant, save, cast
    ) -> (data, scale, sum, mean, rstd, straight)
    quantized_rms_norm(the same) -> (the same, whose mean is None)

scale is a number of the whole result, where the format asks for one; "fp8" has no other, and returns None for it. A sum
there is with a residual; statistics and ``straight`` with ``save``. Data and scales are no functions to be differentiated.
straight is y's place for that: zeros of y's shape and dtype, in one element's memory, whose gradient is the norm's dy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...formats import FORMATS, SCALE_LAYOUTS
from ...ops import road
from ...spec import CASTS, ROW_NORMS, RowNorm
from ..problems.quantized import Given, Quantizing
from ..quantized import CALLS, CODES, QuantizedCall, composite, lacking, read, scaled_up, straight
from .names import QUANTIZED_NORMS, SUMS
from .registering import Op, know_distributed, register

if TYPE_CHECKING:
    from ...replay import Results


def norm(problem: Quantizing, given: Given) -> Results:
    """By the registered op."""
    know_distributed(*given)
    spec, *by, save = problem
    return getattr(torch.ops.trinorm, QUANTIZED_NORMS[spec.name])(*given, *by, save, spec.cast)


class _Forward(Op):
    differentiable = True
    schema = (
        "(Tensor input, Tensor? input_scale, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? scale, int dims, "
        "float eps, str format, str scale_layout, bool batch_invariant, bool save, str cast) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    )

    def __init__(self, spec: RowNorm) -> None:
        self._spec = spec
        self.name = QUANTIZED_NORMS[spec.name]

    def save(self, ctx: Any, results: Results, *args: Any) -> None:
        ctx.problem, given = self._problem(args)
        data, scale, total, mean, rstd, _ = results
        ctx.mark_non_differentiable(*(t for t in (data, scale, mean, rstd) if t is not None))
        # Of a sum all that is asked for is the sum.
        kept = (given.x, given.x_scale) if total is None else (total, None)
        ctx.save_for_backward(*kept, given.weight, mean, rstd)
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (given.x, given.residual, given.bias))

    def differentiate(self, ctx: Any, *gradients: Tensor | None) -> Results:
        """The row norms' own, or those of a sum."""
        (_, _, dsum, _, _, dy), problem, name = gradients, ctx.problem, self._spec.name
        x, x_scale, weight, mean, rstd = ctx.saved_tensors
        of_x, of_residual, of_bias = ctx.dtypes
        _, _, _, wants_x, _, wants_residual, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        x = scaled_up(x, x_scale, problem.dims)
        shape, how = x.shape[-problem.dims :], (problem.batch_invariant, problem.spec.cast)
        wants_weight, of_bias = (wants_weight, of_bias if wants_bias else None) if dy is not None else (False, None)
        if of_residual is None:
            op, dresidual = getattr(torch.ops.trinorm, f"{name}_backward"), None
            dx, dw, db = op(dy, x, shape, weight, mean, rstd, problem.eps, wants_x, wants_weight, of_bias, *how)
        else:
            op = getattr(torch.ops.trinorm, f"{SUMS[name]}_backward")
            wanted = of_x if wants_x else None, of_residual if wants_residual else None, wants_weight, of_bias
            given = x, dy, dsum, shape, weight, mean, rstd, None, None, problem.eps, 1.0, 0.0
            dx, dresidual, dw, db = op(*given, *wanted, *how)
        return dx, None, dresidual, dw, db, *(None,) * 8

    def composite(self, *args: Any) -> Results:
        problem, given = self._problem(args)
        _check(self.name, problem, given)
        return composite(problem, given, traced=True)

    def anew(self, *args: Any) -> Results:
        problem, given = self._problem(args)
        _check(self.name, problem, given)
        if not given.x.numel() or lacking(problem, given) or not road.has_kernels(given.x):
            return composite(problem, given)
        call = QuantizedCall(problem, given.x)
        again = lambda *given: (*call(*given), straight(problem, Given(*given)))  # noqa: E731
        return self.do_and_keep(args, again, lambda *given: read(problem, Given(*given)))

    def fake(self, *args: Any) -> Results:
        problem, given = self._problem(args)
        _check(self.name, problem, given)
        x, form = given.x, problem.form
        sizes, strides = problem.scale_shape(x), problem.column_strides(x)
        if form.scaling == "tensor":
            scale = None
        elif strides is not None:
            scale = x.new_empty_strided(sizes, strides, dtype=form.scale_dtype)
        else:
            scale = x.new_empty(sizes, dtype=form.scale_dtype)
        leading = x.shape[: -problem.dims]
        mean, rstd = (x.new_empty(leading, dtype=given.stats) if problem.save else None for _ in range(2))
        return (
            x.new_empty(problem.data_shape(x), dtype=form.data_dtype),
            scale,
            None if given.residual is None else x.new_empty(x.shape, dtype=given.sum_dtype),
            mean if self._spec.center else None,
            rstd,
            straight(problem, given),
        )

    def _problem(self, args: Any) -> tuple[Quantizing, Given]:
        *tensors, dims, eps, form, scale_layout, batch_invariant, save, cast = args
        by = dims, eps, form, scale_layout, batch_invariant, save
        return Quantizing(self._spec.with_cast(cast), *by), Given(*tensors)


def _check(op: str, problem: Quantizing, given: Given) -> None:
    """That the kernel reads nothing but these tensors, in a way that there is."""
    x, x_scale, residual, weight, bias, scale = given
    torch._check(
        problem.name in FORMATS,
        lambda: f"trinorm::{op}: format is {problem.name!r}; it must be one of {', '.join(FORMATS)}",
    )
    fits = problem.scale_layout in SCALE_LAYOUTS and (problem.scale_layout != "swizzled" or problem.form.swizzles)
    torch._check(fits, lambda: f"trinorm::{op}: scale_layout is {problem.scale_layout!r}, which the format does not have")
    torch._check(problem.spec.cast in CASTS, lambda: f"trinorm::{op}: cast must be one of {', '.join(CASTS)}")
    fits = 0 < problem.dims <= x.dim() and x.shape[-1] % problem.form.packed == 0
    torch._check(fits, lambda: f"trinorm::{op}: dims or format does not fit the input")
    shape, leading = x.shape[-problem.dims :], x.shape[: -problem.dims]
    fits = all(t is None or t.shape == shape for t in (weight, bias)) and (residual is None or residual.shape == x.shape)
    torch._check(fits, lambda: f"trinorm::{op}: weight, bias or residual does not fit the input")
    fits = (x_scale is not None) == (x.dtype == CODES) and (scale is not None) == problem.form.given
    torch._check(fits, lambda: f"trinorm::{op}: a scale is missing, or there is one that nothing asks for")
    fits = all(t is None or t.dtype == torch.float32 for t in (x_scale, scale)) and (scale is None or scale.numel() == 1)
    fits = fits and (x_scale is None or x_scale.numel() == 1 or x_scale.shape == (*leading, 1))
    torch._check(fits, lambda: f"trinorm::{op}: input_scale or scale is not of the shape or dtype that it must have")
    torch._check(all(t is None or t.device == x.device for t in given), lambda: f"trinorm::{op}: tensors on two devices")
    known = all(t is None or t.dtype in road.KERNEL_DTYPES for t in (residual, weight, bias))
    known = known and x.dtype in (*road.KERNEL_DTYPES, CODES)
    torch._check_not_implemented(known, lambda: f"trinorm::{op}: a dtype other than {road.KERNEL_DTYPES}")


for _spec in ROW_NORMS:
    register(_Forward(_spec), CALLS)
