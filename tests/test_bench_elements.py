"""``trinorm bench`` and ``inspect`` of DyT, Derf, PolyNorm and weight norm: shapes, bytes, what is right and compiled."""

from __future__ import annotations

import contextlib
import io
import sys
from concurrent.futures import Executor
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from trinorm import cli
from trinorm.bench import cases, measure, predict, providers, shapes
from trinorm.bench.cases import CHAIN, OPS, PASSES, Case
from trinorm.cli import inspect, main
from trinorm.norms import ELEMENT_OPS

STILL = SimpleNamespace(synchronize=lambda: None)
CPU = torch.device("cpu")
GRADIENTS = {
    "dynamic_tanh": ["dx", "dalpha", "dw", "db"],
    "dynamic_erf": ["dx", "dalpha", "dshift", "dw", "db"],
    "poly_norm": ["dx", "dw", "db"],
    "weight_norm": ["dx", "dw"],
}


def case(op: str, pass_: str, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (12, 40)) -> Case:
    return Case(op, pass_, shape, dtype, dtype)


def test_shapes_are_rows_and_columns() -> None:
    for op in ELEMENT_OPS:
        assert cases.shapes_of(op, cli.shapes("8192x4096")) == [(8192, 4096)]
        assert cases.shapes_of(op, None) == list(shapes.ELEMENT_SHAPES)
        assert not OPS[op].chained
        with pytest.raises(ValueError, match=f"{op} takes no 8x16x32, but rows x columns"):
            cases.shapes_of(op, cli.shapes("8x16x32"))
    with pytest.raises(ValueError, match="at most 8192"):
        cases.shapes_of("poly_norm", cli.shapes("4x16384"))


def test_numbers_stand_between_x_and_the_weight() -> None:
    shapes = {op: [tuple(t.shape) for t in case(op, "backward").draw(CPU).arguments] for op in ELEMENT_OPS}
    assert shapes == {
        "dynamic_tanh": [(12, 40), (1,), (40,), (40,)],
        "dynamic_erf": [(12, 40), (1,), (1,), (40,), (40,)],
        "poly_norm": [(12, 40), (3,), (1,)],
        "weight_norm": [(12, 40), (12, 1)],
    }


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("op", ELEMENT_OPS)
def test_trinorm_and_torchs_users_are_found_right(op: str, pass_: str, device: torch.device) -> None:
    of = case(op, pass_)
    expected = measure.expect(of, of.draw(device))
    assert "dalpha" in expected.terms or pass_ == "forward" or not op.startswith("dynamic")
    for provider in providers.load(["torch"])[0]:
        found = measure.verify(lambda p=provider: p.build(of), expected, STILL).comparisons  # type: ignore[misc, arg-type]
        assert [one.what for one in found] == (GRADIENTS[op] if pass_ == "backward" else ["y"])
        assert all(one.ok for one in found), (provider.name, found)


def test_liger_is_called_as_its_users_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its functions of these names; that they agree, test_dynamic.py and test_poly.py say of a GPU."""

    def remember(name: str) -> Any:
        return lambda *given: (name, len(given))

    module: Any = ModuleType("liger_kernel.transformers.functional")
    module.liger_dyt, module.liger_poly_norm = remember("dyt"), remember("poly_norm")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    (_, liger), absent = providers.load(["liger"])
    assert not absent
    assert "dynamic_erf" not in liger.ops
    for op, expected in (("dynamic_tanh", ("dyt", 4)), ("poly_norm", ("poly_norm", 4))):
        assert op in liger.ops
        assert liger.build(case(op, "forward"))(*case(op, "forward").draw(CPU).arguments) == expected


def test_every_tensor_is_given_to_the_kernels_once() -> None:
    def given(call: predict.Call) -> int:
        return sum(arg.nbytes for arg in call.args if isinstance(arg, Tensor))

    of_x, of_row = 8192 * 4096 * 2, 4096 * 2
    (forward,) = predict.launches(case("dynamic_erf", "forward", torch.bfloat16, (8192, 4096)))
    assert given(forward) == 2 * of_x + 2 * of_row + 2 * 2
    backward, sums = predict.launches(case("dynamic_erf", "backward", torch.bfloat16, (8192, 4096)))
    programs, chunk = backward.grid[0], backward.options["CHUNK"]
    of_columns, of_numbers = 2 * programs * chunk * 4, 2 * programs * 4
    assert given(backward) == 3 * of_x + of_row + 2 * 2 + of_columns + of_numbers
    assert given(sums) == of_columns + 2 * of_row + of_numbers + 2 * 2
    (forward,) = predict.launches(case("poly_norm", "forward", torch.bfloat16, (8192, 4096)))
    assert given(forward) == 2 * of_x + 4 * 2
    sums, backward = predict.launches(case("weight_norm", "backward", torch.bfloat16, (512, 65536)))
    of_sums = 512 * 3 * 16 * 4
    assert given(sums) == 2 * of_x + of_sums
    assert given(backward) == 3 * of_x + of_sums + 2 * 512 * 2


def test_there_are_no_chains(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trinorm.cli.bench.INTERPRETED", False)
    assert main(["bench", "--op", "dynamic_tanh", "--pass", CHAIN]) == 2
    assert "--pass chain: dynamic_tanh takes more than another returns" in capsys.readouterr().err


def _printed(*arguments: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["inspect", *arguments]) == 0
    return out.getvalue()


def test_inspect_compiles_it_where_it_is_asked_for(compiling: Executor) -> None:
    assert not set(inspect._SELECTED) & set(ELEMENT_OPS)
    tables = compiling.submit(_printed, "dynamic_tanh", "--shape", "64x256", "--pass", "forward").result()
    assert "DyT forward, bfloat16, compiled for sm_90" in tables
    assert "dynamic_forward" in tables
