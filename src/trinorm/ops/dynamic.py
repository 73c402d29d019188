"""Norms without statistics, to torch: what is computed, and which kernels with what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..reference import dynamic as dynamic_reference
from ..spec import DYNAMIC_NORMS, DynamicNorm
from .inputs_only import InputsOnly, register_norm
from .layout import readable
from .norm_call import launches_are_watched

if TYPE_CHECKING:
    from ..replay import Results


@dataclass(frozen=True)
class Dynamic(InputsOnly):
    """Of (x, alpha, shift, weight, bias): a parameter of x's last ``dims`` dims, alpha and shift of one element."""

    spec: DynamicNorm
    dims: int = 1

    tensors: ClassVar[dict[str, str]] = dict(alpha="Tensor", shift="Tensor?", weight="Tensor?", bias="Tensor?")
    options: ClassVar[dict[str, str]] = dict(dims="int")

    @property
    def name(self) -> str:
        return self.spec.name

    def of(self, *options: Any) -> Dynamic:
        return Dynamic(self.spec, *options)

    def misfit(self, *inputs: Tensor | None) -> str | None:
        x, alpha, shift, *parameters = inputs
        assert x is not None and alpha is not None
        if not 1 <= self.dims <= x.dim():
            return f"the input has no {self.dims} last dims"
        if alpha.numel() != 1 or (shift is not None and shift.numel() != 1):
            return "alpha or shift has not one element"
        if (shift is not None) != self.spec.shifted:
            return "there is a shift, or none, where it ought to be otherwise"
        if any(t is not None and t.shape != x.shape[-self.dims :] for t in parameters):
            return "weight or bias is not of the shape of the input's last dims"
        return None

    def lacking(self, *inputs: Tensor | None) -> str | None:
        return None

    def read(self, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if t is None else readable(t, min(t.dim(), self.dims)) for t in tensors)

    def composite(self, *inputs: Any) -> Tensor:
        return dynamic_reference.composite(self.spec, *inputs).contiguous()

    def gradients(self, dy: Tensor, *inputs: Any) -> Results:
        return dynamic_reference.composite_gradients(self.spec, dy, *inputs)

    def launch_forward(self, *inputs: Any) -> Tensor:
        from .hosts import dynamic_rows

        return dynamic_rows.forward(self.spec, self.dims, dynamic_rows.Inputs(*inputs))

    def launch_backward(self, wanted: tuple[bool, ...], dy: Tensor, *inputs: Any) -> Results:
        from .hosts import dynamic_rows

        return dynamic_rows.backward(self.spec, self.dims, dynamic_rows.Inputs(*inputs), dy, wanted)

    def is_watched(self) -> bool:
        from .hosts import dynamic_rows

        return launches_are_watched(dynamic_rows)


for _spec in DYNAMIC_NORMS:
    register_norm(Dynamic(_spec))
