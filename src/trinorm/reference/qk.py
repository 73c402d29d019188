"""QK-norm without Triton: the definition in float64, and ATen's ops, differentiable any number of times."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..spec import RowNorm


def oracle(
    spec: RowNorm, x: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None, interleaved: bool
) -> Tensor:
    """The definition, of queries or of keys: ``n = x·(mean(x²) + eps)^-1/2·(weight + offset)`` over the last dim, and of
    the pairs (a, b) of n's first elements ``a·cos - b·sin`` and ``b·cos + a·sin``. cos and sin are those of x's tokens.
    """
    lift, lower, quiet = reference.precise(x, weight, cos, sin)
    with quiet:
        _, _, n = reference._normalized(spec, lift(x), 1, eps)
        n = n if weight is None else n * (lift(weight) + spec.offset)
        return lower(n if cos is None or sin is None else _turned(n, lift(cos), lift(sin), interleaved, 1))


def oracle_gradients(
    spec: RowNorm,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    dy: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """(dx, dw) in closed form: RMSNorm's of what the rotation's transpose makes of dy."""
    lift, lower, quiet = reference.precise(x, weight, cos, sin)
    with quiet:
        dn = lift(dy)
        dn = dn if cos is None or sin is None else _turned(dn, lift(cos), lift(sin), interleaved, -1)
        _, rstd, xhat = reference._normalized(spec, lift(x), 1, eps)
        dx, dw, _ = reference._gradients(spec, xhat, rstd, 1, None if weight is None else lift(weight), dn)
        return lower(dx), None if weight is None else lower(dw)


def _turned(n: Any, cos: Any, sin: Any, interleaved: bool, way: int) -> Any:
    """Pair by pair, of torch tensors or numpy arrays alike; with -1 for way by the rotation's transpose."""
    r = cos.shape[-1]
    first, second = (slice(0, r, 2), slice(1, r, 2)) if interleaved else (slice(0, r // 2), slice(r // 2, r))
    cos, sin, y = cos[..., None, :], sin[..., None, :], n * 1
    into_first, into_second = (sin[..., first], sin[..., second])[::way]
    y[..., first] = n[..., first] * cos[..., first] - way * n[..., second] * into_first
    y[..., second] = n[..., second] * cos[..., second] + way * n[..., first] * into_second
    return y


def composite(
    spec: RowNorm, x: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None, interleaved: bool
) -> Tensor:
    """The same by torch's own ops, in x's dtype: rounded once, at the end, or, by a spec that rounds, at each step, as
    models do that write it so.
    """
    tensors = [t for t in (x, weight, cos, sin) if t is not None]
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    narrow = x.dtype if spec.rounded else wide
    n = reference.composite(spec, x, x.shape[-1:], weight, None, eps, narrow)
    return (n if cos is None or sin is None else rotated(n, cos, sin, interleaved)).to(x.dtype).contiguous()


def composite_gradients(
    spec: RowNorm,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    dy: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """(dx, dw) of the closed form, in fp64: a differentiable function of x, weight and dy."""
    dn = dy.double()
    if cos is not None and sin is not None:
        dn = unrotated(dn, cos.double(), sin.double(), interleaved)
    dx, dw, _ = reference.composite_gradients(spec, x, 1, weight, None, eps, dn, x.dtype)
    assert dx is not None
    return dx, dw


def rotated(n: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The rotary embedding of the first elements of every head, as many as cos has for a token."""
    turned, rest = n.tensor_split((cos.shape[-1],), -1)
    turned = turned * cos.unsqueeze(-2) + _partners(turned, interleaved) * sin.unsqueeze(-2)
    return torch.cat((turned, rest.to(turned.dtype)), -1) if rest.shape[-1] else turned


def unrotated(dy: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The gradient of n, of rotated's. ``_partners`` is antisymmetric: its transpose is its negative."""
    turned, rest = dy.tensor_split((cos.shape[-1],), -1)
    turned = turned * cos.unsqueeze(-2) - _partners(turned * sin.unsqueeze(-2), interleaved)
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


def _partners(t: Tensor, interleaved: bool) -> Tensor:
    """Of each pair (a, b): (-b, a)."""
    if interleaved:
        return torch.stack((-t[..., 1::2], t[..., ::2]), -1).reshape(t.shape)
    first, second = t.chunk(2, -1)
    return torch.cat((-second, first), -1)
