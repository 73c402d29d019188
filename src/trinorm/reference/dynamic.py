"""Norms without statistics, without Triton: the definition in float64, and ATen's ops, differentiable any number of times.

Of each: ``y = f(alpha·x + shift)·weight + bias``; alpha and shift have one element, weight and bias the shape of x's last
dims.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..spec import DynamicNorm
from .conditioned import Gradients, _activated, summed_to


def oracle(
    spec: DynamicNorm, x: Tensor, alpha: Tensor, shift: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """The definition."""
    given = x, alpha, shift, weight, bias
    lift, lower, quiet = reference.precise(*given)
    with quiet:
        x, alpha, shift, weight, bias = (None if t is None else lift(t) for t in given)  # type: ignore[assignment]
        f = _saturated(spec, _argument(x, alpha, shift))
        f = f if weight is None else f * weight
        return lower(f if bias is None else f + bias)


def oracle_gradients(
    spec: DynamicNorm,
    dy: Tensor,
    x: Tensor,
    alpha: Tensor,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Gradients:
    """(dx, dalpha, dshift, dweight, dbias) in closed form; None of what is None."""
    given = x, alpha, shift, weight, bias
    lift, lower, quiet = reference.precise(*given)
    with quiet:
        found = _gradients(spec, lift(dy), *(None if t is None else lift(t) for t in given))
        return tuple(None if t is None else lower(g) for t, g in zip(given, found, strict=True))


def composite(
    spec: DynamicNorm, x: Tensor, alpha: Tensor, shift: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """The same by torch's own ops: in fp32, or fp64, and rounded once, at the end, to x's dtype."""
    given = x, alpha, shift, weight, bias
    wide = torch.float64 if any(t is not None and t.dtype == torch.float64 for t in given) else torch.float32
    v = _argument(*(None if t is None else t.to(wide) for t in given[:3]))
    y = torch.tanh(v) if spec.function == "tanh" else torch.erf(v)
    y = y if weight is None else y * weight.to(wide)
    y = y if bias is None else y + bias.to(wide)
    return y.to(x.dtype)


def composite_gradients(
    spec: DynamicNorm,
    dy: Tensor,
    x: Tensor,
    alpha: Tensor,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Gradients:
    """Those of oracle_gradients by ATen's ops, in fp64: a differentiable function of all."""
    given = x, alpha, shift, weight, bias
    return _gradients(spec, dy.double(), *(None if t is None else t.double() for t in given))


# What follows is of torch tensors and of numpy arrays alike.


def _argument(x: Any, alpha: Any, shift: Any) -> Any:
    """v. Of one element, whatever their dims: a (1,) is no (1, 1), nor a longdouble array a number."""
    v = x * alpha.reshape(())
    return v if shift is None else v + shift.reshape(())


def _gradients(
    spec: DynamicNorm, dy: Any, x: Any, alpha: Any, shift: Any, weight: Any, bias: Any
) -> tuple[Any, Any, Any, Any, Any]:
    """docs/mathematics.md derives them."""
    v = _argument(x, alpha, shift)
    f = _saturated(spec, v)
    dv = (dy if weight is None else dy * weight) * _slope(spec, v)
    return (
        dv * alpha.reshape(()),
        summed_to(dv * x, alpha.shape),
        None if shift is None else summed_to(dv, shift.shape),
        None if weight is None else summed_to(dy * f, weight.shape),
        None if bias is None else summed_to(dy, bias.shape),
    )


def _saturated(spec: DynamicNorm, v: Any) -> Any:
    """f(v)."""
    if isinstance(v, Tensor):
        return torch.tanh(v) if spec.function == "tanh" else torch.erf(v)
    import numpy as np

    return np.tanh(v) if spec.function == "tanh" else _precise_erf(v)


def _slope(spec: DynamicNorm, v: Any) -> Any:
    """f'(v). That of tanh, 1 - tanh², as 4·σ(2v)·σ(-2v), which is no difference, and smooth."""
    if spec.function == "tanh":
        return 4 * _activated(2 * v, "sigmoid") * _activated(-2 * v, "sigmoid")
    if isinstance(v, Tensor):
        return torch.exp(-v * v) * (2 / torch.pi**0.5)
    import numpy as np

    return np.exp(-v * v) / np.sqrt(np.arctan(np.longdouble(1)))


def _precise_erf(v: Any) -> Any:
    """erf in longdouble, which numpy has not: Taylor's series about the nearest of the points k/16, whose terms have
    Hermite's polynomials and soon nothing left. Beyond 7 erf is 1, to 22 digits.
    """
    import numpy as np

    near = np.clip(np.where(np.isnan(v), 0, v), -7, 7)
    centre = np.rint(near * 16) / 16
    points, which = np.unique(centre, return_inverse=True)
    h = near - centre
    before, polynomial = 0 * h, 1 + 0 * h
    power, total = h, h
    for k in range(1, 16):
        before, polynomial = polynomial, -2 * centre * polynomial - 2 * (k - 1) * before
        power = power * h / (k + 1)
        total = total + polynomial * power
    slope = np.exp(-centre * centre) / np.sqrt(np.arctan(np.longdouble(1)))
    found = _erf_by_its_own_series(points)[which].reshape(centre.shape) + slope * total
    return np.where(np.isnan(v), v, np.where(np.abs(v) > 7, np.sign(v), found))


def _erf_by_its_own_series(v: Any) -> Any:
    """exp(-v²)·(2/√π)·Σ v·(2v²)^n/(1·3·…·(2n + 1)), whose terms have one sign, up to |v| = 7: for few numbers."""
    import numpy as np

    term = total = v / np.sqrt(np.arctan(np.longdouble(1)))
    for n in range(1, 200):
        term = term * (2 * v * v / (2 * n + 1))
        total = total + term
    return np.exp(-v * v) * total
