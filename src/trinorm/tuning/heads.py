"""Which launch each problem of QK-norm gets: by what was compiled, but where a ratio stands beside it (H200, bf16, to the
copy of the same run).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ..launch import Device
from .kinds import Tile, _sharing


@dataclass(frozen=True)
class Heads:
    """A program has ``tile.rows`` tokens of one head at a time, and at most ``heads`` heads of them. A backward's programs
    are persistent, ``per_sm`` on each multiprocessor, and walk ``stages`` deep.
    """

    tile: Tile
    heads: int
    stages: int = 1
    per_sm: int = 1

    def together(self, heads: int) -> int:
        """How many of a token's heads a program has: the most that divide them."""
        return next(n for n in range(min(self.heads, heads), 0, -1) if heads % n == 0)

    def turns(self, tokens: int, heads: int) -> int:
        """How many tiles of tokens, of heads that are together, there are."""
        return -(-tokens // self.tile.rows) * (heads // self.together(heads))

    def most_partials(self, device: Device) -> int:
        """At most how many programs are at work at once, each with its partial of dw."""
        return self.per_sm * device.multiprocessors

    def partials(self, tokens: int, heads: tuple[int, ...], device: Device) -> int:
        """How many programs share the tokens' heads, those of one side and then those of the other."""
        summed = sum(self.turns(tokens, n) * self.together(n) for n in heads)
        return min(max(self.turns(tokens, n) for n in heads), _sharing(summed, self.most_partials(device), device))


# (D up to, tokens at a time, warps, heads): 8 elements of a thread, one load of 16 bits each. Twice as many take 128
# registers in place of 72 (forward by 4 heads of 128, sm_90). For so many heads a program reads the weight, cos and sin
# once. Compiled for sm_90, of heads of 128 in bf16, instructions for each element and registers: forward by 1, 4, 8 heads
# 41, 19, 16 and 48, 72, 96; backward by 4 and 8 heads 26, 21 and 128, 255.
_FORWARD = (
    (32, 32, 4, 8),
    (64, 16, 4, 8),
    (128, 4, 2, 4),  # 4 × 4096 tokens, 32 and 8 heads: 0.92; 2 tokens by 2 warps, 8 heads 0.91, 8 by 4, 8 heads 0.87
    (256, 4, 4, 8),
    (512, 2, 4, 8),
    (1024, 1, 4, 8),
)
_BACKWARD = ((32, 32, 4, 4), (64, 16, 4, 4), (128, 8, 4, 4), (256, 4, 4, 4), (512, 2, 4, 4), (1024, 1, 4, 4))

# With fewer programs than this to a multiprocessor, each has one head.
_SCARCE = 4

_BACKWARD_STAGES, _BACKWARD_PER_SM = 1, 4


@functools.lru_cache(maxsize=1024)
def choose_heads_forward(tokens: int, heads: tuple[int, int], n: int, itemsize: int, device: Device) -> Heads:
    """The forward's launch, for tokens of so many query and key heads of n elements of ``itemsize`` bytes."""
    tile, together = _tile(_FORWARD, n, itemsize)
    many = Heads(tile, together)
    scarce = sum(many.turns(tokens, h) for h in heads) < _SCARCE * device.multiprocessors
    return Heads(tile, 1) if scarce else many


@functools.lru_cache(maxsize=1024)
def choose_heads_backward(tokens: int, heads: tuple[int, ...], n: int, itemsize: int, device: Device) -> Heads:
    """The backward's launch, for the heads of each side that has a gradient."""
    return Heads(*_tile(_BACKWARD, n, itemsize), _BACKWARD_STAGES, _BACKWARD_PER_SM)


def _tile(table: tuple[tuple[int, int, int, int], ...], n: int, itemsize: int) -> tuple[Tile, int]:
    """The tile and its heads, the same whatever the number of tokens, so that a row's bits are too."""
    rows, warps, heads = next(row[1:] for row in table if n <= row[0])
    chunk = 1 << (n - 1).bit_length()
    return Tile(max(1, rows * 4 // max(4, itemsize)), chunk, warps), heads
