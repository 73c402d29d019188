"""The row family under autograd."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..spec import RowNorm
from . import road
from .layout import readable


def row_norm(
    spec: RowNorm, x: Tensor, normalized_shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """The norm of checked arguments, by the road that serves them."""
    if not road.kernels_serve(spec.name, x, weight, bias):
        return reference.composite(spec, x, normalized_shape, weight, bias, eps)
    if torch._C._is_any_autocast_enabled() and x.dtype != torch.float64 and _autocast_to_fp32(spec.name, x.device.type):
        x = x.float()
        weight, bias = (None if t is None else t.float() for t in (weight, bias))
    dims = len(normalized_shape)
    x = readable(x, dims)
    if torch.is_grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    ):
        return _RowNorm.apply(x, weight, bias, spec, dims, eps)
    from . import rows

    return rows.forward(spec, x, dims, weight, bias, eps, save=False).y


def _autocast_to_fp32(op: str, device: str) -> bool:
    """Whether autocast is on, and makes torch's own op compute in fp32 and return it."""
    return torch.is_autocast_enabled(device) and _policy_is_fp32(op, device)


@functools.cache
def _policy_is_fp32(op: str, device: str) -> bool:
    # Asked of torch itself, once: rms_norm is not on CUDA's list in 2.11, and layer_norm is.
    with torch.autocast(device, dtype=torch.bfloat16):
        y = getattr(torch.nn.functional, op)(torch.ones(1, 1, dtype=torch.bfloat16, device=device), (1,))
    return bool(y.dtype == torch.float32)


class _RowNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: RowNorm, dims: int, eps: float
    ) -> Tensor:
        from . import rows

        y, mean, rstd = rows.forward(spec, x, dims, weight, bias, eps, save=True)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.spec, ctx.dims, ctx.eps = spec, dims, eps
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        spec, dims = ctx.spec, ctx.dims
        if torch.is_grad_enabled():
            # Someone differentiates this backward: a kernel's result would be a constant to them, silently.
            shape = x.shape[-dims:]
            bias = None if ctx.bias_dtype is None else x.new_zeros(shape, dtype=ctx.bias_dtype)
            return *reference.composite_gradients(spec, x, shape, weight, bias, ctx.eps, dy), None, None, None
        from . import rows

        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        gradients = rows.backward(
            spec,
            readable(dy, dims),
            x,
            dims,
            weight,
            mean,
            rstd,
            dx=need_x,
            dw=weight.dtype if need_w else None,
            db=ctx.bias_dtype if need_b else None,
        )
        return *gradients, None, None, None
