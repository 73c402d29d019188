"""The norms of a sum as functions: a residual is added, and what it makes is normalized (functional re-exports them)."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import checks
from ..ops import added, added_norm
from ..ops.road import within_transform
from ..spec import LAYER_NORM, RMS_NORM, Cast, RowNorm


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    normalized_shape: Sequence[int] | None = None,
    alpha: float = 1.0,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    row_scale: Tensor | None = None,
    out: Tensor | None = None,
    cast: Cast = "output",
    batch_invariant: bool | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Adds a residual and normalizes the sum, in one pass: what every block of a transformer does.

    .. math::
        s = x + \alpha r, \qquad y = \frac{s - \mathrm{E}[s]}{\sqrt{\mathrm{Var}[s] + \epsilon}} \cdot w + b

    Of x it may be a dropout, with its rows scaled: :math:`c_m \, \mathrm{dropout}(x_m)` for :math:`x_m`.

    Both are returned: a pre-norm model hands s on as the next residual, a post-norm model (BERT) takes y for it.

    Args:
        input: x, ``(*, *normalized_shape)``; float16, bfloat16, float32 or float64, any strides.
        residual: r, of x's shape, any of the dtypes above. A residual stream in fp32 beside an input of 16 bits keeps the
            digits that each block would round off.
        weight, bias, eps: as :func:`layer_norm`.
        normalized_shape: the sizes of the dims that share statistics. None: the weight's shape, or the bias's, or, without
            these, the last dim.
        alpha: the residual's factor; DeepNorm's.
        dropout_p: the probability that an element of x is dropped, and the others are divided by 1 - dropout_p; 0 to 1. No
            mask is stored: the backward makes it again of a seed, which is drawn at each call.
        generator: what the seed is drawn from, of x's device; None is torch's own (``torch.manual_seed``), the only one
            that a checkpoint winds back before it computes again.
        row_scale: c, of x's leading dims or broadcast to them, any of the dtypes above: of stochastic depth 0 or
            1/(1 - p) for each sample. It gets no gradient but ``torch.func``'s and a tangent's, by torch's operators.
        out: memory for s, contiguous, of its shape and dtype; residual itself, or input, to have it there in place. For
            inference: with it no argument may require a gradient.
        cast, batch_invariant: as :func:`layer_norm`.

    Returns:
        (y, s), each contiguous and of x's shape. s has the dtype that torch promotes x's and r's to, and is rounded to it
        before it is normalized, so that y is what adding first and normalizing then would give. y has x's dtype (fp32 where
        autocast makes :func:`layer_norm` return that). Statistics, products and sums are fp32, fp64 as soon as one of the
        tensors is.

    Raises:
        RuntimeError: a shape does not fit, tensors are on different devices, out is no place for s, row_scale requires a
            gradient, or, with out given, an argument does.
        ValueError: as :func:`layer_norm`; or dropout_p is no probability.
        NotImplementedError, TypeError: as :func:`layer_norm`.

    Sources: Ba, Kiros, Hinton, "Layer Normalization", arXiv:1607.06450; Xiong et al., "On Layer Normalization in the
    Transformer Architecture", arXiv:2002.04745 (before or after); Wang et al., "DeepNet: Scaling Transformers to 1,000
    Layers", arXiv:2203.00555 (alpha); Srivastava et al., "Dropout", JMLR 15, 2014; Huang et al., "Deep Networks with
    Stochastic Depth", arXiv:1603.09382 (row_scale).
    """
    given = input, residual, weight, bias, row_scale, out
    by = eps, normalized_shape, alpha, dropout_p, generator, cast, batch_invariant
    if has_torch_function_variadic(*given):
        return _overridden(add_layer_norm, given, by)
    return norm_of_sum(LAYER_NORM, given, by)


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    bias: Tensor | None = None,
    normalized_shape: Sequence[int] | None = None,
    alpha: float = 1.0,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    row_scale: Tensor | None = None,
    out: Tensor | None = None,
    cast: Cast = "output",
    batch_invariant: bool | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Adds a residual and normalizes the sum by its root mean square, in one pass.

    .. math::
        s = x + \alpha r, \qquad y = \frac{s}{\sqrt{\mathrm{E}[s^2] + \epsilon}} \cdot w + b

    Args:
        input, residual, weight, bias, normalized_shape, alpha, dropout_p, generator, row_scale, out, cast,
            batch_invariant: as :func:`add_layer_norm`.
        eps: as :func:`rms_norm`: None is an epsilon of the sum's dtype.

    Returns:
        (y, s), as :func:`add_layer_norm`.

    Raises:
        RuntimeError, NotImplementedError, TypeError, ValueError: as :func:`add_layer_norm`.

    Source: Zhang, Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
    """
    given = input, residual, weight, bias, row_scale, out
    by = eps, normalized_shape, alpha, dropout_p, generator, cast, batch_invariant
    if has_torch_function_variadic(*given):
        return _overridden(add_rms_norm, given, by)
    return norm_of_sum(RMS_NORM, given, by)


# What the functions are given: tensors, and the rest.
_Given = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
_By = tuple[float | None, Sequence[int] | None, float, float, torch.Generator | None, Cast, bool | None]


def _overridden(function: Callable[..., tuple[Tensor, Tensor]], given: _Given, by: _By) -> tuple[Tensor, Tensor]:
    """The call, by a tensor that has a way of its own."""
    tensors = dict(zip(("weight", "bias", "row_scale", "out"), given[2:], strict=True))
    names = "eps", "normalized_shape", "alpha", "dropout_p", "generator", "cast", "batch_invariant"
    return handle_torch_function(function, given, *given[:2], **tensors, **dict(zip(names, by, strict=True)))


def norm_of_sum(spec: RowNorm, given: _Given, by: _By, manner: Hashable = None) -> tuple[Tensor, Tensor]:
    """manner: what the caller recalls such calls by (ops/added.py), where he does."""
    input, residual, weight, bias, row_scale, out = given
    eps, normalized_shape, alpha, dropout_p, generator, cast, batch_invariant = by
    plain = type(alpha) is type(dropout_p) is float and (eps is None or type(eps) is float)
    plain = plain and (batch_invariant is None or type(batch_invariant) is bool)
    # A list could change; a Size is as good a key as its tuple.
    if normalized_shape is not None:
        plain = plain and isinstance(normalized_shape, tuple) and all(type(size) is int for size in normalized_shape)
    # Of another tensor as out the memory is looked at, each time.
    plain = plain and (out is None or out is residual or out is input)
    # What a call is recalled by; the seed is drawn for it, as it will be needed.
    asked = manner or ((spec.name, normalized_shape, eps, alpha, dropout_p, cast, batch_invariant) if plain else None)
    seed = _seed(input, generator) if plain and 0 < dropout_p <= 1 and isinstance(input, Tensor) else None
    if asked is not None:
        call = added.recall(asked, input, residual, weight, bias, seed, row_scale, out)
        # Where tensors lie no call remembers.
        if call is not None and (out is None or not any(t is not out and _overlap(t, out) for t in given if t is not None)):
            return call(input, residual, weight, bias, seed, row_scale, out)
    op = f"add_{spec.name}"
    checks.tensor(op, "input", input)
    checks.strided(op, "input", input)
    checks.tensor(op, "residual", residual)
    checks.strided(op, "residual", residual)
    if input.is_nested or residual.is_nested:
        raise RuntimeError(f"{op}(): input or residual is a nested tensor, which this norm does not take")
    if residual.shape != input.shape:
        raise RuntimeError(
            f"{op}(): residual has shape {tuple(residual.shape)}; it must be the input's, {tuple(input.shape)}: "
            "residual.expand_as(input)"
        )
    checks.beside(op, "residual", residual, input)
    if normalized_shape is None:
        parameter = weight if weight is not None else bias
        normalized_shape = tuple(input.shape[-1:] if not isinstance(parameter, Tensor) else parameter.shape)
    if eps is None:
        double = torch.promote_types(input.dtype, residual.dtype) == torch.float64
        eps = 2.220446049250313e-16 if double else 1.1920928955078125e-07
    shape, eps, invariant = checks.rows(op, input, normalized_shape, weight, bias, eps, cast, batch_invariant)
    if isinstance(alpha, (bool, Tensor)) or not isinstance(alpha, numbers.Real):
        raise TypeError(f"{op}(): alpha must be a float, not {alpha!r}")
    if isinstance(dropout_p, (bool, Tensor)) or not isinstance(dropout_p, numbers.Real):
        raise TypeError(f"{op}(): dropout_p must be a float, not {dropout_p!r}")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"{op}(): dropout_p is {dropout_p}; it must be a probability, from 0 to 1")
    if dropout_p and seed is None:
        seed = _seed(input, generator)
    if row_scale is not None:
        row_scale = _checked_scale(op, row_scale, input, len(shape))
        asked = asked if row_scale is given[4] else None
    if out is not None:
        _check_out(op, out, input, residual, weight=weight, bias=bias, row_scale=row_scale)
    how = eps, float(alpha), out, asked, invariant, seed, row_scale, float(dropout_p)
    return added_norm(spec.with_cast(cast), input, residual, shape, weight, bias, *how)


def _seed(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Drawn on x's device, where a captured graph draws anew at each replay."""
    return torch.randint(-(1 << 63), (1 << 63) - 1, (1,), dtype=torch.int64, device=x.device, generator=generator)


def _checked_scale(op: str, row_scale: Tensor, x: Tensor, dims: int) -> Tensor:
    """Of each row, as the kernels read it: itself, where it is so already."""
    checks.tensor(op, "row_scale", row_scale)
    checks.strided(op, "row_scale", row_scale)
    checks.beside(op, "row_scale", row_scale, x)
    if row_scale.requires_grad and torch.is_grad_enabled() and not within_transform():
        raise RuntimeError(f"{op}(): row_scale requires a gradient, which this norm does not give it; detach it")
    leading = x.shape[: x.dim() - dims]
    try:
        return (
            row_scale
            if row_scale.shape == leading and row_scale.is_contiguous()
            else row_scale.expand(leading).contiguous()
        )
    except RuntimeError:
        raise RuntimeError(
            f"{op}(): row_scale has shape {tuple(row_scale.shape)}, but input has rows of {tuple(leading)}; it must be "
            "broadcast to that"
        ) from None


def _check_out(op: str, out: Tensor, x: Tensor, residual: Tensor, **others: Tensor | None) -> None:
    checks.tensor(op, "out", out)
    dtype = torch.promote_types(x.dtype, residual.dtype)
    fits = out.shape == x.shape and out.dtype == dtype and out.device == x.device and out.is_contiguous()
    compiling = torch.compiler.is_compiling()  # out is then copied into
    odd = not compiling and (out.is_neg() or (out.is_inference() and not torch.is_inference_mode_enabled()))
    if not fits or odd:
        raise RuntimeError(
            f"{op}(): out is {out.dtype} of shape {tuple(out.shape)} and strides {out.stride()} on {out.device}; it must "
            f"be {dtype} of shape {tuple(x.shape)}, contiguous, on {x.device}, no view of a negative nor, outside of "
            "inference mode, made in it"
        )
    tensors = dict(input=x, residual=residual, **others)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (out, *tensors.values())):
        raise RuntimeError(f"{op}(): out is given, which has no gradient, but an argument requires one")
    for name, t in tensors.items():
        if compiling or t is None or not t.numel():
            continue
        same = name not in others and t.dtype == out.dtype and t.data_ptr() == out.data_ptr() and t.is_contiguous()
        if not same and _overlap(t, out):
            raise RuntimeError(
                f"{op}(): out has a part of {name}'s memory; it must be apart, or all of input's or of residual's"
            )


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the two lie in one storage with places in common, at most."""
    if a.is_meta or a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    first, last = ([t.data_ptr(), t.data_ptr() + _extent(t)] for t in (a, b))
    return first[0] < last[1] and last[0] < first[1]


def _extent(t: Tensor) -> int:
    """Bytes from t's first element to its last one's end."""
    steps = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return (steps + 1) * t.element_size()
