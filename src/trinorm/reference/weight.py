"""Weight normalization without Triton: the definition in float64, and ATen's ops, differentiable any number of times."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference

Gradients = tuple[Tensor, Tensor]


def oracle(dim: int | None, v: Tensor, g: Tensor) -> Tensor:
    """The definition: ``g·v/‖v‖``, the norm over all dims but ``dim``, over all where that is None."""
    lift, lower, quiet = reference.precise(v, g)
    with quiet:
        return lower(_weight(dim, lift(v), lift(g)))


def oracle_gradients(dim: int | None, dw: Tensor, v: Tensor, g: Tensor) -> Gradients:
    """(dv, dg) in closed form."""
    lift, lower, quiet = reference.precise(v, g)
    with quiet:
        dv, dg = _gradients(dim, lift(dw), lift(v), lift(g))
        return lower(dv), lower(dg)


def composite(dim: int | None, v: Tensor, g: Tensor) -> Tensor:
    """The same by torch's own ops: in fp32, or fp64, and rounded once, at the end, to v's dtype."""
    wide = torch.float64 if torch.float64 in (v.dtype, g.dtype) else torch.float32
    return _weight(dim, v.to(wide), g.to(wide)).to(v.dtype)


def composite_gradients(dim: int | None, dw: Tensor, v: Tensor, g: Tensor) -> Gradients:
    """Those of oracle_gradients by ATen's ops, in fp64: a differentiable function of all."""
    return _gradients(dim, dw.double(), v.double(), g.double())


def g_shape(dim: int | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """That of the norms of a v of this shape, each dim kept."""
    return tuple(size if i == dim else 1 for i, size in enumerate(shape))


# What follows is of torch tensors and of numpy arrays alike.


def _summed(dim: int | None, t: Any) -> Any:
    """Over all dims but ``dim``, which are kept. By one more dim, as torch takes no dims to be all of them."""
    along = tuple(i for i in range(t.ndim + 1) if i != dim)
    return t[..., None].sum(axis=along, keepdims=True)[..., 0]


def _weight(dim: int | None, v: Any, g: Any) -> Any:
    norm = _summed(dim, v * v) ** 0.5
    return v / norm * g.reshape(norm.shape)


def _gradients(dim: int | None, dw: Any, v: Any, g: Any) -> tuple[Any, Any]:
    """docs/mathematics.md derives them."""
    norm = _summed(dim, v * v) ** 0.5
    u = v / norm
    dg = _summed(dim, dw * u)
    return g.reshape(norm.shape) / norm * (dw - u * dg), dg.reshape(g.shape)
