"""Norms with a quantized result: the problem, its calls, and the gradient that passes straight through the rounding."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import quantized_reference, reference
from ..formats import FORMATS, Format, FormatName
from ..spec import RowNorm
from ..switches import when_set
from . import added_library, road
from .calls import Known
from .layout import dense, readable
from .repeated import Repeated

if TYPE_CHECKING:
    from ..replay import Results

# What an input may be that has scales of its own.
CODES = torch.float8_e4m3fn

# Of how many bytes a row is that a program holds, an element having no less than two, or four of an e4m3 times its scale.
MOST_OF_ROW = 32 << 10


class Quantizing(NamedTuple):
    """What is computed of the tensors: the norm over the last ``dims`` dims, its result in a format. column_major: how the
    scales of blocks lie; save: a backward will ask for the statistics.
    """

    spec: RowNorm
    dims: int
    eps: float
    name: FormatName
    column_major: bool
    save: bool

    @property
    def form(self) -> Format:
        return FORMATS[self.name]

    def data_shape(self, x: Tensor) -> tuple[int, ...]:
        return *x.shape[:-1], x.shape[-1] // self.form.packed

    def scale_shape(self, x: Tensor) -> tuple[int, ...]:
        return *x.shape[: -self.dims], self.form.scales(x.shape[-self.dims :].numel())


class Given(NamedTuple):
    """The tensors. x_scale: of an x of codes; scale: a number of the whole result."""

    x: Tensor
    x_scale: Tensor | None
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    scale: Tensor | None

    @property
    def has_codes(self) -> bool:
        """Whether x is one of codes, which have a scale."""
        return self.x_scale is not None

    @property
    def stats(self) -> torch.dtype:
        """The statistics' dtype."""
        return road.accumulator_dtype(self.x, self.residual, self.weight, self.bias)

    @property
    def sum_dtype(self) -> torch.dtype:
        """What is normalized has it: x's, or the sum's."""
        if self.has_codes:
            return torch.float32 if self.residual is None else self.residual.dtype
        return self.x.dtype if self.residual is None else torch.promote_types(self.x.dtype, self.residual.dtype)

    @property
    def y_dtype(self) -> torch.dtype:
        """What y would have, were it not quantized."""
        return self.sum_dtype if self.has_codes else self.x.dtype


def lacking(problem: Quantizing, given: Given) -> str | None:
    """Why there is no kernel for such a call; None where there is one."""
    bytes_of_row = given.x.shape[-problem.dims :].numel() * held_bytes(given)
    return f"a row has over {MOST_OF_ROW} bytes, as it is held" if bytes_of_row > MOST_OF_ROW else None


def held_bytes(given: Given) -> int:
    """Of an element of what is normalized, as a program holds it."""
    if given.stats == torch.float64:
        return 16
    return 4 if given.has_codes else max(2, given.sum_dtype.itemsize)


def normalized(given: Given) -> tuple[Tensor, Tensor | None]:
    """(what is normalized, the sum where there is one), by ATen's ops."""
    x = given.x
    if given.x_scale is not None:
        x = x.float() * given.x_scale
    if given.residual is None:
        return x, None
    wide = given.stats
    total = (x.to(wide) + given.residual.to(wide)).to(given.sum_dtype)
    return total, total


def composite(problem: Quantizing, given: Given) -> Results:
    """(data, scale, sum, mean, rstd) by ATen's ops; no scale where one is given."""
    spec, dims, eps = problem.spec, problem.dims, problem.eps
    x, total = normalized(given)
    y = quantized_reference.normalized(spec, x, dims, given.weight, given.bias, eps, given.y_dtype)
    scale: Tensor | None
    data, scale = quantized_reference.quantize(problem.form, y.flatten(-dims), given.scale)
    data = data.reshape(problem.data_shape(x))
    if problem.form.scaling == "tensor":
        scale = None
    elif problem.column_major:
        scale = scale.movedim(-1, 0).contiguous().movedim(0, -1)
    mean = rstd = None
    if problem.save:
        mean, rstd = (t.to(given.stats) for t in reference.statistics(spec, x, dims, eps))
    return data, scale, total, mean if spec.center else None, rstd


class QuantizedCall:
    """The norm of arguments that differ from those of one call in their values alone."""

    __slots__ = ("_forward", "_problem")

    def __init__(self, problem: Quantizing) -> None:
        self._problem = problem
        self._forward = Repeated(functools.partial(_forward, problem), _is_watched)

    def __call__(self, x: Tensor, *others: Tensor | None) -> Results:
        """(data, scale, sum, mean, rstd) of Given's tensors, as ``read`` has them. What Triton has no type for passes the
        launch as bytes.
        """
        problem, form = self._problem, self._problem.form
        data, scale, *more = self._forward(x.view(torch.uint8) if x.dtype == CODES else x, *others)
        assert data is not None
        if scale is not None:
            scale = scale if form.scaling == "fp32" else scale.view(form.scale_dtype)
            scale = scale.movedim(0, -1) if problem.column_major else scale
        return data.view(form.data_dtype), scale, *more


def read(problem: Quantizing, given: Given) -> Given:
    """The tensors, or others, as the kernel reads them."""
    x, x_scale, residual, weight, bias, scale = given
    parameters = (None if t is None else readable(t, problem.dims) for t in (weight, bias))
    others = (None if t is None else dense(t) for t in (x_scale, residual))
    return Given(readable(x, problem.dims), *others, *parameters, scale)


def quantized_norm(problem: Quantizing, given: Given, asked: Hashable) -> tuple[Any, ...]:
    """(data, scale, sum, straight) of checked arguments. asked: by what the call is recalled, None where by nothing."""
    from . import quantized_library

    op = quantized_library.NAMES[problem.spec.name]
    if road.is_differentiated(given.x, given.residual, given.weight, given.bias):
        data, scale, total, straight, *_ = _StraightThrough.apply(*given, problem._replace(save=True))
        return data, scale, total, straight
    why = lacking(problem, given)
    if why is None and road.takes_op(op, *given, whole=True):
        return *quantized_library.norm(problem, given)[:3], None
    if not given.x.numel() or not road.kernels_serve(op, *given, lacking=why):
        return *composite(problem, given)[:3], None
    inputs = read(problem, given)
    call = QuantizedCall(problem)
    if asked is not None and all(now is before for now, before in zip(inputs, given, strict=True)):
        CALLS.keep(asked, call, *inputs)
    return *call(*inputs)[:3], None


def _forward(problem: Quantizing, *given: Any) -> Results:
    from . import quantized_rows

    return quantized_rows.forward(problem, Given(*given))


def _is_watched() -> bool:
    from .. import launch
    from . import quantized_rows

    return quantized_rows.launch is not launch.launch


class _StraightThrough(torch.autograd.Function):
    """The norm, whose rounding to the format has the derivative 1. ``straight`` is where that gradient comes in: it has y's
    shape and dtype, zeros, and no memory but one element's.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        from . import quantized_library

        *given, problem = args
        x, results = Given(*given), quantized_library.norm(problem, Given(*given))
        straight = x.x.new_zeros((), dtype=x.y_dtype).expand(x.x.shape)
        return *results[:3], straight, *results[3:]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, problem = inputs
        data, scale, total, _, mean, rstd = output
        ctx.mark_non_differentiable(*(t for t in (data, scale, mean, rstd) if t is not None))
        ctx.set_materialize_grads(False)
        given, ctx.problem = Given(*tensors), problem
        # Of a sum all that is asked for is the sum.
        kept = given.x if total is None else total
        ctx.save_for_backward(kept, given.x_scale if total is None else None, given.weight, mean, rstd)
        ctx.dtypes = tuple(None if t is None else t.dtype for t in given)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (_, _, dsum, dy, *_), problem = gradients, ctx.problem
        x, x_scale, weight, mean, rstd = ctx.saved_tensors
        of_x, _, of_residual, _, of_bias, _ = ctx.dtypes
        wants_x, _, wants_residual, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        if x_scale is not None:
            x = x.float() * x_scale
        name, shape = problem.spec.name, x.shape[-problem.dims :]
        how = False, problem.spec.cast
        dx = dresidual = dw = db = None
        if of_residual is not None and (dy is not None or dsum is not None):
            op = getattr(torch.ops.trinorm, f"{added_library.NAMES[name]}_backward")
            parts = wants_weight and dy is not None, of_bias if wants_bias and dy is not None else None
            wanted = of_x if wants_x else None, of_residual if wants_residual else None, *parts
            given = x, dy, dsum, shape, weight, mean, rstd, None, None, problem.eps, 1.0, 0.0
            dx, dresidual, dw, db = op(*given, *wanted, *how)
        elif dy is not None:
            op = getattr(torch.ops.trinorm, f"{name}_backward")
            wanted = wants_x, wants_weight, of_bias if wants_bias else None
            dx, dw, db = op(dy, x, shape, weight, mean, rstd, problem.eps, *wanted, *how)
        return dx, None, dresidual, dw, db, None, None


CALLS: Known[QuantizedCall] = Known(1024)
when_set(CALLS.clear)
