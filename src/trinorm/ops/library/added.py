"""The norms of a sum as registered ops. For each spec::

    add_layer_norm(
        input, residual, normalized_shape, weight?, bias?, seed?, row_scale?, eps, alpha, drop, dtype, batch_invariant, cast
    ) -> (y, sum, mean, rstd)
    add_rms_norm(the same) -> (y, sum, rstd)
    <norm>_backward(
        sum, dy?, dsum?, normalized_shape, weight?, mean?, rstd, seed?, row_scale?, eps, alpha, drop,
        dtypes of dx and dresidual or None, dw, db?, batch_invariant, cast
    ) -> (dx, dresidual, dw, db)

dtype is y's. The statistics are as rows.py's. The sum has a gradient of its own, dsum. What is always there comes
first, as in qk.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import reference
from ...ops import road
from ...reference import added as added_reference
from ...spec import ROW_NORMS, RowNorm
from ..added import CALLS, AddedCall, AddedProblem, dtypes_of
from ..layout import dense, readable
from .names import SUMS
from .registering import Op, batched, know_distributed, one_by_one, out_of_autocast, register
from .rows import check

if TYPE_CHECKING:
    from ...replay import Results


def norm(
    spec: RowNorm,
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    row_scale: Tensor | None,
    normalized_shape: Sequence[int],
    eps: float,
    alpha: float,
    drop: float,
    dtype: torch.dtype,
    batch_invariant: bool,
) -> tuple[Tensor, Tensor]:
    """(y, sum), by the registered op."""
    know_distributed(x, residual, weight, bias)
    op = getattr(torch.ops.trinorm, SUMS[spec.name])
    with reference.keeping_dtype(x.device.type):
        tensors = x, residual, normalized_shape, weight, bias, seed, row_scale
        y, total, *_ = op(*tensors, eps, alpha, drop, dtype, batch_invariant, spec.cast)
    return y, total


class _Forward(Op):
    differentiable = True

    def __init__(self, spec: RowNorm, backward: _Backward) -> None:
        self._spec = spec
        mean = "Tensor, " if spec.center else ""
        self.name = SUMS[spec.name]
        self.schema = (
            "(Tensor input, Tensor residual, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, Tensor? seed, "
            "Tensor? row_scale, float eps, float alpha, float drop, ScalarType dtype, bool batch_invariant, str cast) "
            f"-> (Tensor, Tensor, {mean}Tensor)"
        )
        self._backward = backward

    def autocast(self, key: str, *args: Any) -> Results:
        """y is in fp32 where torch's own op gives that."""
        *before, dtype, batch_invariant, cast = args
        if args[0].dtype != torch.float64 and reference.autocast_to_fp32(self._spec.with_cast(cast), args[0].device.type):
            dtype = torch.float32
        with out_of_autocast(key):
            return self(*before, dtype, batch_invariant, cast)

    def vmap(self, info: Any, dims: Sequence[Any], *args: Any) -> tuple[Results, Sequence[int | None]]:
        x, residual, *rest = args
        if any(isinstance(dim, int) for dim in dims[2:]):
            return one_by_one(self, info, dims, *args)
        return batched(self(*(_mapped(t, dim, info.batch_size) for t, dim in ((x, dims[0]), (residual, dims[1]))), *rest))

    def save(self, ctx: Any, results: Results, *args: Any) -> None:
        x, residual, shape, weight, bias, seed, row_scale, *by, _, batch_invariant, cast = args
        _, total, *statistics = results
        ctx.save_for_backward(total, weight, seed, row_scale, *statistics)
        ctx.mark_non_differentiable(*statistics)
        ctx.shape, ctx.by, ctx.how = shape, by, (batch_invariant, cast)
        ctx.dtypes = x.dtype, residual.dtype, None if bias is None else bias.dtype

    def differentiate(self, ctx: Any, *gradients: Tensor | None) -> Results:
        (dy, dsum, *_), (total, weight, seed, row_scale, *mean, rstd) = gradients, ctx.saved_tensors
        _, _, _, dx, dresidual, _, dw, db, *_ = ctx.needs_input_grad
        of_x, of_residual, of_bias = ctx.dtypes
        one = dx and dresidual and of_x == of_residual and ctx.by[1] == 1  # which two results of an op could not be
        one = one and seed is None and row_scale is None
        if dy is None:  # nobody uses y, in which weight and bias have their part
            dw = db = False
        wanted = of_x if dx else None, of_residual if dresidual and not one else None, dw, of_bias if db else None
        saved = ctx.shape, weight, mean[0] if mean else None, rstd, seed, row_scale
        dx, dresidual, dw, db = self._backward(total, dy, dsum, *saved, *ctx.by, *wanted, *ctx.how)
        return dx, dx if one else dresidual, None, dw, db, *(None,) * 8

    def composite(self, *args: Any) -> Results:
        x, residual, shape, weight, bias, seed, row_scale, eps, alpha, drop, dtype, _, cast = args
        _check(self.name, cast, x, residual, shape, seed, row_scale, weight, bias)
        given = x, residual, shape, weight, bias, eps, alpha, dtype, seed, row_scale, drop
        y, total = added_reference.composite(self._spec.with_cast(cast), *given)
        mean, rstd = reference.statistics(self._spec, total, len(shape), eps)
        stats = road.accumulator_dtype(x, residual, weight, bias)
        return self._results(y.contiguous(), total.contiguous(), mean.detach().to(stats), rstd.detach().to(stats))

    def anew(self, *args: Any) -> Results:
        x, residual, shape, weight, bias, seed, row_scale, eps, alpha, drop, dtype, batch_invariant, cast = args
        _check(self.name, cast, x, residual, shape, seed, row_scale, weight, bias)
        if not road.has_kernels(x) or not x.numel():
            return self.composite(*args)
        dims = len(shape)
        problem = AddedProblem(self._spec.with_cast(cast), dims, eps, alpha, dtype, batch_invariant, drop)
        call = AddedCall(problem, dtypes_of(x, residual, weight, bias), differentiated=True)

        def read(x: Tensor, residual: Tensor, *others: Tensor | None) -> Sequence[Tensor | None]:
            parameters = (None if t is None else readable(t, dims) for t in others[:2])
            branch = (None if t is None else dense(t) for t in others[2:])
            return readable(x, dims), dense(residual), *parameters, *branch

        def again(*inputs: Tensor | None) -> Results:
            return self._results(*call.results(*inputs, None))

        return self.do_and_keep(args, again, read)

    def fake(self, *args: Any) -> Results:
        x, residual, shape, weight, bias, seed, row_scale, _, _, _, dtype, _, cast = args
        _check(self.name, cast, x, residual, shape, seed, row_scale, weight, bias)
        stats = road.accumulator_dtype(x, residual, weight, bias)
        mean, rstd = (x.new_empty(x.shape[: -len(shape)], dtype=stats) for _ in range(2))
        total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
        return self._results(x.new_empty(x.shape, dtype=dtype), total, mean, rstd)

    def _results(self, y: Tensor | None, total: Tensor | None, mean: Tensor | None, rstd: Tensor | None) -> Results:
        return (y, total, mean, rstd) if self._spec.center else (y, total, rstd)


class _Backward(Op):
    schema = (
        "(Tensor sum, Tensor? dy, Tensor? dsum, SymInt[] normalized_shape, Tensor? weight, Tensor? mean, Tensor rstd, "
        "Tensor? seed, Tensor? row_scale, float eps, float alpha, float drop, ScalarType? dx, ScalarType? dresidual, "
        "bool dw, ScalarType? db, bool batch_invariant, str cast) -> (Tensor, Tensor, Tensor, Tensor)"
    )

    def __init__(self, spec: RowNorm) -> None:
        self._spec = spec
        self.name = f"{SUMS[spec.name]}_backward"

    def vmap(self, info: Any, dims: Sequence[Any], *args: Any) -> tuple[Results, Sequence[int | None]]:
        total, dy, dsum, shape, weight, mean, rstd, *rest = args
        *_, dw, db, _, _ = rest
        if (
            any(isinstance(dims[i], int) for i in (4, 7, 8))
            or rest[0] is not None
            or rest[1] is not None
            or dw
            or db is not None
        ):
            return one_by_one(self, info, dims, *args)  # each has a weight, a mask or sums over rows of its own
        rows = (total, dims[0]), (dy, dims[1]), (dsum, dims[2]), (mean, dims[5]), (rstd, dims[6])
        total, dy, dsum, mean, rstd = (None if t is None else _mapped(t, dim, info.batch_size) for t, dim in rows)
        return batched(self(total, dy, dsum, shape, weight, mean, rstd, *rest))

    def composite(self, *args: Any) -> Results:
        total, dy, dsum, shape, weight, _, _, seed, row_scale, eps, alpha, drop, *wanted, _, cast = args
        how: Any = (len(shape), weight, eps, alpha, dy, dsum, *wanted, total.dtype if dy is None else dy.dtype)
        branch: Any = dict(seed=seed, row_scale=row_scale, drop=drop)
        found = added_reference.composite_gradients(self._spec.with_cast(cast), total, *how, **branch)
        # Where there is nothing to add a gradient is an argument, or another result, which an op's may not be.
        return tuple(None if t is None else t.clone(memory_format=torch.contiguous_format) for t in found)

    def anew(self, *args: Any) -> Results:
        total, dy, dsum, shape, weight, mean, rstd, seed, row_scale, *how = args
        eps, alpha, drop, dx, dresidual, dw, db, batch_invariant, cast = how
        alike = all(t is None or t.shape == total.shape for t in (dy, dsum))
        alike = alike and all(t is None or t.shape == total.shape[: -len(shape)] for t in (mean, rstd))
        torch._check(alike, lambda: f"trinorm::{self.name}: dy, dsum, mean or rstd is not of the sum's shape")
        given = self._spec.center == (mean is not None) and (dy is not None or dsum is not None)
        given = given and all(
            t is None or (t.device == total.device and t.dtype in road.KERNEL_DTYPES) for t in (dy, dsum, mean, rstd)
        )
        given = given and rstd.dtype in (torch.float32, torch.float64) and (mean is None or mean.dtype == rstd.dtype)
        torch._check(given, lambda: f"trinorm::{self.name}: dy, dsum, mean and rstd are not as the forward gives them")
        _check(self.name, cast, total, total, shape, seed, row_scale, weight)
        known = not dw or weight is not None
        torch._check(known, lambda: f"trinorm::{self.name}: dw is asked for, but there is no weight")
        if dy is None or not road.has_kernels(total) or not total.numel():
            return self.composite(*args)
        problem = AddedProblem(self._spec.with_cast(cast), len(shape), eps, alpha, dy.dtype, batch_invariant, drop)
        dtypes = dx or total.dtype, dresidual or total.dtype, total.dtype, rstd.dtype, db
        call = AddedCall(problem, dtypes, differentiated=True)
        asked = dx is not None, dresidual is not None, dw, db is not None

        return self.do_and_keep_gradients(args, call, asked, after=_apart)

    def fake(self, *args: Any) -> Results:
        total, dy, _, shape, weight, *_, dx, dresidual, dw, db, _, _ = args
        dw, db = (dw, db) if dy is not None else (False, None)
        of_x, of_residual = (
            None if dtype is None else total.new_empty(total.shape, dtype=dtype) for dtype in (dx, dresidual)
        )
        return (
            of_x,
            of_residual,
            weight.new_empty(shape) if dw else None,
            None if db is None else total.new_empty(shape, dtype=db),
        )


def _apart(dx: Tensor | None, dresidual: Tensor | None, *sums: Tensor | None) -> Results:
    """These, of which two may not be one, as results of an op."""
    return dx, dresidual.clone() if dresidual is not None and dresidual is dx else dresidual, *sums


def _mapped(t: Tensor, dim: int | None, size: int) -> Tensor:
    """t with the mapped dim first, which it may not have."""
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


def _check(
    op: str,
    cast: str,
    x: Tensor,
    residual: Tensor,
    shape: Sequence[int],
    seed: Tensor | None,
    row_scale: Tensor | None,
    *parameters: Tensor | None,
) -> None:
    """That the kernels read nothing but these tensors, in a way that there is."""
    fits = residual.shape == x.shape and residual.device == x.device
    torch._check(fits, lambda: f"trinorm::{op}: residual is not of the input's shape")
    check(op, cast, x, shape, *parameters)
    fits = row_scale is None or (row_scale.shape == x.shape[: x.dim() - len(shape)] and row_scale.device == x.device)
    torch._check(fits, lambda: f"trinorm::{op}: row_scale is not of the input's leading dims")
    fits = seed is None or (seed.numel() == 1 and seed.dtype == torch.int64 and seed.device == x.device)
    torch._check(fits, lambda: f"trinorm::{op}: seed is no int64 number beside the input")
    known = all(t is None or t.dtype in road.KERNEL_DTYPES for t in (residual, row_scale))
    torch._check_not_implemented(known, lambda: f"trinorm::{op}: a dtype other than {road.KERNEL_DTYPES}")


def _register(spec: RowNorm) -> None:
    backward = _Backward(spec)
    register(_Forward(spec, backward), CALLS)
    register(backward, CALLS)


for _spec in ROW_NORMS:
    _register(_spec)
