"""Row norms of wide rows: a row is split over the programs of a team, which tell each other their share of its sums.

So x (and dy) are read once, as rows that one program can hold are. What a team has to agree on is one word for each
program, of two fp32 numbers (team.py).
"""

import triton
import triton.language as tl

from .added import add_row, rows_in_memory
from .affine import NO_BIAS, NO_WEIGHT
from .index import (
    chunk_columns,
    columns_live,
    first_program,
    load_or,
    load_row,
    load_row_or,
    program_count,
    row_offsets,
    tile_rows,
    widened,
)
from .overlap import let_next_launch, wait_for_previous
from .row import normalize_streamed, store_stats, store_y
from .row_backward import add_db, add_dw, dx_sums, load_stats, store_column_sums, store_dx, undoing_row, zero_chunks
from .stats import held_moments, mean_of, rescued_stats, trusted
from .team import awaited, publish, see_what_others_stored, team_sum


@triton.jit
def merged_blocks(means, squares, N: tl.constexpr, BLOCK: tl.constexpr, CENTER: tl.constexpr):
    """Chan's rule: (mean, power) of a row from the mean and the sum of squares of each of its blocks."""
    if CENTER:
        member = tl.arange(0, means.shape[0]) < N // BLOCK
        mean = mean_of(team_sum(means), N // BLOCK)
        # What rounding left in the mean is the mean of the blocks' distances from it (stats.settled).
        mean += mean_of(team_sum(tl.where(member, means - tl.sum(mean), 0.0)), N // BLOCK)
        shift = tl.where(member, means - tl.sum(mean), 0.0)
        return mean, mean_of(team_sum(squares + shift * shift * BLOCK), N)
    else:
        return tl.zeros([1, 1], tl.float32), mean_of(team_sum(squares), N)


@triton.jit
def row_forward_split(
    Y,
    MEAN,
    RSTD,
    SUM,
    WORDS,
    X,
    W,
    B,
    RESIDUAL,
    SEED,
    ROW_SCALE,
    x_odd_sizes,
    x_strides,
    eps: tl.float64,
    N: tl.constexpr,
    CENTER: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND: tl.constexpr,
    ALPHA: tl.constexpr,
    DROP: tl.constexpr,
    ACC: tl.constexpr,
    RESCUE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One block of one row a program, held as chunks."""
    TEAM: tl.constexpr = N // BLOCK
    wait_for_previous(PDL)
    let_next_launch(PDL)
    eps = tl.full([1, 1], eps, ACC)
    row = tile_rows(first_program() // TEAM, 1)
    member = (first_program() % TEAM).to(tl.int32)
    start = member * BLOCK
    every = tl.full([1, 1], True, tl.int1)
    xs = load_row(X + row_offsets(row, x_odd_sizes, x_strides) + start, every, BLOCK, CHUNK, True)
    xs = add_row((SUM, RESIDUAL, SEED, ROW_SCALE), xs, row, start, every, N, BLOCK, ALPHA, DROP, ACC, True)

    mean, power = held_moments(xs, BLOCK, CENTER, ACC)
    words = WORDS + first_program() - member
    publish(words + member, mean, power * BLOCK, every, RELEASE=RESCUE and SUM is not None)
    means, squares = awaited(words, True, TEAM, LANES)
    mean, power = merged_blocks(means, squares, N, BLOCK, CENTER)
    good = trusted(power + eps) if RESCUE else row >= 0
    rstd = tl.rsqrt(power + eps)
    first = tl.full([1, 1], member == 0, tl.int1)
    store_stats(MEAN, RSTD, row, mean, rstd, first & good, CENTER)

    for i in tl.static_range(len(xs)):
        columns = chunk_columns(start + i * CHUNK, CHUNK)
        live = columns_live(columns, BLOCK, N)
        w = load_or(W, columns, live, NO_WEIGHT, True)
        b = load_or(B, columns, live, NO_BIAS, True)
        store_y(Y, row * N + columns, xs[i], mean, rstd, w, b, live & good, OFFSET, ROUND, ACC, True)

    if RESCUE:
        if tl.min(good.to(tl.int32)) == 0:
            if SUM is not None:
                see_what_others_stored(LANES)
            x_row = rows_in_memory(X, SUM, row, x_odd_sizes, x_strides, N)
            mean, rstd = rescued_stats(x_row, eps, N, CENTER, ACC, CHUNK)
            store_stats(MEAN, RSTD, row, mean, rstd, first, CENTER)
            end = start + BLOCK
            normalize_streamed(Y, x_row, W, B, row, start, end, mean, rstd, ~good, N, OFFSET, ROUND, ACC, CHUNK, False)


@triton.jit
def widened_chunks(chunks, ACC: tl.constexpr):
    """Chunks in the accumulator's dtype."""
    wide = ()
    for i in tl.static_range(len(chunks)):
        wide = wide + (widened(chunks[i], ACC),)
    return wide


@triton.jit(do_not_specialize=["M"])
def row_backward_split(
    DX,
    DRESIDUAL,
    DW,
    DB,
    WORDS,
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
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Persistent teams walk rows, a block of columns each program; DW and DB are ``[teams, N]`` partials.

    dx of a row comes one step late, with the row still held: by then the team has told its shares, and nobody waits
    (H200, RMSNorm at 65536 columns: 114 µs against 134).
    """
    TEAM: tl.constexpr = N // BLOCK
    wait_for_previous(PDL)
    team = first_program() // TEAM
    teams = program_count() // TEAM
    member = (first_program() % TEAM).to(tl.int32)
    start = member * BLOCK
    every = tl.full([1, 1], True, tl.int1)
    ws = load_row_or(None if W is None else W + start, every, BLOCK, CHUNK, NO_WEIGHT)
    bs = load_row_or(None if B is None else B + start, every, BLOCK, CHUNK, NO_BIAS)
    dw = zero_chunks(BLOCK, 1, CHUNK, ACC)
    db = zero_chunks(BLOCK, 1, CHUNK, ACC)
    held = zero_chunks(BLOCK, 1, CHUNK, KEPT.dtype.element_ty)
    held_dys = zero_chunks(BLOCK, 1, CHUNK, DY.dtype.element_ty)

    # With dx one step more than there are rows; what a step has no row for is masked.
    for row_number in tl.range(team, M if DX is None else M + teams, teams, num_stages=STAGES):
        row = tile_rows(row_number, 1)
        live = every if DX is None else row < M
        kept = load_row(KEPT + row_offsets(row, kept_odd_sizes, kept_strides) + start, live, BLOCK, CHUNK, True)
        dys = load_row(DY + row_offsets(row, dy_odd_sizes, dy_strides) + start, live, BLOCK, CHUNK, True)
        mean, rstd = load_stats(MEAN, RSTD, row, live)
        shifts, scales = undoing_row(mean, rstd, ws, bs, OFFSET, FROM_OUTPUT, ACC)
        # Widened for the first use only, so that the second holds half the registers: with room to spare it saves
        # instructions, and LayerNorm has none (RMSNorm at 65536 columns: 105 µs against 112, LayerNorm 126 against 124).
        first_kept = kept if CENTER else widened_chunks(kept, ACC)
        first_dys = dys if CENTER else widened_chunks(dys, ACC)
        if DW is not None:
            dw = add_dw(dw, first_kept, first_dys, shifts, scales, DY.dtype.element_ty, ROUND, ACC)
        if DB is not None:
            db = add_db(db, first_dys, ACC)
        if DX is not None:
            c1, c2 = dx_sums(first_kept, first_dys, ws, shifts, scales, CENTER, OFFSET, ACC)
            publish(WORDS + row * TEAM + member, c1, c2, live)

            before = tl.maximum(row_number - teams, 0)
            asked = row_number >= teams
            c1s, c2s = awaited(WORDS + before * TEAM, asked, TEAM, LANES)
            c1, c2 = mean_of(team_sum(c1s), N), mean_of(team_sum(c2s), N)
            row = tile_rows(before, 1)
            live = tl.full([1, 1], asked, tl.int1)
            mean, rstd = load_stats(MEAN, RSTD, row, live)
            shifts, scales = undoing_row(mean, rstd, ws, bs, OFFSET, FROM_OUTPUT, ACC)
            outs, late = (DX, DRESIDUAL, DSUM, SEED, ROW_SCALE), (held, held_dys, ws, shifts, scales)
            store_dx(outs, late, rstd, c1, c2, row, live, start, N, BLOCK, CENTER, OFFSET, ALPHA, DROP, ACC, True)
            held = kept
            held_dys = dys
    let_next_launch(PDL)

    if DW is not None:
        store_column_sums(DW, team * N + start, dw, BLOCK)
    if DB is not None:
        store_column_sums(DB, team * N + start, db, BLOCK)
