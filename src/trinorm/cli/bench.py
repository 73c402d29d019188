"""``trinorm bench``: correctness first, then times; with no GPU, correctness and predictions."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import os
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..bench.cases import CHAIN, HOST, HOST_PASSES, OPS, PASSES, Case, shapes_of
from ..bench.providers import OURS, PEERS, load
from ..bench.records import Record, provenance, results_path
from ..bench.shapes import NAMED_SHAPES, SEED_SHAPE, SWEEPS
from ..cases import DTYPES, LAYOUTS
from ..cli import CONDITIONED, HEADS, names, no_folder, refuse, shapes, unwritable, wide_console
from ..norms import ROW_OPS, Shape
from ..ops.road import HAS_TRITON, INTERPRETED

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from ..bench.changes import Part


class _Noted(argparse.Action):
    """Stores what is given, and in ``given`` that it was: beside --compare that is another thing than a default."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        setattr(namespace, self.dest, values)
        namespace.given = [*namespace.given, self.option_strings[0]]


def add_parser(subparsers: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    """Add ``bench`` to the ``trinorm`` command's subparsers."""
    parser = subparsers.add_parser(
        "bench",
        help="time the norms beside torch, torch.compile and the peers installed",
        description=(
            "Check each result against float64, then time it: device time by CUDA-graph replay over buffers rotated past "
            "L2, host time of an eager call, beside what torch moves the same bytes with in the same run: copy (forward) "
            "or add (backward), of a sum two copies or addcmul, with a gate add or copies of half of what moves, as of a "
            "quantized result, whose forward is measured alone. With no GPU: check through Triton's interpreter, and show "
            "what compiling for an H200 tells."
        ),
        epilog=(
            "The exit status is 1 where a result of trinorm's is wrong or was not measured, or, by --compare, worse or "
            "missing; 2 where the command cannot run, or nothing of what was asked for can be had here: chain and host are "
            "times alone, so without a GPU there is nothing of them. Else it is 0."
        ),
    )
    parser.register("action", None, _Noted)
    parser.set_defaults(func=run, given=[])
    known = f"comma-separated: {', '.join(OPS)}; the first two if not given"
    parser.add_argument("--op", type=names(OPS), default=list(ROW_OPS), help=known)
    parser.add_argument(
        "--shapes",
        type=shapes,
        help=(
            "comma-separated: rows x columns, e.g. 128x768,8192x4096; of channel norms, which are measured in both orders "
            "of memory where torch has two, and GroupNorm with 32 groups, N x C x ..., e.g. 16x320x64x64; of qk_norm "
            f"{HEADS}, whose queries and keys lie in a packed projection; of modulated and gated norms {CONDITIONED}, "
            "whose x and gate lie in one too, and of per_head_rms_norm and l2_norm (batch x) tokens x heads x elements; or "
            f"the name of a list: {', '.join(NAMED_SHAPES)}"
        ),
    )
    parser.add_argument("--dtype", type=names(DTYPES), default=["bf16"], help=f"comma-separated: {', '.join(DTYPES)}")
    parser.add_argument(
        "--pass",
        dest="passes",
        type=names((*PASSES, CHAIN, HOST)),
        default=list(PASSES),
        help=(
            "comma-separated: forward, backward (these two if not given); chain: one of many forwards in a CUDA graph, "
            "each of what the one before wrote, below 2^22 elements; host: eager calls of functions and modules, at "
            "128x768, 2x64x8x8, 128x8x2x64 or 2x64x768"
        ),
    )
    parser.add_argument(
        "--layout",
        type=names(LAYOUTS),
        default=list(LAYOUTS),
        help=f"comma-separated: {', '.join(LAYOUTS)}; both, where torch has two, if not given",
    )
    parser.add_argument("--peers", type=_peers, default=list(PEERS), help=f"comma-separated: {', '.join(PEERS)}; or none")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write a JSON line a record; in a folder, as <gpu>/<date>-<what>.jsonl"
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FOLDER",
        help=(
            "draw times over hidden size and batch size, and the ceiling's ratio over every hidden size; without --shapes, "
            "measures more shapes for it"
        ),
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("BEFORE", "AFTER"),
        help=(
            "measure nothing, but show what got slower and what faster between two --json files (of any GPU; none is "
            "needed), or what grew between two files of `trinorm inspect --json`; the exit status is 1 where a time or a "
            "kernel of trinorm's is worse by more than noise, or than is allowed, and where AFTER lacks one that BEFORE "
            "has. --op, --shapes, --dtype, --pass and --layout beside it say what part of the files is compared"
        ),
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; its exit status: 0, 1 where a result of trinorm's is wrong (or worse), 2 where it cannot run."""
    if args.compare and (useless := [option for option in args.given if option in ("--peers", "--json", "--plot")]):
        return refuse(
            "bench", f"--compare measures nothing, so {' and '.join(dict.fromkeys(useless))} cannot stand beside it"
        )
    needed = ["rich"] + ["matplotlib"] * (args.plot is not None)
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        return refuse("bench", f"{' and '.join(missing)} not installed; pip install 'trinorm[bench]'")
    if args.compare:
        before, after = args.compare
        return _compare(before, after, _part(args))
    if not HAS_TRITON:
        return refuse("bench", "Triton is not installed, so there is no kernel to measure or compile")
    if INTERPRETED:
        return refuse("bench", "TRITON_INTERPRET is set, which leaves nothing to time or compile; unset it")
    if CHAIN in args.passes and (unchained := [op for op in args.op if not OPS[op].chained]):
        return refuse("bench", f"--pass chain: {unchained[0]} takes more than another returns; leave one of the two out")
    on_gpu = torch.cuda.is_available()
    times_alone = [pass_ for pass_ in args.passes if not on_gpu and pass_ not in PASSES]
    why = f"{' and '.join(times_alone)}: times alone, and there is no GPU to measure them on"
    if times_alone == args.passes:
        return refuse("bench", f"--pass {why}; {' and '.join(PASSES)} can be checked and compiled without one")
    try:
        plan = _plan(args, (*PASSES, CHAIN, HOST) if on_gpu else PASSES, sweeps=on_gpu)
    except ValueError as error:
        return refuse("bench", f"--shapes: {error}")
    if not any(plan.values()):
        return refuse("bench", f"nothing to measure; {'; '.join(_nothing_of(plan))}")
    console = wide_console()
    for line in [why] * bool(times_alone) + _nothing_of(plan):
        console.print(f"Left out: {line}.", markup=False)
    return _measure(args, plan, console) if on_gpu else _predict(args, plan, console)


def _compare(before: Path, after: Path, part: Part) -> int:
    from ..bench import changes, changes_report

    try:
        found = changes.compare_lines(changes.read(before), changes.read(after), part)
        table = changes_report.table(found)
    except KeyError as missing:
        return refuse("bench", f"--compare: a line without {missing}, so not one of trinorm's --json files")
    # What a value of the wrong kind comes to, wherever it is first computed with, or shown.
    except (TypeError, AttributeError, ArithmeticError) as error:
        return refuse("bench", f"--compare: a value of the wrong kind ({error}), so not one of trinorm's --json files")
    except ValueError as error:
        return refuse("bench", f"--compare: {error}")
    console = wide_console()
    if found.compared:
        console.print(table)
    for line in (changes_report.summary(found), *changes_report.remarks(found)):
        console.print(line, markup=False)
    if not found.compared:
        return refuse("bench", "--compare: the files have lines in common, and no figure in them that can be compared")
    return int(bool(found.failures or found.missing))


def _part(args: argparse.Namespace) -> Part:
    """What --compare is to look at: of each option that was given."""
    shapes: dict[str, Collection[object]] = {}
    for one in args.shapes or ():
        named = isinstance(one, str)
        shapes[one if named else "x".join(map(str, one))] = (
            [*itertools.chain(*NAMED_SHAPES[one].values())] if named else [one]
        )
    asked: dict[str, tuple[str, dict[str, Collection[object]]]] = {
        "--op": ("op", {op: [op] for op in args.op}),
        "--shapes": ("shape", shapes),
        "--dtype": ("dtype", {name: [str(DTYPES[name]).removeprefix("torch.")] for name in args.dtype}),
        "--pass": ("pass_", {pass_: HOST_PASSES if pass_ == HOST else [pass_] for pass_ in args.passes}),
        "--layout": ("layout", {layout: [layout] for layout in args.layout}),
    }
    return {field: words for option, (field, words) in asked.items() if option in args.given}


def _measure(args: argparse.Namespace, plan: _Plan, console: Console) -> int:
    from ..bench import report
    from ..bench.host import measure_host
    from ..bench.measure import measure

    device = torch.device("cuda", torch.cuda.current_device())
    here = provenance(device)
    path = args.json and results_path(args.json, here.gpu, here.date, "-".join(args.op + args.dtype).replace("/", "-"))
    if path is not None and (fault := unwritable(path)):
        return refuse("bench", fault)
    if args.plot is not None and (fault := no_folder(args.plot)):
        return refuse("bench", fault)
    console.print(f"{here.gpu}, torch {here.torch}, triton {here.triton}")
    providers, absent = load(args.peers)
    for name, reason in absent.items():
        console.print(f"{name} is not measured: {reason}", markup=False)

    cases = {table: of for table, of in plan.items() if table[1] != HOST}
    hosted = [case for table, of in plan.items() if table[1] == HOST for case in of]
    # Each record says where it comes from, so runs of one day may share a file.
    opened = contextlib.nullcontext() if path is None else path.open("a")
    with _progress(console) as progress, opened as file:
        measured_ones = (case.op in provider.ops for of in cases.values() for case in of for provider in providers)
        task = progress.add_task("", total=sum(measured_ones) + len(hosted))

        def write(records: Iterable[Record]) -> None:
            if file is not None:
                file.writelines(record.to_json() + "\n" for record in records)
                file.flush()

        def show(table: Table, records: Sequence[Record]) -> None:
            console.print(table)
            for line in report.failures(records):
                console.print(line, style="red", markup=False)

        def measured(cases: Iterable[Case]) -> list[Record]:
            records: list[Record] = []
            for case in cases:

                def started(provider: str, case: Case = case) -> None:
                    progress.update(task, description=f"{case} {provider}")

                found = measure(case, providers, here, device, started)
                progress.advance(task, len(found))
                write(found)
                records += found
            return records

        # The seed's own table comes first.
        by_table = {table: measured(case for case in of if case.shape == SEED_SHAPE) for table, of in cases.items()}
        for records in filter(None, by_table.values()):
            console.print(report.seed(records), end="\n\n")
        for table, records in by_table.items():
            records += measured(case for case in cases[table] if case.shape != SEED_SHAPE)
            if records:
                show(report.table(records), records)

        of_host: list[Record] = []
        for case in hosted:

            def begun(pass_: str, case: Case = case) -> None:
                progress.update(task, description=f"{case.op} {pass_}")

            found = measure_host(case, providers, here, device, torch.cuda.current_stream(device), begun)
            progress.advance(task)
            write(found)
            show(report.host_table(found), found)
            of_host += found

    records = [*itertools.chain.from_iterable(by_table.values()), *of_host]
    for line in report.first_calls(records):
        console.print(line)
    if path is not None:
        console.print(f"wrote {path}")
    if args.plot is not None:
        from ..bench import plots

        drawn = plots.draw(records, args.plot)
        console.print(*(f"wrote {found}" for found in drawn), sep="\n")
        if not drawn:
            console.print("nothing to draw: no two shapes share their rows or their columns")
    return int(
        any(record.provider.removesuffix(".nn") == OURS and (record.failure or record.ok is False) for record in records)
    )


def _predict(args: argparse.Namespace, plan: _Plan, console: Console) -> int:
    from ..bench import report
    from ..bench.predict import predict

    console.print("There is no GPU: nothing is timed; the kernels are checked in Triton's interpreter, and compiled.")
    if args.json or args.plot:
        console.print("--json and --plot hold measurements only: nothing is written.")
    status = _check_interpreted(args)
    cases = list(plan.values())
    with _progress(console) as progress:
        task = progress.add_task("", total=sum(map(len, cases)))

        def shown(cases: Iterable[Case]) -> Iterator[Case]:
            for case in cases:
                progress.update(task, description=f"{case} compile")
                yield case
                progress.advance(task)

        for of_table in filter(None, cases):
            console.print(report.prediction_table(predict(shown(of_table))))
    return status


def _check_interpreted(args: argparse.Namespace) -> int:
    """``trinorm check`` in a process of its own, since one process cannot both interpret and compile; its exit status."""
    command = [sys.executable, "-m", "trinorm", "check", "--quick"]
    command += ["--op", ",".join(args.op), "--dtype", ",".join(args.dtype)]
    return subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}).returncode


# What one printed table holds: op, pass, dtype.
_Table = tuple[str, str, torch.dtype]
_Plan = dict[_Table, list[Case]]


def _plan(args: argparse.Namespace, passes: Sequence[str], sweeps: bool) -> _Plan:
    """What is measured for each table of those passes. Raises ValueError for a shape that an op does not take."""
    found = {}
    for table in _tables(args, passes):
        op, pass_, dtype = table
        shapes = _shapes(args, op) if sweeps else shapes_of(op, args.shapes)
        # Of the host one small shape, whose record is a backward's but for the time.
        of = [Case(op, "backward", OPS[op].host, dtype, dtype)] if pass_ == HOST else _cases(table, shapes)
        found[table] = [case for case in of if case.worthwhile and case.layout in args.layout]
    return found


def _nothing_of(plan: _Plan) -> list[str]:
    """A line for each table that nothing is measured for."""
    but = {CHAIN: "a chain is of norms below 2^22 elements", HOST: "host times are of contiguous tensors"}
    other = "no such shape in such a layout"
    return [
        f"{op} {pass_}, {str(dtype).removeprefix('torch.')}: {OPS[op].lacking(pass_) or but.get(pass_, other)}"
        for (op, pass_, dtype), cases in plan.items()
        if not cases
    ]


def _tables(args: argparse.Namespace, passes: Sequence[str]) -> list[_Table]:
    """The tables of those passes that were asked for."""
    asked = [pass_ for pass_ in args.passes if pass_ in passes]
    return [(op, pass_, DTYPES[dtype]) for dtype in args.dtype for op in args.op for pass_ in asked]


def _shapes(args: argparse.Namespace, op: str) -> list[Shape]:
    """What is measured of an op: what was asked for, and without that, what a plot needs besides."""
    more = SWEEPS if args.shapes is None and args.plot is not None and OPS[op].of_rows else ()
    return list(dict.fromkeys([*shapes_of(op, args.shapes), *more]))


def _cases(table: _Table, shapes: Iterable[Shape]) -> list[Case]:
    op, pass_, dtype = table
    return Case.all(op, pass_, shapes, dtype)


def _progress(console: Console) -> Progress:
    from rich.progress import Progress, TimeElapsedColumn

    return Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console)


def _peers(text: str) -> list[str]:
    return [] if text == "none" else names(PEERS)(text)
