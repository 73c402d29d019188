"""``trinorm check`` of conditioned norms: what it draws, what it reports, and that it can fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trinorm.cases import DTYPES, GPU, INTERPRETED, NASTY, NORMAL, QUICK, Case, Inputs, Values
from trinorm.cli import check
from trinorm.norms import CONDITIONED_OPS, OfConditioned
from trinorm.ops import conditioned
from trinorm.ops.hosts import conditioned_rows
from trinorm.spec import CASTS, GATE_ACTIVATIONS

OPS = [op for op in check.OPS if check.OPS[op].family == "conditioned"]
SHAPE = (2, 3, 24)
CASE = Case(SHAPE)
MODULATED = {"y", "rstd", "dx", "dscale", "dshift"}
GATED = {"y", "rstd", "dx", "dgate", "dw"}
WEIGHTED = {"y", "rstd", "dx", "dw"}
# Of each function, and of the orders and groups that another path computes, what is compared.
EVERYTHING = {
    "modulated_layer_norm": MODULATED | {"mean"},
    "modulated_layer_norm/token": MODULATED | {"mean"},
    "modulated_rms_norm": MODULATED,
    "gated_layer_norm": GATED | {"mean", "db"},
    "gated_rms_norm": GATED,
    "gated_rms_norm/groups": GATED,
    "per_head_rms_norm": WEIGHTED,
    "l2_norm": WEIGHTED,
    "scale_norm": WEIGHTED,
    "partial_rms_norm": WEIGHTED,
}


def norm_of(op: str) -> OfConditioned:
    norm = check.OPS[op]
    assert isinstance(norm, OfConditioned)
    return norm


def drawn(op: str, values: Values = NORMAL, dtype: torch.dtype = torch.float32) -> Inputs:
    return Case(SHAPE, values).inputs(check.OPS[op], dtype, torch.device("cpu"))


def test_every_kind_order_activation_and_casting_mode_is_checked() -> None:
    assert {op for op in OPS if "/" not in op} == set(CONDITIONED_OPS)
    norms = [norm_of(op) for op in OPS]
    assert {norm.each for norm in norms if norm.spec.modulated} == {"sample", "token", "all"}
    gated = [norm for norm in norms if norm.spec.gate]
    for center in (True, False):
        assert {norm.spec.gate_first for norm in gated if norm.centers == center} == {True, False}
        assert {norm.spec.gate for norm in gated if norm.centers == center} == {*GATE_ACTIVATIONS}
    assert {norm.groups for norm in gated} == {1, 8}
    for of in (gated, [norm for norm in norms if norm.of_heads]):
        assert {norm.spec.norm.cast for norm in of} == {*CASTS}


def test_parameters_are_those_of_a_sample_a_token_all_and_each_head() -> None:
    def shape(op: str) -> tuple[int, ...]:
        weight = drawn(op).of.weight
        assert weight is not None
        return tuple(weight.shape)

    assert shape("modulated_layer_norm") == (2, 1, 24)
    assert shape("modulated_layer_norm/token") == SHAPE
    assert shape("modulated_rms_norm/all") == shape("gated_rms_norm") == (24,)
    assert shape("per_head_rms_norm") == (3, 24)
    assert norm_of("gated_rms_norm/groups").rows(torch.empty(SHAPE)).shape == (2 * 3 * 8, 3)
    assert norm_of("gated_rms_norm").rows(torch.empty(SHAPE)).shape == (2 * 3, 24)
    assert shape("scale_norm") == (1,)
    assert norm_of("partial_rms_norm").counted(torch.empty(6, 24)).shape == (6, 2)


@pytest.mark.parametrize("sizes", [QUICK, INTERPRETED, GPU], ids=["quick", "interpreted", "gpu"])
def test_its_cases_meet_every_kind_of_value(sizes: Any) -> None:
    met = {dtype: list(sizes.conditioned.cases(dtype)) for dtype in DTYPES.values()}
    for dtype, cases in met.items():
        held = [op for op in OPS if check.OPS[op].of_gated_sum]  # which has no kernels of long rows
        assert all(op in held or check.OPS[op].takes(case.shape) for op in OPS for case in cases)
        every = {"normal", *(values.name for values in NASTY if values.fits(dtype))}
        assert {case.values.name for case in cases} == every or sizes is QUICK
    mixed = NASTY[-1].name  # 1e30 and 1e-30 are met, each alone
    assert {case.values.name for cases in met.values() for case in cases} >= {values.name for values in NASTY} - {mixed}


def test_a_scale_and_a_weight_of_heads_or_of_all_are_never_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    met: dict[str, set[str]] = {}
    monkeypatch.setattr(
        check, "check_op", lambda op, dtype, device, cases: met.setdefault(op, set()).update(map(kind, cases))
    )

    def kind(case: Case) -> str:
        return case.weight

    for step in check.steps_of(CONDITIONED_OPS, [torch.bfloat16], torch.device("cpu"), INTERPRETED):
        step()
    free = {op for op in CONDITIONED_OPS if op.startswith(("gated", "l2", "partial"))}
    assert met == {op: {"same", "float32", "absent"} if op in free else {"same", "float32"} for op in CONDITIONED_OPS}


@pytest.mark.parametrize("op", EVERYTHING)
def test_powers_of_two_leave_every_result_but_dx(op: str) -> None:
    """And so torch's own result of the rows without them is an answer, of a gate's gradient too."""
    norm, inputs = check.OPS[op], drawn(op, NASTY[-1], torch.float64)
    plain = inputs.unscaled()
    assert set(inputs.scale.log2().unique().tolist()) == {100.0, 0.0, -100.0}
    torch.testing.assert_close(norm.oracle(inputs.of).y, norm.oracle(plain.of).y)
    found, expected = (norm.oracle_gradients(of.of, of.dy) for of in (inputs, plain))
    assert found.dx is not None
    torch.testing.assert_close(found.dx * inputs.scale, expected.dx)
    torch.testing.assert_close(found[1:], expected[1:])


def wrong(op: str, device: torch.device) -> set[str]:
    """What check_op finds wrong."""
    conditioned.CALLS.clear()
    results = check.check_op(op, torch.float32, device, [CASE])
    assert {result.comparison.what for result in results} == EVERYTHING[op]
    return {result.comparison.what for result in results if not result.comparison.ok}


def spoil(monkeypatch: pytest.MonkeyPatch, function: str, index: int, factor: float = 1 + 1e-4) -> None:
    honest = getattr(conditioned_rows, function)

    def spoiled(*args: Any, **how: Any) -> Any:
        results = honest(*args, **how)
        if results[index] is not None:
            results[index].mul_(factor)
        return results

    monkeypatch.setattr(conditioned_rows, function, spoiled)


@pytest.mark.parametrize(
    "op",
    [
        "modulated_layer_norm",
        "gated_layer_norm",
        "gated_rms_norm/groups",
        "per_head_rms_norm",
        "l2_norm",
        "partial_rms_norm",
    ],
)
def test_a_wrong_result_is_found(op: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wrong(op, device) == set()
    names = [("forward", 0, {"y"}), ("backward", 0, {"dx"}), ("backward", 1, {"dgate"})]
    names += [("backward", 2, {"dw", "dscale"}), ("backward", 3, {"db", "dshift"})]
    for function, index, found in names:
        with monkeypatch.context() as patch:
            spoil(patch, function, index)
            assert wrong(op, device) == found & EVERYTHING[op]


def test_wrong_statistics_are_found(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, "forward", 2)
    assert wrong("gated_layer_norm", device) >= {"rstd", "dx", "dgate", "dw"}


def test_a_gate_in_the_wrong_place_is_found(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = conditioned_rows.forward

    def forward(problem: Any, *args: Any, **how: Any) -> Any:
        spec = problem.spec
        return honest(problem._replace(spec=spec._replace(gate_first=not spec.gate_first)), *args, **how)

    monkeypatch.setattr(conditioned_rows, "forward", forward)
    assert wrong("gated_rms_norm", device) >= {"y", "rstd"}


@pytest.mark.parametrize(("op", "counted", "divisor"), [("l2_norm", None, None), ("partial_rms_norm", 3, 3)])
def test_another_statistic_is_found(
    op: str, counted: int | None, divisor: int | None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of RMSNorm, and that of one element more."""
    honest = conditioned_rows.forward

    def forward(problem: Any, *args: Any, **how: Any) -> Any:
        of = problem.spec._replace(counted=counted, divisor=divisor)
        return honest(problem._replace(spec=of), *args, **how)

    monkeypatch.setattr(conditioned_rows, "forward", forward)
    assert wrong(op, device) == WEIGHTED


def test_a_number_that_does_not_count_spoils_no_yardstick(device: torch.device) -> None:
    """A NaN behind what counts leaves its row's other numbers, and the sums with them, as they are; in torch's too."""
    case = Case(SHAPE, next(values for values in NASTY if values.name == "one NaN"))
    (dw,) = (
        r.comparison for r in check.check_op("partial_rms_norm", torch.float64, device, [case]) if r.comparison.what == "dw"
    )
    assert dw.ok and dw.torch_error < 1e-12


def test_a_wrong_gradient_of_a_gate_is_found_numerically(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    (result,) = check.check_numerically("gated_rms_norm", device)
    assert result.comparison.ok, result.comparison.worst
    conditioned.CALLS.clear()
    spoil(monkeypatch, "backward", 1, 2.0)
    (result,) = check.check_numerically("gated_rms_norm", device)
    assert not result.comparison.ok


def test_torchs_users_and_trinorm_agree() -> None:
    for op in OPS:
        of: Inputs = drawn(op, dtype=torch.float64)
        if norm_of(op).spec.norm.offset:
            continue  # which is none of torch's
        found: Tensor = check.OPS[op].call(torch.nn.functional, of.of)[0]
        torch.testing.assert_close(found, check.OPS[op].oracle(of.of).y)
