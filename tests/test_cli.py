"""What the commands share: a --json that cannot be written is refused before any work, and one that can keeps its lines."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trinorm.bench import predict
from trinorm.bench.records import Provenance, results_path
from trinorm.cli import bench, inspect, main, tune

HERE = Provenance(gpu="Made-up GPU 9", torch="0.0", triton="0.0", commit=None, date="2000-01-01")

COMMANDS = pytest.mark.parametrize(
    "command", [("bench",), ("inspect",), ("tune", "rms_norm", "--shapes", "8x16")], ids=" ".join
)


class WorkError(Exception):
    """What the work of a command raises here as soon as it begins."""


@pytest.fixture(autouse=True)
def _working_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a GPU, as far as the commands ask before their work."""

    def raises(*_: object) -> None:
        raise WorkError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for module in (bench, inspect, tune):
        monkeypatch.setattr(module, "INTERPRETED", False)
    monkeypatch.setattr(bench, "provenance", lambda device: HERE)
    for module, begins in ((bench, "load"), (predict, "predict"), (tune, "provenance")):
        monkeypatch.setattr(module, begins, raises)


@COMMANDS
def test_a_file_that_cannot_be_written_is_refused_before_any_work(
    command: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder.jsonl"
    file.touch()
    folder.mkdir()
    for path in (file / "lines.jsonl", file / "below" / "lines.jsonl", folder):
        assert main([*command, "--json", str(path)]) == 2
        refusal = capsys.readouterr().err
        assert refusal.startswith(f"trinorm {command[0]}: --json: cannot write {path} (")
        assert refusal.count("\n") == 1


@COMMANDS
def test_a_file_keeps_its_lines_until_there_are_others(command: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "new" / "lines.jsonl"
    with pytest.raises(WorkError):
        main([*command, "--json", str(path)])
    path.write_text("{}\n")
    with pytest.raises(WorkError):
        main([*command, "--json", str(path)])
    assert path.read_text() == "{}\n"


def test_a_folder_is_bench_s_to_name_a_file_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "made-up-gpu-9").touch()
    assert main(["bench", "--json", str(tmp_path)]) == 2
    named = tmp_path / "made-up-gpu-9" / "2000-01-01-layer_norm-rms_norm-bf16.jsonl"
    assert f"--json: cannot write {named} (" in capsys.readouterr().err


def test_plots_that_have_no_folder_are_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    for path in (file, file / "below"):
        assert main(["bench", "--plot", str(path)]) == 2
        assert capsys.readouterr().err.startswith(f"trinorm bench: --plot: cannot make {path} (")
    with pytest.raises(WorkError):
        main(["bench", "--plot", str(tmp_path / "new")])


@pytest.mark.parametrize("encoding", ["ascii", "gbk", "latin-1"])
def test_a_table_is_printed_in_any_encoding(encoding: str, tmp_path: Path) -> None:
    """Of a terminal or a pipe; what it has no character for becomes a question mark."""
    results = Path(__file__).parents[1] / "benchmarks" / "results" / "nvidia-h200"
    files = [str(results / f"2026-11-{day}-matrix-bf16.jsonl") for day in (26, 27)]
    command = [sys.executable, "-m", "trinorm", "bench", "--compare", *files]
    ran = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True, check=False)
    assert b"UnicodeEncodeError" not in ran.stderr
    assert b" compared: " in ran.stdout


def test_results_go_to_the_file_or_under_the_gpus_name() -> None:
    assert results_path(Path("a/b.jsonl"), "NVIDIA H200", "2000-01-01", "x") == Path("a/b.jsonl")
    assert results_path(Path("a"), "NVIDIA H200", "2000-01-01", "x") == Path("a/nvidia-h200/2000-01-01-x.jsonl")
