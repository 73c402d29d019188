"""What the kernels compile to, with no GPU: no spill, wide accesses, registers and instructions within written bounds."""

from __future__ import annotations

import copy
import functools
import math
import os
import re
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import pytest
import triton
from filelock import FileLock

from machine import ON_GPU
from trinorm import inspection
from trinorm.bench import changes
from trinorm.cli import main
from trinorm.targets import TARGETS

ROOT = Path(__file__).parents[1]
KNOWN = changes.read(ROOT / "benchmarks/instructions/sm_90.jsonl")
RENEW = "if this is meant: trinorm inspect --json benchmarks/instructions/sm_90.jsonl"

# Registers a thread may take (sm_90), by the kernel and the target that a regression would show on first. Warps of a
# multiprocessor share 65536: what each bound keeps is the number of programs in flight that the tables were tuned at.
REGISTERS = {
    ("row_forward", "rms_norm", 768): 64,
    ("row_forward", "rms_norm", 4096): 40,
    ("row_forward", "rms_norm", 8192): 64,
    ("row_forward", "layer_norm", 768): 64,
    ("row_forward", "layer_norm", 4096): 48,
    ("row_forward", "layer_norm", 16384): 64,
    ("row_forward_split", "layer_norm", 65536): 56,
    ("row_forward_streamed", "layer_norm", 66000): 48,
    ("row_backward", "rms_norm", 1024): 192,
    ("row_backward", "layer_norm", 1024): 128,
    ("row_backward_few", "rms_norm", 768): 128,
    ("row_backward_split", "rms_norm", 65536): 96,
    ("row_backward_apply", "layer_norm", 66000): 80,
    ("sum_partials", "layer_norm", 1024): 64,
}

# Bytes of local memory allowed: one value, which ptxas parks at a step of occupancy, here or there with its version.
SPILLED_VALUE = 8

LANES = {"sm_80": 32, "sm_90": 32, "gfx942": 64}

# Norms of a sum have the same kernels: where these are asked by shapes, they are compiled for the others alone.
PLAIN = "layer_norm,rms_norm"

# What the tests of all kernels ask of these targets: every shape of the file, or such that each kernel is compiled once.
# Compiling all would take a CPU minutes. Without a GPU RMSNorm of a sum is left out of the file, whose kernels are its
# plain ones with what LayerNorm of a sum has; and gfx942 has LayerNorm alone, whose kernels do all that RMSNorm's do.
OPS = list(dict.fromkeys(line["op"] for line in KNOWN))
OF_FILE = OPS if ON_GPU else [op for op in OPS if op != "add_rms_norm"]
ONCE = "--shape", "16x4096,16384x768,1024x65536,1024x66000"
ASKED = {
    "sm_80": () if ON_GPU else (PLAIN, *ONCE),
    "sm_90": (",".join(OF_FILE),),
    "gfx942": () if ON_GPU else ("layer_norm", *ONCE),
}

NARROW = {
    "sm_90": "300x1,1x1,300x2,300x3" if ON_GPU else "300x1,1x1",
    "gfx942": "300x1,1x1,300x2,300x3" if ON_GPU else "300x1",
}


# The lines of ``trinorm inspect`` for a target, with more arguments or none.
Compiled = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session")
def compiled(compiling: Executor, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Once, however many processes run tests."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent

    @functools.cache
    def lines(target: str, *arguments: str) -> list[dict[str, Any]]:
        name = "".join((target, *arguments))
        path = folder / f"{name}.jsonl"
        with FileLock(folder / f"{name}.lock"):
            if not path.exists():
                command = ["inspect", "--target", target, *arguments, "--json", str(path)]
                assert compiling.submit(main, command).result() == 0
        return changes.read(path)

    return lines


def _name(record: dict[str, Any]) -> str:
    return "{kernel} of {op} {shape}".format(**record)


@pytest.mark.parametrize("target", LANES)
def test_every_kernel_is_compiled(target: str, compiled: Compiled) -> None:
    kernels = {record["kernel"] for record in compiled(target, *ASKED[target])}
    teams = {"forget_words", "row_forward_split", "row_backward_split"} if target.startswith("sm_") else set()
    families = ("heads", "conditioned", "gated_sum")
    others = {f"{family}_{pass_}" for family in families for pass_ in ("forward", "backward")}
    others |= {f"conditioned_{of}_wide" for of in ("forward", "inputs_backward", "parameters_backward")}
    assert kernels == teams | (set() if ONCE[0] in ASKED[target] else others) | {
        "row_forward",
        "row_forward_streamed",
        "row_backward",
        "row_backward_few",
        "row_backward_moments",
        "row_backward_apply",
        "sum_partials",
    }


@pytest.mark.parametrize("target", LANES)
def test_nothing_spills(target: str, compiled: Compiled) -> None:
    spilled = {_name(record): record["spills"] for record in compiled(target, *ASKED[target])}
    assert {name: spills for name, spills in spilled.items() if spills > SPILLED_VALUE} == {}


@pytest.mark.parametrize("target", LANES)
def test_rows_are_read_and_written_as_wide_as_their_tile_allows(target: str, compiled: Compiled) -> None:
    """128 bits at a time, or as many as a chunk of bf16 has for each thread."""
    for record in compiled(target, *ASKED[target]):
        if record["kernel"] in ("sum_partials", "forget_words"):
            continue
        options = record["options"]
        share = 16 * options["CHUNK"] * options.get("ROWS", 1) // (LANES[target] * record["warps"])
        for kind in ("loads",) if record["kernel"] == "row_backward_moments" else ("loads", "stores"):
            bits = {int(width): int(width) * count for width, count in record["ordinary"][kind].items()}
            wide = sum(moved for width, moved in bits.items() if width >= min(128, share))
            assert 3 * wide >= sum(bits.values()), (_name(record), kind, bits)  # the others: statistics, sums over rows


@pytest.mark.parametrize("target", NARROW)
def test_the_narrowest_rows_compile(target: str, compiled: Compiled) -> None:
    """One element has no second half of a register: index.widened."""
    kernels = Counter(record["kernel"] for record in compiled(target, PLAIN, "--shape", NARROW[target]))
    assert kernels["row_forward"] == kernels["row_backward_few"] == 2 * len(NARROW[target].split(","))


@pytest.mark.parametrize("bound", REGISTERS, ids=str)
def test_registers_stay_within_bounds(bound: tuple[str, str, int], compiled: Compiled) -> None:
    kernel, op, n = bound
    records = [r for r in compiled("sm_90", *ASKED["sm_90"]) if (r["kernel"], r["op"], r["shape"][1]) == (kernel, op, n)]
    assert records, "the bound names a kernel that is compiled"
    # Few rows have launches of their own, and multiprocessors to spare.
    rows = max(r["shape"][0] for r in records)
    assert max(r["registers"] for r in records if r["shape"][0] == rows) <= REGISTERS[bound]


@pytest.mark.parametrize("target", LANES)
def test_counts_belong_together(target: str, compiled: Compiled) -> None:
    for record in compiled(target, *ASKED[target]):
        every, ordinary = record["instructions"], record["ordinary"]["instructions"]
        assert sum(every.values()) >= sum(ordinary.values()), _name(record)
        assert record["options"].get("RESCUE") or every == ordinary, _name(record)
        for code in (record, record["ordinary"]):
            # No more widths than accesses; what is in the loop is in the code.
            if record["kernel"] != "forget_words":  # which only writes
                assert 0 < sum(code["loads"].values()) <= code["instructions"]["global load"], _name(record)
            assert all(count <= code["instructions"][kind] for kind, count in code["loop"].items()), _name(record)
        # What walks over tiles or rows does so in a loop that reads memory.
        if record["kernel"] in ("row_backward", "row_backward_apply"):
            assert record["loop"]["global load"], _name(record)
        assert record["occupancy"]["programs"] >= 1, _name(record)


# --- other GPUs than the tables were measured on ---

# Without a GPU sm_86 is left out: it has sm_89's shared memory, registers and warps.
NVIDIA = [name for name, target in TARGETS.items() if target.gpu.backend == "cuda" and (ON_GPU or name != "sm_86")]

# What those are asked that are not compiled for all else: many rows, of widths whose programs share a multiprocessor,
# or take nearly all of the smallest one's shared memory. Of sm_86 and sm_89 there is elsewhere what the wider ones would
# show: their registers are sm_80's, their shared memory sm_120's.
HELD, WIDER = "16384x768,4096x12288", "1024x65536,1024x66000"
BACKWARDS = {name: f"{HELD},{WIDER}" for name in NVIDIA if name not in ASKED}
if not ON_GPU:
    BACKWARDS["sm_89"] = HELD

# Where ptxas asks for more registers than on an H200: 202 of a thread, which leave room for 2 programs and not 3; and up to
# 160 bytes of local memory. And where a sum's gradient takes 70 of a thread of 8 warps, for 3 programs and not 4.
CROWDED = {("sm_120", "layer_norm", 768), ("sm_90", "add_layer_norm", 66000)}
SPILLING = {("sm_100", "layer_norm", 12288), ("sm_120", "layer_norm", 12288)}
# Where one turn of an A100's programs, which has fewer multiprocessors than an H200, would sum too many rows each
# (kinds._sharing).
TWO_TURNS = {("sm_80", "gated_rms_norm", 32), ("sm_80", "gated_rms_norm/first", 2048)}


@pytest.mark.parametrize("target", NVIDIA)
def test_all_programs_of_a_backward_run_at_once(target: str, compiled: Compiled) -> None:
    """As many of each multiprocessor as tuning/ chose have room there, shared memory and registers, and do not spill."""
    shapes = BACKWARDS.get(target)
    records = compiled(target, *((PLAIN, "--pass", "backward", "--shape", shapes) if shapes else ASKED[target]))
    walking = [record for record in records if "STAGES" in record["options"]]
    wider = set() if shapes == HELD else {"row_backward_split", "row_backward_apply"}
    families = {"heads_backward", "conditioned_backward", "conditioned_parameters_backward_wide", "gated_sum_backward"}
    others = set() if shapes or ONCE[0] in ASKED[target] else families
    assert {record["kernel"] for record in walking} == {"row_backward"} | wider | others
    for record in walking:
        case = target, record["op"], record["shape"][1]
        programs = -(-math.prod(record["grid"]) // TARGETS[target].multiprocessors) // (1 + (case in TWO_TURNS))
        assert record["shared"] <= TARGETS[target].shared_of_program, _name(record)
        assert record["occupancy"]["programs"] == programs or case in CROWDED, _name(record)
        assert record["spills"] <= SPILLED_VALUE or case in SPILLING, _name(record)


def test_what_is_not_aligned_has_room_too(compiled: Compiled) -> None:
    """Rows of fp32 that nearly fill a program's shared memory, and whose dx goes through it besides."""
    records = compiled("sm_80", PLAIN, "--pass", "backward", "--dtype", "fp32", "--shape", "8192x5118")
    assert max(record["shared"] for record in records) <= TARGETS["sm_80"].shared_of_program


# --- the file of what is known ---


def test_no_kernel_grew(compiled: Compiled) -> None:
    """In registers, spills or instructions, beyond what bench.changes allows."""
    if KNOWN[0]["triton"] != triton.__version__:
        pytest.skip(f"the file holds what Triton {KNOWN[0]['triton']} makes, and this is {triton.__version__}")
    known = [line for line in KNOWN if line["op"] in OF_FILE]
    found = changes.compare_lines(known, compiled("sm_90", *ASKED["sm_90"]))
    assert [str(change) for change in found.failures] == [], RENEW
    assert (found.only_before, found.only_after, found.relaunched) == ((), (), ()), RENEW


def test_the_file_is_of_the_triton_that_ci_installs() -> None:
    pin = re.search(r"^triton==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pin is not None
    assert {line["triton"] for line in KNOWN} == {pin[1]}, RENEW


def _more(line: dict[str, Any], key: str, by: float) -> None:
    line[key] += by


def _add_instructions(line: dict[str, Any], code: str, share: float) -> None:
    mix = line["ordinary"][code]
    mix["alu"] += int(sum(mix.values()) * share) + 1


@pytest.mark.parametrize(
    ("quantity", "grow", "within"),
    [
        ("registers", lambda line, n: _more(line, "registers", n), (9, 8)),
        ("bytes spilled", lambda line, n: _more(line, "spills", n), (9, 8)),
        ("programs at once", lambda line, n: _more(line["occupancy"], "programs", -n), (1, 0)),
        ("instructions", lambda line, n: _add_instructions(line, "instructions", n), (0.05, 0.04)),
        ("instructions in loop", lambda line, n: _add_instructions(line, "loop", n), (0.05, 0.04)),
    ],
)
def test_a_kernel_that_grew_is_found(
    quantity: str, grow: Callable[[dict[str, Any], float], None], within: tuple[float, float]
) -> None:
    i = next(i for i, line in enumerate(KNOWN) if line["kernel"] == "row_backward")
    for by, failures in zip(within, (1, 0), strict=True):
        now = copy.deepcopy(KNOWN)
        grow(now[i], by)
        found = changes.compare_lines(KNOWN, now)
        assert [change.quantity for change in found.failures] == [quantity] * failures
        # The other way around it is no failure.
        assert changes.compare_lines(now, KNOWN).failures == []


def test_a_loop_that_comes_or_goes_is_not_a_loop_that_grew() -> None:
    i = next(i for i, line in enumerate(KNOWN) if line["kernel"] == "row_backward")
    unrolled = copy.deepcopy(KNOWN)
    unrolled[i]["ordinary"]["loop"] = {}
    for before, after in ((KNOWN, unrolled), (unrolled, KNOWN)):
        assert changes.compare_lines(before, after).failures == []


# --- reading machine code ---

SASS = """
        /*0000*/                   S2R R0, SR_TID.X ;                            /* 0x0000000000007919 */
                                                                                 /* 0x000e620000002500 */
        /*0010*/                   LDG.E.64.CONSTANT R2, desc[UR4][R2.64] ;      /* 0x0000000402027981 */
        /*0020*/               @P0 BRA 0x90 ;                                    /* 0x0000000000847947 */
        /*0030*/                   LDGSTS.E.BYPASS.LTC128B.128 [R3], desc[UR4][R4.64] ; /* 0x00 */
        /*0040*/                   LDGDEPBAR ;                                   /* 0x00000000000079af */
        /*0050*/                   FFMA R4, R5, R6, R7 ;                         /* 0x0000000605047223 */
        /*0060*/              @!P1 BRA 0x30 ;                                    /* 0x0000000000007947 */
        /*0070*/               @P2 EXIT ;                                        /* 0x000000000000294d */
        /*0080*/                   EXIT ;                                        /* 0x000000000000794d */
        /*0090*/                   STG.E.U16 desc[UR4][R2.64], R9 ;              /* 0x0000000902007986 */
        /*00a0*/                   F2FP.BF16.F32.PACK_AB R9, R9, R8 ;            /* 0x000000080909723e */
        /*00b0*/                   BRA 0x30 ;                                    /* 0x0000000000307947 */
        /*00c0*/                   BRA 0xc0;                                     /* 0xfffffffc00fc7947 */
        /*00d0*/                   NOP;                                          /* 0x0000000000007918 */
"""

AMDGCN = """
\ts_load_dwordx2 s[4:5], s[0:1], 0x0
\ts_cbranch_scc0 .LBB0_3
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\tbuffer_load_dwordx2 v[2:3], v4, s[4:7], 0 offen
\ts_waitcnt vmcnt(0)
\tv_pk_fma_f32 v[2:3], v[2:3], v[6:7], v[8:9]
\tv_add_f32_dpp v2, v2, v2 quad_perm:[1,0,3,2]
\ts_nop 1
\ts_cbranch_vccz .LBB0_1
\ts_endpgm
.LBB0_3:
\tglobal_store_short_d16_hi v0, v1, s[2:3]
\ts_branch .LBB0_1
"""


def test_sass_is_read() -> None:
    code = inspection.sass(SASS)
    assert [(i.kind, i.bits) for i in code] == [
        *(("alu", 0), ("global load", 64), ("branch", 0)),
        *(("global load", 128), ("wait", 0), ("fma", 0), ("branch", 0)),
        *(("branch", 0), ("branch", 0), ("global store", 16), ("convert", 0), ("branch", 0)),
    ]  # and neither the branch to itself nor NOP, which fill up the last lines
    assert [i.target for i in code if i.kind == "branch"] == [0x90, 0x30, None, None, 0x30]
    assert [i.falls for i in code if i.kind == "branch"] == [True, True, True, False, False]


def test_amdgcn_is_read() -> None:
    code = inspection.amdgcn(AMDGCN)
    assert [(i.kind, i.bits) for i in code] == [
        *(("uniform", 0), ("branch", 0)),
        *(("global load", 64), ("wait", 0), ("fma", 0), ("shuffle", 0), ("branch", 0), ("branch", 0)),
        *(("global store", 16), ("branch", 0)),
    ]
    assert [i.target for i in code if i.kind == "branch"] == [8, 2, None, 2]
    assert [i.falls for i in code if i.kind == "branch"] == [True, True, False, False]


@pytest.mark.parametrize(
    ("code", "loop"),
    [(inspection.sass(SASS), range(3, 7)), (inspection.amdgcn(AMDGCN), range(2, 7))],
    ids=["sass", "amdgcn"],
)
def test_a_jump_back_is_a_loop_only_where_its_target_leads_to_it(code: list[inspection.Instruction], loop: range) -> None:
    assert inspection.longest_loop(code) == [code[i] for i in loop]
    assert inspection.longest_loop(code[loop.stop :]) == []
    # A loop that touches no global memory is none of those meant.
    assert inspection.longest_loop([i._replace(bits=0) for i in code]) == []
