"""A norm of tensors whose result is stored in a small format."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...formats import FORMATS, Format, FormatName, ScaleLayout
from ...ops import road
from ...spec import RowNorm


class Quantizing(NamedTuple):
    """What is computed of the tensors: the norm over the last ``dims`` dims, its result in a format. save: a backward will
    ask for the statistics.
    """

    spec: RowNorm
    dims: int
    eps: float
    name: FormatName
    scale_layout: ScaleLayout
    batch_invariant: bool
    save: bool

    @property
    def form(self) -> Format:
        return FORMATS[self.name]

    def data_shape(self, x: Tensor) -> tuple[int, ...]:
        return *x.shape[:-1], x.shape[-1] // self.form.packed

    def scale_shape(self, x: Tensor) -> tuple[int, ...]:
        return self.form.scale_shape(x.shape[: -self.dims], x.shape[-self.dims :].numel(), self.scale_layout)

    def column_strides(self, x: Tensor) -> tuple[int, ...] | None:
        """Of the scales, where they lie column-major."""
        return self.form.column_strides(x.shape[: -self.dims]) if self.scale_layout == "column_major" else None


class Given(NamedTuple):
    """The tensors. x_scale: of an x of codes; scale: a number of the whole result."""

    x: Tensor
    x_scale: Tensor | None
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    scale: Tensor | None

    @property
    def has_codes(self) -> bool:
        """Whether x is one of codes, which have a scale."""
        return self.x_scale is not None

    @property
    def stats(self) -> torch.dtype:
        """The statistics' dtype."""
        return road.accumulator_dtype(self.x, self.residual, self.weight, self.bias)

    @property
    def sum_dtype(self) -> torch.dtype:
        """What is normalized has it: x's, or the sum's."""
        if self.has_codes:
            return torch.float32 if self.residual is None else self.residual.dtype
        return self.x.dtype if self.residual is None else torch.promote_types(self.x.dtype, self.residual.dtype)

    @property
    def y_dtype(self) -> torch.dtype:
        """What y would have, were it not quantized."""
        return self.sum_dtype if self.has_codes else self.x.dtype


def held_bytes(given: Given) -> int:
    """Of an element of what is normalized, as a program holds it."""
    if given.stats == torch.float64:
        return 16
    return 4 if given.has_codes else max(2, given.sum_dtype.itemsize)
