"""The command line: ``trinorm check`` and ``trinorm bench``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, of ``sys.argv`` unless ``arguments`` are given; its exit status."""
    from .. import __version__
    from . import bench, check

    parser = argparse.ArgumentParser(prog="trinorm", description="Normalization for PyTorch, written in Triton.")
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="check | bench")
    check.add_parser(subparsers)
    bench.add_parser(subparsers)
    args = parser.parse_args(arguments)
    status: int = args.func(args)
    return status


def names(known: Iterable[str]) -> Callable[[str], list[str]]:
    """A parser of comma-separated names, for an argument's ``type``."""
    known = list(known)

    def parse(text: str) -> list[str]:
        given = text.split(",")
        if unknown := [name for name in given if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(known)}")
        return given

    return parse
