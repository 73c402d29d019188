"""``trinorm tune``: which launches are tried, which of them are run, and how they are ranked."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from rich.console import Console

from trinorm.bench import sweep, timing
from trinorm.bench.cases import PASSES, Case
from trinorm.bench.records import Provenance
from trinorm.bench.shapes import NAMED_SHAPES
from trinorm.bench.sweep import Launch, Trial
from trinorm.cli import main, tune
from trinorm.forced import forced
from trinorm.norms import ROW_OPS
from trinorm.ops.hosts import rows
from trinorm.tuning import RowBackward, RowBackwardFew, RowForward, RowForwardWide, Tile

ON_GPU = torch.cuda.is_available()
HERE = Provenance(gpu="Made-up GPU 9", torch="0.0", triton="0.0", commit=None, date="2000-01-01")
META = torch.device("meta")
FORWARD = RowForward(Tile(2, 128, 4), tiles=1, stream=False, preload=False, early=True)


def case(pass_: str = "forward", m: int = 5, n: int = 300, op: str = "layer_norm") -> Case:
    return Case(op, pass_, (m, n), torch.float32, torch.float32)


# --- which launches are tried ---


def test_every_field_of_every_launch_is_swept() -> None:
    kinds = [kind for op in tune.SWEPT for pass_ in PASSES for kind in sweep.kinds(op, pass_).values()]
    names = {field.name for kind in kinds for field in fields(kind)}
    assert names == {"tile", "sums", *sweep._VALUES}


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("op", ROW_OPS)
@pytest.mark.parametrize("shape", NAMED_SHAPES["matrix"]["rms_norm"])
def test_what_is_chosen_today_is_among_the_candidates(op: str, pass_: str, shape: tuple[int, int]) -> None:
    of = case(pass_, *shape, op)
    today = sweep.chosen(of, META)
    for field in fields(today):
        found = list(sweep.variants(today, field.name, of))
        assert len(found) == len(set(found)) > 1
        assert today in found or field.name == "sums"
        assert all(replace(launch, **{field.name: getattr(today, field.name)}) for launch in found)


@pytest.mark.parametrize("n", [1, 64, 100, 768, 4096, 5120, 16384, 262144])
@pytest.mark.parametrize("held", [True, False])
def test_tiles_are_a_few_dozen_at_most_and_no_wider_than_a_row_needs(n: int, held: bool) -> None:
    found = list(sweep.tiles(n, held))
    assert len(found) == len(set(found)) < 50
    for tile in found:
        assert tile.chunk < 2 * max(n, 1)
        assert tile.rows == 1 or (held and tile.rows * n <= 16384)
    if held and n == 262144:
        assert not found, "no program holds such a row"
    elif n >= (64 if held else 128):
        assert found


def test_both_tiles_of_a_launch_keep_the_same_warps() -> None:
    few = RowBackwardFew(Tile(2, 1024, 4), sums=Tile(32, 32, 4))
    for field in ("tile", "sums"):
        found = list(sweep.variants(few, field, case("backward", 64, 768)))
        assert {launch.tile.warps for launch in found} >= {4}
        assert all(launch.tile.warps == launch.sums.warps for launch in found)


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("n", [64, 4096, 65536])
def test_a_sweep_of_any_kind_has_a_launch_to_begin_with(pass_: str, n: int) -> None:
    for kind in sweep.kinds("layer_norm", pass_).values():
        assert type(sweep.start(case(pass_, 8192, n), kind, META)) is kind


# --- the search ---


def made_up(time: Callable[[Any], float], tried: list[Launch]) -> Callable[[list[Launch]], Iterator[Trial]]:
    """An evaluation by formula; launches of 32 warps spill."""

    def evaluate(launches: list[Launch]) -> Iterator[Trial]:
        tried.extend(launches)
        for launch in launches:
            if launch.tile.warps == 32:
                yield Trial(launch, "spills", spills=8)
            else:
                yield Trial(launch, "timed", device_us=time(launch))

    return evaluate


def test_the_search_finds_the_fastest_and_tries_nothing_twice() -> None:
    def time(launch: RowBackward) -> float:
        tile = launch.tile
        distance = abs(tile.rows - 2) + abs(tile.chunk - 1024) / 512 + abs(tile.warps - 8)
        return 10 + distance + abs(launch.stages - 3) + abs(launch.per_sm - 2) + launch.stream

    today = RowBackward(Tile(1, 2048, 4), tiles=1, stages=1, per_sm=1, stream=True)
    tried: list[Launch] = []
    trials = sweep.search(today, today, case("backward", 8192, 4096), made_up(time, tried))
    assert trials[0].launch == RowBackward(Tile(2, 1024, 8), tiles=1, stages=3, per_sm=2, stream=False)
    assert trials[0].device_us == 10
    assert len(tried) == len(set(tried)) == len(trials) < 100
    assert today in tried
    times = [trial.device_us for trial in trials if trial.device_us is not None]
    assert times == sorted(times)
    assert trials[len(times) :]
    assert all(trial.outcome == "spills" for trial in trials[len(times) :])


def test_todays_launch_of_another_kind_is_timed_and_not_varied() -> None:
    today, begin = (
        RowForwardWide(Tile(1, 4096, 16)),
        RowForward(Tile(1, 4096, 16), tiles=1, stream=True, preload=False, early=True),
    )
    tried: list[Launch] = []
    trials = sweep.search(begin, today, case(n=16384), made_up(lambda launch: 1.0 if launch == today else 2.0, tried))
    assert trials[0].launch == today
    assert [type(launch) for launch in tried].count(RowForwardWide) == 1
    assert {launch.preload for launch in tried if isinstance(launch, RowForward)} == {False, True}


# --- one launch: compiled, checked, timed ---


def test_compiling_tells_what_spills_and_what_cannot_be_compiled() -> None:
    """In a process of its own: one that interprets does not compile."""
    script = """if True:
        import json, torch
        from trinorm.bench.cases import Case
        from trinorm.bench.sweep import compiled
        from trinorm.tuning import RowForward, Tile
        case = Case("layer_norm", "forward", (8192, 4096), torch.bfloat16, torch.bfloat16)
        tiles = [Tile(1, 1024, 8), Tile(8, 4096, 4), Tile(1, 1000, 8)]
        launches = [RowForward(tile, tiles=1, stream=True, preload=False, early=True) for tile in tiles]
        found = [compiled(case, launch, "sm_90") for launch in launches]
        print(json.dumps([(trial.outcome, trial.registers, trial.spills, trial.why) for trial in found]))
    """
    environment = {"PYTHONPATH": ":".join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    good, spilling, broken = json.loads(ran.stdout)
    assert (good[0], good[2], good[3]) == ("compiled", 0, None)
    assert 16 < good[1] < 128
    assert spilling[0] == "compiled"
    assert spilling[2] > 0
    assert broken[:3] == ["failed", None, None]
    assert broken[3], "says why"


@pytest.mark.parametrize("pass_", PASSES)
def test_a_forced_launch_is_what_runs_and_is_found_right(
    pass_: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[dict[str, Any]] = []
    actual = rows.launch

    def launch(*arguments: Any) -> None:
        launched.append(arguments[-1])
        actual(*arguments)

    monkeypatch.setattr(rows, "launch", launch)
    forced_launch = (
        FORWARD if pass_ == "forward" else RowBackward(Tile(2, 128, 4), tiles=1, stages=2, per_sm=1, stream=False)
    )
    check = sweep.Check(case(pass_), device)
    launched.clear()
    with forced(**{pass_: forced_launch}):
        assert check() is None
    assert (launched[0]["ROWS"], launched[0]["CHUNK"], launched[0]["num_warps"]) == (2, 128, 4)
    launched.clear()
    assert check() is None
    assert launched[0]["CHUNK"] != 128, "outside, tuning chooses again"


@pytest.mark.parametrize("pass_", PASSES)
def test_a_wrong_result_is_found(pass_: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    check = sweep.Check(case(pass_, op="rms_norm"), device)
    actual = getattr(rows, pass_)

    def doubled(*arguments: Any, **options: Any) -> Any:
        first, *others = actual(*arguments, **options)
        return rows.Normalized(2 * first, *others) if pass_ == "forward" else (2 * first, *others)

    monkeypatch.setattr(rows, pass_, doubled)
    wrong = sweep.Check(case(pass_, op="rms_norm"), device)()
    assert wrong is not None
    assert wrong.startswith("y: error" if pass_ == "forward" else "dx: error")
    assert check() is not None


class _Pool:
    """Compiles nothing: launches of 8 warps spill, those of 16 cannot be compiled."""

    def map(self, _: object, launches: list[Launch]) -> Iterator[Trial]:
        for launch in launches:
            outcome = "failed" if launch.tile.warps == 16 else "compiled"
            yield Trial(launch, outcome, registers=40, spills=64 if launch.tile.warps == 8 else 0)


def test_only_what_compiles_does_not_spill_and_is_right_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def device_time(calls: list[timing.Call], stream: object, norms: int = 1) -> timing.DeviceTime:
        return timing.DeviceTime(mean=3.5, std=0.25, median=3.0, replays=7)

    wrong, beyond = Tile(1, 64, 4), Tile(1, 128, 4)

    def check(self: sweep.Check) -> str | None:
        tile = rows.choose_forward(None, 0, 0, 0, None).tile  # type: ignore[arg-type]
        if tile == beyond:
            raise RuntimeError("out of resource: shared memory\nand so on")
        return "y: error 1" if tile == wrong else None

    monkeypatch.setattr(sweep, "device_time", device_time)
    monkeypatch.setattr(sweep.Check, "__call__", check)
    properties = type("Properties", (), {"L2_cache_size": 4096})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    with torch.no_grad():
        cpu, pool = torch.device("cpu"), _Pool()
        if ON_GPU:
            cpu = torch.device("cuda", torch.cuda.current_device())
        today = replace(FORWARD, tile=Tile(1, 512, 8))
        bench = sweep.Bench(case(), today, cpu, None, pool, "sm_90")  # type: ignore[arg-type]
        others = [replace(FORWARD, tile=Tile(1, 512, warps)) for warps in (2, 16)]
        others += [replace(today, stream=True), replace(FORWARD, tile=wrong), replace(FORWARD, tile=beyond)]
        trials = list(bench.evaluate([today, *others]))
    assert bench.ceiling_us == 3.0
    assert [(trial.outcome, trial.device_us, trial.why) for trial in trials] == [
        ("timed", 3.0, None),  # today's, though it spills
        ("timed", 3.0, None),
        ("failed", None, None),
        ("spills", None, None),
        ("wrong", None, "y: error 1"),
        ("failed", None, "RuntimeError: out of resource: shared memory"),
    ]
    assert {trial.registers for trial in trials} == {40}


# --- what is left of a sweep ---


def test_a_json_line_says_what_was_launched_and_how_fast() -> None:
    trial = Trial(FORWARD, "timed", device_us=4.0, device_us_std=0.5, registers=40, spills=0)
    read = json.loads(trial.to_json(case(m=128, n=768), 3.0, FORWARD, HERE))
    assert (read["op"], read["pass"], read["shape"], read["dtype"]) == ("layer_norm", "forward", [128, 768], "float32")
    assert (read["kind"], read["today"]) == ("RowForward", True)
    assert read["launch"] == {
        "tile": {"rows": 2, "chunk": 128, "warps": 4},
        "tiles": 1,
        "stream": False,
        "preload": False,
        "early": True,
        "pairwise": False,
        "many": 0,
    }
    assert (read["device_us"], read["ceiling_us"], read["ceiling_ratio"]) == (4.0, 3.0, 0.75)
    assert read["gpu"] == "Made-up GPU 9"
    untimed = json.loads(Trial(FORWARD, "spills").to_json(case(), 3.0, None, HERE))
    assert (untimed["today"], untimed["ceiling_ratio"]) == (False, None)


def test_the_table_shows_the_fastest_and_todays() -> None:
    today = replace(FORWARD, tile=Tile(1, 64, 1))
    launches = [replace(FORWARD, tile=Tile(1, 64 << i, 4)) for i in range(7)]
    trials = [Trial(launch, "timed", 4.0 + i, 0.5, 40, 0) for i, launch in enumerate(launches)]
    trials += [Trial(today, "timed", 12.0, 0.5, 32, 0), Trial(FORWARD, "spills", spills=8)]
    console = Console(width=180)
    with console.capture() as shown:
        console.print(tune.table(case(m=128, n=768), trials, 3.0, today))
    lines = [line.strip() for line in shown.get().splitlines() if "RowForward" in line]
    assert len(lines) == 6
    assert lines[0].startswith(repr(launches[0]))
    assert lines[0].split()[-6:] == ["4.00", "±", "0.50", "0.750", "40", "0"]
    assert lines[5].startswith(f"today: {today}")
    assert "8 timed, 1 spills" in shown.get()


# --- the command ---


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", "rms_norm", "--shapes", "128x768"]) == 2
    assert "takes a GPU" in capsys.readouterr().err


@pytest.mark.skipif(not ON_GPU, reason="launches are only ever timed on a GPU")
def test_a_small_real_sweep(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "sweep.jsonl"
    assert main(["tune", "rms_norm", "--shapes", "64x8192", "--json", str(written)]) == 0
    output = capsys.readouterr().out
    assert "today: RowForward(" in output
    trials = [json.loads(line) for line in written.read_text().splitlines()]
    timed = [trial for trial in trials if trial["outcome"] == "timed"]
    assert len(timed) > 5
    assert [trial["outcome"] for trial in trials if trial["today"]] == ["timed"]
    assert not [trial for trial in trials if trial["outcome"] == "wrong"]
    assert all(0.5 < trial["device_us"] < 1000 for trial in timed)
