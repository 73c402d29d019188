"""``trinorm inspect``: its arguments, its tables and its lines. What the kernels are, tests/test_inspection.py says."""

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path

import pytest

from trinorm.cli import inspect, main, shape

CALL = ("rms_norm", "--shape", "8192x4096", "--dtype", "bf16", "--target", "sm_90")


def printed(*arguments: str) -> str:
    """What it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["inspect", *arguments]) == 0
    return out.getvalue()


@pytest.fixture
def run(compiling: Executor) -> Callable[..., str]:
    """What it prints, where it compiles."""
    return lambda *arguments: compiling.submit(printed, *arguments).result()


def run_alone(*arguments: str) -> str:
    """What it prints, in a process of its own that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "trinorm", "inspect", *arguments]
    ran = subprocess.run(
        command, env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_tables_show_every_launch_of_the_call(run: Callable[..., str]) -> None:
    lines = run(*CALL, "--pass", "backward").splitlines()
    assert any("RMSNorm backward, bfloat16, compiled for sm_90" in line for line in lines)
    assert any("RMSNorm backward, bfloat16, instructions on sm_90" in line for line in lines)
    rows = [line.split() for line in lines]
    resources, instructions = [row for row in rows if "row_backward" in row]
    assert (resources[0], instructions[0]) == ("8192×4096", "8192×4096")
    assert [row for row in rows if row[:1] == ["sum_partials"]]
    assert [row for row in rows if row[:2] == ["in", "loop"]]


def test_lines_say_what_was_asked_and_what_a_launch_moves(run: Callable[..., str], tmp_path: Path) -> None:
    lines = run_alone(*CALL, "--json", "-")
    run(*CALL, "--json", str(tmp_path / "new" / "lines.jsonl"))
    assert (tmp_path / "new" / "lines.jsonl").read_text() == lines
    forward, backward, total = map(json.loads, lines.splitlines())
    assert [line["kernel"] for line in (forward, backward, total)] == ["row_forward", "row_backward", "sum_partials"]
    assert [(line["pass"], line["launch"]) for line in (forward, backward, total)] == [
        ("forward", 0),
        ("backward", 0),
        ("backward", 1),
    ]
    for line in (forward, backward, total):
        assert (line["op"], line["shape"], line["dtype"], line["target"]) == ("rms_norm", [8192, 4096], "bfloat16", "sm_90")
    rows, row = 8192 * 4096 * 2, 4096 * 2
    assert forward["bytes"] == forward["call_bytes"] == 2 * rows + row
    # x, dy, dx, weight, rstd and a partial of dw for each program, which the second launch reads to write dw.
    partials = backward["grid"][0] * 4096 * 4
    assert backward["bytes"] == 3 * rows + row + 8192 * 4 + partials
    assert total["bytes"] == partials + row
    assert backward["call_bytes"] == 3 * rows + 2 * row


@pytest.mark.parametrize(
    "call",
    [(op, "--shape", "3x1048576") for op in ("layer_norm", "add_layer_norm")] + [("batch_norm", "--shape", "64x256x56x56")],
)
def test_no_heading_and_no_number_is_cut(call: tuple[str, ...], run: Callable[..., str]) -> None:
    """In the tables with the longest names, where the output is no terminal's."""
    tables = run(*call, "--dtype", "fp64")
    assert "registers" in tables
    assert "…" not in tables


def test_a_target_nobody_measured_has_no_times(run: Callable[..., str]) -> None:
    (line,) = map(
        json.loads,
        run("rms_norm", "--shape", "16x64", "--pass", "forward", "--target", "sm_80", "--json", "-").splitlines(),
    )
    assert line["registers"] > 0
    assert {line[time] for time in ("memory_us", "issue_us", "call_us", "call_ceiling_ratio")} == {None}
    table = run("rms_norm", "--shape", "16x64", "--pass", "forward", "--target", "sm_80").splitlines()
    row = next(line.split() for line in table if "16×64" in line)
    assert row[-1] == f"{line['bytes'] * 1e-6:.2f}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shape", "128"), "'128' is not a shape"),
        (("--shape", "128x768,4x1048577"), "'4x1048577' is too wide; a row has at most 1,048,576 columns"),
        (("--shape", "99999999999999999999x64"), "'99999999999999999999x64' is too large; a tensor has at most"),
        (("layernorm",), "'layernorm' is not one of layer_norm, rms_norm"),
        (("--pass", "both"), "'both' is not one of forward, backward"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["inspect", *arguments])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_what_cannot_run_here_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(inspect, "INTERPRETED", True)
    assert main(["inspect"]) == 2
    assert "unset it" in capsys.readouterr().err
    monkeypatch.setattr(inspect, "INTERPRETED", False)
    assert main(["inspect", "--target", "sm_1"]) == 2
    assert "'sm_1' is not one of sm_80, sm_86" in capsys.readouterr().err
    monkeypatch.setattr(inspect, "HAS_TRITON", False)
    assert main(["inspect"]) == 2
    assert "Triton is not installed" in capsys.readouterr().err


def test_the_widest_rows_are_a_shape() -> None:
    assert shape("4x1048576") == (4, 1048576)
