"""What a channel norm's module computes, with an activation behind it: of any module that has torch's attributes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import functional
from .held import buffer, parameter
from .spec import Activation


def of_groups(module: Any, x: Tensor, activation: Activation | None, batch_invariant: bool | None = None) -> Tensor:
    """GroupNorm's."""
    of = x, module.num_groups, parameter(module, "weight"), parameter(module, "bias"), module.eps
    return functional.group_norm(*of, activation=activation, batch_invariant=batch_invariant)


def of_instances(module: Any, x: Tensor, activation: Activation | None, batch_invariant: bool | None = None) -> Tensor:
    """InstanceNorm's, of samples."""
    of_input = module.training or not module.track_running_stats
    momentum = 0.0 if module.momentum is None else module.momentum
    return functional.instance_norm(
        x,
        buffer(module, "running_mean"),
        buffer(module, "running_var"),
        parameter(module, "weight"),
        parameter(module, "bias"),
        of_input,
        momentum,
        module.eps,
        activation=activation,
        batch_invariant=batch_invariant,
    )


class _OfThisCall(float):
    """A momentum that no other call will have. Calls are recalled by floats, and by nothing else."""


def of_batches(module: Any, x: Tensor, activation: Activation | None, residual: Tensor | None = None) -> Tensor:
    """BatchNorm's, which counts its batches."""
    module._check_input_dim(x)
    kept_up = module.training and module.track_running_stats
    momentum = 0.0 if module.momentum is None else module.momentum
    if kept_up and (batches := buffer(module, "num_batches_tracked")) is not None:
        batches.add_(1)
        if module.momentum is None:  # the mean of all batches so far
            momentum = _OfThisCall(1.0 / float(batches))
    mean, var = buffer(module, "running_mean"), buffer(module, "running_var")
    of_input = bool(module.training) or (mean is None and var is None)
    if of_input and not kept_up:
        mean = var = None
    return functional.batch_norm(
        x,
        mean,
        var,
        parameter(module, "weight"),
        parameter(module, "bias"),
        of_input,
        momentum,
        module.eps,
        activation=activation,
        residual=residual,
    )


# The modules and the functions that compute an activation which the norms have.
_MODULES: dict[type[torch.nn.Module], Activation] = {torch.nn.ReLU: "relu", torch.nn.SiLU: "silu", torch.nn.GELU: "gelu"}
_FUNCTIONS: dict[Callable[..., Any], Activation] = {F.relu: "relu", F.silu: "silu", F.gelu: "gelu"}
_FUNCTIONS |= {torch.relu: "relu", torch.relu_: "relu"}  # which F.relu_ is, too
_FORWARDS = {kind: kind.forward for kind in _MODULES}
_CALLABLE = type(F.relu), type(torch.relu)


def activation_of(of: Any) -> Activation | None:
    """The activation that a module or a function computes; None of any other. In place or not: a norm's result is new."""
    kind = type(of)
    if kind in _CALLABLE:
        return _FUNCTIONS.get(of)
    if kind not in _MODULES or kind.forward is not _FORWARDS[kind] or (kind is torch.nn.GELU and of.approximate != "none"):
        return None
    return _MODULES[kind]
