"""LayerNorm and RMSNorm of a sum: of x and a residual."""

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
from ..reference import added as added_reference
from ..reference.channel import ChannelGradients as Gradients
from ..reference.channel import Given
from .norm import Arguments, Normalized, Results, Shape, all_gradients
from .rows import OfRows


@dataclass(frozen=True)
class OfSums(OfRows):
    """The same of x + alpha times a residual, rows × columns.

    What is normalized is the sum as it is kept, rounded to its dtype: torch's own, to the last bit, where alpha is 1 or a
    larger power of two, so that its product is exact, of denormals too. wide: the residual is a stream of fp32 (or fp64),
    also beside an x of 16 bits. post: as in a post-norm model only y goes on, so that the sum has no gradient of its own.
    """

    alpha: float = 1.0
    wide: bool = False
    post: bool = False

    @property
    def name(self) -> str:
        return f"add_{self.spec.name}"

    @property
    def residual(self) -> bool:
        return True

    @property
    def of_sum(self) -> bool:
        return True

    @property
    def differentiated(self) -> tuple[str, ...]:
        return self.results[:1] if self.post else self.results

    def residual_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.promote_types(dtype, torch.float32) if self.wide else dtype

    def normalized(self, of: Arguments) -> Tensor:
        assert of.residual is not None
        return torch.add(of.x, of.residual, alpha=self.alpha)

    def function(
        self, functions: ModuleType, shape: Shape, eps: float, running: Given | None = None
    ) -> Callable[..., Results]:
        if functions is F:  # torch has none: as its users write it
            of_rows: Callable[..., Any] = OfRows(self.spec).function(F, shape, eps)
            alpha = self.alpha

            def added(x: Tensor, residual: Tensor, *parameters: Tensor | None) -> Results:
                total = torch.add(x, residual, alpha=alpha)
                return of_rows(total, *parameters), total

            return added
        norm, how = getattr(functions, self.name), self._how
        if self.biased:
            return lambda x, residual, weight, bias: norm(x, residual, weight, bias, eps, **how)
        return lambda x, residual, weight: norm(x, residual, weight, eps, **how)

    def oracle(self, of: Arguments) -> Exact:
        return super().oracle(self._of_sum(of))

    def oracle_sum(self, of: Arguments) -> Tensor:
        assert of.residual is not None
        lift, lower, quiet = reference.precise(of.x, of.residual)
        with quiet:
            return lower(lift(of.x) + self.alpha * lift(of.residual))

    def oracle_gradients(self, of: Arguments, dy: Tensor, dsum: Tensor | None = None) -> Gradients:
        ds, dw, db, _ = super().oracle_gradients(self._of_sum(of), dy)
        assert ds is not None
        ds = ds if dsum is None else ds + dsum.double()
        return Gradients(ds, dw, db, self.alpha * ds)

    def composite(self, of: Arguments, running: Given | None = None) -> tuple[Tensor, Tensor]:
        assert of.residual is not None
        how = of.x.shape[1:], *of.parameters, self.alpha, of.x.dtype
        return added_reference.composite(self.spec, of.x, of.residual, *how)

    def forward(self, of: Arguments, *, save: bool) -> Normalized:
        from ..ops.hosts import rows

        assert of.residual is not None
        total = torch.empty_like(of.x, dtype=torch.promote_types(of.x.dtype, of.residual.dtype))
        added = rows.Added(of.residual, total, of.x.dtype, self.alpha)
        return Normalized(*rows.forward(self.spec, of.x, 1, *of.parameters, save=save, added=added))

    def backward(
        self, dy: Tensor, of: Arguments, mean: Tensor | None, rstd: Tensor, dsum: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        from ..ops.hosts import rows

        added = rows.AddedBackward(dsum, None, of.x.dtype, self.alpha)
        how = all_gradients(of) | dict(added=added)
        return rows.backward(self.spec, dy, self.normalized(of), 1, of.weight, mean, rstd, **how)

    @property
    def _how(self) -> dict[str, Any]:
        return super()._how | ({} if self.alpha == 1 else dict(alpha=self.alpha))

    def _of_sum(self, of: Arguments) -> Arguments:
        """The norm's arguments once the sum is there."""
        return of._replace(x=self.normalized(of), residual=None)
