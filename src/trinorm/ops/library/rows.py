"""The row norms as registered ops, ``torch.ops.trinorm.*``: what torch.compile and torch.export put in their graphs.

For each spec, by the kernels where they run and by ATen's ops elsewhere::

    layer_norm(input, normalized_shape, weight?, bias?, eps, batch_invariant, cast) -> (y, mean, rstd)
    rms_norm(input, normalized_shape, weight?, eps, batch_invariant, cast) -> (y, rstd)
    <norm>_backward(
        dy, input, normalized_shape, weight?, mean?, rstd, eps, dx, dw, db?, batch_invariant, cast
    ) -> (dx, dw, db)

The statistics are for the backward: they have the input's leading dims and the accumulator's dtype, and carry no gradients.
dx and dw say whether a gradient is wanted, db in which dtype; one that is not is None, as in ATen's own backwards. eps is
for second derivatives, which are those of the closed form. Defaults and better errors are functional's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import reference
from ...ops import road
from ...spec import CASTS, ROW_NORMS, Cast, RowNorm
from ..row import CALLS, RowCall, Turns, prepared
from .registering import Op, batched, know_distributed, one_by_one, out_of_autocast, register

if TYPE_CHECKING:
    from ...replay import Results


def norm(
    spec: RowNorm,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    batch_invariant: bool,
) -> Tensor:
    """y, by the registered op."""
    know_distributed(x, weight, bias)
    parameters = (weight, bias) if spec.center else (weight,)
    with reference.keeping_dtype(x.device.type):
        return getattr(torch.ops.trinorm, spec.name)(x, normalized_shape, *parameters, eps, batch_invariant, spec.cast)[0]


class _Forward(Op):
    differentiable = True

    def __init__(self, spec: RowNorm, backward: _Backward) -> None:
        self._spec = spec
        bias, mean = ("Tensor? bias, ", "Tensor, ") if spec.center else ("", "")
        self.name = spec.name
        self.schema = (
            f"(Tensor input, SymInt[] normalized_shape, Tensor? weight, {bias}float eps, bool batch_invariant, str cast) "
            f"-> (Tensor, {mean}Tensor)"
        )
        self._backward = backward

    def autocast(self, key: str, x: Tensor, shape: Sequence[int], *rest: Any) -> Results:
        """In fp32 where torch's own op is."""
        *parameters, eps, batch_invariant, cast = rest
        if x.dtype != torch.float64 and reference.autocast_to_fp32(self._spec.with_cast(cast), x.device.type):
            x, *parameters = reference.in_fp32(x, *parameters)
        with out_of_autocast(key):
            return self(x, shape, *parameters, eps, batch_invariant, cast)

    def vmap(self, info: Any, dims: Sequence[Any], x: Tensor, *rest: Any) -> tuple[Results, Sequence[int | None]]:
        if any(isinstance(dim, int) for dim in dims[1:]):
            return one_by_one(self, info, dims, x, *rest)
        return batched(self(x.movedim(dims[0], 0), *rest))

    def save(self, ctx: Any, results: Results, *args: Any) -> None:
        x, shape, weight, *bias, eps, batch_invariant, cast = args
        ctx.save_for_backward(x, weight, *results[1:])
        ctx.mark_non_differentiable(*results[1:])
        ctx.shape, ctx.eps, ctx.how = shape, eps, (batch_invariant, cast)
        ctx.bias_dtype = bias[0].dtype if bias and bias[0] is not None else None

    def differentiate(self, ctx: Any, *gradients: Tensor | None) -> Results:
        dy, (x, weight, *mean, rstd) = gradients[0], ctx.saved_tensors
        _, _, _, dx, _, dw, *db, _, _, _ = ctx.needs_input_grad
        wanted = dx, dw, ctx.bias_dtype if any(db) else None
        mean = mean[0] if mean else None
        dx, dw, db_ = self._backward(dy, x, ctx.shape, weight, mean, rstd, ctx.eps, *wanted, *ctx.how)
        return dx, None, dw, *(db_ for _ in db), None, None, None

    def composite(self, *args: Any) -> Results:
        x, shape, weight, bias, eps, _, cast = self._named(*args)
        check(self.name, cast, x, shape, weight, bias)
        y = reference.composite(self._spec.with_cast(cast), x, shape, weight, bias, eps).contiguous()
        mean, rstd = reference.statistics(self._spec, x, len(shape), eps)
        stats = road.accumulator_dtype(x, weight, bias)
        return self._results(y, mean.detach().to(stats), rstd.detach().to(stats))

    def again(self, *args: Any) -> Callable[..., Results] | None:
        """Known to the family by one guard, as functional's, for any number of rows."""
        x, shape, weight, bias, eps, *how = self._named(*args)
        call = CALLS.recall(self.name, (_REGISTERED, *how), x, shape, weight, bias, eps)
        if call is None or self._spec.center:
            return None if call is None else call.results
        return lambda x, weight: call.results(x, weight, None)[::2]

    def anew(self, *args: Any) -> Results:
        x, shape, weight, bias, eps, batch_invariant, cast = self._named(*args)
        check(self.name, cast, x, shape, weight, bias)
        if not road.has_kernels(x) or not x.numel():
            return self.composite(*args)
        asked = shape, eps, (_REGISTERED, batch_invariant, cast)
        how: dict[str, Any] = dict(batch_invariant=batch_invariant, differentiated=True)
        call, inputs = prepared(self._spec.with_cast(cast), len(shape), (x, weight, bias), eps, asked, **how)
        return self._results(*call.results(*inputs))

    def fake(self, *args: Any) -> Results:
        x, shape, weight, bias, *_, cast = self._named(*args)
        check(self.name, cast, x, shape, weight, bias)
        stats = road.accumulator_dtype(x, weight, bias)
        mean, rstd = (x.new_empty(x.shape[: -len(shape)], dtype=stats) for _ in range(2))
        return self._results(x.new_empty(x.shape), mean, rstd)

    def _named(
        self, x: Tensor, shape: Sequence[int], weight: Tensor | None, *rest: Any
    ) -> tuple[Tensor, Sequence[int], Tensor | None, Tensor | None, float, bool, Cast]:
        """The arguments as (x, shape, weight, bias, eps, batch_invariant, cast)."""
        bias, eps, batch_invariant, cast = rest if self._spec.center else (None, *rest)
        return x, shape, weight, bias, eps, batch_invariant, cast

    def _results(self, y: Tensor | None, mean: Tensor | None, rstd: Tensor | None) -> Results:
        return (y, mean, rstd) if self._spec.center else (y, rstd)


class _Backward(Op):
    schema = (
        "(Tensor dy, Tensor input, SymInt[] normalized_shape, Tensor? weight, Tensor? mean, Tensor rstd, float eps, "
        "bool dx, bool dw, ScalarType? db, bool batch_invariant, str cast) -> (Tensor, Tensor, Tensor)"
    )

    def __init__(self, spec: RowNorm) -> None:
        self._spec = spec
        self.name = f"{spec.name}_backward"

    def vmap(self, info: Any, dims: Sequence[Any], *args: Any) -> tuple[Results, Sequence[int | None]]:
        dy, x, shape, weight, mean, rstd, eps, dx, dw, db, *how = args
        if isinstance(dims[3], int) or dw or db is not None:
            return one_by_one(self, info, dims, *args)  # each has a weight, or sums over rows, of its own
        dy, x, mean, rstd = (
            t if t is None else t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in ((dy, dims[0]), (x, dims[1]), (mean, dims[4]), (rstd, dims[5]))
        )
        return batched(self(dy, x, shape, weight, mean, rstd, eps, dx, dw, db, *how))

    def composite(self, *args: Any) -> Results:
        dy, x, shape, weight, _, _, eps, dx, dw, db, _, cast = args
        spec = self._spec.with_cast(cast)
        found: Any = reference.composite_gradients(spec, x, len(shape), weight, db, eps, dy)
        # With no leading dims db is dy, which an op's result may not be.
        return found.dx.contiguous() if dx else None, found.dw if dw else None, None if db is None else found.db.clone()

    def anew(self, *args: Any) -> Results:
        dy, x, shape, weight, mean, rstd, eps, dx, dw, db, batch_invariant, cast = args
        leading = x.shape[: x.dim() - len(shape)]
        if dy.shape != x.shape or rstd.shape != leading or not (mean is None or mean.shape == leading):
            raise RuntimeError(f"trinorm::{self.name}: dy, mean or rstd is not of the input's shape")
        given = self._spec.center == (mean is not None) and dy.dtype in road.KERNEL_DTYPES
        given = given and rstd.dtype in (torch.float32, torch.float64) and (mean is None or mean.dtype == rstd.dtype)
        if not given or not (dy.device == rstd.device == x.device and (mean is None or mean.device == x.device)):
            raise RuntimeError(f"trinorm::{self.name}: dy, mean and rstd are not as the forward gives them")
        manner = _REGISTERED, batch_invariant, cast, db, rstd.dtype
        call = CALLS.recall(self.name, manner, x, shape, weight, None, eps)
        if call is None:
            check(self.name, cast, x, shape, weight)
            torch._check(
                not dw or weight is not None, lambda: f"trinorm::{self.name}: dw is asked for, but there is no weight"
            )
            if not road.has_kernels(x) or not x.numel():
                return self.composite(*args)
            dtypes = x.dtype, x.dtype if weight is None else weight.dtype, rstd.dtype
            how: dict[str, Any] = dict(cast=False, differentiated=True)
            problem = self._spec.with_cast(cast), len(shape), dtypes, db, eps, "input", batch_invariant
            how_many = x, len(shape), rstd.dtype, batch_invariant
            call = CALLS.keep(
                self.name,
                manner,
                x,
                shape,
                weight,
                None,
                eps,
                lambda any_rows: RowCall(*problem, **how, turns=Turns.of(*how_many) if any_rows else None),
            )
        wanted = dx, dw, db is not None
        found = call.gradients(wanted, dy, x, weight, mean, rstd)
        if (again := call.recorded(wanted, dy, x, weight, mean, rstd)) is not None:
            self.keep(args, lambda *tensors: again(*tensors, None))  # nor a bias
        return found

    def fake(self, *args: Any) -> Results:
        _, x, shape, weight, _, _, _, dx, dw, db, _, _ = args
        return (
            x.new_empty(x.shape) if dx else None,
            weight.new_empty(shape) if dw else None,
            None if db is None else x.new_empty(shape, dtype=db),
        )


def check(op: str, cast: str, x: Tensor, shape: Sequence[int], *parameters: Tensor | None) -> None:
    """That the kernels read nothing but these tensors, in a way that there is."""
    torch._check(cast in CASTS, lambda: f"trinorm::{op}: cast is {cast!r}; it must be one of {', '.join(CASTS)}")
    shape = torch.Size(shape)
    fits = 0 < len(shape) <= x.ndim and x.shape[-len(shape) :] == shape
    fits = fits and all(t is None or (t.shape == shape and t.device == x.device) for t in parameters)
    torch._check(fits, lambda: f"trinorm::{op}: input, weight or bias does not fit normalized_shape {list(shape)}")
    known = all(t is None or t.dtype in road.KERNEL_DTYPES for t in (x, *parameters))
    torch._check_not_implemented(known, lambda: f"trinorm::{op}: a dtype other than {road.KERNEL_DTYPES}")


# The manner of a registered op's calls, which no caller of functional can name.
_REGISTERED = object()


def _register(spec: RowNorm) -> None:
    backward = _Backward(spec)
    register(_Forward(spec, backward), CALLS)
    register(backward, CALLS)


for _spec in ROW_NORMS:
    _register(_spec)
