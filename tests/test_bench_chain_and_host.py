"""What ``trinorm bench`` measures besides single passes: chains of norms, and eager calls on the host."""

from __future__ import annotations

import functools
import io
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from trinorm import cli
from trinorm.bench import cases, host, measure, predict, providers, report, shapes, timing
from trinorm.bench.cases import CHAIN, HOST, HOST_PASSES, LINKS, Case
from trinorm.bench.providers import OURS, Provider
from trinorm.bench.records import Provenance, Record
from trinorm.bench.shapes import CONDITIONED_SHAPES, NAMED_SHAPES
from trinorm.cli import bench
from trinorm.norms import ELEMENT_OPS, ROW_OPS, SUM_OPS

ON_GPU = torch.cuda.is_available()
HERE = Provenance(gpu="Made-up GPU 9", torch="0.0", triton="0.0", commit=None, date="2000-01-01")


def chain(op: str, m: int = 3, n: int = 40, dtype: torch.dtype = torch.bfloat16) -> Case:
    return Case(op, CHAIN, (m, n), dtype, dtype)


# --- the matrix ---


def test_the_matrix_has_every_width_and_the_rows_of_decoding() -> None:
    matrix = cases.shapes_of("rms_norm", ["matrix"])
    assert len(matrix) == len(set(matrix)) == 25
    assert {1 << k for k in range(6, 19) if k != 9} <= {n for _, n in matrix}
    assert {(m, 4096) for m in (1, 16, 64, 256)} | {shapes.SEED_SHAPE} <= set(matrix)
    assert set(cases.shapes_of("layer_norm", ["quartet"])) <= set(matrix)


def test_only_small_norms_are_chained() -> None:
    assert Case("rms_norm", CHAIN, (256, 4096), torch.bfloat16, torch.bfloat16).worthwhile
    assert not Case("rms_norm", CHAIN, (1024, 4096), torch.bfloat16, torch.bfloat16).worthwhile
    assert Case("rms_norm", "forward", (1024, 4096), torch.bfloat16, torch.bfloat16).worthwhile


def test_a_name_stands_for_its_shapes() -> None:
    asked = cli.shapes("8x16,quartet,128x768")
    assert cases.shapes_of("rms_norm", asked) == [(8, 16), *NAMED_SHAPES["quartet"]["rms_norm"]]


def test_of_the_matrix_six_shapes_are_chained() -> None:
    chained = bench._cases(("rms_norm", CHAIN, torch.bfloat16), NAMED_SHAPES["matrix"]["rms_norm"])
    assert {of.shape for of in chained} == {(128, 768), (64, 8192), *((m, 4096) for m in (1, 16, 64, 256))}


# --- chains ---


@pytest.mark.parametrize("op", ROW_OPS)
def test_a_chain_feeds_each_norm_with_the_one_before(op: str, device: torch.device) -> None:
    of = chain(op)
    expected = measure.expect(of, of.draw(device))
    y = x = expected.inputs.x
    bias = expected.inputs.bias
    for i in range(LINKS):
        parameters = [expected.inputs.weight[i], *([] if bias is None else [bias[i]])]
        y = getattr(F, op)(y, of.shape[1:], *parameters, cases.OPS[op].eps)
    ((what, _, by_torch),) = expected.results
    assert what == "y"
    assert torch.equal(by_torch, y)
    for provider in providers.load(["torch"])[0]:
        (found,) = measure.compared(measure.chained(provider.build(of))(*expected.inputs.arguments), expected)
        assert found.ok, (provider.name, found)
    assert torch.equal(expected.inputs.x, x)


@pytest.mark.parametrize("broken", [0, 1, LINKS - 1])
def test_one_wrong_link_is_found(broken: int) -> None:
    of = chain("rms_norm")
    expected = measure.expect(of, of.draw(torch.device("cpu")))
    calls = iter(range(LINKS))

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        y = F.rms_norm(x, of.shape[1:], weight, 1e-6)
        return y.roll(1, -1) if next(calls) == broken else y

    (found,) = measure.compared(measure.chained(norm)(*expected.inputs.arguments), expected)
    assert not found.ok


def test_the_ceiling_of_a_chain_is_a_chain_of_copies() -> None:
    of = chain("layer_norm")
    inputs = of.draw(torch.device("cpu"))
    (call,) = measure.ceiling_calls(of, [inputs])
    with torch.profiler.profile(acc_events=True) as seen:
        found = call()
    assert isinstance(found, Tensor)
    assert torch.equal(found, inputs.x)
    assert {event.key: event.count for event in seen.key_averages()}["aten::clone"] == LINKS


def test_a_chains_record_is_of_one_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[tuple[int, int]] = []

    def device_time(calls: list[timing.Call], stream: object, norms: int) -> timing.DeviceTime:
        timed.append((len(calls), norms))
        return timing.DeviceTime(mean=3.5, std=0.25, median=3.0, replays=7)

    monkeypatch.setattr(measure, "device_time", device_time)
    # With no GPU there is no graph to replay.
    monkeypatch.setattr(measure, "_replayed", lambda norm, stream, *arguments: norm(*arguments))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=4096))
    of = chain("layer_norm")
    with torch.no_grad():
        records = measure._measure(of, providers.load(["torch"])[0], HERE, torch.device("cpu"), None, lambda name: None)  # type: ignore[arg-type]
    assert timed == [(1, LINKS)] * 3  # the ceiling, ours, torch's
    assert [(record.pass_, record.device_us, record.host_us, record.first_call_s, record.ok) for record in records] == [
        ("chain", 3.0, None, None, True)
    ] * 2
    assert {record.bytes for record in records} == {
        Case("layer_norm", "forward", (3, 40), torch.bfloat16, torch.bfloat16).bytes
    }


@pytest.mark.skipif(not ON_GPU, reason="graphs are only ever replayed on a GPU")
def test_a_replay_times_one_norm_and_keeps_its_results() -> None:
    x = torch.zeros(1 << 20, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        replay = timing.Replay([lambda: x + 1, lambda: x + 2], stream)
        assert [result[0].item() for result in replay.results] == [1, 2]  # type: ignore[index]

        def thrice() -> None:
            for _ in range(3):
                x.add_(1)

        alone, of_three = timing.device_time([lambda: x.add_(1)], stream), timing.device_time([thrice], stream, norms=3)
    assert of_three.median == pytest.approx(alone.median, rel=0.25)


# --- host times ---


class _Silent:
    def synchronize(self) -> None:
        pass


def test_host_times_take_turns_and_tell_calls_apart() -> None:
    order: list[str] = []

    def call(name: str, seconds: float) -> None:
        if order[-1:] != [name]:
            order.append(name)
        time.sleep(seconds)

    calls = [functools.partial(call, "slow", 4e-4), functools.partial(call, "fast", 0.0)]
    slow, fast = timing.host_times(calls, _Silent())  # type: ignore[arg-type]
    assert order[:4] == ["slow", "fast", "slow", "fast"]
    assert slow > 400 > fast


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, list[bool]]]:
    """Every call is made once and takes made-up times, 10 µs more for each; the list says of each turn whether grad was on,
    and whether each call's result can be differentiated (a tensor) or has been (a tuple)."""
    seen: list[tuple[bool, list[bool]]] = []

    def host_times(calls: list[timing.Call], stream: object) -> list[float]:
        results = [call() for call in calls]
        differentiable = [isinstance(result, tuple) or result.requires_grad for result in results]  # type: ignore[attr-defined]
        seen.append((torch.is_grad_enabled(), differentiable))
        return [10.0 * (i + 1) for i in range(len(calls))]

    monkeypatch.setattr(host, "host_times", host_times)
    return seen


def measured(op: str, who: list[Provider], started: list[str]) -> list[Record]:
    family = cases.OPS[op].norm.family
    # Of a few numbers torch's error is chance.
    shape = {"rows": (4, 24), "elements": (4, 24), "conditioned": (3, 12, 40)}.get(family, (3, 12, 7, 7))
    of = Case(op, "backward", shape, torch.float32, torch.float32)
    return host.measure_host(of, who, HERE, torch.device("cpu"), _Silent(), started.append)  # type: ignore[arg-type]


@pytest.mark.parametrize("op", [op for op in cases.OPS if not cases.OPS[op].lacking(HOST)])
def test_functions_and_modules_are_measured_without_grad_with_it_and_with_the_backward(
    op: str, counted: list[tuple[bool, list[bool]]]
) -> None:
    started: list[str] = []
    records = measured(op, providers.load(["torch"])[0], started)
    assert tuple(started) == HOST_PASSES
    names = [OURS, f"{OURS}.nn", "torch", "torch.nn"]
    if op in ("channel_layer_norm", "qk_norm", *CONDITIONED_SHAPES, *ELEMENT_OPS, *SUM_OPS):  # which torch.nn has not
        # A weight's norm has no module of its own, but is another's.
        assert [record.failure is None for record in records[:4]] == [True, op != "weight_norm", True, False]
        return
    assert counted == [(False, [False] * 4), (True, [True] * 4), (True, [True] * 4)]
    assert [(record.provider, record.pass_) for record in records] == [
        (name, pass_) for pass_ in HOST_PASSES for name in names
    ]
    assert all(record.ok for record in records)
    assert [record.host_us for record in records] == [10.0, 20.0, 30.0, 40.0] * 3
    assert {(record.device_us, record.ceiling_us, record.first_call_s) for record in records} == {(None, None, None)}


def test_what_is_wrong_or_raises_is_not_timed(counted: list[tuple[bool, list[bool]]]) -> None:
    def refuses(_: Case) -> providers.Norm:
        raise RuntimeError("not here\nand so on")

    def wrong(of: Case) -> providers.Norm:
        return lambda x, w: F.rms_norm(x, of.shape[1:], w.detach() + 0 * w, 1e-6)

    records = measured("rms_norm", [Provider("refuses", refuses), Provider("wrong", wrong), providers.PEERS["torch"]()], [])
    by = {record.provider: record for record in records}
    assert by["refuses"].failure == "RuntimeError: not here"
    assert by["refuses"].ok is None
    assert by["wrong"].ok is False
    assert by["wrong"].failure is not None
    assert by["wrong"].failure.startswith("dw: error")
    assert (by["wrong"].host_us, by["refuses"].host_us) == (None, None)
    assert by["torch"].host_us == 10.0


def test_the_host_table_divides_functions_by_functions_and_modules_by_modules(
    counted: list[tuple[bool, list[bool]]],
) -> None:
    console = Console(width=160, file=io.StringIO())
    with console.capture() as shown:
        console.print(report.host_table(measured("layer_norm", providers.load(["torch"])[0], [])))
    rows = {line.split()[0]: line.split()[1:] for line in shown.get().splitlines() if line.split()}
    assert rows[OURS] == ["10.0", "0.33"] * 3
    assert rows[f"{OURS}.nn"] == ["20.0", "0.50"] * 3
    assert rows["torch.nn"] == ["40.0", "1.00"] * 3


# --- the command: nothing is left out without a word ---


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command's exit status and what it says, with or without a GPU. Nothing is checked, compiled or timed."""

    def failing(of: Case, who: list[Provider], *_: object) -> list[Record]:
        return [replace(Record.of(of, provider.name, HERE), failure="RuntimeError: no") for provider in who]

    monkeypatch.setattr(bench, "INTERPRETED", False)
    monkeypatch.setattr(bench, "_check_interpreted", lambda args: 0)
    monkeypatch.setattr(predict, "predict", lambda cases: list(cases))
    monkeypatch.setattr(report, "prediction_table", lambda cases: "\n".join(map(str, cases)))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(bench, "provenance", lambda device: HERE)
    monkeypatch.setattr(measure, "measure", failing)

    def run(*arguments: str, gpu: bool) -> tuple[int, str, str]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        status = cli.main(["bench", "--peers", "none", *arguments])
        return status, *capsys.readouterr()

    return run


def test_with_no_gpu_times_alone_are_refused_or_said_to_be_left_out(told: Callable[..., tuple[int, str, str]]) -> None:
    status, out, err = told("--pass", "chain,host", gpu=False)
    assert (status, out) == (2, "")
    assert err.startswith("trinorm bench: --pass chain and host: times alone, and there is no GPU to measure them on;")
    assert err.count("\n") == 1
    status, out, err = told("--pass", "host,forward", "--op", "rms_norm", "--shapes", "4x8", gpu=False)
    assert (status, err) == (0, "")
    assert out.startswith("Left out: host: times alone, and there is no GPU to measure them on.\n")
    assert "rms_norm forward 4×8" in out
    assert "Left out" not in told("--op", "rms_norm", "--shapes", "4x8", gpu=False)[1]


def test_the_exit_status_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    assert "without a GPU there is nothing of them" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "gpu", "message"),
    [
        (("--op", "rms_norm", "--pass", "chain", "--shapes", "8192x4096"), True, "rms_norm chain, bfloat16: a chain is of"),
        (("--op", "group_norm", "--shapes", "quartet"), False, "group_norm forward, bfloat16: no such shape in such a"),
        (("--op", "rms_norm", "--layout", "channels_last"), False, "rms_norm backward, bfloat16: no such shape in such"),
        (("--pass", "host", "--layout", "channels_last"), True, "rms_norm host, bfloat16: host times are of contiguous"),
    ],
)
def test_where_nothing_is_to_be_measured_it_says_why(
    arguments: tuple[str, ...], gpu: bool, message: str, told: Callable[..., tuple[int, str, str]]
) -> None:
    status, out, err = told(*arguments, gpu=gpu)
    assert (status, out) == (2, "")
    assert err.startswith("trinorm bench: nothing to measure; ")
    assert message in err


def test_what_is_left_out_of_a_measurement_is_said(told: Callable[..., tuple[int, str, str]]) -> None:
    out = told("--op", "rms_norm", "--pass", "forward,chain", "--shapes", "8192x4096", gpu=True)[1]
    assert out.startswith("Left out: rms_norm chain, bfloat16: a chain is of norms below 2^22 elements.\n")


def test_layouts_are_measured_as_asked(told: Callable[..., tuple[int, str, str]]) -> None:
    call = ("--op", "group_norm", "--pass", "forward", "--shapes", "2x64x8x8")
    both, one = told(*call, gpu=False)[1], told(*call, "--layout", "channels_last", gpu=False)[1]
    assert [text.count("group_norm forward 2×64×8×8\n") for text in (both, one)] == [1, 0]
    assert [text.count("group_norm forward 2×64×8×8 NHWC\n") for text in (both, one)] == [1, 1]


def test_a_failure_of_ours_fails(told: Callable[..., tuple[int, str, str]]) -> None:
    status, out, _ = told("--op", "rms_norm", "--pass", "forward", "--shapes", "4x8", gpu=True)
    assert "trinorm, 4×8: RuntimeError: no" in out
    assert status == 1
