"""What the tests of conditioned norms share: a call, its result and every gradient beside float64 and torch's own."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from trinorm import functional
from trinorm.compare import assert_no_worse
from trinorm.reference import conditioned as conditioned_reference
from trinorm.reference.conditioned import _activated, _derivative, _normalized, summed_to
from trinorm.spec import LAYER_NORM, RMS_NORM, Cast, ConditionedNorm, GateActivation, RowNorm

EPS = 1e-5
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NORMS = (LAYER_NORM, RMS_NORM)
NAMES = ("x", "gate", "weight", "bias")


class Call(NamedTuple):
    """A spec of rows of ``size`` elements, of which the last ``dims`` dims hold one or more, and the tensors, each or
    not.
    """

    spec: ConditionedNorm
    dims: int
    size: int
    x: Tensor
    gate: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float = EPS

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.x, self.gate, self.weight, self.bias

    def of(self, tensors: Any) -> Call:
        return self._replace(**dict(zip(NAMES, tensors, strict=True)))

    def __call__(self) -> Tensor:
        """By the function that has it."""
        spec, dims, size, x, gate, weight, bias, eps = self
        if spec.modulated:
            norm = getattr(functional, f"modulated_{spec.norm.name}")
            return norm(x, x.shape[x.dim() - dims :], weight, bias, eps=eps)
        if spec.counted is not None:
            return functional.partial_rms_norm(
                x, x.shape[x.dim() - dims :], weight, eps, count=spec.counted, cast=spec.norm.cast
            )
        if spec.divisor is not None:
            if weight is not None and weight.numel() < size:
                return functional.scale_norm(x, weight, eps)
            return functional.l2_norm(x, x.shape[x.dim() - dims :], weight, eps, cast=spec.norm.cast)
        if gate is None:
            norm = getattr(functional, f"per_head_{spec.norm.name}")
            return norm(x, weight, *[bias] * spec.norm.center, eps, cast=spec.norm.cast)
        how: dict[str, Any] = dict(activation=spec.gate, norm_before_gate=not spec.gate_first, cast=spec.norm.cast)
        norm = getattr(functional, f"gated_{spec.norm.name}")
        return norm(x, gate, weight, bias, eps, group_size=None if size == x.shape[-1] else size, **how)


def modulated(norm: RowNorm, x: Tensor, scale: Tensor, shift: Tensor | None, dims: int = 1, eps: float = EPS) -> Call:
    size = x.shape[x.dim() - dims :].numel()
    return Call(ConditionedNorm(norm, modulated=True), dims, size, x, None, scale, shift, eps)


def gated(
    norm: RowNorm,
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    size: int | None = None,
    activation: GateActivation = "silu",
    first: bool = False,
    cast: Cast = "output",
    eps: float = EPS,
) -> Call:
    spec = ConditionedNorm(norm.with_cast(cast), activation, first)
    return Call(spec, 1, size or x.shape[-1], x, gate, weight, bias, eps)


def of_heads(
    norm: RowNorm, x: Tensor, weight: Tensor, bias: Tensor | None = None, cast: Cast = "output", eps: float = EPS
) -> Call:
    return Call(ConditionedNorm(norm.with_cast(cast)), 1, x.shape[-1], x, None, weight, bias, eps)


def relative(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    count: int | None = None,
    divisor: int | None = None,
    dims: int = 1,
    cast: Cast = "output",
    eps: float = EPS,
) -> Call:
    """The L2 norm, with a divisor of 1; ScaleNorm, by a weight of one element; partial RMSNorm, whose count divides too."""
    spec = ConditionedNorm(RMS_NORM.with_cast(cast), counted=count, divisor=count if divisor is None else divisor)
    return Call(spec, dims, x.shape[x.dim() - dims :].numel(), x, None, weight, None, eps)


def assert_right(call: Call, dy: Tensor | None = None) -> None:
    """The result, and every gradient."""
    *problem, eps = call
    leaves = [None if t is None else t.detach().requires_grad_() for t in call.tensors]
    asked = [t for t in leaves if t is not None]
    y = call.of(leaves)()
    assert y.dtype == call.x.dtype
    assert y.is_contiguous()
    dy = torch.randn_like(y) if dy is None else dy
    plain = [None if t is None else t.detach().requires_grad_() for t in call.tensors]
    by_torch = conditioned_reference.composite(*call.of(plain), y.dtype)
    of_y, *of_gradients = terms(call, dy)
    assert_no_worse("y", y.detach(), conditioned_reference.oracle(*problem, eps).y, by_torch.detach(), of_y)
    there = [name for name, t in zip(NAMES, leaves, strict=True) if t is not None]
    found = dict(zip(there, torch.autograd.grad(y, asked, dy), strict=True))
    torchs = iter(torch.autograd.grad(by_torch, [t for t in plain if t is not None], dy))
    exact = conditioned_reference.oracle_gradients(*problem, eps, dy)
    for name, want, size in zip(NAMES, exact, of_gradients, strict=True):
        if want is not None:
            assert size is not None
            assert_no_worse(f"d{name}", found[name], want, next(torchs), size)


def terms(call: Call, dy: Tensor) -> tuple[Tensor | None, ...]:
    """How large what y, dx, dgate, dweight and dbias are sums of is: of sums over rows, the sums on the way, which are as
    large as the root of the sum of their terms' squares.
    """
    spec, dims, size, *tensors, eps = call
    x, gate, weight, bias = (None if t is None else t.double() for t in tensors)
    assert x is not None
    mean, rstd, xhat, _ = _normalized(spec, dims, size, x, gate, weight, bias, eps)
    rows = (*x.shape[: x.dim() - dims], -1, size)
    # x̂ is a difference itself, of what a mean is rounded in.
    of_xhat = xhat.abs() + ((mean * rstd).abs() + torch.zeros_like(xhat).reshape(rows)).reshape(x.shape)
    of_n = of_xhat if weight is None else of_xhat * (weight + spec.offset).abs()
    of_n = of_n if bias is None else of_n + bias.abs()
    a = None if gate is None else _activated(gate, spec.gate)
    behind = a if not spec.gate_first else None
    dn = dy.double() if behind is None else dy.double() * behind
    g = dn if weight is None else dn * (weight + spec.offset)
    along, xhats = g.abs().reshape(rows), of_xhat.reshape(rows)
    count, divisor = spec.statistic(size)
    moved = xhats * (along * xhats).sum(-1, keepdim=True) / divisor
    moved[..., count:] = 0
    ds = along + moved + along.mean(-1, keepdim=True) * spec.norm.center
    ds = (rstd * ds).reshape(x.shape)
    dgate = None
    if gate is not None and a is not None:
        s = gate.sigmoid()
        of_derivative = _derivative(gate, a, spec.gate) if spec.gate == "sigmoid" else s + (a * (1 - s)).abs()
        dgate = (ds * x.abs() if spec.gate_first else dy.double().abs() * of_n) * of_derivative
    sums = (
        None if t is None else summed_to(part.square(), t.shape).sqrt() for t, part in ((weight, dn * xhat), (bias, dn))
    )
    of_y, of_x = (of_n, ds if a is None else ds * a.abs()) if behind is None else (of_n * behind.abs(), ds)
    return of_y, of_x, dgate, *sums


def sets(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """A parameter of these leading sizes, of x's dtype."""
    return torch.randn(*sizes, x.shape[-1], device=x.device).to(x.dtype)
