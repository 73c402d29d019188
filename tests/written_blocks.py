"""Blocks as models write them out, for ``fuse`` to read."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

import trinorm


class Holding(torch.nn.Module):
    """Two norms, and a layer."""

    def __init__(self, n: int = 16) -> None:
        super().__init__()
        self.norm, self.other = torch.nn.RMSNorm(n), torch.nn.LayerNorm(n)
        self.layer, self.record = torch.nn.Linear(n, n), list[Tensor]()


class Plain(Holding):
    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = self.other(x)
        x = residual + self.layer(x)
        residual = x
        x = self.layer(self.norm(x))
        x = x + residual
        return x  # noqa: RET504  (as models have it)


class Inline(Holding):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.norm(self.layer(x) + x)
        return self.other(x + x)


def fused(kind: type[torch.nn.Module], device: torch.device) -> tuple[torch.nn.Module, torch.nn.Module, trinorm.Report]:
    before = kind().to(device)
    trinorm.replace(before)
    after = copy.deepcopy(before)
    return before, after, trinorm.fuse(after)
