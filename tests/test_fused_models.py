"""``fuse`` of transformers' models: the same results as without it, in every way that a model is run."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

import trinorm
from transformers_models import MODELS, given, made, result
from trinorm import residuals
from trinorm.compare import assert_no_worse

# What two layers have: norms that the report has as fused; sums that a call has with a norm, and those of them that go from
# one layer into the other; and norms whose backward adds the stream's gradient.
SUMS = dict.fromkeys(MODELS, (4, 3, 1, 2))
# Whose norms are of a branch, before the sum; whose one norm begins a layer; and whose first sum is of another shape.
SUMS.update(Olmo2=(0, 0, 0, 0), Cohere=(2, 1, 1, 2), Bert=(5, 4, 0, 0))


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The norms that were computed with their sum, one by one."""
    norms: list[object] = []
    actual = residuals._both

    def noted(norm: object, a: object, b: object) -> object:
        both = actual(norm, a, b)
        norms.extend([norm] * (both is not None))
        return both

    monkeypatch.setattr(residuals, "_both", noted)
    return norms


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was made of streams, whose gradients come together, one by one."""
    found: list[object] = []
    actual = residuals._stream
    monkeypatch.setattr(residuals, "_stream", lambda *of: (found.append(actual(*of)), found[-1])[1])
    return found


def pair(name: str, device: torch.device, **how: Any) -> tuple[torch.nn.Module, torch.nn.Module, trinorm.Report]:
    """(a model whose norms are replaced, one that is fused besides, what fuse said)."""
    replaced = made(name, **how).to(device)
    trinorm.replace(replaced)
    fused = copy.deepcopy(replaced)
    return replaced, fused, trinorm.fuse(fused)


def gradients(model: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(1)  # what is dropped
    y = result(model, x)
    y.square().mean().backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return y.detach(), found


def of_float64(model: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    return gradients(copy.deepcopy(model).double(), x.double() if x.is_floating_point() else x)


def assert_gradients_no_worse(grads: list[torch.Tensor], *others: list[torch.Tensor]) -> None:
    assert_no_worse("gradients", *(torch.cat([g.flatten() for g in found]) for found in (grads, *others)))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients(
    name: str, training: bool, device: torch.device, together: list[object], streams: list[object]
) -> None:
    """In fp32 the bits of the replaced model, where, as on a CPU, one kernel computes a row in both."""
    replaced, fused, report = pair(name, device)
    (said, sums, handed, norms), x = SUMS[name], given(name).to(device)
    assert len(report.fused) == said
    (want, grads_want), (y, grads) = (gradients(model.train(training), x) for model in (replaced, fused))
    assert len(together) == sums - handed
    assert len(streams) == norms and None not in streams
    with torch.no_grad():
        torch.manual_seed(1)
        without = result(fused, x)
    assert len(together) == 2 * sums - handed and len(streams) == norms
    assert torch.equal(without, y)
    if device.type == "cpu":
        assert torch.equal(y, want)
        assert all(torch.equal(a, b) for a, b in zip(grads, grads_want, strict=True))
    elif not training:  # in float64 others would be dropped
        before = made(name).to(device)
        (exact, grads_exact), (yard, grads_yard) = of_float64(before, x), gradients(before, x)
        assert_no_worse("y", y, exact, yard)
        assert_gradients_no_worse(grads, grads_exact, grads_yard)


@pytest.mark.parametrize("name", ["Llama", "Gemma3", "Bert"])
def test_values_and_gradients_in_bf16(name: str, device: torch.device) -> None:
    """No further from float64 than the model was before; the values with the bits of the replaced one."""
    before, x = made(name).to(device, torch.bfloat16), given(name).to(device)
    replaced = copy.deepcopy(before)
    trinorm.replace(replaced)
    fused = copy.deepcopy(replaced)
    assert trinorm.fuse(fused).fused
    (y, grads), (yard, grads_yard), (exact, grads_exact) = gradients(fused, x), gradients(before, x), of_float64(before, x)
    if device.type == "cpu":
        assert torch.equal(y, result(replaced, x))
    assert_no_worse("y", y, exact, yard)
    assert_gradients_no_worse(grads, grads_exact, grads_yard)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["Llama", "GPT2", "Bert", "ViT"])
def test_gradient_checkpointing(name: str, reentrant: bool, device: torch.device) -> None:
    """Which a layer's base class sees to, also in the class that is made of it."""
    replaced, fused, _ = pair(name, device)
    x, found, calls = given(name).to(device), [], []
    for model in (replaced, fused):
        model.train()
        # 5.23 has another name for it.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})
        if reentrant:  # it wants an input that requires a gradient
            embedding = next(m for m in model.modules() if isinstance(m, (torch.nn.Embedding, torch.nn.Conv2d)))
            embedding.register_forward_hook(lambda *of: of[2].requires_grad_())
        for layer in model.modules():
            if checkpoint := vars(layer).get("_gradient_checkpointing_func"):
                layer._gradient_checkpointing_func = lambda *of, to=checkpoint: (calls.append(of), to(*of))[1]
        found.append((gradients(model, x), len(calls)))
    ((want, grads_want), layers), ((y, grads), both) = found
    assert both == 2 * layers > 0
    assert torch.equal(y, want)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_want, strict=True))


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Gemma3", "GPT2"])
def test_64_generated_tokens(name: str, device: torch.device, together: list[object]) -> None:
    """Those of the model as it was, in fp32, with its cache."""
    model, x = made(name).to(device), given(name)[:1].to(device)
    how = dict(max_new_tokens=64, do_sample=False, use_cache=True)
    words = model.generate(x, **how)
    trinorm.replace(model)
    trinorm.fuse(model)
    assert torch.equal(model.generate(x, **how), words)
    assert words.shape == (1, 9 + 64) and len(together) == 64 * 3


def test_in_one_compiled_graph(device: torch.device) -> None:
    replaced, fused, _ = pair("Llama", device)
    x, ops = given("Llama").to(device), []

    def noted(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        ops.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(fused, fullgraph=True, backend=noted)
    with torch.no_grad():
        assert torch.equal(result(compiled, x), result(replaced, x))
    (want, grads_want), (y, grads) = gradients(replaced, x), gradients(compiled, x)
    assert torch.equal(y, want) and all(torch.equal(a, b) for a, b in zip(grads, grads_want, strict=True))
    assert [ops.count(f"trinorm.{op}") for op in ("add_rms_norm", "rms_norm")] == [2 * 2, 2 * 3]


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_copies_pickles_checkpoints_and_back(name: str, device: torch.device, together: list[object]) -> None:
    plain = made(name).to(device)
    classes, kept = [type(m) for m in plain.modules()], [set(vars(m)) for m in plain.modules()]
    replaced, fused, _ = pair(name, device)
    x, file = given(name).to(device), io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    with torch.no_grad():
        want = result(replaced, x)
        for other in (fused, copy.deepcopy(fused), torch.load(file, weights_only=False)):
            together.clear()
            assert [type(m) for m in other.modules()] == [type(m) for m in fused.modules()]
            assert torch.equal(result(other, x), want)
            # Norms of its own, and those of two layers as well.
            assert len(together) == 3 and {id(m) for m in together} <= {id(m) for m in other.modules()}
    assert other.state_dict().keys() == plain.state_dict().keys()
    other.load_state_dict(plain.state_dict())
    assert len(trinorm.restore(fused)) == 5 + 2
    assert [type(m) for m in fused.modules()] == classes and [set(vars(m)) for m in fused.modules()] == kept


def test_hidden_states_and_their_gradients(device: torch.device) -> None:
    """Of what a layer returns the whole gradient is known, and who writes to it changes what the next one normalizes."""
    replaced, fused, _ = pair("Llama", device)
    x, found = given("Llama").to(device), []
    for model in (replaced, fused):
        y = model(x, output_hidden_states=True)
        found.append((*y.hidden_states, *torch.autograd.grad(y.logits.square().mean(), y.hidden_states[:2])))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    for model in (replaced, fused):
        model.model.layers[0].register_forward_hook(lambda *of: of[2].mul_(2))
        assert torch.equal(result(model, x), result(replaced, x))
    with torch.no_grad():
        assert torch.equal(result(fused, x), result(replaced, x))


def test_under_autocast_with_a_wider_stream(device: torch.device) -> None:
    """A branch in bf16, and a residual in fp32."""
    replaced, fused, _ = pair("GPT2", device)
    x = given("GPT2").to(device)
    with torch.autocast(device.type, torch.bfloat16):
        (want, grads_want), (y, grads) = gradients(replaced, x), gradients(fused, x)
    assert y.dtype == want.dtype
    if device.type == "cpu":
        assert torch.equal(y, want) and all(torch.equal(a, b) for a, b in zip(grads, grads_want, strict=True))
