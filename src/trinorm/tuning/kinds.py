"""The kinds of launch that the row family has, as data. Which problem gets which, row.py says."""

from __future__ import annotations

from dataclasses import dataclass

from ..launch import Device


@dataclass(frozen=True)
class Tile:
    """``rows`` rows at a time, in chunks of ``chunk`` columns, by ``warps`` warps."""

    rows: int
    chunk: int
    warps: int


@dataclass(frozen=True)
class RowForward:
    """A program holds ``tiles`` tiles of whole rows.

    stream: x and y pass through L2 without staying. preload: w and b are asked for together with x. early: programs may
    be put on the device before the kernel ahead of them ends (kernels/overlap.py). pairwise: moments of 16-bit numbers,
    where they fill their chunks, are merged from each thread's by one barrier between warps; and of more rows than ``many``
    the next kernel is let on as soon as x is asked for.
    """

    tile: Tile
    tiles: int
    stream: bool
    preload: bool
    early: bool
    pairwise: bool = False
    many: int = 0


@dataclass(frozen=True)
class RowForwardSplit:
    """A team of programs holds a row, ``block`` columns each."""

    tile: Tile
    block: int

    @property
    def lanes(self) -> int:
        """How many threads read the team's words (kernels/row_split.awaited): all, of which one warp has any to read."""
        return 32 * self.tile.warps


@dataclass(frozen=True)
class RowForwardWide:
    """A program reads its one row twice."""

    tile: Tile


@dataclass(frozen=True)
class RowBackward:
    """Persistent programs, ``per_sm`` on each multiprocessor, walk ``tiles`` tiles of rows at a time, ``stages`` deep."""

    tile: Tile
    tiles: int
    stages: int
    per_sm: int
    stream: bool

    def stage(self, n: int) -> tuple[int, int]:
        """How many rows and columns a stage holds."""
        return self.tiles * self.tile.rows, -(-n // self.tile.chunk) * self.tile.chunk

    def most_partials(self, n: int, device: Device) -> int:
        """At most how many programs are at work at once, each with its partial of dw and db."""
        return self.per_sm * device.multiprocessors

    def partials(self, m: int, n: int, device: Device) -> int:
        """How many programs share m rows. Each row of a tile has sums of its own until the last."""
        summed = -(-m // self.tile.rows)
        return min(-(-summed // self.tiles), _sharing(summed, self.most_partials(n, device), device))


@dataclass(frozen=True)
class RowBackwardFew:
    """One launch: ``tile`` of whole rows for dx, ``sums`` of columns for dw and db. Both have the tile's warps."""

    tile: Tile
    sums: Tile


@dataclass(frozen=True)
class RowBackwardSplit:
    """Persistent teams, ``per_sm`` programs on each multiprocessor, walk rows ``stages`` deep, ``block`` columns each.

    registers: at most so many of a thread, that ``per_sm`` programs have room; None leaves it to the compiler.
    """

    tile: Tile
    block: int
    stages: int
    per_sm: int
    registers: int | None = None

    def stage(self, n: int) -> tuple[int, int]:
        """How many rows and columns a stage holds."""
        return 1, self.block

    def most_partials(self, n: int, device: Device) -> int:
        """At most how many teams are at work at once, each with its partial of dw and db."""
        return max(1, self.per_sm * device.multiprocessors // (n // self.block))

    def partials(self, m: int, n: int, device: Device) -> int:
        """How many teams share m rows."""
        return _sharing(m, self.most_partials(n, device), device)

    def lanes(self, n: int) -> int:
        """How many threads read the team's words: those of each warp, or, when one cannot hold them, of all."""
        return 32 if n // self.block <= 32 else 32 * self.tile.warps


@dataclass(frozen=True)
class RowBackwardWide:
    """Moments of each row, or all that is its own; then single rows in chunks of columns, ``per_sm`` programs on each
    multiprocessor.
    """

    tile: Tile
    stages: int
    per_sm: int

    def stage(self, n: int) -> tuple[int, int]:
        """How many rows and columns a stage holds."""
        return 1, self.tile.chunk

    def most_partials(self, n: int, device: Device) -> int:
        """At most how many programs are at work at once on each chunk of columns, each with its partial of dw and db."""
        return max(1, self.per_sm * device.multiprocessors // -(-n // self.tile.chunk))

    def partials(self, m: int, n: int, device: Device) -> int:
        """How many programs share m rows of each chunk of columns."""
        return _sharing(m, self.most_partials(n, device), device)


@dataclass(frozen=True)
class ChannelWalk:
    """A program walks tiles of channels × positions, ``stages`` deep: one of the ``shares`` of a sample's positions, or all
    of those of ``samples``.
    """

    tile: Tile
    shares: int
    samples: int
    stages: int

    def programs(self, samples: int, width: int) -> int:
        """How many make up the grid: teams of samples, blocks of channels, shares of positions."""
        return self.teams(samples) * -(-width // self.tile.rows) * self.shares

    def teams(self, samples: int) -> int:
        """How many have a block of channels' samples between them."""
        return -(-samples // self.samples)

    def partials(self, samples: int) -> int:
        """How many there are of each channel's sums."""
        return self.teams(samples) * self.shares


@dataclass(frozen=True)
class ChannelWhole:
    """A program has a whole statistic, of runs of positions: ``tile`` runs by positions in a turn, ``stages`` deep. ragged:
    some tiles have fewer elements than lanes.
    """

    tile: Tile
    stages: int
    ragged: bool

    def uneven(self, s: int) -> bool:
        """Whether a lane may have an element of a run of s positions again after a turn without one."""
        return s > self.tile.chunk and s % self.tile.chunk != 0

    def programs(self, sets: int) -> int:
        """How many have so many statistics."""
        return sets


@dataclass(frozen=True)
class ChannelHeld:
    """A program holds a whole statistic, whose runs are the rows of ``tile``; apart, a statistic in each row. ragged: as
    ChannelWhole's. registers: as RowBackwardSplit's.
    """

    tile: Tile
    apart: bool
    ragged: bool
    registers: int | None = None

    def programs(self, sets: int) -> int:
        """How many have so many statistics."""
        return -(-sets // self.tile.rows) if self.apart else sets


@dataclass(frozen=True)
class ChannelSplit:
    """A team of ``team`` programs has a statistic, of which each holds a ``tile`` of runs by positions. ragged: as
    ChannelWhole's. registers: as RowBackwardSplit's.
    """

    tile: Tile
    team: int
    ragged: bool
    registers: int | None = None

    @property
    def lanes(self) -> int:
        """How many threads read the team's words: those of each warp, or, where one cannot hold them, of all."""
        return 32 if self.team <= 32 else 32 * self.tile.warps

    def members(self, s: int) -> int:
        """Over how many of the team a run of s positions goes."""
        return -(-s // self.tile.chunk)

    def programs(self, sets: int) -> int:
        """How many have so many statistics."""
        return sets * self.team


@dataclass(frozen=True)
class ChannelCombine:
    """A program combines the partials of ``sets`` statistics, ``k`` of each at a time, where each part has room for
    ``2**bits`` channels. once: there are no more.
    """

    bits: int
    k: int
    sets: int
    once: bool
    warps: int


@dataclass(frozen=True)
class ChannelLayer:
    """A program has ``tile.rows`` positions at a time, ``tile.chunk`` channels by ``tile.chunk``. held: it holds them all;
    else they are read twice. run: positions that a thread has beside each other. A backward's programs are persistent,
    ``per_sm`` on each multiprocessor, and walk ``stages`` deep.
    """

    tile: Tile
    held: bool
    run: int
    stages: int = 1
    per_sm: int = 1

    def tiles(self, m: int) -> int:
        """How many are those of m positions."""
        return -(-m // self.tile.rows)

    def most_partials(self, c: int, device: Device) -> int:
        """At most how many programs are at work at once on the same channels, each with its partial of dw and db."""
        chunks = 1 if self.held else -(-c // self.tile.chunk)
        return max(1, self.per_sm * device.multiprocessors // chunks)

    def partials(self, m: int, c: int, device: Device) -> int:
        """How many programs share m positions."""
        return _sharing(self.tiles(m), self.most_partials(c, device), device)


# An fp32 sum of more rows than this, one after the other, is divided: with 1024 rows to a team LayerNorm's dw was 1.5 times
# (16384x32768) and 2.5 times (8192x65536) as far from float64 as torch's, and that grows as their square root.
_SUMMED_ROWS = 128


def _sharing(m: int, at_once: int, device: Device) -> int:
    """How many share m rows: ``at_once``, or as many again and again so that none sums too many; scratch has an end."""
    times = max(1, min(-(-m // (_SUMMED_ROWS * at_once)), 4 * device.multiprocessors // at_once))
    return min(m, times * at_once)
