"""``trinorm check`` of the channel norms: what it draws, and that it can fail."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch

from trinorm.cases import DTYPES, GPU, INTERPRETED, NASTY, Case, layouts
from trinorm.cli import check
from trinorm.norms import NORMS, VARIANTS, Arguments, num_groups
from trinorm.ops import CALLS, channel
from trinorm.ops.hosts import channel_layers, channels

CHANNELS = [name for name, norm in NORMS.items() if norm.family == "channels"]
ROWS = {"group_norm": (4, 45), "instance_norm": (12, 15), "batch_norm": (6, 30), "channel_layer_norm": (30, 6)}
SHAPE = (2, 6, 3, 5)


@pytest.mark.parametrize("op", CHANNELS)
def test_rows_are_what_shares_statistics(op: str) -> None:
    norm = NORMS[op]
    for layout in layouts(SHAPE):
        inputs = Case(SHAPE, layout=layout).inputs(norm, torch.float64, torch.device("cpu"))
        x = inputs.of.x
        assert x.shape == SHAPE
        assert x.is_contiguous() == (layout == "contiguous")
        assert x.stride()[1] == (15 if layout == "contiguous" else 1)
        rows = norm.rows(x)
        assert rows.shape == ROWS[op]
        assert torch.equal(norm.of_rows(rows, SHAPE), x)
        torch.testing.assert_close(norm.oracle(inputs.of).mean, rows.mean(1), rtol=1e-12, atol=1e-15)
        for found, by_torch in zip(norm.oracle(inputs.of)[1:], norm.torch_statistics(x, inputs.of.eps), strict=True):
            torch.testing.assert_close(found, by_torch, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("values", [values for values in NASTY if values.scaled], ids=lambda values: values.name)
@pytest.mark.parametrize("op", CHANNELS)
def test_powers_of_two_are_those_of_the_rows(op: str, values: Any) -> None:
    norm = NORMS[op]
    inputs = Case(SHAPE, values, layout="channels_last").inputs(norm, torch.float32, torch.device("cpu"))
    scale = norm.rows(inputs.scale)
    assert torch.equal(scale.amin(1), scale.amax(1))
    assert set(scale[:, 0].log2().tolist()) == set(values.exponents)
    assert torch.equal(inputs.unscaled().of.x.double() * inputs.scale, inputs.of.x.double())


def test_groups_are_32_or_what_divides() -> None:
    assert [num_groups(channels) for channels in (320, 32, 12, 6, 7)] == [32, 32, 4, 2, 1]


def test_the_interpreters_cases_meet_every_layout_dtype_and_nasty_value() -> None:
    met = {(case.values.name, case.layout) for dtype in DTYPES.values() for case in INTERPRETED.channels.cases(dtype)}
    mixed = NASTY[-1].name  # 1e30 and 1e-30 are met, each alone
    assert {name for name, _ in met} == {"normal", *(values.name for values in NASTY)} - {mixed}
    assert {layout for _, layout in met} == {"contiguous", "channels_last"}
    of_half = {case.weight for case in INTERPRETED.channels.cases(torch.float16)}
    assert "float32" in of_half
    on_gpu = [(case.values.name, case.layout) for case in GPU.channels.cases(torch.float32)]
    assert len({pair for pair in on_gpu if pair[0] != "normal"}) == 2 * len(NASTY)


def wrong(op: str, device: torch.device) -> set[str]:
    CALLS.clear()
    channel.CALLS.clear()
    (*results,) = check.check_op(op, torch.float32, device, [Case((3, 6, 3, 5))])
    return {result.comparison.what for result in results if not result.comparison.ok}


@pytest.mark.parametrize(("function", "index", "found"), [("forward", 2, {"rstd", "dx", "dw"}), ("backward", 1, {"dw"})])
@pytest.mark.parametrize(("op", "family"), [("group_norm", channels), ("channel_layer_norm", channel_layers)])
def test_a_wrong_result_is_found(
    op: str,
    family: ModuleType,
    function: str,
    index: int,
    found: set[str],
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert wrong(op, device) == set()
    honest = getattr(family, function)

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        results = honest(*args, **kwargs)
        results[index].mul_(1 + 1e-4)
        return results

    monkeypatch.setattr(family, function, spoiled)
    assert wrong(op, device) == found


@pytest.mark.parametrize("op", ["instance_norm/kept", "batch_norm/kept"])
def test_running_statistics_that_are_not_kept_up_are_found(
    op: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert wrong(op, device) == set()
    norm = VARIANTS[op]
    monkeypatch.setattr("trinorm.functional.channels.Averages", lambda mean, var, momentum: None)
    assert wrong(op, device) == {"run_mean", "run_var"}
    assert norm.running(torch.empty(2, 3, 4)) is not None


def test_a_relu_at_its_bend_counts_in_no_gradient() -> None:
    norm = VARIANTS["batch_norm/kept"]
    x = torch.tensor([[-1.0], [0.0], [1.0]])
    of = Arguments(x, None, None, 1e-5)
    assert norm.settled(of, torch.ones(3, 1)).flatten().tolist() == [1, 0, 1]
    assert math.isfinite(norm.oracle(of).rstd.item())
