"""What changed between two files, as a table and lines. What counts as a change, changes.py says."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from .changes import NOISE, Changes, Subject

# Noise above which a reader should know that next to nothing is told from it.
_LOOSE = 0.1
# How many of a list are named.
_NAMED = 3


def table(changes: Changes) -> Table:
    """What changed by more than is allowed, the worst first."""
    found = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        caption=(
            f"allowed: a difference that says nothing. Of a time, the noise: the largest of {NOISE:.0%},\n"
            "three standard errors of the medians, what the copy or add of the runs changed by,\n"
            "and what lines of one file differ by."
        ),
    )
    shown = [change for change in changes.compared if change.worse or change.better]
    on = len({change.subject.where for change in changes.compared}) > 1
    for header in ("call", *["on"] * on, "who", "quantity", "before", "after", "change", "allowed"):
        found.add_column(header, justify="left" if header in ("call", "on", "who", "quantity") else "right", no_wrap=True)
    for change in shown:
        cells = (
            str(change.subject),
            *[change.subject.where] * on,
            change.subject.who,
            change.quantity,
            f"{change.before:.4g}",
            "none" if math.isinf(change.after) else f"{change.after:.4g}",
            f"{change.after / change.before - 1:+.1%}" if change.before and math.isfinite(change.after) else "",
            f"{change.allowed:.2g}",
        )
        # What a file says is text, and no markup.
        found.add_row(*map(Text, cells), style="red" if change.fails else "green" if change.better else "dim")
    return found


def summary(changes: Changes) -> str:
    """One line."""
    worse, better = (sum(getattr(change, which) for change in changes.compared) for which in ("worse", "better"))
    same = len(changes.compared) - worse - better
    text = f"{len(changes.compared)} compared: {worse} worse, {better} better, {same} the same within what is allowed."
    if alone := len(changes.only_before) + len(changes.only_after):
        text += f" In one file only: {alone} ({len(changes.only_before)} before, {len(changes.only_after)} after)."
    return text


def remarks(changes: Changes) -> Iterator[str]:
    """What the table does not show, a line each; what fails comes last."""
    if changes.made:
        yield f"Between the files: {', '.join(changes.made)}."
    for was, now in changes.relaunched:
        before, after = dict(was.options), dict(now.options)
        options = [option for option in {**before, **after} if before.get(option) != after.get(option)]
        told = ", ".join(f"{option} {before.get(option)} → {after.get(option)}" for option in options)
        yield f"Launched with other options: {was}, {was.who}: {told}."
    times = [change for change in changes.compared if change.subject.launch is None]
    if loose := [change.allowed / change.before for change in times if change.allowed > _LOOSE * change.before]:
        yield f"Of {len(loose)} times the noise is over {_LOOSE:.0%}, up to {max(loose):.0%}: what is less is not seen."
    if changes.untold:
        yield (
            f"{len(changes.untold)} not compared, for want of a device time before: {_listed(changes.untold)}. "
            "(Of a host time's noise nothing is recorded.)"
        )
    if changes.missing:
        yield (
            f"AFTER lacks {len(changes.missing)} of trinorm's that BEFORE has: {_listed(changes.missing)}. "
            "To compare a part alone, name it: --op, --shapes, --dtype, --pass, --layout."
        )


def _listed(subjects: Sequence[Subject]) -> str:
    """The first few by name."""
    found = [f"{subject}, {subject.who}, on {subject.where}" for subject in subjects[:_NAMED]]
    return "; ".join(found + [f"and {len(subjects) - _NAMED} more"] * (len(subjects) > _NAMED))
