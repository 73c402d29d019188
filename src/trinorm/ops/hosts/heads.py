"""QK-norm's host side: shapes, outputs and scratch, and which kernels with what."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.heads import heads_forward
from ...kernels.heads_backward import heads_backward
from ...launch import describe, empty, launch
from ...spec import RowNorm
from ...tuning import choose_heads_backward, choose_heads_forward
from ..layout import Rows, collapse
from ..road import accumulator_dtype
from .rows import add_up
from .start import ACCUMULATOR, started_by, widest


class Rotation(NamedTuple):
    """The rotary embedding of queries and keys, if there is one; cos and sin alike."""

    cos: Tensor | None
    sin: Tensor | None
    interleaved: bool

    @property
    def length(self) -> int:
        """How many elements of a head are turned."""
        return 0 if self.cos is None else self.cos.shape[-1]

    def rows(self, tokens: torch.Size) -> Rows:
        """Those of the tokens, to which cos is broadcast."""
        if self.cos is None:
            return Rows((), (0,))
        return collapse(tokens, self.cos.expand(*tokens, self.length).stride()[:-1])


class Side(NamedTuple):
    """Queries or keys, whose heads are each one run of memory, with their weight."""

    x: Tensor
    weight: Tensor | None


class Wanted(NamedTuple):
    """Of one side: y's gradient, whose heads are runs too, the rstd that the forward kept, and what is asked for."""

    dy: Tensor | None
    rstd: Tensor
    dx: bool
    dw: bool

    @property
    def any(self) -> bool:
        return self.dy is not None and (self.dx or self.dw)


def forward(spec: RowNorm, query: Side, key: Side, eps: float, rotation: Rotation, *, save: bool) -> tuple[Any, ...]:
    """(query's y, key's y, and of each rstd where a backward will ask for it), contiguous. None of the tensors is empty."""
    sides, device, of = (query, key), query.x.device, query.x.shape
    stats = accumulator_dtype(query.x, query.weight, key.weight, rotation.cos)
    ys = [empty(side.x, side.x.dtype, device) for side in sides]
    rstds = [empty(tuple(side.x.shape[:-1]), stats, device) if save else None for side in sides]
    size, heads = describe(device), (of[-2], key.x.shape[-2])
    plan = choose_heads_forward(of[:-2].numel(), heads, of[-1], widest(query.x.dtype, stats), size)
    grid = sum(plan.turns(of[:-2].numel(), n) for n in heads)
    tensors = *ys, *rstds, query.x, key.x, query.weight, key.weight, rotation.cos, rotation.sin
    layouts = *_rows(query.x), *_rows(key.x), *rotation.rows(of[:-2])
    options = _options(spec, query, heads, rotation, stats, plan)
    options.update(RESCUE=stats == torch.float32, **started_by(plan.tile, size))
    launch(heads_forward, (grid,), device, (*tensors, of[:-2].numel(), *layouts, eps), options)
    return *ys, *rstds


def backward(
    spec: RowNorm, query: Side, key: Side, of_query: Wanted, of_key: Wanted, rotation: Rotation
) -> tuple[Tensor | None, ...]:
    """(dquery, dkey, dquery_weight, dkey_weight), those that are wanted; contiguous."""
    sides, device, of = ((query, of_query), (key, of_key)), query.x.device, query.x.shape
    stats = of_query.rstd.dtype
    dxs = [empty(side.x, side.x.dtype, device) if wanted.any and wanted.dx else None for side, wanted in sides]
    dws = [
        empty(tuple(of[-1:]), side.weight.dtype, device) if wanted.any and wanted.dw and side.weight is not None else None
        for side, wanted in sides
    ]
    size, tokens, heads = describe(device), of[:-2].numel(), (of[-2], key.x.shape[-2])
    walked = tuple(n for n, (_, wanted) in zip(heads, sides, strict=True) if wanted.any)
    if not walked:
        return *dxs, *dws
    plan = choose_heads_backward(tokens, walked, of[-1], widest(query.x.dtype, stats), size)
    programs = plan.partials(tokens, walked, size)
    partials = [None if dw is None else empty((programs, of[-1]), stats, device) for dw in dws]
    dys = [wanted.dy if wanted.any else None for _, wanted in sides]
    tensors = (
        *(*dxs, *partials, *dys, query.x, key.x, query.weight, key.weight),
        *(of_query.rstd, of_key.rstd, rotation.cos, rotation.sin),
    )
    layouts = (*_rows(dys[0]), *_rows(dys[1]), *_rows(query.x), *_rows(key.x), *rotation.rows(of[:-2]))
    options = _options(spec, query, heads, rotation, stats, plan)
    options.update(STAGES=plan.stages, **started_by(plan.tile, size))
    launch(heads_backward, (programs,), device, (*tensors, tokens, *layouts), options)
    add_up(dws[0], dws[1], partials[0], partials[1], programs, plan.most_partials(size), stats)
    return *dxs, *dws


def _rows(x: Tensor | None) -> Rows:
    """Of (*tokens, heads, D): how the tokens' dims collapse, with the heads' stride behind the others."""
    if x is None:
        return Rows((), (0, 0))
    odd_sizes, strides = collapse(x.shape[:-2], x.stride()[:-2])
    return Rows(odd_sizes, (*strides, x.stride(-2)))


def _options(
    spec: RowNorm, query: Side, heads: tuple[int, int], rotation: Rotation, stats: torch.dtype, plan: Any
) -> dict[str, Any]:
    """What both kernels are told of the problem and of its launch."""
    of_query, of_key = ((n, plan.together(n)) for n in heads)
    return dict(
        Q_OF=of_query,
        K_OF=of_key,
        N=query.x.shape[-1],
        R=rotation.length,
        INTERLEAVED=rotation.interleaved,
        OFFSET=spec.offset,
        ROUND=spec.rounded and query.x.dtype != stats,
        ACC=ACCUMULATOR[stats],
        ROWS=plan.tile.rows,
        CHUNK=plan.tile.chunk,
    )
