"""Norms of a gated sum without Triton: the definition in float64, and ATen's ops, differentiable any number of times.

gate, weight and bias are broadcast to x; the last ``dims`` dims are normalized. What is normalized of the sum is
conditioned_reference's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..reference import Exact
from ..reference import conditioned as conditioned_reference
from ..spec import ConditionedNorm

Gradients = tuple[Tensor | None, ...]


class GatedSumGradients(NamedTuple):
    """dL/dx, dL/dweight, dL/dbias, dL/dresidual and dL/dgate; None where there is no such input, or nobody asks."""

    dx: Tensor | None
    dw: Tensor | None
    db: Tensor | None
    dr: Tensor | None
    dg: Tensor | None


def gated_sum(x: Tensor, residual: Tensor, gate: Tensor) -> Tensor:
    """``residual + gate·x``, rounded once, to what torch promotes x and the residual to."""
    kept = torch.promote_types(x.dtype, residual.dtype)
    wide = torch.promote_types(torch.promote_types(kept, gate.dtype), torch.float32)
    return torch.addcmul(residual.to(wide), x.to(wide), gate.to(wide)).to(kept)


def oracle_sum(x: Tensor, residual: Tensor, gate: Tensor) -> Tensor:
    """The definition."""
    lift, lower, quiet = reference.precise(x, residual, gate)
    with quiet:
        return lower(lift(residual) + lift(x) * lift(gate))


def oracle(
    spec: ConditionedNorm, dims: int, size: int, total: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Exact:
    """The norm of the sum as it is kept."""
    return conditioned_reference.oracle(spec, dims, size, total, None, weight, bias, eps)


def oracle_gradients(
    spec: ConditionedNorm,
    dims: int,
    size: int,
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    total: Tensor,
    eps: float,
    dy: Tensor,
    dsum: Tensor | None,
) -> Gradients:
    """(dx, dresidual, dgate, dweight, dbias) in closed form, of y's gradient and of the sum's own; None of what is None."""
    ds, _, dw, db = conditioned_reference.oracle_gradients(spec, dims, size, total, None, weight, bias, eps, dy)
    assert ds is not None
    lift, lower, quiet = reference.precise(x, gate, ds)
    with quiet:
        dr = lift(ds) if dsum is None else lift(ds) + lift(dsum)
        dgate = conditioned_reference.summed_to(dr * lift(x), gate.shape)
        return lower(dr * lift(gate)), lower(dr), lower(dgate), dw, db


def composite(
    spec: ConditionedNorm,
    dims: int,
    size: int,
    x: Tensor,
    residual: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(y, sum)."""
    total = gated_sum(x, residual, gate)
    return conditioned_reference.composite(spec, dims, size, total, None, weight, bias, eps, dtype), total


def composite_gradients(
    spec: ConditionedNorm,
    dims: int,
    size: int,
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    total: Tensor,
    eps: float,
    dy: Tensor,
    dsum: Tensor | None,
    of_residual: torch.dtype,
    dtype: torch.dtype,
) -> Gradients:
    """Those of oracle_gradients by ATen's ops, in fp64: a differentiable function of all but eps. of_residual: the dtype of
    its gradient; dtype: y's.
    """
    how = None, weight, bias, eps, dy, dtype
    ds, _, dw, db = conditioned_reference.composite_gradients(spec, dims, size, total.double(), *how)
    assert ds is not None
    dr = ds if dsum is None else ds + dsum
    dgate = conditioned_reference.summed_to(dr * x, gate.shape)
    return (dr * gate).to(x.dtype), dr.to(of_residual), dgate.to(gate.dtype), dw, db
