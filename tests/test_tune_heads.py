"""``trinorm tune`` of QK-norm: which launches are tried, that what is forced runs, and that what is wrong is not timed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from machine import ON_GPU
from trinorm.bench import sweep
from trinorm.bench.cases import PASSES, Case
from trinorm.bench.records import Provenance
from trinorm.bench.shapes import HEAD_SHAPES
from trinorm.bench.sweep import Launch, Trial
from trinorm.cli import main
from trinorm.forced import forced
from trinorm.norms import OfHeads
from trinorm.ops.hosts import heads, rows
from trinorm.tuning import Heads, Tile

META = torch.device("meta")
HERE = Provenance(gpu="Made-up GPU 9", torch="0.0", triton="0.0", commit=None, date="2000-01-01")
SMALL = (2, 11, 6, 2, 20)


def case(pass_: str = "forward", shape: tuple[int, ...] = SMALL, dtype: torch.dtype = torch.float32) -> Case:
    return Case("qk_norm", pass_, shape, dtype, dtype)


# --- which launches are tried ---


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("shape", [*HEAD_SHAPES, (4096, 32, 8, 64), (4096, 8, 8, 32), (512, 8, 8, 1000)])
def test_what_is_chosen_today_is_among_the_candidates(pass_: str, shape: tuple[int, ...]) -> None:
    of = case(pass_, shape, torch.bfloat16)
    today = sweep.chosen(of, META)
    assert type(today) is Heads
    assert sweep.kinds("qk_norm", pass_) == {"Heads": Heads}
    assert sweep.start(of, Heads, META) == today
    for field in fields(today):
        found = list(sweep.variants(today, field.name, of))
        assert len(found) == len(set(found)) < 50
        if pass_ == "forward" and field.name in ("stages", "per_sm"):
            assert not found, "forward no program walks"
        else:
            assert len(found) > 1
            assert today in found


@pytest.mark.parametrize("n", [20, 32, 64, 80, 128, 256, 1000, 1024])
def test_every_tile_has_a_whole_head(n: int) -> None:
    found = list(sweep.tiles_of_heads(n))
    assert found
    assert all(n <= tile.chunk < 2 * n for tile in found)
    assert len({tile.rows for tile in found}) > 1


def test_programs_of_fewer_warps_are_more_of_them() -> None:
    of = case("backward", HEAD_SHAPES[0], torch.bfloat16)
    today = sweep.chosen(of, META)
    for launch in sweep.variants(today, "tile", of):
        assert launch.per_sm * launch.tile.warps in (today.per_sm * today.tile.warps, launch.tile.warps)
    assert max(launch.per_sm for launch in sweep.variants(today, "per_sm", of)) == 16


def test_the_search_finds_the_fastest() -> None:
    def evaluate(launches: list[Launch]) -> Iterator[Trial]:
        for launch in launches:
            tile = launch.tile
            away = abs(tile.rows - 16) / 2 + abs(tile.warps - 8) + abs(launch.heads - 2)
            yield Trial(launch, "timed", device_us=10.0 + away + abs(launch.stages - 2) + abs(launch.per_sm - 3))

    of = case("backward", HEAD_SHAPES[0], torch.bfloat16)
    today = sweep.chosen(of, META)
    trials = sweep.search(today, today, of, evaluate)
    assert trials[0].launch == Heads(Tile(16, 128, 8), 2, stages=2, per_sm=3)
    assert today in [trial.launch for trial in trials]
    assert len(trials) < 150


# --- one launch: compiled, run, checked ---


LAUNCHES = (Heads(Tile(2, 32, 1), 1), Heads(Tile(8, 32, 2), 2, 2, 1), Heads(Tile(4, 32, 1), 16, 1, 2))


@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
@pytest.mark.parametrize("pass_", PASSES)
def test_a_forced_launch_is_what_runs_and_is_found_right(
    pass_: str, launch: Heads, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[dict[str, Any]] = []
    actual = heads.launch
    monkeypatch.setattr(heads, "launch", lambda *given: (launched.append(given[-1]), actual(*given))[1])
    check = sweep.Check(case(pass_), device)
    launched.clear()
    with forced(**{f"heads_{pass_}": launch}):
        assert check() is None
    (options,) = launched
    assert (options["ROWS"], options["CHUNK"], options["num_warps"]) == (launch.tile.rows, 32, launch.tile.warps)
    assert (options["Q_OF"], options["K_OF"]) == ((6, launch.together(6)), (2, launch.together(2)))
    launched.clear()
    assert check() is None
    assert launched[0]["num_warps"] == 4, "outside, tuning chooses again"
    assert rows.choose_forward is sweep.tuning.choose_forward


@pytest.mark.parametrize(
    ("pass_", "index", "found"),
    [("forward", 0, "query"), ("forward", 1, "key"), ("backward", 0, "dquery"), ("backward", 3, "dw_k")],
)
def test_a_wrong_result_is_found(
    pass_: str, index: int, found: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = sweep.Check(case(pass_), device)
    assert check() is None
    actual = getattr(heads, pass_)

    def doubled(*given: Any, **how: Any) -> Any:
        results = actual(*given, **how)
        results[index].mul_(2)
        return results

    monkeypatch.setattr(heads, pass_, doubled)
    assert (check() or "").startswith(f"{found}: error")


def test_it_is_checked_on_tokens_enough_that_programs_walk() -> None:
    assert sweep._few(case()) == (22, 6, 2, 20)
    for shape in HEAD_SHAPES[:3]:
        tokens, queries, keys, n = sweep._few(case("backward", shape))
        assert (queries, keys, n) == shape[2:]
        assert tokens * (queries + keys) * n <= 1 << 24
        today = sweep.chosen(case("backward", shape), META)
        assert today.turns(tokens, queries) > today.per_sm * 132


@pytest.mark.parametrize("pass_", PASSES)
def test_compiling_tells_what_spills_and_what_cannot_be_compiled(pass_: str, compiling: Executor) -> None:
    of = case(pass_, HEAD_SHAPES[0], torch.bfloat16)
    today = sweep.chosen(of, META)
    good, crowded, broken = (
        compiling.submit(sweep.compiled, of, launch, "sm_90").result()
        for launch in (
            today,
            replace(today, tile=Tile(64, 128, 4), heads=4),
            replace(today, tile=Tile(8, 100, 4)),
        )
    )
    assert (good.outcome, good.launch) == ("compiled", today)
    assert 40 < good.registers <= 128
    assert crowded.spills > 0
    assert broken.outcome == "failed"
    assert broken.why, "says why"


def test_a_json_line_says_what_was_launched() -> None:
    trial = Trial(LAUNCHES[1], "timed", device_us=4.0, device_us_std=0.5, registers=40, spills=0)
    read = json.loads(trial.to_json(case(), 3.0, LAUNCHES[1], HERE))
    assert (read["op"], read["shape"], read["kind"], read["today"]) == ("qk_norm", [*SMALL], "Heads", True)
    assert read["launch"] == {"tile": {"rows": 8, "chunk": 32, "warps": 2}, "heads": 2, "stages": 2, "per_sm": 1}


def test_each_op_has_its_own_choice() -> None:
    assert sweep.choice("qk_norm", "forward") == "heads_forward"
    assert sweep.choice("rms_norm", "backward") == "backward"
    assert isinstance(sweep.OPS["qk_norm"].norm, OfHeads)


def test_a_shape_of_rows_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("trinorm.cli.tune.INTERPRETED", False)
    assert main(["tune", "qk_norm", "--shapes", "128x768"]) == 2
    assert "qk_norm takes no 128x768, but (batch x) tokens x query heads" in capsys.readouterr().err


@pytest.mark.skipif(not ON_GPU, reason="launches are only ever timed on a GPU")
@pytest.mark.parametrize("pass_", PASSES)
def test_a_small_real_sweep(pass_: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "sweep.jsonl"
    assert main(["tune", "qk_norm", "--shapes", "256x8x2x64", "--pass", pass_, "--json", str(written)]) == 0
    assert "today: Heads(" in capsys.readouterr().out
    trials = [json.loads(line) for line in written.read_text().splitlines()]
    assert sum(trial["outcome"] == "timed" for trial in trials) > 5
    assert not [trial for trial in trials if trial["outcome"] == "wrong"]
