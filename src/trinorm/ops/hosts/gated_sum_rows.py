"""The host side of conditioned norms of a gated sum: shapes, outputs and scratch, and which kernels with what."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from ...kernels.gated_sum import gated_sum_backward, gated_sum_forward
from ...launch import describe, empty, launch
from ...tuning import choose_conditioned_total, choose_gated_sum_backward, choose_gated_sum_forward, programs_of_a_set
from ..layout import collapse
from ..problems.conditioned import Conditioned, shared_sets
from ..problems.gated_sum import GatedSum
from ..road import accumulator_dtype
from .conditioned_rows import rows_of_input, rows_of_sets
from .rows import add_up
from .start import ACCUMULATOR, started_by, widest


def forward(
    problem: GatedSum,
    x: Tensor,
    residual: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    save: bool,
) -> tuple[Tensor | None, ...]:
    """(y, sum, mean, rstd), contiguous; the statistics where a backward will ask, the mean where the norm has one. Each
    tensor's rows are runs of memory; none is empty.
    """
    norm, device, inputs = problem.norm, x.device, (x, residual, gate, weight, bias)
    stats, rows, n = accumulator_dtype(*inputs), norm.rows(x), norm.size
    y, total, m = empty(x, norm.y, device), empty(x, problem.sum, device), math.prod(rows)
    mean = empty(rows, stats, device) if save and norm.spec.norm.center else None
    rstd = empty(rows, stats, device) if save else None
    size = describe(device)
    plan = choose_gated_sum_forward(m, n, widest(problem.sum, stats), size)
    options = _options(norm, weight, stats)
    options.update(RESCUE=stats == torch.float32, ROWS=plan.tile.rows, CHUNK=plan.tile.chunk, STREAM=plan.stream)
    options.update(started_by(plan.tile, size))
    layouts = itertools.chain(*(rows_of_input(norm, x, t) for t in inputs))
    args = y, total, mean, rstd, *inputs, m, *layouts, norm.eps
    launch(gated_sum_forward, (-(-m // plan.tile.rows),), device, args, options)
    return y, total, mean, rstd


def backward(
    problem: GatedSum,
    wanted: tuple[bool, ...],
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    total: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    dsum: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """(dx, dresidual, dgate, dweight, dbias), those that are wanted, contiguous. Each tensor's rows are runs of memory."""
    norm, n, device, stats = problem.norm, problem.norm.size, x.device, rstd.dtype
    of = (x, x.dtype), (x, problem.residual), *((t, None if t is None else t.dtype) for t in (gate, weight, bias))
    found = [
        empty(t, dtype, device) if want and t is not None and dtype is not None else None
        for (t, dtype), want in zip(of, wanted, strict=True)
    ]
    if not any(t is not None for t in found):
        return tuple(found)
    sets = shared_sets(norm, x, gate, weight, bias)
    assert sets is not None
    size, members = describe(device), sets.outer * sets.repeat
    plan = choose_gated_sum_backward(members, sets.middle, n, widest(problem.sum, stats), size, norm.batch_invariant)
    programs = programs_of_a_set(plan, members, sets.middle, n, size)
    sums = found[2:]
    partials = (
        sums if programs == 1 else [None if t is None else empty((programs * sets.middle, n), stats, device) for t in sums]
    )
    read = None if found[2] is None else x
    layouts = (
        *collapse((sets.outer, sets.repeat), (sets.middle * sets.repeat, 1)),
        *(at for t in (dy, dsum, read) for at in rows_of_input(norm, x, t)),
        *(at for t in (gate, weight) for at in rows_of_sets(norm, t)),
    )
    options = _options(norm, weight, stats)
    options.update(ROWS=plan.tile.rows, CHUNK=plan.tile.chunk, STAGES=plan.stages, STREAM=plan.stream)
    options.update(started_by(plan.tile, size))
    tensors = *found[:2], *partials, dy, dsum, read, gate, weight, total, mean, rstd
    args = *tensors, members, sets.middle, sets.repeat, *layouts
    launch(gated_sum_backward, (programs * sets.middle,), device, args, options)
    if programs > 1:
        of_gate, *others = zip(sums, partials, strict=True)
        how: dict[str, Any] = dict(sets=sets.middle, total=choose_conditioned_total(programs))
        for (dw, dw_partials), (db, db_partials) in (others, (of_gate, (None, None))):
            add_up(dw, db, dw_partials, db_partials, programs, plan.most_partials(n, size), stats, **how)
    return tuple(found)


def _options(norm: Conditioned, weight: Tensor | None, stats: torch.dtype) -> dict[str, Any]:
    """What both kernels are told of the problem."""
    return dict(
        N=norm.size,
        CENTER=norm.spec.norm.center,
        OFFSET=0.0 if weight is None else norm.spec.offset,
        ACC=ACCUMULATOR[stats],
    )
