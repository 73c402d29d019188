"""DyT and Derf, which are functions of each element, and PolyNorm, of which a row's elements share three statistics."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from ..reference import Exact
from ..reference import dynamic as dynamic_reference
from ..reference import poly as poly_reference
from ..reference.channel import ChannelGradients as Gradients
from ..reference.channel import Given
from ..spec import DynamicNorm
from .norm import Arguments, Norm, Normalized, Results, Shape


class OfElements(Norm):
    """Of rows × columns, with nothing kept between forward and backward but the inputs."""

    @property
    def family(self) -> Literal["elements"]:
        return "elements"

    @property
    def axes(self) -> str:
        return "rows × columns"

    @property
    def wanted(self) -> str:
        return "rows x columns"

    @property
    def smallest(self) -> Shape:
        return 3, 5

    @property
    def centers(self) -> bool:
        return False

    def takes(self, shape: Shape) -> bool:
        return len(shape) == 2

    def rows(self, x: Tensor) -> Tensor:
        return x

    def of_rows(self, rows: Tensor, shape: Shape) -> Tensor:
        return rows

    def oracle(self, of: Arguments) -> Exact:
        nothing = torch.zeros(of.x.shape[0], dtype=torch.float64, device=of.x.device)
        return Exact(self._exact(of), nothing, nothing)

    def torch_statistics(self, x: Tensor, eps: float) -> tuple[Tensor | None, Tensor]:
        return None, x.new_zeros(x.shape[0])

    @abstractmethod
    def _exact(self, of: Arguments) -> Tensor:
        """y in float64."""


@dataclass(frozen=True)
class OfDynamic(OfElements):
    """DyT and Derf. Alpha and shift stand where others have a residual, as one tensor."""

    spec: DynamicNorm

    @property
    def name(self) -> str:
        return self.spec.name

    def choice(self, pass_: str) -> str:
        return f"dynamic_{pass_}"

    @property
    def residual(self) -> bool:
        return True

    @property
    def numbers(self) -> int:
        return 1 + self.spec.shifted

    @property
    def follows_scale(self) -> bool:
        return False

    def parts(self, of: Arguments, what: str, t: Tensor) -> dict[str, Tensor]:
        if what != "dr":
            return {what: t}
        return dict(zip(("dalpha", "dshift"), t.split(1), strict=False))

    def terms(self, of: Arguments, what: str, dy: Tensor) -> Tensor | None:
        if what not in ("dr", "dw", "db"):
            return None
        x, numbers, weight = (None if t is None else t.double() for t in (of.x, of.residual, of.weight))
        assert x is not None and numbers is not None
        v = x * numbers[0] + (numbers[1] if self.spec.shifted else 0)
        f = dynamic_reference._saturated(self.spec, v)
        dv = dy.double() * (1 if weight is None else weight) * dynamic_reference._slope(self.spec, v)
        if what == "dr":
            return torch.cat([on_the_way(t.reshape(-1, 1)) for t in (dv * x, dv)[: self.numbers]])
        return on_the_way(dy.double() * (f if what == "dw" else 1))

    def function(
        self, functions: ModuleType, shape: Shape, eps: float, running: Given | None = None
    ) -> Callable[..., Results]:
        """Of x, alpha and, of Derf, shift, each its own tensor, weight and bias."""
        over, spec = shape[1:], self.spec
        if hasattr(functions, self.name):
            norm = getattr(functions, self.name)
            return lambda x, *others: norm(x, over, *others)
        saturated = torch.tanh if spec.function == "tanh" else torch.erf  # torch has none: as its users write it

        def written(x: Tensor, alpha: Tensor, *others: Tensor) -> Tensor:
            *shift, weight, bias = others
            return saturated(alpha * x + shift[0] if shift else alpha * x) * weight + bias

        return written

    def call(self, functions: ModuleType, of: Arguments, running: Given | None = None) -> tuple[Tensor, ...]:
        return (self.function(functions, of.x.shape, of.eps)(of.x, *self._numbers(of), of.weight, of.bias),)  # type: ignore[return-value]

    def module(self, namespace: ModuleType, x: Tensor, eps: float) -> torch.nn.Module | None:
        made = getattr(namespace, "DynamicErf" if self.spec.shifted else "DynamicTanh", None)
        return None if made is None else made(x.shape[1], device=x.device)

    def oracle_gradients(self, of: Arguments, dy: Tensor, dsum: Tensor | None = None) -> Gradients:
        dx, dalpha, dshift, dw, db = dynamic_reference.oracle_gradients(self.spec, dy, *self._problem(of))
        return Gradients(dx, dw, db, _joined(dalpha, dshift))

    def composite(self, of: Arguments, running: Given | None = None) -> Tensor:
        return dynamic_reference.composite(self.spec, *self._problem(of))

    def forward(self, of: Arguments, *, save: bool) -> Normalized:
        from ..ops.hosts import dynamic_rows

        return Normalized(dynamic_rows.forward(self.spec, 1, self._as_launched(of)), None, None)

    def backward(
        self, dy: Tensor, of: Arguments, mean: Tensor | None, rstd: Tensor, dsum: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        from ..ops.hosts import dynamic_rows

        found = dynamic_rows.backward(self.spec, 1, self._as_launched(of), dy, (True,) * 5)
        return found[0], *found[3:], _joined(*found[1:3])

    def _exact(self, of: Arguments) -> Tensor:
        return dynamic_reference.oracle(self.spec, *self._problem(of))

    def _numbers(self, of: Arguments) -> tuple[Tensor, ...]:
        assert of.residual is not None
        return tuple(of.residual.split(1))

    def _problem(self, of: Arguments) -> Any:
        """The tensors that dynamic_reference takes."""
        alpha, *shift = self._numbers(of)
        return of.x, alpha, *(shift or (None,)), of.weight, of.bias

    def _as_launched(self, of: Arguments) -> Any:
        from ..ops.hosts import dynamic_rows

        return dynamic_rows.Inputs(*self._problem(of))


@dataclass(frozen=True)
class OfPoly(OfElements):
    """PolyNorm, whose weight has three elements, and whose bias one."""

    @property
    def name(self) -> str:
        return "poly_norm"

    @property
    def wanted(self) -> str:
        from ..ops.poly import MOST_OF_ROW

        return f"rows x columns, of which there are at most {MOST_OF_ROW}"

    def choice(self, pass_: str) -> str:
        return f"poly_{pass_}"

    @property
    def weighted(self) -> bool:
        return True

    def takes(self, shape: Shape) -> bool:
        from ..ops.poly import MOST_OF_ROW

        return len(shape) == 2 and shape[1] <= MOST_OF_ROW

    def parameter_shape(self, shape: Shape) -> Shape:
        return (3,)

    def bias_shape(self, shape: Shape) -> Shape:
        return (1,)

    def terms(self, of: Arguments, what: str, dy: Tensor) -> Tensor | None:
        x, g = of.x.double(), dy.double()
        if what == "db":
            return on_the_way(g.reshape(-1, 1))
        powers = [poly_reference._normalized(x**k, of.eps) for k in poly_reference.POWERS]
        if what == "dw":
            return torch.cat([on_the_way((g * n).reshape(-1, 1)) for n, _ in powers])
        if of.weight is None or what not in ("y", "dx"):
            return None
        w = of.weight.double().abs()
        if what == "y":
            size = sum(w[i] * n.abs() for i, (n, _) in enumerate(powers))
            return size + (0 if of.bias is None else of.bias.double().abs())
        total = torch.zeros_like(x)
        for i, (k, (n, r)) in enumerate(zip(poly_reference.POWERS, powers, strict=True)):
            each = g.abs() + n.abs() * (g * n).abs().mean(-1, keepdim=True)
            total += w[i] * r * k * x.abs() ** (k - 1) * each
        return total

    def function(
        self, functions: ModuleType, shape: Shape, eps: float, running: Given | None = None
    ) -> Callable[..., Results]:
        if hasattr(functions, "poly_norm"):
            norm = functions.poly_norm
            return lambda x, weight, bias: norm(x, weight, bias, eps)

        def normalized(u: Tensor) -> Tensor:
            return u / torch.sqrt(u.pow(2).mean(-1, keepdim=True) + eps)

        def written(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # torch has none: as the paper's code has it
            return weight[0] * normalized(x**3) + weight[1] * normalized(x**2) + weight[2] * normalized(x) + bias

        return written

    def module(self, namespace: ModuleType, x: Tensor, eps: float) -> torch.nn.Module | None:
        made = getattr(namespace, "PolyNorm", None)
        return None if made is None else made(eps, device=x.device)

    def oracle_gradients(self, of: Arguments, dy: Tensor, dsum: Tensor | None = None) -> Gradients:
        dx, dw, db = poly_reference.oracle_gradients(of.eps, dy, *self._problem(of))
        return Gradients(dx, dw, db, None)

    def composite(self, of: Arguments, running: Given | None = None) -> Tensor:
        return poly_reference.composite(of.eps, *self._problem(of))

    def forward(self, of: Arguments, *, save: bool) -> Normalized:
        from ..ops.hosts import poly_rows

        return Normalized(poly_rows.forward(of.eps, *self._problem(of)), None, None)

    def backward(
        self, dy: Tensor, of: Arguments, mean: Tensor | None, rstd: Tensor, dsum: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        from ..ops.hosts import poly_rows

        return *poly_rows.backward(of.eps, (True,) * 3, dy, *self._problem(of)), None

    def _exact(self, of: Arguments) -> Tensor:
        return poly_reference.oracle(of.eps, *self._problem(of))

    def _problem(self, of: Arguments) -> Any:
        """The tensors that poly_reference takes."""
        return of.x, of.weight, of.bias


def on_the_way(terms: Tensor) -> Tensor:
    """How large what the sums of these over rows are rounded in is. A term goes through log2(m) additions at the least, and
    those of a kind make sums as large as the root of the terms' squares' sum; roundings add up as squares do.
    """
    return terms.square().sum(0).sqrt() * math.sqrt(1 + math.log2(max(1, len(terms))))


def _joined(*numbers: Tensor | None) -> Tensor | None:
    """Those that there are, as one."""
    given = [t.reshape(1) for t in numbers if t is not None]
    return torch.cat(given) if given else None
