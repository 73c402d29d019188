"""``trinorm tune``: the sweep from which tuning/'s tables are written."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..bench.cases import OPS, PASSES, Case, shapes_of
from ..bench.records import provenance
from ..bench.shapes import CONDITIONED_SHAPES
from ..cases import DTYPES
from ..cli import CONDITIONED, HEADS, refuse, shapes, unwritable, wide_console
from ..norms import ELEMENT_OPS, QUANTIZED_OPS, ROW_OPS
from ..ops.road import HAS_TRITON, INTERPRETED

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

    from ..bench.sweep import Bench, Launch, Trial

_SHOWN = 5

# All but channel norms, norms of a sum, which have the row norms' launches, and weight_norm.
SWEPT = (*ROW_OPS, "qk_norm", *CONDITIONED_SHAPES, *ELEMENT_OPS[:-1], *QUANTIZED_OPS)


def add_parser(subparsers: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    """Add ``tune`` to the ``trinorm`` command's subparsers."""
    parser = subparsers.add_parser(
        "tune",
        help="sweep launches on this GPU, for the tables in tuning/",
        description=(
            "For each shape, vary one field of the launch after another (tile, heads, stages, programs a multiprocessor), "
            "each for the fastest few so far. What spills is not run, what is wrong beside float64 is not timed. Shows the "
            "fastest beside today's; nothing is changed: the tables are edited by hand, with the ratio beside each row."
        ),
    )
    parser.add_argument("op", choices=SWEPT, metavar="op", help=f"one of {', '.join(SWEPT)}")
    parser.add_argument(
        "--shapes",
        type=shapes,
        required=True,
        help=(
            f"comma-separated: rows x columns, or, of qk_norm, {HEADS}, or, of modulated and gated norms, {CONDITIONED}; "
            "or a list's name"
        ),
    )
    parser.add_argument("--pass", dest="pass_", choices=PASSES, default="forward", help="(forward)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of x and the weights (bf16)")
    parser.add_argument("--kind", help="the kind of launch to sweep, e.g. RowBackwardWide; today's if not given")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append a JSON line for each launch tried")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; its exit status: 0, or 2 where it cannot run here."""
    if not torch.cuda.is_available() or not HAS_TRITON or INTERPRETED:
        return refuse("tune", "launches are timed, which takes a GPU, and Triton without TRITON_INTERPRET")
    if importlib.util.find_spec("rich") is None:
        return refuse("tune", "rich is not installed; pip install 'trinorm[bench]'")
    from rich.progress import Progress, TimeElapsedColumn

    from ..bench import sweep
    from ..targets import TARGETS

    if (lacking := OPS[args.op].lacking(args.pass_)) is not None:
        return refuse("tune", f"--pass {args.pass_}: {lacking}")
    kinds = sweep.kinds(args.op, args.pass_)
    if args.kind not in (None, *kinds):
        return refuse("tune", f"{args.kind!r} is not one of {', '.join(kinds)}")
    device = torch.device("cuda", torch.cuda.current_device())
    target = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    if target not in TARGETS:
        return refuse(
            "tune", f"nothing can be compiled for {target} ahead of a launch; targets.TARGETS has {', '.join(TARGETS)}"
        )
    if args.json is not None and (fault := unwritable(args.json)):
        return refuse("tune", fault)
    try:
        asked = shapes_of(args.op, args.shapes)
    except ValueError as error:
        return refuse("tune", f"--shapes: {error}")

    console = wide_console()
    here, stream, dtype = provenance(device), torch.cuda.Stream(device), DTYPES[args.dtype]
    pool = ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"))
    progress = Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console)
    opened = contextlib.nullcontext() if args.json is None else args.json.open("a")
    with opened as file, pool, progress, torch.cuda.stream(stream), torch.no_grad():
        for case in (Case(args.op, args.pass_, shape, dtype, dtype) for shape in asked):
            today = sweep.chosen(case, device)
            begin = today if args.kind is None else sweep.start(case, kinds[args.kind], device)
            bench = sweep.Bench(case, today, device, stream, pool, target)
            evaluate = functools.partial(_followed, bench, progress, str(case))
            trials = sweep.search(begin, today, case, evaluate)
            console.print(table(case, trials, bench.ceiling_us, today))
            if file is not None:
                file.writelines(trial.to_json(case, bench.ceiling_us, today, here) + "\n" for trial in trials)
                file.flush()
    return 0


def _followed(bench: Bench, progress: Progress, name: str, launches: list[Launch]) -> Iterator[Trial]:
    """The bench's trials of some launches, with a progress bar while they last."""
    task = progress.add_task(name, total=len(launches))
    for trial in bench.evaluate(launches):
        yield trial
        progress.advance(task)
    progress.remove_task(task)


def table(case: Case, trials: Sequence[Trial], ceiling_us: float, today: Launch) -> Table:
    """The fastest trials of a case and today's, and how many came to what."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    outcomes = Counter(trial.outcome for trial in trials)
    ceiling = OPS[case.op].ceilings[case.pass_]
    found = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        title=f"{OPS[case.op].title} {case.pass_}, {case.size}, {str(case.dtype).removeprefix('torch.')}",
        caption=f"{ceiling}: {ceiling_us:.2f} µs. " + ", ".join(f"{count} {what}" for what, count in outcomes.items()),
    )
    found.add_column("launch")
    for header in ("µs", f"of {ceiling}", "registers", "spills"):
        found.add_column(header, justify="right")
    shown = [trial for i, trial in enumerate(trials) if i < _SHOWN or trial.launch == today]
    for trial in shown:
        time = ("", trial.outcome)
        if trial.device_us is not None:
            time = (f"{trial.device_us:.2f} ± {trial.device_us_std:.2f}", f"{ceiling_us / trial.device_us:.3f}")
        mark, style = ("today: ", "bold") if trial.launch == today else ("", None)
        found.add_row(f"{mark}{trial.launch}", *time, str(trial.registers), str(trial.spills), style=style)
    return found
