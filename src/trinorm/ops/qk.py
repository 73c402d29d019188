"""QK-norm under autograd."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..ops import road
from ..reference import qk as qk_reference
from ..spec import RowNorm
from ..switches import when_set
from .calls import Known
from .layout import dense, readable
from .node import apply_of
from .repeated import Repeated
from .row import _as_saved, are_plain

if TYPE_CHECKING:
    from ..replay import Function, Results

# Of how many elements a head has kernels, at the most.
MOST_OF_HEAD = 1024


class QKProblem(NamedTuple):
    """What is computed of the tensors; interleaved: the rotary embedding's pairs are neighbours."""

    spec: RowNorm
    eps: float
    interleaved: bool


def lacking(query: Tensor, angles: Sequence[Tensor | None] = ()) -> str | None:
    """Why there is no kernel for such a call; None where there is one."""
    if query.shape[-1] > MOST_OF_HEAD:
        return f"a head has over {MOST_OF_HEAD} elements"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in angles):
        return "cos or sin requires a gradient"
    return None


def broadcasts(cos: Tensor, tokens: Sequence[int]) -> bool:
    """Whether cos has angles for tokens of these dims."""
    sizes = cos.shape[:-1]
    return len(sizes) <= len(tokens) and all(a in (b, 1) for a, b in zip(reversed(sizes), reversed(tokens), strict=False))


def read(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """(..., cos, sin) as the kernels read them: the last dim of each is one run, and cos and sin lie alike."""
    *others, cos, sin = (None if t is None else readable(t, 1) for t in tensors)
    if cos is not None and sin is not None and cos.stride() != sin.stride():
        cos, sin = dense(cos), dense(sin)
    return *others, cos, sin


def composite(problem: QKProblem, *tensors: Any) -> tuple[Tensor, Tensor]:
    """Both results of (query, key, query_weight, key_weight, cos, sin) by ATen's ops."""
    spec, eps, interleaved = problem
    query, key, query_weight, key_weight, cos, sin = tensors
    of_query, of_key = (
        qk_reference.composite(spec, x, weight, eps, cos, sin, interleaved)
        for x, weight in ((query, query_weight), (key, key_weight))
    )
    return of_query, of_key


def composite_gradients(problem: QKProblem, wanted: tuple[bool, ...], *tensors: Any) -> Results:
    """Those of QKCall.backward, by ATen's ops."""
    spec, eps, interleaved = problem
    query_dy, key_dy, query, key, query_weight, key_weight, cos, sin = tensors
    found = [
        (None, None) if dy is None else qk_reference.composite_gradients(spec, x, weight, eps, cos, sin, interleaved, dy)
        for dy, x, weight in ((query_dy, query, query_weight), (key_dy, key, key_weight))
    ]
    every = itertools.chain.from_iterable(zip(*found, strict=True))
    return tuple(t if want else None for t, want in zip(every, wanted, strict=True))


class QKCall:
    """The norm, and its gradients, of arguments that differ from those of one call in their values alone.

    differentiated: a backward will ask for statistics, whose dtype ``stats`` is.
    """

    __slots__ = ("_differentiated", "_forward", "_gradients", "_problem", "_stats")

    def __init__(self, problem: QKProblem, stats: torch.dtype, *, differentiated: bool) -> None:
        self._problem, self._stats, self._differentiated = problem, stats, differentiated
        self._forward = Repeated(functools.partial(_forward, problem, differentiated), _is_watched)
        self._gradients: Known[Function] = Known(8)

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both results of (query, key, query_weight, key_weight, cos, sin)."""
        if self._differentiated:
            return _apply(*inputs, self)
        of_query, of_key, *_ = self.results(*inputs)
        return of_query, of_key  # type: ignore[return-value]

    def results(self, *inputs: Tensor | None) -> Results:
        """Both results, and the rstd of each where a backward will ask."""
        return self._forward(*inputs)

    def backward(
        self, wanted: tuple[bool, ...], query_dy: Tensor | None, key_dy: Tensor | None, *saved: Tensor | None
    ) -> Results:
        """The gradients of query, key and their weights, those that are wanted, of the results' gradients, one of which may
        be None. saved: the inputs and both rstd, which may come back in another layout or dtype, from a hook.
        """
        inputs = *saved, query_dy, key_dy
        if (gradients := self.recorded(wanted, *inputs)) is not None:
            return gradients(*inputs)
        plain = all(dy is None or are_plain(dy, *saved) for dy in (query_dy, key_dy))
        if torch.is_grad_enabled() or not plain or road.observer() is not None:
            # Someone differentiates this backward, to whom a kernel's result would silently be a constant, or maps over it.
            return composite_gradients(self._problem, wanted, query_dy, key_dy, *saved[:-2])
        return self.gradients(wanted, *inputs)

    def recorded(self, wanted: tuple[bool, ...], *inputs: Tensor | None) -> Function | None:
        """``gradients`` of inputs like these, where there were some."""
        return self._gradients.recall(wanted, *inputs)

    def gradients(self, wanted: tuple[bool, ...], *inputs: Any) -> Results:
        """The same by the kernels, of what was saved, and the results' gradients, that they can read."""
        *saved, query_rstd, key_rstd, query_dy, key_dy = inputs
        rstds = (_as_saved(rstd, self._stats, rstd.dim()) for rstd in (query_rstd, key_rstd))
        query_dy, key_dy, *saved = read(query_dy, key_dy, *saved)
        tensors = *saved, *rstds, query_dy, key_dy
        key = wanted, *(None if t is None else (t.stride(), t.dtype) for t in tensors)
        by_launches = functools.partial(_backward, self._problem, wanted)
        return self._gradients.once(key, lambda: Repeated(by_launches, _is_watched), wanted, *tensors)(*tensors)


def _forward(problem: QKProblem, differentiated: bool, *inputs: Any) -> Results:
    from .hosts import heads

    query, key, query_weight, key_weight, cos, sin = inputs
    sides = heads.Side(query, query_weight), heads.Side(key, key_weight)
    turn = heads.Rotation(cos, sin, problem.interleaved)
    return heads.forward(problem.spec, *sides, problem.eps, turn, save=differentiated)


def _backward(problem: QKProblem, wanted: tuple[bool, ...], *tensors: Any) -> Results:
    from .hosts import heads

    query, key, query_weight, key_weight, cos, sin, query_rstd, key_rstd, query_dy, key_dy = tensors
    of_query = heads.Wanted(query_dy, query_rstd, wanted[0], wanted[2])
    of_key = heads.Wanted(key_dy, key_rstd, wanted[1], wanted[3])
    sides = heads.Side(query, query_weight), heads.Side(key, key_weight)
    return heads.backward(problem.spec, *sides, of_query, of_key, heads.Rotation(cos, sin, problem.interleaved))


def _is_watched() -> bool:
    from .. import launch
    from .hosts import heads, rows

    return not (heads.launch is rows.launch is launch.launch)


class _QKNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        *inputs, call = args
        of_query, of_key, *rstds = call.results(*inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *rstds)
        ctx.call = call
        query, key, query_weight, key_weight, *_ = inputs
        sides = (query, query_weight, of_query), (key, key_weight, of_key)
        constant = [y for x, w, y in sides if not (x.requires_grad or (w is not None and w.requires_grad))]
        ctx.mark_non_differentiable(*constant)
        return of_query, of_key

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        return *ctx.call.backward(ctx.needs_input_grad[:4], *dys, *ctx.saved_tensors), None, None, None


_apply = apply_of(_QKNorm)

CALLS: Known[QKCall] = Known(1024)
when_set(CALLS.clear)
