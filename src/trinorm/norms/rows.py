"""LayerNorm and RMSNorm; and LayerNorm over channels, whose rows lie across memory."""

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
from ..reference.channel import ChannelGradients as Gradients
from ..reference.channel import Given
from ..spec import LAYER_NORM, RowNorm
from .norm import Arguments, Norm, Normalized, Results, Shape, all_gradients, casting

_MODULES = {
    "layer_norm": "LayerNorm",
    "rms_norm": "RMSNorm",
    "add_layer_norm": "AddLayerNorm",
    "add_rms_norm": "AddRMSNorm",
}


@dataclass(frozen=True)
class OfRows(Norm):
    """LayerNorm and RMSNorm of rows × columns."""

    spec: RowNorm

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def family(self) -> Literal["rows"]:
        return "rows"

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
        return self.spec.center

    @property
    def biased(self) -> bool:
        return self.spec.center

    def takes(self, shape: Shape) -> bool:
        return len(shape) == 2

    def choice(self, pass_: str) -> str:
        return pass_

    def rows(self, x: Tensor) -> Tensor:
        return x

    def of_rows(self, rows: Tensor, shape: Shape) -> Tensor:
        return rows

    def function(
        self, functions: ModuleType, shape: Shape, eps: float, running: Given | None = None
    ) -> Callable[..., Results]:
        norm, over, how = getattr(functions, self.name), shape[1:], self._how
        if self.biased:
            return lambda x, weight, bias: norm(x, over, weight, bias, eps, **how)
        return lambda x, weight: norm(x, over, weight, eps, **how)

    def module(self, namespace: ModuleType, x: Tensor, eps: float) -> torch.nn.Module | None:
        made = getattr(namespace, _MODULES[self.name], None)
        return None if made is None else made(x.shape[1], eps=eps, device=x.device)

    def oracle(self, of: Arguments) -> Exact:
        return reference.oracle(self.spec, of.x, of.x.shape[1:], *of.parameters)

    def oracle_gradients(self, of: Arguments, dy: Tensor, dsum: Tensor | None = None) -> Gradients:
        return Gradients(*reference.oracle_gradients(self.spec, of.x, of.x.shape[1:], *of.parameters, dy), None)

    def composite(self, of: Arguments, running: Given | None = None) -> Results:
        return reference.composite(self.spec, of.x, of.x.shape[1:], *of.parameters)

    def torch_statistics(self, x: Tensor, eps: float) -> tuple[Tensor | None, Tensor]:
        if self.centers:
            _, mean, rstd = torch.ops.aten.native_layer_norm(x, x.shape[1:], None, None, eps)
            return mean.flatten(), rstd.flatten()
        return None, torch.ops.aten._fused_rms_norm(x, x.shape[1:], None, eps)[1].flatten()

    def forward(self, of: Arguments, *, save: bool) -> Normalized:
        from ..ops.hosts import rows

        return Normalized(*rows.forward(self.spec, of.x, 1, *of.parameters, save=save))

    def backward(
        self, dy: Tensor, of: Arguments, mean: Tensor | None, rstd: Tensor, dsum: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        from ..ops.hosts import rows

        return rows.backward(self.spec, dy, of.x, 1, of.weight, mean, rstd, **all_gradients(of))

    @property
    def _how(self) -> dict[str, Any]:
        """What the function is told besides, where it is not the default."""
        return casting(self.spec)


@dataclass(frozen=True)
class OverChannels(Norm):
    """LayerNorm over the channels at each position."""

    @property
    def name(self) -> str:
        return "channel_layer_norm"

    def rows(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1).reshape(-1, x.shape[1])

    def of_rows(self, rows: Tensor, shape: Shape) -> Tensor:
        return rows.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)

    def function(
        self, functions: ModuleType, shape: Shape, eps: float, running: Given | None = None
    ) -> Callable[..., Tensor]:
        if functions is not F:
            norm = functions.channel_layer_norm
            return lambda x, weight, bias: norm(x, weight, bias, eps)
        over = shape[1:2]  # torch has none: as its users write it
        return lambda x, weight, bias: F.layer_norm(x.movedim(1, -1), over, weight, bias, eps).movedim(-1, 1)

    def module(self, namespace: ModuleType, x: Tensor, eps: float) -> torch.nn.Module | None:
        made = getattr(namespace, "ChannelLayerNorm", None)
        return None if made is None else made(x.shape[1], eps=eps, device=x.device)

    def oracle(self, of: Arguments) -> Exact:
        found = reference.oracle(LAYER_NORM, *self._last(of))
        return found._replace(y=found.y.movedim(-1, 1))

    def oracle_gradients(self, of: Arguments, dy: Tensor, dsum: Tensor | None = None) -> Gradients:
        dx, dw, db = reference.oracle_gradients(LAYER_NORM, *self._last(of), dy.movedim(1, -1))
        return Gradients(None if dx is None else dx.movedim(-1, 1), dw, db, None)

    def composite(self, of: Arguments, running: Given | None = None) -> Tensor:
        return reference.composite(LAYER_NORM, *self._last(of)).movedim(-1, 1)

    def torch_statistics(self, x: Tensor, eps: float) -> tuple[Tensor | None, Tensor]:
        return OfRows(LAYER_NORM).torch_statistics(self.rows(x), eps)

    def forward(self, of: Arguments, *, save: bool) -> Normalized:
        from ..ops.hosts import channel_layers, rows

        x = of.x.movedim(1, -1)
        if x.is_contiguous():
            y, *statistics = rows.forward(LAYER_NORM, x, 1, *of.parameters, save=save)
            return Normalized(y.movedim(-1, 1), *statistics)
        return Normalized(*channel_layers.forward(of.x, *of.parameters, save=save))

    def backward(
        self, dy: Tensor, of: Arguments, mean: Tensor | None, rstd: Tensor, dsum: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        from ..ops.hosts import channel_layers, rows

        assert mean is not None
        x = of.x.movedim(1, -1)
        if x.is_contiguous():
            dx, *sums = rows.backward(LAYER_NORM, dy.movedim(1, -1), x, 1, of.weight, mean, rstd, **all_gradients(of))
            return None if dx is None else dx.movedim(-1, 1), *sums
        return channel_layers.backward(dy, of.x, of.weight, mean, rstd, **all_gradients(of))

    def _last(self, of: Arguments) -> tuple[Tensor, torch.Size, Tensor | None, Tensor | None, float]:
        """As LayerNorm's: channels last."""
        return of.x.movedim(1, -1), of.x.shape[1:2], *of.parameters
