"""Which rows and columns a program owns: ids, 64-bit offsets, masks.

Tiles are 2-D, ``[ROWS, CHUNK]``. A row of N columns is ``cdiv(N, CHUNK)`` chunks; only the last one can be ragged, so
only it is masked, and when CHUNK divides N no column mask exists at all. Row numbers are int64 from the start: a row
number times a stride passes 2^31 long before memory runs out.
"""

import triton
import triton.language as tl
from triton.language.target_info import is_cuda


@triton.jit
def first_program():
    """This program's number along the grid's first axis, as int64."""
    return tl.program_id(0).to(tl.int64)


@triton.jit
def second_program():
    """This program's number along the grid's second axis."""
    return tl.program_id(1)


@triton.jit
def program_count():
    """How many programs the grid's first axis has: the stride of a persistent loop."""
    return tl.num_programs(0)


@triton.jit
def tile_rows(tile, ROWS: tl.constexpr):
    """Row numbers of a tile, int64 ``[ROWS, 1]``."""
    return tile * ROWS + tl.arange(0, ROWS)[:, None]


@triton.jit
def rows_live(rows, M, TOGETHER: tl.constexpr):
    """Which rows of a tile exist, of a program that takes TOGETHER. One row always does: that mask folds away."""
    if TOGETHER == 1:
        return tl.full([1, 1], True, tl.int1)
    else:
        return rows < M


@triton.jit
def chunk_columns(start, CHUNK: tl.constexpr):
    """Column numbers of the chunk that begins at column ``start``, ``[1, CHUNK]``."""
    return tl.arange(0, CHUNK)[None, :] + start


@triton.jit
def columns_live(columns, END: tl.constexpr, N: tl.constexpr):
    """Which columns of a chunk that ends before column END exist. When all do the mask is constant, and folds away."""
    if END <= N:
        return tl.full(columns.shape, True, tl.int1)
    else:
        return columns < N


@triton.constexpr_function
def rounded_up(n, multiple):
    """The least multiple of ``multiple`` that is >= n: where the last chunk of a row ends."""
    return -(-n // multiple) * multiple


@triton.constexpr_function
def chunks_of(columns, CHUNK):
    """How many chunks so many columns begin."""
    return -(-columns // CHUNK)


@triton.jit
def load(pointers, mask):
    """A load whose masked lanes read 0."""
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def load_once(pointers, mask, STREAM: tl.constexpr):
    """A load of what is not read again; with STREAM, L2 is told so."""
    return tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first" if STREAM else "")


@triton.jit
def store_once(pointers, value, mask, STREAM: tl.constexpr):
    """A store, in the tensor's dtype, of what this kernel does not read; with STREAM, L2 is told so."""
    tl.store(pointers, value.to(pointers.dtype.element_ty), mask=mask, cache_modifier=".cs" if STREAM else "")


@triton.jit
def load_or(POINTER, columns, mask, absent: tl.constexpr, STREAM: tl.constexpr):
    """Some columns of a vector that every row reads; the fp32 constant of bits ``absent`` where POINTER is None.

    With the operation's identity for ``absent`` the operation folds away (affine.NO_WEIGHT, NO_BIAS). Masked lanes read the
    identity too, 1 or 0, so that a weight can be divided by. A mask of ``[ROWS, CHUNK]`` reads the columns once for each
    row: where rows lie in different warps that costs less than sharing one reading through shared memory.
    """
    if POINTER is None:
        return tl.full([1, 1], absent, tl.int32).to(tl.float32, bitcast=True)
    else:
        pointers = tl.broadcast_to(POINTER + columns, mask.shape)
        identity: tl.constexpr = 1.0 if absent > 0 else 0.0
        return tl.load(pointers, mask=mask, other=identity, eviction_policy="evict_last" if STREAM else "")


@triton.jit
def load_row(pointers, live, N: tl.constexpr, CHUNK: tl.constexpr, STREAM: tl.constexpr, stride=1):
    """A tile of whole rows as a tuple of ``cdiv(N, CHUNK)`` chunks in their storage dtype.

    Held as stored and converted at each use: fewer registers than holding fp32, and no waste on a power of two. stride:
    from a column to the next.
    """
    chunks = ()
    for start in tl.static_range(0, N, CHUNK):
        columns = chunk_columns(start, CHUNK)
        mask = live & columns_live(columns, start + CHUNK, N)
        chunks = chunks + (load_once(pointers + columns * stride, mask, STREAM),)
    return chunks


@triton.jit
def load_row_or(POINTER, live, N: tl.constexpr, CHUNK: tl.constexpr, absent: tl.constexpr):
    """A whole vector as chunks, one reading for each row of ``live``; constants where POINTER is None (load_or)."""
    chunks = ()
    for start in tl.static_range(0, N, CHUNK):
        columns = chunk_columns(start, CHUNK)
        mask = live & columns_live(columns, start + CHUNK, N)
        chunks = chunks + (load_or(POINTER, columns, mask, absent, False),)
    return chunks


@triton.constexpr_function
def takes_ptx():
    """Whether the code becomes PTX: a GPU of NVIDIA's, and not the interpreter."""
    return is_cuda() and not triton.knobs.runtime.interpret


@triton.constexpr_function
def is_interpreted():
    """Whether Triton's interpreter runs the code."""
    return triton.knobs.runtime.interpret


# Both halves of a register, each with zeros behind it. Left to itself the compiler takes three instructions.
_WIDEN_TWO: tl.constexpr = tl.constexpr("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;")


@triton.jit
def widened(x, ACC: tl.constexpr):
    """x in the accumulator's dtype."""
    if x.dtype == tl.bfloat16 and tl.float32 == ACC and x.numel > 1 and takes_ptx():
        return tl.inline_asm_elementwise(_WIDEN_TWO, "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2)
    else:
        return x.to(ACC)


# Opaque to the compiler, which takes it for no conversion.
_WIDEN_FP16: tl.constexpr = tl.constexpr("cvt.f32.f16 $0, $1;")


@triton.jit
def widened_anew(x, ACC: tl.constexpr):
    """x in the accumulator's dtype, by other means than ``x.to``: the compiler takes it for another number."""
    if x.dtype == tl.float16 and tl.float32 == ACC and x.numel > 1 and takes_ptx():
        return tl.inline_asm_elementwise(_WIDEN_FP16, "=f,h", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return widened(x, ACC)


@triton.jit
def row_offsets(rows, odd_sizes, strides):
    """Element offset of each row of a tensor whose leading dims are ``(?, *sizes)`` with ``strides`` (in elements).

    odd_sizes: ``2 * size + 1`` of each (ops/layout.py says why). The outermost size is never needed. A tensor whose leading
    dims collapse to one, which is almost every tensor, has none and pays one multiplication.
    """
    offsets = rows * 0
    for level in tl.static_range(len(odd_sizes) - 1, -1, -1):
        size = odd_sizes[level] >> 1
        offsets += rows % size * strides[level + 1]
        rows = rows // size
    return offsets + rows * strides[0]
