"""A problem of the channel family, and how x is seen in it."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from ...spec import Activation, ChannelNorm
from ..layout import is_channels_last


class Problem(NamedTuple):
    """What is computed of the tensors. num_groups: 1 to a channel but for GroupNorm, and for a position, which is 1.
    given: statistics are given and not taken: each channel's, and for rstd there is a variance. batch_invariant: what is
    launched for a sample does not depend on how many there are.
    """

    spec: ChannelNorm
    num_groups: int
    eps: float
    activation: Activation | None = None
    given: bool = False
    batch_invariant: bool = False

    def together(self, view: View) -> View:
        """The view of a pass that need not tell samples apart. batch_invariant: it does, or a tile would have some of the
        channels of one sample and some of the next's, as many as there are.
        """
        return view if self.batch_invariant else view.one_sample()

    def planned(self, view: View) -> tuple[int, int, int]:
        """The sizes of a view that its walk is chosen by: those of one sample where it may not depend on more."""
        return 1 if self.batch_invariant else view.samples, view.width, view.s

    def nbytes(self, x: Tensor) -> int:
        """The bytes of x that a launch is chosen by: likewise."""
        return x.nbytes // len(x) if self.batch_invariant else x.nbytes


class View(NamedTuple):
    """Samples of ``width`` channels by s positions, the channels last in memory or first (kernels/channel_tiles.py)."""

    samples: int
    width: int
    s: int
    last: bool

    @property
    def unit(self) -> int:
        """The elements that divide what runs through memory, as far as a wide access asks."""
        return math.gcd(self.width if self.last else self.s, 16)

    def one_sample(self) -> View:
        """The same where samples need not be told apart: of channels-first ones, one of all channels."""
        if self.last or self.samples * self.width >= 1 << 31:
            return self
        return View(1, self.samples * self.width, self.s, False)


def statistics_shape(spec: ChannelNorm, x: Tensor, num_groups: int) -> tuple[int, ...]:
    """The dims that statistics of x are told apart by: its channels; samples and positions; samples and groups."""
    if spec.over_samples:
        return tuple(x.shape[1:2])
    return (x.shape[0], *x.shape[2:]) if spec.of_positions else (x.shape[0], num_groups)


def view_of(spec: ChannelNorm, x: Tensor) -> View:
    """x, which has one of the two orders (layout.channels_readable), as the kernels see it."""
    last = is_channels_last(x)
    samples, width, s = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    if last and spec.over_samples:
        return View(1, width, samples * s, True)
    return View(samples, width, s, last)
