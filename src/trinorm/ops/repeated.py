"""A function that launches, done again by repeating its launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from .row import RECORDED_FROM

if TYPE_CHECKING:
    from ..replay import Function, Results


class Repeated:
    """``function``, done from the RECORDED_FROM-th call on by repeating its launches (replay.py). Its inputs are all alike.

    is_watched: whether someone put a launch of his own in the host's place, to see them all: nothing is repeated past him.
    """

    __slots__ = ("_again", "_function", "_is_watched", "_met")

    def __init__(self, function: Function, is_watched: Callable[[], bool]) -> None:
        self._function, self._is_watched = function, is_watched
        self._again: Function | None = None
        self._met = 0

    def __call__(self, *inputs: Tensor | None) -> Results:
        return (self._again or self._ordinarily)(*inputs)

    def _ordinarily(self, *inputs: Tensor | None) -> Results:
        from .. import replay

        self._met += 1
        if self._met < RECORDED_FROM or self._is_watched():
            return self._function(*inputs)
        results, self._again = replay.record(self._function, *inputs)
        return results
