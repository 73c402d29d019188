"""RMSNorm's relatives, which differ by their statistic alone, as functions (functional re-exports them)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import checks
from ..ops import conditioned, conditioned_norm, road
from ..spec import RMS_NORM, Cast, ConditionedNorm
from .conditioned import are_plain, check_inputs

# What part of a row partial RMSNorm's statistic is of, unless it is told: the paper's.
PART = 0.0625

# p·N is off by a rounding of p and one of the product: ⌈.1·70⌉ would be 8.
_LESS_ROUNDINGS = 1 - 2.0**-51


def l2_norm(
    input: Tensor,
    normalized_shape: Sequence[int] | None = None,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    cast: Cast = "output",
    batch_invariant: bool | None = None,
) -> Tensor:
    r"""L2 normalization, as of the queries and keys of linear attention.

    .. math::
        y = \frac{x}{\sqrt{\sum x^2 + \epsilon}} \cdot w

    The arguments are :func:`rms_norm`'s, in its order, so that one stands in for the other; but that ``normalized_shape``
    may be left out, as who has heads of queries need not name their size: ``l2_norm(query)``.

    It is the ``l2norm`` of Gated DeltaNet, as fla and transformers' Qwen3-Next have it.
    :func:`torch.nn.functional.normalize` is another: :math:`x / \max(\lVert x \rVert, \epsilon)`, whose :math:`\epsilon`
    is a bound on the norm, 1e-12 by default, and not a term of its square. Where :math:`\lVert x \rVert^2` is far above
    :math:`\epsilon` the two agree. A row of zeros gives 0 in both; its gradient here is
    :math:`dy \cdot w / \sqrt{\epsilon}`.

    Args:
        input: ``(*, *normalized_shape)``; float16, bfloat16, float32 or float64. Any strides; where the normalized dims are
            not one run of memory it is copied. It may be heads in a packed projection.
        normalized_shape: the sizes of the dims that the sum runs over. None is the last one.
        weight: ``normalized_shape``, any of the dtypes above, not necessarily the input's; None is 1.
        eps: added to the sum of squares; >= 0.
        cast, batch_invariant: as :func:`rms_norm`.

    Returns:
        A contiguous tensor of the input's shape and dtype (fp32 where autocast makes :func:`rms_norm` return that).
        Statistics, products and sums are fp32, fp64 as soon as one of the tensors is; rows whose squares fp32 does not hold
        are scaled by a power of two. Norms above 8.5e37, whose inverse is subnormal, have fewer digits. Rows of more than
        1,048,576 elements have torch's own operators.

    Raises:
        RuntimeError: a shape does not fit, or the tensors are on different devices.
        NotImplementedError: a dtype other than the four.
        TypeError: an argument of the wrong kind.
        ValueError: eps is negative or NaN, or ``cast`` is none of its values.

    Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule", arXiv:2412.06464.
    """
    tensors = input, weight
    if has_torch_function_variadic(*tensors):
        how: dict[str, Any] = dict(weight=weight, eps=eps, cast=cast, batch_invariant=batch_invariant)
        return handle_torch_function(l2_norm, tensors, input, normalized_shape, **how)
    return _of_rows("l2_norm", tensors, normalized_shape, eps, cast, batch_invariant, divisor=1)


def scale_norm(
    input: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    batch_invariant: bool | None = None,
) -> Tensor:
    r"""L2 normalization of the last dim, to a length that is learned: ScaleNorm.

    .. math::
        y = g \cdot \frac{x}{\sqrt{\sum x^2 + \epsilon}}

    The paper bounds :math:`\lVert x \rVert` from below by its epsilon, 1e-5; here it is a term of the square, as in
    :func:`l2_norm`.

    Args:
        input: ``(*, N)``; as :func:`l2_norm`'s.
        weight: g, a tensor of one element and at most one dim; any of the four dtypes. Its gradient is summed in fp32
            (fp64) and in a fixed order.
        eps, batch_invariant: as :func:`l2_norm`.

    Returns:
        As :func:`l2_norm`.

    Raises:
        RuntimeError, NotImplementedError, TypeError, ValueError: as :func:`l2_norm`.

    Source: Nguyen, Salazar, "Transformers without Tears: Improving the Normalization of Self-Attention", arXiv:1910.05895.
    """
    tensors = input, weight
    if has_torch_function_variadic(*tensors):
        how: dict[str, Any] = dict(eps=eps, batch_invariant=batch_invariant)
        return handle_torch_function(scale_norm, tensors, input, weight, **how)
    op = "scale_norm"
    check_inputs(op, input, weight=weight)
    if input.dim() < 1:
        raise RuntimeError(f"{op}(): input has no dims; it must be (..., N)")
    if weight.dim() > 1 or weight.numel() != 1:
        raise RuntimeError(f"{op}(): weight has shape {tuple(weight.shape)}; it must be () or (1,), of one element")
    # A row's weights, each g; widened first, so that torch's sum of their gradients rounds as the kernels do.
    # By its element, as what is sharded by its one dim DTensor does not expand.
    row = weight.to(road.accumulator_dtype(input, weight))
    row = (row[0] if row.dim() else row).expand(input.shape[-1:])
    return _of_rows(op, (input, row), None, eps, "output", batch_invariant, divisor=1)


def partial_rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    p: float | None = None,
    count: int | None = None,
    cast: Cast = "output",
    batch_invariant: bool | None = None,
) -> Tensor:
    r"""Root mean square normalization by the mean square of the first elements of a row: pRMSNorm.

    .. math::
        y = \frac{x}{\sqrt{\frac{1}{k} \sum_{i < k} x_i^2 + \epsilon}} \cdot w, \qquad k = \lceil p N \rceil

    Args:
        input, normalized_shape, weight, eps, cast, batch_invariant: as :func:`rms_norm`. Of several normalized dims the
            elements count in the order of memory.
        p: what part of the N elements; above 0 and at most 1. None is 1/16, as in the paper.
        count: k itself, in place of p; from 1 to N.

    Returns:
        As :func:`l2_norm`.

    Raises:
        RuntimeError, NotImplementedError: as :func:`l2_norm`.
        TypeError: an argument of the wrong kind, or both p and count.
        ValueError: as :func:`l2_norm`; p or count is out of its range.

    Source: Zhang, Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
    """
    tensors = input, weight
    if has_torch_function_variadic(*tensors):
        how: dict[str, Any] = dict(weight=weight, eps=eps, p=p, count=count, cast=cast, batch_invariant=batch_invariant)
        return handle_torch_function(partial_rms_norm, tensors, input, normalized_shape, **how)
    if normalized_shape is None:
        checks.sizes("partial_rms_norm", normalized_shape)
    eps = checks.own_epsilon(RMS_NORM, input, eps)
    return _of_rows("partial_rms_norm", tensors, normalized_shape, eps, cast, batch_invariant, part=(p, count))


# (p, count) of partial RMSNorm, as its caller gave them.
_Part = tuple[float | None, int | None]


def _of_rows(
    op: str,
    tensors: tuple[Tensor, Tensor | None],
    normalized_shape: Sequence[int] | None,
    eps: float,
    cast: Cast,
    batch_invariant: bool | None,
    *,
    divisor: int | None = None,
    part: _Part | None = None,
) -> Tensor:
    """The norm by the sum of squares over ``divisor``, or by the mean square of a part. normalized_shape: None is the last
    dim's.
    """
    x, weight = tensors
    inputs = x, None, weight, None
    plain = are_plain(eps, batch_invariant) and (normalized_shape is None or isinstance(normalized_shape, tuple))
    # What a call is recalled by: an equal number of another type may be no good.
    asked: tuple[Any, ...] | None = None
    if plain:
        types = *map(type, normalized_shape or ()), *map(type, part or ())
        asked = op, normalized_shape, types, part, eps, cast, batch_invariant
    if asked is not None and (call := conditioned.CALLS.recall(asked, *inputs)) is not None:
        return call(*inputs)
    if normalized_shape is None:
        checks.tensor(op, "input", x)
        if x.dim() < 1:
            raise RuntimeError(f"{op}(): input has no dims; it must be (..., N)")
        normalized_shape = (1,) if x.is_nested else x.shape[-1:]  # refused next; of strided layout it has no shape
    shape, eps, invariant = checks.rows(op, x, normalized_shape, weight, None, eps, cast, batch_invariant)
    size = shape.numel()
    count = None if part is None else _count(op, *part, size)
    spec = ConditionedNorm(RMS_NORM.with_cast(cast), counted=count, divisor=count if divisor is None else divisor)
    return conditioned_norm(op, spec, len(shape), size, eps, asked, invariant, *inputs)


def count_of(p: float, n: int) -> int:
    """⌈p·n⌉."""
    return math.ceil(p * n * _LESS_ROUNDINGS)


def _count(op: str, p: float | None, count: int | None, n: int) -> int:
    """How many of n elements count."""
    if p is not None and count is not None:
        raise TypeError(f"{op}(): p is {p!r} and count is {count!r}; only one of them may be given")
    if count is not None:
        if not isinstance(count, (int, torch.SymInt)) or isinstance(count, bool):
            raise TypeError(f"{op}(): count must be an int or None, not {count!r}")
        if not 1 <= count <= n:
            raise ValueError(f"{op}(): count is {count}; it must be from 1 to {n}, the elements of a row")
        return count
    p = PART if p is None else p
    if not isinstance(p, (float, int)) or isinstance(p, bool):
        raise TypeError(f"{op}(): p must be a float or None, not {p!r}")
    if not 0 < p <= 1:
        raise ValueError(f"{op}(): p is {p}; it must be above 0 and at most 1")
    return count_of(p, n)
