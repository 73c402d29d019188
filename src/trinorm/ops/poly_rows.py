"""PolyNorm's host side: outputs and scratch, and which kernels with what."""

from __future__ import annotations

from torch import Tensor

from ..kernels.poly import poly_backward, poly_forward
from ..launch import describe, empty, launch
from ..tuning import OF_ONE_NUMBER, OF_THREE_NUMBERS, choose_poly_backward, choose_poly_forward
from .layout import rows_of
from .road import accumulator_dtype
from .rows import add_up
from .start import ACCUMULATOR, started_by, widest


def forward(eps: float, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y, contiguous, of tensors whose rows are each one run of memory; x is not empty."""
    device, n, stats = x.device, x.shape[-1], accumulator_dtype(x, weight, bias)
    y, m, size = empty(x, x.dtype, device), x.numel() // n, describe(device)
    plan = choose_poly_forward(m, n, widest(x.dtype, stats), size)
    options = dict(N=n, ACC=ACCUMULATOR[stats], ROWS=plan.tile.rows, CHUNK=plan.tile.chunk, STREAM=plan.stream)
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
    programs, most = plan.partials(m, n, size), plan.most_partials(n, size)
    dw_partials, db_partials = dw, db
    if programs > 1:
        dw_partials = None if dw is None else empty((programs, 3), stats, device)
        db_partials = None if db is None else empty((programs,), stats, device)
    options = dict(N=n, ACC=ACCUMULATOR[stats], ROWS=plan.tile.rows, CHUNK=plan.tile.chunk, STREAM=plan.stream)
    options.update(STAGES=plan.stages, **started_by(plan.tile, size))
    args = dx, dw_partials, db_partials, dy, x, weight, m, *rows_of(dy, 1, n), *rows_of(x, 1, n), eps
    launch(poly_backward, (programs,), device, args, options)
    if programs > 1:
        add_up(dw, None, dw_partials, None, programs, most, stats, total=OF_THREE_NUMBERS)
        add_up(None, db, None, db_partials, programs, most, stats, total=OF_ONE_NUMBER)
    return tuple(found)
