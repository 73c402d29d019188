"""From fp32 to the small formats of formats.py and back, bit for bit as reference/quantized.py has it.

Where there is an instruction (e4m3 from sm_89 on) that one is taken. Else an e4m3 is made of fp32's own bits, an e2m1 of
sums that fp32 rounds, so that any GPU makes the same.
"""

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from .index import is_interpreted, takes_ptx

# fp32's least normal number: no scale is smaller, so that its reciprocal is a number.
LEAST_SCALE: tl.constexpr = tl.constexpr(1.1754943508222875e-38)

# Added to a number below 2^22 it leaves the integer nearest to that in the low bits, the even one of two.
_NEAREST: tl.constexpr = tl.constexpr(12582912.0)

# The same of numbers that are not negative.
_NEAREST_SIZE: tl.constexpr = tl.constexpr(8388608.0)

# A tensor's own number between these leaves fp32 all digits of a scale over it, and of what it stands for.
_LEAST_ORDINARY: tl.constexpr = tl.constexpr(2.0**-80)
_MOST_ORDINARY: tl.constexpr = tl.constexpr(2.0**80)

# What div.rn does with 1 and a number from 2^-126 to 2^125, without its check that the number is one, and the path beside.
_RECIPROCAL: tl.constexpr = tl.constexpr("""{
    .reg .f32 minus, near, rest;
    neg.f32 minus, $1;
    rcp.approx.ftz.f32 near, $1;
    fma.rn.f32 rest, minus, near, 0f3F800000;
    fma.rn.f32 near, near, rest, near;
    fma.rn.f32 rest, minus, near, 0f3F800000;
    fma.rn.f32 $0, near, rest, near;
}""")

# The low bytes of four, and of what is kept of each: of one row's, the compiler makes that once.
_LOW_BYTES: tl.constexpr = tl.constexpr("""{
    .reg .b32 low, high, kept;
    prmt.b32 low, $5, $6, 0x0040;
    prmt.b32 high, $7, $8, 0x0040;
    prmt.b32 kept, low, high, 0x5410;
    prmt.b32 low, $1, $2, 0x0040;
    prmt.b32 high, $3, $4, 0x0040;
    prmt.b32 low, low, high, 0x5410;
    and.b32 $0, low, kept;
}""")

# Eight nibbles of sizes ($1 to $4 the even ones, $5 to $8 the odd) and of signs ($9 to $16), from the last one on: a sign
# is shifted in from the top, a size's three bits added. What is above those leaves the low half of four such steps alone.
_NIBBLES: tl.constexpr = tl.constexpr("""{
    .reg .b32 low, high;
    shr.u32 high, $16, 31;
    mad.lo.u32 high, high, 8, $8;
    shf.l.wrap.b32 high, $12, high, 1;
    mad.lo.u32 high, high, 8, $4;
    shf.l.wrap.b32 high, $15, high, 1;
    mad.lo.u32 high, high, 8, $7;
    shf.l.wrap.b32 high, $11, high, 1;
    mad.lo.u32 high, high, 8, $3;
    shr.u32 low, $14, 31;
    mad.lo.u32 low, low, 8, $6;
    shf.l.wrap.b32 low, $10, low, 1;
    mad.lo.u32 low, low, 8, $2;
    shf.l.wrap.b32 low, $13, low, 1;
    mad.lo.u32 low, low, 8, $5;
    shf.l.wrap.b32 low, $9, low, 1;
    mad.lo.u32 low, low, 8, $1;
    prmt.b32 $0, low, high, 0x5410;
}""")


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


@triton.constexpr_function
def to_next_power(largest):
    """What, added to the bits of a number in fp32, carries from its mantissa where it is over the largest's."""
    mantissa = int((largest / 2.0 ** exponent_of(largest) - 1.0) * 2**23)
    return 2**23 - 1 - mantissa


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
def to_e4m3(v):
    """The code of v, as uint8, its size cut off at 448."""
    if has_e4m3():
        return v.to(tl.float8e4nv).to(tl.uint8, bitcast=True)  # the instruction cuts off itself, and keeps NaN
    else:
        code = small_float(tl.minimum(tl.abs(v), 448.0), 3, 7)
        sign = (v.to(tl.int32, bitcast=True) >> 31) & 1
        return tl.where(v == v, code + sign * 128, 0x7F).to(tl.uint8)


@triton.jit
def to_int8(v, finite):
    """The integer nearest to v, of at most 127 and a rounding; 0 of what a scale that is not finite has left."""
    code = (v + _NEAREST).to(tl.int32, bitcast=True)
    keep = tl.broadcast_to(tl.where(finite, -1, 0), code.shape)
    if takes_ptx():
        given = [code, keep]
        return tl.inline_asm_elementwise(_LOW_BYTES, "=r,r,r,r,r,r,r,r,r", given, dtype=tl.uint8, is_pure=True, pack=4)
    else:
        return (code & keep).to(tl.uint8)


@triton.jit
def to_e2m1(v, finite):
    """Two codes of v's last axis to a byte, the first in its low bits, sizes cut off at 6; NaN's is 0.

    As a function of the size that is three lines, of slope 2 to 2, of 1 to 4 and of 1/2 beyond, rounded: the lowest counts.
    """
    # NaN comes of a scale that is not finite alone, and the smaller of two numbers is never NaN.
    size = tl.minimum(tl.abs(v), tl.where(finite, 6.0, 0.0))
    to_two = tl.fma(size, tl.full(size.shape, 2.0, tl.float32), tl.full(size.shape, _NEAREST_SIZE, tl.float32))
    to_four = size + (_NEAREST_SIZE + 2.0)
    to_six = tl.fma(size, tl.full(size.shape, 0.5, tl.float32), tl.full(size.shape, _NEAREST_SIZE + 4.0, tl.float32))
    to_two, to_four, to_six = (
        to_two.to(tl.int32, bitcast=True),
        to_four.to(tl.int32, bitcast=True),
        to_six.to(tl.int32, bitcast=True),
    )
    code = tl.minimum(tl.minimum(to_two, to_four), to_six)
    HALF: tl.constexpr = v.numel // v.shape[0] // 2
    even, odd = tl.split(tl.reshape(code, [v.shape[0], HALF, 2]))
    first, second = tl.split(tl.reshape(v, [v.shape[0], HALF, 2]))
    if takes_ptx():
        given = [even, odd, first, second]
        return tl.inline_asm_elementwise(
            _NIBBLES, "=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r", given, dtype=tl.uint8, is_pure=True, pack=4
        )
    else:
        low, high = signed_e2m1(even, first), signed_e2m1(odd, second)
        return (low | (high << 4)).to(tl.uint8)


@triton.jit
def signed_e2m1(code, v):
    """With v's sign before the size's three bits."""
    sign = v.to(tl.int32, bitcast=True) >> 28 & 8
    return tl.where(v == v, code & 7 | sign, 0)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest_along(sizes, axis: tl.constexpr):
    """The largest along an axis, NaN where one is that; the axis stays, as one, if it is not the third."""
    if is_interpreted():
        # As bits, which are in the order of the numbers, NaN behind them: its own maximum leaves out NaN, another is slow.
        bits = tl.max(sizes.to(tl.int32, bitcast=True), axis=axis, keep_dims=axis == 1)
        return bits.to(tl.float32, bitcast=True)
    else:
        return tl.reduce(sizes, axis, larger, keep_dims=axis == 1)


@triton.jit
def reciprocal(x):
    """1/x, correctly rounded, of a normal number whose reciprocal is one too."""
    if takes_ptx():
        return tl.inline_asm_elementwise(_RECIPROCAL, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x)


@triton.jit
def given_scale(GIVEN):
    """(the tensor's own number, its reciprocal, whether it is ordinary), of 1 where GIVEN is None."""
    number = tl.full([], 1.0, tl.float32) if GIVEN is None else tl.load(GIVEN)
    ordinary = (number >= _LEAST_ORDINARY) & (number <= _MOST_ORDINARY)
    number = tl.full([1, 1], 1.0, tl.float32) * number
    return number, reciprocal(tl.where(ordinary, number, 1.0)), ordinary


@triton.jit
def divided(x, minus, inverse):
    """x over what ``minus`` is the negative of and ``inverse`` the correctly rounded reciprocal: correctly rounded where
    that is a normal number. A division of its own checks for what it has another path for, in the midst of everything.
    """
    quotient = x * inverse
    return tl.fma(tl.fma(minus, quotient, x), inverse, quotient)


@triton.jit
def over(largest, LARGEST: tl.constexpr):
    """largest / LARGEST."""
    minus = tl.full(largest.shape, -LARGEST, tl.float32)
    return divided(largest, minus, tl.full(largest.shape, 1.0 / LARGEST, tl.float32))


@triton.jit
def e4m3_scale(largest, given, over_one, LARGEST: tl.constexpr, ORDINARY: tl.constexpr):
    """scale_of's three, over the tensor's own number, which with ORDINARY is one, and over_one its reciprocal."""
    if ORDINARY:
        # Beyond 512 times it the scale is cut off at 448. Of Inf the division makes NaN.
        held = tl.minimum(over(largest, LARGEST), given * 512.0, propagate_nan=tl.PropagateNan.ALL)
        scale = divided(held, given * -1.0, over_one)
    else:
        scale = tl.div_rn(tl.div_rn(largest, tl.full(largest.shape, LARGEST, tl.float32)), given + tl.zeros_like(largest))
        scale = tl.where(largest < float("inf"), scale, float("nan"))
    stored = to_e4m3(scale)
    factor = from_e4m3(stored) * given
    least = tl.maximum(factor, LEAST_SCALE)
    inverse = reciprocal(least) if ORDINARY else tl.div_rn(tl.full(least.shape, 1.0, tl.float32), least)
    return stored, tl.where(factor > 0.0, inverse, 0.0), factor > 0.0


@triton.jit
def scale_of(largest, given, SCALING: tl.constexpr, LARGEST: tl.constexpr):
    """(what is stored, by what y is multiplied, where not all codes are zeros), of the largest size that has the scale.
    given: given_scale's, where there is a number of the whole tensor.
    """
    finite = largest < float("inf")
    if SCALING == "fp32":
        scale = tl.maximum(over(largest, LARGEST), LEAST_SCALE)
        return tl.where(finite, scale, float("inf")), tl.where(finite, reciprocal(scale), 0.0), finite
    elif SCALING == "pow2":
        # 2^ceil(log2(largest / LARGEST)) of the bits, exactly, with no division.
        raised = (largest.to(tl.int32, bitcast=True) + to_next_power(LARGEST)) >> 23
        exponent = tl.maximum(raised - exponent_of(LARGEST), 1)
        scale, inverse = exponent << 23, (254 - exponent) << 23
        scale = tl.where(finite, scale.to(tl.float32, bitcast=True), float("inf"))
        return scale, tl.where(finite, inverse.to(tl.float32, bitcast=True), 0.0), finite
    elif SCALING == "e8m0":
        code = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) - exponent_of(LARGEST), 0)
        inverse = tl.where(finite, ((254 - code) << 23).to(tl.float32, bitcast=True), 0.0)
        return tl.where(finite, code, 255).to(tl.uint8), inverse, finite
    else:
        number, over_one, ordinary = given
        if ordinary:
            stored, inverse, some = e4m3_scale(largest, number, over_one, LARGEST, True)
        else:
            stored, inverse, some = e4m3_scale(largest, number, over_one, LARGEST, False)
        return stored, inverse, some
