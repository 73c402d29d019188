"""Norms without statistics: a function that saturates, of each element alone.

    v = α·x + s,   y = f(v)·w + b,   f = tanh (DyT) or erf (Derf)

and backward, with dv = dy·w·f'(v):

    dx = dv·α,   dα = Σ dv·x,   ds = Σ dv,   dw = Σ_rows dy·f(v),   db = Σ_rows dy

docs/mathematics.md derives them. No element needs another, so a tile is of any rows and of any columns: a program has CHUNK
columns, and a row has as many programs as it takes. α and s are one number each. S, W and B may be None, and of what a
backward makes, DX, DALPHA, DS, DW and DB. Its sums are taken in a fixed order, in fp32, with no atomics: each program makes
partials, which partials.sum_partials adds up.
"""

import triton
import triton.language as tl

from .affine import NO_BIAS, NO_WEIGHT, affine, affine_backward
from .index import (
    chunk_columns,
    chunks_of,
    columns_live,
    first_program,
    load_once,
    load_or,
    program_count,
    rounded_up,
    row_offsets,
    rows_live,
    store_once,
    tile_rows,
    widened,
)
from .overlap import let_next_launch, wait_for_previous
from .row_backward import column_sums

# The logarithm of erf's slope at 0, 2/√π.
_LOG_SLOPE: tl.constexpr = tl.constexpr(0.12078223763524522)

# Up to where tanh is a polynomial.
_NEAR: tl.constexpr = tl.constexpr(0.625)

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
        e = tl.exp2(power)
        e = tl.fma(e, rest * _LN_2, e)
        share = 1.0 / (1.0 + e)
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
def tanh(v):
    """To a few units in the last place, of small v too, where 1 - 2e/(1 + e) has lost them: those have a polynomial."""
    e, share = tail(v)
    far = 1.0 - 2.0 * e * share
    return tl.where(tl.abs(v) < _NEAR, tanh_near(v), tl.where(v < 0.0, -far, far))


@triton.jit
def saturated(v, FUNCTION: tl.constexpr):
    """f(v)."""
    if FUNCTION == "tanh":
        return tanh(v)
    else:
        return tl.erf(v)


@triton.jit
def saturated_slope(v, FUNCTION: tl.constexpr):
    """f'(v). That of tanh, 1 - tanh², in its tail as 4e/(1 + e)²: no difference, so that it keeps its digits. That of erf,
    2/√π·exp(-v²), as one exponential of one fma, which rounds twice less.
    """
    if FUNCTION == "tanh":
        t = tanh_near(v)
        e, share = precise_tail(v)
        return tl.where(tl.abs(v) < _NEAR, 1.0 - t * t, 4.0 * e * share * share)
    else:
        return tl.exp(tl.fma(-v, v, tl.full(v.shape, _LOG_SLOPE, v.dtype)))


@triton.jit
def argument(x, ALPHA, S):
    """v, in x's dtype."""
    v = x * tl.load(ALPHA).to(x.dtype)
    if S is None:
        return v
    else:
        return v + tl.load(S).to(x.dtype)


@triton.jit(do_not_specialize=["M"])
def dynamic_forward(
    Y,
    X,
    ALPHA,
    S,
    W,
    B,
    M: tl.int64,
    x_odd_sizes,
    x_strides,
    N: tl.constexpr,
    FUNCTION: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STREAM: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile of ROWS rows by CHUNK columns."""
    wait_for_previous(PDL)
    let_next_launch(PDL)
    CHUNKS: tl.constexpr = chunks_of(N, CHUNK)
    columns = chunk_columns(first_program() % CHUNKS * CHUNK, CHUNK)
    in_row = columns_live(columns, rounded_up(N, CHUNK), N)
    rows = tile_rows(first_program() // CHUNKS, ROWS)
    mask = rows_live(rows, M, ROWS) & in_row
    x = widened(load_once(X + row_offsets(rows, x_odd_sizes, x_strides) + columns, mask, STREAM), ACC)
    w = load_or(W, columns, in_row, NO_WEIGHT, False)
    b = load_or(B, columns, in_row, NO_BIAS, False)
    y = affine(saturated(argument(x, ALPHA, S), FUNCTION), w, b, 0.0)
    store_once(Y + rows * N + columns, y, mask, STREAM)


@triton.jit(do_not_specialize=["M"])
def dynamic_backward(
    DX,
    DALPHA,
    DS,
    DW,
    DB,
    DY,
    X,
    ALPHA,
    S,
    W,
    M: tl.int64,
    dy_odd_sizes,
    dy_strides,
    x_odd_sizes,
    x_strides,
    N: tl.constexpr,
    FUNCTION: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    STREAM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Persistent programs, as many to each CHUNK columns, walk tiles of ROWS rows. DW and DB are ``[programs of a chunk,
    N]`` partials, DALPHA and DS one number of each program.
    """
    wait_for_previous(PDL)
    CHUNKS: tl.constexpr = chunks_of(N, CHUNK)
    columns = chunk_columns(first_program() % CHUNKS * CHUNK, CHUNK)
    in_row = columns_live(columns, rounded_up(N, CHUNK), N)
    w = load_or(W, columns, in_row, NO_WEIGHT, False)
    dalpha = tl.zeros([ROWS, CHUNK], ACC)
    ds = tl.zeros([ROWS, CHUNK], ACC)
    dw = tl.zeros([ROWS, CHUNK], ACC)
    db = tl.zeros([ROWS, CHUNK], ACC)
    for tile in tl.range(first_program() // CHUNKS, tl.cdiv(M, ROWS), program_count() // CHUNKS, num_stages=STAGES):
        rows = tile_rows(tile, ROWS)
        mask = rows_live(rows, M, ROWS) & in_row
        x = widened(load_once(X + row_offsets(rows, x_odd_sizes, x_strides) + columns, mask, STREAM), ACC)
        dy = widened(load_once(DY + row_offsets(rows, dy_odd_sizes, dy_strides) + columns, mask, STREAM), ACC)
        v = argument(x, ALPHA, S)
        dv = affine_backward(dy, w, 0.0) * saturated_slope(v, FUNCTION)
        if DX is not None:
            store_once(DX + rows * N + columns, dv * tl.load(ALPHA).to(ACC), mask, STREAM)
        if DALPHA is not None:
            dalpha += dv * x
        if DS is not None:
            ds += dv
        if DW is not None:
            dw += dy * saturated(v, FUNCTION)
        if DB is not None:
            db += dy
    let_next_launch(PDL)

    of_columns = first_program() // CHUNKS * N + columns
    if DW is not None:
        tl.store(DW + of_columns, column_sums(dw).to(DW.dtype.element_ty), mask=in_row)
    if DB is not None:
        tl.store(DB + of_columns, column_sums(db).to(DB.dtype.element_ty), mask=in_row)
    if DALPHA is not None:
        tl.store(DALPHA + first_program(), tl.sum(tl.sum(dalpha, axis=1), axis=0).to(DALPHA.dtype.element_ty))
    if DS is not None:
        tl.store(DS + first_program(), tl.sum(tl.sum(ds, axis=1), axis=0).to(DS.dtype.element_ty))
