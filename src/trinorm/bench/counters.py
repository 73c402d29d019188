"""What the GPU's own counters say of each kernel of one call, read by Nsight Compute, and what bounds it."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..cases import DTYPES
from ..norms import Shape
from .cases import Case
from .measure import calls_of, ceiling_call
from .providers import load

# What is collected: sections by name, and metrics that are in none of them. A few replays of each kernel.
_SECTIONS = ("WarpStateStats", "SchedulerStats", "Occupancy", "LaunchStats", "MemoryWorkloadAnalysis")
_METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "lts__t_sectors_srcunit_tex.sum",
    "lts__t_requests_srcunit_tex.sum",
)
_STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")

# The verdict's thresholds, which its docstring explains.
_MEMORY_BOUND = 0.9
_ISSUE_BOUND = 0.6

# Nsight Compute scales each column to a prefix of its own.
_PREFIXES = {"": 1.0, "n": 1e-9, "u": 1e-6, "m": 1e-3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_UNIT = re.compile(r"([numKMGT]?)(s|second|byte)(/s|/second)?")


class Refused(Exception):  # noqa: N818 - an answer, and no fault of the program
    """Nsight Compute cannot count here; the message says why, and what would help."""


@dataclass(frozen=True)
class Kernel:
    """What was counted in one kernel, which started with cold caches. None: not collected by this version of the profiler.

    seconds: its duration. bytes_read, bytes_written: what DRAM moved. bandwidth: of both, bytes a second. l2_hits: the
    share of L2's sectors that were there. sectors: 32-byte sectors of each request that a multiprocessor made of L2, of
    which 4 is all that one can ask for. warps: how many a multiprocessor had at work on average, of the warps_fitting that
    fit on it. issue: the share of cycles in which a scheduler issued an instruction. stalls: of a warp's time, the share
    that it waited for each reason, the largest first.
    """

    name: str
    seconds: float | None
    bytes_read: float | None
    bytes_written: float | None
    bandwidth: float | None
    l2_hits: float | None
    sectors: float | None
    warps: float | None
    warps_fitting: float | None
    issue: float | None
    registers: int | None
    stalls: Mapping[str, float]

    def verdict(self, ceiling: Kernel) -> str:
        """What bounds the kernel, beside the ceiling's kernel, which moves the bytes of a large norm and does little else.

        - memory: its bandwidth is at least 0.9 of the ceiling's. Only fewer bytes would make it faster.
        - issue: else, its schedulers issue in at least 0.6 of their cycles. Fewer instructions would.
        - latency: else. Neither is near its limit: warps wait, for what the stalls say, and too little is in flight.
        - unknown: what decides was not collected.
        """
        if self.bandwidth is None or not ceiling.bandwidth or self.issue is None:
            return "unknown"
        if self.bandwidth >= _MEMORY_BOUND * ceiling.bandwidth:
            return "memory"
        return "issue" if self.issue >= _ISSUE_BOUND else "latency"


def profile(case: Case) -> tuple[Kernel, list[Kernel]]:
    """(the ceiling's kernel, each kernel of one call of the case), counted in a process of its own. Raises Refused."""
    ncu = shutil.which("ncu")
    if ncu is None:
        raise Refused("Nsight Compute's ncu is not on PATH; it comes with the CUDA toolkit")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "ncu.csv")
        ran = subprocess.run(command(ncu, log, case), capture_output=True, text=True)
        text = log.read_text() if log.exists() else ""
    if ran.returncode or '"ID"' not in text:
        raise Refused(why_refused(text + ran.stdout + ran.stderr))
    ceiling, *kernels = parse(text)
    return ceiling, kernels


def command(ncu: str, log: Path, case: Case) -> list[str]:
    """The profiler's command line: count what a child brackets, write CSV to ``log``, leave the clocks alone."""
    selected = [f"--section={section}" for section in _SECTIONS] + [f"--metrics={','.join(_METRICS)}"]
    output = ["--csv", "--page=raw", f"--log-file={log}"]
    dtype = next(name for name, dtype in DTYPES.items() if dtype == case.dtype)
    call = (
        f"from {__name__} import run_once; run_once({case.op!r}, {case.pass_!r}, {case.shape}, {dtype!r}, {case.layout!r})"
    )
    child = [sys.executable, "-c", call]
    return [ncu, "--profile-from-start=off", "--clock-control=none", *selected, *output, *child]


def run_once(op: str, pass_: str, shape: Shape, dtype: str, layout: str) -> None:
    """In the profiler's child: the ceiling's kernel and then one call, both of which have run before."""
    case = Case(op, pass_, shape, DTYPES[dtype], DTYPES[dtype], layout)
    device = torch.device("cuda", torch.cuda.current_device())
    inputs = case.draw(device, torch.Generator(device).manual_seed(0))
    (ours,), _ = load([])
    with torch.set_grad_enabled(case.backward):
        (norm,) = calls_of(ours.build(case), [inputs])
    # torch's copy is no kernel, and is not counted; its neg reads and writes the same.
    ceiling = ceiling_call(case, inputs, copy=lambda x, out: torch.neg(x, out=out))

    def run() -> None:
        with torch.set_grad_enabled(case.backward):
            ceiling()
            norm()
        torch.cuda.synchronize()

    run()
    torch.cuda.profiler.start()
    run()
    torch.cuda.profiler.stop()


def why_refused(output: str) -> str:
    """What to tell the user of a profiler that counted nothing."""
    if "ERR_NVGPUCTRPERM" in output:
        return (
            "the driver lets only administrators read the GPU's counters (ERR_NVGPUCTRPERM); run as root, or have the "
            "driver loaded with NVreg_RestrictProfilingToAdminUsers=0"
        )
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "==ERROR==" in line] or lines[-1:]
    return "ncu counted nothing: " + (" ".join(errors) or "it said nothing")


def parse(text: str) -> list[Kernel]:
    """The kernels of ncu's ``--csv --page raw``, in the order of their launches. Lines before the header are the log's."""
    header, units, *rows = csv.reader(io.StringIO(text[text.index('"ID"') :]))
    return [
        _kernel(dict(zip(header, zip(row, units, strict=True), strict=True))) for row in rows if len(row) == len(header)
    ]


def _kernel(cells: Mapping[str, tuple[str, str]]) -> Kernel:
    def value(metric: str) -> float | None:
        return _number(*cells.get(metric, ("", "")))

    def percent(metric: str) -> float | None:
        found = value(metric)
        return None if found is None else found / 100

    sectors, requests = value("lts__t_sectors_srcunit_tex.sum"), value("lts__t_requests_srcunit_tex.sum")
    registers = value("launch__registers_per_thread")
    # Cycles between two instructions of a warp: all of them, and those of each wait. "selected" is the one that issues.
    cycles = value("smsp__average_warp_latency_per_inst_issued.ratio")
    waits = {match[1].replace("_", " "): value(metric) for metric in cells if (match := _STALL.fullmatch(metric))}
    stalls = {name: wait / cycles for name, wait in waits.items() if wait and cycles and name != "selected"}
    return Kernel(
        name=cells["Kernel Name"][0],
        seconds=value("gpu__time_duration.sum"),
        bytes_read=value("dram__bytes_read.sum"),
        bytes_written=value("dram__bytes_write.sum"),
        bandwidth=value("dram__bytes.sum.per_second"),
        l2_hits=percent("lts__t_sector_hit_rate.pct"),
        sectors=sectors / requests if sectors is not None and requests else None,
        warps=value("sm__warps_active.avg.per_cycle_active"),
        warps_fitting=value("sm__maximum_warps_avg_per_active_cycle"),
        issue=percent("smsp__issue_active.avg.pct_of_peak_sustained_active"),
        registers=None if registers is None else int(registers),
        stalls=dict(sorted(stalls.items(), key=lambda stall: -stall[1])),
    )


def _number(cell: str, unit: str) -> float | None:
    """A cell in seconds, bytes or whatever has no prefix; None for "n/a" and its like."""
    try:
        number = float(cell.replace(",", ""))
    except ValueError:
        return None
    match = _UNIT.fullmatch(unit)
    return number * _PREFIXES[match[1]] if match else number
