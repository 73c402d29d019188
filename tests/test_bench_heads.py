"""``trinorm bench``, ``inspect``, ``profile`` of QK-norm: shapes, bytes, ceilings, what is right, what is compiled."""

from __future__ import annotations

import contextlib
import io
import json
from concurrent.futures import Executor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from trinorm import cli
from trinorm.bench import cases, measure, predict, providers, report
from trinorm.bench.cases import CHAIN, OPS, PASSES, Case
from trinorm.bench.providers import OURS
from trinorm.bench.records import Provenance, Record
from trinorm.cli import main
from trinorm.compare import Comparison

HERE = Provenance(gpu="Made-up GPU 9", torch="0.0", triton="0.0", commit=None, date="2000-01-01")
STILL = SimpleNamespace(synchronize=lambda: None)
CPU = torch.device("cpu")
# 2 × 3 tokens, of 4 query heads and 2 key heads, of 8 elements.
SHAPE = (2, 3, 4, 2, 8)


def case(pass_: str, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = SHAPE) -> Case:
    return Case("qk_norm", pass_, shape, dtype, dtype)


# --- shapes and inputs ---


def test_shapes_are_tokens_heads_and_their_elements() -> None:
    assert cases.shapes_of("qk_norm", cli.shapes("4x4096x32x8x128,512x16x8x128")) == [
        (4, 4096, 32, 8, 128),
        (512, 16, 8, 128),
    ]
    assert cases.shapes_of("qk_norm", None)[0] == (4, 4096, 32, 8, 128)
    found = Case.all("qk_norm", "forward", [(4, 4096, 32, 8, 128), (512, 16, 8, 128)], torch.bfloat16)
    assert [of.size for of in found] == ["4×4096×32×8×128", "512×16×8×128"]  # each in one order of memory


@pytest.mark.parametrize("shape", ["128x768", "4x32x128", "16x8x8x2048", "2x2x3x4x2x8"])
def test_what_is_no_shape_of_heads_is_refused(shape: str) -> None:
    with pytest.raises(ValueError, match=f"qk_norm takes no {shape}, but .*tokens x query heads x key heads"):
        cases.shapes_of("qk_norm", cli.shapes(shape))


def test_queries_and_keys_are_views_into_a_projection_of_values_too() -> None:
    inputs = case("backward").draw(CPU)
    assert inputs.key is not None
    assert inputs.x.shape == (2, 3, 4, 8)
    assert inputs.key.shape == (2, 3, 2, 8)
    assert inputs.x.stride() == inputs.key.stride() == (3 * 8 * 8, 8 * 8, 8, 1)
    assert inputs.x.untyped_storage().data_ptr() == inputs.key.untyped_storage().data_ptr()
    assert [t.shape for t in inputs.arguments] == [(2, 3, 4, 8), (2, 3, 2, 8), (8,), (8,), (3, 8), (3, 8)]
    assert [t.requires_grad for t in inputs.arguments] == [True] * 4 + [False] * 2
    assert [t.shape for t in inputs.gradients] == [(2, 3, 4, 8), (2, 3, 2, 8)]
    of = inputs.of(0.0)
    assert torch.equal(of.x[..., 4:, :], inputs.key)
    assert of.queries == 4
    assert not case("forward").draw(CPU).gradients


@pytest.mark.parametrize("pass_", PASSES)
def test_bytes_are_those_of_queries_keys_weights_and_angles(pass_: str) -> None:
    of = Case("qk_norm", pass_, SHAPE, torch.float16, torch.float32)
    x, weights, angles = 2 * 3 * 6 * 8 * 2, 2 * 8 * 4, 2 * 3 * 8 * 2
    assert of.elements * 2 == x
    expected = (x + weights + angles, x) if pass_ == "forward" else (2 * x + weights + angles, x + weights)
    assert (of.bytes_read, of.bytes_written) == expected


# --- the ceiling ---


def test_the_ceiling_is_one_copy_of_both_or_one_addition() -> None:
    inputs = case("forward").draw(CPU)
    (copy,) = measure.ceiling_calls(case("forward"), [inputs])
    found = copy()
    assert isinstance(found, Tensor)
    assert found.is_contiguous()
    assert torch.equal(found, inputs.whole)
    inputs = case("backward").draw(CPU)
    (three,) = measure.ceiling_calls(case("backward"), [inputs])
    found = three()
    assert isinstance(found, Tensor)
    assert found.numel() == case("backward").elements
    assert torch.equal(found, inputs.whole + torch.cat(inputs.gradients, -2))
    assert [OPS["qk_norm"].ceilings[pass_] for pass_ in PASSES] == ["copy", "add"]


@pytest.mark.parametrize("pass_", PASSES)
def test_what_does_as_the_ceiling_does_takes_its_time(pass_: str) -> None:
    of = case(pass_, torch.bfloat16, (4, 256, 32, 8, 128))
    tensor = torch.empty((3 if of.backward else 2) * of.elements * 2, dtype=torch.uint8, device="meta")
    code = predict.Compiled("made_up", "sm_90", 4, 32, 0, 0, {}, {}, {}, {}, 0)
    call = predict.Call(None, (1,), (tensor,), {})  # type: ignore[arg-type]
    found = predict.Prediction(of, "sm_90", (predict.Kernel(call, code, code),))
    assert found.ceiling_ratio == pytest.approx(1)


def test_tables_say_what_a_shape_counts() -> None:
    record = replace(Record.of(case("forward"), OURS, HERE), ceiling_us=2.0, device_us=4.0, ok=True)
    console = Console(file=io.StringIO(), width=200)
    console.print(report.table([record]))
    text = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "QK-norm forward, float32" in text
    assert "tokens × q × k × D" in text
    assert "2×3×4×2×8 copy 2.00" in text
    assert json.loads(record.to_json())["shape"] == [*SHAPE]


def test_there_are_no_chains(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert Case.all("qk_norm", CHAIN, [SHAPE], torch.bfloat16) == []
    monkeypatch.setattr("trinorm.cli.bench.INTERPRETED", False)
    assert main(["bench", "--op", "rms_norm,qk_norm", "--pass", "chain"]) == 2
    assert "--pass chain: qk_norm takes more than another returns" in capsys.readouterr().err


# --- what is right ---


def verified(norm: providers.Norm, of: Case, device: torch.device = CPU) -> list[Comparison]:
    expected = measure.expect(of, of.draw(device))
    return measure.verify(lambda: norm, expected, STILL).comparisons  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pass_", PASSES)
def test_trinorm_and_torchs_users_are_found_right(pass_: str, dtype: torch.dtype, device: torch.device) -> None:
    """Those, in 16 bits, round at each step."""
    names = ["query", "key"] if pass_ == "forward" else ["dquery", "dkey", "dw_q", "dw_k"]
    of = case(pass_, dtype, (2, 20, 4, 2, 64))
    for provider in providers.load(["torch"])[0]:
        found = verified(provider.build(of), of, device)
        assert [one.what for one in found] == names
        assert all(one.ok for one in found), (provider.name, found)


def halves(n: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = n.chunk(2, -1)
    return n * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def test_a_wrong_result_is_found() -> None:
    def norm(query: Tensor, key: Tensor, *others: Tensor, back: bool = False, lost: bool = False) -> tuple[Tensor, ...]:
        *weights, cos, sin = others
        ys = [F.rms_norm(x, (8,), w, 1e-6) for x, w in zip((query, key), weights, strict=True)]
        of_key = ys[1].detach() + 0 * ys[1] if lost else ys[1]
        return halves(ys[0], cos, -sin if back else sin), halves(of_key, cos, sin)

    for pass_ in PASSES:
        assert all(one.ok for one in verified(norm, case(pass_)))
    turned_back = verified(lambda *given: norm(*given, back=True), case("forward"))
    assert [one.what for one in turned_back if not one.ok] == ["query"]
    lost = verified(lambda *given: norm(*given, lost=True), case("backward"))
    assert [one.what for one in lost if not one.ok] == ["dkey", "dw_k"]


# --- what is compiled ---


def test_every_tensor_is_given_to_the_kernels_once() -> None:
    shape = 4, 4096, 32, 8, 128
    of_x, statistics, angles, weights = 4 * 4096 * 40 * 128 * 2, 4 * 4096 * 40 * 4, 2 * 4096 * 128 * 2, 2 * 128 * 2

    def given(call: predict.Call) -> int:
        return sum(arg.nbytes for arg in call.args if isinstance(arg, Tensor))

    (forward,) = predict.launches(case("forward", torch.bfloat16, shape))
    assert given(forward) == 2 * of_x + angles + weights == case("forward", torch.bfloat16, shape).bytes
    backward, total = predict.launches(case("backward", torch.bfloat16, shape))
    partials = 2 * backward.grid[0] * 128 * 4
    assert given(backward) == 3 * of_x + angles + weights + statistics + partials
    assert given(total) == partials + weights


def _printed(*arguments: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["inspect", *arguments]) == 0
    return out.getvalue()


def test_inspect_compiles_it(compiling: Executor) -> None:
    arguments = ("qk_norm", "--shape", "64x1x8x2x128")
    lines = compiling.submit(_printed, *arguments, "--json", "-").result().splitlines()
    found = [json.loads(line) for line in lines]
    assert [line["kernel"] for line in found] == ["heads_forward", "heads_backward", "sum_partials"]
    assert not any(line["spills"] for line in found)
    tables = compiling.submit(_printed, *arguments).result()
    assert "QK-norm backward, bfloat16, compiled for sm_90" in tables
    assert "…" not in tables
