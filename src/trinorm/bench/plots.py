"""Curves over hidden size and over batch size, on log axes, with the ceiling drawn."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .cases import OPS, PASSES, SMALL_BELOW
from .providers import OURS
from .records import Record

# Okabe and Ito's colours, told apart with any kind of colour vision; ours is the only strong one.
_COLOURS = {OURS: "#D55E00", "torch": "#555555", "compile": "#0072B2", "liger": "#009E73", "quack": "#CC79A7"}
_AXES = ("batch size", "hidden size")


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Write PNGs for each op of rows and dtype; their paths. On the left the forward, on the right the backward.

    One for each axis of the shape along which there are at least two sizes: above, the time of a call; below, the
    ceiling's time over it. And one of that ratio over hidden size, where at least two were measured with enough rows for
    the memory to decide.
    """
    figures: dict[Path, Figure] = {}
    by_op: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        if record.pass_ in PASSES and OPS[record.op].of_rows:
            by_op[record.op, record.dtype].append(record)
    for (op, dtype), of_op in by_op.items():
        name, title = f"{op}-{dtype}", f"{OPS[op].title}, {dtype}"
        for axis in (0, 1):
            fixed = _best_covered(of_op, axis)
            if fixed is None:
                continue
            line = [record for record in of_op if record.shape[1 - axis] == fixed]
            figures[folder / f"{name}-{_AXES[axis].replace(' ', '-')}.png"] = _figure(
                line, axis, f"{title}, {_AXES[1 - axis]} {fixed}, {line[0].gpu}"
            )
        large = _largest(of_op)
        if len({record.shape[1] for record in large}) > 1:
            figures[folder / f"{name}-ceiling.png"] = _ceiling_figure(large, f"{title}, {large[0].gpu}")
    for path, figure in figures.items():
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    return list(figures)


def _largest(records: Sequence[Record]) -> list[Record]:
    """For each hidden size, ascending, the records of its most rows, where those are enough for the memory to decide."""
    rows = {n: m for m, n in sorted({record.shape for record in records})}  # the last m of an n is its largest
    shapes = [(m, n) for n, m in sorted(rows.items()) if m * n >= SMALL_BELOW]
    return [record for shape in shapes for record in records if record.shape == shape]


def _ceiling_figure(records: Sequence[Record], title: str) -> Figure:
    """The ceiling's time over each provider's, over hidden size."""
    passes = _passes(records)
    figure = Figure(figsize=(5.6 * len(passes), 4.6), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(passes), sharey=True, squeeze=False)[0]
    for axes, pass_ in zip(panels, passes, strict=True):
        of_pass = [record for record in records if record.pass_ == pass_]
        for provider in dict.fromkeys(record.provider for record in records):
            measured = [record for record in of_pass if record.provider == provider and record.ceiling_ratio is not None]
            sizes = [record.shape[1] for record in measured]
            axes.plot(sizes, [record.ceiling_ratio for record in measured], **_style(provider))
        axes.axhline(1, color="black", linestyle="--", linewidth=1, label="ceiling")
        axes.set_title(f"{pass_} (ceiling: torch's {_ceiling(records, pass_)})", fontsize=10)
        axes.set_xlabel(_AXES[1])
        widths = {record.shape[1] for record in of_pass}
        _log_sizes(axes, sorted(n for n in widths if n & (n - 1) == 0))  # the matrix has others, too close to be labelled
        axes.set_ylim(bottom=0)
    panels[0].set_ylabel("ceiling's time / time")
    _finish(figure, panels[0], title)
    return figure


def _passes(records: Sequence[Record]) -> list[str]:
    return [pass_ for pass_ in PASSES if any(record.pass_ == pass_ for record in records)]


def _ceiling(records: Sequence[Record], pass_: str) -> str:
    return OPS[records[0].op].ceilings[pass_]


def _best_covered(records: Sequence[Record], axis: int) -> int | None:
    """The size of the other axis that was measured at the most sizes of this one; the larger of equals."""
    sizes: dict[int, set[int]] = defaultdict(set)
    for record in records:
        sizes[record.shape[1 - axis]].add(record.shape[axis])
    count, fixed = max((len(found), size) for size, found in sizes.items())
    return fixed if count > 1 else None


def _figure(records: Sequence[Record], axis: int, title: str) -> Figure:
    passes = _passes(records)
    figure = Figure(figsize=(5.2 * len(passes), 7.2), dpi=150, layout="constrained")
    panels = figure.subplots(2, len(passes), sharex=True, sharey="row", squeeze=False)
    for column, pass_ in enumerate(passes):
        times, ratios = panels[:, column]
        of_pass = sorted((record for record in records if record.pass_ == pass_), key=lambda record: record.shape[axis])
        for provider in dict.fromkeys(record.provider for record in records):
            measured = [record for record in of_pass if record.provider == provider and record.device_us is not None]
            sizes = [record.shape[axis] for record in measured]
            times.plot(sizes, [record.device_us for record in measured], **_style(provider))
            ratios.plot(sizes, [record.ceiling_ratio for record in measured], **_style(provider))
        ceiling = {record.shape[axis]: record.ceiling_us for record in of_pass if record.ceiling_us}
        times.plot(list(ceiling), list(ceiling.values()), color="black", linestyle="--", linewidth=1, label="ceiling")
        ratios.axhline(1, color="black", linestyle="--", linewidth=1)
        times.set_title(f"{pass_} (ceiling: torch's {_ceiling(records, pass_)})", fontsize=10)
        ratios.set_xlabel(_AXES[axis])
        sizes = sorted({record.shape[axis] for record in of_pass})
        _log_axes(times, sizes, (1, 2, 5))
        _log_axes(ratios, sizes, (1, 2, 3, 5, 7))
    panels[0, 0].set_ylabel("device time of a call, µs")
    panels[1, 0].set_ylabel("ceiling's time / time")
    _finish(figure, panels[0, 0], title)
    return figure


def _style(provider: str) -> dict[str, Any]:
    """How a provider's line is drawn."""
    ours = provider == OURS
    return dict(
        label=provider,
        color=_COLOURS[provider],
        marker="o",
        markersize=4,
        linewidth=2.2 if ours else 1.2,
        zorder=3 if ours else 2,
    )


def _finish(figure: Figure, labelled: Axes, title: str) -> None:
    """Title, and one legend for all panels, in as few lines as the figure's width allows."""
    figure.suptitle(title, fontsize=12)
    handles, labels = labelled.get_legend_handles_labels()
    for lines in range(1, len(labels) + 1):
        columns = math.ceil(len(labels) / lines)
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def _log_axes(axes: Axes, sizes: Sequence[int], ticks: Sequence[int]) -> None:
    """Both axes logarithmic: marks at ``sizes``, and at ``ticks`` in every decade."""
    _log_sizes(axes, sizes)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _log_sizes(axes: Axes, sizes: Sequence[int]) -> None:
    """The horizontal axis logarithmic, with marks at ``sizes``."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="x", labelrotation=45)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
