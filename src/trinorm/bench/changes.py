"""What changed from one file of records to another: times beyond their noise, kernels beyond what is allowed them.

A file holds the lines of ``trinorm bench --json`` (times) or those of ``trinorm inspect --json`` (kernels). What both files
hold is compared: times where they are of the same GPU, kernels where they are for the same target. What is not compared is
said, and of what is ours it counts as worse: a regression must not hide by not being measured.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from .cases import size
from .providers import OURS

Line = dict[str, Any]
# What of the files is asked for: of fields of Subject, the values, by the words that ask for them.
Part = Mapping[str, Mapping[str, Collection[object]]]

# Two runs of the same code on one H200 may differ by so much.
NOISE = 0.02
# How far a median of replays may be off, in its standard errors; one is σ·√(π/2)/√replays.
_STANDARD_ERRORS = 3

# What a kernel may grow by, by which a change of a few lines moves ptxas: a step of the registers that a thread is given
# (as long as as many programs run at once), a value parked in local memory, and so much of its instructions.
REGISTERS = 8
SPILLS = 8
INSTRUCTIONS = 0.05


class Subject(NamedTuple):
    """What a line is about. where: a GPU or a target. who: a provider or a kernel. launch: of the call's, the kernel's; a
    time has none. options: what the kernel is launched with, and its grid.
    """

    op: str
    pass_: str
    shape: tuple[int, ...]
    layout: str
    dtype: str
    weight_dtype: str
    where: str
    who: str
    launch: int | None = None
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, line: Line) -> Subject:
        """Raises KeyError for a line that is neither a time's nor a kernel's."""
        kernel = "kernel" in line
        return cls(
            op=line["op"],
            pass_=line["pass"],
            shape=tuple(line["shape"]),
            layout=line.get("layout", "contiguous"),
            dtype=line["dtype"],
            weight_dtype=line["weight_dtype"],
            where=line["target" if kernel else "gpu"],
            who=line["kernel" if kernel else "provider"],
            launch=line["launch"] if kernel else None,
            options=_options(line) if kernel else (),
        )

    @property
    def ours(self) -> bool:
        return self.launch is not None or self.who.removesuffix(".nn") == OURS

    @property
    def whatever_options(self) -> Subject:
        return self._replace(options=())

    def __str__(self) -> str:
        weight = "" if self.weight_dtype == self.dtype else f", {self.weight_dtype} weight"
        return f"{self.op} {self.pass_} {size(self.shape, self.layout)} {self.dtype}{weight}"


def _options(line: Line) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted({**line.get("options", {}), "grid": tuple(line.get("grid", ()))}.items()))


@dataclass(frozen=True)
class Change:
    """One quantity of one subject, before and after. allowed: the difference that says nothing. more: is it better?"""

    subject: Subject
    quantity: str
    before: float
    after: float
    allowed: float
    more: bool = False

    @property
    def worse_by(self) -> float:
        """The worse over the better value, less 1; negative where it is after that is better."""
        low, high = sorted((self.before, self.after))
        by = high / low - 1 if low else math.inf if high else 0.0
        return by if self._growth > 0 else -by

    @property
    def worse(self) -> bool:
        return self._growth > self.allowed

    @property
    def better(self) -> bool:
        return self._growth < -self.allowed

    @property
    def _growth(self) -> float:
        return self.before - self.after if self.more else self.after - self.before

    @property
    def fails(self) -> bool:
        """Whether it is worse, and ours: that a peer got slower is shown and no fault."""
        return self.worse and self.subject.ours

    def __str__(self) -> str:
        return f"{self.subject}, {self.subject.who}: {self.quantity} {self.before:.4g} → {self.after:.4g}"


@dataclass(frozen=True)
class Changes:
    """compared: every quantity that both files hold, the worst first. only_before, only_after: what one of them lacks.

    relaunched: launches of other options than before, both ways. untold: what both hold, and nothing can be said of. made:
    what differs in how the files were made.
    """

    compared: tuple[Change, ...]
    only_before: tuple[Subject, ...]
    only_after: tuple[Subject, ...]
    relaunched: tuple[tuple[Subject, Subject], ...]
    untold: tuple[Subject, ...]
    made: tuple[str, ...]

    @property
    def failures(self) -> list[Change]:
        return [change for change in self.compared if change.fails]

    @property
    def missing(self) -> list[Subject]:
        """What is ours and is there no more."""
        return [subject for subject in self.only_before if subject.ours]


def read(path: Path) -> list[Line]:
    """A file's lines. Raises ValueError where it does not hold such lines."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not lines:
        raise ValueError(f"{path}: there is no line in it")
    return [_line(text, f"{path}:{number}") for number, text in enumerate(lines, 1)]


def _line(text: str, where: str) -> Line:
    try:
        line = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from error
    if not isinstance(line, dict):
        raise ValueError(f"{where}: not an object")
    return line


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number to compare")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(text)


def compare_lines(before: Sequence[Line], after: Sequence[Line], part: Part | None = None) -> Changes:
    """What changed. Raises ValueError where nothing can be compared, KeyError where a line lacks what it should have."""
    old, new = (_by_subject(lines) for lines in (before, after))
    for field, words in (part or {}).items():
        for word, values in words.items():
            if not any(getattr(subject, field) in values for subject in (*old, *new)):
                raise ValueError(f"neither file has a line of {word}")
    old, new = _told_apart(*(_asked(of, part or {}) for of in (old, new)))
    pairs = _pairs(old, new)
    if not pairs:
        where = "; ".join(", ".join(sorted({subject.where for subject in of})) or "none" for of in (old, new))
        raise ValueError(
            f"the files have nothing in common: no op, pass, shape and dtype on the same GPU or target (these are: {where})"
        )
    changes = {was: list(_changes(was, old[was], new[now])) for was, now in pairs.items()}
    return Changes(
        tuple(sorted(itertools.chain(*changes.values()), key=lambda change: change.worse_by, reverse=True)),
        tuple(subject for subject in old if subject not in pairs),
        tuple(subject for subject in new if subject not in pairs.values()),
        tuple((was, now) for was, now in pairs.items() if was != now),
        tuple(subject for subject, found in changes.items() if not found),
        tuple(_made([old[was] for was in pairs], [new[now] for now in pairs.values()])),
    )


_Lines = dict[Subject, list[Line]]


def _by_subject(lines: Iterable[Line]) -> _Lines:
    found = defaultdict(list)
    for line in lines:
        found[Subject.of(line)].append(line)
    return dict(found)


def _asked(of: _Lines, part: Part) -> _Lines:
    allowed = {field: set().union(*words.values()) for field, words in part.items()}
    return {s: lines for s, lines in of.items() if all(getattr(s, field) in allowed[field] for field in allowed)}


def _told_apart(*files: _Lines) -> list[_Lines]:
    """Where a file has one launch with several options: with those that tell these apart in its name."""
    telling: dict[Subject, set[str]] = defaultdict(set)
    for file in files:
        first: dict[Subject, Subject] = {}
        for subject in file:
            one = first.setdefault(subject.whatever_options, subject)
            telling[one.whatever_options] |= {option for option, _ in set(one.options) ^ set(subject.options)}

    def named(subject: Subject) -> Subject:
        told = [f"{o}={value}" for o, value in subject.options if o in telling[subject.whatever_options]]
        return subject._replace(who=" ".join([subject.who, *told]))

    return [{named(subject): lines for subject, lines in file.items()} for file in files]


def _pairs(old: _Lines, new: _Lines) -> dict[Subject, Subject]:
    """What is compared with what: the same with the same, and a launch with itself where its options changed."""
    alone: list[dict[Subject, list[Subject]]] = []
    for file, other in ((old, new), (new, old)):
        alone.append(defaultdict(list))
        for subject in file.keys() - other.keys():
            alone[-1][subject.whatever_options].append(subject)
    was, now = alone
    changed = {was[name][0]: now[name][0] for name in was if len(was[name]) == len(now.get(name, ())) == 1}
    return {subject: changed.get(subject, subject) for subject in old if subject in new or subject in changed}


def _made(before: Iterable[list[Line]], after: Iterable[list[Line]]) -> Iterator[str]:
    """What the lines that are compared were made with, where that is not the same."""
    old, new = (_versions(itertools.chain(*lines)) for lines in (before, after))
    for what in old:
        if old[what] != new.get(what, old[what]):
            yield f"{what} {' and '.join(sorted(old[what]))} → {' and '.join(sorted(new[what]))}"


def _versions(lines: Iterable[Line]) -> dict[str, set[str]]:
    """What is not known is left out."""
    found: dict[str, set[str]] = defaultdict(set)
    for line in lines:
        for what, version in _state(line).items():
            found[what].add(version)
    return dict(found)


def _state(line: Line) -> dict[str, str]:
    """The versions that a line's figures are of, as far as it says them."""
    who = line.get("provider", OURS)
    of = {f"{who}": line.get("provider_version"), "torch": line.get("torch"), "triton": line.get("triton")}
    # A peer is the same at every commit of ours.
    of |= {"commit": line.get("commit")} if f"{who}".removesuffix(".nn") == OURS else {}
    return {what: f"{version}" for what, version in of.items() if version is not None}


def _changes(subject: Subject, before: list[Line], after: list[Line]) -> Iterator[Change]:
    if "kernel" not in before[0]:
        yield from _time_changes(subject, before, after)
        return
    versions = {line["triton"] for line in before + after}
    if len(versions) > 1:
        raise ValueError(
            f"compiled by Triton {' and '.join(sorted(versions))}, whose code differs: make both files with one version"
        )
    for lines in (before, after):
        if any(line != lines[0] for line in lines):
            raise ValueError(f"one file has {subject}, {subject.who}, twice, and not the same of it: keep one of the two")
    old, new = before[0], after[0]
    yield Change(subject, "registers", old["registers"], new["registers"], REGISTERS)
    yield Change(subject, "bytes spilled", old["spills"], new["spills"], SPILLS)
    programs, programs_now = (line["occupancy"]["programs"] for line in (old, new))
    yield Change(subject, "programs at once", programs, programs_now, 0, more=True)
    for quantity, code in (("instructions", "instructions"), ("instructions in loop", "loop")):
        count, count_now = (sum(line["ordinary"][code].values()) for line in (old, new))
        if count and count_now:  # a loop that came or went, unrolled or not, is in the count of all instructions
            yield Change(subject, quantity, count, count_now, count * INSTRUCTIONS)


class _Time(NamedTuple):
    """In microseconds: the median of the lines' medians, and the ceiling's. Relative: how far apart the lines are (spread),
    and the standard error of their medians.
    """

    median: float
    ceiling: float | None
    spread: float
    error: float


def _time_changes(subject: Subject, before: list[Line], after: list[Line]) -> Iterator[Change]:
    """Device time. Its noise is the largest of: NOISE; the standard errors of both medians; how far apart the lines of one
    file are; how far the copy or add went, which did not change. Host times are not compared: of their noise nothing is
    recorded. A time that is there no more (a wrong result, an error) is infinite, one of the host too.
    """
    for lines in (before, after):
        for what, versions in _versions(lines).items():
            if len(versions) > 1:
                raise ValueError(
                    f"one file has {subject}, {subject.who}, of {what} {' and '.join(sorted(versions))}, whose difference "
                    f"would pass for noise: compare files of one {what} each"
                )
    old, new = _time(before), _time(after)
    if old is None:
        if (host := _host(before)) and not _host(after):
            yield Change(subject, "host µs", statistics.median(host), math.inf, 0)
        return
    if new is None:
        yield Change(subject, "µs", old.median, math.inf, 0)
        return
    drift = new.ceiling / old.ceiling - 1 if new.ceiling and old.ceiling else 0.0
    same_way = drift * (new.median - old.median) > 0  # a copy that got faster is no reason for us to be slower
    noise = max(NOISE, abs(drift) * same_way, old.spread, new.spread, _STANDARD_ERRORS * math.hypot(old.error, new.error))
    yield Change(subject, "µs", old.median, new.median, noise * old.median)


def _host(lines: list[Line]) -> list[float]:
    return [line["host_us"] for line in lines if line.get("host_us") is not None]


def _time(lines: list[Line]) -> _Time | None:
    timed = [line for line in lines if line["device_us"] is not None]
    if not timed:
        return None
    times = [line["device_us"] for line in timed]
    for line in timed:
        for what in ("device_us", "ceiling_us", "replays"):
            if line[what] is not None and line[what] <= 0:
                raise ValueError(f"{line[what]} as {what} is no such figure")
        if line["device_us_std"] < 0:
            raise ValueError(f"{line['device_us_std']} as device_us_std is no such figure")
    median = statistics.median(times)
    errors = [math.sqrt(math.pi / 2 / line["replays"]) * line["device_us_std"] / median for line in timed]
    ceilings = [line["ceiling_us"] for line in timed if line["ceiling_us"]]
    ceiling = statistics.median(ceilings) if ceilings else None
    return _Time(median, ceiling, (max(times) - min(times)) / median, max(errors))
