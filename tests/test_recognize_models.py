"""``replace`` and ``restore`` of transformers' models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import trinorm


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
