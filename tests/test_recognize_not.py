"""recognize.py: what only looks like a norm is left, and a trial leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import trinorm
from written_norms import (
    AlphaBeta,
    BeforeTheWeight,
    BeforeTheWeightNorm,
    Written,
    named_norm,
)


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


class Remembering(BeforeTheWeight):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []


class Frozen(Written):
    """Whose weight gets no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.detach() * self.rounded(x).to(x.dtype)


class NoDerivative(Written):
    """Whose statistic counts as a constant."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).detach())


class WithoutGrad(BeforeTheWeight):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class SizeOfWeight(Written):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight.abs() * self.rounded(x).to(x.dtype)


class NoOutlier(BeforeTheWeight):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-6.5, 6.5)


class NoNaN(BeforeTheWeight):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.nan_to_num())


class InPlace(Written):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).mul_(self.weight)


class Drawing(BeforeTheWeight):
    def forward(self, x: Tensor) -> Tensor:
        torch.rand(1)
        return super().forward(x)


class Noting(BeforeTheWeight):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x.norm()
        return super().forward(x)


NONE = "no norm that trinorm has"
UNKNOWN: dict[type[torch.nn.Module], str] = {
    **dict.fromkeys((InTraining, SampleVariance, EpsilonOutside, SmallRowsAlone, Pair, Frozen, NoDerivative), NONE),
    **dict.fromkeys((WithoutGrad, SizeOfWeight, NoOutlier, NoNaN, InPlace, Drawing, Noting), NONE),
    Raising: "its forward raises ValueError: not today",
    Counting: "modules or buffers of its own",
    Remembering: "tensors or containers of its own",
}


@pytest.mark.parametrize("kind", UNKNOWN, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("training", [True, False])
def test_what_only_looks_like_one(kind: type[torch.nn.Module], training: bool) -> None:
    module = named_norm(kind)().train(training)
    before, state = dict(vars(module)), torch.get_rng_state()
    report = trinorm.replace(module)
    assert not report.replaced and UNKNOWN[kind] in report.left[0].reason
    assert vars(module) == before and torch.equal(torch.get_rng_state(), state)


def test_whatever_is_on_around_it() -> None:
    """A default device, a mode, inference, autocast: a trial is apart from these, and leaves nothing behind."""
    for n, around in enumerate((torch.device("meta"), torch.inference_mode(), torch.autocast("cpu"), torch.no_grad())):
        kept = BeforeTheWeightNorm(32 + n)
        with around:
            assert trinorm.replace(BeforeTheWeightNorm(32 + n), dry_run=True).replaced
        assert trinorm.replace(kept).replaced
