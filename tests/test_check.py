"""``trinorm check``: it passes, and it can fail. Also the cases it draws."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import trinorm
from machine import ON_GPU
from trinorm.cases import DTYPES, NASTY, NORMAL, Case, Inputs, Values
from trinorm.cli import check, main
from trinorm.ops import CALLS, road
from trinorm.ops.hosts import rows

CASE = Case((8, 17))
NORMS = ("layer_norm", "rms_norm")
# A casting mode differs where it rounds, which bf16 shows: on a CPU in that dtype alone.
RUNS = (
    [["--quick"]]
    if ON_GPU
    else [
        ["--quick", "--workers", "1", "--op", ",".join(NORMS)],
        ["--quick", "--workers", "1", "--op", ",".join(op for op in check.OPS if op not in NORMS), "--dtype", "bf16"],
    ]
)


def wrong(op: str = "layer_norm", dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> set[str]:
    """What check_op finds wrong."""
    results = check.check_op(op, dtype, torch.device(device), [CASE])
    assert {result.comparison.what for result in results} >= {"y", "dx", "dw"}
    return {result.comparison.what for result in results if not result.comparison.ok}


def test_everything_passes_in_a_small_run(capsys: pytest.CaptureFixture[str]) -> None:
    statuses = [main(["check", *run]) for run in RUNS]
    output = capsys.readouterr().out
    assert not any(statuses), output
    table = {tuple(line.split()[:4]): line.split()[4:] for line in output.splitlines() if line.strip().endswith(" ok")}
    for op, what in (("layer_norm", "y mean rstd dx dw db"), ("rms_norm", "y rstd dx dw")):
        for dtype in DTYPES:
            for quantity in what.split():
                cases, error, torch_error, *_ = table[op, dtype, dtype, quantity]
                assert int(cases) >= 10
                assert float(error) >= 0
                assert float(torch_error) >= 0
            assert (op, dtype, "absent", "y") in table
        assert (op, "bf16", "fp32", "dw") in table
        assert (op, "fp64", "fp64", "gradcheck") in table
    assert {op for op, *_ in table} == set(check.OPS)
    assert output.count("all within twice torch's own error") == len(RUNS)


def test_a_fresh_process_chooses_the_interpreter_by_itself() -> None:
    path = os.pathsep.join([str(Path(trinorm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": path}
    command = [sys.executable, "-m", "trinorm", "check", "--op", "rms_norm", "--dtype", "fp16", "--quick"]
    command += ["--workers", "1"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ("interpreter" in ran.stdout.splitlines()[0]) == (not torch.cuda.is_available())


Spoil = Callable[[torch.Tensor], torch.Tensor]


def spoil(monkeypatch: pytest.MonkeyPatch, function: str, index: int, change: Spoil) -> None:
    """Let ``rows.<function>`` return what it does but for one of its results."""
    honest = getattr(rows, function)

    def spoiled(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        results = list(honest(*args, **kwargs))
        if results[index] is not None:
            results[index] = change(results[index])
        return tuple(results)

    monkeypatch.setattr(rows, function, spoiled)
    CALLS.clear()  # what was recorded honestly


def _first(value: float) -> Spoil:
    def change(t: torch.Tensor) -> torch.Tensor:
        t.view(-1)[0] = value
        return t

    return change


@pytest.mark.parametrize(
    ("function", "index", "change", "found"),
    [
        ("forward", 0, lambda y: y + 4e-6, {"y"}),
        ("forward", 0, lambda y: y.bfloat16().to(y.dtype), {"y"}),
        ("forward", 0, _first(float("nan")), {"y"}),
        ("forward", 1, lambda mean: mean + 1e-5, {"mean", "dx", "dw"}),
        ("forward", 2, lambda rstd: rstd * (1 + 1e-5), {"rstd", "dx", "dw"}),
        ("backward", 0, lambda dx: dx * (1 + 1e-5), {"dx"}),
        ("backward", 0, _first(float("inf")), {"dx"}),
        ("backward", 1, lambda dw: dw.roll(1), {"dw"}),
        ("backward", 2, lambda db: db * (1 + 1e-5), {"db"}),
    ],
)
def test_a_wrong_result_is_found(
    function: str, index: int, change: Spoil, found: set[str], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert wrong(device=device) == set()
    spoil(monkeypatch, function, index, change)
    assert wrong(device=device) == found


def test_a_wrong_eps_is_found(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = rows.forward

    def forward(spec: Any, x: Any, dims: Any, weight: Any, bias: Any, eps: float, **how: Any) -> rows.Normalized:
        return honest(spec, x, dims, weight, bias, eps * 2, **how)

    monkeypatch.setattr(rows, "forward", forward)
    CALLS.clear()
    assert wrong("rms_norm", device=device) >= {"y", "rstd", "dx"}


def test_a_wrong_gradient_is_found_numerically(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, "backward", 0, lambda dx: dx * 1.01)
    (result,) = check.check_numerically("layer_norm", device)
    assert not result.comparison.ok
    assert "Jacobian mismatch" in result.comparison.worst


def test_a_call_that_raises_without_a_word_has_no_right_gradient(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(rows, "forward", refuse)
    CALLS.clear()
    (result,) = check.check_numerically("layer_norm", device)
    assert not result.comparison.ok
    assert "AssertionError" in result.comparison.worst


def test_exits_with_1_and_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(monkeypatch, "backward", 1, lambda dw: dw * 2)
    assert main(["check", "--op", "rms_norm", "--dtype", "fp16", "--quick", "--workers", "1"]) == 1
    output = capsys.readouterr().out
    verdicts = {tuple(line.split()[:4]): line.split()[-1] for line in output.splitlines() if line.startswith(" rms_norm")}
    assert verdicts["rms_norm", "fp16", "fp16", "dw"] == "WRONG"
    assert verdicts["rms_norm", "fp16", "fp16", "dx"] == "ok"
    assert "\nrms_norm fp16, weight fp16, 8x129 normal: dw: error" in output


def test_without_triton_the_composite_is_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(road, "HAS_TRITON", False)
    monkeypatch.setattr(rows, "forward", None)
    assert main(["check", "--device", "cpu", "--op", "layer_norm", "--dtype", "bf16", "--quick", "--workers", "1"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("Triton is not installed")
    assert " dx " in output
    assert " rstd " not in output


def test_without_rich_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["check"]) == 2
    assert "pip install 'trinorm[bench]'" in capsys.readouterr().err


@pytest.mark.skipif(not road.HAS_TRITON, reason="there is no interpreter")
def test_the_interpreter_without_numpy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "numpy" else found(name))
    assert main(["check", "--device", "cpu"]) == 2
    assert "needs numpy" in capsys.readouterr().err


def test_without_a_gpu_cuda_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for given, message in (("cuda", "there are 0 GPUs"), ("meta", "not a device"), ("foo", "not a device")):
        with pytest.raises(SystemExit) as left:
            main(["check", "--device", given])
        assert left.value.code == 2
        assert message in capsys.readouterr().err


def test_a_name_that_is_not_known_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["check", "--dtype", "bf16,int8"])
    assert left.value.code == 2
    assert "'int8' is not one of fp16, bf16, fp32, fp64" in capsys.readouterr().err


def test_a_call_that_raises_is_wrong_and_the_others_are_still_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where a launch asks for more than a device has: the table is there all the same."""
    forward = rows.forward

    def refuse(spec: Any, x: torch.Tensor, *args: Any, **options: Any) -> Any:
        if x.shape[-1] == 129:
            raise RuntimeError("out of resources")
        return forward(spec, x, *args, **options)

    monkeypatch.setattr(rows, "forward", refuse)
    CALLS.clear()
    assert main(["check", "--op", "rms_norm", "--dtype", "fp16", "--quick", "--workers", "1"]) == 1
    output = capsys.readouterr().out
    verdicts = {tuple(line.split()[:4]): line.split()[-1] for line in output.splitlines() if line.startswith(" rms_norm")}
    assert verdicts["rms_norm", "fp16", "fp16", "raised"] == "WRONG"
    assert verdicts["rms_norm", "fp16", "fp16", "dx"] == "ok"
    assert "\nrms_norm fp16, weight fp16, 8x129 normal: raised:" in output
    assert "RuntimeError: out of resources" in output


def test_workers_find_what_one_process_finds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # workers choose the interpreter by themselves

    def table(workers: int) -> str:
        dtypes = "bf16,fp64" if ON_GPU else "fp16"
        assert main(["check", "--dtype", dtypes, "--op", "rms_norm", "--quick", "--workers", str(workers)]) == 0
        return capsys.readouterr().out.partition(" comparisons in ")[0]

    assert table(1) == table(3 if ON_GPU else 2)


def test_a_worker_that_dies_is_no_wrong_result(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(check, "_step", os._exit)  # of the number of each step
    assert main(["check", "--dtype", "fp16", "--quick", "--workers", "2"]) == 2
    assert "a worker died" in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["0", "-1", "two"])
def test_a_number_of_workers_that_is_none_is_refused(workers: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["check", "--workers", workers])
    assert left.value.code == 2
    assert "is not a whole number from 1 on" in capsys.readouterr().err


def drawn(values: Values, dtype: torch.dtype) -> Inputs:
    return Case((9, 33), values).inputs(check.OPS["layer_norm"], dtype, torch.device("cpu"))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("values", [NORMAL, *NASTY], ids=lambda values: values.name)
def test_powers_of_two_come_out_exactly(values: Values, dtype: torch.dtype) -> None:
    if not values.fits(dtype):
        assert dtype == torch.float16
        return
    inputs = drawn(values, dtype)
    x = inputs.unscaled().of.x
    assert torch.equal((x.double() * inputs.scale).nan_to_num(), inputs.of.x.double().nan_to_num())
    assert torch.equal(inputs.of.x, drawn(values, dtype).of.x) or values.name == "one NaN"


def test_values_are_as_named() -> None:
    x = {values.name: drawn(values, torch.float32).of.x.double() for values in NASTY}
    assert (x["mean 1e4, std 1e-2"].mean() - 1e4).abs() < 0.01
    assert 0.005 < x["mean 1e4, std 1e-2"].std() < 0.02
    assert (x["rows of one value"].amax(1) == x["rows of one value"].amin(1)).all()
    assert not x["zeros"].any()
    assert x["denormals"].abs().max() < torch.finfo(torch.float32).tiny
    assert (x["denormals"] != 0).double().mean() > 0.9
    assert x["one NaN"].isnan().sum() == 1
    assert x["one Inf"].isinf().sum() == 1
    assert (x["1e30"].float().square().mean(1) == float("inf")).all()
    assert (x["1e-30"].float().square() == 0).all()
    assert sorted(set(x["1e30, 1 and 1e-30 by rows"].square().mean(1).log10().div(30).round().tolist())) == [-2.0, 0.0, 2.0]
