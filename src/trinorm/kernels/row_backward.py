"""Row norms, backward. With g = dy·(w + OFFSET), x̂ = (x - mean)·rstd and means taken over a row's N elements:

    dx = rstd·(g - x̂·c1 - c2),   c1 = mean(g·x̂),   c2 = mean(g) with CENTER, else 0
    dw = Σ_rows dy·x̂,            db = Σ_rows dy

docs/mathematics.md derives them. x̂ = (v - shift)·scale of what the forward kept: v is x, with the row's mean and rstd; or,
with FROM_OUTPUT, y, with the columns' b and 1/(w + OFFSET). With ROUND dw is of x̂ as y had it, rounded (affine.py). DX, DW
and DB may be None: only what is asked for is computed. What else is named is added.py's, where x is a sum. Sums
over rows are taken in a fixed order, in fp32, with no atomics: the same bits on every run.

- ``row_backward_few``       few rows: one launch, in which some programs take rows (dx) and others columns (dw, db)
- ``row_backward``           many rows: persistent programs walk tiles of whole rows, dw and db in registers

Where each program made a partial of dw and db, partials.py adds them up.

Rows too wide to hold are split over a team (row_split.py) or read twice (row_backward_wide.py).
"""

import triton
import triton.language as tl

from .added import store_input_gradients
from .affine import NO_BIAS, NO_WEIGHT, affine_backward, offset_by, rounded
from .index import (
    chunk_columns,
    columns_live,
    first_program,
    load,
    load_or,
    load_row,
    load_row_or,
    program_count,
    rounded_up,
    row_offsets,
    rows_live,
    tile_rows,
)
from .overlap import let_next_launch, wait_for_previous
from .stats import mean_of, row_sum, row_sums


@triton.jit
def load_stats(MEAN, RSTD, rows, live):
    """(mean, rstd) of some rows; the mean is 0 where MEAN is None."""
    rstd = load(RSTD + rows, live)
    if MEAN is None:
        return tl.zeros_like(rstd), rstd
    else:
        return load(MEAN + rows, live), rstd


@triton.jit
def undoing(mean, rstd, w, b, OFFSET: tl.constexpr, FROM_OUTPUT: tl.constexpr, ACC: tl.constexpr):
    """The shift and scale that make x̂ of some columns of what was kept."""
    if FROM_OUTPUT:
        return b.to(ACC), 1.0 / offset_by(w.to(ACC), OFFSET)
    else:
        return mean, rstd


@triton.jit
def undoing_row(mean, rstd, ws, bs, OFFSET: tl.constexpr, FROM_OUTPUT: tl.constexpr, ACC: tl.constexpr):
    """``undoing`` of each chunk of a row: shifts and scales."""
    shifts = ()
    scales = ()
    for i in tl.static_range(len(ws)):
        shift, scale = undoing(mean, rstd, ws[i], bs[i], OFFSET, FROM_OUTPUT, ACC)
        shifts = shifts + (shift,)
        scales = scales + (scale,)
    return shifts, scales


@triton.jit
def normalized(kept, shift, scale, ACC: tl.constexpr):
    """x̂ in the accumulator's dtype."""
    return (kept.to(ACC) - shift) * scale


@triton.jit
def dx_of(g, xhat, rstd, c1, c2, CENTER: tl.constexpr):
    """rstd·(g - x̂·c1 - c2). The fma is written out: left to the compiler, g's own product could become the fused one,
    unrounded where c2 was summed from rounded ones, and the two would not cancel where g is its own mean.
    """
    bracket = tl.fma(-xhat, tl.broadcast_to(c1, xhat.shape), g)
    if CENTER:
        bracket -= c2
    return rstd * bracket


@triton.jit
def dx_sums(kept, dys, ws, shifts, scales, CENTER: tl.constexpr, OFFSET: tl.constexpr, ACC: tl.constexpr):
    """(Σ g·x̂, Σ g) over the held columns, each ``[ROWS, 1]``; the second is 0 without CENTER."""
    ROWS: tl.constexpr = kept[0].shape[0]
    CHUNK: tl.constexpr = kept[0].shape[1]
    g_xhat = tl.zeros([ROWS, CHUNK], ACC)
    g_sum = tl.zeros([ROWS, CHUNK], ACC)
    for i in tl.static_range(len(kept)):
        g = affine_backward(dys[i].to(ACC), ws[i], OFFSET)
        g_xhat += g * normalized(kept[i], shifts[i], scales[i], ACC)
        g_sum += g
    if CENTER:
        return row_sums(g_xhat, g_sum)
    else:
        return row_sum(g_xhat), tl.zeros([ROWS, 1], ACC)


@triton.jit
def store_dx(
    outs,
    held,
    rstd,
    c1,
    c2,
    rows,
    live,
    start,
    N: tl.constexpr,
    HELD: tl.constexpr,
    CENTER: tl.constexpr,
    OFFSET: tl.constexpr,
    ALPHA: tl.constexpr,
    DROP: tl.constexpr,
    ACC: tl.constexpr,
    STREAM: tl.constexpr,
):
    """dx of HELD columns from ``start`` of a tile of rows. outs: as store_input_gradients'; held: (what was kept, dy, w,
    shifts, scales), each as chunks.
    """
    kept, dys, ws, shifts, scales = held
    CHUNK: tl.constexpr = kept[0].shape[1]
    for i in tl.static_range(len(kept)):
        mask = live & columns_live(chunk_columns(i * CHUNK, CHUNK), (i + 1) * CHUNK, HELD)
        g = affine_backward(dys[i].to(ACC), ws[i], OFFSET)
        dx = dx_of(g, normalized(kept[i], shifts[i], scales[i], ACC), rstd, c1, c2, CENTER)
        store_input_gradients(outs, dx, rows, start + i * CHUNK, live, mask, N, ALPHA, DROP, ACC, STREAM)


@triton.jit
def store_dx_of_rows(
    outs,
    held,
    rstd,
    rows,
    live,
    N: tl.constexpr,
    CENTER: tl.constexpr,
    OFFSET: tl.constexpr,
    ALPHA: tl.constexpr,
    DROP: tl.constexpr,
    ACC: tl.constexpr,
    STREAM: tl.constexpr,
):
    """dx of a tile of whole rows."""
    c1, c2 = dx_sums(*held, CENTER, OFFSET, ACC)
    c1, c2 = mean_of(c1, N), mean_of(c2, N)
    store_dx(outs, held, rstd, c1, c2, rows, live, 0, N, N, CENTER, OFFSET, ALPHA, DROP, ACC, STREAM)


@triton.jit
def zero_chunks(N: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, ACC: tl.constexpr):
    """One zero accumulator for each chunk of a tile of rows."""
    chunks = ()
    for _ in tl.static_range(0, N, CHUNK):
        chunks = chunks + (tl.zeros([ROWS, CHUNK], ACC),)
    return chunks


@triton.jit
def add_dw(dw, kept, dys, shifts, scales, dtype: tl.constexpr, ROUND: tl.constexpr, ACC: tl.constexpr):
    """dw + dy·x̂, chunk by chunk, still one sum for each row of the tile; with ROUND x̂ as ``dtype`` holds it."""
    chunks = ()
    for i in tl.static_range(len(kept)):
        dy = dys[i].to(ACC)
        chunks = chunks + (dw[i] + dy * rounded(normalized(kept[i], shifts[i], scales[i], ACC), dtype, ROUND),)
    return chunks


@triton.jit
def add_db(db, dys, ACC: tl.constexpr):
    """db + dy, chunk by chunk, still one sum for each row of the tile."""
    chunks = ()
    for i in tl.static_range(len(dys)):
        chunks = chunks + (db[i] + dys[i].to(ACC),)
    return chunks


@triton.constexpr_function
def halvings(rows):
    """How often a power of two can be halved."""
    return rows.bit_length() - 1


@triton.jit
def column_sums(x):
    """The sum of a tile over its rows, ``[1, CHUNK]``: one half of the rows added to the other until one is left.

    ``tl.sum`` would pass the rows of different warps through shared memory with all lanes of a warp on one bank (16384x768
    in tiles of 4 rows: 44 µs).
    """
    for _ in tl.static_range(halvings(x.shape[0])):
        upper, lower = tl.split(tl.permute(tl.reshape(x, [2, x.shape[0] // 2, x.shape[1]]), (1, 2, 0)))
        x = upper + lower
    return x


@triton.jit
def store_column_sums(OUT, offset, sums, N: tl.constexpr):
    """Each chunk's sum over the tile's rows, at ``OUT + offset``."""
    CHUNK: tl.constexpr = sums[0].shape[1]
    for i in tl.static_range(len(sums)):
        columns = chunk_columns(i * CHUNK, CHUNK)
        total = column_sums(sums[i]).to(OUT.dtype.element_ty)
        tl.store(OUT + offset + columns, total, mask=columns_live(columns, (i + 1) * CHUNK, N))


@triton.jit(do_not_specialize=["M"])
def row_backward(
    DX,
    DRESIDUAL,
    DW,
    DB,
    DY,
    DSUM,
    SEED,
    ROW_SCALE,
    KEPT,
    W,
    B,
    MEAN,
    RSTD,
    M: tl.int64,  # M + ROWS passes 2^31 before M does
    kept_odd_sizes,
    kept_strides,
    dy_odd_sizes,
    dy_strides,
    N: tl.constexpr,
    CENTER: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
    ALPHA: tl.constexpr,
    DROP: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
    STREAM: tl.constexpr,
    PDL: tl.constexpr,
):
    """TILES tiles of ROWS rows at a time, walked by a persistent program; DW and DB are ``[programs, N]`` partials."""
    wait_for_previous(PDL)
    dw = zero_chunks(N, ROWS, CHUNK, ACC)
    db = zero_chunks(N, ROWS, CHUNK, ACC)
    every = tl.full([ROWS, 1], True, tl.int1)
    ws = load_row_or(W, every, N, CHUNK, NO_WEIGHT)
    bs = load_row_or(B, every, N, CHUNK, NO_BIAS)

    # 3 stages is the lever of this loop, 2 is often worse than 1 (H200: 8192 columns reach 0.92 of the add).
    for step in tl.range(first_program(), tl.cdiv(M, ROWS * TILES), program_count(), num_stages=STAGES):
        for t in tl.static_range(TILES):
            rows = tile_rows(step * TILES + t, ROWS)
            live = rows_live(rows, M, ROWS * TILES)
            kept = load_row(KEPT + row_offsets(rows, kept_odd_sizes, kept_strides), live, N, CHUNK, STREAM)
            dys = load_row(DY + row_offsets(rows, dy_odd_sizes, dy_strides), live, N, CHUNK, STREAM)
            mean, rstd = load_stats(MEAN, RSTD, rows, live)
            shifts, scales = undoing_row(mean, rstd, ws, bs, OFFSET, FROM_OUTPUT, ACC)
            if DW is not None:
                dw = add_dw(dw, kept, dys, shifts, scales, DY.dtype.element_ty, ROUND, ACC)
            if DB is not None:
                db = add_db(db, dys, ACC)
            if DX is not None:
                outs, held = (DX, DRESIDUAL, DSUM, SEED, ROW_SCALE), (kept, dys, ws, shifts, scales)
                store_dx_of_rows(outs, held, rstd, rows, live, N, CENTER, OFFSET, ALPHA, DROP, ACC, STREAM)
    let_next_launch(PDL)

    if DW is not None:
        store_column_sums(DW, first_program() * N, dw, N)
    if DB is not None:
        store_column_sums(DB, first_program() * N, db, N)


@triton.jit(do_not_specialize=["M", "row_tiles"])
def row_backward_few(
    DX,
    DRESIDUAL,
    DW,
    DB,
    DY,
    DSUM,
    SEED,
    ROW_SCALE,
    KEPT,
    W,
    B,
    MEAN,
    RSTD,
    M: tl.int64,
    row_tiles,
    kept_odd_sizes,
    kept_strides,
    dy_odd_sizes,
    dy_strides,
    N: tl.constexpr,
    CENTER: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
    ALPHA: tl.constexpr,
    DROP: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    SUM_ROWS: tl.constexpr,
    SUM_CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """The first ``row_tiles`` programs make dx, a tile of rows each; the others dw and db, some columns each.

    x and dy are read twice, the second time from L2. Nothing waits: neither half needs what the other makes.
    """
    wait_for_previous(PDL)
    let_next_launch(PDL)
    program = first_program()
    if program < row_tiles:
        if DX is not None:
            rows = tile_rows(program, ROWS)
            live = rows_live(rows, M, ROWS)
            kept = load_row(KEPT + row_offsets(rows, kept_odd_sizes, kept_strides), live, N, CHUNK, False)
            dys = load_row(DY + row_offsets(rows, dy_odd_sizes, dy_strides), live, N, CHUNK, False)
            ws = load_row_or(W, live, N, CHUNK, NO_WEIGHT)
            bs = load_row_or(B, live, N, CHUNK, NO_BIAS)
            mean, rstd = load_stats(MEAN, RSTD, rows, live)
            shifts, scales = undoing_row(mean, rstd, ws, bs, OFFSET, FROM_OUTPUT, ACC)
            outs, held = (DX, DRESIDUAL, DSUM, SEED, ROW_SCALE), (kept, dys, ws, shifts, scales)
            store_dx_of_rows(outs, held, rstd, rows, live, N, CENTER, OFFSET, ALPHA, DROP, ACC, False)
    else:
        columns = chunk_columns((program - row_tiles) * SUM_CHUNK, SUM_CHUNK)
        in_row = columns_live(columns, rounded_up(N, SUM_CHUNK), N)
        w = load_or(W if FROM_OUTPUT else None, columns, in_row, NO_WEIGHT, False)
        b = load_or(B, columns, in_row, NO_BIAS, False)
        dw = tl.zeros([SUM_ROWS, SUM_CHUNK], ACC)
        db = tl.zeros([SUM_ROWS, SUM_CHUNK], ACC)
        for tile in tl.range(0, tl.cdiv(M, SUM_ROWS)):
            rows = tile_rows(tile, SUM_ROWS)
            live = rows < M
            dy = load(DY + row_offsets(rows, dy_odd_sizes, dy_strides) + columns, live & in_row).to(ACC)
            if DB is not None:
                db += dy
            if DW is not None:
                mean, rstd = load_stats(MEAN, RSTD, rows, live)
                shift, scale = undoing(mean, rstd, w, b, OFFSET, FROM_OUTPUT, ACC)
                kept = load(KEPT + row_offsets(rows, kept_odd_sizes, kept_strides) + columns, live & in_row)
                dw += dy * rounded(normalized(kept, shift, scale, ACC), DY.dtype.element_ty, ROUND)
        if DW is not None:
            total = tl.sum(dw, axis=0, keep_dims=True).to(DW.dtype.element_ty)
            tl.store(DW + columns, total, mask=in_row)
        if DB is not None:
            total = tl.sum(db, axis=0, keep_dims=True).to(DB.dtype.element_ty)
            tl.store(DB + columns, total, mask=in_row)
