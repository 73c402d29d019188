"""transformers' models, tiny, with random weights and norms whose weights are not ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

_SMALL: dict[str, Any] = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
_SMALL.update(num_attention_heads=2)
_DECODER = dict(_SMALL, num_key_value_heads=2)
_HEADS = dict(_DECODER, head_dim=16)

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", _DECODER),
    "Qwen2": ("Qwen2ForCausalLM", _DECODER),
    "Qwen3": ("Qwen3ForCausalLM", _HEADS),
    "Mistral": ("MistralForCausalLM", _DECODER),
    "Gemma2": ("Gemma2ForCausalLM", _HEADS),
    "Gemma3": ("Gemma3ForCausalLM", _HEADS),
    "Olmo2": ("Olmo2ForCausalLM", _DECODER),
    "Cohere": ("CohereForCausalLM", dict(_DECODER, use_qk_norm=False)),
    "GPT2": ("GPT2LMHeadModel", dict(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=128, attn_pdrop=0.0)),
    "Bert": ("BertModel", dict(_SMALL, attention_probs_dropout_prob=0.0)),
    "ViT": ("ViTModel", dict(_SMALL, image_size=16, patch_size=8)),
}


def made(name: str, **more: Any) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    kind, sizes = MODELS[name]
    torch.manual_seed(0)
    model_class = getattr(transformers, kind)
    if name != "ViT":
        more = dict(eos_token_id=None, bos_token_id=None, pad_token_id=None, **more)
    config = model_class.config_class(**{**sizes, **more})
    model: torch.nn.Module = model_class(config).eval()
    for p in model.parameters():
        if p.dim() == 1:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return model


def given(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if name == "ViT":
        return torch.randn(2, 3, 16, 16, generator=generator)
    return torch.randint(64, (2, 9), generator=generator)


def result(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x)[0]
