"""benchmarks/models.py in toy sizes: each column is as near to the fp32 model as torch's is, and nothing is written."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MODULES = ("models", "model_cases", "model_columns", "model_rows")

Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
    yield importlib.import_module("models")
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def run(models: ModuleType, device: torch.device) -> Run:
    return lambda *given: models.main(["--device", device.type, "--tiny", *given])


# Dynamo's own look at an input of a layer.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")
def test_every_column_is_measured_and_none_is_further_from_fp32(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    columns = ["torch", "trinorm", "trinorm+compile", "trinorm+layers"]
    found = run("--cases", "llama,unet-last", "--columns", ",".join(columns))
    by_model: dict[str, dict[str, dict[str, Any]]] = {}
    for record in found:
        assert record["failure"] is None and record["ms"] > 0 and record["steps"] >= 1
        by_model.setdefault(record["model"], {})[record["column"]] = record
    assert {model: list(row) for model, row in by_model.items()} == {
        "Llama-3.2-1B": columns,
        "UNet block": columns[:3],  # which has no layers
    }
    for row in by_model.values():
        for record in row.values():
            for error in ("logits_error", "gradients_error"):
                assert 0 < record[error] <= 2 * row["torch"][error], (record["column"], error)
    shown = capsys.readouterr().out
    assert all(shown.count(model) > 2 for model in by_model)  # as it goes on, and in both tables


def test_a_forward_alone_and_a_cache_that_is_rewound(run: Run) -> None:
    found = run("--cases", "decode", "--columns", "torch,trinorm,layers")
    assert [record["column"] for record in found] == ["torch", "trinorm"]  # its layers are not compiled one by one
    for record in found:
        assert record["failure"] is None and record["pass"] == "decode"
        assert 0 < record["logits_error"] <= 2 * found[0]["logits_error"]
        assert record["gradients_error"] is None


def test_what_raises_says_so_and_the_rest_goes_on(run: Run, models: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(model: torch.nn.Module) -> torch.nn.Module:
        raise RuntimeError("no\nnorm")

    column = type(models.COLUMNS["torch"])
    monkeypatch.setitem(models.COLUMNS, "refuses", column(refuses))
    refused, measured = run("--cases", "unet", "--columns", "refuses,torch")
    assert refused["failure"] == "RuntimeError: no norm" and "ms" not in refused
    assert measured["failure"] is None and measured["ms"] > 0


def test_a_wrong_norm_shows(run: Run, models: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: torch.nn.Module) -> torch.nn.Module:
        model.norm1.eps = 1.0  # type: ignore[union-attr]
        return model

    monkeypatch.setitem(models.COLUMNS, "wrong", type(models.COLUMNS["torch"])(wrong))
    right, other = run("--cases", "unet", "--columns", "torch,wrong")
    assert all(other[error] > 10 * right[error] for error in ("logits_error", "gradients_error"))


def test_a_quick_run_compiles_few_layers_and_says_so(models: ModuleType) -> None:
    rows = list(models.rows(["llama", "qwen3", "resnet"], ["torch", "compile", "liger"], True, False, torch.device("cpu")))
    assert [(row.case.title, row.layers, row.columns) for row in rows] == [
        ("Llama-3.2-1B", None, ["torch", "liger"]),
        ("Llama-3.2-1B", 4, ["torch", "compile"]),
        ("Qwen3-0.6B", None, ["torch", "liger"]),
        ("ResNet-50", None, ["torch", "compile", "liger"]),
    ]
    assert "4 of 16 layers" in rows[1].title and "layers" not in rows[0].title
    # Those few are compared on what is timed, for which they are compiled.
    assert (rows[0].compared, rows[1].compared) == ((1, 512), (4, 4096))


@pytest.mark.parametrize("name", ["llama", "qwen3", "decode"])
@pytest.mark.parametrize("full", [False, True])
def test_ligers_patch_is_of_one_model(name: str, full: bool, models: ModuleType) -> None:
    pytest.importorskip("liger_kernel")
    columns = importlib.import_module("model_columns")
    model = models.CASES[name].build(1, True)
    theirs = importlib.import_module(type(model).__module__)
    before, other = dict(vars(theirs)), models.CASES[name].build(1, True)
    columns.liger(model, full=full)
    assert vars(theirs) == before
    norms = [m for m in model.modules() if "RMSNorm" in type(m).__name__]
    assert norms and all(m._get_name() == "LigerRMSNorm" for m in norms)
    assert ("Liger" in model.model.layers[0].mlp._get_name()) == full
    assert not any("Liger" in m._get_name() or "forward" in vars(m) for m in other.modules())


def test_toy_sizes_are_no_results(run: Run, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        run("--json", str(tmp_path / "lines.jsonl"))
    assert not list(tmp_path.iterdir())


def test_written_lines_are_shown(models: ModuleType, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--cases", "unet", "--seconds", "0") == []
    found = run("--cases", "unet", "--columns", "torch")
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in found))
    capsys.readouterr()
    models.main(["--show", str(path)])
    shown = capsys.readouterr().out
    assert f"{found[0]['ms']:.2f}" in shown and f"{found[0]['logits_error']:.2e}" in shown
