"""y = x̂·w + b, and what its backward needs. Weight and bias are of any floating dtype; an absent one is its identity."""

import triton
import triton.language as tl

from .index import widened

# What an absent weight and bias read as (index.load_or), as fp32 bits: 1.0, and -0.0. The compiler folds both away; not so
# 0.0, as x + 0.0 is not x when x is -0.0. Bits, because tl.full takes -0.0 for 0 and makes 0.0 of it.
NO_WEIGHT: tl.constexpr = tl.constexpr(0x3F800000)
NO_BIAS: tl.constexpr = tl.constexpr(-0x80000000)


@triton.jit
def affine(xhat, w, b):
    """x̂·w + b in the accumulator's dtype, which is x̂'s."""
    return xhat * widened(w, xhat.dtype) + widened(b, xhat.dtype)


@triton.jit
def affine_backward(dy, w):
    """dL/dx̂ = dy·w in the accumulator's dtype, which is dy's."""
    return dy * w.to(dy.dtype)
