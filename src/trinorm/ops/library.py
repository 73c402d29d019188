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

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from .. import reference
from ..spec import CASTS, ROW_NORMS, Cast, RowNorm
from . import road
from .row import CALLS, RowCall, Turns, prepared

if TYPE_CHECKING:
    from ..replay import Results


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
    _know_distributed(x, weight, bias)
    parameters = (weight, bias) if spec.center else (weight,)
    with reference.keeping_dtype(x.device.type):
        return getattr(torch.ops.trinorm, spec.name)(x, normalized_shape, *parameters, eps, batch_invariant, spec.cast)[0]


class _Op:
    """An op, called as torch.ops has it. What each of torch's layers does with a call is in the methods that bear its name.

    compute: of tensors with storage. composite: the same in ATen's ops, differentiable. fake: results without values.
    """

    name: str
    schema: str

    def __init__(self, spec: RowNorm) -> None:
        self._spec = spec

    def __call__(self, *args: Any) -> Results:
        return self.overload(*args)

    def kernel(self, keyset: Any, *args: Any) -> Results:
        """The call as a node of autograd's."""
        _know_distributed(*args)
        # Each transform of torch.func calls this for its own level, and asks for no more than that one.
        with enable_single_level_autograd_function():
            return _apply(self, torch.is_grad_enabled(), keyset, *args)

    def save(self, ctx: Any, results: Results, *args: Any) -> None:
        """Keep what ``differentiate`` needs."""

    def differentiate(self, ctx: Any, *gradients: Tensor | None) -> Results:
        """The gradients of the arguments, of the results' gradients."""
        raise NotImplementedError

    @property
    def overload(self) -> Any:
        return getattr(torch.ops.trinorm, self.name).default


class _Forward(_Op):
    def __init__(self, spec: RowNorm, backward: _Backward) -> None:
        super().__init__(spec)
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
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
            return self(x, shape, *parameters, eps, batch_invariant, cast)

    def vmap(self, info: Any, dims: Sequence[Any], x: Tensor, *rest: Any) -> tuple[Results, Sequence[int | None]]:
        if any(isinstance(dim, int) for dim in dims[1:]):
            return _one_by_one(self, info, dims, x, *rest)
        return _batched(self(x.movedim(dims[0], 0), *rest))

    def autograd(self, keyset: Any, *args: Any) -> Results:
        return self.composite(*args) if forward_ad._current_level >= 0 else self.kernel(keyset, *args)

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
        _check(self.name, cast, x, shape, weight, bias)
        y = reference.composite(self._spec.with_cast(cast), x, shape, weight, bias, eps).contiguous()
        mean, rstd = reference.statistics(self._spec, x, len(shape), eps)
        stats = road.accumulator_dtype(x, weight, bias)
        return self._results(y, mean.detach().to(stats), rstd.detach().to(stats))

    def compute(self, *args: Any) -> Results:
        x, shape, weight, bias, eps, batch_invariant, cast = self._named(*args)
        inputs, manner = (x, weight, bias), (_REGISTERED, batch_invariant, cast)
        call = CALLS.recall(self.name, manner, x, shape, weight, bias, eps)
        if call is None:
            _check(self.name, cast, x, shape, weight, bias)
            if not road.has_kernels(x) or not x.numel():
                return self.composite(*args)
            how: dict[str, Any] = dict(batch_invariant=batch_invariant, differentiated=True)
            spec = self._spec.with_cast(cast)
            call, inputs = prepared(spec, len(shape), inputs, eps, (shape, eps, manner), **how)
        y, *statistics = call.results(*inputs)
        leading = x.shape[: -len(shape)]
        return self._results(y, *(None if t is None else t.view(leading) for t in statistics))

    def fake(self, *args: Any) -> Results:
        x, shape, weight, bias, *_, cast = self._named(*args)
        _check(self.name, cast, x, shape, weight, bias)
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


class _Backward(_Op):
    schema = (
        "(Tensor dy, Tensor input, SymInt[] normalized_shape, Tensor? weight, Tensor? mean, Tensor rstd, float eps, "
        "bool dx, bool dw, ScalarType? db, bool batch_invariant, str cast) -> (Tensor, Tensor, Tensor)"
    )

    def __init__(self, spec: RowNorm) -> None:
        super().__init__(spec)
        self.name = f"{spec.name}_backward"

    def vmap(self, info: Any, dims: Sequence[Any], *args: Any) -> tuple[Results, Sequence[int | None]]:
        dy, x, shape, weight, mean, rstd, eps, dx, dw, db, *how = args
        if isinstance(dims[3], int) or dw or db is not None:
            return _one_by_one(self, info, dims, *args)  # each has a weight, or sums over rows, of its own
        dy, x, mean, rstd = (
            t if t is None else t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in ((dy, dims[0]), (x, dims[1]), (mean, dims[4]), (rstd, dims[5]))
        )
        return _batched(self(dy, x, shape, weight, mean, rstd, eps, dx, dw, db, *how))

    def autograd(self, keyset: Any, *args: Any) -> Results:
        if forward_ad._current_level >= 0 or (torch.is_grad_enabled() and _any_requires_grad(*args)):
            return self.composite(*args)
        return self.kernel(keyset, *args)

    def composite(self, *args: Any) -> Results:
        dy, x, shape, weight, _, _, eps, dx, dw, db, _, cast = args
        spec = self._spec.with_cast(cast)
        found: Any = reference.composite_gradients(spec, x, len(shape), weight, db, eps, dy)
        # With no leading dims db is dy, which an op's result may not be.
        return found.dx.contiguous() if dx else None, found.dw if dw else None, None if db is None else found.db.clone()

    def compute(self, *args: Any) -> Results:
        dy, x, shape, weight, mean, rstd, eps, dx, dw, db, batch_invariant, cast = args
        alike = dy.shape == x.shape and all(t is None or t.shape == x.shape[: -len(shape)] for t in (mean, rstd))
        torch._check(alike, lambda: f"trinorm::{self.name}: dy, mean or rstd is not of the input's shape")
        given = self._spec.center == (mean is not None)
        given = given and all(
            t is None or (t.device == x.device and t.dtype in road.KERNEL_DTYPES) for t in (dy, mean, rstd)
        )
        given = given and rstd.dtype in (torch.float32, torch.float64) and (mean is None or mean.dtype == rstd.dtype)
        torch._check(given, lambda: f"trinorm::{self.name}: dy, mean and rstd are not as the forward gives them")
        manner = _REGISTERED, batch_invariant, cast, db, rstd.dtype
        call = CALLS.recall(self.name, manner, x, shape, weight, None, eps)
        if call is None:
            _check(self.name, cast, x, shape, weight)
            torch._check(
                not dw or weight is not None, lambda: f"trinorm::{self.name}: dw is asked for, but there is no weight"
            )
            if not road.has_kernels(x) or not x.numel():
                return self.composite(*args)
            dtypes = x.dtype, x.dtype if weight is None else weight.dtype, rstd.dtype
            how: dict[str, Any] = dict(cast=False, kept=True, differentiated=True)
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
        mean = None if mean is None else mean.flatten()
        with torch.no_grad():
            return call.backward((dx, dw, db is not None), dy, x, weight, mean, rstd.flatten())

    def fake(self, *args: Any) -> Results:
        _, x, shape, weight, _, _, _, dx, dw, db, _, _ = args
        return (
            x.new_empty(x.shape) if dx else None,
            weight.new_empty(shape) if dw else None,
            None if db is None else x.new_empty(shape, dtype=db),
        )


class _Kernel(torch.autograd.Function):
    """An op's call below autograd. It has no forward mode: there torch raises, where the tangent would else be dropped."""

    @staticmethod
    def forward(ctx: Any, op: _Op, grad_mode: bool, keyset: Any, *args: Any) -> Results:
        # Below are also the transforms of torch.func around this one, which do not know that a Function stops gradients.
        with torch.set_grad_enabled(grad_mode), torch._C._AutoDispatchBelowAutograd():
            results = op.overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)
        ctx.op = op
        ctx.set_materialize_grads(False)
        op.save(ctx, results, *args)
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Results:
        if gradients[0] is None:
            return (None,) * len(ctx.needs_input_grad)
        return None, None, None, *ctx.op.differentiate(ctx, *gradients)


# Function.apply less its Python part, which would hand the whole to torch.func once more.
_apply = super(torch.autograd.Function, _Kernel).apply


def _know_distributed(*args: Any) -> None:
    """Have the rules for DTensors registered where one of these is distributed: earlier, it would take DTensor's import."""
    if road.are_distributed(*args):
        from . import sharding  # noqa: F401


def _any_requires_grad(*args: Any) -> bool:
    return any(isinstance(a, Tensor) and a.requires_grad for a in args)


def _check(op: str, cast: str, x: Tensor, shape: Sequence[int], *parameters: Tensor | None) -> None:
    """That the kernels read nothing but these tensors, in a way that there is."""
    torch._check(cast in CASTS, lambda: f"trinorm::{op}: cast is {cast!r}; it must be one of {', '.join(CASTS)}")
    shape = torch.Size(shape)
    fits = 0 < len(shape) <= x.ndim and x.shape[-len(shape) :] == shape
    fits = fits and all(t is None or (t.shape == shape and t.device == x.device) for t in parameters)
    torch._check(fits, lambda: f"trinorm::{op}: input, weight or bias does not fit normalized_shape {list(shape)}")
    known = all(t is None or t.dtype in road.KERNEL_DTYPES for t in (x, *parameters))
    torch._check_not_implemented(known, lambda: f"trinorm::{op}: a dtype other than {road.KERNEL_DTYPES}")


def _batched(results: Results) -> tuple[Results, Sequence[int | None]]:
    return results, tuple(None if r is None else 0 for r in results)


def _one_by_one(op: _Op, info: Any, dims: Sequence[Any], *args: Any) -> tuple[Results, Sequence[int | None]]:
    """A call for each element of the mapped dims, the results stacked."""
    each = [
        op(*(a.select(dim, i) if isinstance(dim, int) else a for a, dim in zip(args, dims, strict=True)))
        for i in range(info.batch_size)
    ]
    return _batched(tuple(None if of[0] is None else torch.stack(of) for of in zip(*each, strict=True)))


# The manner of a registered op's calls, which no caller of functional can name.
_REGISTERED = object()

_LIBRARY = torch.library.Library("trinorm", "DEF")


def _register(spec: RowNorm) -> None:
    backward = _Backward(spec)
    forward = _Forward(spec, backward)
    ops: tuple[_Forward | _Backward, ...] = forward, backward
    for op in ops:
        # Any strides do, so that Inductor need not keep those that it traced: compute reads them as they are, or copies.
        _LIBRARY.define(op.name + op.schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
        _LIBRARY.impl(op.name, op.compute, "CompositeExplicitAutograd")
        _LIBRARY.impl(op.name, op.autograd, "Autograd", with_keyset=True)
        # Fake tensors take it too. torch.library.register_fake also notes its source line, which takes 6 ms of an import.
        _LIBRARY.impl(op.name, op.fake, "Meta")
        torch.library.register_vmap(f"trinorm::{op.name}", op.vmap, lib=_LIBRARY)
    for key in ("AutocastCPU", "AutocastCUDA"):
        _LIBRARY.impl(forward.name, functools.partial(forward.autocast, key), key)


for _spec in ROW_NORMS:
    _register(_spec)
