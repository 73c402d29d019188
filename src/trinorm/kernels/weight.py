"""Weight normalization: each row of v at a length of its own.

    w = g·v/‖v‖                                         ‖v‖ = √Σ v² over the N elements of a row
    dg = Σ dw·v/‖v‖,   dv = (g/‖v‖)·(dw - v·(Σ dw·v)/‖v‖²)

so that a row has two sums, and there is none over rows. fp32 has the squares of no element beyond 1.8e19, so all is of
u = v/unit, whose unit is a power of two that brings the row's largest element to 1..2, and changes no digit:

    w = u·g·r,   dg = d·r,   dv = (dw - u·d·r²)·g·r/unit   with r = (Σ u²)^-1/2 and d = Σ dw·u

docs/mathematics.md derives them. A program holds whole rows, each read once. Of a row longer than that it has a chunk: the
row's PARTS programs of weight_sums have taken its sums before, each with a unit of its own, and joined_sums brings these
to one. N may be 2^31 and more, so a chunk begins at an int64.
"""

import triton
import triton.language as tl

from .heads import rsqrt_rounded
from .index import (
    chunk_columns,
    chunks_of,
    columns_live,
    first_program,
    load,
    load_row,
    row_offsets,
    rows_live,
    store_once,
    tile_rows,
    widened,
)
from .overlap import let_next_launch, wait_for_previous
from .stats import power_of_two_below, row_sum, row_sums


@triton.jit
def row_unit(vs, ACC: tl.constexpr):
    """What the rows are divided by."""
    largest = tl.zeros([vs[0].shape[0], vs[0].shape[1]], ACC)
    for i in tl.static_range(len(vs)):
        largest = tl.maximum(largest, tl.abs(widened(vs[i], ACC)))
    return power_of_two_below(tl.max(largest, axis=1, keep_dims=True))


@triton.jit
def weight_row_sums(vs, dws, ACC: tl.constexpr):
    """(unit, Σ u², Σ dw·u), each ``[ROWS, 1]``, of rows held as chunks. dws: None in a forward, where the last is 0."""
    unit = row_unit(vs, ACC)
    scale = 1.0 / unit
    squares = tl.zeros([vs[0].shape[0], vs[0].shape[1]], ACC)
    products = tl.zeros([vs[0].shape[0], vs[0].shape[1]], ACC)
    for i in tl.static_range(len(vs)):
        u = widened(vs[i], ACC) * scale
        squares += u * u
        if dws is not None:
            products += widened(dws[i], ACC) * u
    if dws is None:
        return unit, row_sum(squares), row_sum(products)
    else:
        total, dot = row_sums(squares, products)
        return unit, total, dot


@triton.jit
def joined_sums(SUMS, row, PARTS: tl.constexpr, PADDED: tl.constexpr, ACC: tl.constexpr):
    """The same of one whole row, each ``[1, 1]``, from those of its parts, ``[M, 3, PARTS]``.

    Over all axes, so that what is summed is no tensor: of a tensor one layout served these few and the chunk, and bringing
    it from the one to the other took 2048 stores to shared memory (Triton 3.7.1).
    """
    parts = chunk_columns(0, PADDED)
    there = columns_live(parts, PADDED, PARTS)
    at = SUMS + row * (3 * PARTS) + parts
    units = load(at, there)
    unit = tl.max(units)
    shares = units * (1.0 / unit)
    total = tl.sum(load(at + PARTS, there) * shares * shares)
    dot = tl.sum(load(at + 2 * PARTS, there) * shares)
    return tl.full([1, 1], unit, ACC), tl.full([1, 1], total, ACC), tl.full([1, 1], dot, ACC)


@triton.jit
def span_live(start, N: tl.constexpr, CHUNK: tl.constexpr):
    """Which columns of the chunk at ``start`` exist, ``[1, CHUNK]``."""
    columns = chunk_columns(0, CHUNK)
    if N % CHUNK == 0:
        return tl.full(columns.shape, True, tl.int1)
    else:
        return columns < tl.full([1, 1], N, tl.int64) - start


@triton.jit
def own_part(M, N: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr):
    """(rows, the column that this program's begin at, which of them there are): whole rows, or a chunk of one."""
    program = first_program()
    if WHOLE:
        rows = tile_rows(program, ROWS)
        return rows, program * 0, rows_live(rows, M, ROWS)
    else:
        start = program % chunks_of(N, CHUNK) * CHUNK
        return tile_rows(program // chunks_of(N, CHUNK), 1), start, span_live(start, N, CHUNK)


@triton.jit
def weight_sums(
    SUMS,
    V,
    DW,
    v_odd_sizes,
    v_strides,
    dw_odd_sizes,
    dw_strides,
    N: tl.constexpr,
    ACC: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """PARTS programs a row, each of every PARTS-th chunk. DW is None in a forward."""
    wait_for_previous(PDL)
    let_next_launch(PDL)
    program = first_program()
    rows, part = tile_rows(program // PARTS, 1), program % PARTS
    v_row = V + row_offsets(rows, v_odd_sizes, v_strides)
    unit = power_of_two_below(tl.zeros([1, 1], ACC))  # the least
    total = tl.zeros([1, 1], ACC)
    dot = tl.zeros([1, 1], ACC)
    for chunk in tl.range(part, chunks_of(N, CHUNK), PARTS):
        start = chunk * CHUNK
        live = span_live(start, N, CHUNK)
        vs = load_row(v_row + start, live, CHUNK, CHUNK, False)
        dws = None
        if DW is not None:
            dws = load_row(DW + row_offsets(rows, dw_odd_sizes, dw_strides) + start, live, CHUNK, CHUNK, False)
        next_unit, next_total, next_dot = weight_row_sums(vs, dws, ACC)
        larger = tl.maximum(unit, next_unit)
        share, next_share = unit * (1.0 / larger), next_unit * (1.0 / larger)
        total = total * share * share + next_total * next_share * next_share
        dot = dot * share + next_dot * next_share
        unit = larger
    at = SUMS + rows * (3 * PARTS) + part
    tl.store(at, unit)
    tl.store(at + PARTS, total)
    tl.store(at + 2 * PARTS, dot)


@triton.jit(do_not_specialize=["M"])
def weight_forward(
    W,
    V,
    G,
    SUMS,
    M: tl.int64,
    v_odd_sizes,
    v_strides,
    N: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    PADDED: tl.constexpr,
    STREAM: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile of ROWS rows, each read once and held; with SUMS, a chunk of one row."""
    wait_for_previous(PDL)
    let_next_launch(PDL)
    WIDTH: tl.constexpr = N if SUMS is None else CHUNK
    rows, start, live = own_part(M, N, ROWS, CHUNK, SUMS is None)
    vs = load_row(V + row_offsets(rows, v_odd_sizes, v_strides) + start, live, WIDTH, CHUNK, STREAM)
    if SUMS is None:
        unit, total, _ = weight_row_sums(vs, None, ACC)
    else:
        unit, total, _ = joined_sums(SUMS, rows, PARTS, PADDED, ACC)
    scale, r, g = 1.0 / unit, rsqrt_rounded(total), load(G + rows, rows_live(rows, M, ROWS)).to(ACC)
    for i in tl.static_range(len(vs)):
        columns = chunk_columns(i * CHUNK, CHUNK)
        w = widened(vs[i], ACC) * scale * r * g  # in this order: u·r of the one element of a row is 1, or the next number
        store_once(W + rows * N + start + columns, w, live & columns_live(columns, (i + 1) * CHUNK, WIDTH), STREAM)


@triton.jit(do_not_specialize=["M"])
def weight_backward(
    DV,
    DG,
    DW,
    V,
    G,
    SUMS,
    M: tl.int64,
    dw_odd_sizes,
    dw_strides,
    v_odd_sizes,
    v_strides,
    N: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    PADDED: tl.constexpr,
    STREAM: tl.constexpr,
    PDL: tl.constexpr,
):
    """The same. DV and DG may be None: only what is asked for is computed."""
    wait_for_previous(PDL)
    let_next_launch(PDL)
    WIDTH: tl.constexpr = N if SUMS is None else CHUNK
    rows, start, live = own_part(M, N, ROWS, CHUNK, SUMS is None)
    vs = load_row(V + row_offsets(rows, v_odd_sizes, v_strides) + start, live, WIDTH, CHUNK, STREAM)
    dws = load_row(DW + row_offsets(rows, dw_odd_sizes, dw_strides) + start, live, WIDTH, CHUNK, STREAM)
    if SUMS is None:
        unit, total, dot = weight_row_sums(vs, dws, ACC)
    else:
        unit, total, dot = joined_sums(SUMS, rows, PARTS, PADDED, ACC)
    r, there = rsqrt_rounded(total), rows_live(rows, M, ROWS)
    dg = dot * r
    if DG is not None:
        tl.store(DG + rows, dg.to(DG.dtype.element_ty), there & (start == 0))
    if DV is not None:
        scale, length = 1.0 / unit, load(G + rows, there).to(ACC) * r
        for i in tl.static_range(len(vs)):
            columns = chunk_columns(i * CHUNK, CHUNK)
            u, dw = widened(vs[i], ACC) * scale, widened(dws[i], ACC)
            # By one factor after the other: of the least rows their product leaves the range before the result does.
            dv = (dw - u * (dg * r)) * length * scale
            store_once(DV + rows * N + start + columns, dv, live & columns_live(columns, (i + 1) * CHUNK, WIDTH), STREAM)
