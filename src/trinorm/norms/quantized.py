"""LayerNorm and RMSNorm whose result is stored in a small format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from .. import quantized_reference
from ..channel_reference import Given
from ..formats import FORMATS, FormatName
from .norm import Arguments, Normalized, Results, Shape, casting
from .rows import OfRows

# Of formats that ask for a number of the whole tensor: what suits a y of standard normal elements.
_WHOLE = 0.02


@dataclass(frozen=True)
class OfQuantized(OfRows):
    """The same, rows × columns, as it comes back from the format, in x's dtype."""

    format: FormatName

    @property
    def name(self) -> str:
        return f"quantized_{self.spec.name}"

    @property
    def smooth(self) -> bool:
        return False

    @property
    def wanted(self) -> str:
        of = "an even number of columns" if FORMATS[self.format].packed == 2 else "columns"
        return f"rows x {of}, at most {self._most}"

    def takes(self, shape: Shape) -> bool:
        return super().takes(shape) and shape[1] % FORMATS[self.format].packed == 0 and shape[1] <= self._most

    def function(
        self, functions: ModuleType, shape: Shape, eps: float, running: Given | None = None
    ) -> Callable[..., Results]:
        norm, over, how = getattr(functions, self.name), shape[1:], casting(self.spec)

        def back(x: Tensor, *parameters: Tensor | None) -> Tensor:
            found = norm(x, over, *parameters, eps=eps, format=self.format, scale=self._scale(x), **how)
            return found.dequantize(x.dtype)

        return back

    def module(self, namespace: ModuleType, x: Tensor, eps: float) -> torch.nn.Module | None:
        return None

    def composite(self, of: Arguments, running: Given | None = None) -> Tensor:
        """torch's norm, quantized. The derivatives are the norm's."""
        y, form, scale = super().composite(of), FORMATS[self.format], self._scale(of.x)
        assert isinstance(y, Tensor)
        data, taken = quantized_reference.quantize(form, y.detach(), scale)
        value = quantized_reference.dequantize(form, data, taken, scale if form.scaling == "e4m3" else None)
        return value.to(of.x.dtype) + (y - y.detach())

    def forward(self, of: Arguments, *, save: bool) -> Normalized:
        from ..ops import quantized, quantized_rows

        problem = quantized.Quantizing(self.spec, 1, of.eps, self.format, False, False, save)
        given = quantized.Given(of.x, None, None, of.weight, of.bias, self._scale(of.x))
        data, _, _, *statistics = quantized_rows.forward(problem, given)
        assert data is not None
        return Normalized(data, *statistics)

    @property
    def _most(self) -> int:
        """Of how many columns there is a kernel, in float64 too."""
        from ..ops.quantized import MOST_OF_ROW

        return MOST_OF_ROW // 16

    def _scale(self, x: Tensor) -> Tensor | None:
        return torch.full((1,), _WHOLE, device=x.device) if FORMATS[self.format].given else None
