"""A conditioned norm of a gated sum of tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .conditioned import Conditioned


class GatedSum(NamedTuple):
    """The norm of residual + gate·x, which has no gate of its own; and the dtypes of the residual and of the sum."""

    norm: Conditioned
    residual: torch.dtype
    sum: torch.dtype


def problem_of(norm: Conditioned, x: Tensor, residual: Tensor) -> GatedSum:
    return GatedSum(norm, residual.dtype, torch.promote_types(x.dtype, residual.dtype))
