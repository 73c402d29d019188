"""``trinorm profile``: what the GPU's own counters say bounds each kernel of a call."""

from __future__ import annotations

import argparse
import importlib.util
from typing import TYPE_CHECKING

import torch

from ..bench.cases import OPS, PASSES, Case, shapes_of
from ..bench.counters import Kernel, Refused, profile
from ..cases import DTYPES, LAYOUTS
from ..cli import CONDITIONED, HEADS, refuse, wide_console
from ..cli import shape as shape_of
from ..ops.road import HAS_TRITON

if TYPE_CHECKING:
    from rich.table import Table

_STALLS_SHOWN = 3


def add_parser(subparsers: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    """Add ``profile`` to the ``trinorm`` command's subparsers."""
    parser = subparsers.add_parser(
        "profile",
        help="what bounds each kernel of a call, by Nsight Compute",
        description=(
            "Run one call under Nsight Compute (ncu) and show, for each of its kernels, the bytes that DRAM moved beside "
            "the fewest possible, the bandwidth beside that of a kernel that only moves bytes, hits in L2, occupancy, "
            "issue slots, what warps waited for, and what that means. Needs a GPU and leave to read its counters."
        ),
    )
    parser.add_argument("op", choices=OPS, metavar="op", help=f"one of {', '.join(OPS)}")
    parser.add_argument(
        "--shape",
        type=shape_of,
        required=True,
        help=(
            f"rows x columns, e.g. 8192x4096, N x C x ..., e.g. 16x320x64x64, of qk_norm {HEADS}, of modulated and gated "
            f"norms {CONDITIONED}"
        ),
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of x and the weights (bf16)")
    parser.add_argument("--layout", choices=LAYOUTS, default="contiguous", help="of x and y in memory (contiguous)")
    parser.add_argument("--pass", dest="pass_", choices=PASSES, default="forward", help="(forward)")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; its exit status: 0, or 2 where nothing can be counted here."""
    if not torch.cuda.is_available() or not HAS_TRITON:
        return refuse(
            "profile", "there is no GPU with Triton here, so there is nothing to count; trinorm inspect needs none"
        )
    if importlib.util.find_spec("rich") is None:
        return refuse("profile", "rich is not installed; pip install 'trinorm[bench]'")

    if (lacking := OPS[args.op].lacking(args.pass_)) is not None:
        return refuse("profile", f"--pass {args.pass_}: {lacking}")
    dtype = DTYPES[args.dtype]
    try:
        (shape,) = shapes_of(args.op, [args.shape])
    except ValueError as error:
        return refuse("profile", f"--shape: {error}")
    if args.layout not in OPS[args.op].layouts(shape):
        return refuse("profile", f"--layout: {args.layout} is for images and volumes (N x C x H x W, ... x D x H x W)")
    case = Case(args.op, args.pass_, shape, dtype, dtype, args.layout)
    try:
        ceiling, kernels = profile(case)
    except Refused as refusal:
        return refuse("profile", str(refusal))
    wide_console().print(table(case, ceiling, kernels))
    return 0


def table(case: Case, ceiling: Kernel, kernels: list[Kernel]) -> Table:
    """A row for each kernel, between the ceiling's kernel and the fewest bytes that the whole call can move."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    found = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        title=f"{OPS[case.op].title} {case.pass_}, {case.size}, {str(case.dtype).removeprefix('torch.')}",
        caption=(
            "Each kernel starts with cold caches. of ceiling: its bandwidth over that of the first row's kernel. sectors: "
            "of a request to L2, 4 at best.\nwarps: at work on a multiprocessor, of those that fit. issue: cycles in which "
            "a scheduler issues. bound by memory: from 0.9 of the ceiling;\nelse by issue: from 60% of the cycles; else by "
            "latency."
        ),
    )
    found.add_column("kernel", no_wrap=True)
    for header in (
        "µs",
        "MB read",
        "MB written",
        "TB/s",
        "of ceiling",
        "L2 hits",
        "sectors",
        "warps",
        "issue",
        "registers",
    ):
        found.add_column(header, justify="right", no_wrap=True)
    found.add_column("warps wait for", no_wrap=True)
    found.add_column("bound", no_wrap=True)
    # A copy is counted as neg (bench/counters.py).
    ceiling_name = OPS[case.op].ceilings[case.pass_]
    ceiling_name = "torch.neg" if ceiling_name.endswith(("copy", "copies")) else f"torch.{ceiling_name}"
    found.add_row(*_cells(ceiling_name, ceiling, ceiling), "", style="dim")
    for kernel in kernels:
        found.add_row(*_cells(kernel.name, kernel, ceiling), kernel.verdict(ceiling), style="bold")
    found.add_section()
    if len(kernels) > 1:
        sums = (_sum([getattr(kernel, name) for kernel in kernels]) for name in ("seconds", "bytes_read", "bytes_written"))
        found.add_row("together", *(_scaled(total, 1e6 if i == 0 else 1e-6) for i, total in enumerate(sums)))
    found.add_row("fewest possible", "", _scaled(case.bytes_read, 1e-6), _scaled(case.bytes_written, 1e-6))
    return found


def _cells(name: str, kernel: Kernel, ceiling: Kernel) -> tuple[str, ...]:
    bandwidth = kernel.bandwidth
    of_ceiling = bandwidth / ceiling.bandwidth if bandwidth is not None and ceiling.bandwidth else None
    warps = f"{kernel.warps:.1f} of {kernel.warps_fitting:.0f}" if kernel.warps and kernel.warps_fitting else ""
    stalls = list(kernel.stalls.items())[:_STALLS_SHOWN]
    return (
        name,
        _scaled(kernel.seconds, 1e6),
        _scaled(kernel.bytes_read, 1e-6),
        _scaled(kernel.bytes_written, 1e-6),
        _scaled(bandwidth, 1e-12),
        _scaled(of_ceiling, 1),
        _percent(kernel.l2_hits),
        _scaled(kernel.sectors, 1),
        warps,
        _percent(kernel.issue),
        "" if kernel.registers is None else str(kernel.registers),
        "\n".join(f"{reason} {_percent(share)}" for reason, share in stalls),
    )


def _sum(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _scaled(value: float | None, scale: float) -> str:
    return "" if value is None else f"{value * scale:.2f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"
