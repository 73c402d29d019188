"""The formats that a quantized norm writes. A format is a value; the kernels and the plain reference read it off."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch

# What an element is stored as: a float of 4 bits of exponent and 3 of mantissa, of 2 and 1, or an integer.
Element = Literal["e4m3", "e2m1", "int8"]

# What scales its elements: a number of the whole tensor that is given; one that is taken of each row or block, in fp32, in
# fp32 up to the next power of two, as a power of two of 8 bits, or, over a given one of the whole tensor, as an e4m3.
Scaling = Literal["tensor", "fp32", "pow2", "e8m0", "e4m3"]

FormatName = Literal["fp8", "fp8_token", "fp8_block", "fp8_block_pow2", "int8_token", "mxfp8", "nvfp4"]
FORMAT_NAMES: tuple[FormatName, ...] = get_args(FormatName)

# How the scales that are taken of rows or blocks lie in memory: a row's beside each other; all rows' of one block; or in
# the tiles that tensor cores read (reference.quantized.swizzled).
ScaleLayout = Literal["row_major", "column_major", "swizzled"]
SCALE_LAYOUTS: tuple[ScaleLayout, ...] = get_args(ScaleLayout)

# Rows, and scales of each, of a tile of swizzled scales.
TILE = 128, 4

# Of how many fp32 scales the rows of one block have a multiple: TMA asks for strides of 16 bytes.
_COLUMN = 4


def rounded_up(n: int, multiple: int) -> int:
    """The least multiple that is >= n."""
    return -(-n // multiple) * multiple


class Format(NamedTuple):
    """block: how many elements have one scale; 0: all of a row. largest: the element's largest number."""

    element: Element
    scaling: Scaling
    block: int
    largest: float

    @property
    def given(self) -> bool:
        """Whether the caller gives a number of the whole tensor."""
        return self.scaling in ("tensor", "e4m3")

    @property
    def packed(self) -> int:
        """How many elements one of the data's holds."""
        return 2 if self.element == "e2m1" else 1

    @property
    def data_dtype(self) -> torch.dtype:
        return _DATA[self.element]

    @property
    def scale_dtype(self) -> torch.dtype:
        return _SCALE[self.scaling]

    @property
    def swizzles(self) -> bool:
        """Whether its scales may be swizzled: those of blocks of 32 or 16, in 8 bits."""
        return self.scaling in ("e8m0", "e4m3")

    def scales(self, n: int) -> int:
        """How many scales a row of n elements has."""
        return -(-n // self.block) if self.block else 1

    def scale_shape(self, leading: tuple[int, ...], n: int, layout: ScaleLayout) -> tuple[int, ...]:
        """Of rows of n elements, which are of these sizes; swizzled, of whole tiles."""
        scales = self.scales(n)
        if layout == "swizzled":
            return rounded_up(math.prod(leading), TILE[0]), rounded_up(scales, TILE[1])
        return *leading, scales

    def column(self, rows: int) -> int:
        """How far it is, column-major, from one block's scales to the next's."""
        return rounded_up(rows, _COLUMN) if self.block and self.scale_dtype == torch.float32 else rows

    def column_strides(self, leading: tuple[int, ...]) -> tuple[int, ...]:
        """Of scales that lie column-major."""
        return *(math.prod(leading[i + 1 :]) for i in range(len(leading))), self.column(math.prod(leading))


_DATA = {"e4m3": torch.float8_e4m3fn, "e2m1": torch.float4_e2m1fn_x2, "int8": torch.int8}
_SCALE: dict[Scaling, torch.dtype] = dict.fromkeys(("tensor", "fp32", "pow2"), torch.float32)
_SCALE |= {"e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn}

FORMATS: dict[FormatName, Format] = {
    "fp8": Format("e4m3", "tensor", 0, 448.0),
    "fp8_token": Format("e4m3", "fp32", 0, 448.0),
    "fp8_block": Format("e4m3", "fp32", 128, 448.0),
    "fp8_block_pow2": Format("e4m3", "pow2", 128, 448.0),
    "int8_token": Format("int8", "fp32", 0, 127.0),
    "mxfp8": Format("e4m3", "e8m0", 32, 448.0),
    "nvfp4": Format("e2m1", "e4m3", 16, 6.0),
}

# Those whose scales may be swizzled.
SWIZZLED: tuple[FormatName, ...] = tuple(name for name, form in FORMATS.items() if form.swizzles)
