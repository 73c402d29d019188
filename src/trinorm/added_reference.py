"""The norms of a sum without Triton: ATen's ops, differentiable any number of times."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .spec import RowNorm


def composite(
    spec: RowNorm,
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    alpha: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(y, sum): the sum by torch's own op, and the composite of it, in the dtype given."""
    total = torch.add(x, residual, alpha=alpha)
    return reference.composite(spec, total, normalized_shape, weight, bias, eps, dtype), total


def composite_gradients(
    spec: RowNorm,
    total: Tensor,
    dims: int,
    weight: Tensor | None,
    eps: float,
    alpha: float,
    dy: Tensor | None,
    dsum: Tensor | None,
    dx: torch.dtype | None,
    dresidual: torch.dtype | None,
    dw: bool,
    db: torch.dtype | None,
    y: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """(dx, dresidual, dw, db) of y's gradient and of the sum's own, each or not, as ``composite_gradients`` has them: those
    that are wanted, in the dtypes given.
    """
    found = None if dy is None else reference.composite_gradients(spec, total, dims, weight, db, eps, dy, y)
    ds = dsum if found is None else found.dx
    if found is not None and found.dx is not None and dsum is not None:
        ds = found.dx + dsum
    assert ds is not None
    return (
        None if dx is None else ds.to(dx),
        None if dresidual is None else (ds if alpha == 1 else ds * alpha).to(dresidual),
        found.dw if found is not None and dw else None,
        None if found is None or db is None else found.db,
    )
