"""What a kernel compiles to, with no GPU: registers, spills, shared memory, the width of every global access."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from .ops import rows

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Compiled:
    """The resources of one kernel compiled for one target.

    registers: per thread. spills: bytes of local memory per thread. shared: bytes per program. accesses: how many
    global loads and stores of each width in bits the machine code holds, e.g. ``{("load", 128): 4}``. warps: of a program.
    """

    kernel: str
    target: str
    warps: int
    registers: int
    spills: int
    shared: int
    accesses: dict[tuple[str, int], int]
    instructions: int


def compile_call(kernel: JITFunction, args: tuple[Any, ...], options: dict[str, Any], target: str) -> Compiled:
    """Compile ``kernel`` as calling it with ``args`` and ``options`` would, for ``target`` (a key of TARGETS).

    Tensors may live on the meta device: of a pointer, only its dtype counts, and it is taken as 16-byte aligned.
    """
    gpu = TARGETS[target]
    if not (gpu.backend == "cuda" and gpu.arch >= 90):
        options = options | dict(PDL=False, launch_pdl=False)
    backend = make_backend(gpu)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, rest = bind(*args, **options)
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, rest)
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=gpu, options=parsed.__dict__)
    read = _read_cuda if gpu.backend == "cuda" else _read_hip
    return read(kernel.__name__, target, parsed.num_warps, compiled)


def _read_cuda(kernel: str, target: str, warps: int, compiled: Any) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _cuobjdump("--dump-resource-usage", cubin)
        sass = _cuobjdump("--dump-sass", cubin)
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*);", sass, re.MULTILINE)
    accesses: Counter[tuple[str, int]] = Counter()
    for line in lines:
        if match := re.search(r"\b(LDG|STG|LDGSTS)\.(\S*)", line):
            kind = "store" if match[1] == "STG" else "load"
            width = re.search(r"\b(128|64|U?16|U?8)\b", match[2].replace(".", " "))
            accesses[kind, int(width[1].lstrip("US")) if width else 32] += 1
    return Compiled(
        kernel=kernel,
        target=target,
        warps=warps,
        registers=used["REG"],
        spills=used["STACK"] + used["LOCAL"],
        shared=compiled.metadata.shared,
        accesses=dict(accesses),
        instructions=len(lines),
    )


def _cuobjdump(flag: str, cubin: Path) -> str:
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    return subprocess.run([tool, flag, str(cubin)], check=True, capture_output=True, text=True).stdout


def _read_hip(kernel: str, target: str, warps: int, compiled: Any) -> Compiled:
    text = compiled.asm["amdgcn"]
    used = {key: int(value) for key, value in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", text)}
    accesses: Counter[tuple[str, int]] = Counter()
    widths = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "ushort": 16, "byte": 8, "ubyte": 8}
    for kind, width in re.findall(r"\b(?:global|buffer|flat)_(load|store)_(\w+?)(?:_d16\w*)?\s", text):
        accesses[kind, widths.get(width, 0)] += 1
    return Compiled(
        kernel=kernel,
        target=target,
        warps=warps,
        registers=used["vgpr_count"],
        spills=used["private_segment_fixed_size"],
        shared=compiled.metadata.shared,
        accesses=dict(accesses),
        instructions=len(re.findall(r"^\t[vs]_|^\t(?:global|buffer|ds)_", text, re.MULTILINE)),
    )


class Call(NamedTuple):
    """A launch that was asked for: the kernel, its grid, its run-time arguments and its options."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


@contextlib.contextmanager
def recorded() -> Iterator[list[Call]]:
    """Inside, launches are listed and nothing runs: give the ops tensors on the meta device, and compile what they ask.

    >>> with recorded() as calls:
    ...     rows.forward(RMS_NORM, torch.empty(8192, 4096, device="meta"), 1, None, None, 1e-6, save=True)
    >>> compile_call(calls[0].kernel, calls[0].args, calls[0].options, "sm_90").registers
    """
    calls: list[Call] = []

    def record(kernel: Any, grid: tuple[int, ...], device: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        calls.append(Call(kernel, grid, args, options))

    actual = rows.launch
    rows.launch = record
    try:
        yield calls
    finally:
        rows.launch = actual
