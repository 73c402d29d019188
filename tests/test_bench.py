"""The benchmark's bookkeeping, with made-up times; the command with no GPU; and, on a GPU, one small real run."""

import argparse
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from trinorm.bench import cases, measure, plots, predict, providers, records, report, shapes, timing
from trinorm.bench.cases import Case
from trinorm.bench.providers import OURS, Provider
from trinorm.bench.records import Provenance, Record
from trinorm.cli import bench
from trinorm.compare import Comparison
from trinorm.norms import ROW_OPS, SUM_OPS

ON_GPU = torch.cuda.is_available()
HERE = Provenance(gpu="Made-up GPU 9", torch="0.0", triton="0.0", commit=None, date="2000-01-01")
# A stream with nothing to wait for.
STILL = SimpleNamespace(synchronize=lambda: None)


def case(
    op: str = "layer_norm", pass_: str = "forward", m: int = 6, n: int = 40, dtype: torch.dtype = torch.bfloat16
) -> Case:
    shape = {"rows": (m, n), "elements": (m, n), "conditioned": (3, m, n)}.get(cases.OPS[op].norm.family, (3, 6, 5, 4))
    return Case(op, pass_, shape, dtype, dtype)


def record(of: Case, provider: str, device_us: float | None, **others: object) -> Record:
    """A record whose times are made up: the ceiling takes 2 µs."""
    made_up = dict(ceiling_us=2.0, device_us=device_us, device_us_mean=device_us, device_us_std=0.5, host_us=7.0, ok=True)
    return replace(Record.of(of, provider, HERE), **(made_up | others))


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_parser(parser.add_subparsers())
    return parser.parse_args(["bench", *arguments])


def printed(*what: object) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(*what)
    return console.file.getvalue()  # type: ignore[attr-defined]


# --- the command's arguments ---


def test_defaults_are_every_op_pass_and_peer_in_bf16() -> None:
    args = parse()
    assert (args.op, args.passes, args.dtype) == (["layer_norm", "rms_norm"], ["forward", "backward"], ["bf16"])
    assert args.peers == ["torch", "compile", "liger", "quack"]
    assert args.shapes is None
    assert shapes.SHAPES[0] == (128, 768)


def test_arguments_are_lists() -> None:
    args = parse("--op", "rms_norm", "--shapes", "128x768,8192x4096", "--dtype", "fp16,fp32", "--pass", "backward")
    assert args.shapes == [(128, 768), (8192, 4096)]
    tables = bench._tables(args, cases.PASSES)
    assert tables == [("rms_norm", "backward", torch.float16), ("rms_norm", "backward", torch.float32)]
    assert parse("--peers", "none").peers == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shapes", "128"), "'128' is not a shape"),
        (("--shapes", "128x768,0x4"), "'0x4' is not a shape"),
        (("--shapes", "-1x4"), "expected one argument"),
        (("--op", "layernorm"), "'layernorm' is not one of layer_norm, rms_norm"),
        (("--pass", "forward,"), "'' is not one of forward, backward"),
        (("--peers", "torch,none"), "'none' is not one of torch, compile, liger, quack"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(*arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


# --- what is measured ---


@pytest.mark.parametrize(
    ("op", "pass_", "expected"),
    [
        ("layer_norm", "forward", 2 * 196608 + 2 * 1536),  # x, w, b; y: 128·768·2 and 768·2 bytes each
        ("layer_norm", "backward", 3 * 196608 + 3 * 1536),  # x, dy, w; dx, dw, db
        ("rms_norm", "forward", 2 * 196608 + 1536),  # x, w; y
        ("rms_norm", "backward", 3 * 196608 + 2 * 1536),  # x, dy, w; dx, dw
    ],
)
def test_bytes_of_the_seed_shape(op: str, pass_: str, expected: int) -> None:
    assert case(op, pass_, 128, 768).bytes == expected


def test_bytes_count_the_weights_own_dtype() -> None:
    assert Case("rms_norm", "forward", (2, 8), torch.float16, torch.float32).bytes == 2 * 2 * 8 * 2 + 8 * 4


@pytest.mark.parametrize("pass_", cases.PASSES)
@pytest.mark.parametrize("op", [op for op in cases.OPS if not cases.OPS[op].lacking("backward")])
def test_bytes_are_those_of_the_tensors(op: str, pass_: str) -> None:
    inputs = case(op, pass_).draw(torch.device("cpu"))
    if inputs.dy is None:
        read = list(inputs.arguments)
        written = [t for t in (inputs.x, inputs.key, inputs.residual) if t is not None]  # as large as y and the sum
    else:
        summed = None if cases.OPS[op].norm.of_gated_sum else inputs.residual  # whose gradient is x's
        read = [t for t in inputs.arguments if t is not summed and t is not inputs.bias] + [*inputs.gradients]
        written = [t for t in inputs.leaves if t is not summed]
    assert case(op, pass_).bytes == sum(t.nbytes for t in read + written)
    assert all(t.requires_grad == (pass_ == "backward") for t in inputs.leaves)


def test_rotated_buffers_are_over_twice_l2() -> None:
    l2 = 60 << 20
    for set_bytes in (1 << 20, 5 << 20, 130 << 20):
        assert timing.sets_past_l2(set_bytes, l2) * set_bytes > 2 * l2
    assert timing.sets_past_l2(1 << 40, l2) == 2
    assert timing.sets_past_l2(64, l2) == 256


# --- who is measured ---


def test_a_peer_that_cannot_be_imported_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Provider:
        raise OSError("libmissing.so: no such file")

    monkeypatch.setitem(providers.PEERS, "quack", broken)
    found, absent = providers.load(["torch", "quack"])
    assert [provider.name for provider in found] == [OURS, "torch"]
    assert absent == {"quack": "OSError: libmissing.so: no such file"}


def test_a_provider_gets_the_weights_it_takes() -> None:
    peer = Provider("peer", lambda _: F.layer_norm, {"layer_norm": torch.float32})
    assert peer.served(case("layer_norm")).weight_dtype == torch.float32
    assert peer.served(case("rms_norm")) == case("rms_norm")


@pytest.mark.parametrize("pass_", cases.PASSES)
@pytest.mark.parametrize("op", [*ROW_OPS, *SUM_OPS, *shapes.CHANNEL_SHAPES])
def test_trinorm_and_torch_are_found_right(op: str, pass_: str, device: torch.device) -> None:
    of = case(op, pass_)
    expected = measure.expect(of, of.draw(device))
    for provider in providers.load(["torch"])[0]:
        comparisons = verified(provider.build(of), expected)
        of_sum, biased = cases.OPS[op].norm.of_sum, cases.OPS[op].norm.biased
        names = ["y", *["sum"] * of_sum] if pass_ == "forward" else ["dx", *["dr"] * of_sum, "dw", *["db"] * biased]
        assert [found.what for found in comparisons] == names  # others': test_bench_heads.py, test_bench_conditioned.py
        assert all(found.ok for found in comparisons), comparisons


def verified(norm: providers.Norm, expected: measure.Expected) -> list[Comparison]:
    return measure.verify(lambda: norm, expected, STILL).comparisons  # type: ignore[arg-type]


def test_a_wrong_gradient_is_found() -> None:
    of = case("rms_norm", "backward")
    expected = measure.expect(of, of.draw(torch.device("cpu")))
    comparisons = verified(lambda x, w: F.rms_norm(x, of.shape[1:], w.detach() + 0 * w, 1e-6), expected)
    assert [(found.what, found.ok) for found in comparisons] == [("dx", True), ("dw", False)]


class _WritesIntoDy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, weight: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> tuple[Tensor, Tensor]:
        return dy.zero_(), dy[0]


def test_a_peer_that_writes_into_dy_does_not_spoil_the_next_ones() -> None:
    of = case("rms_norm", "backward")
    expected = measure.expect(of, of.draw(torch.device("cpu")))
    assert expected.inputs.dy is not None
    dy = expected.inputs.dy.clone()
    verified(_WritesIntoDy.apply, expected)
    assert torch.equal(expected.inputs.dy, dy)


# --- one case over providers, with made-up times ---


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every call is made once and takes a made-up 3 µs; the list grows by the number of sets timed."""
    timed: list[int] = []

    def device_time(calls: list[Callable[[], object]], stream: object, norms: int) -> timing.DeviceTime:
        for call in calls:
            call()
        timed.append(len(calls))
        return timing.DeviceTime(mean=3.5, std=0.25, median=3.0, replays=7)

    monkeypatch.setattr(measure, "device_time", device_time)
    monkeypatch.setattr(measure, "host_times", lambda calls, stream: [11.0])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=4096))
    return timed


def measured(of: Case, who: list[Provider]) -> list[Record]:
    with torch.set_grad_enabled(of.backward):
        return measure._measure(of, who, HERE, torch.device("cpu"), STILL, lambda name: None)  # type: ignore[arg-type]


def refuses(_: Case) -> providers.Norm:
    raise RuntimeError("rows are too wide\nand so on")


@pytest.mark.parametrize("pass_", cases.PASSES)
def test_a_record_holds_what_was_measured_and_a_failure_says_why(pass_: str, untimed: list[int]) -> None:
    of = case("layer_norm", pass_)
    torch_eager = providers.PEERS["torch"]()
    first, second = measured(of, [Provider("refuses", refuses), torch_eager])
    assert (first.failure, first.device_us, first.host_us, first.ok) == (
        "RuntimeError: rows are too wide",
        None,
        None,
        None,
    )
    assert (second.device_us, second.device_us_mean, second.device_us_std, second.replays) == (3.0, 3.5, 0.25, 7)
    assert (second.host_us, second.ceiling_us, second.ok, second.failure) == (11.0, 3.0, True, None)
    sets = timing.sets_past_l2(of.bytes, 4096)
    assert second.rotated == sets
    assert untimed == [sets, sets]  # the ceiling, and torch


def test_ours_is_not_timed_when_it_is_wrong_and_a_peer_is_marked(untimed: list[int]) -> None:
    def doubled(of: Case) -> providers.Norm:
        return lambda x, w: 2 * F.rms_norm(x, of.shape[1:], w, 1e-6)

    ours, peer = measured(case("rms_norm"), [Provider(OURS, doubled), Provider("peer", doubled)])
    assert ours.device_us is None
    assert ours.failure is not None
    assert "WRONG" in ours.failure
    assert (peer.ok, peer.device_us, peer.failure) == (False, 3.0, None)
    assert peer.error_ratio is not None
    assert peer.error_ratio > 2


def test_a_case_that_does_not_fit_fails_in_every_row(untimed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("1 TiB more")

    monkeypatch.setattr(Case, "draw", out_of_memory)
    found = measured(case(), providers.load(["torch"])[0])
    assert [(row.provider, row.failure) for row in found] == [
        (name, "OutOfMemoryError: 1 TiB more") for name in (OURS, "torch")
    ]


# --- what is left of a measurement ---


def test_a_json_line_has_the_promised_fields_in_order() -> None:
    line = record(case(m=128, n=768), OURS, 4.0, error_ratio=float("inf")).to_json()
    assert "\n" not in line
    read = json.loads(line)
    promised = (
        "op pass shape layout dtype weight_dtype provider device_us host_us ceiling_us bytes gpu torch triton commit date"
    )
    assert list(read)[:16] == promised.split()
    assert set(read) - set(promised.split()) == {
        "device_us_mean", "device_us_std", "replays", "rotated", "ok", "error_ratio", "failure", "first_call_s",
        "provider_version",
    }  # fmt: skip
    assert (read["shape"], read["dtype"], read["pass"], read["bytes"]) == ([128, 768], "bfloat16", "forward", 396288)
    assert read["error_ratio"] is None


def test_commit_is_the_environments_where_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRINORM_COMMIT", "abc")
    assert records._commit() == "abc"


def test_table_shows_each_provider_beside_the_ceiling_and_torch() -> None:
    of = case(pass_="backward", m=128, n=768)
    rows = [record(of, OURS, 4.0), record(of, "torch", 10.0), record(of, "liger", 5.0, ok=False, error_ratio=31.0)]
    rows.append(record(of, "quack", None, ok=None, failure="ImportError: [gone]"))
    text = printed(report.table(rows))
    assert "LayerNorm backward, bfloat16, Made-up GPU 9" in text
    cells = {line.split()[0]: line.split() for line in text.splitlines() if line.split()}
    assert cells["128×768"] == ["128×768", "add", "2.00"]
    # µs, mean ± std, GB/s, of the add, × torch, host µs.
    assert cells[OURS][1:] == ["4.00", "4.00", "±", "0.50", "149", "0.50", "2.50", "7.00"]
    assert cells["torch"][7] == "1.00"
    assert cells["liger"][-2:] == ["WRONG", "31.0"]
    assert cells["quack"] == ["quack", "failed"]
    assert report.failures(rows) == ["quack, 128×768: ImportError: [gone]"]


def test_seed_form() -> None:
    of = case("rms_norm", m=128, n=768)
    assert report.seed([record(of, OURS, 4.0), record(of, "torch", 10.0)]).splitlines() == [
        "RMSNorm forward, bfloat16, device time",
        "batch_size=128, hidden_size=768",
        "Triton:  4.00 ± 0.50 µs",
        "PyTorch: 10.00 ± 0.50 µs",
        "Speedup: 2.50x",
    ]
    alone = report.seed([record(of, OURS, None)])
    assert "Triton:  not measured\nPyTorch: not measured" in alone
    assert "Speedup" not in alone


def test_plots_are_drawn_along_the_axes_that_have_two_sizes(tmp_path: Path) -> None:
    shapes = [(8, 128), (8, 256), (64, 256)]
    rows = [
        record(case(pass_=pass_, m=m, n=n), provider, None if (provider, n) == ("liger", 256) else 4.0)
        for m, n in shapes
        for pass_ in cases.PASSES
        for provider in (OURS, "torch", "liger")
    ]
    written = plots.draw(rows, tmp_path / "new")
    assert [path.name for path in written] == ["layer_norm-bfloat16-batch-size.png", "layer_norm-bfloat16-hidden-size.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    assert plots.draw([row for row in rows if row.shape == (8, 128)], tmp_path / "none") == []
    assert not (tmp_path / "none").exists()


# --- with no GPU ---


@pytest.mark.parametrize("op", ROW_OPS + SUM_OPS)
def test_launches_are_written_down_and_not_made(op: str) -> None:
    (kernel, _, args, options), *others = predict.launches(case(op, m=4, n=96))
    assert kernel.fn.__name__ == "row_forward"
    assert others == []
    assert options["N"] == 96
    assert all(arg.is_meta for arg in args if isinstance(arg, Tensor))
    backward = predict.launches(case(op, "backward", m=20000, n=96))
    assert [kernel.fn.__name__ for kernel, *_ in backward] == ["row_backward", "sum_partials"]


@pytest.mark.skipif(ON_GPU, reason="what happens where there is no GPU")
def test_with_no_gpu_it_checks_and_predicts_and_times_nothing(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "trinorm", "bench"]
    command += ["--op", "rms_norm", "--shapes", "8192x4096", "--dtype", "fp16", "--json", str(tmp_path / "out")]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("There is no GPU") == 1
    assert "rms_norm" in ran.stdout
    assert "a prediction from below" in ran.stdout
    row = next(line.split() for line in ran.stdout.splitlines() if line.strip().startswith("8192×4096"))
    assert row[1] == "row_forward"
    # No spills; 2·8192·4096·2 + 4096·2 bytes in MB; what 4.3e12 bytes a second makes of them, and a launch with them.
    assert (row[4], row[-5:-3], row[-2:]) == ("0", ["134.23", "31.2"], ["32.7", "1.00"])
    # No column of a measurement, and no file of measurements.
    assert not re.search(r"host µs|± \d|GB/s|× torch", ran.stdout)
    assert not (tmp_path / "out").exists()


def test_under_the_interpreter_it_refuses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "INTERPRETED", True)
    assert bench.run(parse()) == 2
    assert "unset it" in capsys.readouterr().err


# --- on a GPU ---


@pytest.mark.skipif(not ON_GPU, reason="times are only ever measured on a GPU")
def test_a_small_real_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = parse("--shapes", "128x768,256x768", "--peers", "torch", "--json", str(tmp_path), "--plot", str(tmp_path))
    assert args.func(args) == 0
    output = capsys.readouterr().out
    assert output.count("Speedup: ") == 4
    (path,) = tmp_path.glob("*/*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 2 * 2 * 2 * 2
    for row in rows:
        assert row["ok"], row
        # No kernel is faster than its launch, and no small one takes a millisecond.
        assert 0.3 < row["device_us"] < 1000
        assert row["first_call_s"] * 1e6 > row["host_us"] > 0.3
        assert row["device_us_std"] >= 0
        assert row["rotated"] == timing.sets_past_l2(row["bytes"], torch.cuda.get_device_properties(0).L2_cache_size)
    assert len(list(tmp_path.glob("*.png"))) == 2
