"""How long a provider's first call takes: what is in it and what is not, on a made-up clock; and the lines that say so."""

import argparse
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from trinorm.bench import measure, providers, report, timing
from trinorm.bench.cases import PASSES, Case
from trinorm.bench.providers import OURS, Provider
from trinorm.bench.records import Provenance, Record
from trinorm.cli import bench

HERE = Provenance(gpu="Made-up GPU 9", torch="0.0", triton="0.0", commit=None, date="2000-01-01")

# What each step takes, in seconds, of the host and of the GPU: no two sets of them have the same sum.
BUILD, FORWARD, BACKWARD = 1, (2, 4), (8, 16)
CLONE, COMPARE, DRAW = 32, 64, 128


def case(pass_: str) -> Case:
    return Case("rms_norm", pass_, (6, 40), torch.float32, torch.float32)


class Clock:
    """Goes on by what the host does, and by what the GPU has left to do when the host waits for it. Also the stream."""

    def __init__(self) -> None:
        self._now = self._queued = 0

    def perf_counter(self) -> float:
        return self._now

    def spend(self, host: int, gpu: int = 0) -> None:
        self._now += host
        self._queued += gpu

    def synchronize(self) -> None:
        self.spend(self._queued)
        self._queued = 0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock by which first calls are timed. Drawing and cloning are the GPU's work, comparing is the host's."""
    clock = Clock()

    def after(seconds: tuple[int, int], work: Callable[..., Any]) -> Callable[..., Any]:
        def working(*arguments: Any) -> Any:
            clock.spend(*seconds)
            return work(*arguments)

        return working

    def device_time(calls: Sequence[timing.Call], stream: object, norms: int) -> timing.DeviceTime:
        for call in calls:
            call()
        return timing.DeviceTime(mean=3.5, std=0.25, median=3.0, replays=7)

    monkeypatch.setattr(measure, "time", clock)
    monkeypatch.setattr(measure, "compared", after((COMPARE, 0), measure.compared))
    monkeypatch.setattr(Case, "draw", after((0, DRAW), Case.draw))
    monkeypatch.setattr(Tensor, "clone", after((0, CLONE), Tensor.clone))
    monkeypatch.setattr(measure, "device_time", device_time)
    monkeypatch.setattr(measure, "host_times", lambda calls, stream: [11.0])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=4096))
    return clock


def slow(clock: Clock, times: float = 1.0) -> Callable[[Case], providers.Norm]:
    """A norm that takes its time to be built, forward and backward; its result is so many times what is right."""

    def build(of: Case) -> providers.Norm:
        def norm(x: Tensor, weight: Tensor) -> Tensor:
            clock.spend(*FORWARD)
            y = F.rms_norm(x, of.shape[1:], weight, 1e-6) * times
            if y.requires_grad:
                y.register_hook(lambda _: clock.spend(*BACKWARD))
            return y

        clock.spend(BUILD)
        return norm

    return build


def measured(of: Case, who: list[Provider], clock: Clock) -> list[Record]:
    with torch.set_grad_enabled(of.backward):
        return measure._measure(of, who, HERE, torch.device("cpu"), clock, lambda name: None)  # type: ignore[arg-type]


@pytest.mark.parametrize("pass_", PASSES)
def test_it_is_from_building_the_norm_to_the_result_on_the_gpu(pass_: str, clock: Clock) -> None:
    first, second = measured(case(pass_), [Provider(OURS, slow(clock)), Provider("peer", slow(clock))], clock)
    assert first.ok and second.ok
    # Neither the inputs, nor the copy of dy, nor the comparison, nor what the provider before left to be done.
    expected = BUILD + sum(FORWARD) + (sum(BACKWARD) if pass_ == "backward" else 0)
    assert (first.first_call_s, second.first_call_s) == (expected, expected)


def test_what_is_wrong_has_one_and_what_raises_has_none(clock: Clock) -> None:
    def refuses(_: Case) -> providers.Norm:
        clock.spend(BUILD)
        raise RuntimeError("rows are too wide")

    wrong, refused = measured(case("forward"), [Provider(OURS, slow(clock, 2.0)), Provider("peer", refuses)], clock)
    assert (wrong.ok, wrong.first_call_s) == (False, BUILD + sum(FORWARD))
    assert (refused.failure, refused.first_call_s) == ("RuntimeError: rows are too wide", None)


# --- what is said of them ---


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_parser(parser.add_subparsers())
    return parser.parse_args(["bench", *given])


def record(provider: str, first_call_s: float | None) -> Record:
    return replace(Record.of(case("forward"), provider, HERE), first_call_s=first_call_s)


def test_a_line_for_each_provider_that_has_something_to_compile() -> None:
    by_provider = {OURS: [1.5, None, 0.25], "torch": [0.5], "compile": [9.125, 240.0], "quack": [None]}
    records = [record(provider, seconds) for provider, each in by_provider.items() for seconds in each]
    assert report.first_calls(records) == [
        "first calls: trinorm 1.75 s in 2 cases, at most 1.50 s",
        "first calls: compile 249 s in 2 cases, at most 240 s",
    ]


def test_the_command_says_it_after_all_tables_and_writes_it_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made_up(of: Case, who: list[Provider], *_: object) -> list[Record]:
        return [replace(Record.of(of, provider.name, HERE), first_call_s=0.25) for provider in who]

    monkeypatch.setattr(measure, "measure", made_up)
    monkeypatch.setattr(bench, "provenance", lambda device: HERE)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    console = Console(file=io.StringIO(), width=160)
    args = arguments("--shapes", "8x16,8x32", "--peers", "torch", "--json", str(tmp_path / "lines.jsonl"))
    assert bench._measure(args, bench._plan(args, PASSES, sweeps=True), console) == 0
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.index("RMSNorm backward") < shown.index("first calls: trinorm 2.00 s in 8 cases, at most 0.25 s\n")
    assert shown.count("first calls") == 1
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert [line["first_call_s"] for line in lines] == [0.25] * 16
