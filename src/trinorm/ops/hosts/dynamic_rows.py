"""The host side of norms without statistics: outputs and scratch, and which kernels with what."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.dynamic import dynamic_backward, dynamic_forward
from ...kernels.partials import sum_columns_and_numbers
from ...launch import describe, empty, launch
from ...spec import DynamicNorm
from ...tuning import (
    OF_ONE_NUMBER,
    Tile,
    choose_dynamic_backward,
    choose_dynamic_forward,
    choose_total,
    programs_of_a_chunk,
)
from ..layout import rows_of
from ..road import accumulator_dtype
from .start import ACCUMULATOR, started_by, widest


class Inputs(NamedTuple):
    """The norm's tensors, whose rows are each one run of memory; x is not empty."""

    x: Tensor
    alpha: Tensor
    shift: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def forward(spec: DynamicNorm, dims: int, inputs: Inputs) -> Tensor:
    """y, contiguous, of rows that the last ``dims`` dims hold."""
    x, device, stats = inputs.x, inputs.x.device, accumulator_dtype(*inputs)
    m, n = _rows(x, dims)
    y, size = empty(x, x.dtype, device), describe(device)
    plan = choose_dynamic_forward(m, n, widest(x.dtype, stats), size)
    options = _options(spec, n, stats) | dict(ROWS=plan.tile.rows, CHUNK=plan.tile.chunk, STREAM=plan.stream)
    options.update(started_by(plan.tile, size))
    programs = -(-m // plan.tile.rows) * -(-n // plan.tile.chunk)
    launch(dynamic_forward, (programs,), device, (y, *inputs, m, *rows_of(x, dims, n)), options)
    return y


def backward(
    spec: DynamicNorm, dims: int, inputs: Inputs, dy: Tensor, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """(dx, dalpha, dshift, dweight, dbias), those that are wanted, contiguous. dy's rows are runs too."""
    x, device, stats = inputs.x, inputs.x.device, accumulator_dtype(*inputs)
    found = [empty(t, t.dtype, device) if want and t is not None else None for t, want in zip(inputs, wanted, strict=True)]
    if not any(t is not None for t in found):
        return tuple(found)
    m, n = _rows(x, dims)
    size = describe(device)
    plan = choose_dynamic_backward(m, n, widest(x.dtype, stats), size)
    programs, chunks = programs_of_a_chunk(plan, m, n, size), -(-n // plan.tile.chunk)

    def partials(sums: list[Tensor | None], shape: tuple[int, ...]) -> list[Tensor | None]:
        """Where the programs leave what is summed: there itself, of one program."""
        return sums if shape[0] == 1 else [None if t is None else empty(shape, stats, device) for t in sums]

    numbers = partials(found[1:3], (programs * chunks,))
    columns = partials(found[3:], (programs, n))
    options = _options(spec, n, stats) | dict(ROWS=plan.tile.rows, CHUNK=plan.tile.chunk, STREAM=plan.stream)
    options.update(STAGES=plan.stages, **started_by(plan.tile, size))
    args = (found[0], *numbers, *columns, dy, *inputs[:4], m, *rows_of(dy, dims, n), *rows_of(x, dims, n))
    launch(dynamic_backward, (programs * chunks,), device, args, options)
    total = choose_total(programs) if programs > 1 else OF_ONE_NUMBER
    counts, made = (programs, programs * chunks), (*columns, *numbers)
    add_up_with_numbers((found[3], found[4]), (found[1], found[2]), made, counts, stats, total)
    return tuple(found)


def add_up_with_numbers(
    columns: tuple[Tensor | None, Tensor | None],
    numbers: tuple[Tensor | None, Tensor | None],
    partials: tuple[Tensor | None, ...],
    programs: tuple[int, int],
    stats: torch.dtype,
    total: Tile,
) -> None:
    """dw and db (``columns``) and two numbers, each or not, from their partials, by one launch. programs: how many partials
    each of the columns has, and each of the numbers; of one there is nothing to be added up.
    """
    made = [None if programs[i] == 1 else t for i, pair in enumerate((columns, numbers)) for t in pair]
    summed = [t for t in made if t is not None]
    if not summed:
        return
    n, device = max(t.numel() for t in summed), summed[0].device
    options = dict(N=n, ACC=ACCUMULATOR[stats], ROWS=total.rows, CHUNK=total.chunk, **started_by(total, describe(device)))
    given = (None if t is None else partial for t, partial in zip(made, partials, strict=True))
    grid = max(2, -(-n // total.chunk)), 3
    launch(sum_columns_and_numbers, grid, device, (*made, *given, *programs), options)


def _rows(x: Tensor, dims: int) -> tuple[int, int]:
    """How many rows there are, of how many elements."""
    n = x.shape[-dims:].numel()
    return x.numel() // n, n


def _options(spec: DynamicNorm, n: int, stats: torch.dtype) -> dict[str, Any]:
    """What both kernels are told of the problem."""
    return dict(N=n, FUNCTION=spec.function, ACC=ACCUMULATOR[stats])
