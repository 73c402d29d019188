"""QK-norm as registered ops::

    qk_norm(
        query, key, query_weight?, key_weight?, cos?, sin?, eps, interleaved, batch_invariant, cast
    ) -> (query, key, query's rstd, key's rstd)
    qk_norm_backward(
        query, key, query_weight?, key_weight?, cos?, sin?, query's rstd, key's rstd, dy of query?, dy of key?, eps,
        interleaved, whether dquery, dkey, dquery_weight and dkey_weight are wanted, batch_invariant, cast
    ) -> (dquery, dkey, dquery_weight, dkey_weight)

The statistics are as rows.py's. A tensor that is always there comes first: DTensor looks for its mesh at the first
argument alone (torch 2.11). Where cos or sin requires a gradient, the composite is differentiated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import reference
from ...ops import road
from ...spec import CASTS, RMS_NORM
from ..qk import CALLS, QKCall, QKProblem, broadcasts, composite, composite_gradients, lacking, read
from .names import QK_NORM
from .registering import Op, know_distributed, register

if TYPE_CHECKING:
    from ...replay import Results


def norm(problem: QKProblem, *tensors: Tensor | None, batch_invariant: bool) -> tuple[Tensor, Tensor]:
    """Both results, by the registered op."""
    know_distributed(*tensors)
    spec, eps, interleaved = problem
    of_query, of_key, *_ = torch.ops.trinorm.qk_norm(*tensors, eps, interleaved, batch_invariant, spec.cast)
    return of_query, of_key


class _Forward(Op):
    name = QK_NORM
    schema = (
        "(Tensor query, Tensor key, Tensor? query_weight, Tensor? key_weight, Tensor? cos, Tensor? sin, float eps, "
        "bool interleaved, bool batch_invariant, str cast) -> (Tensor, Tensor, Tensor, Tensor)"
    )
    differentiable = True

    def __init__(self, backward: _Backward) -> None:
        self._backward = backward

    def autograd(self, keyset: Any, *args: Any) -> Results:
        if lacking(args[0], args[4:6]):
            return self.composite(*args)
        return super().autograd(keyset, *args)

    def save(self, ctx: Any, results: Results, *args: Any) -> None:
        *inputs, eps, interleaved, batch_invariant, cast = args
        rstds = results[2:]
        ctx.save_for_backward(*inputs, *rstds)
        ctx.mark_non_differentiable(*rstds)
        ctx.by, ctx.how = (eps, interleaved), (batch_invariant, cast)

    def differentiate(self, ctx: Any, *gradients: Tensor | None) -> Results:
        wanted = ctx.needs_input_grad[3:7]
        given = gradients[0] is not None, gradients[1] is not None
        wanted = tuple(want and of for want, of in zip(wanted, (*given, *given), strict=True))
        found = self._backward(*ctx.saved_tensors, *gradients[:2], *ctx.by, *wanted, *ctx.how)
        return *found, *(None,) * 6

    def composite(self, *args: Any) -> Results:
        *tensors, eps, interleaved, _, cast = args
        _check(QK_NORM, cast, *tensors)
        spec, stats = RMS_NORM.with_cast(cast), _statistics(*tensors)
        found = composite(QKProblem(spec, eps, interleaved), *tensors)
        rstds = (reference.statistics(spec, x, 1, eps)[1].detach().to(stats) for x in tensors[:2])
        return *found, *rstds

    def anew(self, *args: Any) -> Results:
        *tensors, eps, interleaved, _, cast = args
        _check(QK_NORM, cast, *tensors)
        if lacking(tensors[0]) or road.is_empty(*tensors[:2]) or not road.has_kernels(tensors[0]):
            return self.composite(*args)
        problem = QKProblem(RMS_NORM.with_cast(cast), eps, interleaved)
        return self.do_and_keep(args, QKCall(problem, _statistics(*tensors), differentiated=True).results, read)

    def fake(self, *args: Any) -> Results:
        *tensors, _, _, _, cast = args
        _check(QK_NORM, cast, *tensors)
        stats = _statistics(*tensors)
        query, key = tensors[:2]
        return (
            *(x.new_empty(x.shape) for x in (query, key)),
            *(x.new_empty(x.shape[:-1], dtype=stats) for x in (query, key)),
        )


class _Backward(Op):
    name = f"{QK_NORM}_backward"
    schema = (
        "(Tensor query, Tensor key, Tensor? query_weight, Tensor? key_weight, Tensor? cos, Tensor? sin, "
        "Tensor query_rstd, Tensor key_rstd, Tensor? query_dy, Tensor? key_dy, float eps, bool interleaved, bool dquery, "
        "bool dkey, bool dquery_weight, bool dkey_weight, bool batch_invariant, str cast) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    )

    def composite(self, *args: Any) -> Results:
        *inputs, _, _, query_dy, key_dy = args[:10]
        eps, interleaved, *wanted, _, cast = args[10:]
        problem = QKProblem(RMS_NORM.with_cast(cast), eps, interleaved)
        found = composite_gradients(problem, tuple(wanted), query_dy, key_dy, *inputs)
        return tuple(None if t is None else t.contiguous() for t in found)

    def anew(self, *args: Any) -> Results:
        *inputs, query_rstd, key_rstd, query_dy, key_dy = args[:10]
        eps, interleaved, *wanted, _, cast = args[10:]
        query, key, *weights = inputs[:4]
        _check(self.name, cast, *inputs)
        sides = (query_dy, query, query_rstd), (key_dy, key, key_rstd)
        fits = all((dy is None or dy.shape == x.shape) and rstd.shape == x.shape[:-1] for dy, x, rstd in sides)
        torch._check(fits, lambda: f"trinorm::{self.name}: dy or rstd is not of its input's shape")
        fits = query_rstd.dtype == key_rstd.dtype and query_rstd.dtype in (torch.float32, torch.float64)
        given = [t for side in sides for t in (side[0], side[2]) if t is not None]
        fits = fits and all(t.device == query.device and t.dtype in road.KERNEL_DTYPES for t in given)
        torch._check(fits, lambda: f"trinorm::{self.name}: dy or rstd is not as the forward gives them")
        known = all(not want or t is not None for want, t in zip(wanted, (query_dy, key_dy) * 2, strict=True))
        known = known and all(not want or t is not None for want, t in zip(wanted[2:], weights, strict=True))
        torch._check(known, lambda: f"trinorm::{self.name}: a gradient is asked for of what is not there")
        if lacking(query) or road.is_empty(query, key) or not road.has_kernels(query):
            return self.composite(*args)
        call = QKCall(QKProblem(RMS_NORM.with_cast(cast), eps, interleaved), query_rstd.dtype, differentiated=True)
        return self.do_and_keep_gradients(args, call, tuple(wanted))

    def fake(self, *args: Any) -> Results:
        wanted, inputs = args[12:16], args[:4]
        return tuple(t.new_empty(t.shape) if want else None for t, want in zip(inputs, wanted, strict=True))


def _statistics(query: Tensor, key: Tensor, *others: Tensor | None) -> torch.dtype:
    """Their dtype."""
    return road.accumulator_dtype(query, *others)


def _check(
    op: str,
    cast: str,
    query: Tensor,
    key: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
) -> None:
    """That the kernels read nothing but these tensors, in a way that there is."""
    torch._check(cast in CASTS, lambda: f"trinorm::{op}: cast is {cast!r}; it must be one of {', '.join(CASTS)}")
    fits = query.dim() >= 2 and query.dim() == key.dim() and query.dtype == key.dtype
    fits = fits and query.shape[:-2] == key.shape[:-2] and query.shape[-1] == key.shape[-1]
    torch._check(fits, lambda: f"trinorm::{op}: key is not of the query's tokens, head's size and dtype")
    fits = all(w is None or w.shape == query.shape[-1:] for w in (query_weight, key_weight))
    torch._check(fits, lambda: f"trinorm::{op}: a weight is not of a head's size")
    fits = (cos is None) == (sin is None)
    if cos is not None and sin is not None:
        fits = cos.shape == sin.shape and cos.dtype == sin.dtype
        fits = fits and cos.dim() >= 1 and 2 <= cos.shape[-1] <= query.shape[-1] and cos.shape[-1] % 2 == 0
        fits = fits and broadcasts(cos, query.shape[:-2])
    torch._check(fits, lambda: f"trinorm::{op}: cos and sin are not alike, or do not fit the query's tokens")
    given = [t for t in (query, key, query_weight, key_weight, cos, sin) if t is not None]
    fits = all(t.device == query.device for t in given)
    torch._check(fits, lambda: f"trinorm::{op}: not all tensors are on one device")
    known = all(t.dtype in road.KERNEL_DTYPES for t in given)
    torch._check_not_implemented(known, lambda: f"trinorm::{op}: a dtype other than {road.KERNEL_DTYPES}")


_backward = _Backward()
register(_Forward(_backward), CALLS)
register(_backward, CALLS)
