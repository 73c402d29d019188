"""From fp32 to the small formats of formats.py and back, bit for bit as quantized_reference.py has it.

A small float of M mantissa bits and exponent bias BIAS is made of fp32's own bits, so that any GPU makes the same; where
there is an instruction for it (e4m3 from sm_89 on) that one is taken.
"""

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from .index import takes_ptx

# fp32's least normal number: no scale is smaller, so that its reciprocal is a number.
LEAST_SCALE: tl.constexpr = tl.constexpr(1.1754943508222875e-38)

# Added to a number below 2^22 it leaves the integer nearest to that in the low bits, the even one of two.
_NEAREST: tl.constexpr = tl.constexpr(12582912.0)


@triton.constexpr_function
def has_e4m3():
    """Whether there is an instruction from fp32 to e4m3."""
    return takes_ptx() and cuda_capability_geq(8, 9)


@triton.constexpr_function
def step_of_subnormals(M, BIAS):
    return 2.0 ** (1 - BIAS - M)


@triton.constexpr_function
def exponent_of(largest):
    """Of the power of two under it."""
    return int(largest).bit_length() - 1


@triton.jit
def small_float(size, M: tl.constexpr, BIAS: tl.constexpr):
    """The code of |v|, which the format can hold, rounded to the nearest, to the even one of two."""
    SHIFT: tl.constexpr = 23 - M
    bits = size.to(tl.int32, bitcast=True)
    odd = (bits >> SHIFT) & 1
    normal = ((bits + odd + ((1 << (SHIFT - 1)) - 1)) >> SHIFT) - ((127 - BIAS) << M)
    # Added to so many of the subnormals' steps that fp32 has one for its own, v keeps what is left of it in the low bits.
    UNIT: tl.constexpr = step_of_subnormals(M, BIAS) * 8388608.0
    unit = tl.full(size.shape, UNIT, tl.float32)
    subnormal = (size + unit).to(tl.int32, bitcast=True) - unit.to(tl.int32, bitcast=True)
    return tl.where(size < step_of_subnormals(M, BIAS) * (1 << M), subnormal, normal)


@triton.jit
def from_e4m3(code):
    """fp32 of codes, as uint8."""
    if has_e4m3():
        return code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        size = (code & 0x7F).to(tl.int32)
        normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
        value = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)
        value = tl.where(size == 0x7F, float("nan"), value)
        return value * tl.where(code >= 0x80, -1.0, 1.0)  # Triton's minus takes it from 0, and -0.0 is none of that


@triton.jit
def element_of(v, ELEMENT: tl.constexpr, LARGEST: tl.constexpr):
    """The code of v, as uint8, its size cut off at LARGEST; an e2m1 in the low four bits."""
    held = tl.minimum(tl.maximum(v, -LARGEST), LARGEST)
    if ELEMENT == "int8":
        code = (held + _NEAREST).to(tl.int32, bitcast=True)
        return tl.where(v == v, code, 0).to(tl.uint8)
    elif ELEMENT == "e4m3" and has_e4m3():
        return v.to(tl.float8e4nv).to(tl.uint8, bitcast=True)  # the instruction cuts off at 448 itself, and keeps NaN
    else:
        sign = (v.to(tl.int32, bitcast=True) >> 31) & 1
        if ELEMENT == "e4m3":
            code = small_float(tl.abs(held), 3, 7)
            return tl.where(v == v, code + sign * 128, 0x7F).to(tl.uint8)
        else:
            code = small_float(tl.abs(held), 1, 1)
            return tl.where(v == v, code + sign * 8, 0).to(tl.uint8)


@triton.jit
def size_of(y):
    """|y| as its bits, which are in the order of the numbers, Inf and NaN behind them."""
    return y.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def largest_size(sizes, axis: tl.constexpr):
    """The largest along an axis, infinite where one is not a number; the axis stays, as one, if it is not the third."""
    largest = tl.max(sizes, axis=axis, keep_dims=axis == 1)
    return tl.minimum(largest, 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def scale_of(largest, given, SCALING: tl.constexpr, LARGEST: tl.constexpr):
    """(what is stored, by what y is multiplied), of the largest size that has the scale. given: the tensor's own number."""
    one = tl.full(largest.shape, 1.0, tl.float32)
    of_format = one * LARGEST
    if SCALING == "fp32":
        scale = tl.maximum(tl.div_rn(largest, of_format), LEAST_SCALE)
        return scale, tl.div_rn(one, scale)
    elif SCALING == "e8m0":
        finite = largest < float("inf")
        code = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) - exponent_of(LARGEST), 0)
        inverse = tl.where(finite, ((254 - code) << 23).to(tl.float32, bitcast=True), 0.0)
        return tl.where(finite, code, 255).to(tl.uint8), inverse
    else:
        scale = tl.div_rn(tl.div_rn(largest, of_format), one * given)
        stored = element_of(tl.where(largest < float("inf"), scale, float("nan")), "e4m3", 448.0)
        factor = from_e4m3(stored) * given
        return stored, tl.where(factor > 0.0, tl.div_rn(one, tl.maximum(factor, LEAST_SCALE)), 0.0)
