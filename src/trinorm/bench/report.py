"""Measurements and predictions as tables, and the seed's own form."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..inspection import KINDS
from .cases import HOST_PASSES, OPS, size
from .predict import Prediction
from .providers import OURS
from .records import Record


def table(records: Sequence[Record]) -> Table:
    """The records of one op, pass and dtype; those of a shape and layout stand together."""
    first = records[0]
    ceiling = OPS[first.op].ceilings[first.pass_]
    found = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        title=f"{OPS[first.op].title} {first.pass_}, {first.dtype}, {first.gpu}",
        caption=(
            f"µs: median device time of a norm, by graph replay. of {ceiling}: that of torch's {ceiling} over it.\n"
            "host µs: an eager call on the CPU. error: largest distance from float64 over that of torch's own result."
        ),
    )
    words = (_shape_header(first.op), "provider")
    for header in (*words, "µs", "mean ± std", "GB/s", f"of {ceiling}", "× torch", "host µs", "error"):
        found.add_column(header, justify="left" if header in words else "right", no_wrap=True)
    for shape, group in itertools.groupby(records, key=_size):
        rows = list(group)
        by_torch = next((row.device_us for row in rows if row.provider == "torch"), None)
        found.add_section()
        found.add_row(shape, ceiling, _number(rows[0].ceiling_us), style="dim")
        for row in rows:
            found.add_row("", *_cells(row, by_torch), style="bold" if row.provider == OURS else None)
    return found


def _cells(row: Record, by_torch: float | None) -> tuple[str, ...]:
    if row.device_us is None:
        return row.provider, "[red]failed[/]"
    speed_up = by_torch / row.device_us if by_torch else None
    return (
        row.provider,
        _number(row.device_us),
        f"{_number(row.device_us_mean)} ± {_number(row.device_us_std)}",
        _number(row.gigabytes_a_second),
        _number(row.ceiling_ratio),
        _number(speed_up),
        _number(row.host_us),
        _number(row.error_ratio) if row.ok else f"[red]WRONG {_number(row.error_ratio)}[/]",
    )


def host_table(records: Sequence[Record]) -> Table:
    """The host times of one op, shape and dtype: a row for each function or module."""
    first = records[0]
    found = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        title=f"{OPS[first.op].title}, {_size(first)}, {first.dtype}: host time of an eager call",
        caption=(
            "µs: median time that a call keeps the CPU.\n"
            "/ torch: that over the time of torch's own function, or module, in the same process."
        ),
    )
    found.add_column("", no_wrap=True)
    for pass_ in HOST_PASSES:
        found.add_column(f"{pass_.removeprefix('host_').replace('_', ' ')}, µs", justify="right")
        found.add_column("/ torch", justify="right")
    times = {(record.provider, record.pass_): record.host_us for record in records}
    for provider in dict.fromkeys(record.provider for record in records):
        cells = []
        for pass_ in HOST_PASSES:
            time = times[provider, pass_]
            by_torch = times.get(("torch.nn" if provider.endswith(".nn") else "torch", pass_))
            cells += [_number(time), _number(time / by_torch if time and by_torch else None)]
        found.add_row(provider, *cells, style="bold" if provider.removesuffix(".nn") == OURS else None)
    return found


def failures(records: Sequence[Record]) -> list[str]:
    """A line for each shape and provider of a table that lacks its figures, with the reason."""
    return list(dict.fromkeys(f"{row.provider}, {_size(row)}: {row.failure}" for row in records if row.failure))


def first_calls(records: Sequence[Record]) -> list[str]:
    """A line for each provider that has something to compile, which torch has not: what its first calls took."""
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    for record in records:
        if record.first_call_s is not None and record.provider != "torch":
            seconds[record.provider].append(record.first_call_s)
    return [
        f"first calls: {provider} {_number(sum(found))} s in {len(found)} cases, at most {_number(max(found))} s"
        for provider, found in seconds.items()
    ]


def seed(records: Sequence[Record]) -> str:
    """The records of one op and pass at the seed's shape, in the seed's own form (its times were ms, these are µs)."""
    first = records[0]
    by = {record.provider: record for record in records}
    ours, theirs = by[OURS], by.get("torch")
    lines = [
        f"{OPS[first.op].title} {first.pass_}, {first.dtype}, device time",
        f"batch_size={first.shape[0]}, hidden_size={first.shape[1]}",
        f"Triton:  {_mean_std(ours)}",
        f"PyTorch: {_mean_std(theirs)}",
    ]
    if theirs and ours.device_us_mean and theirs.device_us_mean:
        lines.append(f"Speedup: {theirs.device_us_mean / ours.device_us_mean:.2f}x")
    return "\n".join(lines)


def _mean_std(record: Record | None) -> str:
    if record is None or record.device_us_mean is None:
        return "not measured"
    return f"{record.device_us_mean:.2f} ± {record.device_us_std:.2f} µs"


def prediction_table(predictions: Sequence[Prediction]) -> Table:
    """The predictions of one op, pass, dtype and target: a row for each kernel."""
    first = predictions[0]
    found = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title=f"{_of(first)}, compiled for {first.target}",
        caption=(
            "registers: of a thread. spills, shared: bytes, of a thread and of a program. resident: programs × warps that\n"
            "a multiprocessor keeps at once, and what allows no more. loads, stores: how many × bits, in ordinary rows'\n"
            "code. MB: what the kernel is given, read or written once. memory, issue: µs that these and its instructions\n"
            "take at full rate. µs: a launch and the larger of the two for each kernel, a prediction from below; of copy,\n"
            "of add and the like: their time over it. Nothing was timed."
        ),
    )
    words = (_shape_header(first.case.op), "kernel", "limit")
    headers = (
        *(*words[:2], "warps", "registers", "spills", "shared", "resident", "limit", "loads", "stores"),
        *("MB", "memory", "issue", "µs", f"of {OPS[first.case.op].ceilings[first.case.pass_]}"),
    )
    for header in headers:
        # What is short of room is taken from the columns that wrap between words; others would be cut within one.
        wraps = header in ("loads", "stores")
        found.add_column(header, justify="left" if header in words else "right", no_wrap=not wraps)
    for prediction in predictions:
        found.add_section()
        call = (_number(prediction.microseconds), _number(prediction.ceiling_ratio))
        for i, kernel in enumerate(prediction.kernels):
            compiled, resident = kernel.compiled, kernel.occupancy
            found.add_row(
                prediction.case.size if i == 0 else "",
                compiled.kernel,
                str(compiled.warps),
                str(compiled.registers),
                f"[red]{compiled.spills}[/]" if compiled.spills else "0",
                str(compiled.shared),
                f"{resident.programs}×{compiled.warps}",
                resident.limit,
                _widths(kernel.ordinary.loads),
                _widths(kernel.ordinary.stores),
                f"{kernel.bytes * 1e-6:.2f}",
                _number(kernel.memory_us),
                _number(kernel.issue_us),
                *(call if i == 0 else ()),
            )
    return found


def instruction_table(predictions: Sequence[Prediction]) -> Table:
    """The instructions of the same kernels: a row for the ordinary rows' code, and one for the loop in it."""
    first = predictions[0]
    found = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title=f"{_of(first)}, instructions on {first.target}",
        caption=(
            "total: of the code that ordinary rows run; in brackets, of all code. in loop: the longest that touches\n"
            "global memory. wait: barriers, and for copies. local: spills. special: rsqrt, exp and the like. convert:\n"
            "between types, but to widen bf16 is alu. fma: products and sums."
        ),
    )
    words = (_shape_header(first.case.op), "kernel")
    for header in (*words, "total", *KINDS):
        left = header in words
        found.add_column(header, justify="left" if left else "right", no_wrap=left or header == "total")
    for prediction in predictions:
        found.add_section()
        for i, kernel in enumerate(prediction.kernels):
            size = prediction.case.size if i == 0 else ""
            every, code = (sum(of.instructions.values()) for of in (kernel.compiled, kernel.ordinary))
            total = str(code) if code == every else f"({every}) {code}"
            found.add_row(size, kernel.compiled.kernel, total, *_counts(kernel.ordinary.instructions))
            if kernel.ordinary.loop:
                loop = kernel.ordinary.loop
                found.add_row("", "  in loop", str(sum(loop.values())), *_counts(loop), style="dim")
    return found


def _of(prediction: Prediction) -> str:
    case = prediction.case
    return f"{OPS[case.op].title} {case.pass_}, {str(case.dtype).removeprefix('torch.')}"


def _counts(instructions: dict[str, int]) -> list[str]:
    return [str(instructions.get(kind, "")) for kind in KINDS]


def _widths(accesses: dict[int, int]) -> str:
    """How many accesses of each width in bits, the widest first, e.g. ``4×128 1×32``."""
    return " ".join(f"{count}×{width}" for width, count in accesses.items())


def _size(record: Record) -> str:
    return size(record.shape, record.layout)


def _shape_header(op: str) -> str:
    return OPS[op].norm.axes


def _number(value: float | None) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return ""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"
