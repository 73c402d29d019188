"""``trinorm tune`` of DyT, Derf and PolyNorm: which launches are tried, that what is forced runs, and that what is wrong is
not timed.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import fields
from types import ModuleType
from typing import Any

import pytest
import torch

from trinorm.bench import sweep
from trinorm.bench.cases import PASSES, Case
from trinorm.bench.shapes import ELEMENT_SHAPES
from trinorm.cli.tune import SWEPT
from trinorm.forced import forced
from trinorm.ops.hosts import dynamic_rows, poly_rows
from trinorm.tuning import RowBackward, RowForward, Tile

META = torch.device("meta")
MODULES = {"dynamic_tanh": dynamic_rows, "dynamic_erf": dynamic_rows, "poly_norm": poly_rows}
BOTH = pytest.mark.parametrize(("op", "pass_"), [(op, pass_) for op in MODULES for pass_ in PASSES])


def case(op: str, pass_: str, shape: tuple[int, ...] = (33, 200), dtype: torch.dtype = torch.float32) -> Case:
    return Case(op, pass_, shape, dtype, dtype)


def asked(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> list[tuple[Any, ...]]:
    """What tuning's choice of this name is asked from here on."""
    found: list[tuple[Any, ...]] = []
    choose = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given: (found.append(given), choose(*given))[1])
    return found


@BOTH
def test_what_is_chosen_today_is_what_runs(
    op: str, pass_: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert op in SWEPT
    of, name = case(op, pass_), f"choose_{sweep.choice(op, pass_)}"
    given = asked(monkeypatch, MODULES[op], name)
    sweep.direct(of, of.draw(device))()
    today = sweep.chosen(of, device)
    assert today == getattr(sweep.tuning, name)(*given[-1])
    assert sweep.kinds(op, pass_) == {type(today).__name__: type(today)}
    assert sweep.start(of, type(today), device) == today


@BOTH
@pytest.mark.parametrize("shape", [*ELEMENT_SHAPES, (16384, 2048), (16384, 1152), (16384, 128)])
def test_it_is_among_the_candidates_where_columns_are_many(op: str, pass_: str, shape: tuple[int, ...]) -> None:
    of = case(op, pass_, shape, torch.bfloat16)
    today = sweep.chosen(of, META)
    tried = {field.name for field in fields(today) if [*sweep.variants(today, field.name, of)]}
    assert tried == ({"tile", "stream"} if pass_ == "forward" else {"tile", "stages", "per_sm", "stream"})
    tiles = [*sweep.variants(today, "tile", of)]
    assert today in tiles
    assert len(tiles) == len(set(tiles)) <= 51


@pytest.mark.parametrize("n", [1, 40, 128, 1000, 4096, 100003])
def test_tiles_of_columns_are_no_wider_than_a_row_needs(n: int) -> None:
    found = [*sweep.tiles_of_columns(n)]
    assert all(tile.chunk < 2 * n and tile.chunk <= 2048 for tile in found)
    assert len(found) == len(set(found)) <= 50
    assert len({tile.rows for tile in found}) > 1 or n == 1


LAUNCHES: dict[str, Any] = {
    "forward": RowForward(Tile(2, 256, 2), 1, False, preload=True, early=True),
    "backward": RowBackward(Tile(2, 256, 2), 1, 2, 1, False),
}


@BOTH
def test_a_forced_launch_is_what_runs_and_is_found_right_or_wrong(
    op: str, pass_: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[dict[str, Any]] = []
    module = MODULES[op]
    actual = module.launch
    monkeypatch.setattr(module, "launch", lambda *given: (launched.append(given[-1]), actual(*given))[1])
    check = sweep.Check(case(op, pass_), device)
    launched.clear()
    with forced(**{sweep.choice(op, pass_): LAUNCHES[pass_]}):
        assert check() is None
    tile = LAUNCHES[pass_].tile
    assert (launched[0]["ROWS"], launched[0]["CHUNK"], launched[0]["num_warps"]) == (tile.rows, tile.chunk, tile.warps)
    honest = getattr(module, pass_)

    def doubled(*given: Any) -> Any:
        results = honest(*given)
        (results if pass_ == "forward" else results[-1]).mul_(2)
        return results

    monkeypatch.setattr(module, pass_, doubled)
    assert (check() or "").startswith("y: error" if pass_ == "forward" else "db: error")


def test_numbers_are_tensors_of_their_own(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As compiled ahead of the launch: aligned, and with nothing beside the kernels of the call to be timed."""
    of = case("dynamic_erf", "backward")
    inputs = of.draw(device)
    given = asked(monkeypatch, dynamic_rows, "launch")
    sweep.direct(of, inputs)()
    (alpha, shift), tensors = inputs.numbers, given[0][3]
    assert any(t is alpha for t in tensors)
    assert any(t is shift for t in tensors)


@pytest.mark.parametrize("op", ["dynamic_tanh", "poly_norm"])
def test_compiling_tells_what_spills_and_what_cannot_be_compiled(op: str, compiling: Executor) -> None:
    of = case(op, "backward", (8192, 4096), torch.bfloat16)
    today = sweep.chosen(of, META)
    good = compiling.submit(sweep.compiled, of, today, "sm_90").result()
    assert (good.outcome, good.launch, good.spills) == ("compiled", today, 0)
    broken = RowBackward(Tile(1, 1000, 4), 1, 1, 1, False)
    assert compiling.submit(sweep.compiled, of, broken, "sm_90").result().outcome == "failed"
