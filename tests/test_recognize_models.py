"""``replace`` and ``restore`` of transformers' models."""

from __future__ import annotations

import pytest
import torch

import trinorm
from transformers_models import given, made


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Olmo2", "Gemma3", "Cohere", "GPT2"])
def test_models_of_transformers(name: str, device: torch.device) -> None:
    """All their norms, with the same logits and gradients, and the same words; and back again."""
    model, tokens = made(name).to(device), given(name).to(device)
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
