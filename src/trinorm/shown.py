"""What a module's repr says of its attributes."""

from __future__ import annotations

import torch

_NAMES = (
    "save",
    "alpha",
    "dropout_p",
    "interleaved",
    "norm_before_gate",
    "scale_layout",
    "cast",
    "batch_invariant",
    "activation",
)


def shown(module: torch.nn.Module) -> str:
    """What is not torch's, where it is not the default."""
    of_class = {name: getattr(type(module), name) for name in _NAMES if hasattr(type(module), name)}
    return "".join(
        f", {name}={getattr(module, name)!r}" for name, usual in of_class.items() if getattr(module, name) != usual
    )
