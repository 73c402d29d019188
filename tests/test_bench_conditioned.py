"""``trinorm bench``, ``inspect``, ``profile`` of conditioned norms: shapes, bytes, ceilings, what is right, what is
compiled.
"""

from __future__ import annotations

import contextlib
import io
from concurrent.futures import Executor
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from trinorm import cli
from trinorm.bench import cases, measure, predict, providers
from trinorm.bench.cases import CHAIN, OPS, PASSES, Case
from trinorm.bench.shapes import CONDITIONED_SHAPES
from trinorm.cli import main
from trinorm.compare import Comparison

STILL = SimpleNamespace(synchronize=lambda: None)
CPU = torch.device("cpu")
SHAPE = (2, 24, 40)
GATED = [op for op in CONDITIONED_SHAPES if op.startswith("gated")]


def case(op: str, pass_: str, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = SHAPE) -> Case:
    return Case(op, pass_, shape, dtype, dtype)


# --- shapes and inputs ---


@pytest.mark.parametrize("op", CONDITIONED_SHAPES)
def test_shapes_are_batch_tokens_and_columns(op: str) -> None:
    assert cases.shapes_of(op, cli.shapes("64x256x1152")) == [(64, 256, 1152)]
    found = Case.all(op, "forward", cases.shapes_of(op, None), torch.bfloat16)
    assert [of.shape for of in found] == [*CONDITIONED_SHAPES[op]]  # each in one order of memory
    assert OPS[op].norm.takes(OPS[op].host)


@pytest.mark.parametrize(
    ("op", "shape", "wanted"),
    [
        ("modulated_layer_norm", "8x768", "batch x tokens x columns, of which there are at most 1048576"),
        ("modulated_layer_norm", "2x8x1048577", "batch x tokens x columns, of which there are at most 1048576"),
        ("gated_rms_norm", "2x2x8x768", "(batch x) rows x columns"),
        ("gated_rms_norm/groups", "2x8x100", "(batch x) rows x columns in 8 groups, of which each has at most 1048576"),
        ("per_head_rms_norm", "8x768", "(batch x) tokens x heads x elements of a head"),
        ("l2_norm", "2x8x1048577", "(batch x) rows x columns, of which there are at most 1048576"),
    ],
)
def test_another_shape_is_refused(op: str, shape: str, wanted: str) -> None:
    with pytest.raises(ValueError, match=f"{op} takes no {shape}, but") as raised:
        cases.shapes_of(op, cli.shapes(shape))
    assert wanted in str(raised.value)


def test_parameters_and_gates_are_chunks_of_projections() -> None:
    inputs = case("modulated_layer_norm", "backward").draw(CPU)
    assert inputs.bias is not None
    assert [t.shape for t in inputs.arguments] == [SHAPE, (2, 1, 40), (2, 1, 40)]
    assert inputs.weight.stride(0) == inputs.bias.stride(0) == 6 * 40
    for op in GATED:
        inputs = case(op, "backward").draw(CPU)
        assert inputs.gate is not None
        assert [t.shape for t in inputs.arguments] == [SHAPE, SHAPE, (40,)]
        assert inputs.x.stride() == inputs.gate.stride() == (24 * 80, 80, 1)
        assert all(t.requires_grad for t in inputs.arguments)
        assert not case(op, "forward").draw(CPU).gradients
    for op, step, *parameters in (("per_head_rms_norm", 48, (24, 40)), ("l2_norm", 48), ("partial_rms_norm", 24, (40,))):
        inputs = case(op, "forward").draw(CPU)
        assert [t.shape for t in inputs.arguments] == [SHAPE, *parameters]
        assert inputs.x.stride() == (step * 40, 40, 1)


# --- the ceiling ---


@pytest.mark.parametrize("op", CONDITIONED_SHAPES)
def test_the_ceiling_moves_as_many_bytes(op: str) -> None:
    names = ("add", "2½ copies") if op in GATED else ("copy", "add")
    names = ("two copies", "three copies") if op.startswith("add_") else names
    for pass_, name in zip(PASSES, names, strict=True):
        of = case(op, pass_)
        assert OPS[op].ceilings[pass_] == name
        inputs = of.draw(CPU)
        (call,) = measure.ceiling_calls(of, [inputs])
        found = call()
        assert isinstance(found, Tensor)
        read, written = of.moved
        if name.endswith("copies"):
            assert 2 * found.numel() == (read + written) * of.elements
        else:
            assert found.numel() == written * of.elements
        if name == "add":
            other = inputs.gate if pass_ == "forward" else inputs.dy
            assert torch.equal(found, inputs.x + other)


def test_there_are_no_chains(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trinorm.cli.bench.INTERPRETED", False)
    assert main(["bench", "--op", "gated_rms_norm/first", "--pass", CHAIN]) == 2
    assert "--pass chain: gated_rms_norm/first takes more than another returns" in capsys.readouterr().err


# --- what is right ---


def verified(norm: providers.Norm, of: Case, device: torch.device = CPU) -> list[Comparison]:
    expected = measure.expect(of, of.draw(device))
    return measure.verify(lambda: norm, expected, STILL).comparisons  # type: ignore[arg-type]


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("op", CONDITIONED_SHAPES)
def test_trinorm_and_torchs_users_are_found_right(op: str, pass_: str, device: torch.device) -> None:
    """Those in fp32: of 16 bits they round more often than torch's own, and a table says so."""
    names = ["dx", "dgate", "dw"] if op in GATED else ["dx", "dscale", "dshift"] if "modulated" in op else ["dx", "dw"]
    names = ["dx"] if op == "l2_norm" else names  # of no weight
    results = ["y", "sum"] if op.startswith("add_") else ["y"]
    names = ["dx", "dr", "dgate", *names[1:]] if op.startswith("add_") else names
    for provider in providers.load(["torch"])[0]:
        for dtype in (torch.float32, torch.bfloat16)[: 2 if provider.name == providers.OURS else 1]:
            of = case(op, pass_, dtype)
            found = verified(provider.build(of), of, device)
            assert [one.what for one in found] == (names if pass_ == "backward" else results)
            assert all(one.ok for one in found), (provider.name, found)


def test_a_gate_in_the_wrong_place_is_found() -> None:
    behind = providers.load([])[0][0].build(case("gated_rms_norm", "forward"))
    assert [one.what for one in verified(behind, case("gated_rms_norm/first", "forward")) if not one.ok] == ["y"]
    assert {one.what for one in verified(behind, case("gated_rms_norm/first", "backward")) if not one.ok} >= {"dx", "dgate"}


# --- what is compiled ---


def given(call: predict.Call) -> int:
    return sum(arg.nbytes for arg in call.args if isinstance(arg, Tensor))


def test_every_tensor_is_given_to_the_kernels_once() -> None:
    shape = (8, 2048, 5120)
    of_x, weight, statistics = 8 * 2048 * 5120 * 2, 5120 * 2, 8 * 2048 * 4
    of = case("gated_rms_norm/first", "forward", torch.bfloat16, shape)
    (forward,) = predict.launches(of)
    assert given(forward) == 3 * of_x + weight == of.bytes
    of = case("gated_rms_norm/first", "backward", torch.bfloat16, shape)
    backward, total = predict.launches(of)
    partials = backward.grid[0] * 5120 * 4
    assert given(backward) == 5 * of_x + weight + statistics + partials
    assert given(total) == partials + weight
    assert of.bytes == 5 * of_x + 2 * weight


def _printed(*arguments: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["inspect", *arguments]) == 0
    return out.getvalue()


def test_inspect_compiles_it(compiling: Executor) -> None:
    tables = compiling.submit(_printed, "gated_rms_norm/groups", "--shape", "64x256", "--pass", "backward").result()
    assert "Gate and RMSNorm of 8 groups backward, bfloat16, compiled for sm_90" in tables
    assert "conditioned_backward" in tables
    assert "…" not in tables
