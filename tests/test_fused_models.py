"""``fuse`` of transformers' models: the same results as without it, in every way that a model is run."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch

import trinorm
from data_parallel import ON_TWO_GPUS, data_parallel
from transformers_models import MODELS, given, made, result
from trinorm.compare import assert_no_worse
from trinorm.models import residuals
from unfused import Float64, Results, assert_as_unfused, exact_copy, flat

pytestmark = pytest.mark.usefixtures("every_sum")

# What two layers have: norms that the report has as fused; sums that a call has with a norm, and those of them that go from
# one layer into the other; and norms whose backward adds the stream's gradient.
SUMS = dict.fromkeys(MODELS, (4, 3, 1, 2))
# Whose norms are of a branch, before the sum; whose one norm begins a layer; and whose first sum is of another shape.
SUMS.update(Olmo2=(0, 0, 0, 0), Cohere=(2, 1, 1, 2), Bert=(5, 4, 0, 0))

# Whose queries and keys are normalized together, with their rotary embedding: test_fused_heads.py.
QK_NORMS = ("Qwen3", "Gemma3")


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The norms that were computed with their sum, one by one."""
    norms: list[object] = []
    actual = residuals._both

    def noted(norm: object, *of: object) -> object:
        both = actual(norm, *of)
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


def of_input(x: torch.Tensor) -> Callable[[Any], Results]:
    """What a model returns for it, and the gradients of what it was called with."""

    def run(model: Any) -> Results:
        y = result(model, x.to(next(model.parameters()).dtype) if x.is_floating_point() else x)
        found: Results = {"y": [y.detach()]}
        if y.requires_grad:
            y.square().mean().backward()
            found["gradients"] = [p.grad for p in model.parameters() if p.grad is not None]
            model.zero_grad()
        return found

    return run


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients(
    name: str, training: bool, device: torch.device, together: list[object], streams: list[object]
) -> None:
    replaced, fused, report = pair(name, device)
    (said, sums, handed, norms), x = SUMS[name], given(name).to(device)
    assert sum(not entry.to for entry in report.fused) == said
    replaced.train(training)
    by_bits = name not in QK_NORMS
    assert_as_unfused(of_input(x), fused.train(training), replaced, by_bits=by_bits)
    assert len(together) == sums - handed
    assert len(streams) == norms and None not in streams
    with torch.no_grad():
        assert_as_unfused(of_input(x), fused, replaced, by_bits=by_bits)
    assert len(together) == 2 * sums - handed and len(streams) == norms


@pytest.mark.parametrize("name", ["Llama", "Gemma3", "Bert"])
def test_values_and_gradients_in_bf16(name: str, device: torch.device) -> None:
    """No further from float64 than the model was before; on a CPU the values have the bits of the replaced one."""
    before, x = made(name).to(device, torch.bfloat16), given(name).to(device)
    replaced = copy.deepcopy(before)
    trinorm.replace(replaced)
    fused = copy.deepcopy(replaced)
    assert trinorm.fuse(fused).fused
    with torch.no_grad():
        assert_as_unfused(of_input(x), fused, replaced, by_bits=name not in QK_NORMS)
    found, yard, alone = of_input(x)(fused), of_input(x)(before), exact_copy(before)
    with Float64():
        exact = of_input(x)(alone)
    for what in exact:
        assert_no_worse(what, *(flat(those[what]) for those in (found, exact, yard)))


@pytest.mark.filterwarnings("ignore:Was asked to gather along dimension 0")  # of what else a model returns
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Gemma3", "GPT2", "Bert"])
def test_data_parallel(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch, together: list[object]) -> None:
    """Its copies have fused norms too."""
    replaced, fused, _ = pair(name, device)
    x = given(name).to(device).repeat(2, 1)  # of one sample alone BERT's sum of positions fits too

    def run(model: torch.nn.Module) -> Results:
        y = result(data_parallel(model, monkeypatch), x)
        y.square().mean().backward()
        return {"y": [y.detach()], "gradients": [p.grad for p in model.parameters() if p.grad is not None]}

    assert_as_unfused(run, fused, replaced, by_bits=name not in QK_NORMS)
    of_a_copy = SUMS[name][1] - SUMS[name][2]  # with gradients none is handed on
    assert len(together) == of_a_copy * (2 if ON_TWO_GPUS else 1)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["Llama", "GPT2", "Bert", "ViT"])
def test_gradient_checkpointing(name: str, reentrant: bool, device: torch.device) -> None:
    """Which a layer's base class sees to, also in the class that is made of it."""
    replaced, fused, _ = pair(name, device)
    x, alone, calls, counts = given(name).to(device), copy.deepcopy(replaced).train(), [], []
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

    def run(model: torch.nn.Module) -> Results:
        found = of_input(x)(model)
        counts.append(len(calls))
        return found

    assert_as_unfused(run, fused, replaced, alone)
    assert counts[1] == 2 * counts[0] > 0


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Gemma3", "GPT2"])
def test_64_generated_tokens(name: str, device: torch.device, together: list[object]) -> None:
    """Those of the model as it was, in fp32, with its cache.

    Each word is ahead of the next best by 6e-5 at least, and on a CPU no logit moves by more than 3e-7.
    """
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
        assert_as_unfused(of_input(x), compiled, replaced)
    assert_as_unfused(of_input(x), compiled, replaced)
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
        for other in (fused, copy.deepcopy(fused), torch.load(file, weights_only=False)):
            together.clear()
            assert [type(m) for m in other.modules()] == [type(m) for m in fused.modules()]
            assert_as_unfused(of_input(x), other, replaced)
            # Norms of its own, and those of two layers as well.
            assert len(together) == 3 and {id(m) for m in together} <= {id(m) for m in other.modules()}
    assert other.state_dict().keys() == plain.state_dict().keys()
    other.load_state_dict(plain.state_dict())
    assert len(trinorm.restore(fused)) == 5 + 2
    assert [type(m) for m in fused.modules()] == classes and [set(vars(m)) for m in fused.modules()] == kept


def test_hidden_states_and_their_gradients(device: torch.device) -> None:
    """Of what a layer returns the whole gradient is known, and who writes to it changes what the next one normalizes."""
    replaced, fused, _ = pair("Llama", device)
    x = given("Llama").to(device)

    def run(model: torch.nn.Module) -> Results:
        y = model(x, output_hidden_states=True)
        return {
            "states": list(y.hidden_states),
            "gradients": list(torch.autograd.grad(y.logits.square().mean(), y.hidden_states[:2])),
        }

    assert_as_unfused(run, fused, replaced)
    for model in (replaced, fused):
        model.model.layers[0].register_forward_hook(lambda *of: of[2].mul_(2))
    assert_as_unfused(of_input(x), fused, replaced)
    with torch.no_grad():
        assert_as_unfused(of_input(x), fused, replaced)


def test_under_autocast_with_a_wider_stream(device: torch.device) -> None:
    """A branch in bf16, and a residual in fp32."""
    replaced, fused, _ = pair("GPT2", device)
    x = given("GPT2").to(device)

    def run(model: torch.nn.Module) -> Results:
        with torch.autocast(device.type, torch.bfloat16, enabled=next(model.parameters()).dtype != torch.float64):
            return of_input(x)(model)

    assert_as_unfused(run, fused, replaced)
