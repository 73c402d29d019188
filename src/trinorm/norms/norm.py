"""What a norm is to ``trinorm check``, ``bench`` and ``inspect``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..channel_reference import ChannelGradients as Gradients
from ..channel_reference import Given
from ..reference import Exact

Shape = tuple[int, ...]

MOMENTUM = 0.1


class Arguments(NamedTuple):
    """What every norm takes, and a residual, of which OfChannels knows."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    residual: Tensor | None = None

    @property
    def parameters(self) -> tuple[Tensor | None, Tensor | None, float]:
        """(weight, bias, eps)."""
        return self.weight, self.bias, self.eps

    @property
    def differentiable(self) -> dict[str, Tensor]:
        """What there is of x, weight, bias and residual, by their gradients' names."""
        named = zip(Gradients._fields, (self.x, self.weight, self.bias, self.residual), strict=True)
        return {name: t for name, t in named if t is not None}


class Normalized(NamedTuple):
    """What kernels leave: y, and the statistics of the rows, where a backward asks for them."""

    y: Tensor
    mean: Tensor | None
    rstd: Tensor | None


class Norm(ABC):
    """A norm, with all that its function takes besides Arguments.

    Its statistics are those of x's *rows*: the elements that share a mean, wherever in x they lie. running: running
    statistics, of a norm that has some, which a call keeps up in place or takes for its own.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The function's."""

    @property
    def centers(self) -> bool:
        """Whether there is a mean."""
        return True

    @property
    def biased(self) -> bool:
        """Whether there may be a bias."""
        return True

    @property
    def residual(self) -> bool:
        """Whether there is one."""
        return False

    @property
    def follows_scale(self) -> bool:
        """Whether a power of two in a row of x leaves y, dw and db as they are, given eps times its square."""
        return True

    def takes(self, shape: Shape) -> bool:
        """Whether there is such a norm of an x of this shape."""
        return len(shape) >= 2

    def parameter_shape(self, shape: Shape) -> Shape:
        """That of weight and bias."""
        return shape[1:2]

    def running(self, x: Tensor) -> Given | None:
        """Running statistics as a call may find them."""
        return None

    def running_after(self, x: Tensor, before: Given, momentum: float = MOMENTUM) -> Given | None:
        """What a call makes of them, in float64; None where it leaves them."""
        return None

    def settled(self, of: Arguments, dy: Tensor) -> Tensor:
        """dy, but 0 where a rounding of y would decide whether it counts."""
        return dy

    @abstractmethod
    def rows(self, x: Tensor) -> Tensor:
        """x as rows × their elements, in the order of the statistics."""

    @abstractmethod
    def of_rows(self, rows: Tensor, shape: Shape) -> Tensor:
        """The x that has these rows."""

    @abstractmethod
    def function(
        self, functions: ModuleType, shape: Shape, eps: float, running: Given | None = None, residual: Tensor | None = None
    ) -> Callable[..., Tensor]:
        """Of (x, weight, bias), or of (x, weight) where there is no bias: trinorm.functional's or torch.nn.functional's,
        called as users call it, with nothing of this class in the way. shape: x's.
        """

    def call(self, functions: ModuleType, of: Arguments, running: Given | None = None) -> Tensor:
        """y by that function."""
        parameters = (of.weight, of.bias) if self.biased else (of.weight,)
        return self.function(functions, of.x.shape, of.eps, running, of.residual)(of.x, *parameters)

    @abstractmethod
    def module(self, namespace: ModuleType, x: Tensor, eps: float) -> torch.nn.Module | None:
        """The module of trinorm.nn or torch.nn for x, beside it; None where there is none."""

    @abstractmethod
    def oracle(self, of: Arguments) -> Exact:
        """The definition, in float64."""

    @abstractmethod
    def oracle_gradients(self, of: Arguments, dy: Tensor) -> Gradients:
        """The same of the gradients."""

    @abstractmethod
    def composite(self, of: Arguments, running: Given | None = None) -> Tensor:
        """y by torch's own op, of whatever dtypes."""

    def torch_gradients(self, of: Arguments, dy: Tensor) -> Gradients:
        """The gradients by torch's own backward."""

        def composite(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
            return self.composite(Arguments(x, weight, bias, of.eps, residual), self.running(x))

        return Gradients(*reference.gradients_by_autograd(composite, (of.x, of.weight, of.bias, of.residual), dy))

    @abstractmethod
    def torch_statistics(self, x: Tensor, eps: float) -> tuple[Tensor | None, Tensor]:
        """(mean, rstd) of each row by torch's own op, in x's dtype."""

    @abstractmethod
    def forward(self, of: Arguments, *, save: bool) -> Normalized:
        """The kernels alone, of an x in an order of memory that they read. save: with statistics."""

    @abstractmethod
    def backward(self, dy: Tensor, of: Arguments, mean: Tensor | None, rstd: Tensor) -> tuple[Tensor | None, ...]:
        """(dx, dw, db, and of OfChannels dr), all that there are, by the kernels alone."""


def all_gradients(of: Arguments) -> dict[str, Any]:
    """What a backward is asked for: all gradients that there are."""
    dw, db = (None if t is None else t.dtype for t in (of.weight, of.bias))
    return dict(dx=True, dw=dw, db=db)
