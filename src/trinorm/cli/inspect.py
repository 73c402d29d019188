"""``trinorm inspect``: what the kernels of a call compile to and what bounds them, with no GPU."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from ..bench.cases import OPS, PASSES, Case, shapes_of
from ..bench.shapes import CONDITIONED_SHAPES, SHAPES
from ..cases import DTYPES
from ..cli import CONDITIONED as COLUMNS
from ..cli import HEADS, names, refuse, shapes, unwritable, wide_console
from ..norms import ROW_OPS, SUM_OPS, Shape
from ..ops.road import HAS_TRITON, INTERPRETED

# Rows as measured; wide ones of which there are few; and wider ones, so that every kernel is met.
ROWS = (*SHAPES, (256, 12288), (1024, 65536), (1024, 66000))
# Of a sum, whose kernels are the same ones with more to read: fewer, which meet each of them too.
ROWS_OF_SUMS = ((16, 4096), (8192, 4096), (1024, 65536), (1024, 66000))
# Of QK-norm: heads that a program has several of, and, where tokens are few, one.
HEADS_OF_TOKENS = ((4, 4096, 32, 8, 128), (64, 1, 32, 8, 128))
# Of conditioned norms: a scale and a shift of each sample; a gate behind the norm, narrow, and one before it, wide; and of
# each, rows that no program holds.
CONDITIONED = ("modulated_layer_norm", "gated_rms_norm", "gated_rms_norm/first")
LONG_ROWS = (8, 512, 16384)

_SELECTED: dict[str, Sequence[Shape]] = {
    **dict.fromkeys(ROW_OPS, ROWS),
    **dict.fromkeys(SUM_OPS, ROWS_OF_SUMS),
    "qk_norm": HEADS_OF_TOKENS,
    **{op: (CONDITIONED_SHAPES[op][0], LONG_ROWS) for op in CONDITIONED},
    "add_modulated_layer_norm": CONDITIONED_SHAPES["add_modulated_layer_norm"][:1],
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``inspect`` to the ``trinorm`` command's subparsers."""
    parser = subparsers.add_parser(
        "inspect",
        help="show what the kernels compile to: registers, instructions, occupancy; no GPU is needed",
        description=(
            "Compile what a call would launch, and show of each kernel its registers, spills and shared memory, its "
            "instructions by kind, the width of its loads and stores, how many programs a multiprocessor keeps at once and "
            "what allows no more, the bytes that it moves, and the time that these and its instructions take at full rate. "
            "Nothing runs. What grew between two --json files, `trinorm bench --compare` shows."
        ),
        epilog=(
            "The repository keeps what all kernels compile to, and its tests fail where one grew. After a change that is "
            "meant, and after one of Triton's version: trinorm inspect --json benchmarks/instructions/sm_90.jsonl"
        ),
    )
    parser.add_argument(
        "op",
        nargs="?",
        type=names(OPS),
        default=list(_SELECTED),
        help=f"comma-separated: {', '.join(OPS)}; a selection of all but channel norms if not given",
    )
    parser.add_argument(
        "--shape",
        dest="shapes",
        type=shapes,
        help=(
            "comma-separated: rows x columns, e.g. 8192x4096; N x C x ..., e.g. 16x320x64x64, in both orders of memory; of "
            f"qk_norm {HEADS}; of modulated and gated norms {COLUMNS}; unless given, a selection, of all but channel "
            "norms one that meets every kernel"
        ),
    )
    parser.add_argument("--dtype", type=names(DTYPES), default=["bf16"], help=f"comma-separated: {', '.join(DTYPES)}")
    parser.add_argument(
        "--pass", dest="passes", type=names(PASSES), default=list(PASSES), help=f"comma-separated: {', '.join(PASSES)}"
    )
    parser.add_argument(
        "--target", default="sm_90", help="sm_80, sm_86, sm_89, sm_90 (H100, H200), sm_100, sm_120 or gfx942"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON line for each kernel; - prints them")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; its exit status: 0, or 2 where it cannot run here."""
    if importlib.util.find_spec("rich") is None:
        return refuse("inspect", "rich is not installed; pip install 'trinorm[bench]'")
    if not HAS_TRITON:
        return refuse("inspect", "Triton is not installed, so there is no kernel to compile")
    if INTERPRETED:
        return refuse("inspect", "TRITON_INTERPRET is set, which leaves nothing to compile; unset it")
    from rich.console import Console
    from rich.progress import track

    from ..bench import report
    from ..bench.predict import predict
    from ..targets import TARGETS

    if args.target not in TARGETS:
        return refuse("inspect", f"{args.target!r} is not one of {', '.join(TARGETS)}")
    to_file = args.json not in (None, Path("-"))
    if to_file and (fault := unwritable(args.json)):
        return refuse("inspect", fault)
    try:
        by_op = {op: shapes_of(op, _SELECTED.get(op) if args.shapes is None else args.shapes) for op in args.op}
    except ValueError as error:
        return refuse("inspect", f"--shape: {error}")
    cases = [
        case
        for dtype, op, pass_ in itertools.product(args.dtype, args.op, args.passes)
        for case in Case.all(op, pass_, by_op[op], DTYPES[dtype])
    ]
    if not cases:
        nothing = dict.fromkeys(OPS[op].lacking(pass_) for op in args.op for pass_ in args.passes)
        return refuse("inspect", "nothing to compile; " + "; ".join(filter(None, nothing)))
    shown = track(cases, "compile", console=Console(stderr=True), transient=True)
    predictions = predict(shown, args.target)
    if args.json is not None:
        lines = "".join(f"{line}\n" for prediction in predictions for line in prediction.to_json())
        if to_file:
            args.json.write_text(lines, "utf-8")
        else:
            sys.stdout.write(lines)
        return 0
    console = wide_console()
    for _, group in itertools.groupby(predictions, lambda of: (of.case.dtype, of.case.op, of.case.pass_)):
        together = list(group)
        console.print(report.prediction_table(together))
        console.print(report.instruction_table(together))
    return 0
