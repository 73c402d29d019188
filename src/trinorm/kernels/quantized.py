"""Row norms whose result is stored in a small format: row.py's y = x̂·(w + OFFSET) + b, in fp32, as quantize.py stores it.

What is normalized is x; with X_SCALE an e4m3 of x's codes times the scale of its row, or of all (whose stride is 0); with
RESIDUAL the sum, stored in SUM (added.py). A scale is that of BLOCK elements, of a whole row where BLOCK is 0, and with
SCALING "tensor" the one GIVEN; scale_strides: from a row's scales to the next row's, and from a block's to the next; None:
they are swizzled, in tiles of 128 rows by 4 scales, and programs there are for all rows of these.
W, B, MEAN, RSTD, SUM, RESIDUAL and X_SCALE may be None. With ROUND x̂, and y, are rounded to DTYPE first (LLaMA).
"""

import triton
import triton.language as tl

from .added import add_row
from .affine import NO_BIAS, NO_WEIGHT
from .conditioned import held_stats, weighted
from .index import (
    chunk_columns,
    chunks_of,
    columns_live,
    first_program,
    is_interpreted,
    load_row,
    load_row_or,
    rounded_up,
    row_offsets,
    rows_live,
    store_once,
    takes_ptx,
    tile_rows,
    widened,
)
from .overlap import let_next_launch, wait_for_previous
from .quantize import from_e4m3, given_scale, larger, largest_along, scale_of, to_e2m1, to_e4m3, to_int8
from .row import store_stats

# Rounded on its own: of another product the compiler makes an fma with what is added next, a mean, a residual, or what an
# int8 is rounded by (H200: 45 for 44.5).
_PRODUCT: tl.constexpr = tl.constexpr("mul.rn.f32 $0, $1, $2;")


# Of 32 bits, and of the lowest eight.
_STORE: tl.constexpr = tl.constexpr("""{
    .reg .pred live;
    setp.ne.u32 live, $3, 0;
    @live st.global.b32 [$1], $2;
    mov.b32 $0, 0;
}""")
_STORE_BYTE: tl.constexpr = tl.constexpr(_STORE.value.replace("b32 [", "b8 ["))


@triton.jit
def store_where_it_is(pointers, value, mask):
    """A store by each of the threads that have a value. tl.store has one of them do it, to whom it is brought through
    shared memory, for which all warps wait.
    """
    if takes_ptx():
        wide = value.to(tl.int32) if value.dtype == tl.uint8 else value.to(tl.int32, bitcast=True)
        given = [pointers.to(tl.int64), wide, tl.broadcast_to(mask, value.shape).to(tl.int32)]
        STORE: tl.constexpr = _STORE_BYTE if value.dtype == tl.uint8 else _STORE
        tl.inline_asm_elementwise(STORE, "=r,l,r,r", given, dtype=tl.int32, is_pure=False, pack=1)
    else:
        tl.store(pointers, value, mask=mask)


@triton.jit
def product(x, y):
    """x·y, rounded. Elsewhere than in PTX by an fma, in which -0.0 is 0.0; the interpreter makes no fma of its own."""
    if x.dtype == tl.float32 and takes_ptx():
        return tl.inline_asm_elementwise(_PRODUCT, "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1)
    elif is_interpreted():
        return x * y
    else:
        return tl.fma(x, y, tl.zeros_like(x))


@triton.jit
def scaled_up(xs, X_SCALE, rows, live, stride, ACC: tl.constexpr):
    """x of its codes and scales, as chunks; x as it is without scales."""
    if X_SCALE is None:
        return xs
    else:
        scale = tl.load(X_SCALE + rows * stride, mask=live, other=0.0).to(ACC)
        chunks = ()
        for i in tl.static_range(len(xs)):
            x = from_e4m3(xs[i]).to(ACC)
            chunks = chunks + (product(x, tl.broadcast_to(scale, x.shape)),)
        return chunks


@triton.jit
def store_codes(
    DATA, v, finite, rows, start, live, N: tl.constexpr, END: tl.constexpr, ELEMENT: tl.constexpr, STREAM: tl.constexpr
):
    """The codes of some columns from ``start``, of a chunk that ends before column END. v: ``[ROWS, CHUNK]``, or, where
    blocks have scales, ``[ROWS, BLOCKS, CHUNK // BLOCKS]``; finite: where the scales are.
    """
    ROWS: tl.constexpr = v.shape[0]
    CHUNK: tl.constexpr = v.numel // ROWS
    if ELEMENT == "e2m1":
        columns = chunk_columns(start // 2, CHUNK // 2)
        mask = live & columns_live(columns, END // 2, N // 2)
        store_once(DATA + rows * (N // 2) + columns, to_e2m1(v, finite), mask, STREAM)
    else:
        codes = tl.reshape(to_int8(v, finite) if ELEMENT == "int8" else to_e4m3(v), [ROWS, CHUNK])
        columns = chunk_columns(start, CHUNK)
        store_once(DATA + rows * N + columns, codes, live & columns_live(columns, END, N), STREAM)


@triton.jit
def size_within(y, start: tl.constexpr, N: tl.constexpr):
    """|y| of the columns from ``start``; 0 where there is none."""
    CHUNK: tl.constexpr = y.shape[1]
    if start + CHUNK <= N:
        return tl.abs(y)
    else:
        return tl.where(columns_live(chunk_columns(start, CHUNK), start + CHUNK, N), tl.abs(y), 0.0)


@triton.jit
def row_of_scales(rows, strides, SCALES: tl.constexpr):
    """Where the scales of each row begin, SCALES of a row."""
    if strides is None:
        return rows // 128 * (rounded_up(SCALES, 4) * 128) + rows % 32 * 16 + rows % 128 // 32 * 4
    else:
        return rows * strides[0]


@triton.jit
def scale_of_row(blocks, strides):
    """How far from there those of some blocks are."""
    if strides is None:
        return blocks // 4 * 512 + blocks % 4
    else:
        return blocks * strides[1]


@triton.jit
def store_padding(SCALE, tile, M, SCALES: tl.constexpr, ROWS: tl.constexpr):
    """Zeros of swizzled scales: behind each row's, of which there are SCALES, up to a multiple of 4; and of the rows of the
    last 128 that there are not.
    """
    rows = tile_rows(tile, ROWS)
    begin = SCALE + row_of_scales(rows, None, SCALES)
    END: tl.constexpr = rounded_up(SCALES, 4)
    stored = rows < (M + 127) // 128 * 128
    if SCALES < END:
        behind = chunk_columns(END - 4, 4)
        tl.store(begin + scale_of_row(behind, None), 0, mask=stored & (behind >= SCALES))
    if (tile + 1) * ROWS > M:
        for start in tl.static_range(0, SCALES, 128):
            blocks = chunk_columns(start, 128)
            absent = stored & (rows >= M) & columns_live(blocks, start + 128, SCALES)
            tl.store(begin + scale_of_row(blocks, None), 0, mask=absent)


@triton.jit
def quantize_tile(
    outs,
    given,
    at,
    rows,
    live,
    eps,
    N: tl.constexpr,
    CENTER: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND: tl.constexpr,
    DTYPE: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALING: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    ACC: tl.constexpr,
    RESCUE: tl.constexpr,
    CHUNK: tl.constexpr,
    STREAM: tl.constexpr,
    PRELOAD: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Data, scales and statistics of the ``live`` rows of a tile, stored where fp32 held the squares; returns where it did.
    outs: (DATA, SCALE, SUM, MEAN, RSTD); given: (X, X_SCALE, RESIDUAL, W, B, GIVEN); at: where x's rows begin, X_SCALE's
    stride, scale_strides.
    """
    DATA, SCALE, SUM, MEAN, RSTD = outs
    X, X_SCALE, RESIDUAL, W, B, GIVEN = given
    of_x, of_x_scale, scale_strides = at
    ROWS: tl.constexpr = rows.shape[0]
    # A row of one chunk that is shorter than a block has one block.
    OF_ONE: tl.constexpr = BLOCK if BLOCK > 0 and BLOCK < CHUNK else CHUNK
    EACH: tl.constexpr = CHUNK // OF_ONE
    SCALES: tl.constexpr = chunks_of(N, OF_ONE)
    whole = given_scale(GIVEN)
    xs = scaled_up(load_row(X + of_x, live, N, CHUNK, STREAM), X_SCALE, rows, live, of_x_scale, ACC)
    if PRELOAD:
        ws = load_row_or(W, live, N, CHUNK, NO_WEIGHT)
        bs = load_row_or(B, live, N, CHUNK, NO_BIAS)
    xs = add_row((SUM, RESIDUAL, None, None), xs, rows, 0, live, N, N, 1.0, 0.0, ACC, STREAM)
    if SCALING == "tensor":
        inverse = tl.div_rn(tl.full([1, 1], 1.0, tl.float32), whole[0])
        finite = live
    mean, rstd, good = held_stats(xs, eps, N, N, N, CENTER, ACC, SCALED)
    if not RESCUE:
        good = rows >= 0
    exists = live
    live = live & good
    store_stats(MEAN, RSTD, rows, mean, rstd, live, CENTER)
    if not PRELOAD:
        ws = load_row_or(W, exists, N, CHUNK, NO_WEIGHT)
        bs = load_row_or(B, exists, N, CHUNK, NO_BIAS)

    ys = ()
    largest = tl.zeros([ROWS, CHUNK], tl.float32)
    for i in tl.static_range(len(xs)):
        xhat = (widened(xs[i], ACC) - mean) * rstd
        y = weighted(xhat, ws[i], bs[i], DTYPE, OFFSET, ROUND, ROUND).to(tl.float32)
        y = tl.broadcast_to(y, [ROWS, CHUNK])
        ys = ys + (y,)
        if SCALING != "tensor" and BLOCK == 0:
            largest = larger(largest, size_within(y, i * CHUNK, N))
    if SCALING != "tensor" and BLOCK == 0:
        scale, inverse, finite = scale_of(largest_along(largest, 1), whole, SCALING, LARGEST)
        tl.store(SCALE + rows * scale_strides[0], scale, mask=live)
    for i in tl.static_range(len(xs)):
        if BLOCK == 0:
            v = product(ys[i], inverse) if ELEMENT == "int8" else ys[i] * inverse
        else:
            sizes = tl.reshape(size_within(ys[i], i * CHUNK, N), [ROWS, EACH, OF_ONE])
            scale, inverse, fit = scale_of(largest_along(sizes, 2), whole, SCALING, LARGEST)
            block = chunk_columns(i * EACH, EACH).to(tl.int64)  # times a stride that is a number of rows
            fits = live & columns_live(block, (i + 1) * EACH, SCALES)
            begin = SCALE + row_of_scales(rows, scale_strides, SCALES)
            store_where_it_is(begin + scale_of_row(block, scale_strides), scale, fits)
            v = tl.reshape(ys[i], [ROWS, EACH, OF_ONE]) * inverse[:, :, None]
            finite = fit[:, :, None]
        store_codes(DATA, v, finite, rows, i * CHUNK, live, N, (i + 1) * CHUNK, ELEMENT, STREAM)
    return good


@triton.jit(do_not_specialize=["M"])
def quantized_forward(
    DATA,
    SCALE,
    SUM,
    MEAN,
    RSTD,
    X,
    X_SCALE,
    RESIDUAL,
    W,
    B,
    GIVEN,
    M: tl.int64,
    x_odd_sizes,
    x_strides,
    x_scale_stride,
    scale_strides,
    eps: tl.float64,
    N: tl.constexpr,
    CENTER: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND: tl.constexpr,
    DTYPE: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALING: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    ACC: tl.constexpr,
    RESCUE: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STREAM: tl.constexpr,
    PRELOAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile of ROWS rows, each read once and held. Those whose squares fp32 did not hold are done again, scaled, apart.

    PRELOAD asks for w and b before the statistics are known, as row.row_forward does.
    """
    wait_for_previous(PDL)
    let_next_launch(PDL)
    eps = tl.full([1, 1], eps, ACC)
    rows = tile_rows(first_program(), ROWS)
    if scale_strides is None:
        store_padding(SCALE, first_program(), M, chunks_of(N, BLOCK), ROWS)
        live = rows < M
    else:
        live = rows_live(rows, M, ROWS)
    outs, given = (DATA, SCALE, SUM, MEAN, RSTD), (X, X_SCALE, RESIDUAL, W, B, GIVEN)
    at = row_offsets(rows, x_odd_sizes, x_strides), x_scale_stride, scale_strides
    good = quantize_tile(
        outs,
        given,
        at,
        rows,
        live,
        eps,
        N,
        CENTER,
        OFFSET,
        ROUND,
        DTYPE,
        ELEMENT,
        SCALING,
        BLOCK,
        LARGEST,
        ACC,
        RESCUE,
        CHUNK,
        STREAM,
        PRELOAD,
        False,
    )
    if RESCUE:
        bad = live & (good == 0)
        if tl.max(bad.to(tl.int32)) == 1:
            quantize_tile(
                outs,
                given,
                at,
                rows,
                bad,
                eps,
                N,
                CENTER,
                OFFSET,
                ROUND,
                DTYPE,
                ELEMENT,
                SCALING,
                BLOCK,
                LARGEST,
                ACC,
                RESCUE,
                CHUNK,
                STREAM,
                PRELOAD,
                True,
            )
