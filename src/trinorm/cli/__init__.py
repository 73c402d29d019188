"""The command line: ``trinorm check``, ``trinorm bench`` and ``trinorm profile``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, of ``sys.argv`` unless ``arguments`` are given; its exit status."""
    from .. import __version__
    from . import bench, check, profile

    parser = argparse.ArgumentParser(prog="trinorm", description="Normalization for PyTorch, written in Triton.")
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="check | bench | profile")
    check.add_parser(subparsers)
    bench.add_parser(subparsers)
    profile.add_parser(subparsers)
    args = parser.parse_args(arguments)
    status: int = args.func(args)
    return status


def shape(text: str) -> tuple[int, int]:
    """``128x768`` as a pair, for an argument's ``type``."""
    m, _, n = text.partition("x")
    if not (m.isdecimal() and n.isdecimal() and int(m) and int(n)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape; write rows x columns, e.g. 128x768")
    return int(m), int(n)


def names(known: Iterable[str]) -> Callable[[str], list[str]]:
    """A parser of comma-separated names, for an argument's ``type``."""
    known = list(known)

    def parse(text: str) -> list[str]:
        given = text.split(",")
        if unknown := [name for name in given if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(known)}")
        return given

    return parse
