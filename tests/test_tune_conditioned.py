"""``trinorm tune`` of conditioned norms: which launches are tried, that what is forced runs, and that what is wrong is
not timed.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch

from trinorm.bench import sweep
from trinorm.bench.cases import OPS, PASSES, Case
from trinorm.bench.shapes import CONDITIONED_SHAPES
from trinorm.cli.tune import SWEPT
from trinorm.forced import forced
from trinorm.ops.hosts import conditioned_rows, gated_sum_rows
from trinorm.tuning import RowBackward, RowBackwardWide, RowForward, RowForwardWide, Tile

META = torch.device("meta")
# Those of rows that no program holds.
WIDE = {"forward": RowForwardWide, "backward": RowBackwardWide}
SMALL = (3, 11, 72)


def case(op: str, pass_: str, shape: tuple[int, ...] = SMALL, dtype: torch.dtype = torch.float32) -> Case:
    return Case(op, pass_, shape, dtype, dtype)


def asked(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[Any, ...]]:
    """What tuning's choice of this name is asked from here on."""
    found: list[tuple[Any, ...]] = []
    host = conditioned_rows if "conditioned" in name else gated_sum_rows
    choose = getattr(host, name)
    monkeypatch.setattr(host, name, lambda *given: (found.append(given), choose(*given))[1])
    return found


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("op", CONDITIONED_SHAPES)
def test_what_is_chosen_today_is_what_runs_and_among_the_candidates(
    op: str, pass_: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert op in SWEPT
    of = case(op, pass_)
    name = f"choose_{sweep.choice(op, pass_)}"
    given = asked(monkeypatch, name)
    sweep.direct(of, of.draw(device))()
    choose = getattr(sweep.tuning, name)
    today = sweep.chosen(of, device)
    assert today == choose(*given[-1])
    kinds = (type(today),) if OPS[op].norm.of_gated_sum else (type(today), WIDE[pass_])
    assert sweep.kinds(op, pass_) == {kind.__name__: kind for kind in kinds}
    assert sweep.start(of, type(today), device) == today
    assert all(isinstance(sweep.start(of, kind, device), kind) for kind in kinds)
    large = case(op, pass_, CONDITIONED_SHAPES[op][0], torch.bfloat16)
    today = sweep.chosen(large, META)
    tried = {field.name for field in fields(today) if [*sweep.variants(today, field.name, large)]}
    assert tried == ({"tile", "stream"} if pass_ == "forward" else {"tile", "stages", "per_sm", "stream"})
    assert today in [*sweep.variants(today, "tile", large)] or today.tile.rows > 1


LAUNCHES: dict[str, Any] = {
    "forward": RowForward(Tile(2, 128, 1), 1, False, preload=True, early=True),
    "backward": RowBackward(Tile(2, 128, 2), 1, 1, 1, False),
}


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("op", ["modulated_layer_norm", "add_modulated_layer_norm", "gated_rms_norm/first"])
def test_a_forced_launch_is_what_runs_and_is_found_right_or_wrong(
    op: str, pass_: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[dict[str, Any]] = []
    host = gated_sum_rows if OPS[op].norm.of_gated_sum else conditioned_rows
    actual = host.launch
    monkeypatch.setattr(host, "launch", lambda *given: (launched.append(given[-1]), actual(*given))[1])
    check = sweep.Check(case(op, pass_), device)
    launched.clear()
    with forced(**{sweep.choice(op, pass_): LAUNCHES[pass_]}):
        assert check() is None
    tile = LAUNCHES[pass_].tile
    assert (launched[0]["ROWS"], launched[0]["CHUNK"], launched[0]["num_warps"]) == (tile.rows, tile.chunk, tile.warps)
    assert conditioned_rows.choose_conditioned_forward is sweep.tuning.choose_conditioned_forward
    honest = getattr(host, pass_)

    def doubled(*given: Any, **how: Any) -> Any:
        results = honest(*given, **how)
        results[0].mul_(2)
        return results

    monkeypatch.setattr(host, pass_, doubled)
    assert (check() or "").startswith("y: error" if pass_ == "forward" else "dx: error")


def test_it_is_checked_on_rows_enough_of_each_shape() -> None:
    for op, shapes in CONDITIONED_SHAPES.items():
        for shape in shapes:
            few = sweep._few(case(op, "backward", shape))
            assert OPS[op].norm.takes(few)
            assert few[1:] == shape[1:]
