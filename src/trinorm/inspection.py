"""What a kernel compiles to, with no GPU: registers, spills, shared memory, and its instructions by kind and by width."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import os
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from .launch import plain
from .ops.hosts import (
    channel_layers,
    channels,
    conditioned_rows,
    dynamic_rows,
    gated_sum_rows,
    heads,
    poly_rows,
    quantized_rows,
    rows,
    start,
    weight_rows,
)
from .targets import TARGETS, Target

# Where launches are made.
_HOSTS = (
    *(rows, channels, channel_layers, heads, quantized_rows),
    *(conditioned_rows, gated_sum_rows, dynamic_rows, poly_rows, weight_rows),
)

# Kinds of instruction, by how their mnemonics start; the first that fits counts. What none fits is "alu": integers, logic,
# comparisons, moves. Widening bf16 is one of those (a shift); narrowing to it is a conversion.
_CUDA_KINDS = {
    "wait": "BAR|DEPBAR|LDGDEPBAR|MEMBAR|FENCE|SYNCS|WARPSYNC|UCGABAR|ACQBULK|PREEXIT",
    "global load": r"LDG|LD\b|UTMALDG|UBLKCP",
    "global store": r"STG|ST\b|UTMASTG|REDG|RED\b|ATOMG|ATOM\b",
    "shared load": "LDS|ATOMS",
    "shared store": "STS",
    "local": "LDL|STL",
    "shuffle": "SHFL|REDUX|VOTE",
    "special": "MUFU",
    "convert": r"F2|I2F|FRND|HADD2\.F32",
    "fma": "FFMA|FMUL|FADD|HFMA2|HMUL2|HADD2|IMAD|DFMA|DMUL|DADD",
    "branch": "BRA|BRX|EXIT|BSSY|BSYNC|BREAK|CALL|RET|JMP",
    "uniform": "U[A-Z]|S2UR|R2UR",
}
_HIP_KINDS = {
    "wait": "s_barrier|s_waitcnt|s_sleep",
    "global load": "(global|buffer|flat)_load",
    "global store": "(global|buffer|flat)_(store|atomic)",
    "shuffle": r"ds_b?permute|ds_swizzle|v_readlane|v_writelane|v_readfirstlane|\w+_dpp",
    "shared load": "ds_(read|load)",
    "shared store": "ds_(write|store)",
    "local": "scratch_",
    "special": "v_(rsq|rcp|sqrt|exp|log|sin|cos)_",
    "convert": "v_cvt_",
    "fma": r"v_(pk_)?(fma|mad|mul|add|sub)\w*_f\d",
    "branch": "s_branch|s_cbranch|s_endpgm|s_setpc|s_swappc",
    "uniform": "s_",
}
KINDS = (*_CUDA_KINDS, "alu")


class Instruction(NamedTuple):
    """One instruction of a kernel's machine code.

    kind: one of KINDS. bits: that a thread loads or stores, of a global access. address: where it stands. target: where it
    may branch to. falls: whether the next may follow it.
    """

    kind: str
    bits: int
    address: int
    target: int | None
    falls: bool


@dataclass(frozen=True)
class Resources:
    """What one kernel takes, compiled for one target.

    warps: of a program. registers: per thread. spills: bytes of local memory per thread. shared: bytes per program.
    """

    kernel: str
    target: str
    warps: int
    registers: int
    spills: int
    shared: int


@dataclass(frozen=True)
class Binary(Resources):
    """With its machine code, as Triton has it: a cubin (NVIDIA), or LLVM's assembly (AMD)."""

    code: Any


@dataclass(frozen=True)
class Compiled(Resources):
    """With what its machine code is made of.

    loads, stores: how many global accesses of each width in bits, e.g. ``{128: 4}``. instructions: how many of each of
    KINDS, without padding. loop: those of the longest loop that touches global memory; empty where none does. loop_bytes:
    what a thread loads and stores there in one turn.
    """

    loads: dict[int, int]
    stores: dict[int, int]
    instructions: dict[str, int]
    loop: dict[str, int]
    loop_bytes: int


def compile_call(kernel: JITFunction, args: tuple[Any, ...], options: dict[str, Any], target: str) -> Binary:
    """Compile ``kernel`` as calling it with ``args`` and ``options`` would, for ``target`` (a key of TARGETS).

    Tensors may live on the meta device: of a pointer, only its dtype counts, and it is taken as 16-byte aligned.
    """
    gpu = TARGETS[target].gpu
    backend = make_backend(gpu)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, rest = bind(*args, **options)
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, rest)
    source = ASTSource(kernel, signature, constants, attributes)
    # Where a kernel asks what it is compiled for, the answer is the active driver's.
    with mock.patch.object(triton.runtime.driver, "_active", SimpleNamespace(get_current_target=lambda: gpu)):
        compiled = triton.compile(source, target=gpu, options=parsed.__dict__)
    code = compiled.asm["cubin" if gpu.backend == "cuda" else "amdgcn"]
    registers, spills = _used_cuda(code) if gpu.backend == "cuda" else _used_hip(code)
    return Binary(
        kernel=kernel.__name__,
        target=target,
        warps=parsed.num_warps,
        registers=registers,
        spills=spills,
        shared=compiled.metadata.shared,
        code=code,
    )


def read(binaries: Iterable[Binary]) -> list[Compiled]:
    """What the machine code of each is made of; all are for one target. NVIDIA's disassembler takes .3 to .5 s to start."""
    given = list(binaries)
    if not given:
        return []
    target, codes = TARGETS[given[0].target], list(dict.fromkeys(binary.code for binary in given))
    listed = dict(zip(codes, _sass_of(codes, target) if target.gpu.backend == "cuda" else map(amdgcn, codes), strict=True))
    return [_compiled(binary, listed[binary.code]) for binary in given]


def _compiled(binary: Binary, code: list[Instruction]) -> Compiled:
    loop = longest_loop(code)
    return Compiled(
        **{field.name: getattr(binary, field.name) for field in fields(Resources)},
        loads=_widths(code, "global load"),
        stores=_widths(code, "global store"),
        instructions=_mix(code),
        loop=_mix(loop),
        loop_bytes=sum(instruction.bits for instruction in loop) // 8,
    )


def _mix(code: Iterable[Instruction]) -> dict[str, int]:
    count = Counter(instruction.kind for instruction in code)
    return {kind: count[kind] for kind in KINDS if count[kind]}


def _widths(code: Iterable[Instruction], kind: str) -> dict[int, int]:
    """The widest first."""
    return dict(sorted(Counter(i.bits for i in code if i.kind == kind and i.bits).items(), reverse=True))


def longest_loop(code: list[Instruction]) -> list[Instruction]:
    """The longest loop that touches global memory, or nothing. Of nested loops, the outermost."""
    where = {instruction.address: i for i, instruction in enumerate(code)}
    following: list[list[int]] = [[] for _ in code]
    preceding: list[list[int]] = [[] for _ in code]
    for i, instruction in enumerate(code):
        jumps = [where[instruction.target]] if instruction.target in where else []
        for j in [*jumps, *([i + 1] if instruction.falls and i + 1 < len(code) else [])]:
            following[i].append(j)
            preceding[j].append(i)
    loops = []
    for i, instruction in enumerate(code):
        # A jump back is a loop only if its target leads to it again: code set apart jumps back too.
        if instruction.target in where and where[instruction.target] <= i:
            body = _reached(following, where[instruction.target]) & _reached(preceding, i)
            loops.append([code[j] for j in sorted(body)])
    return max((loop for loop in loops if any(i.bits for i in loop)), key=len, default=[])


def _reached(edges: list[list[int]], start: int) -> set[int]:
    found, waiting = {start}, [start]
    while waiting:
        new = set(edges[waiting.pop()]) - found
        found |= new
        waiting += new
    return found


def _kind(mnemonic: str, kinds: Mapping[str, str]) -> str:
    return next((kind for kind, start in kinds.items() if re.match(start, mnemonic)), "alu")


def _used_cuda(cubin: bytes) -> tuple[int, int]:
    """Registers and spills."""
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _nvidia("cuobjdump", "--dump-resource-usage", given=cubin)))
    return int(used["REG"]), int(used["STACK"]) + int(used["LOCAL"])


def _sass_of(cubins: Sequence[bytes], target: Target) -> list[list[Instruction]]:
    """The instructions of each, from one listing of all their code, one after the other."""
    arch, codes = target.gpu.arch, [_code(cubin) for cubin in cubins]
    listing = _nvidia("nvdisasm", "--binary", f"SM{arch}{'a' if arch >= 90 else ''}", given=b"".join(codes))
    ends = list(itertools.accumulate(map(len, codes)))
    found: list[list[Instruction]] = [[] for _ in codes]
    for instruction in sass(listing):
        found[bisect.bisect_right(ends, instruction.address)].append(instruction)
    return found


def _code(cubin: bytes) -> bytes:
    """Its instructions: what an ELF file has in sections that are executable."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count = struct.unpack_from("<HH", cubin, 0x3A)
    sections = [struct.unpack_from("<8xQ8xQQ", cubin, table + size * i) for i in range(count)]
    executable = 4
    return b"".join(cubin[start : start + length] for flags, start, length in sections if flags & executable)


def _nvidia(tool: str, *options: str, given: bytes) -> str:
    """What one of the tools that Triton brings prints of a file."""
    path = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", tool)
    with tempfile.NamedTemporaryFile() as file:
        file.write(given)
        file.flush()
        return subprocess.run([path, *options, file.name], check=True, capture_output=True, text=True).stdout


def sass(text: str) -> list[Instruction]:
    """The instructions of nvdisasm's listing of machine code, without the padding at each kernel's end."""
    code = []
    line = r"^\s+/\*([0-9a-f]{4,})\*/\s+(@\S+ )?(\S+)(?: (.*?))?\s*;"
    for number, predicate, mnemonic, operands in re.findall(line, text, re.MULTILINE):
        kind, address, bits, target = _kind(mnemonic, _CUDA_KINDS), int(number, 16), 0, None
        if kind.startswith("global") and not mnemonic.startswith("U"):  # U: a tile, and not of one thread
            width = re.search(r"\.[US]?(128|64|16|8)\b", mnemonic)
            bits = int(width[1]) if width else 32
        if mnemonic.startswith(("BRA", "JMP")) and (to := re.search(r"\b0x([0-9a-f]+)$", operands)):
            target = int(to[1], 16)
        if mnemonic == "NOP" or target == address:
            continue
        conditional = predicate or re.search(r"\bU?P\d", operands)
        leaves = mnemonic.startswith(("BRA", "BRX", "JMP", "EXIT", "RET"))
        code.append(Instruction(kind, bits, address, target, falls=bool(conditional or not leaves)))
    return code


def _used_hip(text: str) -> tuple[int, int]:
    """Registers and spills."""
    used = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", text))
    return int(used["vgpr_count"]), int(used["private_segment_fixed_size"])


_HIP_BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "ushort": 16, "byte": 8, "ubyte": 8}


def amdgcn(text: str) -> list[Instruction]:
    """The instructions of LLVM's assembly of one kernel. Addresses count instructions."""
    lines = re.findall(r"^(\.L\w+):|^\t((?:[vs]|ds|global|buffer|flat|scratch)_\w+)[ \t]*(.*)$", text, re.MULTILINE)
    lines = [line for line in lines if line[1] != "s_nop"]
    labels: dict[str, int] = {}
    for i, (label, _, _) in enumerate(lines):
        if label:
            labels[label] = i - len(labels)
    code: list[Instruction] = []
    for _, mnemonic, operands in (line for line in lines if line[1]):
        access = re.match(r"(?:global|buffer|flat)_(?:load|store)_([a-z]+?(?:x\d)?)(?:_|$)", mnemonic)
        code.append(
            Instruction(
                kind=_kind(mnemonic, _HIP_KINDS),
                bits=_HIP_BITS.get(access[1], 0) if access else 0,
                address=len(code),
                target=labels.get(operands.strip()) if "branch" in mnemonic else None,
                falls=mnemonic not in ("s_branch", "s_endpgm"),
            )
        )
    return code


class Call(NamedTuple):
    """A launch that was asked for: the kernel, its grid, its run-time arguments and its options."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


@contextlib.contextmanager
def recorded(target: str = "sm_90") -> Iterator[list[Call]]:
    """Inside, launches are listed as they would be on ``target``, and nothing runs.

    Give the ops tensors on the meta device, and compile what they ask:

    >>> with recorded() as calls:
    ...     rows.forward(RMS_NORM, torch.empty(8192, 4096, device="meta"), 1, None, None, 1e-6, save=True)
    >>> binaries = [compile_call(call.kernel, call.args, call.options, "sm_90") for call in calls]
    >>> binaries[0].registers, read(binaries)[0].instructions
    """
    calls: list[Call] = []

    def record(
        kernel: Any, grid: tuple[int, ...], device: torch.device, args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        calls.append(Call(kernel, plain(grid), plain(args), options))

    with contextlib.ExitStack() as stack:
        for module in (*_HOSTS, start):
            stack.enter_context(mock.patch.object(module, "describe", return_value=TARGETS[target].device))
            if module is not start:
                stack.enter_context(mock.patch.object(module, "launch", record))
        yield calls
