"""RMSNorm's relatives: the L2 norm, ScaleNorm and partial RMSNorm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional.relatives import count_of
from ..reference.channel import Given
from ..spec import ConditionedNorm
from .conditioned import OfConditioned
from .norm import Arguments, Shape, casting


@dataclass(frozen=True)
class OfRelative(OfConditioned):
    """A norm of (batch ×) rows × columns, or of heads, by another statistic than RMSNorm's, with a weight or without.

    part: what part of a row its statistic is of; None is all. scalar: whether there is one weight for all columns.
    """

    part: float | None = None
    scalar: bool = False

    @property
    def name(self) -> str:
        return "scale_norm" if self.scalar else "l2_norm" if self.part is None else "partial_rms_norm"

    @property
    def of_heads(self) -> bool:
        return False

    @property
    def packed_along(self) -> int | None:
        return -2 if self.part is None else None

    @property
    def weighted(self) -> bool:
        return self.scalar

    @property
    def bare(self) -> bool:
        return self.name == "l2_norm"

    def parameter_shape(self, shape: Shape) -> Shape:
        return (1,) if self.scalar else shape[-1:]

    def counted(self, rows: Tensor) -> Tensor:
        count, _ = self._spec(rows.shape[-1]).statistic(rows.shape[-1])
        return rows[:, :count]

    def function(
        self, functions: ModuleType, shape: Shape, eps: float, running: Given | None = None
    ) -> Callable[..., Tensor]:
        if functions is F:
            return self._as_users_write(self._size(shape), eps)
        norm, over, how = getattr(functions, self.name), shape[-1:], casting(self.spec.norm)
        if self.scalar:
            return lambda x, weight: norm(x, weight, eps)
        if self.part is not None:
            how |= dict(p=self.part)
        return lambda x, weight=None: norm(x, over, weight, eps, **how)

    def _as_users_write(self, size: int, eps: float) -> Callable[..., Tensor]:
        """In fp32 between, as transformers has the L2 norm of queries and keys."""
        count, divisor = self._spec(size).statistic(size)

        def norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            n = wide * torch.rsqrt(wide[..., :count].square().sum(-1, keepdim=True) / divisor + eps)
            return (n if weight is None else n * weight).to(x.dtype)

        return norm

    def module(self, namespace: ModuleType, x: Tensor, eps: float) -> torch.nn.Module | None:
        made = getattr(namespace, "ScaleNorm" if self.scalar else "L2Norm" if self.part is None else "PartialRMSNorm", None)
        if made is None:
            return None
        if self.scalar:
            return made(1.0, eps=eps, device=x.device)
        how: dict[str, Any] = {} if self.part is None else dict(p=self.part)
        return made(x.shape[-1:], eps=eps, elementwise_affine=not self.bare, device=x.device, **how)

    def torch_statistics(self, x: Tensor, eps: float) -> tuple[Tensor | None, Tensor]:
        rows = self.rows(x)
        head = self.counted(rows).to(torch.promote_types(rows.dtype, torch.float32))
        _, divisor = self._spec(rows.shape[-1]).statistic(rows.shape[-1])
        return None, torch.rsqrt(head.square().sum(-1) / divisor + eps)

    def backward(
        self, dy: Tensor, of: Arguments, mean: Tensor | None, rstd: Tensor, dsum: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        dx, dw, *others = super().backward(dy, of, mean, rstd, dsum)
        return dx, dw.sum(0, keepdim=True) if self.scalar and dw is not None else dw, *others

    def _spec(self, size: int) -> ConditionedNorm:
        if self.part is None:
            return self.spec
        count = count_of(self.part, size)
        return self.spec._replace(counted=count, divisor=count)

    def _as_launched(self, of: Arguments) -> tuple[Any, Any]:
        problem, inputs = super()._as_launched(of)
        weight = inputs.weight
        return problem, inputs._replace(weight=weight.expand(problem.size).contiguous()) if self.scalar else inputs
