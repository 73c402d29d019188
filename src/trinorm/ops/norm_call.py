"""What the calls of a family of norms, each of its own shape, do alike: repeat their launches, under autograd too."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from ..ops import road
from .calls import Known
from .node import apply_of
from .repeated import Repeated
from .row import are_plain

if TYPE_CHECKING:
    from ..replay import Function, Results

P = TypeVar("P")


class NormCall(ABC, Generic[P]):
    """The norm, and its gradients, of arguments that differ from those of one call in their values alone.

    differentiated: a backward will come.
    """

    __slots__ = ("_differentiated", "_forward", "_gradients", "problem")

    def __init__(self, problem: P, *, differentiated: bool) -> None:
        self.problem, self._differentiated = problem, differentiated
        forward = functools.partial(self.launch_forward, problem, differentiated)
        self._forward = Repeated(forward, functools.partial(self.is_watched, problem))
        self._gradients: Known[Function] = Known(8)

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """y."""
        if self._differentiated:
            return _apply(*inputs, self)
        return self.results(*inputs)[0]  # type: ignore[return-value]

    def results(self, *inputs: Tensor | None) -> Results:
        """y, and what a backward will ask for besides the inputs."""
        return self._forward(*inputs)

    def backward(self, wanted: tuple[bool, ...], dy: Tensor, *saved: Tensor | None) -> Results:
        """The gradients of the inputs, those that are wanted. saved: the inputs and what else a backward asks for, which
        may come back in another layout or dtype, from a hook.
        """
        if (gradients := self.recorded(wanted, dy, *saved)) is not None:
            return gradients(dy, *saved)
        if torch.is_grad_enabled() or not are_plain(dy, *saved) or road.observer() is not None:
            # Someone differentiates this backward, to whom a kernel's result would silently be a constant, or maps over it.
            return self.composite_gradients(self.problem, wanted, dy, *saved)
        return self.gradients(wanted, dy, *saved)

    def recorded(self, wanted: tuple[bool, ...], *tensors: Tensor | None) -> Function | None:
        """``gradients`` of dy and what was saved that are like these, where there were some."""
        return self._gradients.recall(wanted, *tensors)

    def gradients(self, wanted: tuple[bool, ...], dy: Tensor, *saved: Tensor | None) -> Results:
        """The same by the kernels, of tensors that they can read and that nobody differentiates."""
        tensors = self.restored(dy, *saved)
        key = wanted, *(None if t is None else (t.stride(), t.dtype) for t in tensors)

        def by_launches() -> Repeated:
            function = functools.partial(self.launch_backward, self.problem, wanted)
            return Repeated(function, functools.partial(self.is_watched, self.problem))

        return self._gradients.once(key, by_launches, wanted, *tensors)(*tensors)

    @abstractmethod
    def restored(self, dy: Tensor, *saved: Tensor | None) -> Results:
        """These as ``launch_backward`` reads them."""

    @staticmethod
    @abstractmethod
    def launch_forward(problem: Any, differentiated: bool, *inputs: Any) -> Results:
        """``results``, by launches and nothing else."""

    @staticmethod
    @abstractmethod
    def launch_backward(problem: Any, wanted: tuple[bool, ...], *tensors: Any) -> Results:
        """The gradients, of dy and what was saved."""

    @staticmethod
    @abstractmethod
    def composite_gradients(problem: Any, wanted: tuple[bool, ...], dy: Tensor, *saved: Any) -> Results:
        """The same by ATen's ops, differentiable."""

    @staticmethod
    @abstractmethod
    def is_watched(problem: Any) -> bool:
        """Whether someone put a launch of his own in the host's place."""


def launches_are_watched(host: ModuleType) -> bool:
    """Whether the launches of this host side, or of the sums that it shares with the row norms', are not launch.py's."""
    from .. import launch
    from .hosts import rows

    return not (host.launch is rows.launch is launch.launch)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *inputs, call = args
        y, *besides = call.results(*inputs)
        ctx.save_for_backward(*inputs, *besides)
        ctx.call = call
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.call.backward(ctx.needs_input_grad[:-1], dy, *ctx.saved_tensors), None


_apply = apply_of(_Norm)
