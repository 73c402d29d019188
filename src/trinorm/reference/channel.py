"""The channel norms without Triton: the float64 oracle, and the differentiable composite of ATen's own ops.

As reference.py has them of the row norms. x is seen as samples × groups × channels of a group × positions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..reference import (
    Exact,
    autocasts_to_fp32,
    differentiates,
    in_dtypes_of,
    in_fp32,
    is_transformed,
    keeping_dtype,
    precise,
)
from ..spec import BATCH_NORM, GROUP_NORM, LAYER_NORM, Activation, ChannelNorm


class Given(NamedTuple):
    """Statistics that are given and not taken: a mean and a variance for each channel."""

    mean: Tensor
    var: Tensor


class ChannelGradients(NamedTuple):
    """dL/dx, dL/dweight, dL/dbias and dL/dresidual; None where there is no such input, or nobody asks."""

    dx: Tensor | None
    dw: Tensor | None
    db: Tensor | None
    dr: Tensor | None


class Averages(NamedTuple):
    """Running statistics to be kept up, in place, and the share that those of an input get in them."""

    mean: Tensor
    var: Tensor
    momentum: float


def oracle(
    spec: ChannelNorm,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    given: Given | None = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
) -> Exact:
    """The definition: ``rstd = (var + eps)^-1/2``, ``y = f((x - mean) * rstd * weight + bias + residual)``, in the
    precision of reference.oracle. Statistics come flat: of each group or position of a sample, or of each channel.
    """
    lift, lower, quiet = precise(x, weight, bias)
    with quiet:
        mean, rstd, xhat = _normalized(spec, lift(x), num_groups, eps, None if given is None else tuple(map(lift, given)))
        w, b = (None if t is None else _of_channels(lift(t), num_groups) for t in (weight, bias))
        y = _affine(xhat, w, b, None if residual is None else _seen(lift(residual), num_groups))
    y = activated(lower(y), activation)
    return Exact(y.reshape(x.shape), lower(mean).flatten(), lower(rstd).flatten())


def oracle_gradients(
    spec: ChannelNorm,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dy: Tensor,
    given: Given | None = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
) -> ChannelGradients:
    """The gradients in closed form, in the oracle's precision."""
    lift, lower, quiet = precise(x, weight, bias)
    with quiet:
        statistics = None if given is None else tuple(map(lift, given))
        _, rstd, xhat = _normalized(spec, lift(x), num_groups, eps, statistics)
        w, b = (None if t is None else _of_channels(lift(t), num_groups) for t in (weight, bias))
        dz = _seen(lift(dy), num_groups)
        if activation is not None:
            r = None if residual is None else _seen(lift(residual), num_groups)
            dz = lift(activated_backward(lower(dz), lower(_affine(xhat, w, b, r)), activation))
        dx, dw, db = _gradients(spec, xhat, rstd, w, dz, given is None)
        dx = lower(dx).reshape(x.shape)
        dw, db = (None if t is None else lower(d).reshape(t.shape) for d, t in ((dw, weight), (db, bias)))
        return ChannelGradients(dx, dw, db, None if residual is None else lower(dz).reshape(x.shape))


def composite(
    spec: ChannelNorm,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    given: Given | None = None,
    averages: Averages | None = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The norm as torch's own op, differentiable any number of times and in either mode.

    torch's op where it takes the dtypes given; else the same op in fp32 or fp64 with one rounding at the end. Parameters
    that are each sample's own come after torch's op without any. Of positions it is LayerNorm's. Under torch.func and in
    forward mode BatchNorm and InstanceNorm are the definition, written out: of torch's ops second derivatives are wrong
    there, and tangents of given statistics dropped, silently (2.13).
    """
    if activation is not None or residual is not None:
        z = composite(spec, x, num_groups, weight, bias, eps, given, averages)
        return activated(z if residual is None else (z + residual).to(z.dtype), activation)
    if spec.of_positions:
        y = reference.composite(LAYER_NORM, x.movedim(1, -1), x.shape[1:2], weight, bias, eps)
        return y.movedim(-1, 1).contiguous()
    if any(t is not None and t.dim() == 2 for t in (weight, bias)):
        y = composite(spec, x, num_groups, None, None, eps, given, averages)
        w, b = (None if t is None else t.reshape(*t.shape, *[1] * (x.dim() - 2)) for t in (weight, bias))
        return _affine(y, w, b).to(y.dtype)
    with keeping_dtype(x.device.type):
        if x.dtype != torch.float64 and autocasts_to_fp32(spec.name, x.device.type):
            x, weight, bias = in_fp32(x, weight, bias)
        narrow, running = x.dtype, given or (None if averages is None else averages[:2])
        dtypes = {t.dtype for t in (x, weight, bias, *(running or ())) if t is not None}
        defined = spec is not GROUP_NORM and is_transformed()
        if running is not None and given is None and not x.numel():
            running = None  # torch would make NaN of them
        mean, var = running or (None, None)
        if len(dtypes) > 1 or defined:
            wide = torch.float64 if torch.float64 in dtypes else torch.float32
            tensors = x, weight, bias, mean, var
            # A transform's own would be another tensor also where nothing changes.
            x, weight, bias, mean, var = (t if t is None or t.dtype is wide else t.to(wide) for t in tensors)  # type: ignore[assignment]
        if weight is None and bias is not None:
            # Without one torch's backwards (2.11 to 2.13) have an error for a second derivative.
            weight = torch.ones_like(bias)
        if spec is GROUP_NORM:
            return _group_norm(x, num_groups, weight, bias, eps).to(narrow)
        # By given statistics the two are one, and torch's own InstanceNorm then flattens, which DTensors refuse (2.11).
        norm = F.batch_norm if spec.over_samples or given is not None else F.instance_norm
        how = given is None, 0.0 if averages is None else averages.momentum, eps
        if defined:
            if averages is not None:
                norm(x.detach(), mean, var, None, None, *how)  # which may write to them there
            y = _defined(spec, x, weight, bias, eps, None if given is None else (mean, var))
        elif given is None and x.numel() and differentiates(x, weight, bias):
            y = _taken(spec, x, weight, bias, mean, var, *how[1:])
        else:
            y = norm(x, mean, var, weight, bias, *how)
        if norm is F.instance_norm and x.shape[0] == 1 and y.is_contiguous():
            # torch's backward (2.11 to 2.13) reads the gradient of one sample as contiguous, whatever it is: so it will be.
            y = y.flatten().view(y.shape)
        if averages is not None and running is not None:
            for kept, now in zip(averages[:2], (mean, var), strict=True):
                if now is not None and kept is not now:
                    kept.copy_(now)
        return y.to(narrow)


def _taken(
    spec: ChannelNorm,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """Of the input's own statistics. InstanceNorm is, as in torch, BatchNorm of all samples' channels side by side."""
    if spec.over_samples:
        return _BatchNorm.apply(x, weight, bias, mean, var, momentum, eps)
    samples = x.shape[0]
    each = [None if t is None else t.repeat(samples) for t in (weight, bias, mean, var)]
    # In torch's order of memory: of another, of one sample, x and y would be of two, which its backward mixes up.
    y = _BatchNorm.apply(x.contiguous().view(1, -1, *x.shape[2:]), *each, momentum, eps)
    for kept, now in ((mean, each[2]), (var, each[3])):
        if kept is not None and now is not None:
            kept.copy_(now.view(samples, -1).mean(0))
    return y.view(x.shape)


class _BatchNorm(torch.autograd.Function):
    """torch's own op and backward, but for the backward's own derivatives: torch's third are wrong, silently (2.13)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float) -> Tensor:
        y, *statistics = torch.native_batch_norm(x, weight, bias, mean, var, True, momentum, eps)
        ctx.save_for_backward(x, weight, bias, *statistics)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *statistics = ctx.saved_tensors
        if torch.is_grad_enabled():
            bias_dtype = None if bias is None else bias.dtype
            found = composite_gradients(BATCH_NORM, x, x.shape[1], weight, bias, bias_dtype, ctx.eps, dy)
            return *found[:3], None, None, None, None
        wanted = ctx.needs_input_grad[:3]
        found = torch.ops.aten.native_batch_norm_backward(dy, x, weight, None, None, *statistics, True, ctx.eps, wanted)
        # On a GPU db comes with dw, asked for or not.
        return *(t if is_wanted else None for t, is_wanted in zip(found, wanted, strict=True)), None, None, None, None


def _defined(
    spec: ChannelNorm, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, given: tuple[Any, Any] | None
) -> Tensor:
    """The definition of BatchNorm and InstanceNorm in ATen's ops."""
    channels = x.shape[1]
    *_, xhat = _normalized(spec, x, channels, eps, given)
    w, b = (None if t is None else _of_channels(t, channels) for t in (weight, bias))
    return _affine(xhat, w, b).reshape(x.shape)


def keep_up(averages: Averages, mean: Tensor, var: Tensor) -> None:
    """``running * (1 - momentum) + value * momentum``, in place and in fp64. mean, unbiased var: ``(C,)``; or each
    sample's, ``(N, C)``, of which running ones have the mean.
    """
    for running, now in zip(averages[:2], (mean, var), strict=True):
        value = now.detach().double()
        value = value.mean(0) if value.dim() == 2 else value
        running.copy_(running.double() * (1 - averages.momentum) + value * averages.momentum)


def _group_norm(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """torch's, around what its CPU backward (2.11 to 2.13) does of channels-last x that wants no gradient: the process
    ends.
    """
    if torch.is_grad_enabled() and not (x.requires_grad or x.is_contiguous()):
        return F.group_norm(x.contiguous(), num_groups, weight, bias, eps).movedim(1, -1).contiguous().movedim(-1, 1)
    return F.group_norm(x, num_groups, weight, bias, eps)


def composite_gradients(
    spec: ChannelNorm,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    bias_dtype: torch.dtype | None,
    eps: float,
    dy: Tensor,
    given: Given | None = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
) -> ChannelGradients:
    """The closed form in ATen's ops and in fp64: a differentiable function of x, weight, bias, residual and dy. The
    activation needs bias and residual, and db bias_dtype.
    """
    statistics = None if given is None else tuple(t.double() for t in given)
    _, rstd, xhat = _normalized(spec, x.double(), num_groups, eps, statistics)
    w, b = (None if t is None else _of_channels(t.double(), num_groups) for t in (weight, bias))
    r = None if residual is None else _seen(residual.double(), num_groups)
    dz = activated_backward(_seen(dy.double(), num_groups), _affine(xhat, w, b, r), activation)
    dx, dw, db = _gradients(spec, xhat, rstd, w, dz, given is None)
    shape = next((t.shape for t in (weight, bias) if t is not None), x.shape[1:2])
    found = in_dtypes_of((dx.reshape(x.shape), dw.reshape(shape), db.reshape(shape)), x, weight, bias_dtype)
    return ChannelGradients(*found, None if residual is None else dz.reshape(x.shape).to(x.dtype))


def statistics(spec: ChannelNorm, x: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, rstd, unbiased variance) in ATen's ops, flat and float64: of each group or position of a sample, or of each
    channel.
    """
    mean, rstd, _ = _normalized(spec, x.double(), num_groups, eps, None)
    square = (_seen(x.double(), num_groups) - mean).square().sum(_axes(spec))
    return mean.flatten(), rstd.flatten(), (square / (x.numel() // max(1, mean.numel()) - 1)).flatten()


def _seen(x: Any, num_groups: int) -> Any:
    """x as samples × groups × channels of a group × positions; of a torch tensor or a numpy array alike."""
    samples, channels, *positions = x.shape
    s = 1
    for size in positions:
        s *= size
    return x.reshape((samples, num_groups, channels // num_groups, s))


def _of_channels(t: Any, num_groups: int) -> Any:
    """A parameter, a channel's or each sample's own, beside what _seen gives."""
    return t.reshape((t.shape[0] if t.ndim == 2 else 1, num_groups, t.shape[-1] // num_groups, 1))


def _affine(xhat: Any, w: Any | None, b: Any | None, residual: Any | None = None) -> Any:
    y = xhat if w is None else xhat * w
    y = y if b is None else y + b
    return y if residual is None else y + residual


def activated(z: Tensor, activation: Activation | None) -> Tensor:
    """f(z)."""
    return z if activation is None else getattr(F, activation)(z)


def activated_backward(dy: Tensor, z: Tensor, activation: Activation | None) -> Tensor:
    """dy·f'(z), differentiable."""
    if activation == "relu":
        return torch.where(z <= 0, 0, dy)
    if activation == "silu":
        s = torch.sigmoid(z)
        return dy * (s + z * s * (1 - s))
    if activation == "gelu":
        return dy * ((1 + torch.erf(z * 0.5**0.5)) / 2 + z * torch.exp(-z * z / 2) / (2 * torch.pi) ** 0.5)
    return dy


def _normalized(spec: ChannelNorm, x: Any, num_groups: int, eps: float, given: Any | None) -> tuple[Any, Any, Any]:
    """(mean, rstd, x̂)."""
    x = _seen(x, num_groups)
    if given is not None:
        mean, var = (_of_channels(t, num_groups) for t in given)
    else:
        axes = _axes(spec)
        mean = x.mean(axis=axes, keepdims=True)
        var = ((x - mean) * (x - mean)).mean(axis=axes, keepdims=True)
    rstd = 1 / (var + eps) ** 0.5
    return mean, rstd, (x - mean) * rstd


def _axes(spec: ChannelNorm) -> tuple[int, ...]:
    """The dims that share statistics. (A channel of BatchNorm is its own group.)"""
    return (0, 2, 3) if spec.over_samples else (2,) if spec.of_positions else (2, 3)


def _gradients(spec: ChannelNorm, xhat: Any, rstd: Any, weight: Any | None, dy: Any, taken: bool) -> tuple[Any, Any, Any]:
    """``dx = rstd * (g - xhat * mean(g * xhat) - mean(g))`` with ``g = dy * weight``; of given statistics ``rstd * g``."""
    g = dy if weight is None else dy * weight
    dx = g
    if taken:
        axes = _axes(spec)
        dx = g - xhat * (g * xhat).mean(axis=axes, keepdims=True) - g.mean(axis=axes, keepdims=True)
    summed = (3,) if weight is not None and weight.shape[0] > 1 else (0, 3)
    return rstd * dx, (dy * xhat).sum(axis=summed), dy.sum(axis=summed)
