"""Which launch each norm with a quantized result gets: the row norms' own, which reads what this reads and writes more."""

from __future__ import annotations

import dataclasses

from ..launch import Device
from ..spec import RowNorm
from .kinds import RowForward
from .row import choose_forward


def choose_quantized(spec: RowNorm, m: int | None, n: int, itemsize: int, device: Device) -> RowForward:
    """The launch for m rows of n elements that a program holds as ``itemsize`` bytes each: of one tile a program. m None:
    one for any number of rows.
    """
    plan = choose_forward(spec, m, n, itemsize, device)
    assert isinstance(plan, RowForward)
    return dataclasses.replace(plan, tiles=1)
