"""Conditioned norms under autograd."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ops import road
from ..reference import conditioned as conditioned_reference
from ..switches import when_set
from .calls import Known
from .layout import readable
from .norm_call import NormCall, launches_are_watched
from .problems.conditioned import Conditioned, sets_of, shared_sets
from .row import _as_saved

if TYPE_CHECKING:
    from ..replay import Results

# Of how many elements a row has kernels, at the most.
MOST_OF_ROW = 1 << 20


def lacking(problem: Conditioned, x: Tensor, *others: Tensor | None) -> str | None:
    """Why there is no kernel for such a call; None where there is one. others: gate, weight and bias."""
    if problem.size > MOST_OF_ROW:
        return f"a row has over {MOST_OF_ROW} elements"
    if shared_sets(problem, x, *others[1:]) is None:
        return "weight and bias are broadcast along dims that do not lie beside each other"
    return None


def broadcasts(t: Tensor, x: Tensor, dims: int) -> bool:
    """Whether a parameter has a row for each of x's, or one for several."""
    sizes, lead = t.shape[:-dims], x.shape[:-dims]
    alike = t.dim() >= dims and t.shape[-dims:] == x.shape[-dims:] and len(sizes) <= len(lead)
    return alike and all(a in (b, 1) for a, b in zip(reversed(sizes), reversed(lead), strict=False))


def aligned(problem: Conditioned, x: Tensor, *parameters: Tensor | None) -> tuple[Tensor | None, ...]:
    """All with the same sets of rows, which the backward sums over: themselves, as a rule. Others are expanded, in what
    sums are taken in, so that torch's own sum over what was expanded rounds as the kernels do.
    """
    if shared_sets(problem, x, *parameters) is not None:
        return parameters
    given = [t for t in parameters if t is not None]
    rows = problem.rows(x)
    sizes = torch.broadcast_shapes(*(t.shape for t in given))
    shape = x.shape if sets_of(rows, (*sizes[: -problem.dims], rows[-1])) is None else sizes
    wide = road.accumulator_dtype(x, *given)
    return tuple(None if t is None else t.to(wide).expand(shape) for t in parameters)


def read(problem: Conditioned, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """(x, gate, weight, bias), or others, as the kernels read them: each row is one run."""
    return tuple(None if t is None else readable(t, problem.dims) for t in tensors)


def composite(problem: Conditioned, *tensors: Any) -> Tensor:
    """The norm of (x, gate, weight, bias) by ATen's ops."""
    spec, dims, size, eps, dtype, _ = problem
    x, gate, weight, bias = tensors
    return conditioned_reference.composite(spec, dims, size, x, gate, weight, bias, eps, dtype).contiguous()


def composite_gradients(problem: Conditioned, wanted: tuple[bool, ...], dy: Tensor, *tensors: Any) -> Results:
    """Those of ConditionedCall.backward, by ATen's ops."""
    spec, dims, size, eps, dtype, _ = problem
    x, gate, weight, bias = tensors
    found = conditioned_reference.composite_gradients(spec, dims, size, x, gate, weight, bias, eps, dy, dtype)
    return tuple(t if want else None for t, want in zip(found, wanted, strict=True))


class ConditionedCall(NormCall[Conditioned]):
    """The norm of (x, gate, weight, bias): y, mean and rstd, the statistics where a backward will ask for them. ``stats``:
    their dtype.
    """

    __slots__ = ("_stats",)

    def __init__(self, problem: Conditioned, stats: torch.dtype, *, differentiated: bool) -> None:
        super().__init__(problem, differentiated=differentiated)
        self._stats = stats

    def restored(self, dy: Tensor, *saved: Tensor | None) -> Results:
        *inputs, mean, rstd = saved
        statistics = (None if t is None else _as_saved(t, self._stats, t.dim()) for t in (mean, rstd))
        return *read(self.problem, dy, *inputs), *statistics

    @staticmethod
    def launch_forward(problem: Conditioned, differentiated: bool, *inputs: Any) -> Results:
        from .hosts import conditioned_rows

        return conditioned_rows.forward(problem, conditioned_rows.Inputs(*inputs), save=differentiated)

    @staticmethod
    def launch_backward(problem: Conditioned, wanted: tuple[bool, ...], *tensors: Any) -> Results:
        from .hosts import conditioned_rows

        dy, *inputs, mean, rstd = tensors
        return conditioned_rows.backward(problem, conditioned_rows.Inputs(*inputs), dy, mean, rstd, wanted)

    @staticmethod
    def composite_gradients(problem: Conditioned, wanted: tuple[bool, ...], dy: Tensor, *saved: Any) -> Results:
        return composite_gradients(problem, wanted, dy, *saved[:4])

    @staticmethod
    def is_watched(problem: Conditioned) -> bool:
        from .hosts import conditioned_rows

        return launches_are_watched(conditioned_rows)


CALLS: Known[ConditionedCall] = Known(1024)
when_set(CALLS.clear)
