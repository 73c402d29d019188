"""The channel norms as functions, with torch.nn.functional's own signatures and defaults (functional re-exports them)."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import checks
from ..ops import channel_norm
from ..ops.channel import CALLS
from ..reference.channel import Averages, Given
from ..spec import ACTIVATIONS, BATCH_NORM, GROUP_NORM, INSTANCE_NORM, Activation


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: Activation | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    batch_invariant: bool | None = None,
) -> Tensor:
    r"""Group normalization: of each sample, over the channels of a group and all positions.

    .. math::
        y = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \cdot w + b

    with the biased variance, and w and b of the channel; then :math:`f(y (1 + s) + t + r)` with a scale s and a shift t of
    the channel in this sample, a residual r and an activation f. Without those the signature, defaults and meaning are
    :func:`torch.nn.functional.group_norm`'s.

    Args:
        input: ``(N, C, *)``; float16, bfloat16, float32 or float64. Contiguous and channels-last memory are read as they
            are, any other is copied once.
        num_groups: how many groups of neighbouring channels; a divisor of C.
        weight: ``(C,)``, any of the dtypes above, not necessarily the input's; None is 1.
        bias: as weight; None is 0.
        eps: added to the variance, so in the input's units squared; >= 0.
        activation: "relu", "silu", "gelu" (by the error function), or None. It is computed before the result is rounded,
            and its gradient from the input, so that nothing more is kept. (Where torch's operators compute it, after.)
        scale, shift: ``(N, C)``, or of that shape with dims of 1 behind it, as a diffusion model's time embedding gives
            them; either may be None, which is 0.
        residual: of the input's shape and dtype, such as a block's other branch; None is 0. What leads to it has
            :math:`f'` times y's gradient, from the pass that sums.
        batch_invariant: True promises that the bits of a sample's result, and of its gradient, do not depend on how many
            samples are beside it, among tensors of aligned storage in one of the two orders of memory. Groups that a
            program or a team of programs holds then have the launch of many samples, which for few is slower; larger ones,
            and all where channels are last, that of one, which for many is. (The gradients of weight and bias depend on all
            samples.) None: as ``trinorm.options`` says. Where trinorm's kernels do not run, torch's own operator promises
            what it does.

    Returns:
        A tensor of the input's shape, dtype and memory order (fp32 where autocast makes torch's own op return that).
        Statistics and sums are fp32, fp64 as soon as one of the tensors is.

    Raises:
        RuntimeError: C is not a multiple of ``num_groups``, the input has fewer than 2 dims, weight, bias, scale, shift
            or residual does not fit.
        ValueError: the only sample's groups are single elements, eps is negative or NaN, or there is no such activation.
        NotImplementedError: a dtype other than the four.
        TypeError: an argument of the wrong kind.

    Source: Wu, He, "Group Normalization", arXiv:1803.08494.
    """
    if has_torch_function_variadic(*(all_tensors := (input, weight, bias, scale, shift, residual))):
        given: dict[str, Any] = dict(weight=weight, bias=bias, eps=eps, activation=activation)
        given |= dict(scale=scale, shift=shift, residual=residual, batch_invariant=batch_invariant)
        return handle_torch_function(group_norm, all_tensors, input, num_groups, **given)
    plain = scale is None and shift is None and type(eps) is float and type(num_groups) is int
    plain = plain and (batch_invariant is None or type(batch_invariant) is bool)
    asked = (num_groups, eps, activation, batch_invariant) if plain else None
    if asked is not None:
        call = CALLS.recall(("group_norm", asked), input, weight, bias, None, None, residual)
        if call is not None:
            return call(input, weight, bias, None, None, residual)
    try:
        num_groups = operator.index(None if isinstance(num_groups, bool) else num_groups)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"group_norm(): num_groups must be an int, not {num_groups!r}") from None
    eps = check_channels("group_norm", input, eps, activation, residual, weight=weight, bias=bias)
    channels = input.shape[1]
    if num_groups <= 0 or channels % num_groups:
        raise RuntimeError(
            f"group_norm(): num_groups is {num_groups}, but input has {channels} channels; it must be a divisor of those"
        )
    if input.shape[0] * (channels // num_groups) * math.prod(input.shape[2:]) == 1:
        raise ValueError(
            f"group_norm(): expected more than 1 value per group when training, got input size {tuple(input.shape)}"
        )
    invariant = checks.invariance("group_norm", batch_invariant)
    weight, bias = _of_samples("group_norm", input, weight, bias, scale, shift)
    how: dict[str, Any] = dict(residual=residual, asked=asked, batch_invariant=invariant)
    return channel_norm(GROUP_NORM, input, num_groups, weight, bias, eps, activation, **how)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: Activation | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    batch_invariant: bool | None = None,
) -> Tensor:
    r"""Instance normalization: of each channel of each sample, over all positions.

    The formula is :func:`group_norm`'s with a group for each channel. The signature, defaults and meaning are
    :func:`torch.nn.functional.instance_norm`'s.

    Args:
        input: ``(N, C, *)`` with positions, as :func:`group_norm`.
        running_mean, running_var: ``(C,)``. With ``use_input_stats`` they are kept up, in place: ``running * (1 - momentum)
            + value * momentum``, of the mean over samples of their means and unbiased variances. Without it, they are used.
        weight, bias, eps: as :func:`group_norm`.
        use_input_stats: take statistics of the input; else the running ones, which are then needed.
        momentum: the share of this input in the running statistics.
        activation, scale, shift, residual, batch_invariant: as :func:`group_norm`. Scale and shift are what adaptive
            instance normalization calls the style.

    Returns:
        As :func:`group_norm`; autocast leaves it alone.

    Raises:
        RuntimeError, NotImplementedError, TypeError: as :func:`group_norm`; RuntimeError too where running statistics are
            needed and missing, or require a gradient.
        ValueError: one position for each channel, with ``use_input_stats``; eps is negative or NaN, or there is no such
            activation.

    Source: Ulyanov, Vedaldi, Lempitsky, "Instance Normalization", arXiv:1607.08022.
    """
    if has_torch_function_variadic(
        *(all_tensors := (input, running_mean, running_var, weight, bias, scale, shift, residual))
    ):
        arguments: dict[str, Any] = dict(running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
        arguments |= dict(use_input_stats=use_input_stats, momentum=momentum, eps=eps)
        arguments |= dict(activation=activation, scale=scale, shift=shift, residual=residual)
        arguments |= dict(batch_invariant=batch_invariant)
        return handle_torch_function(instance_norm, all_tensors, input, **arguments)
    plain = scale is None and shift is None and type(eps) is type(momentum) is float and type(use_input_stats) is bool
    plain = plain and (batch_invariant is None or type(batch_invariant) is bool)
    asked = (use_input_stats, momentum, eps, activation, batch_invariant) if plain else None
    if asked is not None:
        call = CALLS.recall(("instance_norm", asked), input, weight, bias, running_mean, running_var, residual)
        if call is not None:
            return call(input, weight, bias, running_mean, running_var, residual)
    op = "instance_norm"
    checks.flag(op, "use_input_stats", use_input_stats)
    tensors = dict(running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    eps = check_channels(op, input, eps, activation, residual, **tensors)
    if use_input_stats and math.prod(input.shape[2:]) == 1:
        raise ValueError(f"{op}(): expected more than 1 spatial element when training, got input size {tuple(input.shape)}")
    given, averages = _statistics(op, running_mean, running_var, use_input_stats, momentum)
    how = given, averages, residual, asked, checks.invariance(op, batch_invariant)
    weight, bias = _of_samples(op, input, weight, bias, scale, shift)
    return channel_norm(INSTANCE_NORM, input, input.shape[1], weight, bias, eps, activation, *how)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: Activation | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    r"""Batch normalization: of each channel, over all samples and positions.

    The formula is :func:`group_norm`'s with a channel's statistics. The signature, defaults and meaning are
    :func:`torch.nn.functional.batch_norm`'s. Of given statistics it is one pass; to have none at all, torch's own
    :func:`torch.nn.utils.fuse_conv_bn_eval` folds the module into the convolution before it (but not its activation,
    which torch's converters, ``convert_sync_batchnorm`` too, do not know).

    Args:
        input: ``(N, C, *)``, as :func:`group_norm`.
        running_mean, running_var: ``(C,)``. In training they are kept up, in place: ``running * (1 - momentum) + value *
            momentum``, of the unbiased variance. Else they are used.
        weight, bias, eps: as :func:`group_norm`.
        training: take statistics of the input; else the running ones, which are then needed.
        momentum: the share of this input in the running statistics.
        activation, residual: as :func:`group_norm`. The end of a ResNet's block is ``batch_norm(x, ..., residual=shortcut,
            activation="relu")``.

    Returns:
        As :func:`group_norm`; autocast leaves it alone.

    Raises:
        RuntimeError, NotImplementedError, TypeError: as :func:`group_norm`; RuntimeError too where running statistics are
            needed and missing, or require a gradient.
        ValueError: one value for each channel, in training; eps is negative or NaN, or there is no such activation.

    Source: Ioffe, Szegedy, "Batch Normalization", arXiv:1502.03167.
    """
    if has_torch_function_variadic(*(all_tensors := (input, running_mean, running_var, weight, bias, residual))):
        rest: dict[str, Any] = dict(weight=weight, bias=bias, training=training, momentum=momentum, eps=eps)
        rest |= dict(activation=activation, residual=residual)
        return handle_torch_function(batch_norm, all_tensors, input, running_mean, running_var, **rest)
    plain = type(eps) is type(momentum) is float and type(training) is bool
    asked = (training, momentum, eps, activation) if plain else None
    if asked is not None:
        call = CALLS.recall(("batch_norm", asked), input, weight, bias, running_mean, running_var, residual)
        if call is not None:
            return call(input, weight, bias, running_mean, running_var, residual)
    op = "batch_norm"
    checks.flag(op, "training", training)
    tensors = dict(running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    eps = check_channels(op, input, eps, activation, residual, **tensors)
    if training and input.shape[0] * math.prod(input.shape[2:]) == 1:
        raise ValueError(
            f"{op}(): expected more than 1 value per channel when training, got input size {tuple(input.shape)}"
        )
    given, averages = _statistics(op, running_mean, running_var, training, momentum)
    return channel_norm(BATCH_NORM, input, input.shape[1], weight, bias, eps, activation, given, averages, residual, asked)


def _statistics(
    op: str, mean: Tensor | None, var: Tensor | None, taken: bool, momentum: float
) -> tuple[Given | None, Averages | None]:
    """Running statistics as what they are here: given, or to be kept up."""
    if (mean is None) != (var is None) or (mean is None and not taken):
        missing = "running_mean" if mean is None else "running_var"
        kind = ValueError if taken else RuntimeError
        raise kind(
            f"{op}(): {missing} is None; running_mean and running_var go together, and are needed where statistics are not "
            "those of the input"
        )
    for name, t in (("running_mean", mean), ("running_var", var)):
        if t is not None and t.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"{op}(): {name} requires a gradient, which this norm does not give it; detach it")
        if t is not None and taken and t.stride() == (0,) and t.shape != (1,):
            raise RuntimeError(f"{op}(): {name} is one number expanded, but is to be written in place; clone it")
    if mean is None or var is None:
        return None, None
    if not taken:
        return Given(mean, var), None
    try:
        return None, Averages(mean, var, float(momentum))
    except (TypeError, ValueError):
        raise TypeError(f"{op}(): momentum must be a float, not {momentum!r}") from None


def _of_samples(
    op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """weight and bias, or, with a scale or a shift, those of each sample that come to the same: ``(N, C)``, few numbers, of
    which autograd knows how they were made.
    """
    if scale is None and shift is None:
        return weight, bias
    samples = tuple(x.shape[:2])
    for name, t in (("scale", scale), ("shift", shift)):
        if t is None:
            continue
        checks.tensor(op, name, t)
        checks.strided(op, name, t)
        if tuple(t.shape[:2]) != samples or any(size != 1 for size in t.shape[2:]):
            raise RuntimeError(
                f"{op}(): {name} has shape {tuple(t.shape)}, but input has {samples[0]} samples of {samples[1]} channels; "
                f"it must be {samples}, with dims of 1 behind it or not"
            )
        checks.beside(op, name, t, x)
    factor = x.new_ones(samples) if scale is None else 1 + scale.reshape(samples)
    of_shift = x.new_zeros(samples) if shift is None else shift.reshape(samples)
    return factor if weight is None else factor * weight, of_shift if bias is None else bias * factor + of_shift


def check_channels(
    op: str,
    x: Tensor,
    eps: float,
    activation: str | None = None,
    residual: Tensor | None = None,
    **parameters: Tensor | None,
) -> float:
    """eps as a float, or torch's own class of error, with the argument named."""
    checks.tensor(op, "input", x)
    checks.strided(op, "input", x)
    if x.is_nested:
        raise RuntimeError(f"{op}(): input is a nested tensor, which this norm does not take")
    if x.dim() < 2:
        raise RuntimeError(f"{op}(): input has shape {tuple(x.shape)}; it must have samples and channels, 2 dims or more")
    channels = (x.shape[1],)
    for name, t in parameters.items():
        if t is None:
            continue
        checks.tensor(op, name, t)
        checks.strided(op, name, t)
        if tuple(t.shape) != channels:
            raise RuntimeError(
                f"{op}(): {name} has shape {tuple(t.shape)}, but input has {channels[0]} channels; it must be {channels}"
            )
        checks.beside(op, name, t, x)
    checks.dtype(op, "input", x)
    if residual is not None:
        checks.tensor(op, "residual", residual)
        checks.strided(op, "residual", residual)
        if residual.shape != x.shape or residual.dtype != x.dtype:
            raise RuntimeError(
                f"{op}(): residual is {residual.dtype} of shape {tuple(residual.shape)}; it must be as input, {x.dtype} of "
                f"shape {tuple(x.shape)}"
            )
        checks.beside(op, "residual", residual, x)
    if activation is not None and (not isinstance(activation, str) or activation not in ACTIVATIONS):
        raise ValueError(
            f"{op}(): activation is {activation!r}; it must be None or one of {', '.join(map(repr, ACTIVATIONS))}"
        )
    return checks.epsilon(op, eps)
