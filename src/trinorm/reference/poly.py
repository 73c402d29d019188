"""PolyNorm without Triton: the definition in float64, and ATen's ops, differentiable any number of times."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .conditioned import Gradients, summed_to

# The powers, in the order of the weight.
POWERS = (3, 2, 1)


def oracle(eps: float, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The definition: ``Σ weight[i]·norm(x^k) + bias`` over k of POWERS, ``norm(u) = u·(mean(u²) + eps)^-1/2``."""
    lift, lower, quiet = reference.precise(x, weight, bias)
    with quiet:
        y = _polynomial(lift(x), lift(weight), eps)
        return lower(y if bias is None else y + lift(bias).reshape(()))


def oracle_gradients(eps: float, dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Gradients:
    """(dx, dweight, dbias) in closed form; None of what is None."""
    given = x, weight, bias
    lift, lower, quiet = reference.precise(*given)
    with quiet:
        lifted = [None if t is None else lift(t) for t in given]
        found = _gradients(eps, lift(dy), *lifted)
        return tuple(None if t is None else lower(g) for t, g in zip(given, found, strict=True))


def composite(eps: float, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same by torch's own ops: in fp32, or fp64, and rounded once, at the end, to x's dtype."""
    given = x, weight, bias
    wide = torch.float64 if any(t is not None and t.dtype == torch.float64 for t in given) else torch.float32
    y = _polynomial(x.to(wide), weight.to(wide), eps)
    return (y if bias is None else y + bias.to(wide).reshape(())).to(x.dtype)


def composite_gradients(eps: float, dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Gradients:
    """Those of oracle_gradients by ATen's ops, in fp64: a differentiable function of all but eps."""
    return _gradients(eps, dy.double(), x.double(), weight.double(), None if bias is None else bias.double())


# What follows is of torch tensors and of numpy arrays alike.


def _normalized(u: Any, eps: float) -> tuple[Any, Any]:
    """(norm(u), r)."""
    r = 1 / ((u * u).mean(axis=-1, keepdims=True) + eps) ** 0.5
    return u * r, r


def _polynomial(x: Any, weight: Any, eps: float) -> Any:
    n3, n2, n1 = (_normalized(x**k, eps)[0] for k in POWERS)
    return weight[0] * n3 + weight[1] * n2 + weight[2] * n1


def _gradients(eps: float, dy: Any, x: Any, weight: Any, bias: Any) -> tuple[Any, Any, Any]:
    """docs/mathematics.md derives them."""
    dx: Any = 0 * x
    parts: list[Any] = []
    for i, k in enumerate(POWERS):
        n, r = _normalized(x**k, eps)
        g = dy * n
        dx = dx + weight[i] * r * (dy - n * g.mean(axis=-1, keepdims=True)) * k * x ** (k - 1)
        parts.append(g.sum().reshape(1))
    return dx, _concatenated(parts), None if bias is None else summed_to(dy, bias.shape)


def _concatenated(parts: list[Any]) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    import numpy as np

    return np.concatenate(parts)
