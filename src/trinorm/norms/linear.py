"""LayerNorm and RMSNorm into a linear layer, whose weight A stands where others have a residual."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..reference import Exact
from ..reference.channel import ChannelGradients as Gradients
from ..reference.channel import Given
from .norm import Arguments, Results, Shape
from .rows import OfRows


@dataclass(frozen=True)
class OfLinear(OfRows):
    """z = norm(x)·Aᵀ, from a row's columns to a few features, so that A fits beside the widest row. The linear layer has no
    bias, which is torch's alone.

    The statistics, and the kernels alone (forward, backward), are the norm's. What is no number in a row of x reaches no
    other row of z, but every row of dA, which sums over x's.
    """

    outputs: int = 24

    @property
    def name(self) -> str:
        return f"{self.spec.name}_linear"

    @property
    def residual(self) -> bool:
        return True

    def parts(self, of: Arguments, what: str, t: Tensor) -> dict[str, Tensor]:
        return {dict(y="z", dr="dA").get(what, what): t}

    def function(
        self, functions: ModuleType, shape: Shape, eps: float, running: Given | None = None
    ) -> Callable[..., Results]:
        if functions is F:  # torch has none: as its users write it
            of_rows: Callable[..., Any] = OfRows(self.spec).function(F, shape, eps)
            return lambda x, a, *parameters: F.linear(of_rows(x, *parameters), a)
        norm, over, how = getattr(functions, self.name), shape[1:], self._how
        return lambda x, a, *parameters: norm(x, over, *parameters, a, eps=eps, **how)

    def module(self, namespace: ModuleType, x: Tensor, eps: float) -> torch.nn.Module | None:
        made = getattr(namespace, "LayerNormLinear" if self.centers else "RMSNormLinear", None)
        return None if made is None else made(x.shape[1], self.outputs, bias=False, eps=eps, device=x.device)

    def oracle(self, of: Arguments) -> Exact:
        assert of.residual is not None
        lift, lower, quiet = reference.precise(of.x, of.residual)
        with quiet:
            return super().oracle(of)._replace(y=lower(self._normalized(of, lift)[-1] @ lift(of.residual).T))

    def oracle_gradients(self, of: Arguments, dy: Tensor, dsum: Tensor | None = None) -> Gradients:
        assert of.residual is not None
        lift, lower, quiet = reference.precise(of.x, of.residual)
        with quiet:
            xhat, rstd, weight, y = self._normalized(of, lift)
            dz = lift(dy)
            dx, dw, db = reference._gradients(self.spec, xhat, rstd, 1, weight, dz @ lift(of.residual))
            given = (dx, of.x), (dw, of.weight), (db, of.bias), (dz.T @ y, of.residual)
            return Gradients(*(None if t is None else lower(d) for d, t in given))

    def composite(self, of: Arguments, running: Given | None = None) -> Tensor:
        assert of.residual is not None
        y = super().composite(of)
        assert isinstance(y, Tensor)
        return F.linear(y, of.residual)

    def _normalized(self, of: Arguments, lift: Callable[[Tensor], Any]) -> tuple[Any, Any, Any, Any]:
        """(x̂, rstd, weight, y) in the oracle's precision, in which y goes on."""
        _, rstd, xhat = reference._normalized(self.spec, lift(of.x), 1, of.eps)
        weight, bias = (None if t is None else lift(t) for t in (of.weight, of.bias))
        y = xhat if weight is None else xhat * (weight + self.spec.offset)
        return xhat, rstd, weight, y if bias is None else y + bias
