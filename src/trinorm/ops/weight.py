"""Weight normalization to torch: what is computed, and which kernels with what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..reference import weight as weight_reference
from .inputs_only import InputsOnly, register_norm
from .layout import readable, row_dims
from .library.names import WEIGHT_NORM
from .norm_call import launches_are_watched

if TYPE_CHECKING:
    from ..replay import Results


@dataclass(frozen=True)
class Weight(InputsOnly):
    """Of (v, g): g has an element for each of v's ``dim``, whose dims are kept; or, where that is None, one."""

    dim: int | None

    tensors: ClassVar[dict[str, str]] = dict(g="Tensor")
    options: ClassVar[dict[str, str]] = dict(dim="int?")

    @property
    def name(self) -> str:
        return WEIGHT_NORM

    def of(self, *options: Any) -> Weight:
        return Weight(*options)

    def misfit(self, *inputs: Tensor | None) -> str | None:
        v, g = inputs
        assert v is not None and g is not None
        if self.dim is not None and not 0 <= self.dim < v.dim():
            return f"the input has no dim {self.dim}"
        if self.dim is None and g.numel() != 1:
            return "g has not one element"
        if self.dim is not None and g.shape != weight_reference.g_shape(self.dim, v.shape):
            return f"g is not of the input's shape with all dims but {self.dim} of size 1"
        return None

    def lacking(self, *inputs: Tensor | None) -> str | None:
        return f"dim is {self.dim}, neither 0 nor None" if self.dim else None

    def read(self, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        *of_rows, g = tensors
        found = [None if t is None else readable(t, row_dims(self.dim, t)) for t in of_rows]
        return *found, None if g is None else readable(g, g.dim())

    def composite(self, *inputs: Any) -> Tensor:
        return weight_reference.composite(self.dim, *inputs).contiguous()

    def gradients(self, dy: Tensor, *inputs: Any) -> Results:
        return weight_reference.composite_gradients(self.dim, dy, *inputs)

    def launch_forward(self, *inputs: Any) -> Tensor:
        from .hosts import weight_rows

        return weight_rows.forward(self.dim, *inputs)

    def launch_backward(self, wanted: tuple[bool, ...], dy: Tensor, *inputs: Any) -> Results:
        from .hosts import weight_rows

        return weight_rows.backward(self.dim, wanted, dy, *inputs)

    def is_watched(self) -> bool:
        from .hosts import weight_rows

        return launches_are_watched(weight_rows)


register_norm(Weight(0))
