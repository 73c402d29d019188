"""Weight normalization, of a v of rows × columns, whose rows get g's lengths, which stand where others have a weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ..reference import weight as weight_reference
from ..reference.channel import ChannelGradients as Gradients
from ..reference.channel import Given
from .elements import OfElements, on_the_way
from .norm import Arguments, Normalized, Results, Shape


@dataclass(frozen=True)
class OfWeight(OfElements):
    """Each row has a norm, and an element of g."""

    @property
    def name(self) -> str:
        return "weight_norm"

    @property
    def biased(self) -> bool:
        return False

    @property
    def weighted(self) -> bool:
        return True

    def parameter_shape(self, shape: Shape) -> Shape:
        return weight_reference.g_shape(0, shape)

    def terms(self, of: Arguments, what: str, dy: Tensor) -> Tensor | None:
        if of.weight is None or what not in ("dx", "dw"):
            return None
        v, g, dw = of.x.double(), of.weight.double(), dy.double()
        norm = v.square().sum(-1, keepdim=True).sqrt()
        products = dw * v / norm
        if what == "dw":
            return on_the_way(products.T)[:, None]
        return g.abs() / norm * (dw.abs() + (v / norm).abs() * products.abs().sum(-1, keepdim=True))

    def function(
        self, functions: ModuleType, shape: Shape, eps: float, running: Given | None = None
    ) -> Callable[..., Results]:
        return getattr(functions, self.name, torch._weight_norm)

    def module(self, namespace: ModuleType, x: Tensor, eps: float) -> torch.nn.Module | None:
        return None

    def oracle_gradients(self, of: Arguments, dy: Tensor, dsum: Tensor | None = None) -> Gradients:
        return Gradients(*weight_reference.oracle_gradients(0, dy, *self._problem(of)), None, None)

    def composite(self, of: Arguments, running: Given | None = None) -> Tensor:
        """torch's own, where it takes these dtypes. Of each row times a power of two, which changes no w, but brings
        squares to where torch's own operators hold them. Others have an epsilon beside the least.
        """
        v, g = self._problem(of)
        largest = v.detach().double().abs().amax(-1, keepdim=True)
        exponent = largest.log2().floor().clamp(-1000, 1000)
        scale = torch.where((largest > 0) & largest.isfinite(), (-exponent).exp2(), 1.0)
        v = (v.double() * scale).to(v.dtype)
        return torch._weight_norm(v, g, 0) if v.dtype == g.dtype else weight_reference.composite(0, v, g)

    def forward(self, of: Arguments, *, save: bool) -> Normalized:
        from ..ops.hosts import weight_rows

        return Normalized(weight_rows.forward(0, *self._problem(of)), None, None)

    def backward(
        self, dy: Tensor, of: Arguments, mean: Tensor | None, rstd: Tensor, dsum: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        from ..ops.hosts import weight_rows

        return *weight_rows.backward(0, (True, True), dy, *self._problem(of)), None, None

    def _exact(self, of: Arguments) -> Tensor:
        return weight_reference.oracle(0, *self._problem(of))

    def _problem(self, of: Arguments) -> tuple[Tensor, Tensor]:
        """The tensors that weight_reference takes."""
        assert of.weight is not None
        return of.x, of.weight
