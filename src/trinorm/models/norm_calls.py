"""What a call of one of trinorm's norms computes, asked where it is to be made part of another launch."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from ..held import is_replaced, parameter
from ..nn.row import LayerNorm, RMSNorm
from ..spec import LAYER_NORM, RMS_NORM, RowNorm
from .forms import Form
from .recognize import Recognized, form_in_force

# What a call of a norm is, besides its input: normalized_shape, weight, bias, eps, batch_invariant.
Row = tuple[RowNorm, tuple[int, ...], Tensor | None, Tensor | None, float | None, bool | None]


def row_of(norm: Any, x: Tensor) -> Row | None:
    """A norm's call of a tensor like x; None where it is not just a LayerNorm or an RMSNorm of its last dims."""
    kind = type(norm)
    if kind is LayerNorm or kind is RMSNorm:
        if norm.save != "input" or is_replaced(norm):
            return None
        spec, bias = (RMS_NORM, None) if kind is RMSNorm else (LAYER_NORM, "bias")
        parameters = parameter(norm, "weight"), parameter(norm, bias)
        return spec.with_cast(norm.cast), norm.normalized_shape, *parameters, norm.eps, norm.batch_invariant
    form = form_in_force(norm) if isinstance(norm, Recognized) else None
    if type(form) is not Form or is_replaced(norm):
        return None
    weight, bias = parameter(norm, form.weight), parameter(norm, form.bias)
    return (form.norm, x.shape[-1:], weight, bias, form.eps, None) if form.serves((weight, bias), x) else None


def asked_of(norm: Any) -> tuple[Hashable, Tensor | None, Tensor | None] | None:
    """(what a norm computes, as a key by which its calls are recalled, weight, bias); None as row_of's, but for the input,
    which is asked when a call is met first.
    """
    kind = type(norm)
    if kind is LayerNorm or kind is RMSNorm:
        if norm.save != "input" or is_replaced(norm):
            return None
        manner = kind, norm.normalized_shape, norm.eps, norm.cast, norm.batch_invariant
        return manner, parameter(norm, "weight"), None if kind is RMSNorm else parameter(norm, "bias")
    form = form_in_force(norm)
    if type(form) is not Form or is_replaced(norm):
        return None
    return form, parameter(norm, form.weight), parameter(norm, form.bias)


def is_traced() -> bool:
    """torch.jit.trace traces again without gradients, and wants the same graph."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
