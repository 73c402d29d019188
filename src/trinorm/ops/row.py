"""The row family under autograd."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor

from .. import reference
from ..spec import RowNorm
from . import road
from .calls import Seen
from .layout import readable

if TYPE_CHECKING:
    from ..replay import Replayed


def row_norm(
    spec: RowNorm,
    x: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    key: Hashable,
) -> Tensor:
    """The norm of checked arguments, by the road that serves them; SEEN keeps a call that the kernels serve as ``key``."""
    if not road.kernels_serve(spec.name, x, weight, bias):
        return reference.composite(spec, x, normalized_shape, weight, bias, eps)
    given = x, weight, bias
    if torch._C._is_any_autocast_enabled() and x.dtype != torch.float64 and reference.autocast_to_fp32(spec, x.device.type):
        x = x.float()
        weight, bias = (None if t is None else t.float() for t in (weight, bias))
    dims = len(normalized_shape)
    x = readable(x, dims)
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    call = RowCall(spec, dims, x, weight, bias, eps)
    if all(t is g for t, g in zip((x, weight, bias), given, strict=True)):
        SEEN.remember(key, call)
    return call(x, weight, bias)


class RowCall:
    """The norm, and its gradients, of arguments that differ from those of one call in their values alone."""

    __slots__ = ("_backwards", "_bias_dtype", "_dims", "_eps", "_forward", "_needs_grad", "_spec")

    def __init__(self, spec: RowNorm, dims: int, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
        from ..replay import Replayed
        from . import rows

        needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
        self._spec, self._dims, self._eps = spec, dims, eps
        self._bias_dtype = None if bias is None else bias.dtype
        self._needs_grad = needs_grad
        self._forward = Replayed(lambda x, weight, bias: rows.forward(spec, x, dims, weight, bias, eps, save=needs_grad))
        self._backwards: Seen[Replayed] = Seen(8)

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if self._needs_grad:
            return _apply(x, weight, bias, self)
        y = self._forward(x, weight, bias)[0]
        assert y is not None
        return y

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, ...]:
        """(y, mean, rstd), the statistics where a backward will ask for them."""
        return self._forward(x, weight, bias)

    def backward(
        self,
        wanted: tuple[bool, ...],
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor | None,
        rstd: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """(dx, dw, db), those that are ``wanted``."""
        if torch.is_grad_enabled() or is_batchedtensor(dy) or is_legacy_batchedtensor(dy):
            # Someone differentiates this backward, to whom a kernel's result would be a constant, silently; or maps over
            # it (is_grads_batched, vmap), with tensors that have no storage.
            return reference.composite_gradients(self._spec, x, self._dims, weight, self._bias_dtype, self._eps, dy)
        dy = readable(dy, self._dims)
        key = (wanted, dy.dtype, dy.is_contiguous() or dy.stride())
        replayed = self._backwards.get(key)
        if replayed is None:
            replayed = self._gradients(wanted, weight)
            self._backwards.remember(key, replayed)
        return replayed(dy, x, weight, mean, rstd)

    def _gradients(self, wanted: tuple[bool, ...], weight: Tensor | None) -> Replayed:
        from ..replay import Replayed
        from . import rows

        spec, dims = self._spec, self._dims
        dw = weight.dtype if wanted[1] and weight is not None else None
        db = self._bias_dtype if wanted[2] else None
        return Replayed(
            lambda dy, x, weight, mean, rstd: rows.backward(
                spec, dy, x, dims, weight, mean, rstd, dx=wanted[0], dw=dw, db=db
            )
        )


class _RowNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, call: RowCall) -> Tensor | None:
        y, mean, rstd = call.forward(x, weight, bias)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.call = call
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.call.backward(ctx.needs_input_grad, dy, *ctx.saved_tensors), None


# Function.apply less its Python part, which looks for torch.func: no call with a transform active comes here, and it costs
# 1.3 of 3.8 µs.
_apply = super(torch.autograd.Function, _RowNorm).apply

# A model has a few dozen calls, times the row counts it serves; one takes about 3 KB.
SEEN: Seen[RowCall] = Seen(2048)
