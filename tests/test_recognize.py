"""recognize.py: norms of other classes, found by what they compute; what only looks like one is left."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import trinorm
from trinorm import recognize
from trinorm.compare import assert_no_worse
from trinorm.forms import Form


class Written(torch.nn.Module):
    """A norm that a model has written out. Of those below each differs from another in one thing."""

    def __init__(self, n: int = 48, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(n) + 0.5)
        self.variance_epsilon = eps

    def rounded(self, x: Tensor) -> Tensor:
        wide = x.float()
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class BeforeTheWeight(Written):
    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * self.rounded(hidden).to(hidden.dtype)


class AtTheEnd(Written):
    def forward(self, hidden: Tensor) -> Tensor:
        return (self.weight * self.rounded(hidden)).to(hidden.dtype)


class OneAndAWeight(Written):
    def forward(self, hidden: Tensor) -> Tensor:
        return (self.rounded(hidden) * (1.0 + self.weight.float())).to(hidden.dtype)


class NoWeight(torch.nn.Module):
    """Which has its epsilon in its forward, and not even the name of what it is."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)).type_as(x)


class AlphaBeta(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.beta, self.alpha = (torch.nn.Parameter(torch.rand(48)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / torch.sqrt(variance + 1e-12) * self.alpha + self.beta


class Positions(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = (torch.nn.Parameter(torch.rand(6)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        return self.weight[:, None, None] * ((x - mean) / torch.sqrt(variance + 1e-6)) + self.bias[:, None, None]


class GateBehind(Written):
    def forward(self, hidden: Tensor, gate: Tensor | None = None) -> Tensor:
        y = self.weight * self.rounded(hidden).to(hidden.dtype)
        return (y * torch.nn.functional.silu(gate.float())).to(hidden.dtype)  # type: ignore[union-attr]


class GateBefore(Written):
    def __init__(self) -> None:
        super().__init__()
        self.group_size = 12

    def forward(self, hidden: Tensor, gate: Tensor | None = None) -> Tensor:
        wide = hidden.float()
        if gate is not None:
            wide = wide * torch.nn.functional.silu(gate.float())
        groups = self.rounded(wide.unflatten(-1, (-1, self.group_size)))
        return self.weight * groups.flatten(-2).to(hidden.dtype)


class SigmoidGate(Written):
    def forward(self, hidden: Tensor, gate: Tensor) -> Tensor:
        return (self.weight * self.rounded(hidden) * torch.sigmoid(gate.float())).to(hidden.dtype)


KNOWN: dict[type[torch.nn.Module], str] = {
    BeforeTheWeight: "rms_norm, eps=1e-06, cast='llama'",
    AtTheEnd: "rms_norm, eps=1e-06, cast='output'",
    OneAndAWeight: "rms_norm, eps=1e-06, cast='gemma'",
    NoWeight: "rms_norm, eps=1e-05, cast='output'",
    AlphaBeta: "layer_norm, eps=1e-12, cast='output'",
    Positions: "channel_layer_norm, eps=1e-06",
    GateBehind: "gated_rms_norm, eps=1e-06, activation='silu', norm_before_gate=True, cast='llama'",
    GateBefore: "gated_rms_norm, eps=1e-06, activation='silu', norm_before_gate=False, cast='llama', group_size=12",
    SigmoidGate: "gated_rms_norm, eps=1e-06, activation='sigmoid', norm_before_gate=True, cast='output'",
}
EVERY = pytest.mark.parametrize("kind", KNOWN, ids=lambda kind: kind.__name__)


def inputs(kind: type[torch.nn.Module], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    shape = (2, 6, 3, 5) if kind is Positions else (3, 5, 48)
    gated = kind in (GateBehind, GateBefore, SigmoidGate)
    return [torch.randn(shape, device=device).to(dtype) for _ in range(1 + gated)]


def named_norm(kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """``replace`` asks those alone whose class's name has "norm" in it, as everything else is some other layer."""
    return type(f"{kind.__name__}Norm", (kind,), {"__module__": __name__})


@EVERY
def test_known(kind: type[torch.nn.Module]) -> None:
    assert str(recognize.recognize(kind())) == f"trinorm.functional.{KNOWN[kind]}"


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_and_gradients(kind: type[torch.nn.Module], dtype: torch.dtype, device: torch.device) -> None:
    """Values no further from float64 than the module's before; gradients the function's, or, where that is not what it
    computes, as of what rounds at each step in 16 bits, its own.
    """
    before = named_norm(kind)().to(device, dtype)
    after = copy.deepcopy(before)
    assert len(trinorm.replace(after).replaced) == 1
    given, form = [t.requires_grad_() for t in inputs(kind, dtype, device)], after._trinorm_form
    assert isinstance(form, Form)
    weight, bias = (None if name is None else getattr(after, name) for name in (form.weight, form.bias))
    y = after(*given)
    assert_no_worse("y", y.detach(), form.exact((weight, bias), *given), before(*given).detach())
    leaves, dy = [*given, *after.parameters()], torch.randn_like(y)
    served = (dtype, None if weight is None else dtype) in form.dtypes
    assert served or (kind in (AlphaBeta, Positions) and dtype != torch.float32)
    expected = form((weight, bias), *given) if served else type(before).forward(after, *given)
    for ours, want in zip(*(torch.autograd.grad(of, leaves, dy) for of in (y, expected)), strict=True):
        assert torch.equal(ours, want)


class InTraining(BeforeTheWeight):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.dropout(super().forward(x), 0.5, self.training)


class SampleVariance(AlphaBeta):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + 1e-6) * self.alpha + self.beta


class EpsilonOutside(Written):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class SmallRowsAlone(BeforeTheWeight):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-50, 50))


class Pair(BeforeTheWeight):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


class Raising(Written):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("not today")


class Counting(BeforeTheWeight):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))


UNKNOWN: dict[type[torch.nn.Module], str] = {
    InTraining: "no norm that trinorm has",
    SampleVariance: "no norm that trinorm has",
    EpsilonOutside: "no norm that trinorm has",
    SmallRowsAlone: "no norm that trinorm has",
    Pair: "no norm that trinorm has",
    Raising: "its forward raises ValueError: not today",
    Counting: "modules or buffers of its own",
}


@pytest.mark.parametrize("kind", UNKNOWN, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("training", [True, False])
def test_what_only_looks_like_one(kind: type[torch.nn.Module], training: bool) -> None:
    module = named_norm(kind)().train(training)
    before = dict(vars(module))
    report = trinorm.replace(module)
    assert not report.replaced and UNKNOWN[kind] in report.left[0].reason
    assert vars(module) == before


class OtherwiseInFourDims(BeforeTheWeight):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.dim() < 4 else x


def test_what_was_not_tried_has_the_modules_own_forward(device: torch.device) -> None:
    before = named_norm(OtherwiseInFourDims)().to(device)
    after = copy.deepcopy(before)
    trinorm.replace(after)
    x = torch.randn(2, 3, 4, 48, device=device)
    assert torch.equal(after(x), x)  # of four dims it is none
    narrow = torch.randn(3, 48, device=device).bfloat16()
    assert after(narrow).dtype == before(narrow).dtype == torch.float32  # of a wider weight
    with pytest.raises(TypeError):
        after(x, x)
    gated = named_norm(GateBefore)().to(device)
    plain = copy.deepcopy(gated)
    trinorm.replace(gated)
    assert torch.equal(gated(narrow.float()), plain(narrow.float()))  # without its gate
    assert torch.equal(gated(narrow.float(), gate=narrow.float()), plain(narrow.float(), gate=narrow.float()))


@pytest.mark.parametrize("kind", [BeforeTheWeight, AtTheEnd], ids=lambda kind: kind.__name__)
def test_under_autocast_it_keeps_its_dtype(kind: type[torch.nn.Module], device: torch.device) -> None:
    module = named_norm(kind)().to(device, torch.bfloat16)
    trinorm.replace(module)
    x = torch.randn(3, 48, device=device).bfloat16()
    with torch.autocast(device.type, torch.bfloat16):
        assert module(x).dtype == torch.bfloat16


def test_copies_pickles_and_checkpoints(device: torch.device) -> None:
    module = BeforeTheWeightNorm().to(device)
    trinorm.replace(module)
    x = torch.randn(3, 48, device=device)
    kept = io.BytesIO()
    torch.save(module, kept)
    kept.seek(0)
    loaded = torch.load(kept, weights_only=False)
    for other in (copy.copy(module), copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert type(other) is type(module) and isinstance(other, BeforeTheWeightNorm)
        assert torch.equal(other(x), module(x))
    plain = BeforeTheWeightNorm().to(device)
    plain.load_state_dict(module.state_dict())
    module.load_state_dict(plain.state_dict())
    assert repr(module).startswith("BeforeTheWeightNorm(") and "trinorm.functional.rms_norm" in repr(module)


class BeforeTheWeightNorm(BeforeTheWeight):
    """Which pickle finds."""


def test_compiled_in_one_graph(device: torch.device) -> None:
    module = BeforeTheWeightNorm().to(device)
    trinorm.replace(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for rows in (3, 5):
        x = torch.randn(rows, 48, device=device, requires_grad=True)
        assert torch.equal(compiled(x), module(x))
        (a,), (b,) = (torch.autograd.grad(of(x).square().sum(), x) for of in (compiled, module))
        assert torch.equal(a, b)


def test_one_trial_serves_all_that_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    actual = recognize.recognize

    def counted(module: torch.nn.Module) -> Form | str:
        tried.append(module)
        return actual(module)

    monkeypatch.setattr("trinorm.convert.recognize", counted)
    model = torch.nn.ModuleList([BeforeTheWeightNorm() for _ in range(5)] + [BeforeTheWeightNorm(48, 1e-5)])
    report = trinorm.replace(model)
    assert len(report.replaced) == 6 and len(tried) == 2
    assert report.replaced[0].by != report.replaced[5].by


# --- models ---


def _models() -> dict[str, tuple[str, dict[str, Any]]]:
    small: dict[str, Any] = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    small.update(num_attention_heads=2, num_key_value_heads=2)
    return {
        "Llama": ("LlamaForCausalLM", small),
        "Qwen3": ("Qwen3ForCausalLM", dict(small, head_dim=16)),
        "Olmo2": ("Olmo2ForCausalLM", small),
        "Gemma3": ("Gemma3ForCausalLM", dict(small, head_dim=16)),
        "Cohere": ("CohereForCausalLM", dict(small, use_qk_norm=False)),
        "GPT2": ("GPT2LMHeadModel", dict(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64)),
    }


@pytest.mark.parametrize("name", _models())
def test_models_of_transformers(name: str, device: torch.device) -> None:
    """All their norms, with the same logits and gradients, and the same words; and back again."""
    transformers = pytest.importorskip("transformers")
    kind, sizes = _models()[name]
    torch.manual_seed(0)
    model_class = getattr(transformers, kind)
    config = model_class.config_class(**sizes, eos_token_id=None, bos_token_id=None, pad_token_id=None)
    model = model_class(config).to(device).eval()
    for p in model.parameters():
        if p.dim() == 1:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    tokens = torch.randint(64, (2, 9), device=device)
    classes = [type(m) for m in model.modules()]
    found = []
    for replaced in (False, True):
        if replaced:
            report = trinorm.replace(model)
            assert report.replaced and not report.left
        logits = model(tokens).logits
        grads = torch.autograd.grad(logits.square().mean(), list(model.parameters()), allow_unused=True)
        words = model.generate(tokens, max_new_tokens=8, do_sample=False)
        found.append((logits, [g for g in grads if g is not None], words))
    (before, grads_before, words_before), (after, grads_after, words_after) = found
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grads_after, grads_before, rtol=1e-3, atol=1e-5)
    assert torch.equal(words_before, words_after)
    assert len(trinorm.restore(model)) == len(report.replaced)
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(model(tokens).logits, before)
