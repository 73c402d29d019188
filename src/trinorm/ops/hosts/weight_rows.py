"""Weight normalization's host side: outputs and scratch, and which kernels with what."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels.weight import weight_backward, weight_forward, weight_sums
from ...launch import describe, empty, launch
from ...tuning import WeightRows, choose_weight
from ..layout import Rows, row_dims, rows_of
from ..road import accumulator_dtype
from .start import ACCUMULATOR, started_by, widest


def forward(dim: int | None, v: Tensor, g: Tensor) -> Tensor:
    """w, contiguous, of a v whose rows are each one run of memory, and is not empty. dim: 0, or None, of one row."""
    device, stats = v.device, accumulator_dtype(v, g)
    m, n = _rows(dim, v)
    w, plan = empty(v, v.dtype, device), choose_weight(m, n, 2, widest(v.dtype, stats), describe(device))
    of_v, options = rows_of(v, row_dims(dim, v), n), _options(plan, n, stats, device)
    sums = _sums(plan, m, stats, options, v, of_v, None, Rows((), (0,)))
    launch(weight_forward, (plan.programs(m, n),), device, (w, v, g, sums, m, *of_v), options)
    return w


def backward(dim: int | None, wanted: tuple[bool, ...], dw: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor | None, ...]:
    """(dv, dg), those that are wanted, contiguous. dw's rows are runs too."""
    device, stats = v.device, accumulator_dtype(v, g)
    dv, dg = found = [empty(t, t.dtype, device) if want else None for t, want in zip((v, g), wanted, strict=True)]
    if dv is None and dg is None:
        return tuple(found)
    m, n = _rows(dim, v)
    plan = choose_weight(m, n, 3, widest(v.dtype, stats), describe(device))
    of_dw, of_v = (rows_of(t, row_dims(dim, v), n) for t in (dw, v))
    options = _options(plan, n, stats, device)
    sums = _sums(plan, m, stats, options, v, of_v, dw, of_dw)
    launch(weight_backward, (plan.programs(m, n),), device, (dv, dg, dw, v, g, sums, m, *of_dw, *of_v), options)
    return tuple(found)


def _rows(dim: int | None, v: Tensor) -> tuple[int, int]:
    """How many rows there are, of how many elements."""
    m = 1 if dim is None else v.shape[0]
    return m, v.numel() // m


def _options(plan: WeightRows, n: int, stats: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What the kernels that write are told."""
    padded = None if plan.parts is None else 1 << (plan.parts - 1).bit_length()
    how = dict(ROWS=plan.tile.rows, CHUNK=plan.tile.chunk, PARTS=plan.parts, PADDED=padded, STREAM=plan.stream)
    return dict(N=n, ACC=ACCUMULATOR[stats], **how, **started_by(plan.tile, describe(device)))


def _sums(
    plan: WeightRows,
    m: int,
    stats: torch.dtype,
    options: dict[str, Any],
    v: Tensor,
    of_v: Rows,
    dw: Tensor | None,
    of_dw: Rows,
) -> Tensor | None:
    """Those of each row's parts, where a program does not hold whole rows."""
    if plan.parts is None:
        return None
    sums = empty((m, 3, plan.parts), stats, v.device)
    known = {name: value for name, value in options.items() if name not in ("ROWS", "PADDED", "STREAM")}
    launch(weight_sums, (m * plan.parts,), v.device, (sums, v, dw, *of_v, *of_dw), known)
    return sums
