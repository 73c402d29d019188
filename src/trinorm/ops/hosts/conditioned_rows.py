"""Conditioned norms' host side: shapes, outputs and scratch, and which kernels with what."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.conditioned import conditioned_forward
from ...kernels.conditioned_backward import conditioned_backward
from ...kernels.conditioned_backward_wide import conditioned_inputs_backward_wide, conditioned_parameters_backward_wide
from ...kernels.conditioned_wide import conditioned_forward_wide
from ...launch import describe, empty, launch
from ...tuning import (
    RowBackward,
    RowForward,
    choose_conditioned_backward,
    choose_conditioned_forward,
    choose_conditioned_total,
    programs_of_a_set,
)
from ..layout import Rows, collapse
from ..problems.conditioned import Conditioned, shared_sets
from ..road import accumulator_dtype
from .rows import add_up
from .start import ACCUMULATOR, started_by, widest


class Inputs(NamedTuple):
    """The norm's tensors, whose rows are each one run of memory; none is empty."""

    x: Tensor
    gate: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def forward(problem: Conditioned, inputs: Inputs, *, save: bool) -> tuple[Tensor | None, ...]:
    """(y, mean, rstd), contiguous; the statistics where a backward will ask, the mean where the norm has one."""
    x, n, device = inputs.x, problem.size, inputs.x.device
    stats, rows = accumulator_dtype(*inputs), problem.rows(inputs.x)
    y, m = empty(x, problem.y, device), math.prod(rows)
    mean = empty(rows, stats, device) if save and problem.spec.norm.center else None
    rstd = empty(rows, stats, device) if save else None
    size = describe(device)
    plan = choose_conditioned_forward(m, n, widest(x.dtype, stats), size)
    layouts = [rows_of_input(problem, x, t) for t in inputs]
    options = _options(problem, inputs, stats)
    options.update(ALIKE=layouts[2] == layouts[3], RESCUE=stats == torch.float32, CHUNK=plan.tile.chunk)
    options.update(started_by(plan.tile, size))
    tensors, how = (y, mean, rstd, *inputs), (*itertools.chain(*layouts), problem.eps)
    if isinstance(plan, RowForward):
        options.update(ROWS=plan.tile.rows, STREAM=plan.stream)
        launch(conditioned_forward, (-(-m // plan.tile.rows),), device, (*tensors, m, *how), options)
    else:
        launch(conditioned_forward_wide, (m,), device, (*tensors, *how), options)
    return y, mean, rstd


def backward(
    problem: Conditioned, inputs: Inputs, dy: Tensor, mean: Tensor | None, rstd: Tensor, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """(dx, dgate, dweight, dbias), those that are wanted, contiguous. dy's rows are runs too."""
    x, n, device, stats = inputs.x, problem.size, inputs.x.device, rstd.dtype
    found = [empty(t, t.dtype, device) if want and t is not None else None for t, want in zip(inputs, wanted, strict=True)]
    if not any(t is not None for t in found):
        return tuple(found)
    sets = shared_sets(problem, x, *inputs[2:])
    assert sets is not None
    size, members = describe(device), sets.outer * sets.repeat
    plan = choose_conditioned_backward(
        members, sets.middle, n, widest(x.dtype, stats), size, inputs.gate is not None, problem.batch_invariant
    )
    sums = found[2:]
    programs = programs_of_a_set(plan, members, sets.middle, n, size)
    partials = (
        sums if programs == 1 else [None if t is None else empty((programs * sets.middle, n), stats, device) for t in sums]
    )
    walked = members, sets.middle, sets.repeat, *collapse((sets.outer, sets.repeat), (sets.middle * sets.repeat, 1))
    of_rows = tuple(at for t in (dy, x, inputs.gate) for at in rows_of_input(problem, x, t))
    options = _options(problem, inputs, stats) | dict(CHUNK=plan.tile.chunk, **started_by(plan.tile, size))
    args: tuple[Any, ...]
    if isinstance(plan, RowBackward):
        options.update(ROWS=plan.tile.rows, STAGES=plan.stages, STREAM=plan.stream)
        of_parameters = (at for t in inputs[2:] for at in rows_of_sets(problem, t))
        args = (*found[:2], *partials, dy, *inputs, mean, rstd, *walked, *of_rows, *of_parameters)
        launch(conditioned_backward, (programs * sets.middle,), device, args, options)
    else:
        if any(t is not None for t in found[:2]):
            of_parameters = (at for t in inputs[2:] for at in rows_of_input(problem, x, t))
            args = (*found[:2], dy, *inputs, mean, rstd, *of_rows, *of_parameters)
            launch(conditioned_inputs_backward_wide, (members * sets.middle,), device, args, options)
        if any(t is not None for t in sums):
            options = {name: options[name] for name in options if name not in _OF_INPUTS} | dict(STAGES=plan.stages)
            args = (*partials, dy, *inputs[:2], mean, rstd, *walked, *of_rows)
            grid = programs * sets.middle * -(-n // plan.tile.chunk)
            launch(conditioned_parameters_backward_wide, (grid,), device, args, options)
    if programs > 1:
        outs, most = (sums[0], sums[1], partials[0], partials[1]), plan.most_partials(n, size)
        add_up(*outs, programs, most, stats, sets=sets.middle, total=choose_conditioned_total(programs))
    return tuple(found)


# What is nothing to the gradients of weight and bias, which are sums of what the forward had.
_OF_INPUTS = ("K", "D", "CENTER", "OFFSET", "ROUND_N")


def rows_of_input(problem: Conditioned, x: Tensor, t: Tensor | None) -> Rows:
    """How t, which is broadcast to x, lies over x's rows."""
    return Rows((), (0,)) if t is None else collapse(problem.rows(x), problem.steps(t.expand(x.shape)))


def rows_of_sets(problem: Conditioned, t: Tensor | None) -> Rows:
    """How a parameter lies over the sets: over its own rows."""
    return Rows((), (0,)) if t is None else collapse(problem.rows(t), problem.steps(t))


def _options(problem: Conditioned, inputs: Inputs, stats: torch.dtype) -> dict[str, Any]:
    """What the kernels are told of the problem."""
    spec, weight = problem.spec, inputs.weight
    rounded = spec.norm.rounded and problem.y != stats
    behind = spec.gate is not None and not spec.gate_first
    count, divisor = spec.statistic(problem.size)
    return dict(
        N=problem.size,
        K=count,
        D=divisor,
        CENTER=spec.norm.center,
        OFFSET=0.0 if weight is None else spec.offset,
        ROUND=rounded,
        ROUND_N=rounded and behind and (weight is None or weight.dtype == problem.y),
        GATE=spec.gate,
        GATE_FIRST=spec.gate_first,
        ACC=ACCUMULATOR[stats],
    )
