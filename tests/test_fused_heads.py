"""``fuse`` of queries' and keys' norms with the rotary embedding behind them: the same results as without it."""

from __future__ import annotations

import copy
import io

import pytest
import torch

import trinorm
from machine import ON_GPU
from test_fused_models import of_input
from transformers_models import given, made, result
from trinorm.compare import assert_no_worse
from trinorm.ops import road
from unfused import Float64, assert_as_unfused, exact_copy, flat

MODELS = ["Qwen3", "Gemma3"]


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


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients(name: str, training: bool, device: torch.device, heads_together: list[bool]) -> None:
    replaced, fused, report = pair(name, device)
    heads = [entry for entry in report.fused if entry.to]
    assert [entry.path.split(".", 2)[2] for entry in heads] == [f"{i}.self_attn.{x}_norm" for i in (0, 1) for x in "qk"]
    assert {entry.to for entry in heads} == {"trinorm.functional.qk_norm, of float32, bfloat16, float16"}
    x = given(name).to(device)
    assert_as_unfused(of_input(x), fused.train(training), replaced.train(training), by_bits=False)
    assert heads_together == [True] * 2
    with torch.no_grad():
        assert_as_unfused(of_input(x), fused, replaced, by_bits=False)
    assert heads_together == [True] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_no_further_from_float64_in_16_bits(
    name: str, dtype: torch.dtype, device: torch.device, heads_together: list[bool]
) -> None:
    """Than the model as it was: values and gradients."""
    before, x = made(name).to(device, dtype), given(name).to(device)
    _, fused, _ = pair(name, device, dtype)
    found, yard, alone = of_input(x)(fused), of_input(x)(before), exact_copy(before)
    with Float64():
        exact = of_input(x)(alone)
    assert heads_together == [True] * 2
    for what in exact:
        assert_no_worse(what, *(flat(those[what]) for those in (found, exact, yard)))


@pytest.mark.skipif(ON_GPU, reason="of a CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_bits_of_torchs_operators(
    name: str, dtype: torch.dtype, device: torch.device, heads_together: list[bool], by_torch: None
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
    assert heads_together == [True] * 2
    (y, of_unfused), (of_fused_y, of_fused) = found
    assert torch.equal(y, of_fused_y)
    if dtype == torch.float32:
        differ = {n.rsplit(".", 2)[1] for n, g in of_unfused.items() if not torch.equal(g, of_fused[n])}
        assert differ <= {"q_norm", "k_norm"}


@pytest.mark.parametrize("name", MODELS)
def test_64_generated_tokens(name: str, device: torch.device, heads_together: list[bool]) -> None:
    """Those of the model as it was, in fp32, with its cache."""
    model, x = made(name).to(device), given(name)[:1].to(device)
    how = dict(max_new_tokens=64, do_sample=False, use_cache=True)
    words = model.generate(x, **how)
    trinorm.replace(model)
    trinorm.fuse(model)
    assert torch.equal(model.generate(x, **how), words)
    assert words.shape == (1, 9 + 64) and heads_together == [True] * 64 * 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, device: torch.device, heads_together: list[bool]) -> None:
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
    assert heads_together == [True] * 4


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


def test_copies_pickles_and_back(device: torch.device, heads_together: list[bool]) -> None:
    plain = made("Qwen3").to(device)
    classes, kept = [type(m) for m in plain.modules()], [set(vars(m)) for m in plain.modules()]
    replaced, fused, _ = pair("Qwen3", device)
    x, file = given("Qwen3").to(device), io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    with torch.no_grad():
        for other in (copy.deepcopy(fused), torch.load(file, weights_only=False)):
            heads_together.clear()
            assert_as_unfused(of_input(x), other, replaced, by_bits=False)
            assert heads_together == [True] * 2
    assert other.state_dict().keys() == plain.state_dict().keys()
    assert {"model.layers.0.self_attn", "model.layers.0.self_attn.q_norm"} <= set(trinorm.restore(fused))
    assert [type(m) for m in fused.modules()] == classes and [set(vars(m)) for m in fused.modules()] == kept
    heads_together.clear()
    assert torch.equal(result(fused, x), result(plain, x)) and not heads_together


def test_norms_of_all_heads_at_once_are_left() -> None:
    _, _, report = pair("Olmo2", torch.device("cpu"))
    reasons = {entry.path.rsplit(".", 1)[1]: entry.reason for entry in report.left}
    for name in ("q_norm", "k_norm"):
        assert "divides its result into heads" in reasons[name]
