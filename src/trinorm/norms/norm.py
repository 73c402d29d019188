"""What a norm is to ``trinorm check``, ``bench`` and ``inspect``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..formats import Format
from ..reference import Exact
from ..reference.channel import ChannelGradients, Given
from ..reference.gated_sum import GatedSumGradients
from ..spec import RowNorm

Shape = tuple[int, ...]

Gradients = ChannelGradients | GatedSumGradients

# y, (y, sum), or a Quantized.
Results = Tensor | tuple[Any, ...]

MOMENTUM = 0.1


# Gradients' names, and what they are of: in the order of Norm.function.
_DIFFERENTIABLE = dict(dx="x", dr="residual", dg="gate", dw="weight", db="bias")


class Arguments(NamedTuple):
    """What every norm takes; a residual, of which OfChannels and OfSums know, or OfConditioned's gate, or OfDynamic's
    alpha and shift, or OfLinear's A; what OfHeads does: how many of x's heads are queries', and cos and sin; and the gate
    of OfGatedSums' x, beside a residual.
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    residual: Tensor | None = None
    queries: int = 0
    angles: tuple[Tensor, Tensor] | None = None
    gate: Tensor | None = None

    @property
    def parameters(self) -> tuple[Tensor | None, Tensor | None, float]:
        """(weight, bias, eps)."""
        return self.weight, self.bias, self.eps

    @property
    def differentiable(self) -> dict[str, Tensor]:
        """What there is of x, residual, gate, weight and bias, in the order of Norm.function, by their gradients' names."""
        return {name: t for name, field in _DIFFERENTIABLE.items() if (t := getattr(self, field)) is not None}

    def with_these(self, *tensors: Tensor) -> Arguments:
        """With others in the places of what is differentiable."""
        fields = (_DIFFERENTIABLE[name] for name in self.differentiable)
        given: dict[str, Any] = dict(zip(fields, tensors, strict=True))
        return self._replace(**given)

    def zero_where(self, unsound: Tensor, shared: bool) -> Arguments:
        """With zeros in these places of x and of the residual. shared: all rows have one, which stays."""
        residual = self.residual
        if residual is not None and not shared:
            residual = residual.masked_fill(unsound, 0)
        return self._replace(x=self.x.masked_fill(unsound, 0), residual=residual)


class Normalized(NamedTuple):
    """What kernels leave: y, or what is stored of it, and the statistics of the rows, where a backward asks for them."""

    y: Results
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
    def family(self) -> Literal["rows", "channels", "heads", "conditioned", "elements"]:
        """Whose shapes it has."""
        return "channels"

    @property
    def axes(self) -> str:
        """What a shape counts."""
        return "N × C × ..."

    @property
    def wanted(self) -> str:
        """The shapes that it takes, in words."""
        return "N x C x ..., with more than one element to a statistic"

    @property
    def smallest(self) -> Shape:
        """A shape that is worth finite differences."""
        return 2, 3, 2

    @property
    def centers(self) -> bool:
        """Whether there is a mean."""
        return True

    @property
    def biased(self) -> bool:
        """Whether there may be a bias."""
        return True

    @property
    def weighted(self) -> bool:
        """Whether there must be a weight, and a bias where there may be one."""
        return False

    @property
    def bare(self) -> bool:
        """Whether it is measured without a weight, as models have it."""
        return False

    @property
    def residual(self) -> bool:
        """Whether there is one, or a gate, numbers or a linear layer's weight in its place."""
        return False

    @property
    def numbers(self) -> int:
        """How many numbers of all rows stand in the residual's place; 0 where none do."""
        return 0

    @property
    def outputs(self) -> int:
        """Of how many features a linear layer behind it is, whose weight stands in the residual's place; 0 is none."""
        return 0

    @property
    def gated(self) -> bool:
        """Whether the residual is a gate."""
        return False

    @property
    def of_sum(self) -> bool:
        """Whether the residual is added before: to x, which makes a sum that is normalized, and is a result too."""
        return False

    @property
    def of_gated_sum(self) -> bool:
        """Whether x is multiplied by a gate of the weight's shape before that."""
        return False

    @property
    def form(self) -> Format | None:
        """What y is stored in; None where it has x's dtype."""
        return None

    @property
    def results(self) -> tuple[str, ...]:
        """What the function returns."""
        return ("y", "sum") if self.of_sum else ("y",)

    @property
    def differentiated(self) -> tuple[str, ...]:
        """Of which of the results there are gradients."""
        return self.results

    @property
    def follows_scale(self) -> bool:
        """Whether a power of two in a row of x leaves y, dw and db as they are, given eps times its square."""
        return True

    @property
    def smooth(self) -> bool:
        """Whether a result changes as little as x does. Otherwise there is nothing for finite differences; and what is no
        number leaves none in its row.
        """
        return True

    def takes(self, shape: Shape) -> bool:
        """Whether there is such a norm of an x of this shape."""
        return len(shape) >= 2

    def serves(self, shape: Shape, dtype: torch.dtype) -> bool:
        """Whether there is a kernel for it in this dtype too."""
        return True

    def bytes_stored(self, shape: Shape) -> int:
        """How many a form has of an x of this shape: of its elements, and of the scales that are taken of them."""
        return 0

    def choice(self, pass_: str) -> str:
        """Which of tuning's choices is its launch of a pass, by the name that ``forced`` knows."""
        return f"{self.family}_{pass_}"

    def x_shape(self, shape: Shape) -> Shape:
        """x's, which is the shape but of OfHeads."""
        return shape

    def parameter_shape(self, shape: Shape) -> Shape:
        """That of weight and bias."""
        return shape[1:2]

    def bias_shape(self, shape: Shape) -> Shape:
        """The bias's, where it is another."""
        return self.parameter_shape(shape)

    def queries(self, shape: Shape) -> int:
        """How many heads are queries'."""
        return 0

    def angles(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """(cos, sin) where there is a rotary embedding."""
        return None

    def tensor_scale(self, device: torch.device) -> Tensor | None:
        """The number of the whole tensor that a format may ask for."""
        return None

    def parts(self, of: Arguments, what: str, t: Tensor) -> dict[str, Tensor]:
        """What a result, or a gradient, is reported as, by name."""
        return {what: t}

    def terms(self, of: Arguments, what: str, dy: Tensor) -> Tensor | None:
        """How large what a result or a gradient is a sum of is, where that is larger than what it sums to; None where a
        comparison needs none. Of sums over rows: the sums on the way.
        """
        return None

    def residual_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The residual's beside an x of this one."""
        return dtype

    def normalized(self, of: Arguments) -> Tensor:
        """What the statistics are of: x, or the sum as it is kept, in its dtype."""
        return of.x

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

    def counted(self, rows: Tensor) -> Tensor:
        """Those elements of rows that their statistics are of."""
        return rows

    @abstractmethod
    def of_rows(self, rows: Tensor, shape: Shape) -> Tensor:
        """The x that has these rows."""

    @abstractmethod
    def function(
        self, functions: ModuleType, shape: Shape, eps: float, running: Given | None = None
    ) -> Callable[..., Results]:
        """Of x; the residual, where there is one, and a gate beside it; weight; bias, where there may be one; tensor_scale,
        where there is one: trinorm.functional's or torch.nn.functional's, called as users call it, with nothing of this
        class in the way. shape: x's.
        """

    def call(self, functions: ModuleType, of: Arguments, running: Given | None = None) -> tuple[Tensor, ...]:
        """The results of that function."""
        given = (of.x, *[of.residual] * self.residual, *[of.gate] * self.of_gated_sum, of.weight, *[of.bias] * self.biased)
        return as_tuple(self.function(functions, of.x.shape, of.eps, running)(*given))

    @abstractmethod
    def module(self, namespace: ModuleType, x: Tensor, eps: float) -> torch.nn.Module | None:
        """The module of trinorm.nn or torch.nn for x, beside it; None where there is none."""

    @abstractmethod
    def oracle(self, of: Arguments) -> Exact:
        """The definition, in float64."""

    def oracle_sum(self, of: Arguments) -> Tensor | None:
        """The sum in float64, where it is a result."""
        return None

    def oracle_results(self, of: Arguments) -> tuple[Tensor, ...]:
        """The results in float64."""
        total = self.oracle_sum(of)
        return self.oracle(of).y, *([] if total is None else [total])

    @abstractmethod
    def oracle_gradients(self, of: Arguments, dy: Tensor, dsum: Tensor | None = None) -> Gradients:
        """The gradients in float64, of y's gradient and of the sum's, where that has one."""

    @abstractmethod
    def composite(self, of: Arguments, running: Given | None = None) -> Results:
        """The results by torch's own ops, of whatever dtypes."""

    def torch_gradients(self, of: Arguments, dy: Tensor, dsum: Tensor | None = None) -> Gradients:
        """The gradients by torch's own backward."""

        gradients = (dy,) if dsum is None else (dy, dsum)

        def composite(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> tuple[Tensor, ...]:
            given = of._replace(x=x, weight=weight, bias=bias, residual=residual)
            found = as_tuple(self.composite(given, self.running(x)))
            return found[: len(gradients)]

        inputs = of.x, of.weight, of.bias, of.residual
        return ChannelGradients(*reference.gradients_by_autograd(composite, inputs, gradients))

    @abstractmethod
    def torch_statistics(self, x: Tensor, eps: float) -> tuple[Tensor | None, Tensor]:
        """(mean, rstd) of each row by torch's own op, in x's dtype."""

    @abstractmethod
    def forward(self, of: Arguments, *, save: bool) -> Normalized:
        """The kernels alone, of an x in an order of memory that they read. save: with statistics."""

    @abstractmethod
    def backward(
        self, dy: Tensor, of: Arguments, mean: Tensor | None, rstd: Tensor, dsum: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        """(dx, dw, db, and of OfChannels dr), all that there are, by the kernels alone. Of OfSums dx is dr."""


def casting(spec: RowNorm) -> dict[str, Any]:
    """What a function is told of its casting mode, where that is not the default."""
    return {} if spec.cast == "output" else dict(cast=spec.cast)


def as_tuple(results: Results) -> tuple[Tensor, ...]:
    """One result or more, as more."""
    return (results,) if isinstance(results, Tensor) else results


def all_gradients(of: Arguments) -> dict[str, Any]:
    """What a backward is asked for: all gradients that there are."""
    dw, db = (None if t is None else t.dtype for t in (of.weight, of.bias))
    return dict(dx=True, dw=dw, db=db)
