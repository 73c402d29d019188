"""Modulated norms of a gated sum: of a residual and x times a gate."""

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
from ..reference import gated_sum as gated_sum_reference
from ..reference.channel import Given
from ..reference.gated_sum import GatedSumGradients
from .conditioned import OfConditioned
from .norm import Arguments, Normalized, Results, Shape


@dataclass(frozen=True)
class OfGatedSums(OfConditioned):
    """The same of residual + gate·x, where gate, scale and shift have one row for ``each`` sample or token, or for all.

    What is normalized is the sum as it is kept, rounded once. wide: the residual is a stream of fp32 (or fp64), also beside
    an x of 16 bits.
    """

    wide: bool = False

    @property
    def name(self) -> str:
        return f"add_{super().name}"

    @property
    def residual(self) -> bool:
        return True

    @property
    def of_sum(self) -> bool:
        return True

    @property
    def of_gated_sum(self) -> bool:
        return True

    @property
    def most_of_row(self) -> int:
        from ..ops.gated_sum import MOST_OF_ROW

        return MOST_OF_ROW

    def choice(self, pass_: str) -> str:
        return f"gated_sum_{pass_}"

    def residual_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.promote_types(dtype, torch.float32) if self.wide else dtype

    def parts(self, of: Arguments, what: str, t: Tensor) -> dict[str, Tensor]:
        return {"dgate": t} if what == "dg" else super().parts(of, what, t)

    def normalized(self, of: Arguments) -> Tensor:
        assert of.residual is not None and of.gate is not None
        kept = torch.promote_types(of.x.dtype, of.residual.dtype)
        exact = gated_sum_reference.oracle_sum(of.x, of.residual, of.gate)
        return exact.to(torch.promote_types(kept, torch.float32)).to(kept)

    def function(
        self, functions: ModuleType, shape: Shape, eps: float, running: Given | None = None
    ) -> Callable[..., Results]:
        over = shape[-1:]
        if functions is not F:
            norm = getattr(functions, self.name)
            return lambda x, residual, gate, scale, shift: norm(x, residual, gate, over, scale, shift, eps=eps)
        modulated: Callable[..., Any] = OfConditioned(self.spec, self.each).function(F, shape, eps)

        def as_users_write(x: Tensor, residual: Tensor, gate: Tensor, *condition: Tensor) -> Results:
            total = residual + gate * x
            return modulated(total, *condition), total

        return as_users_write

    def module(self, namespace: ModuleType, x: Tensor, eps: float) -> torch.nn.Module | None:
        made = getattr(namespace, "AddModulated" + ("LayerNorm" if self.centers else "RMSNorm"), None)
        return None if made is None else made(x.shape[-1], eps=eps, device=x.device)

    def oracle(self, of: Arguments) -> Exact:
        return super().oracle(self._of_sum(of))

    def oracle_sum(self, of: Arguments) -> Tensor:
        assert of.residual is not None and of.gate is not None
        return gated_sum_reference.oracle_sum(of.x, of.residual, of.gate)

    def oracle_gradients(  # type: ignore[override]
        self, of: Arguments, dy: Tensor, dsum: Tensor | None = None
    ) -> GatedSumGradients:
        assert of.gate is not None
        given = of.x, of.gate, of.weight, of.bias, self.normalized(of), of.eps, dy, dsum
        dx, dr, dg, dw, db = gated_sum_reference.oracle_gradients(self.spec, 1, self._size(of.x.shape), *given)
        return GatedSumGradients(dx, dw, db, dr, dg)

    def torch_gradients(self, of: Arguments, dy: Tensor, dsum: Tensor | None = None) -> GatedSumGradients:
        gradients = (dy,) if dsum is None else (dy, dsum)

        def composite(x: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
            weight, bias, residual, gate = others
            given = of._replace(x=x, weight=weight, bias=bias, residual=residual, gate=gate)
            return self.composite(given)[: len(gradients)]

        inputs = of.x, of.weight, of.bias, of.residual, of.gate
        return GatedSumGradients(*reference.gradients_by_autograd(composite, inputs, gradients))

    def composite(self, of: Arguments, running: Given | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        assert of.residual is not None and of.gate is not None
        given = of.x, of.residual, of.gate, of.weight, of.bias, of.eps, of.x.dtype
        return gated_sum_reference.composite(self.spec, 1, self._size(of.x.shape), *given)

    def forward(self, of: Arguments, *, save: bool) -> Normalized:
        from ..ops.hosts import gated_sum_rows

        problem, *inputs = self.of_launch(of)
        y, _, mean, rstd = gated_sum_rows.forward(problem, *inputs, save=save)
        assert y is not None
        return Normalized(y, mean, rstd)

    def backward(
        self, dy: Tensor, of: Arguments, mean: Tensor | None, rstd: Tensor, dsum: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        from ..ops.hosts import gated_sum_rows

        problem, x, _, *parameters = self.of_launch(of)
        saved = x, *parameters, self.normalized(of), mean, rstd, dsum
        dx, dr, dg, dw, db = gated_sum_rows.backward(problem, (True,) * 5, dy, *saved)
        return dx, dw, db, dr, dg

    def of_launch(self, of: Arguments) -> tuple[Any, ...]:
        """The problem, and its tensors, as ops/hosts/gated_sum_rows has them."""
        from ..ops.problems.gated_sum import problem_of

        assert of.residual is not None
        norm, _ = self._as_launched(of._replace(residual=None))
        return problem_of(norm, of.x, of.residual), of.x, of.residual, of.gate, of.weight, of.bias

    def _of_sum(self, of: Arguments) -> Arguments:
        """The norm's arguments once the sum is there."""
        return of._replace(x=self.normalized(of), residual=None, gate=None)
