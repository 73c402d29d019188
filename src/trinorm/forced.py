"""The seam by which a test or a sweep decides a launch, in place of what tuning/ would choose."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .ops import CALLS, added, conditioned, gated_sum, inputs_only, qk, quantized, stream
from .ops.hosts import conditioned_rows, dynamic_rows, gated_sum_rows, heads, poly_rows, quantized_rows, rows

# Where tuning's choices are asked for, by how their names start.
_FAMILIES = {
    "heads": heads,
    "conditioned": conditioned_rows,
    "gated": gated_sum_rows,
    "dynamic": dynamic_rows,
    "poly": poly_rows,
    "quantized": quantized_rows,
}


@contextlib.contextmanager
def forced(**launches: object) -> Iterator[None]:
    """Inside, every call of a family of rows, QK-norm and conditioned norms among them, takes these launches, whatever its
    size.

    By the names of tuning's choices: ``forced(forward=launch)`` is what ``choose_forward`` then gives, and QK-norm's
    are ``heads_forward`` and ``heads_backward``, conditioned norms' ``conditioned_forward`` and so on, a quantized
    result's ``quantized``. Remembered calls are forgotten before and after; a call captured in a graph stays what it
    is, and a backward is its forward's.
    """
    families = {name: _FAMILIES.get(name.split("_")[0], rows) for name in launches}
    actual = {name: getattr(family, f"choose_{name}") for name, family in families.items()}
    for name, launch in launches.items():
        setattr(families[name], f"choose_{name}", lambda *_, launch=launch: launch)
    _forget()
    try:
        yield
    finally:
        _forget()
        for name, choose in actual.items():
            setattr(families[name], f"choose_{name}", choose)


def _forget() -> None:
    CALLS.clear()
    for family in (added, qk, conditioned, gated_sum, inputs_only, quantized, stream):
        family.CALLS.clear()
