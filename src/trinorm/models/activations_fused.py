"""What a rewritten forward calls for a channel norm and the activation behind it: one call, or the two that stood there."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .. import nn
from ..channel_calls import activation_of, of_batches, of_groups, of_instances
from ..spec import Activation
from .activations_source import ACTIVATED, AHEAD, RESIDUAL, WAITING
from .norm_calls import is_replaced

_BATCHES = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
_INSTANCES = nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d

# The norms, with the function that computes them.
CHANNEL_NORMS: dict[type, str] = {nn.GroupNorm: "group_norm"}
CHANNEL_NORMS.update(dict.fromkeys(_BATCHES, "batch_norm"))
CHANNEL_NORMS.update(dict.fromkeys(_INSTANCES, "instance_norm"))

# Whose result is new, and nobody else's.
CONVOLUTIONS = tuple(getattr(torch.nn, f"Conv{what}{dims}d") for what in ("", "Transpose") for dims in (1, 2, 3))


def activated(activation: Any, norm: Any, x: Any, **how: Any) -> Any:
    """activation(norm(x), **how)."""
    served = _served(activation, norm, x)
    return activation(norm(x), **how) if served is None else _with(norm, x, served)


def ahead(activation: Any, norm: Any, x: Any, *between: Any) -> tuple[Any, bool]:
    """(norm(x), whether the activation of that is in it already). between: what else would be called before that."""
    served = _served(activation, norm, x)
    if served is None or not all(type(other) is torch.nn.Identity and not is_replaced(other) for other in between):
        return norm(x), False
    return _with(norm, x, served), True


def waiting(activation: Any, norm: Any, convolution: Any, x: Any, *absent: Any) -> tuple[Any, list[Any]]:
    """(norm(x), nothing); or x, and the norm that ``residual`` will see to. absent: what has to be None for that."""
    known = type(norm) in _BATCHES and type(convolution) in CONVOLUTIONS and not is_replaced(convolution)
    known = known and all(other is None for other in absent)
    return (x, [norm]) if known and _served(activation, norm, x) is not None else (norm(x), [])


def residual(kept: list[Any], activation: Any, how: str, place: int, *sides: Any) -> tuple[Any, bool]:
    """(the sum of both sides, whether the activation of that is in it already). place: which of them the norm is of."""
    if kept:
        norm, x, other = kept.pop(), sides[place], sides[1 - place]
        alike = type(other) is Tensor and (other.shape, other.dtype, other.device) == (x.shape, x.dtype, x.device)
        served = _served(activation, norm, x)
        # Else the sum's order of memory may be another.
        if served is not None and alike and other.stride() == x.stride():
            return of_batches(norm, x, served, other), True
        y = norm(x)
        sides = (y, other) if place == 0 else (other, y)
    return (operator.iadd if how == "+=" else operator.add)(*sides), False


def in_sequence(self: Any, input: Any) -> Any:
    """torch.nn.Sequential's forward."""
    done = False
    for module, behind in itertools.pairwise((*self._modules.values(), None)):
        input, done = (input, False) if done else ahead(behind, module, input)
    return input


def pairs_in(sequence: torch.nn.Module) -> dict[str, list[str]]:
    """By the name of a norm in a Sequential the activation behind it."""
    return {
        name: [f"{following}: {behind}"]
        for (name, norm), (following, behind) in itertools.pairwise(sequence._modules.items())
        if norm is not None and not why_no_activation(norm) and activation_of(behind) is not None
    }


def why_no_activation(norm: torch.nn.Module) -> str:
    """Why no activation may be taken into a channel norm; "" where one may."""
    if type(norm) not in CHANNEL_NORMS:
        return "it is no channel norm of trinorm's"
    if norm.activation is not None:
        return "it has an activation of its own"
    return "its forward was replaced, or it has hooks, which would not be called" if is_replaced(norm) else ""


def _served(activation: Any, norm: Any, x: Any) -> Activation | None:
    """The activation that the norm's own call is to have; None where the two are called as they were."""
    kind = type(norm)
    if kind not in CHANNEL_NORMS or type(x) is not Tensor or norm.activation is not None or is_replaced(norm):
        return None
    if has_torch_function_variadic(x) or (isinstance(activation, torch.nn.Module) and is_replaced(activation)):
        return None
    if kind in _INSTANCES and (x.dim() != norm._get_no_batch_dim() + 1 or x.shape[1] != norm.num_features):
        return None  # what torch's forward makes of that
    return activation_of(activation)


def _with(norm: Any, x: Tensor, activation: Activation) -> Tensor:
    kind = type(norm)
    if kind in _BATCHES:
        return of_batches(norm, x, activation)
    return (of_instances if kind in _INSTANCES else of_groups)(norm, x, activation, norm.batch_invariant)


HELPERS: dict[str, Callable[..., Any]] = {ACTIVATED: activated, AHEAD: ahead, WAITING: waiting, RESIDUAL: residual}
