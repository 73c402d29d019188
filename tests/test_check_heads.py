"""``trinorm check`` of QK-norm: what it draws, what it reports, and that it can fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trinorm.cases import DTYPES, GPU, INTERPRETED, NASTY, NORMAL, QUICK, Case, Inputs, Values
from trinorm.cli import check
from trinorm.norms import OfHeads
from trinorm.ops import qk
from trinorm.ops.hosts import heads

OPS = [op for op in check.OPS if isinstance(check.OPS[op], OfHeads)]
SHAPE = (5, 4, 2, 12)
CASE = Case(SHAPE)
EVERYTHING = {"query", "key", "dquery", "dkey", "dw_q", "dw_k", "rstd_q", "rstd_k"}


def drawn(op: str, values: Values = NORMAL, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = SHAPE) -> Inputs:
    return Case(shape, values).inputs(check.OPS[op], dtype, torch.device("cpu"))


def test_every_rotation_and_casting_mode_is_checked() -> None:
    assert {f"qk_norm{of}" for of in ("", "/neighbours", "/half", "/alone", "/llama", "/gemma")} == set(OPS)
    lengths = {op: [t.shape for t in drawn(op).of.angles or ()] for op in OPS}
    assert lengths["qk_norm"] == lengths["qk_norm/neighbours"] == [(5, 12)] * 2
    assert lengths["qk_norm/half"] == [(5, 6)] * 2
    assert lengths["qk_norm/alone"] == []


@pytest.mark.parametrize("sizes", [QUICK, INTERPRETED, GPU], ids=["quick", "interpreted", "gpu"])
def test_its_cases_meet_every_kind_of_value(sizes: Any) -> None:
    met = {dtype: list(sizes.heads.cases(dtype)) for dtype in DTYPES.values()}
    for dtype, cases in met.items():
        assert all(check.OPS["qk_norm"].takes(case.shape) and case.layout == "contiguous" for case in cases)
        every = {"normal", *(values.name for values in NASTY if values.fits(dtype))}
        assert {case.values.name for case in cases} == every or sizes is QUICK
    mixed = NASTY[-1].name  # 1e30 and 1e-30 are met, each alone
    every = {case.values.name for cases in met.values() for case in cases}
    assert every >= {values.name for values in NASTY} - {mixed}


def test_rows_are_heads_and_samples_share_their_angles() -> None:
    of = drawn("qk_norm", shape=(2, *SHAPE)).of
    assert of.x.shape == (2, 5, 6, 12)
    assert (of.queries, of.weight.shape if of.weight is not None else None) == (4, (2, 12))
    cos, sin = (t.double() for t in of.angles or ())
    assert cos.shape == sin.shape == (5, 12)
    torch.testing.assert_close(cos.square() + sin.square(), torch.ones(5, 12, dtype=torch.float64))
    assert len(cos.unique()) == cos.numel()  # none passes for another
    for weight, dtype in (("same", torch.bfloat16), ("float32", torch.float32), ("absent", torch.bfloat16)):
        inputs = Case(SHAPE, weight=weight).inputs(check.OPS["qk_norm"], torch.bfloat16, torch.device("cpu"))
        assert [t.dtype for t in inputs.of.angles or ()] == [dtype] * 2


@pytest.mark.parametrize("values", [values for values in NASTY if values.scaled], ids=lambda values: values.name)
def test_powers_of_two_are_those_of_heads(values: Values) -> None:
    inputs = drawn("qk_norm", values)
    assert torch.equal(inputs.scale.amin(-1), inputs.scale.amax(-1))
    assert set(inputs.scale[..., 0].log2().flatten().tolist()) == set(values.exponents)
    assert torch.equal(inputs.unscaled().of.x.double() * inputs.scale, inputs.of.x.double())


def test_results_are_reported_of_queries_and_of_keys() -> None:
    norm, of = check.OPS["qk_norm"], drawn("qk_norm", shape=(2, *SHAPE)).of
    found = norm.oracle(of)
    apart = norm.parts(of, "y", found.y) | norm.parts(of, "rstd", found.rstd)
    assert torch.equal(apart["query"].reshape(2, 5, 4, 12), found.y[..., :4, :])
    assert torch.equal(apart["key"].reshape(2, 5, 2, 12), found.y[..., 4:, :])
    key = of.x[..., 4:, :].double()
    torch.testing.assert_close(apart["rstd_k"].reshape(2, 5, 2), (key.square().mean(-1) + of.eps).rsqrt())
    assert norm.parts(of, "mean", found.mean).keys() == {"mean"}


def wrong(op: str, device: torch.device) -> set[str]:
    """What check_op finds wrong."""
    qk.CALLS.clear()
    results = check.check_op(op, torch.float32, device, [CASE])
    assert {result.comparison.what for result in results} == EVERYTHING
    return {result.comparison.what for result in results if not result.comparison.ok}


@pytest.mark.parametrize(
    ("function", "index", "found"),
    [
        ("forward", 0, {"query"}),
        ("forward", 1, {"key"}),
        ("forward", 2, {"rstd_q", "dquery", "dw_q"}),
        ("forward", 3, {"rstd_k", "dkey", "dw_k"}),
        ("backward", 0, {"dquery"}),
        ("backward", 1, {"dkey"}),
        ("backward", 2, {"dw_q"}),
        ("backward", 3, {"dw_k"}),
    ],
)
def test_a_wrong_result_is_found(
    function: str, index: int, found: set[str], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert wrong("qk_norm", device) == set()
    honest = getattr(heads, function)

    def spoiled(*args: Any, **how: Any) -> Any:
        results = honest(*args, **how)
        results[index].mul_(1 + 1e-5)
        return results

    monkeypatch.setattr(heads, function, spoiled)
    assert wrong("qk_norm", device) == found


Turn = Callable[[heads.Rotation], heads.Rotation]


def spoil_rotation(monkeypatch: pytest.MonkeyPatch, change: Turn) -> None:
    """Let the kernels have another idea of the rotation."""
    for name in ("forward", "backward"):
        honest = getattr(heads, name)

        def spoiled(*args: Any, honest: Any = honest, **how: Any) -> Any:
            return honest(*(change(a) if isinstance(a, heads.Rotation) else a for a in args), **how)

        monkeypatch.setattr(heads, name, spoiled)


def _one_of_a_pair(t: Tensor | None) -> Tensor | None:
    return None if t is None else torch.cat(2 * [t.chunk(2, -1)[0]], -1)


@pytest.mark.parametrize(
    "change",
    [
        lambda turn: turn._replace(interleaved=not turn.interleaved),
        lambda turn: turn._replace(sin=-turn.sin),
        lambda turn: turn._replace(sin=_one_of_a_pair(turn.sin)),
        lambda turn: turn._replace(cos=turn.cos.roll(1, 0)),
    ],
)
@pytest.mark.parametrize("op", ["qk_norm", "qk_norm/neighbours", "qk_norm/half"])
def test_another_rotation_is_found(op: str, change: Turn, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wrong(op, device) == set()
    spoil_rotation(monkeypatch, change)
    assert wrong(op, device) == {name for name in EVERYTHING if not name.startswith("rstd")}


def test_a_rotation_that_turns_the_wrong_way_back_is_found_numerically(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = heads.backward

    def backward(*args: Any) -> Any:
        *others, turn = args
        return honest(*others, turn._replace(sin=-turn.sin))

    (result,) = check.check_numerically("qk_norm", device)
    assert result.comparison.ok, result.comparison.worst
    qk.CALLS.clear()
    monkeypatch.setattr(heads, "backward", backward)
    (result,) = check.check_numerically("qk_norm", device)
    assert not result.comparison.ok
    assert "Jacobian mismatch" in result.comparison.worst
