"""What the functions ask of their arguments alike, in torch's own classes of error and with the argument named."""

from __future__ import annotations

import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from .ops.road import KERNEL_DTYPES
from .spec import CASTS, RowNorm
from .switches import options


def tensor(op: str, name: str, t: Tensor, required: bool = False) -> None:
    """TypeError where it is none."""
    if not isinstance(t, Tensor):
        or_none = "" if required or name in ("input", "residual", "query", "key") else " or None"
        raise TypeError(f"{op}(): {name} must be a Tensor{or_none}, not {type(t).__name__}")


def strided(op: str, name: str, t: Tensor) -> None:
    """NotImplementedError where its elements are not in memory one by one: sparse, or of another library's layout."""
    if t.layout not in (torch.strided, torch.jagged):
        raise NotImplementedError(f"{op}(): {name} has layout {t.layout}; it must be torch.strided: {name}.to_dense()")


def beside(op: str, name: str, t: Tensor, x: Tensor, of: str = "input") -> None:
    """RuntimeError where a parameter is on another device than the input, whose name is ``of``; its dtype, as ``dtype``."""
    if t.device != x.device:
        raise RuntimeError(f"{op}(): {name} is on {t.device}, but {of} is on {x.device}; move one to the other's device")
    dtype(op, name, t)


def dtype(op: str, name: str, t: Tensor) -> None:
    """NotImplementedError where no kernel serves it."""
    if t.dtype not in KERNEL_DTYPES:
        raise NotImplementedError(
            f"{op}(): {name} has dtype {t.dtype}; it must be one of float16, bfloat16, float32, float64"
        )


def flag(op: str, name: str, value: bool) -> None:
    """TypeError where it is neither True nor False."""
    if not isinstance(value, (bool, torch.SymBool)):
        raise TypeError(f"{op}(): {name} must be a bool, not {value!r}")


def sizes(op: str, normalized_shape: Sequence[int]) -> torch.Size:
    """normalized_shape as a Size; TypeError where it is no tuple or list of ints."""
    try:
        if not isinstance(normalized_shape, (tuple, list)) or any(type(size) is bool for size in normalized_shape):
            raise TypeError
        return torch.Size(normalized_shape)
    except TypeError:
        hint = (
            f"; for one dim write ({normalized_shape},)"
            if isinstance(normalized_shape, int) and normalized_shape >= 0
            else ""
        )
        raise TypeError(
            f"{op}(): normalized_shape must be a tuple or a list of ints, not {normalized_shape!r}{hint}"
        ) from None


def epsilon(op: str, eps: float) -> float:
    """eps as a float; ValueError where it is negative or NaN, TypeError where it is no number, or one with a gradient."""
    if type(eps) is float:
        number = True
    elif isinstance(eps, Tensor):
        number = eps.dim() == 0 and not eps.requires_grad
    elif isinstance(eps, numbers.Rational):  # a fraction is no number to torch
        number = isinstance(eps, numbers.Integral)
    else:
        number = isinstance(eps, (numbers.Real, torch.SymFloat, torch.SymInt))
    try:
        usable = number and bool(eps >= 0)  # which NaN is not
    except (TypeError, ValueError, RuntimeError):
        number = False
    if not number:
        raise TypeError(f"{op}(): eps must be a float, not {eps!r}")
    if not usable:
        raise ValueError(f"{op}(): eps is {eps}; it must be a number >= 0")
    return float(eps)


def own_epsilon(norm: RowNorm, x: Tensor, eps: float | None) -> float:
    """eps, or, None, RMSNorm's own, as functional.rms_norm has it."""
    if eps is not None or norm.center:
        return eps  # type: ignore[return-value]
    # torch's documentation says finfo(x.dtype).eps; its code, CPU and CUDA, uses the dtype it computes in (2.11, 2.13).
    double = isinstance(x, Tensor) and x.dtype == torch.float64
    return 2.220446049250313e-16 if double else 1.1920928955078125e-07


def casting(op: str, cast: str) -> None:
    """ValueError where it is none of CASTS."""
    if not isinstance(cast, str) or cast not in CASTS:
        raise ValueError(f"{op}(): cast is {cast!r}; it must be one of {', '.join(map(repr, CASTS))}")


def invariance(op: str, batch_invariant: bool | None) -> bool:
    """What the argument says, or, None, the option of its name; TypeError where it is neither."""
    if batch_invariant is None:
        return options.batch_invariant
    if not isinstance(batch_invariant, bool):
        raise TypeError(f"{op}(): batch_invariant must be True, False or None, not {batch_invariant!r}")
    return batch_invariant


def rows(
    op: str,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    cast: str,
    batch_invariant: bool | None,
    save: str = "input",
) -> tuple[torch.Size, float, bool]:
    """Of a norm of rows: normalized_shape as a Size, eps as a float and batch_invariant as a bool, or torch's own class
    of error, with the argument named.
    """
    tensor(op, "input", x)
    strided(op, "input", x)
    if x.is_nested:
        raise RuntimeError(
            f"{op}(): input is a nested tensor of layout {x.layout}; of these only torch.jagged is taken, by layer_norm, "
            "rms_norm and both with a linear layer"
        )
    parameters = [(name, t) for name, t in (("weight", weight), ("bias", bias)) if t is not None]
    for name, parameter in parameters:
        tensor(op, name, parameter)
        if parameter.is_nested and parameter.layout == torch.strided:  # which has no shape to be told
            raise RuntimeError(f"{op}(): {name} is a nested tensor; it must have the shape {normalized_shape}")
    shape = sizes(op, normalized_shape)
    eps = epsilon(op, eps)
    if not shape:
        raise RuntimeError(f"{op}(): normalized_shape is empty; it must name at least one dim")
    for name, parameter in parameters:
        strided(op, name, parameter)
        if parameter.shape != shape:
            raise RuntimeError(
                f"{op}(): {name} has shape {tuple(parameter.shape)}, but normalized_shape is {tuple(shape)}; "
                "they must be equal"
            )
    dims = len(shape)
    if x.shape[-dims:] != shape:
        refused = ValueError if op in ("rms_norm", "rms_norm_linear") and dims > x.dim() else RuntimeError  # as torch's
        raise refused(
            f"{op}(): normalized_shape is {tuple(shape)}, but input has shape {tuple(x.shape)}; "
            f"the input's last {dims} dim(s) must be equal to it"
        )
    for name, parameter in parameters:
        beside(op, name, parameter, x)
    dtype(op, "input", x)
    if not isinstance(save, str) or save not in ("input", "output"):
        raise ValueError(f"{op}(): save is {save!r}; it must be 'input' or 'output'")
    casting(op, cast)
    if save == "output" and cast == "llama":
        raise ValueError(
            f"{op}(): save is 'output' and cast is 'llama', whose output is rounded twice, which cannot be undone; "
            "one of the two must be another"
        )
    return shape, eps, invariance(op, batch_invariant)
