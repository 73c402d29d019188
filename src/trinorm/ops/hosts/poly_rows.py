"""PolyNorm's host side: outputs and scratch, and which kernels with what."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels.poly import poly_backward, poly_forward
from ...launch import describe, empty, launch
from ...tuning import OF_THREE_NUMBERS, choose_poly_backward, choose_poly_forward, registers_of
from ..layout import rows_of
from ..road import accumulator_dtype
from .dynamic_rows import add_up_with_numbers
from .start import ACCUMULATOR, started_by, widest


def forward(eps: float, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y, contiguous, of tensors whose rows are each one run of memory; x is not empty."""
    device, n, stats = x.device, x.shape[-1], accumulator_dtype(x, weight, bias)
    y, m, size = empty(x, x.dtype, device), x.numel() // n, describe(device)
    plan = choose_poly_forward(m, n, widest(x.dtype, stats), size)
    options = _options(n, stats) | dict(ROWS=plan.tile.rows, CHUNK=plan.tile.chunk, STREAM=plan.stream)
    options.update(started_by(plan.tile, size))
    args = y, x, weight, bias, m, *rows_of(x, 1, n), eps
    launch(poly_forward, (-(-m // plan.tile.rows),), device, args, options)
    return y


def backward(
    eps: float, wanted: tuple[bool, ...], dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    """(dx, dweight, dbias), those that are wanted, contiguous. dy's rows are runs too."""
    device, n, stats = x.device, x.shape[-1], accumulator_dtype(x, weight, bias)
    given = zip((x, weight, bias), wanted, strict=True)
    dx, dw, db = found = [empty(t, t.dtype, device) if want and t is not None else None for t, want in given]
    if not any(t is not None for t in found):
        return tuple(found)
    m, size = x.numel() // n, describe(device)
    plan = choose_poly_backward(m, n, widest(x.dtype, stats), size)
    programs = plan.partials(m, n, size)
    dw_partials, db_partials = dw, db
    if programs > 1:
        dw_partials = None if dw is None else empty((programs, 3), stats, device)
        db_partials = None if db is None else empty((programs,), stats, device)
    options = _options(n, stats) | dict(ROWS=plan.tile.rows, CHUNK=plan.tile.chunk, STREAM=plan.stream)
    options.update(STAGES=plan.stages, **started_by(plan.tile, size))
    if registers := registers_of(plan, widest(x.dtype, stats), size):
        options.update(maxnreg=registers)
    args = dx, dw_partials, db_partials, dy, x, weight, m, *rows_of(dy, 1, n), *rows_of(x, 1, n), eps
    launch(poly_backward, (programs,), device, args, options)
    counts, total = (programs, programs), OF_THREE_NUMBERS
    add_up_with_numbers((dw, None), (db, None), (dw_partials, None, db_partials, None), counts, stats, total)
    return tuple(found)


def _options(n: int, stats: torch.dtype) -> dict[str, Any]:
    """What both kernels are told of the problem. RESCUE: of rows whose sixth powers fp32 has not."""
    return dict(N=n, ACC=ACCUMULATOR[stats], RESCUE=stats == torch.float32)
