"""What may follow a norm at once: y = f(z) of z = x̂·w + b, plus a residual or not, and dL/dz = dL/dy·f'(z).

ACTIVATION is None, "relu" (max(z, 0)), "silu" (z·σ(z)) or "gelu" (z·Φ(z), with the error function and not tanh). GATE is
"silu" or "sigmoid" (σ(z)).
"""

import triton
import triton.language as tl

from .affine import affine
from .index import load, widened

_SQRT_HALF: tl.constexpr = tl.constexpr(0.7071067811865476)
_DENSITY_AT_0: tl.constexpr = tl.constexpr(0.3989422804014327)  # of the normal distribution: 1/√(2π)


@triton.jit
def sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def normal_below(z):
    """Φ(z)."""
    return 0.5 + 0.5 * tl.erf(z * _SQRT_HALF)


@triton.jit
def before_activation(xhat, w, b, RESIDUAL, offsets, mask):
    """z, in x̂'s dtype. RESIDUAL: of x's shape, where its elements are x's; or None."""
    z = affine(xhat, w, b, 0.0)
    if RESIDUAL is None:
        return z
    else:
        return z + widened(load(RESIDUAL + offsets, mask), z.dtype)


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    """f(z). NaN stays NaN."""
    if ACTIVATION == "relu":
        return tl.where(z < 0.0, 0.0, z)
    elif ACTIVATION == "silu":
        return z * sigmoid(z)
    elif ACTIVATION == "gelu":
        return z * normal_below(z)
    else:
        return z


@triton.jit
def gate_of(z, GATE: tl.constexpr):
    """a(z), what a gate multiplies by. SiLU is a quotient here: a rounding less than ``activated`` has, which a norm of
    what it multiplies would show.
    """
    if GATE == "silu":
        return z / (1.0 + tl.exp(-z))
    else:
        return sigmoid(z)


@triton.jit
def activated_backward(dy, z, ACTIVATION: tl.constexpr):
    """dy·f'(z)."""
    if ACTIVATION == "relu":
        return tl.where(z <= 0.0, 0.0, dy)
    elif ACTIVATION == "silu":
        s = sigmoid(z)
        return dy * (s + z * s * (1.0 - s))
    elif ACTIVATION == "gelu":
        return dy * (normal_below(z) + z * tl.exp(-0.5 * z * z) * _DENSITY_AT_0)
    elif ACTIVATION == "sigmoid":
        s = sigmoid(z)
        return dy * (s * (1.0 - s))
    else:
        return dy


@triton.jit
def through_activation(dy, xhat, w, b, RESIDUAL, offsets, mask, ACTIVATION: tl.constexpr):
    """dL/dz of dL/dy, with z made again of x̂."""
    if ACTIVATION is None:
        return dy
    else:
        return activated_backward(dy, before_activation(xhat, w, b, RESIDUAL, offsets, mask), ACTIVATION)
