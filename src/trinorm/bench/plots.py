"""Curves over hidden size and over batch size, on log axes, with the ceiling drawn."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .cases import OPS, PASSES
from .providers import OURS
from .records import Record

# Okabe and Ito's colours, told apart with any kind of colour vision; ours is the only strong one.
_COLOURS = {OURS: "#D55E00", "torch": "#555555", "compile": "#0072B2", "liger": "#009E73", "quack": "#CC79A7"}
_AXES = ("batch size", "hidden size")


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Write a PNG for each op, dtype and axis of the shape along which there are at least two sizes; their paths.

    Above, the time of a call; below, the ceiling's time over it. On the left the forward, on the right the backward.
    """
    written: list[Path] = []
    by_op: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        by_op[record.op, record.dtype].append(record)
    for (op, dtype), of_op in by_op.items():
        for axis in (0, 1):
            fixed = _best_covered(of_op, axis)
            if fixed is None:
                continue
            line = [record for record in of_op if record.shape[1 - axis] == fixed]
            path = folder / f"{op}-{dtype}-{_AXES[axis].replace(' ', '-')}.png"
            folder.mkdir(parents=True, exist_ok=True)
            _figure(line, axis, f"{OPS[op].title}, {dtype}, {_AXES[1 - axis]} {fixed}, {line[0].gpu}").savefig(path)
            written.append(path)
    return written


def _best_covered(records: Sequence[Record], axis: int) -> int | None:
    """The size of the other axis that was measured at the most sizes of this one; the larger of equals."""
    sizes: dict[int, set[int]] = defaultdict(set)
    for record in records:
        sizes[record.shape[1 - axis]].add(record.shape[axis])
    count, fixed = max((len(found), size) for size, found in sizes.items())
    return fixed if count > 1 else None


def _figure(records: Sequence[Record], axis: int, title: str) -> Figure:
    passes = [pass_ for pass_ in PASSES if any(record.pass_ == pass_ for record in records)]
    figure = Figure(figsize=(5.2 * len(passes), 7.2), dpi=150, layout="constrained")
    panels = figure.subplots(2, len(passes), sharex=True, sharey="row", squeeze=False)
    for column, pass_ in enumerate(passes):
        times, ratios = panels[:, column]
        of_pass = sorted((record for record in records if record.pass_ == pass_), key=lambda record: record.shape[axis])
        for provider in dict.fromkeys(record.provider for record in records):
            measured = [record for record in of_pass if record.provider == provider and record.device_us is not None]
            sizes = [record.shape[axis] for record in measured]
            style = dict(
                label=provider,
                color=_COLOURS[provider],
                marker="o",
                markersize=4,
                linewidth=2.2 if provider == OURS else 1.2,
                zorder=3 if provider == OURS else 2,
            )
            times.plot(sizes, [record.device_us for record in measured], **style)
            ratios.plot(sizes, [record.ceiling_ratio for record in measured], **style)
        ceiling = {record.shape[axis]: record.ceiling_us for record in of_pass if record.ceiling_us}
        name = "copy" if pass_ == "forward" else "add"
        times.plot(list(ceiling), list(ceiling.values()), color="black", linestyle="--", linewidth=1, label="ceiling")
        ratios.axhline(1, color="black", linestyle="--", linewidth=1)
        times.set_title(f"{pass_} (ceiling: torch's {name})", fontsize=10)
        ratios.set_xlabel(_AXES[axis])
        sizes = sorted({record.shape[axis] for record in of_pass})
        _log_axes(times, sizes, (1, 2, 5))
        _log_axes(ratios, sizes, (1, 2, 3, 5, 7))
    panels[0, 0].set_ylabel("device time of a call, µs")
    panels[1, 0].set_ylabel("ceiling's time / time")
    figure.suptitle(title, fontsize=12)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def _log_axes(axes: Axes, sizes: Sequence[int], ticks: Sequence[int]) -> None:
    """Both axes logarithmic: marks at ``sizes``, and at ``ticks`` in every decade."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
    axes.yaxis.set_major_locator(LogLocator(subs=ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="x", labelrotation=45)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
