"""Lightning: a model of your own, of torch's norms, trained by it with trinorm's and with torch's.

    python examples/recipes/lightning_module.py

Needs lightning. What is trinorm's is in the module's constructor: before Lightning sees the parameters, and before a
strategy shards them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import lightning
import torch
import torch.nn.functional as F
from shared import VOCABULARY, compare_curves, windows
from torch import Tensor, nn

STEPS, BATCH, LENGTH, WIDTH = 6, 2, 8, 64


class Block(nn.Module):
    """Pre-norm, with attention over 2 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_1(x)).unflatten(-1, (3, 2, -1)).movedim(2, 0).transpose(2, 3)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_2(x))


class Model(lightning.LightningModule):
    def __init__(self, prepare: Callable[[nn.Module], object]) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.blocks, self.norm = nn.Sequential(Block(), Block()), nn.LayerNorm(WIDTH)
        self.losses: list[float] = []
        prepare(self)  # trinorm.replace(self); trinorm.fuse(self)

    def training_step(self, tokens: Tensor) -> Tensor:
        logits = self.head(self.norm(self.blocks(self.embed(tokens[:, :-1]))))
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def train(prepare: Callable[[nn.Module], object]) -> list[float]:
    torch.manual_seed(0)
    model = Model(prepare)
    data = torch.utils.data.DataLoader(windows(STEPS * BATCH, LENGTH), batch_size=BATCH)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = lightning.Trainer(
        max_steps=STEPS, precision="64-true" if model.dtype == torch.float64 else "32-true", **quiet
    )
    trainer.fit(model, data)
    return model.losses


if __name__ == "__main__":
    sys.exit(compare_curves(train))
