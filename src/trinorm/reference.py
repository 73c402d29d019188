"""The same specs without Triton: the float64 oracle, and the differentiable composite of ATen's own ops.

The oracle is what every test compares with: the definition, written out. The composite is what runs wherever the
kernels do not: on CPU, under forward-mode AD, vmap and torch.compile, and for second derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .spec import RowNorm


class Exact(NamedTuple):
    """What the definition gives in float64. ``mean`` is zero for a spec that does not center."""

    y: Tensor
    mean: Tensor
    rstd: Tensor


class Gradients(NamedTuple):
    """dL/dx, dL/dweight and dL/dbias; None where there is no such input."""

    dx: Tensor | None
    dw: Tensor | None
    db: Tensor | None


def oracle(
    spec: RowNorm,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Exact:
    """The definition in float64: ``rstd = (mean((x - mean)^2) + eps)^-1/2``, ``y = (x - mean) * rstd * weight + bias``."""
    dims = tuple(range(-len(normalized_shape), 0))
    x = x.double()
    mean = x.mean(dims, keepdim=True) if spec.center else torch.zeros_like(x.mean(dims, keepdim=True))
    centered = x - mean if spec.center else x
    rstd = (centered.square().mean(dims, keepdim=True) + eps).rsqrt()
    y = centered * rstd
    if weight is not None:
        y = y * weight.double()
    if bias is not None:
        y = y + bias.double()
    return Exact(y, mean.flatten(), rstd.flatten())


def oracle_gradients(
    spec: RowNorm,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dy: Tensor,
) -> Gradients:
    """The oracle's gradients, by differentiating the definition in float64."""
    inputs = [None if t is None else t.detach().double().requires_grad_() for t in (x, weight, bias)]
    with torch.enable_grad():
        y = oracle(spec, inputs[0], normalized_shape, inputs[1], inputs[2], eps).y  # type: ignore[arg-type]
    return _gradients(y, inputs, dy.double())


def composite(
    spec: RowNorm,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """The norm as torch's own op, differentiable any number of times and in either mode.

    torch's op where it takes the dtypes given; where it does not (weights of another floating dtype), the same op in
    fp32 or fp64 with one rounding at the end.
    """
    shape = list(normalized_shape)
    dtypes = {t.dtype for t in (x, weight, bias) if t is not None}
    out_dtype = x.dtype
    if len(dtypes) > 1:
        wide = torch.float64 if torch.float64 in dtypes else torch.float32
        x = x.to(wide)
        weight = None if weight is None else weight.to(wide)
        bias = None if bias is None else bias.to(wide)
    if spec.center:
        y = F.layer_norm(x, shape, weight, bias, eps)
    else:
        y = F.rms_norm(x, shape, weight, eps)
        y = y if bias is None else y + bias
    return y.to(out_dtype)


def composite_gradients(
    spec: RowNorm,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dy: Tensor,
) -> Gradients:
    """The gradients as differentiable functions of x, weight, bias and dy: the road of second derivatives."""
    # Views, so that the graph built here ends at tensors of its own and still reaches the caller's through them.
    inputs = [None if t is None else t.view_as(t) for t in (x, weight, bias)]
    with torch.enable_grad():
        inputs = [t if t is None or t.requires_grad else t.detach().requires_grad_() for t in inputs]
        y = composite(spec, inputs[0], normalized_shape, inputs[1], inputs[2], eps)  # type: ignore[arg-type]
    return _gradients(y, inputs, dy, create_graph=True)


def _gradients(y: Tensor, inputs: Sequence[Tensor | None], dy: Tensor, create_graph: bool = False) -> Gradients:
    present = [t for t in inputs if t is not None]
    found = iter(torch.autograd.grad(y, present, dy, create_graph=create_graph))
    return Gradients(*(None if t is None else next(found) for t in inputs))
