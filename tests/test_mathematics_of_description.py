"""Where the original description errs (docs/mathematics.md): its own formulas beside the right ones, in exact rationals."""

from fractions import Fraction

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from test_mathematics import (
    assert_formula,
    differentiated,
    moments,
    numbers,
    vector,
    xhat_of,
)
from trinorm.spec import LAYER_NORM, RMS_NORM, RowNorm


def described_variance(xs: list[Fraction], block: int) -> Fraction:
    """Its LayerNorm kernel's: zeros in the lanes beyond the row, and every lane in the sum."""
    lanes = [*xs[:block], *[Fraction()] * (block - len(xs))]
    mean = sum(lanes, Fraction()) / len(xs)
    return sum(((lane - mean) ** 2 for lane in lanes), Fraction()) / len(xs)


def described_dx(rstd: Fraction, centered: list[Fraction], g: list[Fraction], power: int) -> list[Fraction]:
    """Its dx: LayerNorm's with ``power`` 1 and RMSNorm's with 2, the exponent of (x - mean) before its sum."""
    total = sum((gi * c for gi, c in zip(g, centered, strict=True)), Fraction())
    return [gi * (rstd - c**power * rstd**3 * total) for gi, c in zip(g, centered, strict=True)]


@given(numbers, st.integers(0, 20))
def test_masked_lanes_enter_its_variance(xs: list[Fraction], masked: int) -> None:
    mean, squares = moments(xs)
    wrong = described_variance(xs, len(xs) + masked)
    assert wrong == squares / len(xs) + Fraction(masked, len(xs)) * mean**2


def test_its_variance_of_1_2_3() -> None:
    xs = [Fraction(1), Fraction(2), Fraction(3)]
    assert moments(xs)[1] / 3 == Fraction(2, 3)
    assert described_variance(xs, 4) == 2
    assert [f"{power**-0.5:.3f}" for power in (2, 2 / 3)] == ["0.707", "1.225"]


def test_its_block_shorter_than_the_row() -> None:
    ones = [Fraction(1)] * 2048
    assert described_variance(ones, 2048) == 0
    assert described_variance(ones, 1024) == Fraction(1, 8)  # the mean of 1024 ones over 2048 is 1/2


@pytest.mark.parametrize(
    ("spec", "x", "eps", "right", "described", "described_of_twice_dy"),
    [
        (LAYER_NORM, (1, 2, 3), Fraction(1, 3), ("1/3", "-1/3", "0"), ("0", "0", "0"), ("-2", "0", "0")),
        (RMS_NORM, (1, 2, 2), Fraction(1), ("11/24", "-1/12", "-1/12"), ("3/8", "0", "0"), ("1/2", "0", "0")),
    ],
    ids=["layer_norm", "rms_norm"],
)
def test_its_dx(
    spec: RowNorm,
    x: tuple[int, ...],
    eps: Fraction,
    right: tuple[str, ...],
    described: tuple[str, ...],
    described_of_twice_dy: tuple[str, ...],
) -> None:
    row, dy = vector(*x), vector(1, 0, 0)
    exact = differentiated(spec, row, torch.ones_like(row), torch.zeros_like(row), float(eps), dy).dx
    assert_formula("dx", vector(*(float(Fraction(value)) for value in right)) + 1, exact + 1)

    xs = [Fraction(value) for value in x]
    mean = moments(xs)[0] if spec.center else Fraction()
    centered = [value - mean for value in xs]
    rstd = Fraction(1, 1 if spec.center else 2)
    assert rstd**2 * (sum(c * c for c in centered) / 3 + eps) == 1
    exponent = 1 if spec.center else 2
    for g, expected in (((1, 0, 0), described), ((2, 0, 0), described_of_twice_dy)):
        assert described_dx(rstd, centered, [Fraction(v) for v in g], exponent) == [Fraction(v) for v in expected]


def test_its_rms_of_zeros() -> None:
    zeros = torch.zeros(4)
    assert (zeros / zeros.square().mean().sqrt()).isnan().all()
    assert xhat_of(RMS_NORM, zeros, 1e-5).eq(0).all()


def test_its_offsets_wrap() -> None:
    n, block, row = 1025, 2048, torch.tensor(2095105, dtype=torch.int32)
    start = row * n
    offsets = start + torch.arange(block, dtype=torch.int32)
    mask = offsets < start + n
    assert (int(start), int(start + n)) == (2147482625, -2147483646)
    assert mask.nonzero().flatten().tolist() == [1023, 1024]
    assert offsets[mask].tolist() == [-(2**31), -(2**31) + 1]
    # Where nothing wraps the row's mask is the columns' own.
    assert torch.equal(offsets - start < n, torch.arange(block) < n)


@triton.jit
def sum_of_squares(OUT, X, BLOCK: tl.constexpr):
    x = tl.load(X + tl.arange(0, BLOCK))
    tl.store(OUT, tl.sum(x * x, axis=0))


def test_its_statistics_are_in_the_inputs_dtype(device: torch.device) -> None:
    x = torch.full((4,), 200.0, dtype=torch.float16, device=device)  # 200² is within fp16, the sum of four is not
    out = torch.zeros(1, dtype=torch.float32, device=device)
    sum_of_squares[(1,)](out, x, BLOCK=4)
    assert out.isinf().item()
    assert out.add(1e-5).rsqrt().item() == 0  # no eps makes up for it
