"""PolyNorm to torch: what is computed, and which kernels with what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..ops import road
from ..reference import poly as poly_reference
from .inputs_only import InputsOnly, register_norm
from .layout import readable
from .library.names import POLY_NORM
from .norm_call import launches_are_watched

if TYPE_CHECKING:
    from ..replay import Results

# Of how many elements a row has kernels, at the most; and of float64.
MOST_OF_ROW, MOST_OF_FP64 = 8192, 2048


@dataclass(frozen=True)
class Poly(InputsOnly):
    """Of (x, weight, bias): rows are x's last dim, weight has three elements, bias one."""

    eps: float

    tensors: ClassVar[dict[str, str]] = dict(weight="Tensor", bias="Tensor?")
    options: ClassVar[dict[str, str]] = dict(eps="float")

    @property
    def name(self) -> str:
        return POLY_NORM

    def of(self, *options: Any) -> Poly:
        return Poly(*options)

    def misfit(self, *inputs: Tensor | None) -> str | None:
        x, weight, bias = inputs
        assert x is not None and weight is not None
        if x.dim() < 1:
            return "the input has no dims"
        if weight.shape != (3,) or (bias is not None and bias.numel() != 1):
            return "weight has not three elements, or bias not one"
        return None

    def lacking(self, *inputs: Tensor | None) -> str | None:
        x = inputs[0]
        assert x is not None
        most = MOST_OF_FP64 if road.accumulator_dtype(*inputs) == torch.float64 else MOST_OF_ROW
        return f"a row has over {most} elements" if x.shape[-1] > most else None

    def read(self, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if t is None else readable(t, min(t.dim(), 1)) for t in tensors)

    def composite(self, *inputs: Any) -> Tensor:
        return poly_reference.composite(self.eps, *inputs).contiguous()

    def gradients(self, dy: Tensor, *inputs: Any) -> Results:
        return poly_reference.composite_gradients(self.eps, dy, *inputs)

    def launch_forward(self, *inputs: Any) -> Tensor:
        from .hosts import poly_rows

        return poly_rows.forward(self.eps, *inputs)

    def launch_backward(self, wanted: tuple[bool, ...], dy: Tensor, *inputs: Any) -> Results:
        from .hosts import poly_rows

        return poly_rows.backward(self.eps, wanted, dy, *inputs)

    def is_watched(self) -> bool:
        from .hosts import poly_rows

        return launches_are_watched(poly_rows)


register_norm(Poly(0.0))
