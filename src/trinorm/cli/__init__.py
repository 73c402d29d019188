"""The command line: ``trinorm check``, ``bench``, ``inspect``, ``profile`` and ``tune``."""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from rich.console import Console

# The longest rows that are tested, and so promised. (From 2^31 columns on, no kernel compiles.)
MAX_COLUMNS = 1 << 20

# In fp64 what torch can count the bytes of.
MAX_ELEMENTS = (1 << 60) - 1

# How qk_norm's shapes are written.
HEADS = "(batch x) tokens x query heads x key heads x elements of a head, e.g. 4x4096x32x8x128"

# How those of modulated and gated norms are; of heads with a weight each, the last two are these.
CONDITIONED = "batch x tokens x columns, e.g. 64x256x1152"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, of ``sys.argv`` unless ``arguments`` are given; its exit status."""
    from .. import __version__
    from ..cli import bench, check, inspect, profile, tune

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whose encoding may have no × or µ: a ? there, and not the loss of a run
            stream.reconfigure(errors="replace")
    parser = argparse.ArgumentParser(prog="trinorm", description="Normalization for PyTorch, written in Triton.")
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="check | bench | inspect | profile | tune")
    check.add_parser(subparsers)
    bench.add_parser(subparsers)
    inspect.add_parser(subparsers)
    profile.add_parser(subparsers)
    tune.add_parser(subparsers)
    args = parser.parse_args(arguments)
    try:
        status: int = args.func(args)
    except KeyboardInterrupt:
        return 130  # as a shell has it of what was interrupted
    return status


def shape(text: str) -> tuple[int, ...]:
    """``128x768`` as a tuple, for an argument's ``type``."""
    sizes = text.split("x")
    if len(sizes) < 2 or not all(size.isdecimal() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a shape; write rows x columns, e.g. 128x768, or N x C x ..., e.g. 16x320x64x64, or, of "
            f"qk_norm, {HEADS}, or, of modulated and gated norms, {CONDITIONED}"
        )
    found = tuple(map(int, sizes))
    if found[1] > MAX_COLUMNS:
        raise argparse.ArgumentTypeError(f"{text!r} is too wide; a row has at most {MAX_COLUMNS:,} columns")
    if math.prod(found) > MAX_ELEMENTS:
        raise argparse.ArgumentTypeError(f"{text!r} is too large; a tensor has at most {MAX_ELEMENTS:,} elements")
    return found


def shapes(text: str) -> list[tuple[int, ...] | str]:
    """``128x768,8192x4096`` as tuples, for an argument's ``type``; names of NAMED_SHAPES as they are."""
    from ..bench.shapes import NAMED_SHAPES

    return [part if part in NAMED_SHAPES else shape(part) for part in dict.fromkeys(text.split(","))]


def names(known: Iterable[str]) -> Callable[[str], list[str]]:
    """A parser of comma-separated names, for an argument's ``type``."""
    known = list(known)

    def parse(text: str) -> list[str]:
        given = list(dict.fromkeys(text.split(",")))
        if unknown := [name for name in given if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(known)}")
        return given

    return parse


def positive(text: str) -> int:
    """A whole number from 1 on, for an argument's ``type``."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def device(text: str) -> torch.device:
    """A device that the kernels or their interpreter run on, for an argument's ``type``."""
    import torch

    try:
        found = torch.device(text)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a device to check on; write cpu, cuda, cuda:1, ...")
    count = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= count:
        raise argparse.ArgumentTypeError(f"{text!r} is not here; there {'is 1 GPU' if count == 1 else f'are {count} GPUs'}")
    return found


def refuse(command: str, reason: str) -> int:
    """Say why a command cannot run; the exit status that says so."""
    print(f"trinorm {command}: {reason}", file=sys.stderr)
    return 2


def unwritable(path: Path) -> str | None:
    """Why the file of --json cannot be written, or None: then it is there, with its folders, and holds what it held.

    To be asked before the work that the file is for.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        return f"--json: cannot write {path} ({error}); name a file that can be written"
    return None


def no_folder(path: Path) -> str | None:
    """Why --plot's pictures cannot be put in this folder, or None: then it is there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"--plot: cannot make {path} ({error}); name a folder that can be written"
    return None if os.access(path, os.W_OK) else f"--plot: cannot write to {path}; name a folder that can be written"


def wide_console() -> Console:
    """A console for tables: as wide as the terminal, or 160 columns where the output goes elsewhere."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    return console
