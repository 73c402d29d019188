"""Conditioned norms: modulated by a scale and a shift, gated, and of heads with a weight each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import Exact
from ..reference import conditioned as conditioned_reference
from ..reference.channel import ChannelGradients as Gradients
from ..reference.channel import Given
from ..spec import ConditionedNorm
from .norm import Arguments, Norm, Normalized, Results, Shape, casting
from .rows import OfRows

# What conditioned_reference takes.
_Problem = tuple[ConditionedNorm, int, int, Tensor, Tensor | None, Tensor | None, Tensor | None, float]


@dataclass(frozen=True)
class OfConditioned(Norm):
    """Norms of batch × tokens × columns, the gated ones of rows × columns too; of heads, (batch ×) tokens × heads ×
    elements.

    A gate stands where others have a residual; a scale and a shift stand where weight and bias do, with one row for
    ``each`` sample or token, or for all. groups: in how many the columns of a row are normalized.
    """

    spec: ConditionedNorm
    each: Literal["sample", "token", "all"] = "all"
    groups: int = 1

    @property
    def name(self) -> str:
        if self.spec.modulated:
            return f"modulated_{self.spec.norm.name}"
        return f"per_head_{self.spec.norm.name}" if self.of_heads else f"gated_{self.spec.norm.name}"

    @property
    def family(self) -> Literal["conditioned"]:
        return "conditioned"

    @property
    def of_heads(self) -> bool:
        """Whether each head has a weight of its own."""
        return not self.gated and not self.spec.modulated

    @property
    def packed_along(self) -> int | None:
        """Along which dim x, where it is measured, is half of a projection; None where it is a tensor of its own."""
        return None if self.spec.modulated else -2 if self.of_heads else -1

    @property
    def axes(self) -> str:
        if self.of_heads:
            return "tokens × heads × D"
        return "batch × tokens × columns" if self.spec.modulated else "rows × columns"

    @property
    def most_of_row(self) -> int:
        """Of how many elements that share statistics there are kernels."""
        from ..ops.conditioned import MOST_OF_ROW

        return MOST_OF_ROW

    @property
    def wanted(self) -> str:
        of = "batch x tokens x columns" if self.spec.modulated else "(batch x) rows x columns"
        of = "(batch x) tokens x heads x elements of a head" if self.of_heads else of
        in_groups = f" in {self.groups} groups" if self.groups > 1 else ""
        return f"{of}{in_groups}, of which {'each has' if in_groups else 'there are'} at most {self.most_of_row}"

    @property
    def centers(self) -> bool:
        return self.spec.norm.center

    @property
    def biased(self) -> bool:
        return self.spec.modulated or (self.centers and not self.of_heads)

    @property
    def weighted(self) -> bool:
        return not self.gated

    @property
    def residual(self) -> bool:
        return self.gated

    @property
    def gated(self) -> bool:
        return self.spec.gate is not None

    @property
    def smallest(self) -> Shape:
        return 2, 3, 4 * self.groups

    def takes(self, shape: Shape) -> bool:
        dims = (3,) if self.spec.modulated else (3, 4) if self.of_heads else (2, 3) if self.gated else (2, 3, 4)
        return len(shape) in dims and shape[-1] % self.groups == 0 and shape[-1] // self.groups <= self.most_of_row

    def parameter_shape(self, shape: Shape) -> Shape:
        if self.of_heads:
            return shape[-2:]
        return {"sample": (*shape[:-2], 1, shape[-1]), "token": shape, "all": shape[-1:]}[self.each]

    def parts(self, of: Arguments, what: str, t: Tensor) -> dict[str, Tensor]:
        """A gate's gradient, and those of a scale and a shift, by their own names."""
        names = dict(dw="dscale", db="dshift") if self.spec.modulated else dict(dr="dgate")
        return {names.get(what, what): t}

    def normalized(self, of: Arguments) -> Tensor:
        if not self.spec.gate_first:
            return of.x
        assert of.residual is not None
        x, gate = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (of.x, of.residual))
        return x * conditioned_reference.activated(gate, self.spec.gate)

    def rows(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self._size(x.shape))

    def of_rows(self, rows: Tensor, shape: Shape) -> Tensor:
        return rows.reshape(shape)

    def function(
        self, functions: ModuleType, shape: Shape, eps: float, running: Given | None = None
    ) -> Callable[..., Results]:
        if functions is F:
            return self._as_users_write(self._size(shape), eps)
        norm, how, over = getattr(functions, self.name), casting(self.spec.norm), shape[-1:]
        if self.spec.modulated:
            return lambda x, scale, shift: norm(x, over, scale, shift, eps=eps)
        if self.of_heads:
            return lambda x, weight: norm(x, weight, eps=eps, **how)
        how |= dict(group_size=self._size(shape)) if self.groups > 1 else {}
        how |= dict(activation=self.spec.gate, norm_before_gate=not self.spec.gate_first)
        if self.biased:
            return lambda x, gate, weight, bias: norm(x, gate, weight, bias, eps, **how)
        return lambda x, gate, weight: norm(x, gate, weight, None, eps, **how)

    def _as_users_write(self, size: int, eps: float) -> Callable[..., Tensor]:
        """torch has none: DiT's modulate, and transformers' gated norms, in fp32 between."""
        norm, spec = getattr(F, self.spec.norm.name), self.spec

        def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            return norm(x, (size,), eps=eps) * (1 + scale) + shift

        def of_heads(x: Tensor, weight: Tensor) -> Tensor:
            return norm(x, (size,), eps=eps) * weight

        def gated(x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            wide = torch.promote_types(x.dtype, torch.float32)
            a = conditioned_reference.activated(gate.to(wide), spec.gate)
            s = x.to(wide) * a if spec.gate_first else x.to(wide)
            n = weight * norm(s.unflatten(-1, (-1, size)), (size,), eps=eps).flatten(-2).to(x.dtype)
            n = n if bias is None else n + bias
            return n if spec.gate_first else (n * a).to(x.dtype)

        return modulated if spec.modulated else of_heads if self.of_heads else gated

    def module(self, namespace: ModuleType, x: Tensor, eps: float) -> torch.nn.Module | None:
        kind = "Modulated" if self.spec.modulated else "PerHead" if self.of_heads else "Gated"
        made = getattr(namespace, kind + ("LayerNorm" if self.centers else "RMSNorm"), None)
        if made is None:
            return None
        if not self.gated:
            return made(*(x.shape[-2:] if self.of_heads else x.shape[-1:]), eps=eps, device=x.device)
        module = made(x.shape[-1], eps=eps, group_size=self._size(x.shape), device=x.device)
        module.activation, module.norm_before_gate = self.spec.gate, not self.spec.gate_first
        return module

    def oracle(self, of: Arguments) -> Exact:
        return conditioned_reference.oracle(*self._problem(of))

    def oracle_gradients(self, of: Arguments, dy: Tensor, dsum: Tensor | None = None) -> Gradients:
        dx, dgate, dw, db = conditioned_reference.oracle_gradients(*self._problem(of), dy)
        return Gradients(dx, dw, db, dgate)

    def composite(self, of: Arguments, running: Given | None = None) -> Tensor:
        return conditioned_reference.composite(*self._problem(of), of.x.dtype)

    def torch_statistics(self, x: Tensor, eps: float) -> tuple[Tensor | None, Tensor]:
        return OfRows(self.spec.norm).torch_statistics(self.rows(x), eps)

    def forward(self, of: Arguments, *, save: bool) -> Normalized:
        from ..ops.hosts import conditioned_rows

        y, *statistics = conditioned_rows.forward(*self._as_launched(of), save=save)
        assert y is not None
        return Normalized(y, *statistics)

    def backward(
        self, dy: Tensor, of: Arguments, mean: Tensor | None, rstd: Tensor, dsum: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        from ..ops.hosts import conditioned_rows

        dx, dgate, dw, db = conditioned_rows.backward(*self._as_launched(of), dy, mean, rstd, (True,) * 4)
        return dx, dw, db, dgate

    def sets(self, shape: Shape) -> tuple[int, int, int]:
        """(how many rows share a weight, how many such sets there are, elements of a row), as the backward sums them."""
        from ..ops.problems.conditioned import Conditioned, shared_sets

        x, weight = (torch.empty(sizes, device="meta") for sizes in (shape, self.parameter_shape(shape)))
        problem = Conditioned(self.spec, 1, self._size(shape), 0.0, x.dtype)
        found = shared_sets(problem, x, weight)
        assert found is not None
        return found.outer * found.repeat, found.middle, problem.size

    def _size(self, shape: Shape) -> int:
        """How many elements share statistics."""
        return shape[-1] // self.groups

    def _problem(self, of: Arguments) -> _Problem:
        size = self._size(of.x.shape)
        return self._spec(size), 1, size, of.x, of.residual, *of.parameters

    def _spec(self, size: int) -> ConditionedNorm:
        """That of rows of so many elements."""
        return self.spec

    def _as_launched(self, of: Arguments) -> tuple[Any, Any]:
        """The problem, and its tensors, as ops/hosts/conditioned_rows has them."""
        from ..ops.hosts import conditioned_rows
        from ..ops.problems.conditioned import Conditioned

        size = self._size(of.x.shape)
        problem = Conditioned(self._spec(size), 1, size, of.eps, of.x.dtype)
        return problem, conditioned_rows.Inputs(of.x, of.residual, of.weight, of.bias)
