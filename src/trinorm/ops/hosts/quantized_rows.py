"""The host side of norms with a quantized result: shapes, outputs, and the launch."""

from __future__ import annotations

import math

import torch
import triton.language as tl
from torch import Tensor

from ...kernels.quantized import quantized_forward
from ...launch import describe, empty, launch
from ...tuning import choose_quantized
from ..layout import rows_of
from ..problems.quantized import Given, Quantizing, held_bytes
from .start import ACCUMULATOR, started_by

_STORED = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}


def forward(problem: Quantizing, given: Given) -> tuple[Tensor | None, ...]:
    """(data, scale, sum, mean, rstd), of an x of codes as bytes. Data and scales too are bytes, but those in fp32; columns
    of scales are the rows of what is returned (QuantizedCall). No scale where one is given.
    """
    x, device, stats, form = given.x, given.x.device, given.stats, problem.form
    leading, n = x.shape[: -problem.dims], x.shape[-problem.dims :].numel()
    m, scales, spec = math.prod(leading), form.scales(n), problem.spec
    # Swizzled scales have rows of padding, which programs store too.
    stored = m
    strides: tuple[int, int] | None = (scales, 1)
    data = empty(problem.data_shape(x), torch.uint8, device)
    scale = None
    if form.scaling != "tensor":
        dtype = torch.float32 if form.scale_dtype == torch.float32 else torch.uint8
        shape = problem.scale_shape(x)
        if problem.scale_layout == "column_major":
            shape, strides = (scales, form.column(m)), (1, form.column(m))
        elif problem.scale_layout == "swizzled":
            stored, strides = shape[0], None
        scale = empty(shape, dtype, device)
    total = None if given.residual is None else empty(tuple(x.shape), given.sum_dtype, device)
    mean = empty(leading, stats, device) if problem.save and spec.center else None
    rstd = empty(leading, stats, device) if problem.save else None
    size = describe(device)
    rows_of_launch = None if problem.batch_invariant else m
    plan = choose_quantized(spec, rows_of_launch, n, held_bytes(given), size, form.block)
    rows = rows_of(x, problem.dims, n)
    x_scale = given.x_scale
    args = (
        *(data, scale, total, mean, rstd),
        *given,
        *(m, *rows, 0 if x_scale is None or x_scale.numel() == 1 else 1),
        strides,
        problem.eps,
    )
    options = dict(
        N=n,
        CENTER=spec.center,
        OFFSET=0.0 if given.weight is None else spec.offset,
        ROUND=spec.rounded and given.y_dtype != stats,
        DTYPE=_STORED[given.y_dtype],
        ELEMENT=form.element,
        SCALING=form.scaling,
        BLOCK=form.block,
        LARGEST=form.largest,
        ACC=ACCUMULATOR[stats],
        RESCUE=stats == torch.float32,
        ROWS=plan.tile.rows,
        CHUNK=plan.tile.chunk,
        STREAM=plan.stream,
        PRELOAD=plan.preload,
        **started_by(plan.tile, size, plan.early),
    )
    launch(quantized_forward, (-(-stored // plan.tile.rows),), device, args, options)
    return data, scale, total, mean, rstd
