"""A module's parameters and buffers, asked for where it keeps them."""

from __future__ import annotations

from typing import Any


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
