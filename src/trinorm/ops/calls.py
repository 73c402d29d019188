"""Calls seen before. What a call's checks, layout, plan and launches came to is kept, and done again for its like."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..ops import road

T = TypeVar("T")


class Bounded(dict[Hashable, T]):
    """A dict of at most ``limit`` keys. It starts anew when it is full: what still comes is soon back."""

    __slots__ = ("_limit",)

    def __init__(self, limit: int) -> None:
        self._limit = limit

    def __setitem__(self, key: Hashable, value: T) -> None:
        if len(self) >= self._limit and key not in self:
            self.clear()
        super().__setitem__(key, value)


class Calls(Generic[T]):
    """The calls of a family of norms, told apart by all that their checks and launches depend on but addresses and values.

    Most of it is asked of the tensors at once, by the guard that Dynamo has for this: .14 µs for two tensors on a CPU
    where asking attribute by attribute costs .9. A torch without that guard keeps nothing.

    What is kept of a contiguous input serves any number of rows; one of its own is kept for a shape that has come OWN_FROM
    times, and for other strides.

    others: what is forgotten together with these.
    """

    def __init__(self, limit: int) -> None:
        self.others: list[Known[Any]] = []
        self._own: Bounded[_Entries[T]] = Bounded(limit)
        self._of_any_rows: Bounded[_Entries[T]] = Bounded(limit)
        # Of each op what was recalled last, and how it was asked for: the next norm of a model is as a rule like it.
        self._latest: dict[str, tuple[Hashable, _Entry[T]]] = {}
        # How often the keys of _own came that have none there.
        self._met: Bounded[int] = Bounded(limit)

    def clear(self) -> None:
        """Forget them all."""
        for kept in (self._own, self._of_any_rows, self._met, self._latest):
            kept.clear()
        for other in self.others:
            other.clear()

    def recall(
        self,
        op: str,
        manner: Hashable,
        x: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float | None,
    ) -> T | None:
        """What was kept for a call like this one, None where nothing was."""
        # Of what road.observer looks for, the guard does not see forward-mode AD, nor (2.13) the modes of selective
        # checkpointing, which ask compilers not to look at them (to ask for any mode costs 38 ns). torch.func it sees, but
        # asks the strides first, which ends the process for a nested tensor that vmap maps over.
        if _is_compiling() or forward_ad._current_level >= 0 or _modes() or _is_transformed():
            return None
        if type(x) not in road.PLAIN or type(eps) not in _NUMBERS:
            return None
        try:
            # Of a nested tensor of strided layout the guard would ask the strides, which ends the process.
            if x.is_nested or (weight is not None and weight.is_nested) or (bias is not None and bias.is_nested):
                return None
            tensors = _present(x, weight, bias)
            if (latest := self._latest.get(op)) is not None:
                how, (alike, shape, call) = latest
                asked = manner, eps, weight is None, bias is None, _grad_is_on()
                if how == asked and alike(*tensors) and _same(normalized_shape, shape):
                    return call
            key = op, manner, x.shape, eps, weight is None, bias is None, _grad_is_on()
            entries = self._own.get(key)
        # A wrong manner may be no key, and a wrong parameter no tensor.
        except (RuntimeError, TypeError, AttributeError, ValueError):
            return None
        if entries is not None and (entry := _of_these(entries, tensors, normalized_shape)) is not None:
            self._latest[op] = (manner, eps, weight is None, bias is None, _grad_is_on()), entry
            return entry[2]
        entries = self._of_any_rows.get(_without_rows(key))
        if entries is None or x.layout is not _STRIDED or not x.is_contiguous():
            return None
        if (entry := _of_these(entries, tensors, normalized_shape)) is None:
            return None
        self._met[key] = met = self._met.get(key, 1) + 1
        return entry[2] if met < OWN_FROM else None

    def keep(
        self,
        op: str,
        manner: Hashable,
        x: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float | None,
        make: Callable[[bool], T],
    ) -> T:
        """``make(any_rows)``, recalled from now on for calls like this one, which was found good and has no observer.

        any_rows: for those of other leading sizes too.
        """
        key: _Key = op, manner, x.shape, eps, weight is None, bias is None, torch.is_grad_enabled()
        any_rows = x.is_contiguous() and self._met.get(key, 1) < OWN_FROM
        call = make(any_rows)
        # A tuple is recognized by its identity, which a list could keep while it changes.
        shape = normalized_shape if isinstance(normalized_shape, tuple) else torch.Size(normalized_shape)
        alike = _alike(x.dim() - len(shape) if any_rows else None, *_present(x, weight, bias))
        if alike is not None and type(eps) in _NUMBERS:
            kept, place = (self._of_any_rows, _without_rows(key)) if any_rows else (self._own, key)
            kept[place] = ((alike, shape, call), *kept.get(place, ())[: _VARIANTS - 1])
        return call


class Known(Generic[T]):
    """The same of norms whose calls are each of their own shape. others: as Calls'. forgotten: how often all were."""

    __slots__ = ("_by_key", "_kept", "_latest", "forgotten", "others")

    def __init__(self, limit: int) -> None:
        self.others: list[Known[Any]] = []
        self.forgotten = 0
        self._kept: Bounded[tuple[tuple[Callable[..., bool], T], ...]] = Bounded(limit)
        self._by_key: Bounded[T] = Bounded(limit)
        # What was recalled last: its manner, which of its tensors are given, whether gradients are recorded, the tensors'
        # guard, and what is kept.
        self._latest: tuple[Hashable, int, bool, Callable[..., bool], T] | None = None

    def clear(self) -> None:
        """Forget them all."""
        self._kept.clear()
        self._by_key.clear()
        self._latest = None
        self.forgotten += 1
        for other in self.others:
            other.clear()

    def recall(self, manner: Hashable, *tensors: Tensor | None) -> T | None:
        """What was kept for a call like this one, None where nothing was. manner: all that tells calls apart besides
        tensors, and no tensor. tensors: at least one, the first not None.
        """
        if _is_compiling() or forward_ad._current_level >= 0 or _modes() or _is_transformed():  # as Calls'
            return None
        if type(tensors[0]) not in road.PLAIN:
            return None
        given, present, with_grad = 1, [], _grad_is_on()
        try:
            for t in tensors:
                given += given
                if t is not None:
                    if t.is_nested:  # as Calls'
                        return None
                    given += 1
                    present.append(t)
            if (latest := self._latest) is not None:
                how, which, mode, alike, call = latest
                if which == given and mode is with_grad and how == manner and alike(*present):
                    return call
            entries = self._kept.get((manner, *map(type, tensors), tensors[0].shape, with_grad))  # type: ignore[union-attr]
        except (RuntimeError, TypeError, AttributeError, ValueError):  # as Calls'
            return None
        if entries is not None:
            for alike, call in entries:
                if alike(*present):
                    self._latest = manner, given, with_grad, alike, call
                    return call
        return None

    def keep(self, manner: Hashable, call: T, *tensors: Tensor | None) -> None:
        """Recall ``call`` from now on for calls like this one."""
        alike = _alike(None, *(t for t in tensors if t is not None))
        if alike is not None:
            # By the types is told what is None, which the guard is not asked.
            key = manner, *map(type, tensors), tensors[0].shape, torch.is_grad_enabled()  # type: ignore[union-attr]
            self._kept[key] = ((alike, call), *self._kept.get(key, ())[: _VARIANTS - 1])

    def once(self, key: Hashable, make: Callable[[], T], manner: Hashable, *tensors: Tensor | None) -> T:
        """``make()``, or what it came to when ``key`` was here before; recalled from then on for a call like this one.

        The key tells calls apart by itself, for tensors that torch's guard does not know again.
        """
        if (call := self._by_key.get(key)) is None:
            call = self._by_key[key] = make()
            self.keep(manner, call, *tensors)
        return call


# (The guard of the tensors, normalized_shape, what is kept), the latest first.
_Entry = tuple[Callable[..., bool], Sequence[int], T]
_Entries = tuple[_Entry[T], ...]

_Key = tuple[str, Hashable, torch.Size, float | None, bool, bool, bool]


def _of_these(entries: _Entries[T], tensors: tuple[Tensor, ...], normalized_shape: Sequence[int]) -> _Entry[T] | None:
    for entry in entries:
        alike, shape, _ = entry
        if alike(*tensors) and _same(normalized_shape, shape):
            return entry
    return None


def _without_rows(key: _Key) -> Hashable:
    """The key of a call of any number of rows: of x's shape how many dims, and the last."""
    op, manner, shape, *rest = key
    return op, manner, len(shape), shape[-1:], *rest


def _present(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
    if weight is None:
        return (x,) if bias is None else (x, bias)
    return (x, weight) if bias is None else (x, weight, bias)


def _alike(any_of: int | None, *tensors: Tensor) -> Callable[..., bool] | None:
    """Whether others have the types, dtypes, device, sizes, strides and needs of gradients of these, while torch dispatches
    as now: no torch.func transform, mode or tracer has come, and autocast is on or off as it is. any_of: how many leading
    dims of the first may have any size and stride.

    None where torch's guard does not know these again: one is passed twice, or another torch has another guard.
    """
    sizes: Any = None
    strides: Any = None
    if any_of is not None:
        sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
        sizes[0][:any_of] = strides[0][:any_of] = [None] * any_of
    try:
        guards = torch._C._dynamo.guards.TensorGuards
        alike = guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        return alike if alike(*tensors) else None
    except (AttributeError, TypeError):
        return None


def _same(normalized_shape: Sequence[int], kept: Sequence[int]) -> bool:
    if normalized_shape is kept:
        return True
    # A model's norms have each a tuple of their own, and a compiled graph a list, as a rule of one number.
    if type(normalized_shape) in _SHAPES and len(normalized_shape) == 1 and type(normalized_shape[0]) is int:
        return len(kept) == 1 and normalized_shape[0] == kept[0]
    return kept == _size(normalized_shape)


def _size(normalized_shape: Sequence[int]) -> torch.Size | None:
    # An iterator would be used up, and a bool is no size.
    if not isinstance(normalized_shape, (tuple, list)) or bool in map(type, normalized_shape):
        return None
    try:
        return torch.Size(normalized_shape)
    except TypeError:
        return None


# What eps may be to be a part of a key: a tensor's value changes, and True is a mistake.
_NUMBERS = (float, type(None), int)

# A function for the shape itself is the faster one, but has to be made.
OWN_FROM = 4

# Of one shape: dtypes, layouts, with a gradient and without, under autocast and not.
_VARIANTS = 8

_SHAPES = (tuple, list)
_STRIDED = torch.strided
_is_compiling = torch.compiler.is_compiling
_modes = torch._C._len_torch_dispatch_stack
_is_transformed = torch._C._are_functorch_transforms_active
_grad_is_on = torch.is_grad_enabled
