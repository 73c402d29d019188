"""The row family under autograd."""

from __future__ import annotations

import functools
import warnings
from bisect import bisect_right
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor

from .. import reference
from ..ops import road
from ..spec import RowNorm
from ..switches import when_set
from .calls import Bounded, Calls, Known
from .layout import readable
from .node import apply_of
from .undo import undoable

if TYPE_CHECKING:
    from ..replay import Function, Results


def prepared(
    spec: RowNorm,
    dims: int,
    given: tuple[Tensor, Tensor | None, Tensor | None],
    eps: float,
    asked: tuple[Sequence[int], float | None, Hashable],
    *,
    save: str = "input",
    batch_invariant: bool,
    cast: bool = False,
    differentiated: bool,
) -> tuple[RowCall, tuple[Tensor, Tensor | None, Tensor | None]]:
    """The call of ``given`` (x, weight, bias) that the kernels serve, and these as they read them. CALLS keeps the call, of
    copies too: those of the next call will be like them.

    asked: normalized_shape, eps and manner as the caller gave them, by which the next call is recalled.
    differentiated: a backward will ask for statistics.
    """
    x, weight, bias = found = reference.in_fp32(*given) if cast else given
    x = readable(x, dims)
    weight, bias = (None if t is None else readable(t, dims) for t in (weight, bias))
    if any(now is not before for now, before in zip((x, weight, bias), found, strict=True)):
        given, cast = (x, weight, bias), False
        if (call := CALLS.recall(spec.name, asked[2], x, asked[0], weight, bias, asked[1])) is not None:
            return call, given
    stats = road.accumulator_dtype(x, weight, bias)
    problem: tuple[Any, ...] = (
        spec,
        dims,
        (x.dtype, x.dtype if weight is None else weight.dtype, stats),
        None if bias is None else bias.dtype,
        eps,
        save,
        batch_invariant,
    )
    how: dict[str, Any] = dict(cast=cast, differentiated=differentiated)
    call = CALLS.keep(
        spec.name,
        asked[2],
        given[0],
        asked[0],
        *given[1:],
        asked[1],
        lambda any_rows: RowCall(*problem, **how, turns=Turns.of(x, dims, stats, batch_invariant) if any_rows else None),
    )
    return call, (x, weight, bias)


class Turns(NamedTuple):
    """Of how many elements of x on the launches change, of a forward and of a backward; and how many a row has."""

    n: int
    forward: list[int]
    backward: list[int]

    @staticmethod
    def of(x: Tensor, dims: int, stats: torch.dtype, batch_invariant: bool) -> Turns:
        from ..launch import describe
        from ..tuning import backward_turns, forward_turns
        from .hosts.start import widest

        n = x.shape[-dims:].numel()
        problem = n, widest(x.dtype, stats), describe(x.device)
        always = 1, 1 << 31  # nothing is launched for no rows, and more are another type of number for Triton
        forward, backward = ((), ()) if batch_invariant else (forward_turns(*problem), backward_turns(*problem))
        return Turns(n, *(sorted(n * m for m in (*always, *turns)) for turns in (forward, backward)))


class RowCall:
    """The norm, and its gradients, of arguments that differ from those of one call in their values alone.

    saved: the dtypes of x, weight and statistics, in which what is saved for the backward has to come back. bias_dtype:
    db's. cast: autocast has the arguments taken to fp32 first. differentiated: a backward will ask for statistics. turns:
    given where the arguments may differ in their number of rows too, being contiguous.
    """

    __slots__ = (
        "_apply",
        "_batch_invariant",
        "_bias_dtype",
        "_cast",
        "_differentiated",
        "_dims",
        "_eps",
        "_forwards",
        "_gradients",
        "_met",
        "_recalled",
        "_replay",
        "_saved",
        "_spec",
        "_turns",
    )

    def __init__(
        self,
        spec: RowNorm,
        dims: int,
        saved: tuple[torch.dtype, torch.dtype, torch.dtype],
        bias_dtype: torch.dtype | None,
        eps: float,
        save: str,
        batch_invariant: bool,
        *,
        cast: bool,
        differentiated: bool,
        turns: Turns | None = None,
    ) -> None:
        self._spec, self._dims, self._eps, self._cast = spec, dims, eps, cast
        self._batch_invariant = batch_invariant
        self._bias_dtype, self._saved, self._differentiated = bias_dtype, saved, differentiated
        self._apply = _apply_to_output if save == "output" else _apply
        self._turns = turns
        self._replay: Function | None = None if turns is None else self._by_rows
        self._forwards: Bounded[Function] = Bounded(8)
        self._gradients: Bounded[Function] = Bounded(8 if turns is None else 32)
        self._recalled: Known[Function] = Known(8)
        self._met: Bounded[int] = Bounded(16 if turns is None else 64)

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if self._cast:
            x, weight, bias = reference.in_fp32(x, weight, bias)
        if self._differentiated:
            return self._apply(x, weight, bias, self)
        return (self._replay or self._forward)(x, weight, bias)[0]  # type: ignore[return-value]

    def results(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Results:
        """(y, mean, rstd), the statistics where a backward will ask for them."""
        return (self._replay or self._forward)(x, weight, bias)

    def _forward(self, *inputs: Tensor | None) -> Results:
        from .hosts import rows

        def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Results:
            problem = self._spec, x, self._dims, weight, bias, self._eps
            return rows.forward(*problem, save=self._differentiated, batch_invariant=self._batch_invariant)

        if self._turns is None:
            results, again = self._record("forward", forward, *inputs)
            self._replay = again or self._replay
            return results
        turn = bisect_right(self._turns.forward, inputs[0].numel())  # type: ignore[union-attr]
        results, again = self._record(turn, forward, *inputs)
        if again is not None:
            self._forwards[turn] = again
        return results

    def _by_rows(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Results:
        """The forward of any number of rows."""
        again = self._forwards.get(bisect_right(self._turns.forward, x.numel()))  # type: ignore[union-attr]
        return (again or self._forward)(x, weight, bias)

    def backward(
        self,
        wanted: tuple[bool, ...],
        dy: Tensor,
        kept: Tensor,
        weight: Tensor | None,
        mean: Tensor | None,
        rstd: Tensor,
        bias: Tensor | None = None,
        *,
        from_output: bool = False,
    ) -> Results:
        """(dx, dw, db), those that are ``wanted``. kept: x; or, ``from_output``, y, which is undone with weight and bias.

        What was saved may come back in another layout or dtype, from a hook.
        """
        inputs = dy, kept, weight, mean, rstd, bias
        if self._turns is None and (gradients := self._recalled.recall((wanted, from_output), *inputs)) is not None:
            return gradients(*inputs)
        if torch.is_grad_enabled() or not are_plain(*inputs) or road.observer() is not None:
            # Someone differentiates this backward, to whom a kernel's result would be a constant, silently; or maps over
            # it (is_grads_batched, vmap), or has tensors that have no storage.
            if from_output:
                return self._composite_from_output(dy, kept, weight, rstd, bias)
            return reference.composite_gradients(self._spec, kept, self._dims, weight, self._bias_dtype, self._eps, dy)
        return self.gradients(wanted, dy, kept, weight, mean, rstd, bias, from_output)

    def gradients(
        self,
        wanted: tuple[bool, ...],
        dy: Tensor,
        kept: Tensor,
        weight: Tensor | None,
        mean: Tensor | None,
        rstd: Tensor,
        bias: Tensor | None = None,
        from_output: bool = False,
    ) -> Results:
        """The same by the kernels, of tensors that they can read and that nobody differentiates."""
        dims = self._dims
        dy = readable(dy, dims)
        kept_dtype, weight_dtype, stats = self._saved
        kept, rstd = _as_saved(kept, kept_dtype, dims), _as_saved(rstd, stats, rstd.dim())
        mean = None if mean is None else _as_saved(mean, stats, mean.dim())
        weight = None if weight is None else _as_saved(weight, weight_dtype, dims)
        bias = None if bias is None or self._bias_dtype is None else _as_saved(bias, self._bias_dtype, dims)
        orders = dy.is_contiguous() or dy.stride(), kept.is_contiguous() or kept.stride()
        key: tuple[Any, ...] = (wanted, from_output, dy.dtype, orders)
        if self._turns is not None:  # strides follow from the number of rows, so that what has any is for its own shape
            key += (bisect_right(self._turns.backward, kept.numel()) if orders == _IN_ORDER else kept.shape,)
        if (gradients := self._gradients.get(key)) is not None:
            return gradients(dy, kept, weight, mean, rstd, bias)
        return self._backward(key, dy, kept, weight, mean, rstd, bias)

    def recorded(self, wanted: tuple[bool, ...], *inputs: Tensor | None) -> Function | None:
        """What repeats ``gradients`` of inputs like these, once that was recorded, of a call of one number of rows."""
        return self._recalled.recall((wanted, False), *inputs, None)

    def _backward(self, key: tuple[Any, ...], *inputs: Tensor | None) -> Results:
        from .hosts import rows

        (dx, dw, db, *_), from_output, _, orders, *_ = key

        def backward(
            dy: Tensor, kept: Tensor, weight: Tensor | None, mean: Tensor | None, rstd: Tensor, bias: Tensor | None
        ) -> Results:
            dw_dtype = weight.dtype if dw and weight is not None else None
            wanted: dict[str, Any] = dict(dx=dx, dw=dw_dtype, db=self._bias_dtype if db else None)
            problem = self._spec, dy, kept, self._dims, weight, mean, rstd
            wanted.update(from_output=from_output, bias=bias, batch_invariant=self._batch_invariant)
            return rows.backward(*problem, **wanted)

        results, again = self._record(key, backward, *inputs, any_rows=orders == _IN_ORDER)
        if again is not None:
            self._gradients[key] = again
            if self._turns is None:
                self._recalled.keep((key[0], from_output), again, *inputs)
        return results

    def _composite_from_output(
        self, dy: Tensor, y: Tensor, weight: Tensor | None, rstd: Tensor, bias: Tensor | None
    ) -> Results:
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{self._spec.name}(): save is 'output', which keeps no input for a second derivative to be taken of; "
                "for create_graph=True it must be 'input'"
            )
        return reference.gradients_of_output(self._spec, y, self._dims, weight, bias, self._bias_dtype, rstd, dy)

    def _record(
        self, what: Hashable, function: Function, *inputs: Tensor | None, any_rows: bool = True
    ) -> tuple[Results, Function | None]:
        """``function(*inputs)``, and its repetition (replay.record) from the RECORDED_FROM-th such call on. any_rows: of
        others too, where the call serves those.

        Nothing is repeated past someone who put a launch of his own in rows' place, to see them all.
        """
        from .. import launch, replay
        from .hosts import rows

        self._met[what] = met = self._met.get(what, 0) + 1
        if met < RECORDED_FROM or rows.launch is not launch.launch:
            return function(*inputs), None
        return replay.record(function, *inputs, rows_of_length=self._turns.n if self._turns and any_rows else None)


# Of dy and of what was kept: contiguous.
_IN_ORDER = (True, True)

# Recording costs more than it saves where a call does not come again, as prompts of ever new lengths.
RECORDED_FROM = 2


def _as_saved(t: Tensor, dtype: torch.dtype, dims: int) -> Tensor:
    return readable(t if t.dtype is dtype else t.to(dtype), dims)


def are_plain(dy: Tensor, *saved: Tensor | None) -> bool:
    """Whether these are tensors that a kernel can read: no subclass, no zeros without storage, no batch in disguise; and
    what was kept, the first of ``saved``, where dy is: a hook may have forgotten to bring it back. (That takes .2 µs.)
    """
    plain = type(dy) in road.PLAIN and road.PLAIN_OR_NONE.issuperset(map(type, saved))
    plain = plain and (not saved or saved[0].device == dy.device)  # type: ignore[union-attr]
    return plain and not (dy._is_zerotensor() or is_batchedtensor(dy) or is_legacy_batchedtensor(dy))


class _RowNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, call: RowCall) -> Tensor | None:
        y, mean, rstd = (call._replay or call._forward)(x, weight, bias)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.call = call
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.call.backward(ctx.needs_input_grad, dy, *ctx.saved_tensors), None


class _RowNormToOutput(torch.autograd.Function):
    """As _RowNorm, but that y is saved where x̂ can be made of it again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, call: RowCall) -> Tensor | None:
        y, mean, rstd = (call._replay or call._forward)(x, weight, bias)
        n = x.shape[-call._dims :].numel()
        ctx.call, ctx.from_output = call, undoable(weight, bias, n, x.dtype, call._spec.offset)
        if ctx.from_output:
            ctx.save_for_backward(y, weight, None, rstd, bias)
        else:
            _warn_once(call._spec.name)
            ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        call: RowCall = ctx.call
        return *call.backward(ctx.needs_input_grad, dy, *ctx.saved_tensors, from_output=ctx.from_output), None


@functools.cache
def _warn_once(op: str) -> None:
    warnings.warn(
        f"trinorm.{op}: save is 'output', but y cannot be undone where an element of weight is 0, subnormal, too large or "
        "less than the bias's, nor under CUDA-graph capture; the input is saved instead (said once)",
        stacklevel=6,
    )


_apply = apply_of(_RowNorm)
_apply_to_output = apply_of(_RowNormToOutput)

# Row counts times the shapes of a model. One takes about 4 KB.
CALLS: Calls[RowCall] = Calls(2048)
when_set(CALLS.clear)
