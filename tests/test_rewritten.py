"""rewritten.py: which sums go with a norm, and which stay apart, in a forward's source."""

from __future__ import annotations

import copy
import functools
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import trinorm
import written_blocks
from unfused import Results, assert_as_unfused
from written_blocks import Holding, Inline, Plain, fused
from written_norms import AlphaBeta, named_norm


class BothOfOne(Holding):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer(x)
        return self.norm(x) * self.other(x)


class InOneStatement(Holding):
    """As timm's blocks."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer(self.norm(x))
        return x + self.layer(self.other(x))


class Unless(Holding):
    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        x = x + self.layer(x)
        if more is not None:
            x = x * more
        return self.norm(x)


def twice(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def of_both(self: Any, *given: Any, **named: Any) -> Tensor:
        return forward(self, *given, **named) * 2

    return of_both


class Decorated(Plain):
    """With a decorator, defaults, a closure and super()."""

    def _made() -> Any:  # type: ignore[misc]
        half = 0.5

        @twice
        def forward(self: Any, x: Tensor, *, by: float = 3.0) -> Tensor:
            x = x * half + self.layer(x) * by
            return self.norm(x) + len(super().extra_repr())

        return forward

    forward = _made()


TOGETHER: dict[type[Holding], set[str]] = {
    Plain: {"norm", "other"},
    Inline: {"norm", "other"},
    BothOfOne: {"norm"},
    InOneStatement: {"other", "norm"},
    Unless: {"norm"},
    Decorated: {"norm"},
}


@pytest.mark.parametrize("kind", TOGETHER, ids=lambda kind: kind.__name__)
def test_sums_and_norms_that_go_together(kind: type[Holding], device: torch.device) -> None:
    before, after, report = fused(kind, device)
    assert {entry.path for entry in report.fused} == TOGETHER[kind]
    assert {entry.path for entry in report.left} == {"norm", "other"} - TOGETHER[kind]
    assert isinstance(after, kind) and type(after).__name__ == kind.__name__
    for more in ({}, {"more": torch.full((), 3.0, device=device)} if kind is Unless else {}):
        x = torch.randn(3, 5, 16, device=device)

        def run(model: Any, x: Tensor = x, more: dict[str, Tensor] = more) -> Results:
            of = x.to(model.layer.weight.dtype).requires_grad_()
            y = model(of, **more)
            dx, *others = torch.autograd.grad((y * of.detach()).sum(), [of, *model.parameters()], allow_unused=True)
            return {"y": [y], "dx": [dx], "others": [g for g in others if g is not None]}

        assert_as_unfused(run, after, before)


class Named(Holding):
    def forward(self, hidden: Tensor) -> Tensor:
        stream = hidden
        hidden = self.norm(hidden)
        return stream + hidden


@pytest.mark.parametrize("kind", [Plain, Named])
def test_a_stream_has_one_gradient(kind: type[Holding], device: torch.device) -> None:
    """Of what begins a block: the norm's and the residual's come back as one."""
    edges = []
    for model in fused(kind, device)[:2]:
        x = torch.randn(3, 5, 16, device=device, requires_grad=True)
        y = model(x)  # kept: a node of Python's ends with the last tensor behind it
        nodes, seen, into = [y.grad_fn], set(), 0
        while nodes:
            for node, _ in nodes.pop().next_functions:
                into += getattr(node, "variable", None) is x
                if node is not None and node not in seen:
                    seen.add(node)
                    nodes.append(node)
        edges.append(into)
    assert edges == [2, 1]


class Otherwise(Holding):
    """Of which nothing is fused."""


class Written(Otherwise):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer(x)
        x[..., 0] = 0
        return self.norm(x)


class InPlace(Otherwise):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer(x)
        x *= 2
        return self.norm(x)


class InPlaceByAnotherName(Otherwise):
    def forward(self, x: Tensor) -> Tensor:
        residual = x + self.layer(x)
        x = residual
        x *= 2
        return self.norm(residual)


class ArgumentHandedOn(Otherwise):
    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = self.norm(x)
        self.record.append(residual)
        return x * residual


class HandedOn(Otherwise):
    """To whoever may ask for its gradient."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer(x)
        y = self.norm(x)
        self.record.append(x)
        return y


class BothReturned(Otherwise):
    def forward(self, x: Tensor) -> Any:
        x = x + self.layer(x)
        return self.norm(x), x


class InABranch(Otherwise):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer(x)
        if self.training:
            x = self.norm(x)
        return x


class OfAnotherTest(Otherwise):
    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        x = x + self.layer(x)
        more = self.layer.bias
        if more is not None:
            x = x * more
        return self.norm(x)


class Changed(Otherwise):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer(x)
        x = torch.relu(x)
        return self.norm(x)


class Concatenated(Otherwise):
    def forward(self, x: Tensor) -> Tensor:
        pair = (x,) + (self.layer(x),)  # noqa: RUF005
        return self.norm(pair[0])


class Later(Otherwise):
    """Of what the name then stands for."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer(x)
        later = lambda: self.norm(x)  # noqa: E731
        x = torch.relu(x * 2)
        return later()


class PerhapsNot(Otherwise):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer(x)
        return self.norm(x) if self.training else self.layer(x * 1)


class PerhapsNotEither(Otherwise):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer(x)
        y = self.training and self.norm(x)
        return self.layer(x) if y is False else y


class Set(Otherwise):
    """A norm that the forward itself exchanges, or sets an attribute of."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer(x)
        self.norm.eps = 0.5
        return self.norm(x)


class WithArguments(Otherwise):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x=x + self.layer(x))


class Lambda(Otherwise):
    forward = lambda self, x: self.norm(x + self.layer(x))  # noqa: E731


class OfNoFile(Otherwise):
    exec("def forward(self, x): return self.norm(x + self.layer(x))")


class Patched(Otherwise):
    """Around which something was put that is not in the source."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.layer(x))


Patched.forward = twice(Patched.forward)  # type: ignore[method-assign]


class Recoded(Otherwise):
    """Whose source says something else."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.layer(x) * 2.0)


code = Recoded.forward.__code__
Recoded.forward.__code__ = code.replace(co_consts=tuple(3.0 if c == 2.0 else c for c in code.co_consts))

APART: dict[type[Holding], str] = {
    Written: "has the sum that goes into it too",
    InPlace: "no sum",
    InPlaceByAnotherName: "no sum",
    ArgumentHandedOn: "no sum",
    Recoded: "not what its source says",
    HandedOn: "has the sum that goes into it too",
    BothReturned: "has the sum that goes into it too",
    InABranch: "no sum",
    OfAnotherTest: "no sum",
    Changed: "no sum",
    Concatenated: "no sum",
    Later: "no sum",
    PerhapsNot: "no sum",
    PerhapsNotEither: "no sum",
    Set: "no sum",
    WithArguments: "no sum",
    Lambda: "no source",
    OfNoFile: "no source",
    Patched: "wrapped around",
}


@pytest.mark.parametrize("kind", APART, ids=lambda kind: kind.__name__)
def test_sums_that_stay_apart(kind: type[Holding], device: torch.device) -> None:
    before, after, report = fused(kind, device)
    assert not report.fused and type(after) is kind
    (reason,) = (entry.reason for entry in report.left if entry.path == "norm")
    assert APART[kind] in reason
    x = torch.randn(2, 16, device=device)
    assert str(before(x)) == str(after(x))


def test_another_forward_of_its_class_is_what_runs(device: torch.device) -> None:
    class Own(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x + self.layer(x))

    _, after, report = fused(Own, device)
    assert report.fused
    Own.forward = lambda self, x: x  # type: ignore[method-assign,assignment]
    x = torch.randn(2, 16, device=device)
    assert after(x) is x


def test_a_traceback_shows_the_models_file(device: torch.device) -> None:
    _, after, _ = fused(Plain, device)
    after.layer = None
    try:
        after(torch.randn(2, 16, device=device))
    except TypeError as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
    after.layer = torch.nn.Linear(16, 7, device=device)
    with pytest.raises(RuntimeError) as caught:
        after(torch.randn(2, 16, device=device))
    assert [(f.filename, f.line) for f in traceback.extract_tb(caught.tb)][-2] == (frame.filename, frame.line)
    assert frame.filename == written_blocks.__file__ and frame.line == "x = residual + self.layer(x)"


class OfAlpha(torch.nn.Module):
    """Whose norm has a weight of another name."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = named_norm(AlphaBeta)(), torch.nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(self.norm(x))


@torch.no_grad()
def test_the_next_blocks_norm_is_no_trinorms_any_more(device: torch.device) -> None:
    before = torch.nn.Sequential(OfAlpha(), OfAlpha()).to(device)
    trinorm.replace(before)
    after = copy.deepcopy(before)
    assert "what 0 returns, without gradients" in trinorm.fuse(after).fused[1].by
    for model in (before, after):
        model[1].norm.note = "set"
    x = torch.randn(4, 48, device=device)
    assert torch.equal(after(x), before(x))
