"""Norms as models write them out, for ``replace`` to recognize."""

from __future__ import annotations

import torch
from torch import Tensor


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


def inputs(kind: type[torch.nn.Module], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    shape = (2, 6, 3, 5) if kind is Positions else (3, 5, 48)
    gated = kind in (GateBehind, GateBefore, SigmoidGate)
    return [torch.randn(shape, device=device).to(dtype) for _ in range(1 + gated)]


def named_norm(kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """``replace`` asks those alone whose class's name has "norm" in it, as everything else is some other layer."""
    return type(f"{kind.__name__}Norm", (kind,), {"__module__": __name__})


class BeforeTheWeightNorm(BeforeTheWeight):
    """Which pickle finds."""
