"""The inputs that ``trinorm check`` and the tests share: kinds of values, weights and shapes, all of it data.

Every draw is seeded: a case gives the same numbers on every run and every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .norms import Arguments, Norm, Shape

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}

EPS = 1e-5
# For 0, which torch's batch_norm refuses: it is lost beside the variance of any row here.
NO_EPS = 1e-300

# The orders of memory that the channel norms read, by name.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
}


def layouts(shape: Shape) -> tuple[str, ...]:
    """Those that torch has, and tells apart, for a tensor of this shape: images' and volumes' are two."""
    two = len(shape) in (4, 5) and shape[1] > 1 and math.prod(shape[2:]) > 1
    return tuple(LAYOUTS) if two else ("contiguous",)


@dataclass(frozen=True)
class Values:
    """One kind of rows: of the elements that share statistics (norms.py).

    draw: from standard normal values (float64, but of float32's precision, so that an oracle in float64 has digits to
    spare) and the finfo of the dtype they will have. exponents: row i is then multiplied by the power of two
    ``2**exponents[i % len(exponents)]``. Rows of unequal exponents need NO_EPS: see Inputs.unscaled. numbers: whether all
    elements are.
    """

    name: str
    draw: Callable[[Tensor, torch.finfo], Tensor]
    exponents: tuple[int, ...] = (0,)
    eps: float = EPS
    zero_weight: bool = False
    numbers: bool = True

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether the dtype can hold the exponents."""
        return self._largest_exponent < math.log2(torch.finfo(dtype).max) - 4

    @property
    def scaled(self) -> bool:
        """Whether rows are multiplied by anything."""
        return any(self.exponents)

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
    Values("one NaN", _with_one(math.nan), numbers=False),
    Values("one Inf", _with_one(math.inf), numbers=False),
    Values("small and large rows", _as_drawn, exponents=(6, 0, -6), eps=NO_EPS),
    # Squares of these leave float32's range: 2^100 is 1.3e30.
    Values("1e30", _as_drawn, exponents=(100,)),
    Values("1e-30", _as_drawn, exponents=(-100,), eps=NO_EPS),
    Values("1e30, 1 and 1e-30 by rows", _as_drawn, exponents=(100, 0, -100), eps=NO_EPS),
)


class Inputs(NamedTuple):
    """One call, its backward, and the power of two in each element of x, in float64.

    of_sum: the residual has it too, as it is the sum that is normalized. dsum: the gradient of that, which has its inverse.
    """

    of: Arguments
    dy: Tensor
    scale: Tensor
    of_sum: bool = False
    dsum: Tensor | None = None

    @property
    def gradients(self) -> tuple[Tensor, ...]:
        """Those of the results: dy, and dsum where there is one."""
        return (self.dy,) if self.dsum is None else (self.dy, self.dsum)

    def unscaled(self) -> Inputs:
        """Without the powers of two (exactly: cases see to that), and with the eps that makes it the same problem.

        Norms are scale invariant but for eps. With ``s`` a row's scale, x and eps give y, dw and db of ``x / s`` and
        ``eps / s**2``, ``s`` times its mean and ``1 / s`` times its rstd and dx: no digit changes. Of a sum too, where
        ``s`` times the residual is added, and the sum's gradient comes as ``1 / s`` times that. On the unscaled problem
        torch's own result is an answer, and so a yardstick, even where x squared overflows in torch.
        """
        of, scale = self.of, self.scale
        of = of._replace(x=times(of.x, 1 / scale), eps=max(of.eps / scale.flatten()[0].item() ** 2, NO_EPS))
        if self.of_sum and of.residual is not None:
            of = of._replace(residual=times(of.residual, 1 / scale))
        dsum = None if self.dsum is None else times(self.dsum, scale)
        return self._replace(of=of, scale=torch.ones_like(scale), dsum=dsum)


def times(t: Tensor, powers: Tensor) -> Tensor:
    """t times powers of two, in t's dtype."""
    return (t.detach() * powers).to(t.dtype)


@dataclass(frozen=True)
class Case:
    """An x of a shape, in a layout, whose rows have some values. weight: what weight_dtype knows, for the bias too, and for
    cos and sin.
    """

    shape: Shape
    values: Values = NORMAL
    weight: str = "same"
    layout: str = "contiguous"

    def __str__(self) -> str:
        layout = "" if self.layout == "contiguous" else " channels last"
        return f"{'x'.join(map(str, self.shape))}{layout} {self.values.name}"

    def inputs(self, norm: Norm, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
        """The case's tensors, x and dy of ``dtype``. Each seed is another draw of them.

        Where it is a sum that is normalized, the residual's rows have the same kind of values as x's.
        """
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, torch.float64)

        shape = norm.x_shape(self.shape)

        def placed(rows: Tensor) -> Tensor:
            return LAYOUTS[self.layout](norm.of_rows(rows, shape))

        m, n = norm.rows(torch.empty(shape, device="meta")).shape
        exponents = torch.tensor(self.values.exponents, dtype=torch.float64, device=device)
        scale = exponents.exp2()[torch.arange(m, device=device) % len(exponents), None].expand(m, n)
        of_residual = norm.residual_dtype(dtype)
        info = torch.finfo(dtype)
        # Rounded before it is scaled up, and scaled down before it is read: either way its powers of two come out exactly.
        x = self.values.draw(normal(m, n), info).to(dtype) * scale
        dy = normal(m, norm.outputs or n)
        w, b = (normal(*of(self.shape)) for of in (norm.parameter_shape, norm.bias_shape))
        if self.values.zero_weight:
            w.zero_()
        of = weight_dtype(self.weight, dtype)
        weight, bias = (None if of is None else w.to(of), None if of is None or not norm.biased else b.to(of))
        residual = dsum = None
        if norm.numbers:
            residual = normal(norm.numbers).to(of_residual)
        elif norm.outputs:
            residual = normal(norm.outputs, n).to(of_residual)
        elif norm.residual:
            rows = normal(m, n)
            rows = self.values.draw(rows, info).to(of_residual) * scale if norm.of_sum else rows
            residual = placed(rows.to(of_residual))
        if "sum" in norm.differentiated:
            of_sum = torch.promote_types(dtype, of_residual)
            dsum = placed((normal(m, n).to(of_sum) / scale).to(of_sum))
        besides = norm.queries(self.shape), norm.angles(self.shape, of or dtype, device)
        gate = normal(*norm.parameter_shape(self.shape)).to(of or dtype) if norm.of_gated_sum else None
        arguments = Arguments(placed(x.to(dtype)), weight, bias, self.values.eps, residual, *besides, gate)
        return Inputs(arguments, placed(dy.to(dtype)), placed(scale), norm.of_sum, dsum)


def weight_dtype(weight: str, dtype: torch.dtype) -> torch.dtype | None:
    """The dtype of a Case's weight over x of ``dtype``; None when it has none."""
    return {"same": dtype, "float32": torch.float32, "absent": None}[weight]


def weights(dtype: torch.dtype) -> tuple[str, ...]:
    """The kinds of weight that x of ``dtype`` meets in practice: float32 over a half is mixed precision."""
    return ("same", "float32", "absent") if dtype.itemsize == 2 else ("same", "absent")


@dataclass(frozen=True)
class Shapes:
    """Shapes that meet every kind of weight, those that meet weights of x's dtype, and the nasty values'.

    turns: cases take turns with the layouts, and dtypes with the weights and the nasty values, where else each meets each.
    ordered: there are the orders of memory of N × C × ....
    """

    every_weight: tuple[Shape, ...]
    same_weight: tuple[Shape, ...]
    nasty: tuple[Shape, ...]
    turns: bool = False
    ordered: bool = True

    def cases(self, dtype: torch.dtype) -> Iterator[Case]:
        """What to check for x of ``dtype``."""
        nasty, of_weight = [values for values in NASTY if values.fits(dtype)], weights(dtype)
        if self.turns:
            # So that fp32 gets the large mean, which fewer digits do not hold, and a half the fp32 weight.
            turn = list(DTYPES.values()).index(dtype) + 2
            nasty, of_weight = nasty[turn % len(DTYPES) :: len(DTYPES)], of_weight[-turn % len(of_weight) :][:1]
        kinds = [(shape, NORMAL, weight) for shape in self.every_weight for weight in of_weight]
        kinds += [(shape, NORMAL, "same") for shape in self.same_weight]
        kinds += [(shape, values, "same") for shape in self.nasty for values in nasty]
        for i, kind in enumerate(kinds):
            of_shape = layouts(kind[0]) if self.ordered else ("contiguous",)
            for layout in [of_shape[i % len(of_shape)]] if self.turns else of_shape:
                yield Case(*kind, layout)


class Sizes(NamedTuple):
    """The shapes of each family: rows × columns, samples × channels × positions, what OfHeads and OfConditioned say, and
    rows × columns again, of norms of elements.
    """

    rows: Shapes
    channels: Shapes
    heads: Shapes
    conditioned: Shapes
    elements: Shapes

    def of(self, norm: Norm) -> Shapes:
        """Those of the norm's family."""
        found: Shapes = getattr(self, norm.family)
        return found


QUICK = Sizes(
    rows=Shapes(every_weight=((33, 1), (8, 129)), same_weight=(), nasty=((8, 66),)),
    channels=Shapes(every_weight=(), same_weight=((2, 6, 5, 7),), nasty=(), turns=True),
    heads=Shapes(every_weight=((5, 4, 2, 16),), same_weight=(), nasty=((5, 3, 3, 12),), turns=True, ordered=False),
    conditioned=Shapes(every_weight=(), same_weight=((2, 5, 40),), nasty=((3, 4, 24),), turns=True, ordered=False),
    elements=Shapes(every_weight=((9, 40),), same_weight=(), nasty=((8, 24),), turns=True, ordered=False),
)

# The interpreter takes milliseconds a program: few rows, and a shape for each of the kernels. Of channels, of which
# tests/test_channels.py has more: groups of 3, single positions, a single sample.
INTERPRETED = Sizes(
    rows=Shapes(
        every_weight=((33, 1), (600, 5), (8, 129)), same_weight=((8, 1000), (8, 4097)), nasty=((8, 129), (8, 1100))
    ),
    channels=Shapes(every_weight=((2, 6, 5, 7),), same_weight=((3, 12, 1, 1),), nasty=((1, 12, 3, 3),), turns=True),
    heads=Shapes(every_weight=((2, 9, 4, 2, 80),), same_weight=((40, 3, 1, 2),), nasty=((5, 6, 3, 20),), ordered=False),
    conditioned=Shapes(
        every_weight=((3, 9, 136),), same_weight=((40, 2, 8), (2, 3, 1160)), nasty=((3, 5, 72),), ordered=False
    ),
    elements=Shapes(every_weight=((33, 1), (300, 5)), same_weight=((8, 1160), (8, 4097)), nasty=((8, 65),), ordered=False),
)

# Each width compiles anew, for every dtype: a few, and rows enough for each of the kernels. Of channels: groups of 3, of
# 10, of all, of single positions; one sample; primes.
GPU = Sizes(
    rows=Shapes(
        every_weight=((4099, 1), (128, 768), (1030, 768)),
        same_weight=((1030, 128), (1030, 1000), (1030, 4096), (600, 8192), (600, 12288), (33, 100003), (8, 1048576)),
        nasty=((40, 129), (1030, 768), (40, 1536), (600, 4097), (8, 65536)),
    ),
    channels=Shapes(
        every_weight=((8, 320, 32, 32),),
        same_weight=((3, 12, 1, 1), (300, 1024), (5, 7, 13), (1, 96, 3, 7, 11), (1, 32, 512, 350), (3, 4500, 8, 8)),
        nasty=((16, 96, 31, 17),),
    ),
    heads=Shapes(
        every_weight=((2, 1030, 32, 8, 128), (33, 7, 7, 80)),
        same_weight=((40, 3, 1, 2), (130, 8, 2, 64), (130, 16, 8, 256), (33, 6, 1, 1000)),
        nasty=((70, 12, 4, 96), (1030, 32, 8, 128)),
        ordered=False,
    ),
    conditioned=Shapes(
        every_weight=((9, 130, 1152),),
        same_weight=(
            (40, 2, 8),
            (1030, 32, 128),
            (3, 70, 3072),
            (3, 70, 5000),
            (3, 70, 8192),
            (1, 600, 1024),
            (3, 35, 20000),
        ),
        nasty=((40, 9, 136), (9, 130, 1152)),
        ordered=False,
    ),
    elements=Shapes(
        every_weight=((4099, 1), (515, 768)),
        same_weight=((1030, 128), (130, 1000), (140, 4096), (33, 8192), (5, 100003)),
        nasty=((40, 129), (33, 4096)),
        ordered=False,
    ),
)
