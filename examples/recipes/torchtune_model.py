"""torchtune: a builder of models with trinorm's norms, for its recipes' configurations, and a loop that trains one.

    python examples/recipes/torchtune_model.py

Needs torchtune 0.6.1, its last version, and torchao before 0.18, which lacks a module that torchtune imports. A recipe
makes its model by the builder that its configuration names; one of your own does what is trinorm's, before the recipe
shards, compiles or loads anything:

    model:
      _component_: torchtune_model.llama3_2_1b
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchtune.models.llama3_2
from shared import VOCABULARY, compare_curves, windows
from torch import nn
from torchtune.modules import TransformerDecoder
from torchtune.modules.loss import CEWithChunkedOutputLoss

import trinorm

STEPS, BATCH, LENGTH = 6, 2, 8


def llama3_2_1b() -> TransformerDecoder:
    model = torchtune.models.llama3_2.llama3_2_1b()
    trinorm.replace(model)
    trinorm.fuse(model)
    return model


def train(prepare: Callable[[nn.Module], object]) -> list[float]:
    torch.manual_seed(0)
    sizes = dict(embed_dim=64, intermediate_dim=128, num_layers=2, num_heads=2, num_kv_heads=2, max_seq_len=LENGTH)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = torchtune.models.llama3_2.llama3_2(vocab_size=VOCABULARY, **sizes).to(device)
    prepare(model)
    loss_of = CEWithChunkedOutputLoss(num_output_chunks=1)
    model.set_num_output_chunks(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for tokens in windows(STEPS * BATCH, LENGTH).to(device).split(BATCH):
        labels = F.pad(tokens[:, 1:], (0, 1), value=loss_of.ignore_index)
        loss = loss_of(model(tokens), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    sys.exit(compare_curves(train))
