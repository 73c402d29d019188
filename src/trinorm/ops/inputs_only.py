"""Norms whose backward needs their inputs and nothing else: by the road that serves them, and as registered ops.

A norm of this kind is a subclass of InputsOnly, whose values are what is computed. Its op::

    <name>(<tensors>, <options>) -> y
    <name>_backward(dy, <tensors>, <options>, whether each gradient is wanted) -> a gradient of each tensor

y is contiguous and has the input's shape and dtype. Autocast leaves these ops alone, as it does torch's elementwise ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..ops import road
from ..switches import when_set
from .calls import Known
from .library.registering import Op, one_by_one, register
from .norm_call import NormCall

if TYPE_CHECKING:
    from ..replay import Results


class InputsOnly(ABC):
    """What is computed of the tensors, of which the first is the input. A value compares by its fields (a dataclass).

    tensors: the others' names, as a schema has them. options: the fields, in their order, by their types there.
    """

    tensors: ClassVar[dict[str, str]]
    options: ClassVar[dict[str, str]]

    @property
    @abstractmethod
    def name(self) -> str:
        """The op's, and the function's."""

    @abstractmethod
    def of(self, *options: Any) -> InputsOnly:
        """The same norm with these options."""

    @abstractmethod
    def misfit(self, *inputs: Tensor | None) -> str | None:
        """Why a kernel would read what is not there; None where these tensors fit."""

    @abstractmethod
    def lacking(self, *inputs: Tensor | None) -> str | None:
        """Why there is no kernel for such a call; None where there is one."""

    @abstractmethod
    def read(self, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        """The inputs, or dy and the inputs, as the kernels read them."""

    @abstractmethod
    def composite(self, *inputs: Any) -> Tensor:
        """y by ATen's ops."""

    @abstractmethod
    def gradients(self, dy: Tensor, *inputs: Any) -> Results:
        """That of each input, None of what is None, by ATen's ops: a differentiable function of dy and the inputs."""

    @abstractmethod
    def launch_forward(self, *inputs: Any) -> Tensor:
        """y by the kernels."""

    @abstractmethod
    def launch_backward(self, wanted: tuple[bool, ...], dy: Tensor, *inputs: Any) -> Results:
        """The gradients that are wanted, by the kernels."""

    @abstractmethod
    def is_watched(self) -> bool:
        """As NormCall's."""

    def wanted_gradients(self, wanted: tuple[bool, ...], dy: Tensor, *inputs: Any) -> Results:
        found = zip(self.gradients(dy, *inputs), inputs, wanted, strict=True)
        return tuple(g.to(t.dtype).contiguous() if want and g is not None else None for g, t, want in found)


class InputsOnlyCall(NormCall[InputsOnly]):
    """The norm of its inputs; nothing besides is kept."""

    __slots__ = ()

    def restored(self, dy: Tensor, *saved: Tensor | None) -> Results:
        return self.problem.read(dy, *saved)

    @staticmethod
    def launch_forward(problem: InputsOnly, differentiated: bool, *inputs: Any) -> Results:
        return (problem.launch_forward(*inputs),)

    @staticmethod
    def launch_backward(problem: InputsOnly, wanted: tuple[bool, ...], *tensors: Any) -> Results:
        return problem.launch_backward(wanted, *tensors)

    @staticmethod
    def composite_gradients(problem: InputsOnly, wanted: tuple[bool, ...], dy: Tensor, *inputs: Any) -> Results:
        return problem.wanted_gradients(wanted, dy, *inputs)

    @staticmethod
    def is_watched(problem: InputsOnly) -> bool:
        return problem.is_watched()


CALLS: Known[InputsOnlyCall] = Known(1024)
when_set(CALLS.clear)


def inputs_only_norm(problem: InputsOnly, asked: Hashable, *inputs: Tensor | None) -> Tensor:
    """The norm of checked arguments. asked: what tells the call apart besides tensors; None if it shall not be recalled."""
    x = inputs[0]
    assert x is not None
    lacking = problem.lacking(*inputs)
    if lacking is None and road.takes_op(problem.name, *inputs, whole=False):
        return _op(problem.name)(*inputs, *options_of(problem))
    if road.is_empty(x) or not road.kernels_serve(problem.name, x, *inputs[1:], lacking=lacking):
        return problem.composite(*inputs)
    read = problem.read(*inputs)
    call = None
    if asked is not None and any(now is not before for now, before in zip(read, inputs, strict=True)):
        call = CALLS.recall(asked, *read)
    if call is None:
        call = InputsOnlyCall(problem, differentiated=road.is_differentiated(*read))
        if asked is not None:
            CALLS.keep(asked, call, *read)
    return call(*read)


def options_of(problem: InputsOnly) -> tuple[Any, ...]:
    """The options of the problem's op."""
    return tuple(getattr(problem, name) for name in problem.options)


def _op(name: str) -> Any:
    return getattr(torch.ops.trinorm, name)


class _OfInputsOnly(Op):
    """prototype: of the norms that the op computes, any."""

    def __init__(self, prototype: InputsOnly) -> None:
        self._prototype = prototype
        self._count = 1 + len(prototype.tensors)

    @property
    def _schema_of_tensors(self) -> str:
        return ", ".join(["Tensor input", *(f"{kind} {name}" for name, kind in self._prototype.tensors.items())])

    @property
    def _schema_of_options(self) -> str:
        return "".join(f", {kind} {name}" for name, kind in self._prototype.options.items())

    def _problem(self, args: Sequence[Any], first: int = 0) -> tuple[InputsOnly, tuple[Any, ...]]:
        """What is computed, and of which tensors, that begin with the ``first`` of these arguments; checked."""
        middle = first + self._count
        inputs, options = tuple(args[first:middle]), args[middle : middle + len(self._prototype.options)]
        problem = self._prototype.of(*options)
        misfit = problem.misfit(*inputs)
        torch._check(misfit is None, lambda: f"trinorm::{self.name}: {misfit}")
        given = [t for t in (*args[:first], *inputs) if t is not None]
        alike = all(t.device == inputs[0].device for t in given)
        torch._check(alike, lambda: f"trinorm::{self.name}: not all tensors are on one device")
        known = all(t.dtype in road.KERNEL_DTYPES for t in given)
        torch._check_not_implemented(known, lambda: f"trinorm::{self.name}: a dtype other than {road.KERNEL_DTYPES}")
        return problem, inputs

    def _kernels_serve(self, problem: InputsOnly, inputs: tuple[Any, ...]) -> bool:
        return bool(inputs[0].numel()) and problem.lacking(*inputs) is None and road.has_kernels(inputs[0])


class _Forward(_OfInputsOnly):
    differentiable = True

    def __init__(self, prototype: InputsOnly, backward: _Backward) -> None:
        super().__init__(prototype)
        self.name, self._backward = prototype.name, backward
        self.schema = f"({self._schema_of_tensors}{self._schema_of_options}) -> Tensor"

    def save(self, ctx: Any, results: Any, *args: Any) -> None:
        ctx.save_for_backward(*args[: self._count])
        ctx.options = args[self._count :]

    def differentiate(self, ctx: Any, *gradients: Tensor | None) -> Results:
        wanted = ctx.needs_input_grad[3 : 3 + self._count]
        found = self._backward(gradients[0], *ctx.saved_tensors, *ctx.options, *wanted)
        return *found, *(None,) * len(ctx.options)

    def composite(self, *args: Any) -> Any:
        problem, inputs = self._problem(args)
        return problem.composite(*inputs)

    def anew(self, *args: Any) -> Any:
        problem, inputs = self._problem(args)
        if not self._kernels_serve(problem, inputs):
            return problem.composite(*inputs)
        call = InputsOnlyCall(problem, differentiated=True)
        again: Any = lambda *inputs: call.results(*inputs)[0]  # noqa: E731
        return self.do_and_keep(args, again, problem.read)

    def fake(self, *args: Any) -> Any:
        x = self._problem(args)[1][0]
        return x.new_empty(x.shape)

    def vmap(self, info: Any, dims: Sequence[Any], *args: Any) -> Any:
        one: Any = lambda *args: (self(*args),)  # noqa: E731
        (result,), (dim,) = one_by_one(one, info, dims, *args)
        return result, dim


class _Backward(_OfInputsOnly):
    def __init__(self, prototype: InputsOnly) -> None:
        super().__init__(prototype)
        self.name = f"{prototype.name}_backward"
        self._names = [f"d{name}" for name in ("input", *prototype.tensors)]
        wanted = "".join(f", bool {name}" for name in self._names)
        results = ", ".join(["Tensor"] * self._count)
        self.schema = f"(Tensor dy, {self._schema_of_tensors}{self._schema_of_options}{wanted}) -> ({results})"

    def composite(self, *args: Any) -> Results:
        problem, inputs, wanted = self._asked(args)
        return problem.wanted_gradients(wanted, args[0], *inputs)

    def anew(self, *args: Any) -> Results:
        problem, inputs, wanted = self._asked(args)
        if not self._kernels_serve(problem, inputs):
            return self.composite(*args)
        return self.do_and_keep_gradients(args, InputsOnlyCall(problem, differentiated=True), wanted)

    def fake(self, *args: Any) -> Results:
        _, inputs, wanted = self._asked(args)
        return tuple(t.new_empty(t.shape) if want else None for t, want in zip(inputs, wanted, strict=True))

    def _asked(self, args: Sequence[Any]) -> tuple[InputsOnly, tuple[Any, ...], tuple[bool, ...]]:
        problem, inputs = self._problem(args, 1)
        wanted = tuple(args[-self._count :])
        torch._check(args[0].shape == inputs[0].shape, lambda: f"trinorm::{self.name}: dy is not of the input's shape")
        known = all(not want or t is not None for want, t in zip(wanted, inputs, strict=True))
        torch._check(known, lambda: f"trinorm::{self.name}: a gradient is asked for of what is not there")
        return problem, inputs, wanted


def register_norm(prototype: InputsOnly) -> None:
    """Make its op, and that of its backward, torch.ops.trinorm's."""
    backward = _Backward(prototype)
    register(_Forward(prototype, backward), CALLS)
    register(backward, CALLS)
