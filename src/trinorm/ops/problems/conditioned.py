"""A conditioned norm of tensors, and which rows share parameters."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...spec import ConditionedNorm
from ..road import is_known


class Conditioned(NamedTuple):
    """What is computed of the tensors: the norm of rows of ``size`` elements, of which the last ``dims`` dims hold one or,
    of one dim, several; in y's dtype.
    """

    spec: ConditionedNorm
    dims: int
    size: int
    eps: float
    y: torch.dtype
    batch_invariant: bool = False

    def rows(self, t: Tensor) -> tuple[int, ...]:
        """The sizes of t's rows: of its leading dims, and of how many rows the others hold."""
        return *t.shape[: -self.dims], t.shape[-self.dims :].numel() // self.size

    def steps(self, t: Tensor) -> tuple[int, ...]:
        """Their strides."""
        return *t.stride()[: -self.dims], self.size


class Sets(NamedTuple):
    """The rows as ``[outer, middle, repeat]``: those of one middle index have one weight and one bias."""

    outer: int
    middle: int
    repeat: int


def sets_of(rows: tuple[int, ...], own: tuple[int, ...]) -> Sets | None:
    """How rows of these sizes share parameters of sizes that are broadcast to them; None where they are no such sets.

    >>> sets_of((8, 64), (8, 1))  # a weight for each sample
    Sets(outer=1, middle=8, repeat=64)
    """
    parts, part = [1, 1, 1], 0
    for size, mine in zip(rows, (1,) * (len(rows) - len(own)) + own, strict=True):
        # Of a number of rows that no tracer knows neither is known: what is each row's own stays that, were it one for all.
        if is_known(size == 1):
            continue
        if is_known(mine == size):
            if part == 2:
                return None
            part = 1
        elif part == 1:
            part = 2
        parts[part] *= size
    return Sets(1, 1, parts[0]) if part == 0 else Sets(*parts)


def shared_sets(problem: Conditioned, x: Tensor, *parameters: Tensor | None) -> Sets | None:
    """How x's rows share parameters, each there or not; None where there are no such sets, or others for each."""
    given = [t for t in parameters if t is not None]
    rows = problem.rows(x)
    found = [sets_of(rows, problem.rows(t)) for t in given] or [sets_of(rows, ())]
    # Shapes first: of two equal sets torch 2.11's Dynamo would hold the sizes fast.
    first = found[0]
    alike = (_are_same(t.shape, given[0].shape) or _are_same(sets, first) for t, sets in zip(given, found, strict=False))
    return first if all(alike) else None


def _are_same(a: tuple[int, ...] | None, b: tuple[int, ...] | None) -> bool:
    return a is not None and b is not None and len(a) == len(b) and all(is_known(i == j) for i, j in zip(a, b, strict=True))
