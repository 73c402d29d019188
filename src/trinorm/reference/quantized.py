"""Quantizing by ATen's ops, which is what the kernels' results are compared with, bit for bit; and the way back.

A number of the whole tensor is t, a scale s, an element's code q of y·(1/(what it stands for)), and what y was is about
q·s (q·s·t of nvfp4). All is fp32, each operation rounded on its own.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .. import reference
from ..formats import TILE, Format, ScaleLayout
from ..spec import RowNorm

# fp32's least normal number: no scale is smaller, so that its reciprocal is a number.
LEAST_SCALE = 2.0**-126


def quantize(form: Format, y: Tensor, tensor_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(data, scale) of y ``(*, N)``, of its last dim; the scales are ``(*, scales(N))``, of "tensor" the one given.

    A row, or block, with what is no finite number has a scale of inf (NaN where the scale's dtype has no inf).
    """
    y = y.float()
    if form.scaling == "tensor":
        assert tensor_scale is not None
        return _codes(form, y * (1 / tensor_scale.reshape(()))), tensor_scale
    blocks = _blocks(form, y)
    size = blocks.abs()
    largest = torch.where(size < float("inf"), size, float("inf")).amax(-1, keepdim=True)
    scale, inverse = _scale(form, largest, tensor_scale)
    return _codes(form, (blocks * inverse).flatten(-2)[..., : y.shape[-1]]), scale.squeeze(-1)


def dequantize(
    form: Format,
    data: Tensor,
    scale: Tensor,
    tensor_scale: Tensor | None = None,
    scale_layout: ScaleLayout = "row_major",
    dims: int = 1,
) -> Tensor:
    """What the data stands for, in fp32: ``(*, N)``, where the scales are ``(*, scales(N))``; N may be several dims. Of
    swizzled scales, whose shape does not tell them, these are ``dims``.
    """
    shape = (*data.shape[:-1], data.shape[-1] * form.packed)
    if scale_layout == "swizzled":
        scales = form.scales(data.shape[-dims:].numel() * form.packed)
        leading = data.shape[:-dims]
        scale = unswizzled(scale, leading.numel(), scales).reshape(*leading, scales)
    if form.scaling != "tensor":
        data = data.flatten(scale.dim() - 1)
    if form.element == "e2m1":
        code = data.view(torch.uint8)
        code = torch.stack((code & 15, code >> 4), -1).flatten(-2).int()
        values = _e2m1(code)
    else:
        values = data.float()
    if form.scaling == "tensor":
        return values * scale.reshape(())
    factor = scale.float()
    if tensor_scale is not None:
        factor = factor * tensor_scale.reshape(())
    if form.block:
        factor = factor.repeat_interleave(form.block, -1)[..., : values.shape[-1]]
    return (values * factor).reshape(shape)


def swizzled(scale: Tensor) -> Tensor:
    """Scales of one byte each, ``(*, scales)``, their rows padded with zeros to a multiple of 128, and each to one of 4: in
    tiles of 128 rows by 4 scales, row-major, of 512 bytes, where that of (r, c) is byte (r % 32)·16 + (r // 32)·4 + c.

    Source: NVIDIA, cuBLAS's documentation, "1D Block Scaling Factors Layout".
    """
    rows = scale.view(torch.uint8).reshape(scale.shape[:-1].numel(), scale.shape[-1])
    (m, n), (of_rows, of_scales) = rows.shape, TILE
    whole = torch.nn.functional.pad(rows, (0, -n % of_scales, 0, -m % of_rows))
    m, n = whole.shape
    tiles = whole.reshape(m // of_rows, 4, 32, n // of_scales, of_scales)
    return tiles.permute(0, 3, 2, 1, 4).reshape(m, n).view(scale.dtype)


def unswizzled(scale: Tensor, rows: int, scales: int) -> Tensor:
    """The same back: ``(rows, scales)``."""
    (m, n), (of_rows, of_scales) = scale.shape, TILE
    tiles = scale.reshape(m // of_rows, n // of_scales, 32, 4, of_scales)
    return tiles.permute(0, 3, 2, 1, 4).reshape(m, n)[:rows, :scales]


def normalized(
    spec: RowNorm,
    x: Tensor,
    dims: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """y of the last ``dims`` dims, in fp32 or fp64: rounded to ``dtype`` by "llama" alone."""
    wide = (
        torch.float64 if torch.float64 in (x.dtype, *(t.dtype for t in (weight, bias) if t is not None)) else torch.float32
    )
    if not spec.rounded:
        x, dtype = x.to(wide), wide
    return reference.composite(spec, x, x.shape[-dims:], weight, bias, eps, dtype)


def _blocks(form: Format, y: Tensor) -> Tensor:
    """``(*, scales, elements of one)``, zeros after the last element."""
    n = y.shape[-1]
    size = form.block or max(1, n)
    return torch.nn.functional.pad(y, (0, form.scales(n) * size - n)).unflatten(-1, (-1, size))


def _scale(form: Format, largest: Tensor, tensor_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """(what is stored, by what y is multiplied), of the largest element's size."""
    finite = largest < float("inf")
    # By a tensor: by a number of Python's torch divides, on a GPU, by way of the rounded reciprocal.
    over = largest / torch.full_like(largest, form.largest)
    if form.scaling == "fp32":
        scale = over.clamp(min=LEAST_SCALE)
        return scale, 1 / scale
    if form.scaling == "pow2":
        # Any bit of the mantissa carries into the exponent.
        bits = (over.clamp(min=LEAST_SCALE).view(torch.int32) + 0x7FFFFF) & 0x7F800000
        scale = bits.view(torch.float32)
        return scale, 1 / scale
    if form.scaling == "e8m0":
        # The largest power of two that is not over the largest element, over that of the format's own largest number.
        code = ((largest.view(torch.int32) >> 23) - _exponent(form.largest)).clamp(min=0)
        inverse = torch.where(finite, ((254 - code) << 23).view(torch.float32), 0.0)
        return torch.where(finite, code, 255).to(torch.uint8).view(torch.float8_e8m0fnu), inverse
    assert tensor_scale is not None
    tensor_scale = tensor_scale.reshape(())
    stored = torch.where(finite, (over / tensor_scale).clamp(max=448.0), float("nan"))
    stored = stored.to(torch.float8_e4m3fn)
    factor = stored.float() * tensor_scale
    return stored, torch.where(factor > 0, 1 / factor.clamp(min=LEAST_SCALE), 0.0)


def _codes(form: Format, v: Tensor) -> Tensor:
    """The elements nearest to v, to the even one of two, the largest where v is beyond; data of the format's dtype."""
    held = v.clamp(-form.largest, form.largest)
    if form.element == "e4m3":
        return held.to(torch.float8_e4m3fn)
    if form.element == "int8":
        return torch.where(v == v, held.round(), 0.0).to(torch.int8)
    size = held.abs()
    # How many of the midpoints between e2m1's numbers are passed; at one itself, the even of both.
    code = sum((size > m if even else size >= m).to(torch.uint8) for m, even in _MIDPOINTS)
    code = torch.where(v == v, code + 8 * v.signbit().to(torch.uint8), 0).to(torch.uint8)
    low, high = code.unflatten(-1, (-1, 2)).unbind(-1)
    return (low | (high << 4)).view(torch.float4_e2m1fn_x2)


_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MIDPOINTS = tuple(((a + b) / 2, i % 2 == 0) for i, (a, b) in enumerate(itertools.pairwise(_E2M1)))


def _e2m1(code: Tensor) -> Tensor:
    size = torch.tensor(_E2M1, dtype=torch.float32, device=code.device)[(code & 7).long()]
    return torch.where(code >= 8, -size, size)


def _exponent(largest: float) -> int:
    """Of the power of two under it."""
    return int(largest).bit_length() - 1
