"""Registering an op: what torch's dispatcher, autograd, autocast, torch.func and fake tensors do with its calls."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from ...ops import road
from ..calls import OWN_FROM, Calls, Known
from ..library import inductor
from ..node import apply_of

if TYPE_CHECKING:
    from ...replay import Results


# Of a call's tensors, as the op's arguments have them, these in another order.
Order = Callable[[Sequence[Any]], Sequence[Any]]


class Op:
    """An op, called as torch.ops has it. What each of torch's layers does with a call is in the methods that bear its name.

    compute: of tensors with storage. composite: the same in ATen's ops, differentiable. fake: results without values.
    """

    name: str
    schema: str

    # Whether results lie in memory as the input does, so that Inductor has to keep the strides that it traced. Otherwise
    # any do: compute reads them as they are, or copies.
    strided: bool = False

    # Whether there is ``differentiate``. Otherwise the composite is differentiated.
    differentiable: bool = False

    def belong_to(self, calls: Calls[Any] | Known[Any]) -> None:
        """Do calls as their like were done before, until the family's ``calls`` are forgotten."""
        self._known: Known[Callable[..., Results]] = Known(1024)
        calls.others.append(self._known)
        kinds = [argument.split()[0] for argument in self.schema[1 : self.schema.index(")")].split(", ")]
        self._tensors = itemgetter(*(i for i, kind in enumerate(kinds) if kind in ("Tensor", "Tensor?")))
        self._others = itemgetter(*(i for i, kind in enumerate(kinds) if kind not in ("Tensor", "Tensor?", "SymInt[]")))
        self._list = kinds.index("SymInt[]") if "SymInt[]" in kinds else None

    def _told(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """All that tells calls apart besides tensors."""
        return self._others(args) if self._list is None else (*self._others(args), *args[self._list])

    def __call__(self, *args: Any) -> Results:
        return self.overload(*args)

    def autograd(self, keyset: Any, *args: Any) -> Results:
        """The call as a node of autograd's, if anyone differentiates it. Nobody does in a compiled graph, which calls each
        op from Python, and there it computes at once: as a node batch_norm's took 13 µs more, on a CPU with a stub for the
        driver; to dispatch it below autograd would take 7, to ask each of its tensors for a tangent 4.5.
        """
        if forward_ad._current_level >= 0:
            _Levels.met = True
            return self.composite(*args)
        differentiated = torch.is_grad_enabled() and any_requires_grad(*args)
        if differentiated and not self.differentiable:
            return self.composite(*args)
        if not differentiated and _is_of_memory(keyset.raw_repr()) and not _is_transformed(*args):
            return self.compute(*args)
        if keyset.has(_SUBCLASS):
            know_distributed(*args)
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

    def called(self, *args: Any) -> Results:
        """The overload, as Inductor's code calls it: torch's dispatcher takes 4 to 7 µs, and is not asked where a call like
        this one came out of it before, but by a profiler, which is to see the op.
        """
        found = None if _is_profiled() or _Levels.met else self.recalled(*args)
        return self.overload(*args) if found is None else found

    def site(self) -> Site:
        """The same, of a place in a graph of fixed sizes."""
        return Site(self)

    def compute(self, *args: Any) -> Results:
        """As a call like this one was done, by which these arguments were found good; else looked at first."""
        if (found := self.recalled(*args)) is not None:
            return found
        given = [id(t) for t in self._tensors(args) if t is not None]
        if len(set(given)) < len(given):  # torch's guard knows no tensor again that is passed twice
            return self.compute(*_each_its_own(args))
        return self.anew(*args)

    def recalled(self, *args: Any) -> Results | None:
        """As a call like this one was done; None where there was none."""
        again = self.again(*args)
        return None if again is None else again(*self._tensors(args))

    def again(self, *args: Any) -> Callable[..., Results] | None:
        """How a call like this one was done, of its tensors."""
        return self._known.recall(self._told(args), *self._tensors(args))

    def anew(self, *args: Any) -> Results:
        """``compute``, of arguments to be looked at."""
        raise NotImplementedError

    def keep(self, args: Sequence[Any], again: Callable[..., Results]) -> None:
        """Do calls like this one as ``again`` of their tensors."""
        self._known.keep(self._told(args), again, *self._tensors(args))

    def do_and_keep(
        self, args: Sequence[Any], again: Callable[..., Results], read: Callable[..., Sequence[Any]], order: Order = tuple
    ) -> Results:
        """The same, this one too. order: in which ``again`` takes the tensors; read: as what, which may be themselves."""
        tensors = order(self._tensors(args))
        inputs = read(*tensors)
        if any(now is not before for now, before in zip(inputs, tensors, strict=True)):
            self.keep(args, lambda *tensors: again(*read(*order(tensors))))
        else:
            self.keep(args, again if order is tuple else lambda *tensors: again(*order(tensors)))
        return again(*inputs)

    def do_and_keep_gradients(
        self,
        args: Sequence[Any],
        call: Any,
        wanted: tuple[bool, ...],
        order: Order = tuple,
        after: Callable[..., Results] | None = None,
    ) -> Results:
        """The same of a backward: ``call.gradients``, recorded if it can be; and ``after`` of those."""
        inputs = order(self._tensors(args))
        found = call.gradients(wanted, *inputs)
        gradients = call.recorded(wanted, *inputs) or functools.partial(call.gradients, wanted)
        again = gradients if order is tuple else lambda *tensors: gradients(*order(tensors))
        self.keep(args, again if after is None else lambda *tensors: after(*again(*tensors)))
        return found if after is None else after(*found)

    def composite(self, *args: Any) -> Results:
        raise NotImplementedError

    def traced(self, *args: Any) -> Results:
        """What a tracer sees, who may hand it to Inductor."""
        inductor.tell(self.overload)
        return self.fake(*args)

    def fake(self, *args: Any) -> Results:
        raise NotImplementedError

    def vmap(self, info: Any, dims: Sequence[Any], *args: Any) -> tuple[Results, Sequence[int | None]]:
        return one_by_one(self, info, dims, *args)

    # Where autocast has a say: what is called under its dispatch key of that name.
    autocast: Callable[..., Results] | None = None


class Site:
    """An op's call in the code of a compiled graph of fixed sizes. There one time differs from the next in the tensors'
    values alone, as Inductor's own kernels take for granted too: so what was recalled once is done from then on, unless
    somebody is to see the op. On a CPU, with a stub for the driver, a compiled graph of eight LayerNorms takes 63 µs so,
    where asking for their like each time took 80, with its backward 277 for 326.
    """

    __slots__ = ("_again", "_forgotten", "_met", "_op")

    def __init__(self, op: Op) -> None:
        self._op, self._met, self._forgotten = op, 0, 0
        self._again: Callable[..., Results] | None = None

    def __call__(self, *args: Any) -> Results:
        op, again = self._op, self._again
        if again is not None and self._forgotten == op._known.forgotten and not _is_watched():
            return again(*op._tensors(args))
        results = op.called(*args)
        if self._forgotten != op._known.forgotten:
            self._again, self._met, self._forgotten = None, 0, op._known.forgotten
        self._met += 1
        # By then it is done as it will be; and what is not recalled then, as of a tensor that comes twice, is not asked on.
        if OWN_FROM < self._met <= 2 * OWN_FROM and not _is_watched():
            self._again = op.again(*args)
        return results


class _Kernel(torch.autograd.Function):
    """An op's call below autograd. It has no forward mode: there torch raises, where the tangent would else be dropped."""

    @staticmethod
    def forward(ctx: Any, op: Op, grad_mode: bool, keyset: Any, *args: Any) -> Results:
        # Below are also the transforms of torch.func around this one, which do not know that a Function stops gradients.
        with torch.set_grad_enabled(grad_mode), torch._C._AutoDispatchBelowAutograd():
            results = op.overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)
        ctx.op = op
        ctx.set_materialize_grads(False)
        op.save(ctx, results, *args)
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Results:
        if all(gradient is None for gradient in gradients):
            return (None,) * len(ctx.needs_input_grad)
        return None, None, None, *ctx.op.differentiate(ctx, *gradients)


# As torch's own would hand the whole to torch.func once more.
_apply = apply_of(_Kernel)


def know_distributed(*args: Any) -> None:
    """Have the rules for DTensors registered where one of these is distributed: earlier, it would take DTensor's import."""
    if road.are_distributed(*args):
        from ..library import sharding  # noqa: F401


_unpack_dual = torch._C._VariableFunctions._unpack_dual

# Of tensors whose elements are in memory: others may not be asked for a tangent.
_BACKENDS = frozenset((torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA))

# Where tensor subclasses have their say.
_SUBCLASS = torch._C.DispatchKey.Python


@functools.cache
def _is_of_memory(keys: int) -> bool:
    """Whether nobody but autograd stands between a call of these dispatch keys and ``compute``: no mode, no subclass."""
    keyset = torch._C.DispatchKeySet.from_raw_repr(keys)
    below = keyset & torch._C._after_ADInplaceOrView_keyset
    return not keyset.has(_SUBCLASS) and below.highestPriorityTypeId() in _BACKENDS


class _Levels:
    """met: a call has come within a level of forward-mode AD. A graph that was traced there enters one of its own, of which
    Python does not hear; so each tensor is asked for its tangent from then on, 1 µs of each.
    """

    met = False


_is_profiled = torch._C._autograd._profiler_enabled
_modes = torch._C._len_torch_dispatch_stack


def _is_watched() -> bool:
    """Whether a profiler, a mode, torch.func or forward-mode AD is to see a call."""
    if _is_profiled() or _Levels.met or _modes():
        return True
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _is_transformed(*args: Any) -> bool:
    """Whether torch.func or forward-mode AD, as far as ``forward_ad._current_level`` does not tell, looks at the call."""
    if torch._C._are_functorch_transforms_active():
        return True
    return _Levels.met and any(isinstance(a, Tensor) and _unpack_dual(a, 0)[1] is not None for a in args)


def any_requires_grad(*args: Any) -> bool:
    return any(isinstance(a, Tensor) and a.requires_grad for a in args)


def _each_its_own(args: Sequence[Any]) -> list[Any]:
    """The same arguments, where a tensor comes again another object for it."""
    found: list[Any] = []
    for a in args:
        again = isinstance(a, Tensor) and any(a is before for before in found)
        found.append(a.detach() if again else a)
    return found


def batched(results: Results) -> tuple[Results, Sequence[int | None]]:
    return results, tuple(None if r is None else 0 for r in results)


def one_by_one(op: Op, info: Any, dims: Sequence[Any], *args: Any) -> tuple[Results, Sequence[int | None]]:
    """A call for each element of the mapped dims, the results stacked."""
    none = not info.batch_size
    if none:  # of one that is not there, results are like these
        args = tuple(
            a.new_zeros(a.movedim(d, 0).shape[1:]) if isinstance(d, int) else a for a, d in zip(args, dims, strict=True)
        )
        dims = [None] * len(args)
    each = [
        op(*(a.select(dim, i) if isinstance(dim, int) else a for a, dim in zip(args, dims, strict=True)))
        for i in range(info.batch_size or 1)
    ]
    stacked = (None if of[0] is None else torch.stack(of) for of in zip(*each, strict=True))
    return batched(tuple(None if r is None else r[:0] if none else r for r in stacked))


def out_of_autocast(key: str) -> contextlib.AbstractContextManager[Any]:
    """Where an op calls itself once autocast, whose dispatch key this is, has had its say."""
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)))


_LIBRARY = torch.library.Library("trinorm", "DEF")


def register(op: Op, calls: Calls[Any] | Known[Any]) -> None:
    """Make it ``torch.ops.trinorm.<name>``. calls: those of its family."""
    op.belong_to(calls)
    strides = torch.Tag.needs_exact_strides if op.strided else torch.Tag.flexible_layout
    _LIBRARY.define(op.name + op.schema, tags=(torch.Tag.pt2_compliant_tag, strides))
    _LIBRARY.impl(op.name, op.compute, "CompositeExplicitAutograd")
    _LIBRARY.impl(op.name, op.autograd, "Autograd", with_keyset=True)
    # Fake tensors take it too. torch.library.register_fake also notes its source line, which takes 6 ms of an import.
    _LIBRARY.impl(op.name, op.traced, "Meta")
    torch.library.register_vmap(f"trinorm::{op.name}", op.vmap, lib=_LIBRARY)
    op.overload.called, op.overload.site = op.called, op.site  # where inductor.py finds them
    if op.autocast is not None:
        for key in ("AutocastCPU", "AutocastCUDA"):
            _LIBRARY.impl(op.name, functools.partial(op.autocast, key), key)
