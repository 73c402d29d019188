"""A norm of the sum of x and a residual, under autograd."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..ops import road
from ..reference import added as added_reference
from ..spec import RowNorm
from ..switches import when_set
from .calls import Known
from .layout import dense, readable
from .node import apply_of
from .repeated import Repeated
from .row import _as_saved, are_plain

if TYPE_CHECKING:
    from ..replay import Function, Results


class AddedProblem(NamedTuple):
    """What is computed of the tensors: the norm over the last ``dims`` dims of x + alpha·residual, in y's dtype. drop: the
    probability that an element of x is dropped.
    """

    spec: RowNorm
    dims: int
    eps: float
    alpha: float
    y: torch.dtype
    batch_invariant: bool = False
    drop: float = 0.0


def dtypes_of(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype, torch.dtype | None]:
    """Those of x, residual, sum, statistics and bias."""
    stats = road.accumulator_dtype(x, residual, weight, bias)
    return (
        x.dtype,
        residual.dtype,
        torch.promote_types(x.dtype, residual.dtype),
        stats,
        None if bias is None else bias.dtype,
    )


class AddedCall:
    """The norm, and its gradients, of arguments that differ from those of one call in their values alone.

    dtypes: x's, the residual's, the sum's, the statistics' and, None where there is none, the bias's.
    differentiated: a backward will ask for statistics.
    """

    __slots__ = ("_differentiated", "_dtypes", "_forward", "_gradients", "_problem")

    def __init__(
        self,
        problem: AddedProblem,
        dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype, torch.dtype | None],
        *,
        differentiated: bool,
    ) -> None:
        self._problem, self._dtypes, self._differentiated = problem, dtypes, differentiated
        self._forward = Repeated(functools.partial(_forward, problem, differentiated), _is_watched)
        self._gradients: Known[Function] = Known(8)

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        """(y, sum) of (x, residual, weight, bias, seed, row_scale, out); the sum in ``out`` where that is given, which no
        gradient is then asked of.
        """
        *tensors, out = inputs
        if self._differentiated:
            return _apply(*tensors, self)
        y, total, *_ = self.results(*inputs)
        if out is not None:
            increment_version([out])  # a kernel wrote it, which autograd is to know
            return y, out  # type: ignore[return-value]
        return y, total  # type: ignore[return-value]

    def results(self, *inputs: Tensor | None) -> Results:
        """(y, sum, mean, rstd): the sum where no memory was given for it, the statistics where a backward will ask."""
        return self._forward(*inputs)

    def backward(
        self,
        wanted: tuple[bool, ...],
        dy: Tensor | None,
        dsum: Tensor | None,
        total: Tensor,
        weight: Tensor | None,
        mean: Tensor | None,
        rstd: Tensor,
        seed: Tensor | None = None,
        row_scale: Tensor | None = None,
    ) -> Results:
        """(dx, dresidual, dw, db), those that are wanted, of the gradients of y and of the sum, one of which may be None.

        What was saved may come back in another layout or dtype, from a hook.
        """
        inputs = total, dy, dsum, weight, mean, rstd, seed, row_scale
        if (gradients := self.recorded(wanted, *inputs)) is not None:
            return gradients(*inputs)
        plain = dy is not None and are_plain(dy, total, dsum, weight, mean, rstd, seed, row_scale)
        plain = plain and (dsum is None or are_plain(dsum))
        if torch.is_grad_enabled() or not plain or road.observer() is not None:
            # Nobody uses y; or someone differentiates this backward, to whom a kernel's result would silently be a
            # constant, or maps over it.
            spec, dims, eps, alpha, y_dtype, _, drop = self._problem
            (dx, dr, dw, db), (of_x, of_residual, _, _, of_bias) = wanted, self._dtypes
            asked = of_x if dx else None, of_residual if dr else None, dw, of_bias if db else None
            return added_reference.composite_gradients(
                spec, total, dims, weight, eps, alpha, dy, dsum, *asked, y_dtype, seed, row_scale, drop
            )
        return self.gradients(wanted, *inputs)

    def recorded(self, wanted: tuple[bool, ...], *inputs: Tensor | None) -> Function | None:
        """``gradients`` of inputs like these, where there were some."""
        return self._gradients.recall(wanted, *inputs)

    def gradients(self, wanted: tuple[bool, ...], *inputs: Any) -> Results:
        """The same by the kernels, of (sum, dy, dsum, weight, mean, rstd, seed, row_scale) that they can read."""
        spec, dims, _, alpha, _, batch_invariant, drop = self._problem
        (dx, dr, dw, db), (of_x, of_residual, of_sum, stats, of_bias) = wanted, self._dtypes
        total, dy, dsum, weight, mean, rstd, *branch = inputs
        dy, total = readable(dy, dims), dense(total.to(of_sum))
        mean, rstd = (None if t is None else _as_saved(t, stats, t.dim()) for t in (mean, rstd))
        weight = None if weight is None else readable(weight, dims)
        dsum, *branch = (None if t is None else dense(t) for t in (dsum, *branch))
        apart = dr and (of_residual != of_x or alpha != 1 or any(t is not None for t in branch))

        def by_launches(*inputs: Any) -> Results:
            from ..launch import empty
            from .hosts import rows

            total, dy, dsum, weight, mean, rstd, *branch = inputs
            dresidual = empty(total, of_residual, total.device) if apart else None
            how: dict[str, Any] = dict(dx=dx or dr, dw=weight.dtype if dw else None, db=of_bias if db else None)
            how.update(
                batch_invariant=batch_invariant, added=rows.AddedBackward(dsum, dresidual, of_x, alpha, tuple(branch), drop)
            )
            ds, dw_, db_ = rows.backward(spec, dy, total, dims, weight, mean, rstd, **how)
            return ds if dx else None, (dresidual if apart else ds) if dr else None, dw_, db_

        read = total, dy, dsum, weight, mean, rstd, *branch
        key = wanted, dy.stride(), *(None if t is None else t.dtype for t in read)
        return self._gradients.once(key, lambda: Repeated(by_launches, _is_watched), wanted, *read)(*read)


def _forward(problem: AddedProblem, differentiated: bool, *inputs: Any) -> Results:
    """The results of an AddedCall."""
    from ..launch import empty
    from .hosts import rows

    spec, dims, eps, alpha, y_dtype, batch_invariant, drop = problem
    x, residual, weight, bias, *branch, out = inputs
    total = empty(x, torch.promote_types(x.dtype, residual.dtype), x.device) if out is None else out
    added = rows.Added(residual, total, y_dtype, alpha, tuple(branch), drop)
    how: dict[str, Any] = dict(save=differentiated, batch_invariant=batch_invariant, added=added)
    y, mean, rstd = rows.forward(spec, x, dims, weight, bias, eps, **how)
    return y, total if out is None else None, mean, rstd


def _is_watched() -> bool:
    from .. import launch
    from .hosts import rows

    return rows.launch is not launch.launch


class _AddedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        seed: Tensor | None,
        row_scale: Tensor | None,
        call: AddedCall,
    ) -> tuple[Tensor | None, ...]:
        y, total, mean, rstd = call.results(x, residual, weight, bias, seed, row_scale, None)
        ctx.set_materialize_grads(False)
        if not (x.requires_grad or residual.requires_grad):
            ctx.mark_non_differentiable(total)
        ctx.save_for_backward(total, weight, mean, rstd, seed, row_scale)
        ctx.call = call
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None and dsum is None:
            return (None,) * 7
        return *ctx.call.backward(ctx.needs_input_grad[:4], dy, dsum, *ctx.saved_tensors), None, None, None


_apply = apply_of(_AddedNorm)

CALLS: Known[AddedCall] = Known(1024)
when_set(CALLS.clear)


def recall(manner: Hashable, x: Tensor, residual: Tensor, *others: Tensor | None) -> AddedCall | None:
    """What was kept for a call like this one, of AddedCall's arguments. manner: as Known.recall's."""
    *parameters, out = others
    manner, out = _apart(manner, x, residual, out)
    return CALLS.recall(manner, x, residual, *parameters, out)


def keep(manner: Hashable, call: AddedCall, x: Tensor, residual: Tensor, *others: Tensor | None) -> None:
    """Recall ``call`` from now on for calls like this one."""
    *parameters, out = others
    manner, out = _apart(manner, x, residual, out)
    CALLS.keep(manner, call, x, residual, *parameters, out)


def _apart(manner: Hashable, x: Tensor, residual: Tensor, out: Tensor | None) -> tuple[Hashable, Tensor | None]:
    """torch's guard knows no tensor that comes twice: of one that is out too, the manner has that."""
    return (manner, out is x, out is residual), None if out is x or out is residual else out
