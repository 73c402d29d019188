"""Calls seen before. What a call's checks, layout, plan and launches came to is kept, and done again for its like."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from . import road

V = TypeVar("V")


class Seen(dict[Hashable, V]):
    """A dict of at most ``limit`` entries. It starts anew when it is full: sizes that still come are soon back."""

    def __init__(self, limit: int) -> None:
        self._limit = limit

    def remember(self, key: Hashable, value: V) -> None:
        """Keep the value, unless the key is None."""
        if key is None:
            return
        if len(self) >= self._limit:
            self.clear()
        self[key] = value


def call_key(
    op: str,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
) -> Hashable:
    """Everything of a call that its checks and launches depend on but the tensors' addresses; None where that is more.

    Where an observer is active, or an argument is of an unusual type, the call has to be looked at each time.
    """
    if (
        road.observer() is not None
        or type(x) not in road.PLAIN
        or type(weight) not in road.PLAIN_OR_NONE
        or type(bias) not in road.PLAIN_OR_NONE
        or type(eps) not in _EPS
    ):
        return None
    try:
        shape = torch.Size(normalized_shape)
    except TypeError:
        return None
    device = x.device
    return (
        op,
        x.dtype,
        x.shape,
        x.is_contiguous() or x.stride(),
        device,
        shape,
        eps,
        weight is not None and (weight.dtype, weight.shape, weight.is_contiguous(), weight.device),
        bias is not None and (bias.dtype, bias.shape, bias.is_contiguous(), bias.device),
        _autocast_is_on() and torch.is_autocast_enabled(device.type),
        _grad_is_on()
        and (x.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)),
    )


# Not bool, and no tensor: equal numbers of these types are the same eps.
_EPS = (float, type(None), int)

_autocast_is_on = torch._C._is_any_autocast_enabled
_grad_is_on = torch.is_grad_enabled
