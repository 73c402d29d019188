"""transformers' Trainer: a Llama of random weights, trained by it with trinorm's norms and with its own.

    python examples/recipes/transformers_trainer.py

Needs transformers and accelerate. What is trinorm's is two lines between the model and its Trainer.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable

import torch
from shared import VOCABULARY, compare_curves, windows
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

STEPS, BATCH, LENGTH = 6, 2, 8


def train(prepare: Callable[[torch.nn.Module], object]) -> list[float]:
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes))
    prepare(model)  # trinorm.replace(model); trinorm.fuse(model)
    data = [dict(input_ids=tokens, labels=tokens) for tokens in windows(STEPS * BATCH, LENGTH)]
    with tempfile.TemporaryDirectory() as folder:
        how = dict(per_device_train_batch_size=BATCH, learning_rate=3e-3, dataloader_pin_memory=False)
        quiet = dict(logging_steps=1, report_to="none", disable_tqdm=True, save_strategy="no")
        arguments = TrainingArguments(folder, max_steps=STEPS, **how, **quiet)
        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    sys.exit(compare_curves(train))
