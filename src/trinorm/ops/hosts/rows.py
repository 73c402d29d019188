"""The row family's host side: shapes, outputs and scratch, and which kernels with what."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.partials import sum_partials
from ...kernels.row import row_forward, row_forward_streamed
from ...kernels.row_backward import row_backward, row_backward_few
from ...kernels.row_backward_wide import row_backward_apply, row_backward_moments
from ...kernels.row_split import row_backward_split, row_forward_split
from ...launch import Count, Leading, describe, empty, launch, of_rows
from ...spec import RowNorm
from ...tuning import (
    RowBackward,
    RowBackwardFew,
    RowBackwardSplit,
    RowForward,
    RowForwardSplit,
    Tile,
    choose_backward,
    choose_forward,
    choose_total,
)
from ..layout import rows_of
from ..road import accumulator_dtype
from .start import ACCUMULATOR, started_by, widest, words_of_teams


class Normalized(NamedTuple):
    """y, and statistics of x's leading dims that a backward needs (None where none will come, or the spec has none)."""

    y: Tensor
    mean: Tensor | None
    rstd: Tensor | None


class Added(NamedTuple):
    """What is added to x before it is normalized: alpha times a contiguous residual. total: memory for the sum, which may
    be the residual's; y: the result's dtype. branch: (seed, row_scale) of what is made of x first, each or not; drop: the
    probability that an element is dropped.
    """

    residual: Tensor | None
    total: Tensor | None
    y: torch.dtype
    alpha: float = 1.0
    branch: tuple[Tensor | None, Tensor | None] = (None, None)
    drop: float = 0.0


class AddedBackward(NamedTuple):
    """A sum's own gradient, contiguous, if it has one; memory for the residual's, where that is not dx; dx's dtype."""

    dsum: Tensor | None
    dresidual: Tensor | None
    dx: torch.dtype
    alpha: float = 1.0
    branch: tuple[Tensor | None, Tensor | None] = (None, None)
    drop: float = 0.0


def forward(
    spec: RowNorm,
    x: Tensor,
    dims: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    save: bool,
    batch_invariant: bool = False,
    added: Added | None = None,
) -> Normalized:
    """Normalize the last ``dims`` dims of x, which is readable (layout.readable), or of a sum with it; y is contiguous."""
    device = x.device
    residual, total, y_dtype, alpha, branch, drop = added or Added(None, None, x.dtype)
    kept = x if total is None else total
    y = empty(x, y_dtype, device)
    n = x.shape[-dims:].numel()
    m = x.numel() // n if n else 0
    stats = accumulator_dtype(kept, weight, bias)
    mean = empty(Leading(x, dims), stats, device) if save and spec.center else None
    rstd = empty(Leading(x, dims), stats, device) if save else None
    if m == 0:
        return Normalized(y, mean, rstd)

    size = describe(device)
    plan = choose_forward(spec, None if batch_invariant else m, n, widest(kept.dtype, stats), size)
    odd_sizes, strides = rows_of(x, dims, n)
    options = dict(
        N=n,
        **_variant(spec, y_dtype, weight, stats),
        ALPHA=alpha,
        DROP=drop,
        ACC=ACCUMULATOR[stats],
        RESCUE=stats == torch.float32,
        CHUNK=plan.tile.chunk,
    )
    options.update(started_by(plan.tile, size, early=not isinstance(plan, RowForward) or plan.early))
    if isinstance(plan, RowForward):
        options.update(ROWS=plan.tile.rows, TILES=plan.tiles, STREAM=plan.stream, PRELOAD=plan.preload)
        # Of a sum it is not measured; of wider numbers their sums are not exact, as LayerNorm's mean asks for.
        pairwise = plan.pairwise and residual is None and n % plan.tile.chunk == 0
        options.update(PAIRWISE=pairwise and x.dtype.itemsize == 2 and stats == torch.float32, MANY=plan.many)
        rows = plan.tile.rows * plan.tiles
        args: tuple[Any, ...] = (
            y,
            mean,
            rstd,
            total,
            x,
            weight,
            bias,
            residual,
            *branch,
            of_rows(m),
            odd_sizes,
            strides,
            eps,
        )
        launch(row_forward, (of_rows(m, lambda m: -(-m // rows)),), device, args, options)
    elif isinstance(plan, RowForwardSplit):
        options.update(BLOCK=plan.block, LANES=plan.lanes)
        team = n // plan.block
        words = words_of_teams(launch, m, team, device)
        args = (y, mean, rstd, total, words, x, weight, bias, residual, *branch, odd_sizes, strides, eps)
        launch(row_forward_split, (of_rows(m, lambda m: m * team),), device, args, options)
    else:
        args = (y, mean, rstd, total, x, weight, bias, residual, *branch, odd_sizes, strides, eps)
        launch(row_forward_streamed, (of_rows(m),), device, args, options)
    return Normalized(y, mean, rstd)


def backward(
    spec: RowNorm,
    dy: Tensor,
    kept: Tensor,
    dims: int,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    *,
    dx: bool,
    dw: torch.dtype | None,
    db: torch.dtype | None,
    from_output: bool = False,
    bias: Tensor | None = None,
    batch_invariant: bool = False,
    added: AddedBackward | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dw, db) for a readable dy and what the forward kept, readable too: dx where asked for, dw and db in the dtype
    asked for.

    kept: x, or the sum. from_output: it is y, of which ``bias`` and ``weight``, nowhere 0, make x̂ again; no mean is
    needed.
    """
    device = kept.device
    dsum, dresidual, dx_dtype, alpha, branch, drop = added or AddedBackward(None, None, kept.dtype)
    n = kept.shape[-dims:].numel()
    m = kept.numel() // n if n else 0
    shape = kept.shape[-dims:]
    dx_out = empty(kept, dx_dtype, device) if dx else None
    dw_out, db_out = (
        None if dtype is None else empty(shape, dtype, device) if m else torch.zeros(shape, dtype=dtype, device=device)
        for dtype in (dw, db)
    )
    if m == 0 or not (dx or dw or db):
        return dx_out, dw_out, db_out

    size = describe(device)
    tensors = 2 if dsum is None else 3
    plan = choose_backward(spec, None if batch_invariant else m, n, widest(kept.dtype, rstd.dtype), size, tensors)
    operands = kept, weight, bias if from_output else None, None if from_output else mean, rstd
    layout = (*rows_of(kept, dims, n), *rows_of(dy, dims, n))
    options = dict(N=n, ACC=ACCUMULATOR[rstd.dtype])
    tiled = options | _variant(spec, dy.dtype, weight, rstd.dtype) | dict(FROM_OUTPUT=from_output, CHUNK=plan.tile.chunk)
    outs, inputs, of_sum = (dx_out, dresidual), (dy, dsum, *branch, *operands), dict(ALPHA=alpha, DROP=drop)
    tiled.update(started_by(plan.tile, size))

    if isinstance(plan, RowBackwardFew):
        rows = plan.tile.rows
        column_tiles = -(-n // plan.sums.chunk) if dw or db else 0
        row_tiles = of_rows(m, lambda m: -(-m // rows) if dx else 0)
        grid = of_rows(m, lambda m: row_tiles.of(m) + column_tiles)
        args: tuple[Any, ...] = (*outs, dw_out, db_out, *inputs, of_rows(m), row_tiles, *layout)
        tiled.update(of_sum, ROWS=rows, SUM_ROWS=plan.sums.rows, SUM_CHUNK=plan.sums.chunk)
        launch(row_backward_few, (grid,), device, args, tiled)
        return dx_out, dw_out, db_out

    partials_of = plan.partials
    programs = of_rows(m, lambda m: partials_of(m, n, size))
    partials = dw_partials, db_partials = tuple(
        None if out is None else empty((programs, n), rstd.dtype, device) for out in (dw_out, db_out)
    )
    if isinstance(plan, RowBackward):
        args = (*outs, *partials, *inputs, of_rows(m), *layout)
        tiled.update(of_sum, ROWS=plan.tile.rows, TILES=plan.tiles, STAGES=plan.stages, STREAM=plan.stream)
        launch(row_backward, (programs,), device, args, tiled)
    elif isinstance(plan, RowBackwardSplit):
        team = n // plan.block
        words = words_of_teams(launch, m, team, device) if dx else None
        args = (*outs, *partials, words, *inputs, of_rows(m), *layout)
        tiled.update(of_sum, BLOCK=plan.block, LANES=plan.lanes(n), STAGES=plan.stages)
        if plan.registers:
            tiled.update(maxnreg=plan.registers)
        grid = of_rows(m, lambda m: programs.of(m) * team)
        launch(row_backward_split, (grid,), device, args, tiled)
    else:
        c1 = empty((of_rows(m),), rstd.dtype, device) if dx else None
        c2 = empty((of_rows(m),), rstd.dtype, device) if dx and spec.center else None
        if dx:
            launch(row_backward_moments, (of_rows(m),), device, (c1, c2, dy, *operands, *layout), tiled)
        args = (*outs, *partials, *inputs, c1, c2, of_rows(m), *layout)
        chunks = -(-n // plan.tile.chunk)
        launch(row_backward_apply, (programs, chunks), device, args, tiled | of_sum | dict(STAGES=plan.stages))
    add_up(dw_out, db_out, dw_partials, db_partials, programs, plan.most_partials(n, size), rstd.dtype)
    return dx_out, dw_out, db_out


def add_up(
    dw: Tensor | None,
    db: Tensor | None,
    dw_partials: Tensor | None,
    db_partials: Tensor | None,
    programs: int | Count,
    most: int,
    stats: torch.dtype,
    *,
    sets: int | None = None,
    total: Tile | None = None,
) -> None:
    """dw and db, each or not, from the partials of so many programs, as a rule at most ``most``. sets: of how many sets of
    rows they are the sums, each with so many programs, where they are not of all rows. total: the launch's tile, where it
    is not that of the row norms.
    """
    summed = [t for t in (dw, db) if t is not None]
    if not summed:
        return
    n, device = summed[0].numel() // (sets or 1), summed[0].device
    size, total = describe(device), total or choose_total(most)
    options = dict(N=n, ACC=ACCUMULATOR[stats], ROWS=total.rows, CHUNK=total.chunk, **started_by(total, size))
    args = (dw, db, dw_partials, db_partials, programs, sets)
    launch(sum_partials, (-(-n // total.chunk) * (sets or 1), len(summed)), device, args, options)


def _variant(spec: RowNorm, y: torch.dtype, weight: Tensor | None, stats: torch.dtype) -> dict[str, Any]:
    """What the kernels are told of the spec. An absent weight is 1, whatever a given one is kept as. y: y's dtype."""
    return dict(
        CENTER=spec.center,
        OFFSET=0.0 if weight is None else spec.offset,
        ROUND=spec.rounded and y != stats,
    )
