"""Norms without statistics as functions (functional re-exports them)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import checks
from ..ops import inputs_only
from ..ops.dynamic import Dynamic
from ..spec import DYNAMIC_ERF, DYNAMIC_TANH, DynamicNorm
from .conditioned import check_inputs


def dynamic_tanh(
    input: Tensor,
    normalized_shape: Sequence[int],
    alpha: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    r"""Dynamic tanh (DyT), which stands where a normalization does: no statistics, each element alone.

    .. math::
        y = \tanh(\alpha x) \cdot w + b

    Args:
        input: ``(*, *normalized_shape)``; float16, bfloat16, float32 or float64. Any strides; where the normalized dims are
            not one run of memory it is copied.
        normalized_shape: the sizes of the dims that weight and bias have.
        alpha: of one element; any of the dtypes above, not necessarily the input's.
        weight: ``normalized_shape``, any of the dtypes above; None is 1.
        bias: as weight; None is 0.

    Returns:
        A contiguous tensor of the input's shape and dtype, under autocast too, which leaves torch's own tanh alone.
        Products and sums are fp32, fp64 as soon as one of the tensors is. The bits of a row's result, and of its gradient,
        do not depend on the rows beside it.

    Raises:
        RuntimeError: a shape does not fit ``normalized_shape``, alpha has not one element, or the tensors are on different
            devices.
        NotImplementedError: a dtype other than the four.
        TypeError: an argument of the wrong kind.

    Source: Zhu, Chen, He, LeCun, Liu, "Transformers without Normalization", CVPR 2025, arXiv:2503.10622.
    """
    tensors = input, alpha, weight, bias
    if has_torch_function_variadic(*tensors):
        given: dict[str, Any] = dict(weight=weight, bias=bias)
        return handle_torch_function(dynamic_tanh, tensors, input, normalized_shape, alpha, **given)
    return _dynamic(DYNAMIC_TANH, normalized_shape, input, alpha, None, weight, bias)


def dynamic_erf(
    input: Tensor,
    normalized_shape: Sequence[int],
    alpha: Tensor,
    shift: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    r"""Dynamic erf (Derf), which stands where a normalization does: no statistics, each element alone.

    .. math::
        y = \mathrm{erf}(\alpha x + s) \cdot w + b

    Args:
        input, normalized_shape, alpha, weight, bias: as :func:`dynamic_tanh`.
        shift: s; as alpha.

    Returns:
        As :func:`dynamic_tanh`.

    Raises:
        RuntimeError, NotImplementedError, TypeError: as :func:`dynamic_tanh`.

    Source: Chen, Lu, Zhu, Sun, Liu, "Stronger Normalization-Free Transformers", arXiv:2512.10938.
    """
    tensors = input, alpha, shift, weight, bias
    if has_torch_function_variadic(*tensors):
        given: dict[str, Any] = dict(weight=weight, bias=bias)
        return handle_torch_function(dynamic_erf, tensors, input, normalized_shape, alpha, shift, **given)
    return _dynamic(DYNAMIC_ERF, normalized_shape, *tensors)


def _dynamic(spec: DynamicNorm, normalized_shape: Sequence[int], *tensors: Any) -> Tensor:
    """Of (input, alpha, shift, weight, bias)."""
    op, asked = spec.name, None
    if isinstance(normalized_shape, tuple):
        asked = op, normalized_shape, *map(type, normalized_shape)
        if (call := inputs_only.CALLS.recall(asked, *tensors)) is not None:
            return call(*tensors)
    x, alpha, shift, weight, bias = tensors
    shape, *_ = checks.rows(op, x, normalized_shape, weight, bias, 0.0, "output", False)
    numbers = dict(alpha=alpha, shift=shift) if spec.shifted else dict(alpha=alpha)
    check_inputs(op, x, **numbers)
    for name, t in numbers.items():
        if t.numel() != 1:
            raise RuntimeError(f"{op}(): {name} has shape {tuple(t.shape)}; it must have one element, for all of the input")
    return inputs_only.inputs_only_norm(Dynamic(spec, len(shape)), asked, *tensors)
