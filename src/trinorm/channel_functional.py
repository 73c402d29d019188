"""The channel norms as functions, with torch.nn.functional's own signatures and defaults (functional re-exports them)."""

from __future__ import annotations

import math
import operator
from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import channel_reference as reference
from . import checks
from .channel_reference import Averages, Given
from .ops.channel import channel_norm
from .spec import BATCH_NORM, GROUP_NORM, INSTANCE_NORM


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    r"""Group normalization: of each sample, over the channels of a group and all positions.

    .. math::
        y = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \cdot w + b

    with the biased variance, and w and b of the channel. The signature, defaults and meaning are
    :func:`torch.nn.functional.group_norm`'s.

    Args:
        input: ``(N, C, *)``; float16, bfloat16, float32 or float64. Contiguous and channels-last memory are read as they
            are, any other is copied once.
        num_groups: how many groups of neighbouring channels; a divisor of C.
        weight: ``(C,)``, any of the dtypes above, not necessarily the input's; None is 1.
        bias: as weight; None is 0.
        eps: added to the variance, so in the input's units squared; >= 0.

    Returns:
        A tensor of the input's shape, dtype and memory order (fp32 where autocast makes torch's own op return that).
        Statistics and sums are fp32, fp64 as soon as one of the tensors is.

    Raises:
        RuntimeError: C is not a multiple of ``num_groups``, the input has fewer than 2 dims, weight or bias does not fit.
        ValueError: the only sample's groups are single elements, or eps is negative or NaN.
        NotImplementedError: a dtype other than the four.
        TypeError: an argument of the wrong kind.

    Source: Wu, He, "Group Normalization", arXiv:1803.08494.
    """
    if has_torch_function_variadic(*(all_tensors := (input, weight, bias))):
        return handle_torch_function(group_norm, all_tensors, input, num_groups, weight=weight, bias=bias, eps=eps)
    try:
        num_groups = operator.index(num_groups)
    except TypeError:
        raise TypeError(f"group_norm(): num_groups must be an int, not {num_groups!r}") from None
    eps = _check("group_norm", input, eps, weight=weight, bias=bias)
    channels = input.shape[1]
    if num_groups <= 0 or channels % num_groups:
        raise RuntimeError(
            f"group_norm(): num_groups is {num_groups}, but input has {channels} channels; it must be a divisor of those"
        )
    if input.shape[0] * (channels // num_groups) * math.prod(input.shape[2:]) == 1:
        raise ValueError(
            f"group_norm(): expected more than 1 value per group when training, got input size {tuple(input.shape)}"
        )
    y = channel_norm(GROUP_NORM, input, num_groups, weight, bias, eps)
    return reference.composite(GROUP_NORM, input, num_groups, weight, bias, eps) if y is None else y


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
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

    Returns:
        As :func:`group_norm`; autocast leaves it alone.

    Raises:
        RuntimeError, NotImplementedError, TypeError: as :func:`group_norm`; RuntimeError too where running statistics are
            needed and missing, or require a gradient.
        ValueError: one position for each channel, with ``use_input_stats``; eps is negative or NaN.

    Source: Ulyanov, Vedaldi, Lempitsky, "Instance Normalization", arXiv:1607.08022.
    """
    if has_torch_function_variadic(*(all_tensors := (input, running_mean, running_var, weight, bias))):
        arguments: dict[str, Any] = dict(running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
        arguments |= dict(use_input_stats=use_input_stats, momentum=momentum, eps=eps)
        return handle_torch_function(instance_norm, all_tensors, input, **arguments)
    op = "instance_norm"
    tensors = dict(running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    eps = _check(op, input, eps, **tensors)
    if use_input_stats and math.prod(input.shape[2:]) == 1:
        raise ValueError(f"{op}(): expected more than 1 spatial element when training, got input size {tuple(input.shape)}")
    given, averages = _statistics(op, running_mean, running_var, use_input_stats, momentum)
    y = channel_norm(INSTANCE_NORM, input, input.shape[1], weight, bias, eps, given, averages)
    if y is None:
        y = reference.composite(INSTANCE_NORM, input, input.shape[1], weight, bias, eps, given, averages)
    return y


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    r"""Batch normalization: of each channel, over all samples and positions.

    The formula is :func:`group_norm`'s with a channel's statistics. The signature, defaults and meaning are
    :func:`torch.nn.functional.batch_norm`'s.

    Args:
        input: ``(N, C, *)``, as :func:`group_norm`.
        running_mean, running_var: ``(C,)``. In training they are kept up, in place: ``running * (1 - momentum) + value *
            momentum``, of the unbiased variance. Else they are used.
        weight, bias, eps: as :func:`group_norm`.
        training: take statistics of the input; else the running ones, which are then needed.
        momentum: the share of this input in the running statistics.

    Returns:
        As :func:`group_norm`; autocast leaves it alone.

    Raises:
        RuntimeError, NotImplementedError, TypeError: as :func:`group_norm`; RuntimeError too where running statistics are
            needed and missing, or require a gradient.
        ValueError: one value for each channel, in training; eps is negative or NaN.

    Source: Ioffe, Szegedy, "Batch Normalization", arXiv:1502.03167.
    """
    if has_torch_function_variadic(*(all_tensors := (input, running_mean, running_var, weight, bias))):
        rest: dict[str, Any] = dict(weight=weight, bias=bias, training=training, momentum=momentum, eps=eps)
        return handle_torch_function(batch_norm, all_tensors, input, running_mean, running_var, **rest)
    op = "batch_norm"
    eps = _check(op, input, eps, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    if training and input.shape[0] * math.prod(input.shape[2:]) == 1:
        raise ValueError(
            f"{op}(): expected more than 1 value per channel when training, got input size {tuple(input.shape)}"
        )
    given, averages = _statistics(op, running_mean, running_var, training, momentum)
    y = channel_norm(BATCH_NORM, input, input.shape[1], weight, bias, eps, given, averages)
    if y is None:
        y = reference.composite(BATCH_NORM, input, input.shape[1], weight, bias, eps, given, averages)
    return y


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
        if t is not None and t.requires_grad:
            raise RuntimeError(f"{op}(): {name} requires a gradient, which this norm does not give it; detach it")
    if mean is None or var is None:
        return None, None
    if not taken:
        return Given(mean, var), None
    try:
        return None, Averages(mean, var, float(momentum))
    except (TypeError, ValueError):
        raise TypeError(f"{op}(): momentum must be a float, not {momentum!r}") from None


def _check(op: str, x: Tensor, eps: float, **parameters: Tensor | None) -> float:
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
    return checks.epsilon(op, eps)
