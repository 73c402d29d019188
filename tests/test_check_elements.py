"""``trinorm check`` of DyT, Derf, PolyNorm and weight norm: what it draws, what it reports, and that it can fail."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from trinorm.cases import DTYPES, GPU, INTERPRETED, NASTY, QUICK, Case, Inputs
from trinorm.cli import check
from trinorm.norms import ELEMENT_OPS
from trinorm.ops import inputs_only
from trinorm.ops.hosts import dynamic_rows, poly_rows, weight_rows

CASE = Case((9, 24))
EVERYTHING = {
    "dynamic_tanh": {"y", "dx", "dalpha", "dw", "db"},
    "dynamic_erf": {"y", "dx", "dalpha", "dshift", "dw", "db"},
    "poly_norm": {"y", "dx", "dw", "db"},
    "weight_norm": {"y", "dx", "dw"},
}


def drawn(op: str, dtype: torch.dtype = torch.float64) -> Inputs:
    return CASE.inputs(check.OPS[op], dtype, torch.device("cpu"))


def test_each_is_checked() -> None:
    assert set(ELEMENT_OPS) == {*EVERYTHING} == {op for op in check.OPS if check.OPS[op].family == "elements"}


def test_numbers_and_the_parameters_of_a_polynomial_are_few() -> None:
    def shapes(op: str) -> list[tuple[int, ...]]:
        of = drawn(op).of
        return [tuple(t.shape) for t in (of.residual, of.weight, of.bias) if t is not None]

    assert shapes("dynamic_tanh") == [(1,), (24,), (24,)]
    assert shapes("dynamic_erf") == [(2,), (24,), (24,)]
    assert shapes("poly_norm") == [(3,), (1,)]
    assert shapes("weight_norm") == [(9, 1)]


@pytest.mark.parametrize("sizes", [QUICK, INTERPRETED, GPU], ids=["quick", "interpreted", "gpu"])
def test_its_cases_meet_every_kind_of_value(sizes: Any) -> None:
    """But for rows of a scale of their own, which a function of an element alone does not follow."""
    met: dict[str, set[str]] = {op: set() for op in ELEMENT_OPS}
    for op in ELEMENT_OPS:
        for dtype in DTYPES.values():
            for case in sizes.elements.cases(dtype):
                if check.OPS[op].takes(case.shape) and (check.OPS[op].follows_scale or not case.values.scaled):
                    met[op].add(case.values.name)
    mixed = {NASTY[-1].name} if sizes is QUICK else set()  # 1e30 and 1e-30 are met, each alone
    for op in ("poly_norm", "weight_norm"):
        assert met[op] >= {values.name for values in NASTY} - mixed
    for op in ("dynamic_tanh", "dynamic_erf"):
        assert met[op] >= {values.name for values in NASTY if not values.scaled}


def wrong(op: str, device: torch.device) -> set[str]:
    """What check_op finds wrong."""
    inputs_only.CALLS.clear()
    results = check.check_op(op, torch.float32, device, [CASE])
    assert {result.comparison.what for result in results} == EVERYTHING[op]
    return {result.comparison.what for result in results if not result.comparison.ok}


@pytest.mark.parametrize(
    ("op", "host", "gradients"),
    [
        ("dynamic_erf", dynamic_rows, ("dx", "dalpha", "dshift", "dw", "db")),
        ("poly_norm", poly_rows, ("dx", "dw", "db")),
        ("weight_norm", weight_rows, ("dx", "dw")),
    ],
)
def test_a_wrong_result_is_found(
    op: str, host: ModuleType, gradients: tuple[str, ...], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert wrong(op, device) == set()

    def spoiled(function: str, index: int | None) -> Any:
        honest = getattr(host, function)

        def results(*args: Any) -> Any:
            found = honest(*args)
            (found if index is None else found[index]).mul_(1 + 1e-4)
            return found

        return results

    for function, index, found in (("forward", None, {"y"}), *(("backward", i, {g}) for i, g in enumerate(gradients))):
        with monkeypatch.context() as patch:
            patch.setattr(host, function, spoiled(function, index))
            assert wrong(op, device) == found


def test_a_wrong_gradient_is_found_numerically(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    (result,) = check.check_numerically("dynamic_erf", device)
    assert result.comparison.ok, result.comparison.worst
    inputs_only.CALLS.clear()
    honest = dynamic_rows.backward
    monkeypatch.setattr(dynamic_rows, "backward", lambda *args: (honest(*args)[0], *(2 * t for t in honest(*args)[1:])))
    (result,) = check.check_numerically("dynamic_erf", device)
    assert not result.comparison.ok


def test_torchs_users_and_trinorm_agree() -> None:
    for op in ELEMENT_OPS:
        of = drawn(op).of
        found: Tensor = check.OPS[op].call(torch.nn.functional, of)[0]
        torch.testing.assert_close(found, check.OPS[op].oracle(of).y)
