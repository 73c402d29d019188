"""Norms of heads by weights of their own as functions (functional re-exports them)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import checks
from ..ops import conditioned, conditioned_norm
from ..spec import LAYER_NORM, RMS_NORM, Cast, ConditionedNorm, RowNorm
from .conditioned import are_plain, check_inputs


def per_head_layer_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    cast: Cast = "output",
    batch_invariant: bool | None = None,
) -> Tensor:
    r"""Layer normalization of each head, by a weight and a bias of its own.

    .. math::
        y_h = \frac{x_h - \mathrm{E}[x_h]}{\sqrt{\mathrm{Var}[x_h] + \epsilon}} \cdot w_h + b_h

    Args:
        input: ``(*, H, D)``; float16, bfloat16, float32 or float64. Any strides; where the last dim is not contiguous it is
            copied. It may be a view into a packed projection.
        weight: ``(H, D)``, any of the dtypes above, not necessarily the input's.
        bias: as weight; None is 0.
        eps, cast, batch_invariant: as :func:`layer_norm`.

    Returns:
        A contiguous tensor of the input's shape and dtype; as :func:`modulated_layer_norm`.

    Raises:
        RuntimeError, NotImplementedError, TypeError: as :func:`modulated_layer_norm`.
        ValueError: eps is negative or NaN, or ``cast`` is none of its values.

    Source: Ba, Kiros, Hinton, "Layer Normalization", arXiv:1607.06450.
    """
    tensors = input, weight, bias
    if has_torch_function_variadic(*tensors):
        how: dict[str, Any] = dict(bias=bias, eps=eps, cast=cast, batch_invariant=batch_invariant)
        return handle_torch_function(per_head_layer_norm, tensors, input, weight, **how)
    return _per_head(LAYER_NORM, input, weight, bias, eps, cast, batch_invariant)


def per_head_rms_norm(
    input: Tensor,
    weight: Tensor,
    eps: float | None = None,
    *,
    cast: Cast = "output",
    batch_invariant: bool | None = None,
) -> Tensor:
    r"""Root mean square normalization of each head, by a weight of its own.

    .. math::
        y_h = \frac{x_h}{\sqrt{\mathrm{E}[x_h^2] + \epsilon}} \cdot w_h

    Args:
        input, weight, cast, batch_invariant: as :func:`per_head_layer_norm`.
        eps: as :func:`rms_norm`.

    Returns:
        As :func:`per_head_layer_norm`.

    Raises:
        RuntimeError, NotImplementedError, TypeError, ValueError: as :func:`per_head_layer_norm`.

    Source: Zhang, Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
    """
    if has_torch_function_variadic(input, weight):
        how: dict[str, Any] = dict(eps=eps, cast=cast, batch_invariant=batch_invariant)
        return handle_torch_function(per_head_rms_norm, (input, weight), input, weight, **how)
    return _per_head(RMS_NORM, input, weight, None, eps, cast, batch_invariant)


def _per_head(
    norm: RowNorm,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float | None,
    cast: Cast,
    batch_invariant: bool | None,
) -> Tensor:
    tensors = input, None, weight, bias
    op = f"per_head_{norm.name}"
    # What a call is recalled by.
    asked = (op, eps, cast, batch_invariant) if are_plain(eps, batch_invariant) else None
    if asked is not None and (call := conditioned.CALLS.recall(asked, *tensors)) is not None:
        return call(*tensors)
    eps = checks.own_epsilon(norm, input, eps)
    check_inputs(op, input, ("bias",), weight=weight, bias=bias)
    if input.dim() < 2:
        raise RuntimeError(f"{op}(): input has shape {tuple(input.shape)}; it must be (..., heads, D)")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.shape != input.shape[-2:]:
            raise RuntimeError(
                f"{op}(): {name} has shape {tuple(t.shape)}; it must be {tuple(input.shape[-2:])}, the input's heads and "
                "their elements"
            )
    eps = checks.epsilon(op, eps)
    checks.casting(op, cast)
    invariant = checks.invariance(op, batch_invariant)
    spec = ConditionedNorm(norm.with_cast(cast))
    return conditioned_norm(op, spec, 1, input.shape[-1], eps, asked, invariant, *tensors)
