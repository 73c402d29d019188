"""An autograd node in Python for the least that one costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without the Python part that torch has in front of it, and in front of its node's backward.

    The first looks for torch.func, of which a call that comes here has no transform active, and costs 1.3 of 3.8 µs; the
    second looks which of two methods the class defines, and costs .7 of a backward's 7.5 (no GPU, the driver a stub).
    """
    node: Any = function._backward_cls
    node.apply = function.backward
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]
