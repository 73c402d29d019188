"""Norms with a quantized result: the problem, and its calls."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import reference
from ..reference import quantized as quantized_reference
from ..switches import when_set
from .calls import Known
from .layout import dense, readable
from .problems.quantized import Given, Quantizing, held_bytes
from .repeated import Repeated

if TYPE_CHECKING:
    from ..replay import Results

# What an input may be that has scales of its own.
CODES = torch.float8_e4m3fn

# Of how many bytes a row is that a program holds, an element having no less than two, or four of an e4m3 times its scale.
MOST_OF_ROW = 32 << 10


def lacking(problem: Quantizing, given: Given) -> str | None:
    """Why there is no kernel for such a call; None where there is one."""
    bytes_of_row = given.x.shape[-problem.dims :].numel() * held_bytes(given)
    return f"a row has over {MOST_OF_ROW} bytes, as it is held" if bytes_of_row > MOST_OF_ROW else None


def scaled_up(x: Tensor, x_scale: Tensor | None, dims: int) -> Tensor:
    """x, or what its codes stand for: times the scale of each row, or of all."""
    if x_scale is None:
        return x
    return x.float() * x_scale.reshape((*x.shape[:-dims], *(1,) * dims) if x_scale.numel() > 1 else ())


def added(given: Given, dims: int) -> tuple[Tensor, Tensor | None]:
    """(what is normalized, the sum where there is one), by ATen's ops."""
    x = scaled_up(given.x, given.x_scale, dims)
    if given.residual is None:
        return x, None
    wide = given.stats
    total = (x.to(wide) + given.residual.to(wide)).to(given.sum_dtype)
    return total, total


def straight(problem: Quantizing, given: Given) -> Tensor | None:
    """Where a gradient of y comes in, once autograd makes it a result. What -0.0 is added to keeps its bits."""
    return given.x.new_full((), -0.0, dtype=given.y_dtype).expand(given.x.shape) if problem.save else None


def composite(problem: Quantizing, given: Given, *, traced: bool = False) -> Results:
    """(data, scale, sum, mean, rstd, straight) by ATen's ops; no scale where one is given. traced: straight is made of y,
    and has all of y's derivatives.
    """
    spec, dims, eps = problem.spec, problem.dims, problem.eps
    x, total = added(given, dims)
    y = quantized_reference.normalized(spec, x, dims, given.weight, given.bias, eps, given.y_dtype)
    scale: Tensor | None
    data, scale = quantized_reference.quantize(problem.form, y.detach().flatten(-dims), given.scale)
    data = data.reshape(problem.data_shape(x))
    if problem.form.scaling == "tensor":
        scale = None
    elif problem.scale_layout == "swizzled":
        scale = quantized_reference.swizzled(scale)
    elif (strides := problem.column_strides(x)) is not None:
        scale = scale.new_empty_strided(scale.shape, strides).copy_(scale)
    mean = rstd = None
    if problem.save:
        mean, rstd = (t.detach().to(given.stats) for t in reference.statistics(spec, x, dims, eps))
    at = (-(y.detach() - y)).to(given.y_dtype) if traced and problem.save else straight(problem, given)
    return data, scale, total, mean if spec.center else None, rstd, at


class QuantizedCall:
    """The norm of arguments that differ from those of one call in their values alone."""

    __slots__ = ("_column", "_forward", "problem")

    def __init__(self, problem: Quantizing, x: Tensor) -> None:
        self.problem = problem
        strides = problem.column_strides(x)
        self._column = None if strides is None else (problem.scale_shape(x), strides)
        self._forward = Repeated(functools.partial(_forward, problem), _is_watched)

    def __call__(self, x: Tensor, *others: Tensor | None) -> Results:
        """(data, scale, sum, mean, rstd) of Given's tensors, as ``read`` has them. What Triton has no type for passes the
        launch as bytes.
        """
        form = self.problem.form
        data, scale, *more = self._forward(x.view(torch.uint8) if x.dtype == CODES else x, *others)
        assert data is not None
        if scale is not None:
            scale = scale if scale.dtype == torch.float32 else scale.view(form.scale_dtype)
            scale = scale if self._column is None else scale.as_strided(*self._column)
        return data.view(form.data_dtype), scale, *more


def read(problem: Quantizing, given: Given) -> Given:
    """The tensors, or others, as the kernel reads them."""
    x, x_scale, residual, weight, bias, scale = given
    weight, bias = (None if t is None else readable(t, problem.dims) for t in (weight, bias))
    x_scale, residual, scale = (None if t is None else dense(t) for t in (x_scale, residual, scale))
    return Given(readable(x, problem.dims), x_scale, residual, weight, bias, scale)


def _forward(problem: Quantizing, *given: Any) -> Results:
    from .hosts import quantized_rows

    return quantized_rows.forward(problem, Given(*given))


def _is_watched() -> bool:
    from .. import launch
    from .hosts import quantized_rows

    return quantized_rows.launch is not launch.launch


CALLS: Known[QuantizedCall] = Known(1024)
when_set(CALLS.clear)
