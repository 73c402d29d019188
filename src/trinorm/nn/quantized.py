"""Norms with a quantized result as modules (nn re-exports them)."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import functional
from ..formats import FORMATS, FormatName, ScaleLayout
from ..functional import Quantized
from ..shown import shown

if TYPE_CHECKING:
    from typing_extensions import Self


class _Quantized(torch.nn.Module):
    """What both have of a format: its name, and the buffer ``scale`` where it asks for one."""

    format: FormatName
    scale: Tensor | None
    cast: functional.Cast = "output"
    scale_layout: ScaleLayout = "row_major"
    batch_invariant: bool | None = None

    def _set_format(self, format: FormatName, device: torch.device | str | None) -> None:
        if not isinstance(format, str) or format not in FORMATS:
            of = ", ".join(map(repr, FORMATS))
            raise ValueError(f"{type(self).__name__}(): format is {format!r}; it must be one of {of}")
        self.format = format
        given = FORMATS[format].given
        self.register_buffer("scale", torch.ones(1, device=device, dtype=torch.float32) if given else None)

    def reset_parameters(self) -> None:
        super().reset_parameters()  # type: ignore[misc]
        if getattr(self, "scale", None) is not None:
            torch.nn.init.ones_(self.scale)  # type: ignore[arg-type]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Self":
        """A scale is of fp32 whatever the parameters become."""
        before = getattr(self, "scale", None)
        super()._apply(fn, recurse)
        if before is not None and self.scale is not None and self.scale.dtype != torch.float32:
            self.scale = before.to(self.scale.device)
        return self

    @property
    def _how(self) -> dict[str, Any]:
        how: dict[str, Any] = dict(format=self.format, scale=self.scale, scale_layout=self.scale_layout, cast=self.cast)
        return how | dict(batch_invariant=self.batch_invariant)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.format!r}{shown(self)}"


class QuantizedLayerNorm(_Quantized, torch.nn.LayerNorm):
    r"""Layer normalization whose result is stored in 8 bits or 4: see :func:`trinorm.functional.quantized_layer_norm` for
    the formula, shapes, dtypes and errors.

    Constructor, parameters and ``state_dict`` are :class:`torch.nn.LayerNorm`'s, besides the ``format``, and the buffer
    ``scale``, of one element in fp32, 1 until it is set or loaded, where the format asks for one ("fp8", "nvfp4").

    Source: Ba, Kiros, Hinton, "Layer Normalization", arXiv:1607.06450.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        format: FormatName,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self._set_format(format, device)

    def forward(  # type: ignore[override]
        self, input: Tensor, residual: Tensor | None = None, input_scale: Tensor | None = None
    ) -> Quantized:
        given = input, self.normalized_shape, self.weight, self.bias, self.eps
        return functional.quantized_layer_norm(*given, residual=residual, input_scale=input_scale, **self._how)


class QuantizedRMSNorm(_Quantized, torch.nn.RMSNorm):
    r"""Root mean square normalization whose result is stored in 8 bits or 4: see
    :func:`trinorm.functional.quantized_rms_norm` for the formula, shapes, dtypes and errors.

    Constructor, parameters and ``state_dict`` are :class:`torch.nn.RMSNorm`'s, besides the ``format``, and the buffer
    ``scale`` as of :class:`QuantizedLayerNorm`.

    Source: Zhang, Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        format: FormatName,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self._set_format(format, device)

    def forward(  # type: ignore[override]
        self, x: Tensor, residual: Tensor | None = None, input_scale: Tensor | None = None
    ) -> Quantized:
        given = x, self.normalized_shape, self.weight, self.eps
        return functional.quantized_rms_norm(*given, residual=residual, input_scale=input_scale, **self._how)
