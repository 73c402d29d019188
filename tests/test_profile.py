"""``trinorm profile``: what is read of Nsight Compute's output, and what is said where it cannot count.

data/ncu.csv is cut from what ncu 2025.3 wrote on an H200 of four kernels of ours; bytes and requests were not in it.
"""

from __future__ import annotations

import shutil
import stat
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from trinorm.bench import counters
from trinorm.bench.cases import OPS, PASSES, Case
from trinorm.bench.counters import Kernel, Refused
from trinorm.bench.shapes import CHANNEL_SHAPES
from trinorm.cli import main, profile
from trinorm.norms import ROW_OPS, SUM_OPS

SAMPLE = (Path(__file__).parent / "data" / "ncu.csv").read_text()
CASE = Case("layer_norm", "backward", (8192, 4096), torch.bfloat16, torch.bfloat16)


def with_columns(columns: dict[str, tuple[str, str]]) -> str:
    """The sample with more columns, each of a unit and one made-up value for every kernel."""
    header, units, *rows = SAMPLE.splitlines()
    header += "".join(f',"{name}"' for name in columns)
    units += "".join(f',"{unit}"' for unit, _ in columns.values())
    return "\n".join([header, units, *(row + "".join(f',"{value}"' for _, value in columns.values()) for row in rows)])


# --- reading ---


def test_the_sample_is_read() -> None:
    forward, backward, narrow, apply = counters.parse(SAMPLE)
    assert [kernel.name for kernel in (forward, backward, narrow, apply)] == [
        "row_forward", "row_backward", "row_forward", "row_backward_apply"
    ]  # fmt: skip
    assert forward.seconds == pytest.approx(35.328e-6)
    assert forward.bandwidth == pytest.approx(3.092043e12)
    assert forward.l2_hits == pytest.approx(0.51618288)
    assert forward.issue == pytest.approx(0.64224132)
    assert (forward.warps, forward.warps_fitting) == (36.193755, 40)
    assert [kernel.registers for kernel in (forward, backward, narrow, apply)] == [48, 255, 80, 63]
    # Never asked for, so not there.
    assert (forward.bytes_read, forward.bytes_written, forward.sectors) == (None, None, None)


def test_stalls_are_shares_of_a_warps_time_the_largest_first() -> None:
    forward = counters.parse(SAMPLE)[0]
    # ncu's own details page says that 14.16 cycles pass between two instructions of a warp, 7.01 of them in this wait.
    assert next(iter(forward.stalls)) == "long scoreboard"
    assert forward.stalls["long scoreboard"] == pytest.approx(7.01 / 14.16, abs=1e-3)
    assert list(forward.stalls.values()) == sorted(forward.stalls.values(), reverse=True)
    assert "selected" not in forward.stalls
    assert sum(forward.stalls.values()) < 1 - 1 / 14.16  # one cycle in which it issues


@pytest.mark.parametrize(("cell", "unit", "expected"), [
    ("67.108864", "Mbyte", 67108864), ("1,024", "byte", 1024), ("32.768000", "Kbyte", 32768), ("n/a", "byte", None)
])  # fmt: skip
def test_units_are_scaled_and_what_is_no_number_is_left_out(cell: str, unit: str, expected: float | None) -> None:
    text = with_columns({"dram__bytes_read.sum": (unit, cell), "dram__bytes_write.sum": ("byte", "5")})
    for kernel in counters.parse(text):
        assert kernel.bytes_read == (None if expected is None else pytest.approx(expected))
        assert kernel.bytes_written == 5


def test_sectors_of_a_request() -> None:
    text = with_columns(
        {"lts__t_sectors_srcunit_tex.sum": ("sector", "4,200"), "lts__t_requests_srcunit_tex.sum": ("", "1,050")}
    )
    assert counters.parse(text)[0].sectors == 4


def test_the_profilers_own_lines_are_skipped() -> None:
    log = f'==PROF== Connected to process 1\n==PROF== Profiling "row_forward": 0%....100% - 9 passes\n{SAMPLE}'
    assert counters.parse(log) == counters.parse(SAMPLE)


# --- the verdict ---


@pytest.mark.parametrize(
    ("bandwidth", "issue", "verdict"),
    [
        (3.6e12, 0.3, "memory"),
        (3.6e12, 0.9, "memory"),
        (3.59e12, 0.6, "issue"),
        (3.59e12, 0.59, "latency"),
        (None, 0.9, "unknown"),
    ],
)
def test_verdict(bandwidth: float | None, issue: float, verdict: str) -> None:
    kernel = counters.parse(SAMPLE)[0]
    assert replace(kernel, bandwidth=bandwidth, issue=issue).verdict(replace(kernel, bandwidth=4e12)) == verdict


def shown(case: Case, ceiling: Kernel, kernels: list[Kernel]) -> list[list[str]]:
    console = Console(width=240)
    with console.capture() as text:
        console.print(profile.table(case, ceiling, kernels))
    return [line.split() for line in text.get().splitlines() if line.split()]


def test_table_stands_between_the_ceiling_and_the_fewest_bytes() -> None:
    kernels = counters.parse(
        with_columns({"dram__bytes_read.sum": ("Mbyte", "10"), "dram__bytes_write.sum": ("Mbyte", "2.5")})
    )
    rows = {row[0]: row for row in shown(CASE, replace(kernels[0], bandwidth=4e12), [kernels[1], kernels[3]])}
    assert rows["torch.add"][1:6] == ["35.33", "10.00", "2.50", "4.00", "1.00"]
    assert rows["row_backward"][1:6] == ["48.16", "10.00", "2.50", "3.90", "0.98"]
    assert rows["row_backward"][-1] == "memory"
    assert rows["together"] == ["together", "143.62", "20.00", "5.00"]
    # x, dy and weight; dx, dw and db.
    assert rows["fewest"][-2:] == ["134.23", "67.13"]


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("op", [*ROW_OPS, *SUM_OPS, *CHANNEL_SHAPES])
def test_bytes_are_read_or_written(op: str, pass_: str) -> None:
    case = Case(op, pass_, (6, 40), torch.float16, torch.float32)
    x, weights = 6 * 40 * 2, 40 * 4 * (1 + OPS[op].norm.biased)
    more = x if OPS[op].norm.of_sum else 0  # the residual and the sum, or the sum's gradient
    read, written = (x + more + weights, x + more) if pass_ == "forward" else (2 * x + more + 40 * 4, x + weights)
    assert (case.bytes_read, case.bytes_written) == (read, written)


# --- running it ---


def test_command_counts_what_the_child_brackets_and_leaves_the_clocks_alone() -> None:
    command = counters.command("ncu", Path("log.csv"), CASE)
    assert {"--profile-from-start=off", "--clock-control=none", "--csv", "--page=raw", "--log-file=log.csv"} <= set(command)
    executable, flag, code = command[-3:]
    assert (executable, flag) == (sys.executable, "-c")
    compile(code, "child", "exec")
    assert code.endswith("run_once('layer_norm', 'backward', (8192, 4096), 'bf16', 'contiguous')")


def put_ncu(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """An ``ncu`` of our own on PATH."""
    ncu = folder / "ncu"
    ncu.write_text(f"#!/bin/sh\n{script}\n")
    ncu.chmod(ncu.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_first_comes_the_ceilings_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sample.csv").write_text(SAMPLE)
    script = (
        'for argument; do case $argument in --log-file=*) log=${argument#*=};; esac; done\ncp "${0%/*}/sample.csv" "$log"'
    )
    put_ncu(tmp_path, monkeypatch, script)
    ceiling, kernels = counters.profile(CASE)
    assert [ceiling, *kernels] == counters.parse(SAMPLE)


@pytest.mark.parametrize(("script", "message"), [
    ("echo '==ERROR== ERR_NVGPUCTRPERM - The user does not have permission'; exit 1", "only administrators"),
    ("echo '==ERROR== Failed to find metric foo'; exit 1", "Failed to find metric foo"),
    ("echo 'No kernels were profiled.'", "No kernels were profiled"),
    ("exit 3", "it said nothing"),
])  # fmt: skip
def test_a_refusal_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str) -> None:
    put_ncu(tmp_path, monkeypatch, script)
    with pytest.raises(Refused, match=message):
        counters.profile(CASE)


def test_without_ncu_it_says_where_it_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(["profile", "rms_norm", "--shape", "8x8"]) == 2
    assert "ncu is not on PATH" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["profile", "rms_norm", "--shape", "128x768"]) == 2
    assert "there is no GPU" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("ncu") is None or not torch.cuda.is_available(), reason="needs a GPU and ncu")
@pytest.mark.parametrize("pass_", PASSES)
def test_a_real_call_is_counted(pass_: str) -> None:
    case = Case("rms_norm", pass_, (8192, 4096), torch.bfloat16, torch.bfloat16)
    ceiling, kernels = counters.profile(case)
    assert kernels[0].name == ("row_forward" if pass_ == "forward" else "row_backward")
    for kernel in (ceiling, kernels[0]):
        assert None not in vars(kernel).values()
        # From cold caches, everything is read once and nothing much more; what is written may stay in L2. torch.add, whose
        # time is the ceiling, does not read the weight, and was seen 8 sectors short of x and dy.
        assert kernel.bytes_read is not None
        assert kernel.bytes_read > case.bytes_read - 2 * case.shape[1] * case.weight_dtype.itemsize
        assert kernel.bytes_read < 1.2 * case.bytes_read
        assert kernel.stalls
