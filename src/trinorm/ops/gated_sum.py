"""A conditioned norm of a gated sum, under autograd."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ops import road
from ..reference import gated_sum as gated_sum_reference
from ..switches import when_set
from .calls import Known
from .layout import dense, readable
from .node import apply_of
from .norm_call import NormCall, launches_are_watched
from .problems.conditioned import Conditioned
from .problems.gated_sum import GatedSum
from .row import _as_saved, are_plain

if TYPE_CHECKING:
    from ..replay import Results


# Of how many elements a row has kernels, at the most; and of float64. Longer ones are added first, and normalized then.
MOST_OF_ROW, MOST_OF_FP64 = 8192, 2048


def are_held(norm: Conditioned, *tensors: Tensor | None) -> bool:
    """Whether a row is short enough for these kernels."""
    return norm.size <= (MOST_OF_FP64 if road.accumulator_dtype(*tensors) == torch.float64 else MOST_OF_ROW)


def read(problem: GatedSum, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """(x, residual, gate, weight, bias), or others, as the kernels read them: each row is one run."""
    return tuple(None if t is None else readable(t, problem.norm.dims) for t in tensors)


def composite(problem: GatedSum, *tensors: Any) -> tuple[Tensor, Tensor]:
    """(y, sum) of (x, residual, gate, weight, bias) by ATen's ops."""
    spec, dims, size, eps, dtype, _ = problem.norm
    x, residual, gate, weight, bias = tensors
    y, total = gated_sum_reference.composite(spec, dims, size, x, residual, gate, weight, bias, eps, dtype)
    return y.contiguous(), total.contiguous()


def composite_gradients(problem: GatedSum, wanted: tuple[bool, ...], dy: Tensor, *saved: Any) -> Results:
    """Those of GatedSumCall.backward, by ATen's ops."""
    spec, dims, size, eps, dtype, _ = problem.norm
    x, gate, weight, bias, total, _, _, dsum = saved
    of = x, gate, weight, bias, total, eps, dy, dsum
    found = gated_sum_reference.composite_gradients(spec, dims, size, *of, problem.residual, dtype)
    return tuple(t if want else None for t, want in zip(found, wanted, strict=True))


class GatedSumCall(NormCall[GatedSum]):
    """(y, sum) of (x, residual, gate, weight, bias), and mean and rstd where a backward will ask for them.

    What its backward is of, besides dy: (x, gate, weight, bias, sum, mean, rstd, dsum); its gradients are those of the
    forward's inputs. ``stats``: the statistics' dtype.
    """

    __slots__ = ("_stats",)

    def __init__(self, problem: GatedSum, stats: torch.dtype, *, differentiated: bool) -> None:
        super().__init__(problem, differentiated=differentiated)
        self._stats = stats

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if self._differentiated:
            return _apply(*inputs, self)
        return self.results(*inputs)[:2]  # type: ignore[return-value]

    def backward(self, wanted: tuple[bool, ...], dy: Tensor, *saved: Tensor | None) -> Results:
        dsum = saved[-1]
        if dsum is not None and not are_plain(dsum):
            return self.composite_gradients(self.problem, wanted, dy, *saved)
        return super().backward(wanted, dy, *saved)

    def restored(self, dy: Tensor, *saved: Tensor | None) -> Results:
        *inputs, total, mean, rstd, dsum = saved
        assert total is not None
        statistics = (None if t is None else _as_saved(t, self._stats, t.dim()) for t in (mean, rstd))
        dy, *inputs, dsum = read(self.problem, dy, *inputs, dsum)  # type: ignore[assignment]
        return dy, *inputs, dense(total.to(self.problem.sum)), *statistics, dsum

    @staticmethod
    def launch_forward(problem: GatedSum, differentiated: bool, *inputs: Any) -> Results:
        from .hosts import gated_sum_rows

        return gated_sum_rows.forward(problem, *inputs, save=differentiated)

    @staticmethod
    def launch_backward(problem: GatedSum, wanted: tuple[bool, ...], *tensors: Any) -> Results:
        from .hosts import gated_sum_rows

        return gated_sum_rows.backward(problem, wanted, *tensors)

    @staticmethod
    def composite_gradients(problem: GatedSum, wanted: tuple[bool, ...], dy: Tensor, *saved: Any) -> Results:
        return composite_gradients(problem, wanted, dy, *saved)

    @staticmethod
    def is_watched(problem: GatedSum) -> bool:
        from .hosts import gated_sum_rows

        return launches_are_watched(gated_sum_rows)


class _GatedSumNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        x, residual, *parameters, call = args
        y, total, mean, rstd = call.results(x, residual, *parameters)
        ctx.set_materialize_grads(False)
        if not any(t.requires_grad for t in (x, residual, parameters[0])):
            ctx.mark_non_differentiable(total)
        ctx.save_for_backward(x, *parameters, total, mean, rstd)
        ctx.call = call
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:-1]
        if dy is None:
            if dsum is None:
                return (None,) * (len(wanted) + 1)
            dy, wanted = unused(dsum, ctx.call.problem.norm.y), (*wanted[:3], False, False)
        return *ctx.call.backward(wanted, dy, *ctx.saved_tensors, dsum), None


def unused(dsum: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of a y that nobody uses, in which weight and bias have their part: theirs is none."""
    return torch.zeros_like(dsum, dtype=dtype, memory_format=torch.contiguous_format)


_apply = apply_of(_GatedSumNorm)

CALLS: Known[GatedSumCall] = Known(1024)
when_set(CALLS.clear)
