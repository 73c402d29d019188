"""QK-norm: RMSNorm of the heads of queries and of keys, and the rotary embedding behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..reference import Exact
from ..reference import qk as qk_reference
from ..reference.channel import ChannelGradients as Gradients
from ..reference.channel import Given
from ..spec import RMS_NORM, RowNorm
from .norm import Arguments, Norm, Normalized, Results, Shape, as_tuple, casting
from .rows import OfRows

# What a result of both is called, of each.
_PARTS = {
    "y": ("query", "key"),
    "rstd": ("rstd_q", "rstd_k"),
    "dx": ("dquery", "dkey"),
    "dw": ("dw_q", "dw_k"),
}


@dataclass(frozen=True)
class OfHeads(Norm):
    """QK-norm of tokens (or batch × tokens) × query heads × key heads × elements of a head: a shape is written so.

    x has the heads of the queries and behind them those of the keys, as a packed projection has, and so has y; weight has
    that of the queries and that of the keys. turned: how much of a head the rotary embedding turns.
    """

    spec: RowNorm = RMS_NORM
    interleaved: bool = False
    turned: Literal["all", "half", "none"] = "all"

    @property
    def name(self) -> str:
        return "qk_norm"

    @property
    def family(self) -> Literal["heads"]:
        return "heads"

    @property
    def axes(self) -> str:
        return "tokens × q × k × D"

    @property
    def wanted(self) -> str:
        from ..ops.qk import MOST_OF_HEAD

        return f"(batch x) tokens x query heads x key heads x elements of a head, of which there are at most {MOST_OF_HEAD}"

    @property
    def centers(self) -> bool:
        return False

    @property
    def biased(self) -> bool:
        return False

    @property
    def smallest(self) -> Shape:
        return 2, 2, 1, 6

    def takes(self, shape: Shape) -> bool:
        from ..ops.qk import MOST_OF_HEAD

        return len(shape) in (4, 5) and shape[-1] <= MOST_OF_HEAD

    def x_shape(self, shape: Shape) -> Shape:
        return *shape[:-3], shape[-3] + shape[-2], shape[-1]

    def parameter_shape(self, shape: Shape) -> Shape:
        return 2, shape[-1]

    def queries(self, shape: Shape) -> int:
        return shape[-3]

    def angles(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Of each place, which samples share; both of a pair have their own, so that none passes for another."""
        length = {"all": shape[-1] // 2 * 2, "half": shape[-1] // 4 * 2, "none": 0}[self.turned]
        if not length:
            return None
        how: dict[str, Any] = dict(dtype=torch.float64, device=device)
        angles = torch.outer(torch.arange(1, shape[-4] + 1, **how), torch.linspace(0.1, 1.9, length, **how))
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def parts(self, of: Arguments, what: str, t: Tensor) -> dict[str, Tensor]:
        if what not in _PARTS:
            return {what: t}
        # Of each head rstd is one number.
        both = t.unbind() if what == "dw" else t.reshape(*of.x.shape[:-1], -1).split(_heads(of), -2)
        return dict(zip(_PARTS[what], both, strict=True))

    def rows(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1])

    def of_rows(self, rows: Tensor, shape: Shape) -> Tensor:
        return rows.reshape(shape)

    def function(
        self, functions: ModuleType, shape: Shape, eps: float, running: Given | None = None
    ) -> Callable[..., Results]:
        """Of query, key, weight of each, and cos and sin where there is a rotary embedding."""
        if functions is F:  # torch has none: as its users write it
            interleaved = self.interleaved

            def both(query: Tensor, key: Tensor, *others: Any) -> Results:
                query_weight, key_weight, cos, sin = (*others, None, None)[:4]
                found = (F.rms_norm(x, x.shape[-1:], w, eps) for x, w in ((query, query_weight), (key, key_weight)))
                return tuple(n if cos is None else qk_reference.rotated(n, cos, sin, interleaved) for n in found)

            return both
        norm, how = functions.qk_norm, self._how
        if self.turned == "none":
            return lambda query, key, *weights: norm(query, key, *weights, eps, **how)
        return lambda query, key, *others: norm(query, key, *others[:2], eps, cos=others[2], sin=others[3], **how)

    def call(self, functions: ModuleType, of: Arguments, running: Given | None = None) -> tuple[Tensor, ...]:
        """Both results as one."""
        given = (*of.x.split(_heads(of), -2), *_weights(of), *(of.angles or ()))
        return (torch.cat(as_tuple(self.function(functions, of.x.shape, of.eps)(*given)), -2),)

    def module(self, namespace: ModuleType, x: Tensor, eps: float) -> torch.nn.Module | None:
        made = getattr(namespace, "QKNorm", None)
        return None if made is None else made(x.shape[-1], eps=eps, device=x.device)

    def oracle(self, of: Arguments) -> Exact:
        found = reference.oracle(self.spec, of.x, of.x.shape[-1:], None, None, of.eps)
        return found._replace(y=torch.cat([qk_reference.oracle(*problem) for problem in self._problems(of)], -2))

    def oracle_gradients(self, of: Arguments, dy: Tensor, dsum: Tensor | None = None) -> Gradients:
        dys = dy.split(_heads(of), -2)
        problems = [(*of_side, of_dy) for of_side, of_dy in zip(self._problems(of), dys, strict=True)]
        found = [qk_reference.oracle_gradients(*problem) for problem in problems]
        dws = [dw for _, dw in found if dw is not None]
        return Gradients(torch.cat([dx for dx, _ in found], -2), torch.stack(dws) if dws else None, None, None)

    def composite(self, of: Arguments, running: Given | None = None) -> Tensor:
        return torch.cat([qk_reference.composite(*problem) for problem in self._problems(of)], -2)

    def torch_statistics(self, x: Tensor, eps: float) -> tuple[Tensor | None, Tensor]:
        return OfRows(RMS_NORM).torch_statistics(self.rows(x), eps)

    def forward(self, of: Arguments, *, save: bool) -> Normalized:
        from ..ops.hosts import heads

        query, key, turn = self._as_launched(of)
        *ys, query_rstd, key_rstd = heads.forward(self.spec, query, key, of.eps, turn, save=save)
        return Normalized(torch.cat(ys, -2), None, torch.cat((query_rstd, key_rstd), -1) if save else None)

    def backward(
        self, dy: Tensor, of: Arguments, mean: Tensor | None, rstd: Tensor, dsum: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        from ..ops.hosts import heads

        query, key, turn = self._as_launched(of)
        rstds = (t.contiguous() for t in rstd.reshape(of.x.shape[:-1]).split(_heads(of), -1))
        of_query, of_key = (
            heads.Wanted(*pair, dx=True, dw=of.weight is not None)
            for pair in zip(dy.split(_heads(of), -2), rstds, strict=True)
        )
        found = [t for t in heads.backward(self.spec, query, key, of_query, of_key, turn) if t is not None]
        return torch.cat(found[:2], -2), torch.stack(found[2:]) if found[2:] else None, None

    @property
    def _how(self) -> dict[str, Any]:
        """What the function is told besides, where it is not the default."""
        return casting(self.spec) | (dict(interleaved=True) if self.interleaved else {})

    def _problems(self, of: Arguments) -> list[Any]:
        """What qk_reference takes, of the queries and of the keys."""
        sides = zip(of.x.split(_heads(of), -2), _weights(of), strict=True)
        return [(self.spec, x, weight, of.eps, *(of.angles or (None, None)), self.interleaved) for x, weight in sides]

    def _as_launched(self, of: Arguments) -> tuple[Any, Any, Any]:
        """Queries, keys and their rotation as ops/hosts/heads has them."""
        from ..ops.hosts import heads

        query, key = (heads.Side(x, w) for x, w in zip(of.x.split(_heads(of), -2), _weights(of), strict=True))
        cos, sin = of.angles or (None, None)
        return query, key, heads.Rotation(cos, sin, self.interleaved)


def _heads(of: Arguments) -> tuple[int, int]:
    """How many are queries', and how many keys'."""
    return of.queries, of.x.shape[-2] - of.queries


def _weights(of: Arguments) -> tuple[Tensor | None, ...]:
    return (None, None) if of.weight is None else of.weight.unbind()
