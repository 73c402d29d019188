"""A norm and the linear layer behind it, between which nothing is kept for the backward: y is made again of x."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..ops import road
from ..spec import RowNorm
from .node import apply_of
from .norm import row_call, row_norm
from .row import CALLS, RowCall, are_plain


class NormLinear(NamedTuple):
    """linear(norm(x)): the norm is over the last dims of x, whose sizes are ``shape``."""

    spec: RowNorm
    shape: torch.Size
    eps: float
    batch_invariant: bool

    @property
    def asked(self) -> tuple[torch.Size, float, tuple[str, str, bool]]:
        """By which a call is recalled, as row.prepared's: a manner of its own, in which nothing is left to an option."""
        return self.shape, self.eps, ("linear", self.spec.cast, self.batch_invariant)


def norm_linear(
    norm: NormLinear,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
) -> Tensor:
    """The result of checked arguments."""
    given = x, weight, bias, linear_weight, linear_bias
    # Without a gradient of the linear weight's nobody needs y, and F.linear keeps none.
    if torch.compiler.is_compiling():
        wanted = torch.is_grad_enabled() and linear_weight.requires_grad
        if wanted and not torch.compiler._is_exporting_flag:  # to is_exporting() Dynamo always says yes (2.11)
            from torch.utils.checkpoint import checkpoint

            # The partitioner of a compiled graph keeps y where it is not told otherwise, Inductor's too (2.11, 2.13).
            again: Tensor = checkpoint(_composition, norm, *given, use_reentrant=False, preserve_rng_state=False)
            return again
    elif road.is_differentiated(linear_weight) and road.PLAIN_OR_NONE.issuperset(map(type, given)):
        call = _recall(norm, x, weight, bias)
        if call is not None:
            inputs = reference.in_fp32(x, weight, bias) if call._cast else (x, weight, bias)
            return _apply(*given, norm, call, inputs)
        if road.kernels_serve(norm.spec.name, x, weight, bias):
            problem = norm.spec, x, norm.shape, weight, bias, norm.eps, norm.asked
            return _apply(*given, norm, *row_call(*problem, "input", norm.batch_invariant))
    return _composition(norm, *given)


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast has F.linear take its tensors to, those of float64 excepted; None where it is off."""
    return torch.get_autocast_dtype(device) if reference.autocasts(device) else None


def _composition(
    norm: NormLinear,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
) -> Tensor:
    return F.linear(_normalized(norm, x, weight, bias), linear_weight, linear_bias)


def _normalized(norm: NormLinear, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """y, by the road of functional's norms."""
    if (call := _recall(norm, x, weight, bias)) is not None:
        return call(x, weight, bias)
    return row_norm(norm.spec, x, norm.shape, weight, bias, norm.eps, norm.asked, "input", norm.batch_invariant)


def _recall(norm: NormLinear, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> RowCall | None:
    shape, eps, manner = norm.asked
    return CALLS.recall(norm.spec.name, manner, x, shape, weight, bias, eps)


def _in_dtype(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    """t as autocast hands it to F.linear, whose dtype it has for that."""
    return t if dtype is None or t.dtype == torch.float64 else t.to(dtype)


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        norm: NormLinear,
        call: RowCall,
        inputs: tuple[Tensor, Tensor | None, Tensor | None],
    ) -> Tensor:
        y, mean, rstd = call.results(*inputs)
        assert y is not None
        # Parameters are kept as they are, not as autocast has them: they are there anyway. They are cast by hand: autocast
        # would remember a cast that no gradient flows through, and hand it to the weight's next use.
        ctx.save_for_backward(x, weight, bias, linear_weight, mean, rstd)
        ctx.norm, ctx.call, ctx.autocast = norm, call, autocast_dtype(x.device.type)
        ctx.in_fp32 = x.dtype != torch.float64 and reference.autocast_to_fp32(norm.spec, x.device.type)
        ctx.dtypes = y.dtype, None if linear_bias is None else linear_bias.dtype
        linear = (None if t is None else _in_dtype(t, ctx.autocast) for t in (y, linear_weight, linear_bias))
        z = F.linear(*linear)  # type: ignore[arg-type]
        # Of three dims and a bias F.linear's result is a view, and autograd lets nobody write to a Function's.
        return torch.ops.aten._unsafe_view(z, z.shape) if z._is_view() else z

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # All is cast as the forward's autocast had it; one around the backward has no say.
        autocasts = torch._C._is_any_autocast_enabled()
        with torch.autocast(dy.device.type, enabled=False) if autocasts else contextlib.nullcontext():
            return *_gradients(ctx, dy), None, None, None


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Those of x, weight, bias, linear_weight and linear_bias, in operators that can be differentiated where grad is on."""
    x, weight, bias, linear_weight, mean, rstd = ctx.saved_tensors
    *of_norm, of_weight, of_bias = ctx.needs_input_grad[:5]
    y_dtype, bias_dtype = ctx.dtypes
    given: tuple[Tensor, Tensor | None, Tensor | None]
    given = reference.in_fp32(x, weight, bias) if ctx.in_fp32 else (x, weight, bias)
    dx = dw = db = dlinear = dlinear_bias = None
    m = x.shape[:-1].numel()
    rows = dy.reshape(m, dy.shape[-1])
    if of_weight:
        y = _in_dtype(_again(ctx.norm, dy, *given, mean, rstd), ctx.autocast)
        dlinear = (rows.t() @ y.reshape(m, y.shape[-1])).to(linear_weight.dtype)
        del y  # before there is a dy of its size
    if of_bias:
        dlinear_bias = rows.sum(0).to(bias_dtype)
    if any(of_norm):
        of_y = (rows @ _in_dtype(linear_weight, ctx.autocast)).to(y_dtype).reshape(x.shape)
        dx, dw, db = ctx.call.backward(tuple(of_norm), of_y, given[0], given[1], mean, rstd)
        dx, dw, db = (None if d is None else d.to(t.dtype) for d, t in ((dx, x), (dw, weight), (db, bias)))
    return dx, dw, db, dlinear, dlinear_bias


def _again(
    norm: NormLinear,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
) -> Tensor:
    """y: of the forward's bits, by the kernels, where they can read what was kept and nobody looks inside."""
    if are_plain(dy, x, weight, bias, mean, rstd) and road.observer() is None:
        return _normalized(norm, x, weight, bias)
    return reference.composite(norm.spec, x, norm.shape, weight, bias, norm.eps)


_apply = apply_of(_NormLinear)
