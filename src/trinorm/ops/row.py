"""The row family under autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor

from .. import reference
from ..spec import RowNorm
from . import road
from .calls import Bounded, Calls
from .layout import readable

if TYPE_CHECKING:
    from ..replay import Function, Results


def row_norm(
    spec: RowNorm,
    x: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    asked: tuple[Sequence[int], float | None],
) -> Tensor:
    """The norm of checked arguments, by the road that serves them. CALLS keeps what the kernels can do again.

    asked: normalized_shape and eps as the caller gave them, by which the next call is recalled.
    """
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
    if all(now is before for now, before in zip((x, weight, bias), given, strict=True)):
        CALLS.keep(spec.name, x, asked[0], weight, bias, asked[1], call)
    return call(x, weight, bias)


class RowCall:
    """The norm, and its gradients, of arguments that differ from those of one call in their values alone."""

    __slots__ = ("_bias_dtype", "_dims", "_eps", "_gradients", "_needs_grad", "_replay", "_spec")

    def __init__(self, spec: RowNorm, dims: int, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
        self._spec, self._dims, self._eps = spec, dims, eps
        self._bias_dtype = None if bias is None else bias.dtype
        self._needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
        self._replay: Function | None = None
        self._gradients: Bounded[Function] = Bounded(8)

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if self._needs_grad:
            return _apply(x, weight, bias, self)
        return (self._replay or self.forward)(x, weight, bias)[0]  # type: ignore[return-value]

    def forward(self, *inputs: Tensor | None) -> Results:
        """(y, mean, rstd), the statistics where a backward will ask for them."""
        from . import rows

        def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Results:
            return rows.forward(self._spec, x, self._dims, weight, bias, self._eps, save=self._needs_grad)

        results, again = _record(forward, *inputs)
        self._replay = again or self._replay
        return results

    def backward(
        self,
        wanted: tuple[bool, ...],
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor | None,
        rstd: Tensor,
    ) -> Results:
        """(dx, dw, db), those that are ``wanted``."""
        if torch.is_grad_enabled() or is_batchedtensor(dy) or is_legacy_batchedtensor(dy):
            # Someone differentiates this backward, to whom a kernel's result would be a constant, silently; or maps over
            # it (is_grads_batched, vmap), with tensors that have no storage.
            return reference.composite_gradients(self._spec, x, self._dims, weight, self._bias_dtype, self._eps, dy)
        dy = readable(dy, self._dims)
        key = wanted, dy.dtype, dy.is_contiguous() or dy.stride()
        if (gradients := self._gradients.get(key)) is not None:
            return gradients(dy, x, weight, mean, rstd)
        return self._backward(key, dy, x, weight, mean, rstd)

    def _backward(self, key: tuple[Any, ...], *inputs: Tensor | None) -> Results:
        from . import rows

        (dx, dw, db, *_), *_ = key

        def backward(dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor | None, rstd: Tensor) -> Results:
            dw_dtype = weight.dtype if dw and weight is not None else None
            db_dtype = self._bias_dtype if db else None
            return rows.backward(self._spec, dy, x, self._dims, weight, mean, rstd, dx=dx, dw=dw_dtype, db=db_dtype)

        results, again = _record(backward, *inputs)
        if again is not None:
            self._gradients[key] = again
        return results


def _record(function: Function, *inputs: Tensor | None) -> tuple[Results, Function | None]:
    """replay.record; nothing is repeated past someone who put a launch of his own in rows' place, to see them all."""
    from .. import launch, replay
    from . import rows

    return replay.record(function, *inputs) if rows.launch is launch.launch else (function(*inputs), None)


class _RowNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, call: RowCall) -> Tensor | None:
        y, mean, rstd = (call._replay or call.forward)(x, weight, bias)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.call = call
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.call.backward(ctx.needs_input_grad, dy, *ctx.saved_tensors), None


# Function.apply less its Python part, which looks for torch.func: no call with a transform active comes here, and it costs
# 1.3 of 3.8 µs.
_apply = super(torch.autograd.Function, _RowNorm).apply

# Row counts times the shapes of a model. One takes about 4 KB.
CALLS: Calls[RowCall] = Calls(2048)
