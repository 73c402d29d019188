"""Whether x̂ can be made again of y, which ``save="output"`` asks: a question to the values of weight and bias.

x̂ = (y - b)/w, and of what y was rounded by, x̂ gets u·|x̂ + b/w|. So where 0 < |w| < ∞ and |b| <= |w| it is as good as if x̂
itself, with a 1 added, had been rounded to y's dtype.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


class _Answer(NamedTuple):
    """versions: of weight and bias when they were asked. bias: so that it need not be kept alive, a reference."""

    versions: tuple[int, int]
    bias: Callable[[], Tensor | None]
    yes: bool


class Undoable:
    """What was answered, for each weight until it changes.

    Values are on the device: an answer waits for it. So all weights that changed are asked at once, and a training step
    waits but once. A weight changed past torch's version counter (through ``.data``) is not seen to have changed.
    """

    def __init__(self) -> None:
        self._answers: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __call__(self, weight: Tensor | None, bias: Tensor | None) -> bool:
        """Whether y's rounding allows it, of this weight and this bias (as absent, 1 and 0)."""
        if weight is None:
            return bias is None
        answer: _Answer | None = self._answers.get(weight)
        if answer is None or answer.bias() is not bias:
            answer = self._answers[weight] = _Answer((-1, -1), _reference(bias), False)
        if answer.versions != _versions(weight, bias):
            if weight.is_cuda and torch.cuda.is_current_stream_capturing():
                return False  # nobody waits in a graph, nor asks again when it is replayed
            self._ask()
            answer = self._answers[weight]
        return answer.yes

    def _ask(self) -> None:
        """All weights that changed since they were asked."""
        changed = [
            (weight, bias, versions)
            for weight, answer in list(self._answers.items())
            for bias in [answer.bias()]
            for versions in [_versions(weight, bias)]
            if versions != answer.versions
        ]
        with torch.no_grad():
            answers = [_undoable(weight, bias).to("cpu", non_blocking=True) for weight, bias, _ in changed]
        for device in {weight.device for weight, _, _ in changed if weight.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        for (weight, bias, versions), yes in zip(changed, answers, strict=True):
            self._answers[weight] = _Answer(versions, _reference(bias), bool(yes))


def _undoable(weight: Tensor, bias: Tensor | None) -> Tensor:
    size = weight.abs()
    good = (size >= torch.finfo(weight.dtype).tiny) & size.isfinite()
    return (good if bias is None else good & (bias.abs() <= size)).all()


def _versions(weight: Tensor, bias: Tensor | None) -> tuple[int, int]:
    return weight._version, 0 if bias is None else bias._version


def _reference(bias: Tensor | None) -> Callable[[], Tensor | None]:
    return weakref.ref(bias) if bias is not None else lambda: None
