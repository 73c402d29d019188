"""LayerNorm and RMSNorm whose result is stored in a small format."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import FORMATS, Format, FormatName, ScaleLayout
from ..functional.quantized import Quantized, _result
from ..reference import quantized as quantized_reference
from ..reference.channel import Given
from .norm import Arguments, Normalized, Results, Shape, casting
from .rows import OfRows

# Of formats that ask for a number of the whole tensor: what suits a y of standard normal elements.
_WHOLE = 0.02


@dataclass(frozen=True)
class OfQuantized(OfRows):
    """The same, rows × columns; what is compared is what the format's elements stand for, in x's dtype."""

    format: FormatName
    scale_layout: ScaleLayout = "row_major"

    @property
    def name(self) -> str:
        return f"quantized_{self.spec.name}"

    @property
    def title(self) -> str:
        """What is stored, in words."""
        return self.format + ("" if self.scale_layout == "row_major" else f", {self.scale_layout}")

    @property
    def form(self) -> Format:
        return FORMATS[self.format]

    @property
    def smooth(self) -> bool:
        return False

    @property
    def wanted(self) -> str:
        of = "an even number of columns" if self.form.packed == 2 else "columns"
        return f"rows x {of}, at most {_most_of_row() // 2}"

    def takes(self, shape: Shape) -> bool:
        return super().takes(shape) and shape[1] % self.form.packed == 0 and shape[1] <= _most_of_row() // 2

    def serves(self, shape: Shape, dtype: torch.dtype) -> bool:
        return shape[1] * self.held_bytes(dtype) <= _most_of_row()

    def bytes_stored(self, shape: Shape) -> int:
        (m, n), form = shape, self.form
        scales = 0 if form.scaling == "tensor" else math.prod(form.scale_shape((m,), n, self.scale_layout))
        return m * (n // form.packed) + scales * form.scale_dtype.itemsize

    def choice(self, pass_: str) -> str:
        return "quantized"

    def held_bytes(self, dtype: torch.dtype) -> int:
        """Of an element of an x of this dtype, as a program holds it."""
        from ..ops.problems import quantized

        x = torch.empty((), dtype=dtype, device="meta")
        return quantized.held_bytes(quantized.Given(x, None, None, None, None, None))

    def tensor_scale(self, device: torch.device) -> Tensor | None:
        return _whole(device) if self.form.given else None

    def function(
        self, functions: ModuleType, shape: Shape, eps: float, running: Given | None = None
    ) -> Callable[..., Results]:
        if functions is F:
            return self._as_users_write(shape[1], eps)
        norm, over, how = getattr(functions, self.name), shape[1:], self._how | casting(self.spec)
        if self.form.given:
            return lambda x, *given: norm(x, over, *given[:-1], eps=eps, scale=given[-1], **how)
        return lambda x, *parameters: norm(x, over, *parameters, eps=eps, **how)

    @property
    def _how(self) -> dict[str, Any]:
        return dict(format=self.format, scale_layout=self.scale_layout)

    def _as_users_write(self, n: int, eps: float) -> Callable[..., Quantized]:
        """torch has none: its norm, the largest of each block, a scale of that, and a cast, in fp32 between. What takes
        bits apart is the plain reference's, and what has a block that is not whole.
        """
        norm, form, format, block = getattr(F, self.spec.name), self.form, self.format, self.form.block or n
        by_reference = form.scaling not in ("tensor", "fp32") or n % block != 0
        swizzles = self.scale_layout == "swizzled"

        def written(x: Tensor, *given: Tensor) -> Quantized:
            whole = given[-1] if form.given else None
            parameters = given[:-1] if form.given else given
            y = norm(x.float(), (n,), *(t.float() for t in parameters), eps=eps)
            if by_reference:
                data, scale = quantized_reference.quantize(form, y, whole)
                scale = quantized_reference.swizzled(scale) if swizzles else scale
                return Quantized(data, scale, format, whole, scale_layout=self.scale_layout)
            blocks = y.unflatten(-1, (-1, block))
            if whole is None:
                scale = (blocks.abs().amax(-1, keepdim=True) / form.largest).clamp(min=quantized_reference.LEAST_SCALE)
            else:
                scale = whole
            codes = (blocks / scale).clamp(-form.largest, form.largest)
            codes = codes.round() if form.element == "int8" else codes
            data = codes.to(form.data_dtype).flatten(-2)
            return Quantized(data, scale.squeeze(-1) if whole is None else whole, format)

        return written

    def call(self, functions: ModuleType, of: Arguments, running: Given | None = None) -> tuple[Tensor, ...]:
        whole = self.tensor_scale(of.x.device)
        given = (of.weight, *[of.bias] * self.biased, *([] if whole is None else [whole]))
        found = self.function(functions, of.x.shape, of.eps)(of.x, *given)
        assert isinstance(found, Quantized)
        return (found.dequantize(of.x.dtype),)

    def module(self, namespace: ModuleType, x: Tensor, eps: float) -> torch.nn.Module | None:
        return None

    def composite(self, of: Arguments, running: Given | None = None) -> Tensor:
        """torch's norm, quantized. The derivatives are the norm's."""
        y, scale = super().composite(of), self.tensor_scale(of.x.device)
        assert isinstance(y, Tensor)
        data, taken = quantized_reference.quantize(self.form, y.detach(), scale)
        value = quantized_reference.dequantize(self.form, data, taken, scale if self.form.scaling == "e4m3" else None)
        return value.to(of.x.dtype) + (y - y.detach())

    def forward(self, of: Arguments, *, save: bool) -> Normalized:
        from ..ops.hosts import quantized_rows
        from ..ops.problems import quantized

        problem = quantized.Quantizing(self.spec, 1, of.eps, self.format, self.scale_layout, False, save)
        given = quantized.Given(of.x, None, None, of.weight, of.bias, self.tensor_scale(of.x.device))
        data, scale, _, *statistics = quantized_rows.forward(problem, given)
        assert data is not None
        scale = None if scale is None else scale.view(self.form.scale_dtype)
        results = data.view(self.form.data_dtype), scale, None, None
        return Normalized(_result(given, self.format, self.scale_layout, 1, *results), *statistics)


@functools.cache
def _whole(device: torch.device) -> Tensor:
    """Made once, so that no call that is timed makes it."""
    return torch.full((1,), _WHOLE, device=device)


def _most_of_row() -> int:
    """In bytes, as a row is held."""
    from ..ops.quantized import MOST_OF_ROW

    return MOST_OF_ROW
