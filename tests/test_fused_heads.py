"""``fuse`` of queries' and keys' norms with the rotary embedding behind them: the same results as without it."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor

import trinorm
import written_heads
from machine import ON_GPU
from test_fused_models import of_input
from transformers_models import given, made, result
from trinorm import heads_fused
from trinorm.compare import assert_no_worse
from trinorm.made import ROTARY
from trinorm.ops import road
from unfused import Float64, Results, assert_as_unfused, exact_copy, flat
from written_heads import Attention
from written_norms import BeforeTheWeightNorm, OneAndAWeight, named_norm

MODELS = ["Qwen3", "Gemma3"]


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of queries and keys whose norms were put off, whether they were computed together with the rotary embedding."""
    found: list[bool] = []
    actual = heads_fused._both

    def noted(*given: Any) -> object:
        both = actual(*given)
        found.append(both is not None)
        return both

    monkeypatch.setattr(heads_fused, "_both", noted)
    return found


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU as it is, without the interpreter."""
    monkeypatch.setattr(road, "_is_launched_on", lambda x: x.is_cuda)


def pair(
    name: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[torch.nn.Module, torch.nn.Module, trinorm.Report]:
    """(a model whose norms are replaced, one that is fused besides, what fuse said)."""
    replaced = made(name).to(device, dtype)
    trinorm.replace(replaced)
    fused = copy.deepcopy(replaced)
    return replaced, fused, trinorm.fuse(fused)


# --- transformers' models ---


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients(name: str, training: bool, device: torch.device, together: list[bool]) -> None:
    replaced, fused, report = pair(name, device)
    heads = [entry for entry in report.fused if entry.to]
    assert [entry.path.split(".", 2)[2] for entry in heads] == [f"{i}.self_attn.{x}_norm" for i in (0, 1) for x in "qk"]
    assert {entry.to for entry in heads} == {"trinorm.functional.qk_norm, of float32, bfloat16, float16"}
    x = given(name).to(device)
    assert_as_unfused(of_input(x), fused.train(training), replaced.train(training), by_bits=False)
    assert together == [True] * 2
    with torch.no_grad():
        assert_as_unfused(of_input(x), fused, replaced, by_bits=False)
    assert together == [True] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_no_further_from_float64_in_16_bits(
    name: str, dtype: torch.dtype, device: torch.device, together: list[bool]
) -> None:
    """Than the model as it was: values and gradients."""
    before, x = made(name).to(device, dtype), given(name).to(device)
    _, fused, _ = pair(name, device, dtype)
    found, yard, alone = of_input(x)(fused), of_input(x)(before), exact_copy(before)
    with Float64():
        exact = of_input(x)(alone)
    assert together == [True] * 2
    for what in exact:
        assert_no_worse(what, *(flat(those[what]) for those in (found, exact, yard)))


@pytest.mark.skipif(ON_GPU, reason="of a CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_bits_of_torchs_operators(
    name: str, dtype: torch.dtype, device: torch.device, together: list[bool], by_torch: None
) -> None:
    """Where the norm rounds as the model does; and of the gradients in fp32, but for the heads' weights, which are summed
    in another order.
    """
    replaced, fused, _ = pair(name, device, dtype)
    if name == "Gemma3" and dtype != torch.float32:
        pytest.skip("it rounds the norm's result before the rotary embedding, where qk_norm does not")
    x, found = given(name), []
    for model in (replaced, fused):
        y = result(model, x)
        y.square().mean().backward()
        found.append((y, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert together == [True] * 2
    (y, of_unfused), (of_fused_y, of_fused) = found
    assert torch.equal(y, of_fused_y)
    if dtype == torch.float32:
        differ = {n.rsplit(".", 2)[1] for n, g in of_unfused.items() if not torch.equal(g, of_fused[n])}
        assert differ <= {"q_norm", "k_norm"}


@pytest.mark.parametrize("name", MODELS)
def test_64_generated_tokens(name: str, device: torch.device, together: list[bool]) -> None:
    """Those of the model as it was, in fp32, with its cache."""
    model, x = made(name).to(device), given(name)[:1].to(device)
    how = dict(max_new_tokens=64, do_sample=False, use_cache=True)
    words = model.generate(x, **how)
    trinorm.replace(model)
    trinorm.fuse(model)
    assert torch.equal(model.generate(x, **how), words)
    assert words.shape == (1, 9 + 64) and together == [True] * 64 * 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, device: torch.device, together: list[bool]) -> None:
    replaced, fused, _ = pair("Qwen3", device)
    x, alone = given("Qwen3").to(device), copy.deepcopy(replaced).train()
    for model in (replaced, fused):
        model.train()
        # 5.23 has another name for it.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})
        if reentrant:  # it wants an input that requires a gradient
            model.model.embed_tokens.register_forward_hook(lambda *of: of[2].requires_grad_())
    assert_as_unfused(of_input(x), fused, replaced, alone, by_bits=False)
    assert together == [True] * 4


@pytest.mark.parametrize("name", MODELS)
def test_in_one_compiled_graph(name: str, device: torch.device) -> None:
    replaced, fused, _ = pair(name, device)
    x, ops = given(name).to(device), []

    def noted(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        ops.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(fused, fullgraph=True, backend=noted)
    with torch.no_grad():
        assert_as_unfused(of_input(x), compiled, replaced, by_bits=False)
    assert_as_unfused(of_input(x), compiled, replaced, by_bits=False)
    assert ops.count("trinorm.qk_norm") == 2 * 2


def test_copies_pickles_and_back(device: torch.device, together: list[bool]) -> None:
    plain = made("Qwen3").to(device)
    classes, kept = [type(m) for m in plain.modules()], [set(vars(m)) for m in plain.modules()]
    replaced, fused, _ = pair("Qwen3", device)
    x, file = given("Qwen3").to(device), io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    with torch.no_grad():
        for other in (copy.deepcopy(fused), torch.load(file, weights_only=False)):
            together.clear()
            assert_as_unfused(of_input(x), other, replaced, by_bits=False)
            assert together == [True] * 2
    assert other.state_dict().keys() == plain.state_dict().keys()
    assert {"model.layers.0.self_attn", "model.layers.0.self_attn.q_norm"} <= set(trinorm.restore(fused))
    assert [type(m) for m in fused.modules()] == classes and [set(vars(m)) for m in fused.modules()] == kept
    together.clear()
    assert torch.equal(result(fused, x), result(plain, x)) and not together


def test_norms_of_all_heads_at_once_are_left() -> None:
    _, _, report = pair("Olmo2", torch.device("cpu"))
    reasons = {entry.path.rsplit(".", 1)[1]: entry.reason for entry in report.left}
    for name in ("q_norm", "k_norm"):
        assert "divides its result into heads" in reasons[name]


# --- forwards that are written out ---


def both_of(kind: type[Attention], device: torch.device, **how: Any) -> tuple[Attention, Attention, trinorm.Report]:
    """(an attention whose norms are replaced, one that is fused besides, what fuse said)."""
    torch.manual_seed(0)
    before = kind(**how).to(device)
    trinorm.replace(before)
    after = copy.deepcopy(before)
    return before, after, trinorm.fuse(after)


def inputs(kind: type[Attention], device: torch.device) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    angles = torch.randn(2, 5, written_heads.SIZE // kind.parts, device=device) * 3
    return torch.randn(2, 5, written_heads.HEADS * written_heads.SIZE, device=device), (angles.cos(), angles.sin())


def run_on(x: Tensor, angles: tuple[Tensor, Tensor], *more: Any) -> Any:
    def run(model: Any) -> Results:
        dtype = model.q_proj.weight.dtype
        of = x.detach().to(dtype).requires_grad_()
        results = model(of, tuple(t.to(dtype) for t in angles), *more)
        dys = [torch.linspace(-1, 1, y.numel(), dtype=dtype, device=y.device).view(y.shape) for y in results]
        parameters = [p for p in model.parameters() if p.requires_grad]
        dx, *others = torch.autograd.grad(results, [of, *parameters], dys, allow_unused=True)
        return {"y": [*results], "dx": [dx], "others": [g for g in others if g is not None]}

    return run


TOGETHER: list[tuple[type[Attention], dict[str, Any]]] = [
    (Attention, {}),
    (Attention, dict(norm=named_norm(OneAndAWeight))),
    (Attention, dict(norm=torch.nn.RMSNorm)),
    (written_heads.BehindTransposing, {}),
    (written_heads.BehindTransposing, dict(norm=torch.nn.RMSNorm)),
    (written_heads.Named, {}),
    (written_heads.Perhaps, {}),
    (written_heads.Interleaved, {}),
    (written_heads.Partial, {}),
    (written_heads.OfTokensAlone, {}),
    (written_heads.Inheriting, {}),
]


@pytest.mark.parametrize(("kind", "how"), TOGETHER, ids=lambda value: getattr(value, "__name__", ""))
def test_heads_that_go_together(
    kind: type[Attention], how: dict[str, Any], device: torch.device, together: list[bool]
) -> None:
    before, after, report = both_of(kind, device, **how)
    assert [entry.path for entry in report.fused] == ["q_norm", "k_norm"] and not report.left
    assert type(after).__name__ == kind.__name__ and isinstance(after, kind)
    x, angles = inputs(kind, device)
    assert_as_unfused(run_on(x, angles), after, before, by_bits=False)
    assert together == [True]
    assert [y.stride() for y in after(x, angles)] == [y.stride() for y in before(x, angles)]
    trinorm.restore(after)
    assert type(after) is kind and ROTARY not in vars(after)


def test_as_many_tokens_as_a_head_has_elements_and_none(device: torch.device, together: list[bool]) -> None:
    kind = written_heads.BehindTransposing
    before, after, _ = both_of(kind, device)
    x, (cos, sin) = inputs(kind, device)
    x, cos, sin = (t.repeat(1, 2, 1)[:, : written_heads.SIZE] for t in (x, cos, sin))
    assert_as_unfused(run_on(x, (cos, sin)), after, before, by_bits=False)
    assert [y.shape for y in after(x[:0], (cos[:0], sin[:0]))] == [y.shape for y in before(x[:0], (cos[:0], sin[:0]))]
    assert together == [True, False]


def test_where_no_norm_is_asked_for(device: torch.device, together: list[bool]) -> None:
    before, after, _ = both_of(written_heads.Perhaps, device)
    x, angles = inputs(written_heads.Perhaps, device)
    assert_as_unfused(run_on(x, angles, False), after, before)
    assert not together


APART: dict[type[Attention], str] = {
    written_heads.Elsewhere: "has its result too",
    written_heads.Later: "has its result too",
    written_heads.Kept: "another function has its result",
    written_heads.WrittenTo: "writes to a tensor",
    written_heads.Scaled: "no sum",
    written_heads.Divided: "divides its result into heads",
    written_heads.Sometimes: "is not always run",
    written_heads.NormBehind: "has turned, and not before it",
    written_heads.OfOne: "only one of the two",
    written_heads.Backwards: "no rotary embedding that qk_norm has",
    written_heads.Starred: "no sum",
    written_heads.OwnForward: "no sum",
    written_heads.Different: "differ in what they compute",
    written_heads.LayerNorms: "which its norms are not",
}


@pytest.mark.parametrize("kind", APART, ids=lambda kind: kind.__name__)
def test_heads_that_stay_apart(kind: type[Attention], device: torch.device, together: list[bool]) -> None:
    before, after, report = both_of(kind, device)
    assert not report.fused and type(after) is kind
    assert APART[kind] in {entry.path: entry.reason for entry in report.left}["q_norm"]
    x, angles = inputs(kind, device)
    assert_as_unfused(lambda model: {"y": [*model(x, angles)]} if model in (before, after) else {}, after, before)
    assert not together


# --- at a call ---


def test_hooks_and_whatever_else_has_changed_since(
    device: torch.device, together: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after, _ = both_of(Attention, device)
    x, angles = inputs(Attention, device)
    seen: list[object] = []

    def alike() -> None:
        together.clear()
        assert_as_unfused(run_on(x, angles), after, before)

    hooks = [model.q_norm.register_forward_hook(lambda *of: (seen.append(of), of[2] * 2)[1]) for model in (before, after)]
    together.clear()
    assert torch.equal(after(x, angles)[0], before(x, angles)[0])
    assert not together and len(seen) == 2
    for hook in hooks:
        hook.remove()
    # Of the attention itself they see what they did.
    hook = after.register_forward_hook(lambda *of: seen.append(of))
    assert_as_unfused(run_on(x, angles), after, before, by_bits=False)
    hook.remove()
    assert len(seen) == 3 and together == [True]
    for model in (before, after):
        model.k_norm.variance_epsilon = 0.5
    alike()
    assert together == [False]
    before, after, _ = both_of(Attention, device)
    turn = written_heads.turn
    monkeypatch.setattr(written_heads, "turn", lambda q, k, cos, sin: turn(q, k, cos, -sin))
    alike()
    assert together == [False]


def test_hooked_norms_are_left(device: torch.device) -> None:
    model = Attention().to(device)
    trinorm.replace(model)
    model.q_norm.register_forward_hook(lambda *of: None)
    reasons = {entry.path: entry.reason for entry in trinorm.fuse(model).left}
    assert "hooks" in reasons["q_norm"] and "only one of the two" in reasons["k_norm"]
    assert type(model) is Attention


def test_calls_that_were_not_compared(device: torch.device, together: list[bool]) -> None:
    """Angles of another dtype, whose results would have that; of one head each; with a gradient; float64."""
    before, after, _ = both_of(Attention, device)
    before.bfloat16(), after.bfloat16()
    x, (cos, sin) = inputs(Attention, device)
    x = x.bfloat16()
    assert [y.dtype for y in after(x, (cos, sin))] == [torch.float32] * 2
    after(x, (cos.bfloat16(), sin.bfloat16()))
    after(x[:1, :2], (cos.bfloat16()[:1, :1], sin.bfloat16()[:1, :1]))
    after(x, (cos.bfloat16()[:1], sin.bfloat16()[:1]))
    with_gradient = cos.bfloat16().requires_grad_()
    after(x, (with_gradient, sin.bfloat16()))[0].float().sum().backward()
    assert with_gradient.grad is not None
    assert together == [False, True, False, True, False]
    before.double(), after.double()
    angles = cos.double(), sin.double()
    assert all(torch.equal(*of) for of in zip(after(x.double(), angles), before(x.double(), angles), strict=True))
    assert together[-1] is False


def test_under_autocast(device: torch.device, together: list[bool]) -> None:
    """Of which projections in bf16 come, beside angles in either dtype."""
    before, after, _ = both_of(Attention, device)
    x, (cos, sin) = inputs(Attention, device)
    for model in (before, after):
        for norm in (model.q_norm, model.k_norm):
            norm.bfloat16()
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            found, unfused = (model(x, (cos.to(dtype), sin.to(dtype))) for model in (after, before))
        assert [(y.dtype, y.shape) for y in found] == [(y.dtype, y.shape) for y in unfused]
        for one, other in zip(found, unfused, strict=True):
            torch.testing.assert_close(one, other)
    assert together == [False, True]


def test_a_model_on_meta_and_a_report_that_is_a_table() -> None:
    rich = pytest.importorskip("rich.console")
    model = Attention(BeforeTheWeightNorm).to("meta")
    trinorm.replace(model)
    report = trinorm.fuse(model)
    angles = torch.empty(2, 5, 8, device="meta")
    assert all(y.is_meta for y in model(torch.empty(2, 5, 24, device="meta"), (angles, angles)))
    console = rich.Console(width=200, record=True)
    console.print(report)
    for shown in (console.export_text(), str(report)):
        for word in ("2 fused, 0 left", "trinorm.functional.qk_norm, of float32", "turn(query, key, cos, sin), line "):
            assert word in shown
