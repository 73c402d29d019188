"""Conditioned norms of a gated sum as functions: adaLN-Zero's, and LayerScale's (functional re-exports them)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import checks
from ..ops import gated_sum, gated_sum_norm
from ..spec import LAYER_NORM, RMS_NORM, ConditionedNorm, RowNorm
from .conditioned import are_plain, check_broadcast, check_inputs, folded


def add_modulated_layer_norm(
    input: Tensor,
    residual: Tensor,
    gate: Tensor,
    normalized_shape: Sequence[int],
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    batch_invariant: bool | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Adds a gated branch to the residual, normalizes the sum, and scales and shifts what that gives, in one pass: what an
    adaLN-Zero block does between one branch and the next.

    .. math::
        s = r + g \cdot x, \qquad
        y = \left(\frac{s - \mathrm{E}[s]}{\sqrt{\mathrm{Var}[s] + \epsilon}} \cdot w + b\right) \cdot (1 + scale) + shift

    Both are returned: s is the next residual. With a gate for all, and weight and bias in place of scale and shift, it is
    LayerScale's residual and the norm behind it.

    Args:
        input: x, what a branch gave, ``(*, *normalized_shape)``; float16, bfloat16, float32 or float64, any strides.
        residual: r, of x's shape, any of the dtypes above; fp32 beside an x of 16 bits keeps the digits that each block
            would round off.
        gate: g; its last dims are ``normalized_shape``, and those before are broadcast to the input's: one for each sample
            (``(B, 1, N)`` beside ``(B, T, N)``), for each token, or for all (``(N,)``). Any of the dtypes above, any
            strides: a chunk of one projection is read where it lies.
        normalized_shape: the sizes of the dims that share statistics.
        scale, shift: as gate; None is 0. A shift needs a scale.
        weight, bias: as :func:`modulated_layer_norm`'s; without a scale they are the norm's own, as they are.
        eps, batch_invariant: as :func:`layer_norm`.

    Returns:
        (y, s), each contiguous and of x's shape. s has the dtype that torch promotes x's and r's to, and is rounded to it
        once, before it is normalized. y has x's dtype (fp32 where autocast makes :func:`layer_norm` return that).
        Statistics, products and sums are fp32, fp64 as soon as one of the tensors is. The gradients of gate, scale and
        shift are summed in a fixed order: the same bits on every run; in one pass where these three are broadcast along
        the same dims. Of rows of more than 8192 elements (2048 in fp64) the sum is taken by torch's own operator first.

    Raises:
        RuntimeError: a shape does not fit, there is a shift without a scale, or tensors are on different devices.
        NotImplementedError: a dtype other than the four.
        TypeError: an argument of the wrong kind.
        ValueError: eps is negative or NaN.

    Sources: Ba, Kiros, Hinton, "Layer Normalization", arXiv:1607.06450; Peebles, Xie, "Scalable Diffusion Models with
    Transformers", arXiv:2212.09748 (adaLN-Zero); Touvron, Cord, Sablayrolles, Synnaeve, Jégou, "Going deeper with Image
    Transformers", arXiv:2103.17239 (LayerScale).
    """
    tensors = input, residual, gate, scale, shift, weight, bias
    if has_torch_function_variadic(*tensors):
        return _overridden(add_modulated_layer_norm, tensors, normalized_shape, bias=bias, eps=eps, batch=batch_invariant)
    return _gated_sum(LAYER_NORM, normalized_shape, tensors, eps, batch_invariant)


def add_modulated_rms_norm(
    input: Tensor,
    residual: Tensor,
    gate: Tensor,
    normalized_shape: Sequence[int],
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    batch_invariant: bool | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The same with root mean square normalization.

    .. math::
        s = r + g \cdot x, \qquad y = \frac{s}{\sqrt{\mathrm{E}[s^2] + \epsilon}} \cdot w \cdot (1 + scale) + shift

    Args:
        input, residual, gate, normalized_shape, scale, shift, weight, batch_invariant: as
            :func:`add_modulated_layer_norm`.
        eps: as :func:`rms_norm`.

    Returns:
        As :func:`add_modulated_layer_norm`.

    Raises:
        RuntimeError, NotImplementedError, TypeError, ValueError: as :func:`add_modulated_layer_norm`.

    Sources: Zhang, Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467; and as
    :func:`add_modulated_layer_norm`.
    """
    tensors = input, residual, gate, scale, shift, weight
    if has_torch_function_variadic(*tensors):
        return _overridden(add_modulated_rms_norm, tensors, normalized_shape, eps=eps, batch=batch_invariant)
    return _gated_sum(RMS_NORM, normalized_shape, (*tensors, None), eps, batch_invariant)


def _overridden(
    norm: Callable[..., Any], tensors: tuple[Any, ...], normalized_shape: Sequence[int], *, batch: bool | None, **how: Any
) -> Any:
    """What a tensor's or a mode's own __torch_function__ makes of the call."""
    how.update(scale=tensors[3], shift=tensors[4], weight=tensors[5], batch_invariant=batch)
    return handle_torch_function(norm, tensors, *tensors[:3], normalized_shape, **how)


def _gated_sum(
    norm: RowNorm,
    normalized_shape: Sequence[int],
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    eps: float | None,
    batch_invariant: bool | None,
) -> tuple[Tensor, Tensor]:
    x, residual, gate, scale, shift, weight, bias = tensors
    op = f"add_modulated_{norm.name}"
    modulated = scale is not None
    alone = not modulated or (weight is None and bias is None)
    asked: tuple[Any, ...] | None = None
    if are_plain(eps, batch_invariant) and isinstance(normalized_shape, tuple):
        asked = op, normalized_shape, *map(type, normalized_shape), eps, batch_invariant, modulated, alone
    given = (scale, shift) if modulated else (weight, bias)
    recalled = gated_sum.CALLS.recall if asked is not None and alone and (modulated or shift is None) else None
    if recalled is not None and (call := recalled(asked, x, residual, gate, *given)) is not None:
        return call(x, residual, gate, *given)
    eps = checks.own_epsilon(norm, x, eps)
    shape, eps, invariant = checks.rows(op, x, normalized_shape, weight, bias, eps, "output", batch_invariant)
    check_inputs(op, x, ("scale", "shift"), residual=residual, gate=gate, scale=scale, shift=shift)
    if residual.shape != x.shape:
        raise RuntimeError(f"{op}(): residual has shape {tuple(residual.shape)}; it must be the input's, {tuple(x.shape)}")
    check_broadcast(op, x, shape, gate=gate, scale=scale, shift=shift)
    if scale is None and shift is not None:
        raise RuntimeError(f"{op}(): shift is given, but scale is None; give both, or weight and bias")
    if scale is not None and not alone:
        given = folded(x.dtype, scale, shift, weight, bias)
        if asked is not None and (call := gated_sum.CALLS.recall(asked, x, residual, gate, *given)) is not None:
            return call(x, residual, gate, *given)
    spec = ConditionedNorm(norm, modulated=modulated and alone)
    return gated_sum_norm(spec, len(shape), eps, asked, invariant, x, residual, gate, *given)
