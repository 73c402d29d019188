"""y = x̂·(w + OFFSET) + b, and what its backward needs. Weight and bias are of any floating dtype; an absent one is its
identity.

OFFSET is 0 but where a weight is kept as its distance from 1 (Gemma). With ROUND x̂ is rounded to y's dtype first (LLaMA).
"""

import triton
import triton.language as tl

from .index import widened

# What an absent weight and bias read as (index.load_or), as fp32 bits: 1.0, and -0.0. The compiler folds both away; not so
# 0.0, as x + 0.0 is not x when x is -0.0. Bits, because tl.full takes -0.0 for 0 and makes 0.0 of it.
NO_WEIGHT: tl.constexpr = tl.constexpr(0x3F800000)
NO_BIAS: tl.constexpr = tl.constexpr(-0x80000000)


@triton.jit
def offset_by(w, OFFSET: tl.constexpr):
    """w + OFFSET. The compiler does not fold an addition of 0.0, which is not nothing for -0.0."""
    if OFFSET == 0.0:
        return w
    else:
        return w + OFFSET


@triton.jit
def rounded(xhat, dtype: tl.constexpr, ROUND: tl.constexpr):
    """x̂ in its own dtype still, with ROUND as ``dtype`` holds it. Its derivative is taken to be 1, as a cast's is."""
    if ROUND:
        return widened(xhat.to(dtype), xhat.dtype)
    else:
        return xhat


@triton.jit
def affine(xhat, w, b, OFFSET: tl.constexpr):
    """x̂·(w + OFFSET) + b in the accumulator's dtype, which is x̂'s."""
    return xhat * offset_by(widened(w, xhat.dtype), OFFSET) + widened(b, xhat.dtype)


@triton.jit
def affine_backward(dy, w, OFFSET: tl.constexpr):
    """dL/dx̂ = dy·(w + OFFSET) in the accumulator's dtype, which is dy's."""
    return dy * offset_by(w.to(dy.dtype), OFFSET)
