"""Conditioned norms without Triton: the definition in float64, and ATen's ops, differentiable any number of times.

Of each: the norm of rows of ``size`` elements, of which the last ``dims`` dims of x hold one or, of one dim, several. gate
has x's shape; weight and bias are broadcast to it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..reference import Exact
from ..spec import LAYER_NORM, RMS_NORM, ConditionedNorm, GateActivation

Gradients = tuple[Tensor | None, ...]


def oracle(
    spec: ConditionedNorm,
    dims: int,
    size: int,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Exact:
    """The definition: ``n = x̂·(weight + offset) + bias``, times a(gate), or x is, before it is normalized."""
    lift, lower, quiet = reference.precise(x, gate, weight, bias)
    with quiet:
        x, gate, weight, bias = (None if t is None else lift(t) for t in (x, gate, weight, bias))  # type: ignore[assignment]
        mean, rstd, _, n = _normalized(spec, dims, size, x, gate, weight, bias, eps)
        y = n if spec.gate is None or spec.gate_first else n * _activated(gate, spec.gate)
        return Exact(lower(y), lower(mean).flatten(), lower(rstd).flatten())


def oracle_gradients(
    spec: ConditionedNorm,
    dims: int,
    size: int,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dy: Tensor,
) -> Gradients:
    """(dx, dgate, dweight, dbias) in closed form; None of what is None."""
    lift, lower, quiet = reference.precise(x, gate, weight, bias)
    given = x, gate, weight, bias
    with quiet:
        x, gate, weight, bias = (None if t is None else lift(t) for t in given)  # type: ignore[assignment]
        found = _gradients(spec, dims, size, x, gate, weight, bias, eps, lift(dy))
        return tuple(None if t is None else lower(g) for t, g in zip(given, found, strict=True))


def composite(
    spec: ConditionedNorm,
    dims: int,
    size: int,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """The same by torch's own ops: in fp32, or fp64, and rounded once, at the end, to ``dtype``; or, by a spec that rounds,
    at each step, as models do that write it so.
    """
    given = [t for t in (x, gate, weight, bias) if t is not None]
    wide = torch.float64 if any(t.dtype == torch.float64 for t in given) else torch.float32
    s, plain = x.to(wide), LAYER_NORM if spec.norm.center else RMS_NORM
    if gate is not None and spec.gate_first:
        s = s * activated(gate.to(wide), spec.gate)
    if _is_whole(spec):
        shape = (size,) if dims == 1 else x.shape[-dims:]
        rows = s.unflatten(-1, (-1, size)) if s.shape[-dims:].numel() != size else s
        n = reference.composite(plain, rows, shape, None, None, eps, wide).reshape(x.shape)
    else:
        rows = s.flatten(s.dim() - dims)
        rows = rows.unflatten(-1, (-1, size)) if rows.shape[-1] != size else rows
        n = (rows * (_power(spec, rows) + eps).rsqrt()).reshape(x.shape)
    if spec.norm.rounded:
        n = _rounded(n, dtype)
    if weight is not None:
        n = n * (weight.to(wide) + spec.offset if spec.offset else weight.to(wide))
    if bias is not None:
        n = n + bias.to(wide)
    if gate is not None and not spec.gate_first:
        if rounds_before_gate(spec, weight, dtype):
            n = _rounded(n, dtype)
        n = n * activated(gate.to(wide), spec.gate)
    return n.to(dtype)


def composite_gradients(
    spec: ConditionedNorm,
    dims: int,
    size: int,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dy: Tensor,
    dtype: torch.dtype,
) -> Gradients:
    """Those of oracle_gradients by ATen's ops, in fp64: a differentiable function of all but eps. dtype: y's."""
    given = x, gate, weight, bias
    rounds = rounds_before_gate(spec, weight, dtype)
    x, gate, weight, bias = (None if t is None else t.double() for t in given)  # type: ignore[assignment]
    found = _gradients(spec, dims, size, x, gate, weight, bias, eps, dy.double(), dtype, rounds)
    return tuple(None if t is None else g.to(t.dtype) for t, g in zip(given, found, strict=True))


def rounds_before_gate(spec: ConditionedNorm, weight: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether what the norm gives is rounded to y's dtype before the gate, as where a model's weight has that dtype."""
    behind = spec.gate is not None and not spec.gate_first
    return spec.norm.rounded and behind and (weight is None or weight.dtype == dtype)


def activated(gate: Tensor, activation: GateActivation | None) -> Tensor:
    """a(gate), by torch's own op."""
    return torch.sigmoid(gate) if activation == "sigmoid" else torch.nn.functional.silu(gate)


def statistics(
    spec: ConditionedNorm, dims: int, size: int, x: Tensor, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(mean, rstd) of every row, in ATen's ops and float64."""
    gate = None if gate is None else gate.double()
    mean, rstd, *_ = _normalized(spec, dims, size, x.double(), gate, None, None, eps)
    return mean.squeeze(-1), rstd.squeeze(-1)


def _rounded(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded in value alone: the gradient too would be, by the casts, and overflow in fp16."""
    return t + (t.to(dtype).to(t.dtype) - t).detach()


def _is_whole(spec: ConditionedNorm) -> bool:
    """Whether rstd is of the mean square, or the variance, of all of a row."""
    return spec.counted is None and spec.divisor is None


# What follows is of torch tensors and of numpy arrays alike.


def _power(spec: ConditionedNorm, rows: Any) -> Any:
    """The sum of the squares of what counts, over the divisor, ``[..., 1]``."""
    count, divisor = spec.statistic(rows.shape[-1])
    head = rows[..., :count]
    return (head * head).sum(axis=-1, keepdims=True) / divisor


def _of_rows(spec: ConditionedNorm, rows: Any, eps: float) -> tuple[Any, Any, Any]:
    """(mean, rstd, x̂) of rows."""
    if _is_whole(spec):
        return reference._normalized(spec.norm, rows, 1, eps)
    rstd = 1 / (_power(spec, rows) + eps) ** 0.5
    return 0 * rstd, rstd, rows * rstd


def _gradient_of_rows(spec: ConditionedNorm, xhat: Any, rstd: Any, g: Any) -> Any:
    """``rstd·(g - [i < K]·x̂·Σ(g·x̂)/D)``, or, of all of a row, the norm's own."""
    if _is_whole(spec):
        return reference._gradients(spec.norm, xhat, rstd, 1, None, g)[0]
    count, divisor = spec.statistic(xhat.shape[-1])
    moved = g - xhat * ((g * xhat).sum(axis=-1, keepdims=True) / divisor)
    if isinstance(g, Tensor):
        return rstd * torch.where(torch.arange(xhat.shape[-1], device=g.device) < count, moved, g)
    import numpy as np

    return rstd * np.where(np.arange(xhat.shape[-1]) < count, moved, g)


def _normalized(
    spec: ConditionedNorm, dims: int, size: int, x: Any, gate: Any, weight: Any, bias: Any, eps: float, dtype: Any = None
) -> tuple[Any, Any, Any, Any]:
    """(mean, rstd, x̂ and n in x's shape); the first two of rows. dtype: what x̂ is rounded to where it meets the
    weight.
    """
    s = x * _activated(gate, spec.gate) if spec.gate_first else x
    rows = s.reshape(_rows(x.shape, dims, size))
    mean, rstd, xhat = _of_rows(spec, rows, eps)
    n = xhat = xhat.reshape(x.shape)
    if dtype is not None and spec.norm.rounded:
        n = n.to(dtype).double()
    n = n if weight is None else n * (weight + spec.offset)
    return mean, rstd, xhat, n if bias is None else n + bias


def _rows(shape: Any, dims: int, size: int) -> tuple[int, ...]:
    """``(*, rows in the last dims, size)``. By no -1, which has no value where there are no elements."""
    leading = len(shape) - dims
    return *shape[:leading], math.prod(shape[leading:]) // size, size


def _gradients(
    spec: ConditionedNorm,
    dims: int,
    size: int,
    x: Any,
    gate: Any,
    weight: Any,
    bias: Any,
    eps: float,
    dy: Any,
    dtype: Any = None,
    rounds_n: bool = False,
) -> tuple[Any, Any, Any, Any]:
    """(dx, dgate, dweight, dbias); docs/mathematics.md derives them. dtype, rounds_n: what x̂ is rounded to where it meets
    the weight, and whether n is before the gate.
    """
    _, rstd, xhat, n = _normalized(spec, dims, size, x, gate, weight, bias, eps, dtype)
    a = None if gate is None else _activated(gate, spec.gate)
    dn = dy if a is None or spec.gate_first else dy * a
    g = dn if weight is None else dn * (weight + spec.offset)
    rows = xhat.reshape(_rows(x.shape, dims, size))
    dx = _gradient_of_rows(spec, rows, rstd, g.reshape(rows.shape)).reshape(x.shape)
    dgate = None
    if a is not None:
        met = n.to(dtype).double() if rounds_n else n
        dgate = (dx * x if spec.gate_first else dy * met) * _derivative(gate, a, spec.gate)
        dx = dx * a if spec.gate_first else dx
    weighted = xhat.to(dtype).double() if dtype is not None and spec.norm.rounded else xhat
    dw = None if weight is None else summed_to(dn * weighted, weight.shape)
    return dx, dgate, dw, None if bias is None else summed_to(dn, bias.shape)


def _activated(gate: Any, activation: GateActivation | None) -> Any:
    if isinstance(gate, Tensor):
        s = gate.sigmoid()
    else:
        import numpy as np

        s = 1 / (1 + np.exp(-gate))
    return s if activation == "sigmoid" else gate * s


def _derivative(gate: Any, a: Any, activation: GateActivation | None) -> Any:
    """a'(gate)."""
    if activation == "sigmoid":
        return a * (1 - a)
    s = _activated(gate, "sigmoid")
    return s + a * (1 - s)


def summed_to(t: Any, shape: tuple[int, ...]) -> Any:
    """The sum of t over what a tensor of this shape is broadcast along."""
    beyond = t.ndim - len(shape)
    along = tuple(i for i in range(t.ndim) if i < beyond or (shape[i - beyond] == 1 and t.shape[i] != 1))
    return (t.sum(axis=along, keepdims=True) if along else t).reshape(shape)
