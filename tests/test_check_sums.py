"""``trinorm check`` of the norms of a sum: what it draws, and that it can fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from trinorm.cases import DTYPES, NASTY, NORMAL, Case, Inputs, Values
from trinorm.cli import check
from trinorm.norms import SUM_OPS
from trinorm.ops import added
from trinorm.ops.hosts import rows

OPS = [op for op in check.OPS if check.OPS[op].of_sum and not check.OPS[op].of_gated_sum]
CASE = Case((8, 17))


def drawn(op: str, values: Values, dtype: torch.dtype) -> Inputs:
    return Case((9, 33), values).inputs(check.OPS[op], dtype, torch.device("cpu"))


def test_they_are_checked_with_both_kinds_of_stream() -> None:
    assert {*SUM_OPS, "add_layer_norm/post", "add_rms_norm/stream"} == set(OPS)
    dtypes = {op: [t.dtype for t in drawn(op, NORMAL, torch.bfloat16).gradients] for op in OPS}
    assert dtypes["add_rms_norm"] == dtypes["add_layer_norm"] == [torch.bfloat16, torch.bfloat16]
    assert dtypes["add_layer_norm/post"] == [torch.bfloat16]
    assert dtypes["add_rms_norm/stream"] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("values", [NORMAL, *NASTY], ids=lambda values: values.name)
@pytest.mark.parametrize("op", OPS)
def test_powers_of_two_are_the_sums_and_come_out_exactly(op: str, values: Values, dtype: torch.dtype) -> None:
    if not values.fits(dtype):
        return
    norm, inputs = check.OPS[op], drawn(op, values, dtype)
    plain = inputs.unscaled()
    total, unscaled = (norm.normalized(of.of).double() for of in (inputs, plain))
    assert torch.equal((unscaled * inputs.scale).nan_to_num(), total.nan_to_num())
    if inputs.dsum is not None and plain.dsum is not None:
        assert torch.equal(plain.dsum.double(), inputs.dsum.double() * inputs.scale)


def test_nasty_values_reach_the_sum() -> None:
    norm = check.OPS["add_layer_norm"]
    total = {v.name: norm.normalized(drawn("add_layer_norm", v, torch.float32).of).double() for v in NASTY}
    assert (total["mean 1e4, std 1e-2"].mean() - 2e4).abs() < 0.02
    assert (total["rows of one value"].amax(1) == total["rows of one value"].amin(1)).all()
    assert not total["zeros"].any()
    assert total["denormals"].abs().max() <= torch.finfo(torch.float32).tiny
    assert total["one NaN"].isnan().sum() == total["one Inf"].isinf().sum() == 1
    assert (total["1e30"].float().square().mean(1) == float("inf")).all()
    assert (total["1e-30"].float().square() == 0).all()


def wrong(op: str, device: torch.device) -> set[str]:
    """What check_op finds wrong."""
    added.CALLS.clear()
    results = check.check_op(op, torch.float32, device, [CASE])
    assert {result.comparison.what for result in results} >= {"y", "sum", "rstd", "dx", "dr", "dw"}
    return {result.comparison.what for result in results if not result.comparison.ok}


Spoil = Callable[[Any], Any]


def without_dsum(given: rows.AddedBackward) -> rows.AddedBackward:
    return given._replace(dsum=None)


def another_alpha(given: Any) -> Any:
    return given._replace(alpha=given.alpha * (1 + 1e-5))


def spoil(monkeypatch: pytest.MonkeyPatch, function: str, change: Spoil) -> None:
    """Let ``rows.<function>`` have another idea of what is added."""
    honest = getattr(rows, function)
    monkeypatch.setattr(rows, function, lambda *args, **how: honest(*args, **how | dict(added=change(how["added"]))))
    added.CALLS.clear()


@pytest.mark.parametrize(
    ("op", "function", "change", "found"),
    [
        ("add_layer_norm", "forward", another_alpha, {"y", "sum", "mean", "rstd", "dx", "dr", "dw"}),
        ("add_layer_norm", "backward", without_dsum, {"dx", "dr"}),
        ("add_layer_norm/post", "backward", without_dsum, set()),
        ("add_rms_norm/stream", "backward", another_alpha, {"dr"}),
    ],
)
def test_a_wrong_result_is_found(
    op: str, function: str, change: Spoil, found: set[str], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert wrong(op, device) == set()
    spoil(monkeypatch, function, change)
    assert wrong(op, device) == found


@pytest.mark.parametrize("op", SUM_OPS)
def test_a_gradient_of_the_sum_that_is_lost_is_found_numerically(
    op: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, "backward", without_dsum)
    (result,) = check.check_numerically(op, device)
    assert not result.comparison.ok
    assert "Jacobian mismatch" in result.comparison.worst
