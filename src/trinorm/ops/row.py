"""The row family under autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor

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
    if torch._C._is_any_autocast_enabled() and x.dtype != torch.float64 and reference.autocast_to_fp32(spec, x.device.type):
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
        if torch.is_grad_enabled() or is_batchedtensor(dy) or is_legacy_batchedtensor(dy):
            # Someone differentiates this backward, to whom a kernel's result would be a constant, silently; or maps over
            # it (is_grads_batched, vmap), with tensors that have no storage.
            gradients = reference.composite_gradients(spec, x, dims, weight, ctx.bias_dtype, ctx.eps, dy)
            return *gradients, None, None, None
        from . import rows

        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        return (
            *rows.backward(
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
            ),
            None,
            None,
            None,
        )
