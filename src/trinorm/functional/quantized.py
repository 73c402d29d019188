"""Norms with a quantized result as functions (functional re-exports them)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import checks
from ..formats import FORMAT_NAMES, FORMATS, SCALE_LAYOUTS, SWIZZLED, FormatName, ScaleLayout
from ..ops import quantized_norm
from ..ops.problems.quantized import Given, Quantizing
from ..ops.quantized import CALLS, CODES
from ..ops.road import KERNEL_DTYPES
from ..reference import quantized as quantized_reference
from ..spec import LAYER_NORM, RMS_NORM, Cast, RowNorm
from .conditioned import are_plain


class Quantized(NamedTuple):
    """A result that is stored in a small format.

    data: the elements, of y's shape; of nvfp4 two beside each other are one element of the data, ``(*, N / 2)``.
    scale: ``(*, number of scales)`` of each row or block, or, swizzled, ``(rows, scales of a row)`` rounded up to multiples
        of 128 and 4; of "fp8" the scale that was given.
    format: the name of the format.
    tensor_scale: of nvfp4 the scale of the whole tensor, which was given; else None.
    residual: with a residual the sum that was normalized, as the next residual; else None.
    straight: where a gradient of y comes in: zeros of y's shape and the input's dtype that take no memory. Its gradient, as
        an autograd.Function of one's own gives it that uses data and scale, is the norm's dy: rounding counts as identity
        (Bengio, Léonard, Courville, arXiv:1308.3432). None where no gradient is asked for.
    scale_layout: how the scales lie in memory.
    dims: how many of the data's last dims are one row.
    """

    data: Tensor
    scale: Tensor
    format: FormatName
    tensor_scale: Tensor | None = None
    residual: Tensor | None = None
    straight: Tensor | None = None
    scale_layout: ScaleLayout = "row_major"
    dims: int = 1

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """What the data stands for: each element times its scale, in fp32, rounded to ``dtype``; None is fp32, or fp64
        where a gradient in that is asked for. Its gradient is y's, and so there is none of a scale.
        """
        given = self.data, self.scale.detach(), None if self.tensor_scale is None else self.tensor_scale.detach()
        value = quantized_reference.dequantize(FORMATS[self.format], *given, self.scale_layout, self.dims)
        if self.straight is None:
            return value if dtype is None else value.to(dtype)
        value = value.to(torch.promote_types(value.dtype, self.straight.dtype) if dtype is None else dtype)
        return value + self.straight.to(value.dtype)


_of_fields = Quantized.__new__


def _of_fields_or_all(cls: type[Quantized], data: Any, *fields: Any, **named: Any) -> Quantized:
    """Of its fields, or of an iterable of all, by which the ``__torch_function__`` that tensor subclasses inherit makes a
    tuple anew, as torch's own named results can be made.
    """
    return _of_fields(cls, data, *fields, **named) if fields or named else _of_fields(cls, *data)


Quantized.__new__ = _of_fields_or_all  # type: ignore[method-assign,assignment]


def quantized_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    format: FormatName,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    input_scale: Tensor | None = None,
    scale_layout: ScaleLayout = "row_major",
    cast: Cast = "output",
    batch_invariant: bool | None = None,
) -> Quantized:
    r"""A layer normalization whose result is stored in 8 bits or 4, in one pass.

    .. math::
        q = \mathrm{round}(y / s), \qquad y = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \cdot w + b

    y is fp32 and is not rounded in between; each quotient is a product with the correctly rounded 1/s, rounded to the
    nearest element of the format, to the even one of two, and to its largest where it is beyond that.

    ================ =========== ============================ ====================================================
    format           elements    one scale for                its value and dtype
    ================ =========== ============================ ====================================================
    "fp8"            e4m3        the whole tensor             ``scale``, given, fp32
    "fp8_token"      e4m3        a row                        max|y| / 448, fp32
    "fp8_block"      e4m3        128 elements                 max|y| / 448, fp32
    "fp8_block_pow2" e4m3        128 elements                 :math:`2^{\lceil\log_2(\max|y| / 448)\rceil}`, fp32
    "int8_token"     int8        a row                        max|y| / 127, fp32
    "mxfp8"          e4m3        32 elements                  :math:`2^{\lfloor\log_2\max|y|\rfloor - 8}`, e8m0
    "nvfp4"          e2m1        16 elements, times ``scale`` max|y| / 6 / ``scale``, e4m3
    ================ =========== ============================ ====================================================

    A scale in fp32 is at least 2^-126. A row (or block) with an element that is no finite number has the scale inf, or NaN
    where the dtype has no inf; "fp8", whose scale is given, stores Inf as its largest number, and NaN as NaN.

    Args:
        input: x, ``(*, *normalized_shape)``; float16, bfloat16, float32 or float64, or float8_e4m3fn with ``input_scale``.
            Any strides; where ``normalized_shape`` is not contiguous it is copied.
        normalized_shape: the sizes of the dims that share statistics. Blocks run over their elements in order.
        weight, bias: as :func:`layer_norm`.
        eps: as :func:`layer_norm`.
        format: one of the seven.
        scale: a tensor of one element, fp32, on the input's device: of "fp8" and "nvfp4", and of these alone. What an
            element of 1 stands for: of "nvfp4" the largest |y| that is expected over 448·6 (the reciprocal of what vLLM
            calls the global scale).
        residual: added to x first, of its shape; the sum is rounded to the dtype that torch promotes both to (the
            residual's, where x is of fp8) and returned, as by :func:`add_layer_norm`.
        input_scale: what the input's elements are times, fp32, of one element or ``(*, 1)``: of an input of fp8.
        scale_layout: how the scales lie in memory. "row_major": contiguous. "column_major": of the same shape, block by
            block, all rows of one beside each other; of blocks with scales in fp32 it is a multiple of 4 rows, 16 bytes,
            from one block's to the next's, as TMA asks (DeepGEMM), and what lies between is not written. "swizzled", of
            "mxfp8" and "nvfp4": in the tiles that cuBLAS's block-scaled products read, ``SWIZZLE_32_4_4`` of
            torch.nn.functional.scaled_mm, which takes it as it is: two dims, all rows by the scales of one, padded with
            zeros to multiples of 128 and 4; byte (r % 32)·16 + (r // 32)·4 + c of a tile of 512 is that of its row r and
            column c, and tiles lie row-major.
        cast: as :func:`layer_norm`; with "llama" y is rounded to the input's dtype before it is quantized.
        batch_invariant: as :func:`layer_norm`.

    Returns:
        A :class:`Quantized`. Statistics, products and scales are fp32, fp64 up to y as soon as one of the tensors is. Rows
        of more than 32 KiB (of 4 bytes an element where x is of fp8, of 16 in fp64) have torch's own operators.

    Raises:
        RuntimeError: a shape does not fit, tensors are on different devices, an input of fp8 requires a gradient, or, of
            nvfp4, the last dim is odd.
        ValueError: eps is negative or NaN, ``format``, ``scale_layout`` or ``cast`` is none of its values, a format
            has no swizzled scales, or a scale is missing or too many.
        NotImplementedError: a dtype other than those named.
        TypeError: an argument of the wrong kind.

    Sources: Ba, Kiros, Hinton, "Layer Normalization", arXiv:1607.06450; Micikevicius et al., "FP8 Formats for Deep
    Learning", arXiv:2209.05433; "OCP Microscaling Formats (MX) Specification", version 1.0, 2023; DeepSeek-AI, "DeepSeek-V3
    Technical Report", arXiv:2412.19437 (blocks of 128); NVIDIA, "Pretraining Large Language Models with NVFP4",
    arXiv:2509.25149.
    """
    tensors = Given(input, input_scale, residual, weight, bias, scale)
    by = normalized_shape, eps, format, scale_layout, cast, batch_invariant
    if has_torch_function_variadic(*tensors):
        return _overridden(quantized_layer_norm, tensors, by)
    return _quantized(LAYER_NORM, tensors, by)


def quantized_rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    format: FormatName,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    input_scale: Tensor | None = None,
    scale_layout: ScaleLayout = "row_major",
    cast: Cast = "output",
    batch_invariant: bool | None = None,
) -> Quantized:
    r"""A root mean square normalization whose result is stored in 8 bits or 4, in one pass.

    .. math::
        q = \mathrm{round}(y / s), \qquad y = \frac{x}{\sqrt{\mathrm{E}[x^2] + \epsilon}} \cdot w + b

    Args:
        input, normalized_shape, weight, bias, format, scale, residual, input_scale, scale_layout, cast,
            batch_invariant: as :func:`quantized_layer_norm`.
        eps: as :func:`rms_norm`: None is an epsilon of the input's dtype.

    Returns:
        A :class:`Quantized`, as :func:`quantized_layer_norm`.

    Raises:
        RuntimeError, ValueError, NotImplementedError, TypeError: as :func:`quantized_layer_norm`.

    Sources: Zhang, Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467; and as :func:`quantized_layer_norm`.
    """
    tensors = Given(input, input_scale, residual, weight, bias, scale)
    by = normalized_shape, eps, format, scale_layout, cast, batch_invariant
    if has_torch_function_variadic(*tensors):
        return _overridden(quantized_rms_norm, tensors, by)
    return _quantized(RMS_NORM, tensors, by)


# normalized_shape, eps, format, scale_layout, cast and batch_invariant, as a caller gave them.
_By = tuple[Sequence[int], float | None, FormatName, ScaleLayout, Cast, bool | None]


def _overridden(norm: Callable[..., Quantized], given: Given, by: _By) -> Quantized:
    """What a tensor's or a mode's own __torch_function__ makes of the call."""
    normalized_shape, eps, format, scale_layout, cast, batch_invariant = by
    tensors: dict[str, Any] = dict(weight=given.weight, bias=given.bias, scale=given.scale, residual=given.residual)
    tensors.update(input_scale=given.x_scale, eps=eps, format=format, scale_layout=scale_layout, cast=cast)
    tensors.update(batch_invariant=batch_invariant)
    return handle_torch_function(norm, given, given.x, normalized_shape, **tensors)


def _quantized(norm: RowNorm, given: Given, by: _By) -> Quantized:
    normalized_shape, eps, format, scale_layout, cast, batch_invariant = by
    plain = type(normalized_shape) is tuple and all(type(size) is int for size in normalized_shape)
    plain = plain and type(scale_layout) is str and are_plain(eps, batch_invariant)
    asked = ("quantized", norm.name, *by) if plain else None
    if asked is not None and (call := CALLS.recall(asked, *given)) is not None:
        data, taken, total, *_ = call(*given)
        return _result(given, format, scale_layout, len(normalized_shape), data, taken, total, None)
    op = f"quantized_{norm.name}"
    checks.tensor(op, "input", given.x)
    if given.x.is_nested:
        raise RuntimeError(f"{op}(): input is a nested tensor, which this norm does not take")
    if given.x.dtype not in (*KERNEL_DTYPES, CODES):
        of = "float16, bfloat16, float32, float64, float8_e4m3fn"
        raise NotImplementedError(f"{op}(): input has dtype {given.x.dtype}; it must be one of {of}")
    eps = checks.own_epsilon(norm, given.x, eps)
    # An input of codes is checked as one of fp32 would be.
    x = given.x if given.x.dtype != CODES else given.x.new_empty((), dtype=torch.float32).expand(given.x.shape)
    shape, eps, invariant = checks.rows(op, x, normalized_shape, given.weight, given.bias, eps, cast, batch_invariant)
    _check(op, given, len(shape), format, scale_layout)
    problem = Quantizing(norm.with_cast(cast), len(shape), eps, format, scale_layout, invariant, False)
    return _result(given, format, scale_layout, len(shape), *quantized_norm(problem, given, asked))


def _result(
    given: Given,
    format: FormatName,
    scale_layout: ScaleLayout,
    dims: int,
    data: Any,
    taken: Tensor | None,
    total: Tensor | None,
    straight: Tensor | None,
) -> Quantized:
    """taken: the scales that were taken of y, None where there is the given one alone."""
    if taken is None:
        assert given.scale is not None
        return Quantized(data, given.scale, format, None, total, straight, scale_layout, dims)
    return Quantized(data, taken, format, given.scale, total, straight, scale_layout, dims)


def _check(op: str, given: Given, dims: int, format: FormatName, scale_layout: ScaleLayout) -> None:
    x, x_scale, residual, _, _, scale = given
    if not isinstance(format, str) or format not in FORMATS:
        raise ValueError(f"{op}(): format is {format!r}; it must be one of {', '.join(map(repr, FORMAT_NAMES))}")
    if not isinstance(scale_layout, str) or scale_layout not in SCALE_LAYOUTS:
        of = ", ".join(map(repr, SCALE_LAYOUTS))
        raise ValueError(f"{op}(): scale_layout is {scale_layout!r}; it must be one of {of}")
    form = FORMATS[format]
    if scale_layout == "swizzled" and not form.swizzles:
        of = ", ".join(map(repr, SWIZZLED))
        raise ValueError(f"{op}(): scale_layout is 'swizzled', but format is {format!r}; it must be one of {of}")
    if (scale is not None) != form.given:
        of = "must be a tensor of one element" if form.given else "must be None: the scales are taken of each row or block"
        raise ValueError(f"{op}(): scale is {'None' if scale is None else 'given'}, but with format {format!r} it {of}")
    if (x_scale is not None) != (x.dtype == CODES):
        of = "an input of float8_e4m3fn needs its own" if x_scale is None else f"the input is {x.dtype}, and needs none"
        raise ValueError(f"{op}(): input_scale is {'None' if x_scale is None else 'given'}, but {of}")
    if residual is not None:
        checks.tensor(op, "residual", residual)
        checks.strided(op, "residual", residual)
        checks.beside(op, "residual", residual, x)
        if residual.shape != x.shape:
            raise RuntimeError(f"{op}(): residual has shape {tuple(residual.shape)}; it must be {tuple(x.shape)}")
    for name, t, shapes in (("scale", scale, ()), ("input_scale", x_scale, ((*x.shape[:-dims], 1),))):
        if t is None:
            continue
        checks.tensor(op, name, t)
        checks.beside(op, name, t, x)
        if t.dtype != torch.float32:
            raise NotImplementedError(f"{op}(): {name} has dtype {t.dtype}; it must be float32")
        if t.numel() != 1 and tuple(t.shape) not in shapes:
            also = "".join(f", or {one}" for one in shapes)
            raise RuntimeError(f"{op}(): {name} has shape {tuple(t.shape)}; it must have one element{also}")
        if t.requires_grad or (forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None):
            of = "requires a gradient" if t.requires_grad else "has a tangent"
            raise RuntimeError(f"{op}(): {name} {of}, and there is none; it must be {name}.detach()")
    if x.dtype == CODES and x.requires_grad:
        raise RuntimeError(f"{op}(): an input of float8_e4m3fn requires a gradient, and there is none for its codes")
    if x.shape[-1] % form.packed:
        raise RuntimeError(f"{op}(): the input's last dim is {x.shape[-1]}; with format {format!r} it must be even")
