"""The residual stream: s = x + ALPHA·residual, which is what a norm of both normalizes and hands on beside y.

s is rounded to SUM's dtype before anything else is made of it, so that a result is that of adding first and normalizing
then. It is stored at once, and what is to be read again is read from there: RESIDUAL's memory may be SUM's. All three of
SUM, RESIDUAL and DSUM lie row by row. RESIDUAL None: there is nothing to add, and x is normalized.
"""

import triton
import triton.language as tl

from .index import chunk_columns, columns_live, load_once, load_row, rounded_up, row_offsets, widened


@triton.jit
def scaled(x, ALPHA: tl.constexpr):
    """ALPHA·x. The compiler does not fold a product with 1."""
    if ALPHA == 1.0:
        return x
    else:
        return x * ALPHA


@triton.jit
def add_chunk(SUM, x, residual, offsets, mask, ALPHA: tl.constexpr, ACC: tl.constexpr, STREAM: tl.constexpr):
    """s of some elements, stored and as it is stored."""
    s = (widened(x, ACC) + scaled(widened(residual, ACC), ALPHA)).to(SUM.dtype.element_ty)
    tl.store(SUM + offsets, s, mask=mask, cache_modifier=".cs" if STREAM else "")
    return s


@triton.jit
def add_row(
    SUM,
    RESIDUAL,
    xs,
    offsets,
    live,
    N: tl.constexpr,
    ALPHA: tl.constexpr,
    ACC: tl.constexpr,
    STREAM: tl.constexpr,
):
    """s of N columns of rows that are held as chunks; as chunks. offsets: of the rows."""
    if RESIDUAL is None:
        return xs
    else:
        CHUNK: tl.constexpr = xs[0].shape[1]
        residuals = load_row(RESIDUAL + offsets, live, N, CHUNK, STREAM)
        sums = ()
        for i in tl.static_range(len(xs)):
            columns = chunk_columns(i * CHUNK, CHUNK)
            mask = live & columns_live(columns, (i + 1) * CHUNK, N)
            sums = sums + (add_chunk(SUM, xs[i], residuals[i], offsets + columns, mask, ALPHA, ACC, STREAM),)
        return sums


@triton.jit
def add_streamed(
    SUM,
    RESIDUAL,
    x_row,
    offset,
    N: tl.constexpr,
    ALPHA: tl.constexpr,
    ACC: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """s of one row, chunk by chunk, for all of the program to read."""
    for start in tl.range(0, N, CHUNK):
        columns = chunk_columns(start, CHUNK)
        live = columns_live(columns, rounded_up(N, CHUNK), N)
        x = load_once(x_row + columns, live, False)
        residual = load_once(RESIDUAL + offset + columns, live, False)
        add_chunk(SUM, x, residual, offset + columns, live, ALPHA, ACC, False)
    tl.debug_barrier()


@triton.jit
def rows_in_memory(X, SUM, rows, x_odd_sizes, x_strides, N: tl.constexpr):
    """Pointers to the rows that are normalized: x's, or those of the sum, once it is stored."""
    if SUM is None:
        return X + row_offsets(rows, x_odd_sizes, x_strides)
    else:
        return SUM + rows * N


@triton.jit
def store_input_gradients(outs, ds, offsets, mask, ALPHA: tl.constexpr, ACC: tl.constexpr, STREAM: tl.constexpr):
    """The gradient of s, of which DSUM has a part, as x's (DX) and, times ALPHA, as the residual's, where that is another
    (DRESIDUAL). outs: (DX, DRESIDUAL, DSUM).
    """
    DX, DRESIDUAL, DSUM = outs
    if DSUM is not None:
        ds += load_once(DSUM + offsets, mask, STREAM).to(ACC)
    modifier: tl.constexpr = ".cs" if STREAM else ""
    tl.store(DX + offsets, ds.to(DX.dtype.element_ty), mask=mask, cache_modifier=modifier)
    if DRESIDUAL is not None:
        tl.store(DRESIDUAL + offsets, scaled(ds, ALPHA).to(DRESIDUAL.dtype.element_ty), mask=mask, cache_modifier=modifier)
