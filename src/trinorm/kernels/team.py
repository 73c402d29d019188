"""Teams: programs that share a statistic, each with a part of it, and tell each other their shares.

What a program has to tell is a word or two of 64 bits, in a table that starts as all NO_WORD (``forget_words``). It
publishes them, waits for those of its team, and merges them in their order: the same result in each, with no barrier and no
atomic sum.

A program waits only for its own team. Teams are neighbours in the grid, and programs start in the grid's order, so that of
each kernel at most one team is incomplete, and those before it end. The host sees to it that two teams have room on the
device at once. That counts the whole device: on a part of one (a green context) of fewer multiprocessors than a team has
programs, or with incomplete teams of so many streams that no place is left, they would wait forever.
"""

import triton
import triton.language as tl

from .index import first_program
from .overlap import let_next_launch, wait_for_previous

# No result looks so: as fp32 it is two NaNs, of which the device makes only 0x7FFFFFFF; of fp64, publish_wide sees to it.
NO_WORD: tl.constexpr = tl.constexpr(-1)

# Where asked, read until there is a word; else 0. (A loop in Triton would keep the one around it from being pipelined.)
_AWAIT: tl.constexpr = tl.constexpr("""{
    .reg .pred asked, absent;
    setp.ne.s32 asked, $2, 0;
    mov.b64 $0, 0;
again:
    @asked ld.relaxed.gpu.global.b64 $0, [$1];
    setp.eq.s64 absent, $0, -1;
    @absent bra again;
}""")


# The same of two words, which may come one by one.
_AWAIT_TWO: tl.constexpr = tl.constexpr("""{
    .reg .pred asked, absent;
    setp.ne.s32 asked, $3, 0;
    mov.b64 $0, 0;
    mov.b64 $1, 0;
again:
    @asked ld.relaxed.gpu.global.v2.b64 {$0, $1}, [$2];
    setp.eq.s64 absent, $0, -1;
    setp.eq.or.s64 absent, $1, -1, absent;
    @absent bra again;
}""")


@triton.jit(do_not_specialize=["COUNT"])
def forget_words(WORDS, COUNT: tl.int64, CHUNK: tl.constexpr, PDL: tl.constexpr):
    """Make ``COUNT`` words NO_WORD."""
    wait_for_previous(PDL)
    let_next_launch(PDL)
    words = first_program() * CHUNK + tl.arange(0, CHUNK)
    tl.store(WORDS + words, tl.full([CHUNK], NO_WORD, tl.int64), mask=words < COUNT)


@triton.jit
def publish(WORD, a, b, live, RELEASE: tl.constexpr = False):
    """Tell the team two fp32 numbers, each ``[1, 1]``, where ``live``. RELEASE: who has seen them may see what this program
    had stored by then too (``see_what_others_stored``).
    """
    if RELEASE:
        tl.debug_barrier()
    low = a.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    high = b.to(tl.int32, bitcast=True).to(tl.int64) << 32
    tl.atomic_xchg(WORD + tl.zeros([1, 1], tl.int32), high | low, mask=live, sem="release" if RELEASE else "relaxed")


@triton.jit
def awaited(WORDS, asked, TEAM, LANES: tl.constexpr):
    """The two fp32 numbers of each program of the team, ``[LANES]`` and 0 past TEAM, as soon as all have told them.

    LANES is a warp or all of them: one warp that reads and passes on costs an exchange, all that read cost the words'
    place in L2 (RMSNorm forward at 65536 columns: 70.4 µs and 71.2).
    """
    lanes = tl.arange(0, LANES)
    words = tl.inline_asm_elementwise(
        _AWAIT,
        "=&l,l,r",
        [(WORDS + lanes).to(tl.int64), ((lanes < TEAM) & asked).to(tl.int32)],
        dtype=tl.int64,
        is_pure=False,
        pack=1,
    )
    a = (words & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
    return a, (words >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def see_what_others_stored(LANES: tl.constexpr):
    """From here on what the team stored before it told its words can be read, by threads that have awaited those."""
    tl.inline_asm_elementwise(
        "fence.acq_rel.gpu; mov.b32 $0, $1;", "=r,r", [tl.arange(0, LANES)], dtype=tl.int32, is_pure=False, pack=1
    )
    tl.debug_barrier()


@triton.jit
def publish_wide(WORDS, a, b):
    """Tell the team two fp64 numbers, each ``[1, 1]``, in two words."""
    for i in tl.static_range(2):
        number = b if i else a
        word = tl.where(number == number, number, float("nan")).to(tl.int64, bitcast=True)
        tl.atomic_xchg(WORDS + i + tl.zeros([1, 1], tl.int32), word, sem="relaxed")


@triton.jit
def awaited_wide(WORDS, TEAM, LANES: tl.constexpr):
    """The two fp64 numbers of each program of the team, as ``awaited``."""
    lanes = tl.arange(0, LANES)
    a, b = tl.inline_asm_elementwise(
        _AWAIT_TWO,
        "=&l,=&l,l,r",
        [(WORDS + 2 * lanes).to(tl.int64), (lanes < TEAM).to(tl.int32)],
        dtype=(tl.int64, tl.int64),
        is_pure=False,
        pack=1,
    )
    return a.to(tl.float64, bitcast=True), b.to(tl.float64, bitcast=True)


@triton.jit
def team_sum(shares):
    """The sum of ``[LANES]`` shares, ``[1, 1]``."""
    return tl.zeros([1, 1], shares.dtype) + tl.sum(shares, axis=0)
