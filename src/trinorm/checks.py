"""What the functions ask of their arguments alike, in torch's own classes of error and with the argument named."""

from __future__ import annotations

import torch
from torch import Tensor

from .ops.road import KERNEL_DTYPES


def tensor(op: str, name: str, t: Tensor) -> None:
    """TypeError where it is none."""
    if not isinstance(t, Tensor):
        or_none = "" if name == "input" else " or None"
        raise TypeError(f"{op}(): {name} must be a Tensor{or_none}, not {type(t).__name__}")


def strided(op: str, name: str, t: Tensor) -> None:
    """NotImplementedError where its elements are not in memory one by one: sparse, or of another library's layout."""
    if t.layout not in (torch.strided, torch.jagged):
        raise NotImplementedError(f"{op}(): {name} has layout {t.layout}; it must be torch.strided: {name}.to_dense()")


def beside(op: str, name: str, t: Tensor, x: Tensor) -> None:
    """RuntimeError where a parameter is on another device than the input; its dtype, as ``dtype``."""
    if t.device != x.device:
        raise RuntimeError(f"{op}(): {name} is on {t.device}, but input is on {x.device}; move one to the other's device")
    dtype(op, name, t)


def dtype(op: str, name: str, t: Tensor) -> None:
    """NotImplementedError where no kernel serves it."""
    if t.dtype not in KERNEL_DTYPES:
        raise NotImplementedError(
            f"{op}(): {name} has dtype {t.dtype}; it must be one of float16, bfloat16, float32, float64"
        )


def epsilon(op: str, eps: float) -> float:
    """eps as a float; ValueError where it is negative or NaN, TypeError where it is no number."""
    try:
        usable = bool(eps >= 0)  # which NaN is not
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{op}(): eps must be a float, not {eps!r}") from None
    if not usable:
        raise ValueError(f"{op}(): eps is {eps}; it must be a number >= 0")
    return float(eps)
