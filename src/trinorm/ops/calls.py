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
    """

    def __init__(self, limit: int) -> None:
        self._own: Bounded[_Entries[T]] = Bounded(limit)
        self._of_any_rows: Bounded[_Entries[T]] = Bounded(limit)
        # How often the keys of _own came that have none there.
        self._met: Bounded[int] = Bounded(limit)

    def clear(self) -> None:
        """Forget them all."""
        for kept in (self._own, self._of_any_rows, self._met):
            kept.clear()

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
        # checkpointing, which ask compilers not to look at them. To ask for any mode costs 38 ns.
        if _is_compiling() or forward_ad._current_level >= 0 or _modes():
            return None
        if type(x) not in road.PLAIN or type(eps) not in _NUMBERS:
            return None
        try:
            key = op, manner, x.shape, eps, weight is None, bias is None, _grad_is_on()
            entries = self._own.get(key)
            # Of a nested tensor of strided layout the guard would ask the strides, which ends the process.
            if (weight is not None and weight.is_nested) or (bias is not None and bias.is_nested):
                return None
        # Such an x has no shape; a wrong manner may be no key, and a wrong parameter no tensor.
        except (RuntimeError, TypeError, AttributeError):
            return None
        tensors = _present(x, weight, bias)
        if entries is not None and (call := _of_these(entries, tensors, normalized_shape)) is not None:
            return call
        entries = self._of_any_rows.get(_without_rows(key))
        if entries is None or x.layout is not _STRIDED or not x.is_contiguous():
            return None
        if (call := _of_these(entries, tensors, normalized_shape)) is None:
            return None
        self._met[key] = met = self._met.get(key, 1) + 1
        return call if met < OWN_FROM else None

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
    """The same of norms whose calls are each of their own shape."""

    def __init__(self, limit: int) -> None:
        self._kept: Bounded[tuple[tuple[Callable[..., bool], T], ...]] = Bounded(limit)

    def clear(self) -> None:
        self._kept.clear()

    def recall(self, manner: Hashable, *tensors: Tensor | None) -> T | None:
        """What was kept for a call like this one, None where nothing was. manner: all that tells calls apart besides
        tensors, and no tensor. tensors: at least one, the first not None.
        """
        x = tensors[0]
        if _is_compiling() or forward_ad._current_level >= 0 or _modes() or type(x) not in road.PLAIN:
            return None
        try:
            entries = self._kept.get((manner, *map(type, tensors), x.shape, _grad_is_on()))  # type: ignore[union-attr]
        except (RuntimeError, TypeError):
            return None
        if entries is not None:
            present = []
            for t in tensors:
                if t is not None:
                    if t.is_nested:  # as Calls'
                        return None
                    present.append(t)
            for alike, call in entries:
                if alike(*present):
                    return call
        return None

    def keep(self, manner: Hashable, call: T, *tensors: Tensor | None) -> None:
        """Recall ``call`` from now on for calls like this one."""
        alike = _alike(None, *(t for t in tensors if t is not None))
        if alike is not None:
            # By the types is told what is None, which the guard is not asked.
            key = manner, *map(type, tensors), tensors[0].shape, torch.is_grad_enabled()  # type: ignore[union-attr]
            self._kept[key] = ((alike, call), *self._kept.get(key, ())[: _VARIANTS - 1])


# (The guard of the tensors, normalized_shape, what is kept), the latest first.
_Entries = tuple[tuple[Callable[..., bool], Sequence[int], T], ...]

_Key = tuple[str, Hashable, torch.Size, float | None, bool, bool, bool]


def _of_these(entries: _Entries[T], tensors: tuple[Tensor, ...], normalized_shape: Sequence[int]) -> T | None:
    for alike, normalized, call in entries:
        if alike(*tensors) and (normalized is normalized_shape or normalized == _size(normalized_shape)):
            return call
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

_STRIDED = torch.strided
_is_compiling = torch.compiler.is_compiling
_modes = torch._C._len_torch_dispatch_stack
_grad_is_on = torch.is_grad_enabled
