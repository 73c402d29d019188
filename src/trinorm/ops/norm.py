"""A row norm by the road that serves it: the kernels, the registered op, or torch's own operator."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from .. import reference
from ..spec import RowNorm
from . import library, road
from .row import prepared


def row_norm(
    spec: RowNorm,
    x: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    asked: tuple[Sequence[int], float | None, Hashable],
    save: str,
    batch_invariant: bool,
) -> Tensor:
    """The norm of checked arguments. asked: as row.prepared's. save, batch_invariant: as functional's."""
    # Inductor leaves out a rounding that is widened again, as the composite's is.
    if road.takes_op(spec.name, x, weight, bias, whole=spec.rounded or batch_invariant):
        return library.norm(spec, x, normalized_shape, weight, bias, eps, batch_invariant)
    if not road.kernels_serve(spec.name, x, weight, bias):
        return reference.composite(spec, x, normalized_shape, weight, bias, eps)
    autocast = torch._C._is_any_autocast_enabled() and x.dtype != torch.float64
    call, inputs = prepared(
        spec,
        len(normalized_shape),
        (x, weight, bias),
        eps,
        asked,
        save=save,
        batch_invariant=batch_invariant,
        cast=autocast and reference.autocast_to_fp32(spec, x.device.type),
        differentiated=road.is_differentiated(x, weight, bias),
    )
    return call.norm(*inputs)
