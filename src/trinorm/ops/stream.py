"""A norm of the residual stream under autograd, which hands the stream on: its backward adds the stream's own gradient."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import reference
from ..ops import road
from ..spec import RowNorm
from ..switches import when_set
from .added import AddedCall, AddedProblem, _is_watched, dtypes_of
from .calls import Known
from .layout import readable
from .node import apply_of
from .repeated import Repeated

if TYPE_CHECKING:
    from ..replay import Results


class StreamCall:
    """The norm, and its gradients with the stream's in them, of arguments that differ in their values alone."""

    __slots__ = ("backward", "results")

    def __init__(self, problem: AddedProblem, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
        self.results = Repeated(functools.partial(_forward, problem), _is_watched)
        # That of a sum, of which only one part wants a gradient.
        self.backward = AddedCall(problem, dtypes_of(x, x, weight, bias), differentiated=True).backward


def recall(manner: Hashable, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """What stream_norm returns for a call like one before; None where none was."""
    call = CALLS.recall(manner, x, weight, bias)
    return None if call is None else _apply(x, weight, bias, call)


def stream_norm(
    spec: RowNorm,
    x: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    batch_invariant: bool,
    manner: Hashable,
) -> tuple[Tensor, Tensor] | None:
    """(y, x) of checked arguments, where ``dx = d(y) + d(x)`` is one launch; None where that would be nothing but the norm:
    x has no gradient, or the kernels do not serve it as it is. manner: by what ``recall`` finds the next call like this.
    """
    if torch.compiler.is_compiling() or not (road.is_differentiated(x) and x.is_contiguous()):
        return None
    dims, inputs = len(normalized_shape), (x, weight, bias)
    narrow = any(t is not None and t.dtype in (torch.float16, torch.bfloat16) for t in inputs)
    as_they_are = all(t is None or readable(t, dims) is t for t in inputs)
    as_they_are = as_they_are and not (narrow and reference.autocast_to_fp32(spec, x.device.type))
    if not as_they_are or not road.kernels_serve(spec.name, *inputs):
        return None
    call = StreamCall(AddedProblem(spec, dims, eps, 1.0, x.dtype, batch_invariant), *inputs)
    CALLS.keep(manner, call, *inputs)
    return _apply(x, weight, bias, call)


def _forward(problem: AddedProblem, *inputs: Any) -> Results:
    from .hosts import rows

    x, weight, bias = inputs
    how: dict[str, Any] = dict(save=True, batch_invariant=problem.batch_invariant)
    return rows.forward(problem.spec, x, problem.dims, weight, bias, problem.eps, **how)


class _StreamNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, call: StreamCall
    ) -> tuple[Tensor | None, Tensor]:
        y, mean, rstd = call.results(x, weight, bias)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.call = call
        return y, x

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dx: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:  # nobody uses y
            return dx, None, None, None
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        dx, _, dw, db = ctx.call.backward((of_x, False, of_weight, of_bias), dy, dx, *ctx.saved_tensors)
        return dx, dw, db, None


_apply = apply_of(_StreamNorm)

CALLS: Known[StreamCall] = Known(1024)
when_set(CALLS.clear)
