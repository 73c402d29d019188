"""The inputs that ``trinorm check`` and the tests share: kinds of values, weights and shapes, all of it data.

Every draw is seeded: a case gives the same numbers on every run and every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}

EPS = 1e-5


@dataclass(frozen=True)
class Values:
    """One kind of rows.

    draw: from standard normal values (float64, but of float32's precision, so that an oracle in float64 has digits to
    spare) and the finfo of the dtype they will have. exponents: row i is then multiplied by the power of two
    ``2**exponents[i % len(exponents)]``. Rows of unequal exponents need an eps of 0: see Inputs.unscaled.
    """

    name: str
    draw: Callable[[Tensor, torch.finfo], Tensor]
    exponents: tuple[int, ...] = (0,)
    eps: float = EPS
    zero_weight: bool = False

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether the dtype can hold the exponents."""
        return self._largest_exponent < math.log2(torch.finfo(dtype).max) - 4

    @property
    def extreme(self) -> bool:
        """Whether the squares leave float32's range, so that torch's own operators overflow or underflow."""
        return self._largest_exponent > 60

    @property
    def _largest_exponent(self) -> int:
        return max(map(abs, self.exponents))


def _as_drawn(z: Tensor, info: torch.finfo) -> Tensor:
    return z


def _with_one(special: float) -> Callable[[Tensor, torch.finfo], Tensor]:
    """Normal rows but for one element, in the middle of the middle row."""

    def draw(z: Tensor, info: torch.finfo) -> Tensor:
        z[z.shape[0] // 2, z.shape[1] // 2] = special
        return z

    return draw


NORMAL = Values("normal", _as_drawn)

NASTY = (
    Values("mean 1e4, std 1e-2", lambda z, info: 1e4 + 1e-2 * z),
    Values("rows of one value", lambda z, info: z[:, :1].expand_as(z)),
    Values("zeros", lambda z, info: torch.zeros_like(z)),
    Values("denormals", lambda z, info: z.clamp(-4, 4) * (info.tiny / 8)),
    Values("zero weight", _as_drawn, zero_weight=True),
    Values("one NaN", _with_one(math.nan)),
    Values("one Inf", _with_one(math.inf)),
    Values("small and large rows", _as_drawn, exponents=(6, 0, -6), eps=0.0),
    # Squares of these leave float32's range: 2^100 is 1.3e30.
    Values("1e30", _as_drawn, exponents=(100,)),
    Values("1e-30", _as_drawn, exponents=(-100,), eps=0.0),
    Values("1e30, 1 and 1e-30 by rows", _as_drawn, exponents=(100, 0, -100), eps=0.0),
)


class Inputs(NamedTuple):
    """The arguments of one call and of its backward. scale: ``(rows, 1)`` float64, the power of two in each row of x."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    dy: Tensor
    eps: float
    scale: Tensor

    def unscaled(self) -> tuple[Tensor, float]:
        """x without its powers of two (exactly: cases see to that), and the eps that makes it the same problem.

        Norms are scale invariant but for eps. With ``s`` a row's scale, x and eps give y, dw and db of ``x / s`` and
        ``eps / s**2``, ``s`` times its mean and ``1 / s`` times its rstd and dx: no digit changes. On the unscaled
        problem torch's own result is an answer, and so a yardstick, even where x squared overflows in torch.
        """
        x = (self.x.detach() / self.scale).to(self.x.dtype)
        return x, self.eps / self.scale[0].item() ** 2


@dataclass(frozen=True)
class Case:
    """``rows`` rows of ``columns`` elements. weight: a key of WEIGHTS, for the weight and for the bias of ops with one."""

    rows: int
    columns: int
    values: Values = NORMAL
    weight: str = "same"

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns} {self.values.name}"

    def inputs(self, dtype: torch.dtype, device: torch.device, *, bias: bool, seed: int = 0) -> Inputs:
        """The case's tensors, x and dy of ``dtype``. Each seed is another draw of them."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, torch.float64)

        exponents = torch.tensor(self.values.exponents, dtype=torch.float64, device=device)
        scale = exponents.exp2()[torch.arange(self.rows, device=device) % len(exponents), None]
        # Rounded before it is scaled up, and scaled down before it is read: either way its powers of two come out exactly.
        x = self.values.draw(normal(self.rows, self.columns), torch.finfo(dtype)).to(dtype) * scale
        dy, w, b = normal(self.rows, self.columns), normal(self.columns), normal(self.columns)
        if self.values.zero_weight:
            w.zero_()
        of = weight_dtype(self.weight, dtype)
        return Inputs(
            x=x.to(dtype),
            weight=None if of is None else w.to(of),
            bias=None if of is None or not bias else b.to(of),
            dy=dy.to(dtype),
            eps=self.values.eps,
            scale=scale,
        )


def weight_dtype(weight: str, dtype: torch.dtype) -> torch.dtype | None:
    """The dtype of a Case's weight over x of ``dtype``; None when it has none."""
    return {"same": dtype, "float32": torch.float32, "absent": None}[weight]


def weights(dtype: torch.dtype) -> tuple[str, ...]:
    """The kinds of weight that x of ``dtype`` meets in practice: float32 over a half is mixed precision."""
    return ("same", "float32", "absent") if dtype.itemsize == 2 else ("same", "absent")


@dataclass(frozen=True)
class Shapes:
    """``(rows, columns)`` that meet every kind of weight, those that meet weights of x's dtype, and the nasty values'."""

    every_weight: tuple[tuple[int, int], ...]
    same_weight: tuple[tuple[int, int], ...]
    nasty: tuple[tuple[int, int], ...]

    def cases(self, dtype: torch.dtype) -> list[Case]:
        """What to check for x of ``dtype``."""
        return [
            *(Case(*shape, NORMAL, weight) for shape in self.every_weight for weight in weights(dtype)),
            *(Case(*shape) for shape in self.same_weight),
            *(Case(*shape, values) for shape in self.nasty for values in NASTY if values.fits(dtype)),
        ]


QUICK = Shapes(every_weight=((33, 1), (8, 129)), same_weight=(), nasty=((8, 65),))

# The interpreter takes milliseconds a program: few rows, and a shape for each of the kernels.
INTERPRETED = Shapes(every_weight=((33, 1), (600, 5), (8, 129)), same_weight=((8, 1000), (8, 4097)), nasty=((8, 129),))

# Each width compiles anew, for every dtype: a few, and rows enough for each of the kernels.
GPU = Shapes(
    every_weight=((4099, 1), (128, 768), (1030, 768)),
    same_weight=((1030, 128), (1030, 1000), (1030, 4096), (600, 8192), (600, 12288), (33, 100003), (8, 1048576)),
    nasty=((40, 129), (1030, 768), (600, 4097), (8, 65536)),
)
