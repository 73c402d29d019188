"""``trinorm tune`` of norms with a quantized result: which launches are tried, that what is forced runs, and that what is
wrong is not timed.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch

from trinorm.bench import sweep
from trinorm.bench.cases import Case
from trinorm.cli import main
from trinorm.cli.tune import SWEPT
from trinorm.forced import forced
from trinorm.functional.quantized import Quantized
from trinorm.norms import QUANTIZED_OPS
from trinorm.ops.hosts import quantized_rows
from trinorm.tuning import RowForward, Tile, choose_quantized

META = torch.device("meta")
LAUNCH = RowForward(Tile(2, 256, 1), 1, False, preload=True, early=True)


def case(op: str, dtype: torch.dtype = torch.bfloat16, shape: tuple[int, ...] = (6, 256)) -> Case:
    return Case(op, "forward", shape, dtype, dtype)


@pytest.mark.parametrize("op", QUANTIZED_OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_is_chosen_today_is_what_runs_and_among_the_candidates(
    op: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert op in SWEPT
    of = case(op, dtype)
    given: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        quantized_rows, "choose_quantized", lambda *asked: (given.append(asked), choose_quantized(*asked))[1]
    )
    assert isinstance(sweep.direct(of, of.draw(device))(), Quantized)
    today = sweep.chosen(of, device)
    assert today == choose_quantized(*given[-1])
    assert sweep.kinds(op, "forward") == {"RowForward": RowForward}
    large = case(op, shape=(8192, 4096))
    today = sweep.chosen(large, META)
    assert {field.name for field in fields(today) if [*sweep.variants(today, field.name, large)]} == {"tile", "stream"}
    assert today in [*sweep.variants(today, "tile", large)]


@pytest.mark.parametrize("op", ["quantized_rms_norm/nvfp4", "quantized_layer_norm"])
def test_a_forced_launch_is_what_runs_and_is_found_right_or_wrong(
    op: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[dict[str, Any]] = []
    actual = quantized_rows.launch
    monkeypatch.setattr(quantized_rows, "launch", lambda *given: (launched.append(given[-1]), actual(*given))[1])
    check = sweep.Check(case(op), device)
    launched.clear()
    with forced(quantized=LAUNCH):
        assert check() is None
    assert (launched[0]["ROWS"], launched[0]["CHUNK"], launched[0]["num_warps"]) == (2, 256, 1)
    assert quantized_rows.choose_quantized is choose_quantized
    honest = quantized_rows.forward

    def emptied(*given: Any) -> Any:
        data, *others = honest(*given)
        assert data is not None
        return data.zero_(), *others

    monkeypatch.setattr(quantized_rows, "forward", emptied)
    assert (check() or "").startswith("y: error")


def test_a_backward_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("trinorm.cli.tune.INTERPRETED", False)
    assert main(["tune", "quantized_rms_norm", "--shapes", "8x64", "--pass", "backward"]) == 2
    assert "--pass backward: a quantized result's forward is measured alone" in capsys.readouterr().err
