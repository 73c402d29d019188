"""f and f' of norms without statistics, elementwise: f = tanh or erf.

COARSE: where what becomes of them is rounded to 16 bits, f to 2^-15 of itself and f' to 2^-20 (docs/mathematics.md), by
single approximate instructions where otherwise there are a corrected exponential, a division and a polynomial. FINE beside
it: f near fp32's digits all the same, for sums that are kept in fp32. Otherwise all is to a few units in the last place of
v's dtype. Either way small f and small f' keep their digits, and nothing overflows.
"""

import triton
import triton.language as tl

from .index import takes_ptx

# Erf's slope at 0, 2/√π: its logarithm, itself, and its logarithm to base 2.
_LOG_SLOPE: tl.constexpr = tl.constexpr(0.12078223763524522)
_SLOPE: tl.constexpr = tl.constexpr(1.1283791670955126)
_LOG2_SLOPE: tl.constexpr = tl.constexpr(0.17425193526384058)

# Up to where tanh is a polynomial.
_NEAR: tl.constexpr = tl.constexpr(0.625)

# Up to where COARSE f is f'(0)·v, which is then 2^-15.5 off, and 1 - h from there on no more, by h's 2^-22.
_NEAR_COARSE: tl.constexpr = tl.constexpr(0.0078125)

# P of tanh v = v + v³·P(v²) up to there, highest power first: Chebyshev's, from 40 digits. What it leaves out is
# 6e-10 of tanh v, and 2e-18 of fp64's.
_FP32 = (
    0.002292744816178142,
    -0.008343945515839153,
    0.02176891865102821,
    -0.053959259577204544,
    0.1333330355691574,
    -0.3333333317214036,
)
_FP64 = (
    6.485163482793113e-06,
    -3.12011014257974e-05,
    9.257116129556769e-05,
    -0.0002375906496055562,
    0.0005896606577757043,
    -0.0014557754120478055,
    0.0035921217511549622,
    -0.008863235103240878,
    0.021869488519008305,
    -0.05396825396789699,
    0.13333333333333042,
    -0.3333333333333333,
)


@triton.constexpr_function
def terms_of_tanh(dtype):
    """How many terms P has."""
    return len(_FP64 if dtype == tl.float64 else _FP32)


@triton.constexpr_function
def term_of_tanh(dtype, i):
    """The coefficient of one."""
    return (_FP64 if dtype == tl.float64 else _FP32)[i]


# R of erf v = tanh(v·R(v²)·ln2/2), highest power first: fitted so that erf's largest relative error, 4e-6, is the least. As
# v·R grows throughout, nothing has to be cut off.
_ERF_COARSE = (
    0.00010229916370008141,
    -0.0012878752313554287,
    -0.0011770977871492505,
    0.2967680096626282,
    3.2558019161224365,
)
# 2/ln2.
_TO_TWOS: tl.constexpr = tl.constexpr(2.8853900817779268)


@triton.constexpr_function
def term_of_erf(i):
    """The coefficient of one of R's terms."""
    return _ERF_COARSE[i]


# Of two units in the last place; what is subnormal they take for 0.
_EXP2: tl.constexpr = tl.constexpr("ex2.approx.ftz.f32 $0, $1;")
_RECIPROCAL: tl.constexpr = tl.constexpr("rcp.approx.ftz.f32 $0, $1;")
_SIGNED_AS: tl.constexpr = tl.constexpr("copysign.f32 $0, $2, $1;")


@triton.jit
def exp2_coarse(x):
    """2^x in one instruction, where ``tl.exp2`` has four."""
    if takes_ptx():
        return tl.inline_asm_elementwise(_EXP2, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.exp2(x)


@triton.jit
def reciprocal_coarse(x):
    """1/x in one instruction, where a division has more."""
    if takes_ptx():
        return tl.inline_asm_elementwise(_RECIPROCAL, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / x


@triton.jit
def below_one(q):
    """h = 2/(1 + 2^q): tanh v = 1 - h and tanh' v = h·(2 - h), of q = 2v/ln2."""
    return reciprocal_coarse(exp2_coarse(q) * 0.5 + 0.5)


@triton.jit
def signed_as(size, v):
    """size with v's sign, of positive fp32, in one instruction, where ``tl.where`` has two."""
    if takes_ptx():
        return tl.inline_asm_elementwise(_SIGNED_AS, "=f,f,f", [size, v], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.where(v < 0.0, -size, size)


@triton.jit
def tail(v):
    """(e, 1/(1 + e)) of e = exp(-2|v|), which overflows nowhere."""
    e = tl.exp(-2.0 * tl.abs(v))
    return e, 1.0 / (1.0 + e)


# log2(e), and what rounding leaves out of it; ln 2.
_LOG2_E: tl.constexpr = tl.constexpr(1.4426950216293335)
_LOG2_E_REST: tl.constexpr = tl.constexpr(1.925963033500011e-08)
_LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def precise_tail(v):
    """The same, in fp32 to a unit in the last place or so: exp without the error of its rounded argument, and one Newton
    step of the reciprocal, which is an approximation. (H200: by ``tail`` dx was up to 6 units in the last place off.)
    """
    if v.dtype == tl.float64:
        return tail(v)
    else:
        size = tl.abs(v)
        x = -2.0 * tl.where(size > 100.0, 100.0, size)  # NaN stays; of infinity there would be no rest
        power = x * _LOG2_E
        rest = tl.fma(x, tl.full(v.shape, _LOG2_E, tl.float32), -power) + x * _LOG2_E_REST
        e = exp2_coarse(power)
        e = tl.fma(e, rest * _LN_2, e)
        share = reciprocal_coarse(1.0 + e)
        return e, tl.fma(share, tl.fma(-(1.0 + e), share, tl.full(v.shape, 1.0, tl.float32)), share)


@triton.jit
def tanh_near(v):
    """tanh v up to _NEAR, with all digits of small v."""
    square = v * v
    polynomial = tl.full(v.shape, term_of_tanh(v.dtype, 0), v.dtype)
    for i in tl.static_range(1, terms_of_tanh(v.dtype)):
        polynomial = polynomial * square + term_of_tanh(v.dtype, i)
    return v + v * square * polynomial


@triton.jit
def tanh(v, COARSE: tl.constexpr, FINE: tl.constexpr):
    """1 - h with v's sign, which has lost the digits of small v: up to where it has, v or a polynomial."""
    size = tl.abs(v)
    if COARSE:
        far = signed_as(1.0 - below_one(size * _TO_TWOS), v)
    else:
        e, share = precise_tail(v)
        far = 1.0 - 2.0 * e * share
        far = tl.where(v < 0.0, -far, far)
    if COARSE and not FINE:
        return tl.where(size < _NEAR_COARSE, v, far)
    else:
        return tl.where(size < _NEAR, tanh_near(v), far)


@triton.jit
def tanh_slope(v):
    """1 - tanh², in its tail as 4e/(1 + e)²: no difference, so that it keeps its digits."""
    t = tanh_near(v)
    e, share = precise_tail(v)
    return tl.where(tl.abs(v) < _NEAR, 1.0 - t * t, 4.0 * e * share * share)


@triton.jit
def erf_slope(v):
    """2/√π·exp(-v²), as one exponential of one fma, which rounds twice less."""
    return tl.exp(tl.fma(-v, v, tl.full(v.shape, _LOG_SLOPE, v.dtype)))


@triton.jit
def tanh_slope_coarse(v):
    h = below_one(tl.abs(v) * _TO_TWOS)
    return h * (2.0 - h)


@triton.jit
def erf_coarse(v):
    square = v * v
    polynomial = tl.full(v.shape, term_of_erf(0), v.dtype)
    for i in tl.static_range(1, 5):
        polynomial = polynomial * square + term_of_erf(i)
    return tl.where(tl.abs(v) < _NEAR_COARSE, v * _SLOPE, 1.0 - below_one(v * polynomial))


@triton.jit
def erf_slope_coarse(v):
    return exp2_coarse(v * v * -1.4426950408889634 + _LOG2_SLOPE)


@triton.jit
def saturated(v, FUNCTION: tl.constexpr, COARSE: tl.constexpr, FINE: tl.constexpr):
    """f(v)."""
    if FUNCTION == "tanh":
        return tanh(v, COARSE, FINE)
    elif COARSE and not FINE:
        return erf_coarse(v)
    else:
        return tl.erf(v)


@triton.jit
def saturated_slope(v, FUNCTION: tl.constexpr, COARSE: tl.constexpr):
    """f'(v)."""
    if FUNCTION == "tanh":
        return tanh_slope_coarse(v) if COARSE else tanh_slope(v)
    else:
        return erf_slope_coarse(v) if COARSE else erf_slope(v)
