"""The seam by which a test or a sweep decides a launch, in place of what tuning/ would choose."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .ops import CALLS, added, rows


@contextlib.contextmanager
def forced(**launches: object) -> Iterator[None]:
    """Inside, every call of the row family takes these launches, whatever its size.

    By the names of tuning's choices: ``forced(forward=launch)`` is what ``choose_forward`` then gives. Remembered calls are
    forgotten before and after; a call captured in a graph stays what it is, and a backward is its forward's.
    """
    actual = {f"choose_{name}": getattr(rows, f"choose_{name}") for name in launches}
    for name, launch in launches.items():
        setattr(rows, f"choose_{name}", lambda *_, launch=launch: launch)
    _forget()
    try:
        yield
    finally:
        _forget()
        for name, choose in actual.items():
            setattr(rows, name, choose)


def _forget() -> None:
    for calls in (CALLS, added.CALLS):
        calls.clear()
