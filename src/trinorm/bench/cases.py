"""What is measured: one op, one pass, one shape and its dtypes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..spec import LAYER_NORM, RMS_NORM, RowNorm

# The passes of one norm. A chain is a forward many times over, each norm's y the next one's x: what decoding does.
PASSES = ("forward", "backward")
CHAIN = "chain"
LINKS = 32
# What torch moves the same bytes with, and next to no arithmetic.
CEILINGS = {"forward": "copy", "backward": "add", CHAIN: "copy"}
# What an eager call costs the host. The kernels' size does not enter, so these are measured at the seed's shape.
HOST = "host"
HOST_PASSES = ("host_forward", "host_forward_with_grad", "host_forward_and_backward")

# From this many elements on the memory decides; below it the launches do, and only there a chain says something new.
SMALL_BELOW = 1 << 22

# The first is the seed's own. The others: where the memory is the limit, the narrow, the few rows of decoding, the wide.
SEED_SHAPE = (128, 768)
SHAPES = (SEED_SHAPE, (32768, 1024), (8192, 4096), (8192, 5120), (8192, 8192), (262144, 128), (16, 4096), (4096, 16384))

# What a plot needs besides: hidden sizes at one batch size, and batch sizes at one hidden size.
SWEEPS = (
    *((8192, n) for n in (256, 512, 1024, 2048, 16384)),
    *((m, 4096) for m in (1, 128, 1024, 4096, 32768)),
)

# Shapes by name, for --shapes: every width from 64 to 262144 and the row counts of decoding, and four of them for the
# dtypes that need no more.
NAMED_SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "matrix": (
        SEED_SHAPE,
        *((m, 4096) for m in (1, 16, 64, 256)),
        (64, 8192),
        (2048, 4096),
        (262144, 64),
        (262144, 128),
        (364800, 128),  # a shape that users of other libraries report
        (131072, 256),
        (32768, 1024),
        (16384, 768),
        (16384, 2048),
        *((8192, n) for n in (3072, 4096, 5120, 7168, 8192)),
        (4096, 12288),
        (4096, 16384),
        (2048, 32768),
        (1024, 65536),
        (512, 131072),
        (256, 262144),
    ),
    "quartet": (SEED_SHAPE, (32768, 1024), (8192, 4096), (4096, 16384)),
}


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
    """The arguments of one call, and the gradient that a backward starts from. A chain's have a row of weights a link."""

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
    """``m`` rows of ``n`` elements, contiguous, through one pass of one op, or through a chain of forwards.

    A backward makes every gradient.
    """

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
    def norms(self) -> int:
        """How many norms one call computes, one after the other. Times and bytes are those of one."""
        return LINKS if self.pass_ == CHAIN else 1

    @property
    def worthwhile(self) -> bool:
        """Whether its time says something: a chain of large norms takes what they take alone."""
        return self.pass_ != CHAIN or self.m * self.n < SMALL_BELOW

    @property
    def bytes(self) -> int:
        """The fewest bytes the pass can move: each input read once, each output written once.

        forward, and each link of a chain: x, weight, bias; y. backward: x, dy, weight; dx, dw, db. The saved statistics are
        not counted: they follow from x.
        """
        return self.bytes_read + self.bytes_written

    @property
    def bytes_read(self) -> int:
        """Those of ``bytes`` that are read."""
        rows, parameters = (2, 1) if self.backward else (1, 1 + OPS[self.op].bias)
        return self._bytes(rows, parameters)

    @property
    def bytes_written(self) -> int:
        """Those of ``bytes`` that are written."""
        return self._bytes(1, 1 + OPS[self.op].bias if self.backward else 0)

    def _bytes(self, rows: int, parameters: int) -> int:
        return self.n * (rows * self.m * self.dtype.itemsize + parameters * self.weight_dtype.itemsize)

    def draw(self, device: torch.device, generator: torch.Generator | None = None) -> Inputs:
        """Random inputs; for a backward they require grad and come with dy."""

        def normal(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.randn(shape, dtype=dtype, device=device, generator=generator)

        parameter = (self.norms, self.n) if self.pass_ == CHAIN else (self.n,)
        inputs = Inputs(
            x=normal(self.m, self.n, dtype=self.dtype),
            weight=1 + normal(*parameter, dtype=self.weight_dtype) / 8,
            bias=normal(*parameter, dtype=self.weight_dtype) if OPS[self.op].bias else None,
            dy=normal(self.m, self.n, dtype=self.dtype) if self.backward else None,
        )
        for argument in inputs.arguments:
            argument.requires_grad_(self.backward)
        return inputs
