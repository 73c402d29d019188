"""Blocks with channel norms and activations, as models write them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """As torchvision's ResNets."""

    def __init__(self, downsample: bool = True) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.downsample = nn.Conv2d(4, 4, 1) if downsample else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out  # noqa: RET504


class Dropping(nn.Module):
    """As timm's ResNets."""

    def __init__(self, se: nn.Module | None = None, drop: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act1 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.SiLU(inplace=True)
        self.conv2, self.bn2, self.act2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.GELU()
        self.se, self.drop_block = se, drop or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.drop_block(x)
        x = self.act1(x)
        x = self.conv2(x)
        x = self.bn2(x)
        if self.se is not None:
            x = self.se(x)
        x = x + shortcut
        return self.act2(x)


class Branching(nn.Module):
    """As diffusers' ResnetBlock2D."""

    def __init__(self, manner: str = "default") -> None:
        super().__init__()
        self.norm1, self.norm2, self.manner = nn.GroupNorm(2, 4), nn.GroupNorm(2, 4), manner
        self.nonlinearity, self.conv = nn.SiLU(), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x
        hidden = self.norm1(hidden)
        hidden = self.nonlinearity(hidden)
        hidden = self.conv(hidden)
        if self.manner == "default":
            hidden = hidden + x
            hidden = self.norm2(hidden)
        elif self.manner == "scale":
            hidden = self.norm2(hidden)
            hidden = hidden * 2
        else:
            hidden = self.norm2(hidden)
        hidden = self.nonlinearity(hidden)
        return x + hidden


class Inline(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other, self.bn = nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True), nn.BatchNorm2d(4)
        self.conv, self.act, self.function = nn.Conv2d(4, 4, 1), nn.GELU(), F.silu

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.conv(F.relu(self.norm(x), inplace=True))
        y = self.other(x)
        x = self.conv(F.gelu(y, approximate="none")) + torch.relu(self.bn(x))
        return self.function(self.norm(self.act(self.norm(x))))


class Apart(nn.Module):
    """Of which nothing may be fused."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b, self.c, self.d = (nn.BatchNorm2d(4) for _ in range(5))
        self.act, self.tanh, self.conv = nn.ReLU(), nn.GELU(approximate="tanh"), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        z = self.act(y)
        x = self.tanh(self.a(y + z))
        x = F.gelu(self.a(x), approximate="tanh")
        x = self.b(x)
        x = x * 2
        x = self.act(x)
        kept = x
        x = self.c(x)
        kept = self.conv(kept)
        x += kept
        x = self.act(x)
        x = self.conv(x)
        x = self.d(x)
        if z is None:
            return z
        x += kept
        return self.act(x)


class NormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def __init__(self, act: nn.Module, drop: nn.Module | None = None, **how: Any) -> None:
        super().__init__(4, **how)
        self.drop, self.act = drop or nn.Identity(), act

    def forward(self, x: Tensor) -> Tensor:
        share = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                share = 1.0 / float(self.num_batches_tracked)
        of_input = self.training or (self.running_mean is None and self.running_var is None)
        kept = not self.training or self.track_running_stats
        mean, var = (self.running_mean, self.running_var) if kept else (None, None)
        x = F.batch_norm(x, mean, var, self.weight, self.bias, of_input, share, self.eps)
        x = self.drop(x)
        return self.act(x)


class GroupNormAct(nn.GroupNorm):
    def __init__(self, act: nn.Module) -> None:
        super().__init__(2, 4)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)))


class Doubled(NormAct):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2
