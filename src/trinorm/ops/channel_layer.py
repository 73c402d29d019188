"""LayerNorm over channels, of tensors whose channels are first in memory, under autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..spec import LAYER_NORM
from . import road
from .layout import dense
from .row import are_plain


def channel_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The norm of checked arguments: by the kernels, or, where they do not serve, by LayerNorm's composite."""
    if not road.kernels_serve("channel_layer_norm", x, weight, bias):
        y = reference.composite(LAYER_NORM, x.movedim(1, -1), x.shape[1:2], weight, bias, eps)
        return y.movedim(-1, 1).contiguous()
    if x.dtype != torch.float64 and reference.autocast_to_fp32(LAYER_NORM, x.device.type):
        x, weight, bias = reference.in_fp32(x, weight, bias)
    x, weight, bias = (None if t is None else dense(t) for t in (x, weight, bias))  # type: ignore[assignment]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _ChannelLayerNorm.apply(x, weight, bias, eps)
    from . import channel_layers

    return channel_layers.forward(x, weight, bias, eps, save=False).y


class _ChannelLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        from . import channel_layers

        y, mean, rstd = channel_layers.forward(x, weight, bias, eps, save=True)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.eps, ctx.bias_dtype = eps, None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled() or not are_plain(dy, x, weight, mean, rstd) or road.observer() is not None:
            # Someone differentiates this backward, to whom a kernel's result would silently be a constant, or maps over it.
            how = weight, ctx.bias_dtype, ctx.eps, dy.movedim(1, -1)
            of_rows, dw, db = reference.composite_gradients(LAYER_NORM, x.movedim(1, -1), 1, *how)
            return None if of_rows is None else of_rows.movedim(-1, 1), dw, db, None
        from . import channel_layers

        dx, dw, db, _ = ctx.needs_input_grad
        asked: dict[str, Any] = dict(dx=dx, dw=weight.dtype if dw else None, db=ctx.bias_dtype if db else None)
        return *channel_layers.backward(dense(dy), dense(x), weight, mean, rstd, **asked), None
