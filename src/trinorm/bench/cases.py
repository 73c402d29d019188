"""What is measured: one op, one pass, one shape and its dtypes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..spec import LAYER_NORM, RMS_NORM, RowNorm

PASSES = ("forward", "backward")

# The first is the seed's own. The others: where the memory is the limit, the narrow, the few rows of decoding, the wide.
SEED_SHAPE = (128, 768)
SHAPES = (SEED_SHAPE, (32768, 1024), (8192, 4096), (8192, 5120), (8192, 8192), (262144, 128), (16, 4096), (4096, 16384))

# What a plot needs besides: hidden sizes at one batch size, and batch sizes at one hidden size.
SWEEPS = (
    *((8192, n) for n in (256, 512, 1024, 2048, 16384)),
    *((m, 4096) for m in (1, 128, 1024, 4096, 32768)),
)


@dataclass(frozen=True)
class Op:
    """An op as it is measured: with its weight, with its bias where the signature has one, and its usual eps."""

    title: str
    spec: RowNorm
    bias: bool
    eps: float


OPS = {
    "layer_norm": Op("LayerNorm", LAYER_NORM, bias=True, eps=1e-5),
    "rms_norm": Op("RMSNorm", RMS_NORM, bias=False, eps=1e-6),
}


class Inputs(NamedTuple):
    """The arguments of one call, and the gradient that a backward starts from."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    dy: Tensor | None

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """(x, weight) or (x, weight, bias)."""
        return (self.x, self.weight) if self.bias is None else (self.x, self.weight, self.bias)


@dataclass(frozen=True)
class Case:
    """``m`` rows of ``n`` elements, contiguous, through one pass of one op. A backward makes every gradient."""

    op: str
    pass_: str
    m: int
    n: int
    dtype: torch.dtype
    weight_dtype: torch.dtype

    @property
    def backward(self) -> bool:
        return self.pass_ == "backward"

    @property
    def bytes(self) -> int:
        """The fewest bytes the pass can move: each input read once, each output written once.

        forward: x, weight, bias; y. backward: x, dy, weight; dx, dw, db. The saved statistics are not counted: they
        follow from x.
        """
        rows, parameters = (3, 2 + OPS[self.op].bias) if self.backward else (2, 1 + OPS[self.op].bias)
        return self.n * (rows * self.m * self.dtype.itemsize + parameters * self.weight_dtype.itemsize)

    def draw(self, device: torch.device, generator: torch.Generator | None = None) -> Inputs:
        """Random inputs; for a backward they require grad and come with dy."""

        def normal(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.randn(shape, dtype=dtype, device=device, generator=generator)

        inputs = Inputs(
            x=normal(self.m, self.n, dtype=self.dtype),
            weight=1 + normal(self.n, dtype=self.weight_dtype) / 8,
            bias=normal(self.n, dtype=self.weight_dtype) if OPS[self.op].bias else None,
            dy=normal(self.m, self.n, dtype=self.dtype) if self.backward else None,
        )
        for argument in inputs.arguments:
            argument.requires_grad_(self.backward)
        return inputs
