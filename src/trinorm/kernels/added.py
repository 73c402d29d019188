"""The residual stream: s = x' + ALPHA·residual, which is what a norm of a sum normalizes and hands on beside y.

x' is x; times its row's ROW_SCALE (stochastic depth); and each element 0 with probability DROP, the others over 1 - DROP
(dropout). s is rounded to SUM's dtype before anything else is made of it, so that a result is that of adding first and
normalizing then. It is stored at once, and what is to be read again is read from there: RESIDUAL's memory may be SUM's.
All tensors but x lie row by row. RESIDUAL None: there is nothing to add, and x is normalized. ROW_SCALE, SEED, DRESIDUAL
and DSUM may be None too.

Which elements are dropped follows from SEED and their place alone, so the backward finds them again: of a row's columns,
taken by four, the four words that Philox makes of (group, row) are theirs.

Source of Philox: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC11.
"""

import triton
import triton.language as tl

from .index import chunk_columns, columns_live, load_once, load_row, rounded_up, row_offsets, widened


@triton.jit
def scaled(x, FACTOR: tl.constexpr):
    """FACTOR·x. The compiler does not fold a product with 1."""
    if FACTOR == 1.0:
        return x
    else:
        return x * FACTOR


@triton.jit
def words_of(SEED, rows, start, CHUNK: tl.constexpr):
    """A random 32-bit word of each of CHUNK columns from ``start``, ``[ROWS, CHUNK]``. start: a multiple of CHUNK."""
    ROWS: tl.constexpr = rows.shape[0]
    GROUPS: tl.constexpr = CHUNK // 4 if CHUNK >= 4 else 1
    group = (tl.arange(0, GROUPS)[None, :] + start // 4).to(tl.uint32)
    zero = tl.zeros([ROWS, GROUPS], tl.uint32)
    rows = rows.to(tl.int64)
    low, high = rows.to(tl.uint32), (rows >> 32).to(tl.uint32)
    first, second, third, fourth = tl.philox(tl.load(SEED), group + zero, low + zero, high + zero, zero)
    if CHUNK >= 4:
        return tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), [ROWS, CHUNK])
    else:
        place = chunk_columns(start, CHUNK) % 4
        return tl.where(place < 2, tl.where(place == 0, first, second), tl.where(place == 2, third, fourth))


@triton.constexpr_function
def least_word(probability):
    """The least word of an element that is not dropped."""
    return min(int(probability * 2**32), 2**32 - 1)


@triton.jit
def branch(x, SEED, ROW_SCALE, rows, start, live, DROP: tl.constexpr):
    """x' of x, or dx of its gradient: the same."""
    if ROW_SCALE is not None:
        x = x * tl.load(ROW_SCALE + rows, mask=live, other=0.0).to(x.dtype)
    if SEED is not None:
        kept = words_of(SEED, rows, start, x.shape[1]) >= tl.full([1, 1], least_word(DROP), tl.int64).to(tl.uint32)
        x = tl.where(kept, x * (1.0 / (1.0 - DROP)), 0.0) if DROP < 1.0 else tl.zeros_like(x)
    return x


@triton.jit
def add_chunk(
    added,
    x,
    residual,
    rows,
    start,
    live,
    mask,
    N: tl.constexpr,
    ALPHA: tl.constexpr,
    DROP: tl.constexpr,
    ACC: tl.constexpr,
    STREAM: tl.constexpr,
):
    """s of some columns from ``start``, stored, and as it is stored. added: (SUM, RESIDUAL, SEED, ROW_SCALE)."""
    SUM, _, SEED, ROW_SCALE = added
    x = branch(widened(x, ACC), SEED, ROW_SCALE, rows, start, live, DROP)
    s = (x + scaled(widened(residual, ACC), ALPHA)).to(SUM.dtype.element_ty)
    columns = chunk_columns(start, s.shape[1])
    tl.store(SUM + rows * N + columns, s, mask=mask, cache_modifier=".cs" if STREAM else "")
    return s


@triton.jit
def add_row(
    added,
    xs,
    rows,
    start,
    live,
    N: tl.constexpr,
    HELD: tl.constexpr,
    ALPHA: tl.constexpr,
    DROP: tl.constexpr,
    ACC: tl.constexpr,
    STREAM: tl.constexpr,
):
    """s of HELD columns from ``start`` of rows of N, which are held as chunks, as s then is. added: as add_chunk's."""
    _, RESIDUAL, _, _ = added
    if RESIDUAL is None:
        return xs
    else:
        CHUNK: tl.constexpr = xs[0].shape[1]
        residuals = load_row(RESIDUAL + rows * N + start, live, HELD, CHUNK, STREAM)
        sums = ()
        for i in tl.static_range(len(xs)):
            mask = live & columns_live(chunk_columns(i * CHUNK, CHUNK), (i + 1) * CHUNK, HELD)
            first = start + i * CHUNK
            s = add_chunk(added, xs[i], residuals[i], rows, first, live, mask, N, ALPHA, DROP, ACC, STREAM)
            sums = sums + (s,)
        return sums


@triton.jit
def add_streamed(
    added, x_row, row, N: tl.constexpr, ALPHA: tl.constexpr, DROP: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr
):
    """s of one row, chunk by chunk, for all of the program to read. added: as add_chunk's."""
    _, RESIDUAL, _, _ = added
    every = tl.full([1, 1], True, tl.int1)
    for start in tl.range(0, N, CHUNK):
        columns = chunk_columns(start, CHUNK)
        mask = columns_live(columns, rounded_up(N, CHUNK), N)
        x = load_once(x_row + columns, mask, False)
        residual = load_once(RESIDUAL + row * N + columns, mask, False)
        add_chunk(added, x, residual, row, start, every, mask, N, ALPHA, DROP, ACC, False)
    tl.debug_barrier()


@triton.jit
def rows_in_memory(X, SUM, rows, x_odd_sizes, x_strides, N: tl.constexpr):
    """Pointers to the rows that are normalized: x's, or those of the sum, once it is stored."""
    if SUM is None:
        return X + row_offsets(rows, x_odd_sizes, x_strides)
    else:
        return SUM + rows * N


@triton.jit
def store_input_gradients(
    outs,
    ds,
    rows,
    start,
    live,
    mask,
    N: tl.constexpr,
    ALPHA: tl.constexpr,
    DROP: tl.constexpr,
    ACC: tl.constexpr,
    STREAM: tl.constexpr,
):
    """The gradient of s, of which DSUM has a part, as x's (DX) and, where that is another, as the residual's (DRESIDUAL).
    outs: (DX, DRESIDUAL, DSUM, SEED, ROW_SCALE).
    """
    DX, DRESIDUAL, DSUM, SEED, ROW_SCALE = outs
    offsets = rows * N + chunk_columns(start, ds.shape[1])
    if DSUM is not None:
        ds += load_once(DSUM + offsets, mask, STREAM).to(ACC)
    modifier: tl.constexpr = ".cs" if STREAM else ""
    if DRESIDUAL is not None:
        tl.store(DRESIDUAL + offsets, scaled(ds, ALPHA).to(DRESIDUAL.dtype.element_ty), mask=mask, cache_modifier=modifier)
    dx = branch(ds, SEED, ROW_SCALE, rows, start, live, DROP)
    tl.store(DX + offsets, dx.to(DX.dtype.element_ty), mask=mask, cache_modifier=modifier)
