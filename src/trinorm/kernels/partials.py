"""The last step of a backward whose programs each made a partial of dw and db: their sums, in a fixed order."""

import triton
import triton.language as tl

from .index import chunk_columns, columns_live, first_program, load, rounded_up, second_program, tile_rows
from .overlap import let_next_launch, wait_for_previous


@triton.jit
def sum_partial(OUT, PARTIAL, P, sets, N: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """The sum of ``[P, N]`` partials over P, of one chunk of columns, in the order of the programs that made them; with
    sets of ``[P, sets, N]``, of one set.
    """
    program, step = first_program(), N
    if sets is not None:
        CHUNKS: tl.constexpr = (N + CHUNK - 1) // CHUNK
        OUT += program // CHUNKS * N
        PARTIAL += program // CHUNKS * N
        program, step = program % CHUNKS, sets * N
    columns = chunk_columns(program * CHUNK, CHUNK)
    in_row = columns_live(columns, rounded_up(N, CHUNK), N)
    total = tl.zeros([ROWS, CHUNK], ACC)
    for tile in tl.range(0, tl.cdiv(P, ROWS)):
        rows = tile_rows(tile, ROWS)
        total += load(PARTIAL + rows * step + columns, (rows < P) & in_row)
    tl.store(OUT + columns, tl.sum(total, axis=0, keep_dims=True).to(OUT.dtype.element_ty), mask=in_row)


@triton.jit(do_not_specialize=["P", "sets"])
def sum_partials(
    DW,
    DB,
    DW_PARTIAL,
    DB_PARTIAL,
    P,
    sets,
    N: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """dw (grid axis 1: 0) and db (1) from their partials. sets: as sum_partial's, or None."""
    wait_for_previous(PDL)
    let_next_launch(PDL)
    if DB is None:
        sum_partial(DW, DW_PARTIAL, P, sets, N, ACC, ROWS, CHUNK)
    elif DW is None:
        sum_partial(DB, DB_PARTIAL, P, sets, N, ACC, ROWS, CHUNK)
    elif second_program() == 0:
        sum_partial(DW, DW_PARTIAL, P, sets, N, ACC, ROWS, CHUNK)
    else:
        sum_partial(DB, DB_PARTIAL, P, sets, N, ACC, ROWS, CHUNK)


@triton.jit
def sum_number(OUT, PARTIAL, P, ACC: tl.constexpr, LANES: tl.constexpr):
    """The sum of P partials of one number, so many at a time."""
    total = tl.zeros([1, LANES], ACC)
    for start in tl.range(0, P, LANES):
        at = chunk_columns(start, LANES)
        total += load(PARTIAL + at, at < P)
    tl.store(OUT + tl.zeros([1, 1], tl.int32), tl.sum(total, axis=1, keep_dims=True).to(OUT.dtype.element_ty))


@triton.jit(do_not_specialize=["P", "Q"])
def sum_columns_and_numbers(
    DW,
    DB,
    FIRST,
    SECOND,
    DW_PARTIAL,
    DB_PARTIAL,
    FIRST_PARTIAL,
    SECOND_PARTIAL,
    P,
    Q,
    N: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """dw (grid axis 1: 0) and db (1) from P partials of N columns, as sum_partials, and in the same launch two numbers (2:
    the first program and the second) from Q partials. Each of them may be None.
    """
    wait_for_previous(PDL)
    let_next_launch(PDL)
    which, program = second_program(), first_program()
    if DW is not None:
        if which == 0:
            sum_partial(DW, DW_PARTIAL, P, None, N, ACC, ROWS, CHUNK)
    if DB is not None:
        if which == 1:
            sum_partial(DB, DB_PARTIAL, P, None, N, ACC, ROWS, CHUNK)
    if FIRST is not None:
        if (which == 2) & (program == 0):
            sum_number(FIRST, FIRST_PARTIAL, Q, ACC, ROWS * CHUNK)
    if SECOND is not None:
        if (which == 2) & (program == 1):
            sum_number(SECOND, SECOND_PARTIAL, Q, ACC, ROWS * CHUNK)
