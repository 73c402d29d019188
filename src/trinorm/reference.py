"""The same specs without Triton: the float64 oracle, and the differentiable composite of ATen's own ops.

The oracle is what every test compares with: the definition, written out. The composite is what runs wherever the
kernels do not: on CPU, under forward-mode AD, vmap and torch.compile, and for second derivatives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .spec import RowNorm


class Exact(NamedTuple):
    """What the definition gives, as float64. ``mean`` is zero for a spec that does not center."""

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
    """The definition: ``rstd = (mean((x - mean)^2) + eps)^-1/2``, ``y = (x - mean) * rstd * weight + bias``.

    Computed in float64; where an input is float64, in extended precision (numpy's longdouble), so that the error of a
    float64 result can be seen at all.
    """
    lift, lower, quiet = _precise(x, weight, bias)
    with quiet:
        mean, rstd, xhat = _normalized(spec, lift(x), len(normalized_shape), eps)
        y = xhat if weight is None else xhat * lift(weight)
        y = y if bias is None else y + lift(bias)
    return Exact(lower(y), lower(mean).flatten(), lower(rstd).flatten())


def oracle_gradients(
    spec: RowNorm,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dy: Tensor,
) -> Gradients:
    """The gradients in closed form (docs/mathematics.md derives them), in the oracle's precision.

    ``dx = rstd * (g - xhat * mean(g * xhat) - mean(g))`` with ``g = dy * weight``, the last term for a spec that centers.
    """
    lift, lower, quiet = _precise(x, weight, bias)
    dims = tuple(range(-len(normalized_shape), 0))
    rows = tuple(range(x.dim() - len(normalized_shape)))
    with quiet:
        _, rstd, xhat = _normalized(spec, lift(x), len(normalized_shape), eps)
        upstream = lift(dy)
        g = upstream if weight is None else upstream * lift(weight)
        dx = g - xhat * (g * xhat).mean(axis=dims, keepdims=True)
        if spec.center:
            dx = dx - g.mean(axis=dims, keepdims=True)
        dw = None if weight is None else (upstream * xhat).sum(axis=rows) if rows else upstream * xhat
        db = None if bias is None else upstream.sum(axis=rows) if rows else upstream
        return Gradients(lower(rstd * dx), None if dw is None else lower(dw), None if db is None else lower(db))


def _normalized(spec: RowNorm, x: Any, dims: int, eps: float) -> tuple[Any, Any, Any]:
    """(mean, rstd, xhat), of a torch tensor or a numpy array alike."""
    axes = tuple(range(-dims, 0))
    mean = x.mean(axis=axes, keepdims=True)
    mean = mean if spec.center else mean * 0
    centered = x - mean if spec.center else x
    rstd = 1 / ((centered * centered).mean(axis=axes, keepdims=True) + eps) ** 0.5
    return mean, rstd, centered * rstd


def _precise(
    x: Tensor, *parameters: Tensor | None
) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor], contextlib.AbstractContextManager[Any]]:
    """(to the precision that the oracle computes in, from it to float64 on x's device, a context to compute in)."""
    if not any(t is not None and t.dtype == torch.float64 for t in (x, *parameters)):
        return (lambda t: t.detach().double()), (lambda t: t), contextlib.nullcontext()
    import numpy as np

    return (
        lambda t: t.detach().double().cpu().numpy().astype(np.longdouble),
        lambda a: torch.from_numpy(np.asarray(a, dtype=np.float64)).to(x.device),
        # numpy warns of NaN and Inf, which are data here.
        np.errstate(all="ignore"),
    )


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
