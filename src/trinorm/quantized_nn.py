"""Norms with a quantized result as modules (nn re-exports them)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import functional
from .formats import FORMATS, FormatName
from .functional import Quantized
from .shown import shown


class QuantizedLayerNorm(torch.nn.LayerNorm):
    r"""Layer normalization whose result is stored in 8 bits or 4: see :func:`trinorm.functional.quantized_layer_norm` for
    the formula, shapes, dtypes and errors.

    Constructor, parameters and ``state_dict`` are :class:`torch.nn.LayerNorm`'s, besides the ``format``, and the buffer
    ``scale``, of one element, 1 until it is set or loaded, where the format asks for one ("fp8", "nvfp4").

    Source: Ba, Kiros, Hinton, "Layer Normalization", arXiv:1607.06450.
    """

    format: FormatName
    scale: Tensor | None
    cast: functional.Cast = "output"
    column_major: bool = False

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
        _set_format(self, format, device)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Quantized:  # type: ignore[override]
        given = input, self.normalized_shape, self.weight, self.bias, self.eps
        how = dict(residual=residual, column_major=self.column_major, cast=self.cast)
        return functional.quantized_layer_norm(*given, format=self.format, scale=self.scale, **how)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.format!r}{shown(self)}"


class QuantizedRMSNorm(torch.nn.RMSNorm):
    r"""Root mean square normalization whose result is stored in 8 bits or 4: see
    :func:`trinorm.functional.quantized_rms_norm` for the formula, shapes, dtypes and errors.

    Constructor, parameters and ``state_dict`` are :class:`torch.nn.RMSNorm`'s, besides the ``format``, and the buffer
    ``scale`` as of :class:`QuantizedLayerNorm`.

    Source: Zhang, Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
    """

    format: FormatName
    scale: Tensor | None
    cast: functional.Cast = "output"
    column_major: bool = False

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
        _set_format(self, format, device)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Quantized:  # type: ignore[override]
        given = x, self.normalized_shape, self.weight, self.eps
        how = dict(residual=residual, column_major=self.column_major, cast=self.cast)
        return functional.quantized_rms_norm(*given, format=self.format, scale=self.scale, **how)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.format!r}{shown(self)}"


def _set_format(
    module: QuantizedLayerNorm | QuantizedRMSNorm, format: FormatName, device: torch.device | str | None
) -> None:
    if not isinstance(format, str) or format not in FORMATS:
        of = ", ".join(map(repr, FORMATS))
        raise ValueError(f"{type(module).__name__}(): format is {format!r}; it must be one of {of}")
    module.format = format
    given = FORMATS[format].given
    module.register_buffer("scale", torch.ones(1, device=device, dtype=torch.float32) if given else None)
