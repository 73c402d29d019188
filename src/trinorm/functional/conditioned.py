"""Conditioned norms as functions: rows with a scale and a shift of their own, and gates (functional re-exports them).

Heads with weights of their own are functional/per_head.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import checks
from ..ops import conditioned, conditioned_norm
from ..spec import GATE_ACTIVATIONS, LAYER_NORM, RMS_NORM, Cast, ConditionedNorm, GateActivation, RowNorm


def modulated_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    scale: Tensor,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    batch_invariant: bool | None = None,
) -> Tensor:
    r"""Layer normalization whose result a condition scales and shifts (adaLN, FiLM), in one pass.

    .. math::
        y = \left(\frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \cdot w + b\right) \cdot (1 + scale) + shift

    Args:
        input: ``(*, *normalized_shape)``; float16, bfloat16, float32 or float64, any strides.
        normalized_shape: the sizes of the dims that share statistics.
        scale: its last dims are ``normalized_shape``, and those before are broadcast to the input's: one for each sample
            (``(B, 1, N)`` beside ``(B, T, N)``), for each token, or for all (``(N,)``). Any of the dtypes above, any
            strides: a chunk of one projection is read where it lies.
        shift: as scale; None is 0.
        weight, bias: the norm's own, as :func:`layer_norm`'s. They are multiplied into scale and shift beforehand, by
            torch's operators in fp32 (fp64), which costs a pass over these.
        eps, batch_invariant: as :func:`layer_norm`.

    Returns:
        A contiguous tensor of the input's shape and dtype (fp32 where autocast makes :func:`layer_norm` return that).
        Statistics, products and sums are fp32, fp64 as soon as one of the tensors is. Rows of more than
        1,048,576 elements have torch's own operators.

    Raises:
        RuntimeError: a shape does not fit, or the tensors are on different devices.
        NotImplementedError: a dtype other than the four.
        TypeError: an argument of the wrong kind.
        ValueError: eps is negative or NaN.

    Sources: Ba, Kiros, Hinton, "Layer Normalization", arXiv:1607.06450; Peebles, Xie, "Scalable Diffusion Models with
    Transformers", arXiv:2212.09748 (adaLN); Perez, Strub, de Vries, Dumoulin, Courville, "FiLM: Visual Reasoning with a
    General Conditioning Layer", arXiv:1709.07871.
    """
    tensors = input, scale, shift, weight, bias
    if has_torch_function_variadic(*tensors):
        how: dict[str, Any] = dict(shift=shift, weight=weight, bias=bias, eps=eps, batch_invariant=batch_invariant)
        return handle_torch_function(modulated_layer_norm, tensors, input, normalized_shape, scale, **how)
    return _modulated(LAYER_NORM, normalized_shape, tensors, eps, batch_invariant)


def modulated_rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    scale: Tensor,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    batch_invariant: bool | None = None,
) -> Tensor:
    r"""Root mean square normalization whose result a condition scales and shifts.

    .. math::
        y = \frac{x}{\sqrt{\mathrm{E}[x^2] + \epsilon}} \cdot w \cdot (1 + scale) + shift

    Args:
        input, normalized_shape, scale, shift, weight, batch_invariant: as :func:`modulated_layer_norm`.
        eps: as :func:`rms_norm`.

    Returns:
        As :func:`modulated_layer_norm`.

    Raises:
        RuntimeError, NotImplementedError, TypeError, ValueError: as :func:`modulated_layer_norm`.

    Sources: Zhang, Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467; and as :func:`modulated_layer_norm`.
    """
    tensors = input, scale, shift, weight
    if has_torch_function_variadic(*tensors):
        how: dict[str, Any] = dict(shift=shift, weight=weight, eps=eps, batch_invariant=batch_invariant)
        return handle_torch_function(modulated_rms_norm, tensors, input, normalized_shape, scale, **how)
    return _modulated(RMS_NORM, normalized_shape, (*tensors, None), eps, batch_invariant)


def gated_layer_norm(
    input: Tensor,
    gate: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    group_size: int | None = None,
    activation: GateActivation = "silu",
    norm_before_gate: bool = True,
    cast: Cast = "output",
    batch_invariant: bool | None = None,
) -> Tensor:
    r"""Layer normalization of the last dim, or of groups of it, before or behind a gate, in one pass.

    .. math::
        y = \left(\frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \cdot w + b\right) \cdot a(z)

    or, with ``norm_before_gate=False``, the same norm of :math:`x \cdot a(z)`.

    Args:
        input: x, ``(*, N)``; float16, bfloat16, float32 or float64. Any strides; where the last dim is not contiguous it is
            copied.
        gate: z, of the input's shape, any of the dtypes above, any strides: a chunk of a projection is read where it lies.
        weight: ``(N,)``, any of the dtypes above, not necessarily the input's; None is 1.
        bias: as weight; None is 0.
        eps: added to the variance; >= 0.
        group_size: how many elements beside each other share statistics; it divides N. None is all of them.
        activation: a: "silu" (z·σ(z)) or "sigmoid" (σ(z)).
        norm_before_gate: whether the gate multiplies what the norm gives (Gated DeltaNet), or what it is given (Mamba2).
        cast: as :func:`layer_norm`. With "llama" and the gate behind the norm, what the norm gives is rounded to the
            input's dtype too, where the weight has that dtype, as by transformers' ``Qwen3NextRMSNormGated``.
        batch_invariant: as :func:`layer_norm`.

    Returns:
        A contiguous tensor of the input's shape and dtype (fp32 where autocast makes :func:`layer_norm` return that).
        Statistics, products and sums are fp32, fp64 as soon as one of the tensors is. Groups of more than
        1,048,576 elements have torch's own operators.

    Raises:
        RuntimeError: a shape does not fit, or the tensors are on different devices.
        NotImplementedError: a dtype other than the four.
        TypeError: an argument of the wrong kind.
        ValueError: eps is negative or NaN, group_size does not divide N, or ``activation`` or ``cast`` is none of its
            values.

    Sources: Ba, Kiros, Hinton, "Layer Normalization", arXiv:1607.06450; and as :func:`gated_rms_norm`.
    """
    tensors = input, gate, weight, bias
    by = eps, group_size, activation, norm_before_gate, cast, batch_invariant
    if has_torch_function_variadic(*tensors):
        return _overridden(gated_layer_norm, tensors, by)
    return _gated(LAYER_NORM, tensors, by)


def gated_rms_norm(
    input: Tensor,
    gate: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = None,
    *,
    group_size: int | None = None,
    activation: GateActivation = "silu",
    norm_before_gate: bool = True,
    cast: Cast = "output",
    batch_invariant: bool | None = None,
) -> Tensor:
    r"""Root mean square normalization of the last dim, or of groups of it, before or behind a gate, in one pass.

    .. math::
        y = \left(\frac{x}{\sqrt{\mathrm{E}[x^2] + \epsilon}} \cdot w + b\right) \cdot a(z)

    or, with ``norm_before_gate=False``, the same norm of :math:`x \cdot a(z)`.

    Args:
        input, gate, weight, bias, group_size, activation, norm_before_gate, cast, batch_invariant: as
            :func:`gated_layer_norm`.
        eps: as :func:`rms_norm`.

    Returns:
        As :func:`gated_layer_norm`.

    Raises:
        RuntimeError, NotImplementedError, TypeError, ValueError: as :func:`gated_layer_norm`.

    Sources: Zhang, Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467; Dao, Gu, "Transformers are SSMs",
    arXiv:2405.21060 (Mamba2); Yang, Kautz, Hatamizadeh, "Gated Delta Networks", arXiv:2412.06464.
    """
    tensors = input, gate, weight, bias
    by = eps, group_size, activation, norm_before_gate, cast, batch_invariant
    if has_torch_function_variadic(*tensors):
        return _overridden(gated_rms_norm, tensors, by)
    return _gated(RMS_NORM, tensors, by)


def _modulated(
    norm: RowNorm,
    normalized_shape: Sequence[int],
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None],
    eps: float | None,
    batch_invariant: bool | None,
) -> Tensor:
    x, scale, shift, weight, bias = tensors
    op = f"modulated_{norm.name}"
    plain = are_plain(eps, batch_invariant) and isinstance(normalized_shape, tuple)
    asked: tuple[Any, ...] | None = (
        (op, normalized_shape, *map(type, normalized_shape), eps, batch_invariant) if plain else None
    )
    alone = weight is None and bias is None
    if asked is not None and alone and (call := conditioned.CALLS.recall(asked, x, None, scale, shift)) is not None:
        return call(x, None, scale, shift)
    eps = checks.own_epsilon(norm, x, eps)
    shape, eps, invariant = checks.rows(op, x, normalized_shape, weight, bias, eps, "output", batch_invariant)
    check_inputs(op, x, ("shift",), scale=scale, shift=shift)
    check_broadcast(op, x, shape, scale=scale, shift=shift)
    if not alone:
        scale, shift = folded(x.dtype, scale, shift, weight, bias)
        asked = None if asked is None else (*asked, "folded")
        if asked is not None and (call := conditioned.CALLS.recall(asked, x, None, scale, shift)) is not None:
            return call(x, None, scale, shift)
    spec = ConditionedNorm(norm, modulated=alone)
    return conditioned_norm(op, spec, len(shape), shape.numel(), eps, asked, invariant, x, None, scale, shift)


def folded(
    dtype: torch.dtype, scale: Tensor, shift: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """``w·(1 + scale)`` and ``b·(1 + scale) + shift``: weight and bias of the same norm. dtype: the input's."""
    double = torch.float64 in (dtype, *(t.dtype for t in (scale, shift, weight, bias) if t is not None))
    wide = torch.float64 if double else torch.float32
    factor = 1 + scale.to(wide)
    if bias is not None:
        shift = bias.to(wide) * factor if shift is None else bias.to(wide) * factor + shift.to(wide)
    return factor if weight is None else weight.to(wide) * factor, shift


# eps, group_size, activation, norm_before_gate, cast and batch_invariant, as a caller of a gated norm gave them.
_By = tuple[float | None, int | None, GateActivation, bool, Cast, bool | None]


def _overridden(norm: Callable[..., Tensor], tensors: tuple[Any, ...], by: _By) -> Tensor:
    """What a tensor's or a mode's own __torch_function__ makes of the call."""
    eps, group_size, activation, norm_before_gate, cast, batch_invariant = by
    given: dict[str, Any] = dict(weight=tensors[2], bias=tensors[3], eps=eps, group_size=group_size, activation=activation)
    given.update(norm_before_gate=norm_before_gate, cast=cast, batch_invariant=batch_invariant)
    return handle_torch_function(norm, tensors, *tensors[:2], **given)


def _gated(norm: RowNorm, tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None], by: _By) -> Tensor:
    eps, group_size, activation, norm_before_gate, cast, batch_invariant = by
    plain = are_plain(eps, batch_invariant) and type(norm_before_gate) is bool
    plain = plain and (group_size is None or type(group_size) is int)
    # What a call is recalled by.
    asked = ("gated", norm.name, *by) if plain else None
    if asked is not None and (call := conditioned.CALLS.recall(asked, *tensors)) is not None:
        return call(*tensors)
    op = f"gated_{norm.name}"
    x, gate, weight, bias = tensors
    eps = checks.own_epsilon(norm, x, eps)
    check_inputs(op, x, ("weight", "bias"), gate=gate, weight=weight, bias=bias)
    if x.dim() < 1:
        raise RuntimeError(f"{op}(): input has no dims; it must be (..., N)")
    if gate.shape != x.shape:
        raise RuntimeError(f"{op}(): gate has shape {tuple(gate.shape)}; it must be the input's, {tuple(x.shape)}")
    n = x.shape[-1]
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.shape != (n,):
            raise RuntimeError(f"{op}(): {name} has shape {tuple(t.shape)}; it must be ({n},), the input's last dim")
    size = _group_size(op, group_size, n)
    eps = checks.epsilon(op, eps)
    checks.casting(op, cast)
    if not isinstance(activation, str) or activation not in GATE_ACTIVATIONS:
        of = ", ".join(map(repr, GATE_ACTIVATIONS))
        raise ValueError(f"{op}(): activation is {activation!r}; it must be one of {of}")
    checks.flag(op, "norm_before_gate", norm_before_gate)
    invariant = checks.invariance(op, batch_invariant)
    spec = ConditionedNorm(norm.with_cast(cast), activation, not norm_before_gate)
    return conditioned_norm(op, spec, 1, size, eps, asked, invariant, *tensors)


def _group_size(op: str, group_size: int | None, n: int) -> int:
    if group_size is None:
        return n
    if not isinstance(group_size, (int, torch.SymInt)) or isinstance(group_size, bool):
        raise TypeError(f"{op}(): group_size must be an int or None, not {group_size!r}")
    if group_size < 1 or n % group_size:
        raise ValueError(f"{op}(): group_size is {group_size}; it must divide the input's last dim, {n}")
    return group_size


def are_plain(eps: float | None, batch_invariant: bool | None) -> bool:
    """Whether these may be a part of what a call is recalled by."""
    return (eps is None or type(eps) is float) and (batch_invariant is None or type(batch_invariant) is bool)


def check_broadcast(op: str, x: Tensor, shape: torch.Size, **parameters: Tensor | None) -> None:
    """RuntimeError where one has no row for each of the input's, nor one for several."""
    for name, t in parameters.items():
        if t is not None and not conditioned.broadcasts(t, x, len(shape)):
            raise RuntimeError(
                f"{op}(): {name} has shape {tuple(t.shape)}, but input has {tuple(x.shape)} and normalized_shape is "
                f"{tuple(shape)}; {name} must end in that, and its dims before be broadcast to the input's"
            )


def check_inputs(op: str, x: Tensor, optional: tuple[str, ...] = (), **others: Any) -> None:
    """Of the tensors: kind, layout, dtype and device. optional: which may be None."""
    for name, t in dict(input=x, **others).items():
        if t is None and name in optional:
            continue
        checks.tensor(op, name, t, required=name not in optional)
        checks.strided(op, name, t)
        if t.is_nested:
            raise RuntimeError(f"{op}(): {name} is a nested tensor, which this norm does not take")
        checks.beside(op, name, t, x)
