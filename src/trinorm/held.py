"""A module's parameters and buffers, asked for where it keeps them; and whether anyone waits for its calls."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.modules.module as hooks


def parameter(module: Any, name: str | None) -> Any:
    """``module.<name>``, whatever that is; None of no name. A parameter takes .1 µs so, and .6 by the attribute, for which
    a module is asked when everything else has been.
    """
    if name is None:
        return None
    own = module._parameters
    return own[name] if name in own else getattr(module, name)


def buffer(module: Any, name: str) -> Any:
    """The same, of a buffer."""
    own = module._buffers
    return own[name] if name in own else getattr(module, name)


def is_replaced(module: torch.nn.Module) -> bool:
    """Whether a call of a module is not just its class's forward."""
    return "forward" in vars(module) or is_hooked(module)


def is_hooked(module: torch.nn.Module) -> bool:
    """As torch.nn.Module asks at each call."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
    )
