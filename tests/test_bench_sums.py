"""``trinorm bench``, ``inspect``, ``profile`` of the norms of a sum: bytes, ceilings, chains, peers, what is compiled."""

from __future__ import annotations

import contextlib
import importlib
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

from trinorm.bench import cases, measure, predict, providers, report
from trinorm.bench.cases import CHAIN, LINKS, OPS, Case
from trinorm.bench.providers import OURS
from trinorm.bench.records import Provenance, Record
from trinorm.bench.shapes import SHAPES
from trinorm.cli import main, profile
from trinorm.norms import SUM_OPS

HERE = Provenance(gpu="Made-up GPU 9", torch="0.0", triton="0.0", commit=None, date="2000-01-01")
STILL = SimpleNamespace(synchronize=lambda: None)
CPU = torch.device("cpu")


def case(op: str, pass_: str, dtype: torch.dtype = torch.bfloat16) -> Case:
    return Case(op, pass_, (6, 40), dtype, dtype)


def added(op: str, x: Tensor, residual: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
    """As users of torch write it."""
    total = x + residual
    return getattr(F, op.removeprefix("add_"))(total, x.shape[1:], *parameters, eps=OPS[op].eps), total


@pytest.mark.parametrize("op", SUM_OPS)
def test_they_are_measured_at_the_sizes_of_rows_and_of_decoding(op: str) -> None:
    found = cases.shapes_of(op, None)
    assert len(found) == len(set(found))
    assert {*SHAPES, (1, 4096), (256, 4096), (64, 8192), (16384, 4096), (4096, 7168)} <= set(found)
    assert cases.shapes_of(op, ["matrix"]) == cases.shapes_of("rms_norm", ["matrix"])


# --- the ceiling ---


@pytest.mark.parametrize(
    ("pass_", "moved", "name"),
    [("forward", (2, 2), "two copies"), (CHAIN, (2, 2), "two copies"), ("backward", (3, 1), "addcmul")],
)
@pytest.mark.parametrize("op", SUM_OPS)
def test_the_ceiling_moves_the_bytes_of_the_norm(op: str, pass_: str, moved: tuple[int, int], name: str) -> None:
    of = case(op, pass_)
    x, weights = 6 * 40 * 2, 40 * 2 * (1 + OPS[op].norm.biased)
    assert of.moved == moved
    assert OPS[op].ceilings[pass_] == name
    read, written = (weights, 0) if pass_ != "backward" else (40 * 2, weights)
    assert (of.bytes_read, of.bytes_written) == (moved[0] * x + read, moved[1] * x + written)


@pytest.mark.parametrize("op", SUM_OPS)
def test_the_ceiling_is_one_copy_of_both_or_one_addcmul(op: str) -> None:
    inputs = case(op, "forward").draw(CPU)
    assert inputs.residual is not None
    (copy,) = measure.ceiling_calls(case(op, "forward"), [inputs])
    assert torch.equal(_tensor(copy()), torch.stack([inputs.x, inputs.residual]))
    (chain,) = measure.ceiling_calls(case(op, CHAIN), [case(op, CHAIN).draw(CPU)])
    with torch.profiler.profile(acc_events=True) as seen:
        assert _tensor(chain()).numel() == 2 * inputs.x.numel()
    assert {event.key: event.count for event in seen.key_averages()}["aten::clone"] == LINKS
    inputs = case(op, "backward").draw(CPU)
    (three,) = measure.ceiling_calls(case(op, "backward"), [inputs])
    assert torch.equal(_tensor(three()), torch.addcmul(inputs.x, *inputs.gradients))
    of = case(op, "forward")
    negated = measure.ceiling_call(of, of.draw(CPU), copy=lambda x, out: torch.neg(x, out=out))
    assert _tensor(negated()).numel() == 2 * inputs.x.numel()


def _tensor(found: object) -> Tensor:
    assert isinstance(found, Tensor)
    return found


def test_tables_name_the_ceiling() -> None:
    def shown(*what: object) -> str:
        console = Console(file=io.StringIO(), width=200)
        console.print(*what)
        return " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]

    for pass_, name in (("forward", "two copies"), ("backward", "addcmul")):
        of = replace(case("add_rms_norm", pass_), shape=(8192, 4096))
        record = replace(Record.of(of, OURS, HERE), ceiling_us=2.0, device_us=4.0, ok=True)
        text = shown(report.table([record]))
        assert f"Add and RMSNorm {pass_}, bfloat16" in text
        assert f"of {name}: that of torch's {name} over it" in text
        assert f"8192×4096 {name} 2.00" in text
        found = predict.Prediction(of, "sm_80", ())
        assert f"of {name}" in shown(report.prediction_table([found]))
    nothing = SimpleNamespace(bandwidth=None, seconds=None, bytes_read=None, bytes_written=None, l2_hits=None)
    nothing = SimpleNamespace(**vars(nothing), sectors=None, warps=None, issue=None, registers=None, stalls={})
    assert "torch.addcmul" in shown(profile.table(case("add_rms_norm", "backward"), nothing, []))  # type: ignore[arg-type]


@pytest.mark.parametrize("pass_", cases.PASSES)
def test_what_does_as_the_ceiling_does_takes_its_time(pass_: str) -> None:
    of = replace(case("add_rms_norm", pass_), shape=(1024, 1024))
    tensor = torch.empty(4 * of.elements * 2, dtype=torch.uint8, device="meta")
    code = predict.Compiled("made_up", "sm_90", 4, 32, 0, 0, {}, {}, {}, {}, 0)
    call = predict.Call(None, (1,), (tensor,), {})  # type: ignore[arg-type]
    found = predict.Prediction(of, "sm_90", (predict.Kernel(call, code, code),))
    assert found.ceiling_ratio == pytest.approx(1)


# --- chains ---


@pytest.mark.parametrize("op", SUM_OPS)
def test_a_chain_hands_on_y_and_the_stream(op: str, device: torch.device) -> None:
    of = case(op, CHAIN)
    expected = measure.expect(of, of.draw(device))
    x, residual, *parameters = expected.inputs.arguments
    for own in zip(*parameters, strict=True):
        x, residual = added(op, x, residual, *own)
    assert [name for name, *_ in expected.results] == ["y", "sum"]
    for by_torch, (*_, found) in zip((x, residual), expected.results, strict=True):
        assert torch.equal(found, by_torch)
    for provider in providers.load(["torch"])[0]:
        results = measure._chain(of, provider.build(of))(*expected.inputs.arguments)
        for found in measure.compared(results, expected):
            assert found.ok, (provider.name, found)


@pytest.mark.parametrize("lost", ["y", "sum"])
def test_a_link_that_hands_on_something_else_is_found(lost: str) -> None:
    of = case("add_rms_norm", CHAIN)
    expected = measure.expect(of, of.draw(CPU))
    calls = iter(range(LINKS))

    def norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        y, total = added("add_rms_norm", x, residual, weight)
        if next(calls) == LINKS // 2:
            return (y.roll(1, -1), total) if lost == "y" else (y, residual)
        return y, total

    found = measure.compared(measure._chain(of, norm)(*expected.inputs.arguments), expected)
    assert not all(one.ok for one in found)


# --- peers ---


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins of the peers' modules, with the functions that their users call."""

    def liger(x: Tensor, r: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        assert eps == 1e-6
        return added("add_rms_norm", x, r, w)

    def quack(x: Tensor, weight: Tensor, *, residual: Tensor, eps: float, prenorm: bool) -> tuple[Tensor, Tensor]:
        assert (eps, prenorm) == (1e-6, True)
        return added("add_rms_norm", x, residual, weight)

    modules = {
        "liger_kernel.transformers.functional": SimpleNamespace(liger_fused_add_rms_norm=liger),
        "quack.rmsnorm": SimpleNamespace(rmsnorm=quack),
    }
    monkeypatch.setattr(importlib, "import_module", modules.__getitem__)


@pytest.mark.parametrize("pass_", cases.PASSES)
def test_peers_are_called_as_their_users_call_them(pass_: str, installed: None) -> None:
    of = case("add_rms_norm", pass_)
    expected = measure.expect(of, of.draw(CPU))
    for name in ("liger", "quack"):
        peer = providers.PEERS[name]()
        found = measure.verify(lambda peer=peer: peer.build(of), expected, STILL).comparisons  # type: ignore[arg-type]
        assert [one.what for one in found] == (["y", "sum"] if pass_ == "forward" else ["dx", "dr", "dw"])
        assert all(one.ok for one in found), found
        assert "add_layer_norm" not in peer.ops


def test_a_backward_that_loses_the_sums_gradient_is_found() -> None:
    of = case("add_layer_norm", "backward")
    expected = measure.expect(of, of.draw(CPU))

    def norm(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        y, total = added("add_layer_norm", *arguments)
        return y, total.detach() + 0 * total

    found = measure.verify(lambda: norm, expected, STILL).comparisons  # type: ignore[arg-type]
    assert [one.what for one in found if not one.ok] == ["dx", "dr"]


# --- what is compiled ---


def test_every_tensor_is_given_to_the_kernels_once() -> None:
    rows, row = 8192 * 4096 * 2, 4096 * 2
    (forward,) = predict.launches(replace(case("add_rms_norm", "forward"), shape=(8192, 4096)))
    assert sum(arg.nbytes for arg in forward.args if isinstance(arg, Tensor)) == 4 * rows + row
    backward, _ = predict.launches(replace(case("add_rms_norm", "backward"), shape=(8192, 4096)))
    partials = backward.grid[0] * 4096 * 4
    given = sum(arg.nbytes for arg in backward.args if isinstance(arg, Tensor))
    assert given == 4 * rows + row + 8192 * 4 + partials


def _printed(*arguments: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["inspect", *arguments]) == 0
    return out.getvalue()


def test_inspect_compiles_them(compiling: Executor) -> None:
    arguments = ("add_rms_norm", "--shape", "64x1024", "--json", "-")
    forward, backward = (json.loads(line) for line in compiling.submit(_printed, *arguments).result().splitlines())
    assert (forward["kernel"], backward["kernel"]) == ("row_forward", "row_backward_few")
    assert forward["bytes"] == forward["call_bytes"] == 4 * 64 * 1024 * 2 + 1024 * 2
    assert not forward["spills"]
    assert not backward["spills"]
