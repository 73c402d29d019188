"""The interpreter's conversions and its fma, bit for bit as torch and exact arithmetic have them."""

import math
import os
import subprocess
import sys
from fractions import Fraction

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder

from trinorm import interpreter
from trinorm.ops import road

pytestmark = pytest.mark.skipif(not road.INTERPRETED, reason="the interpreter is not what runs the kernels on a GPU")

BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
BLOCK = 16384


@triton.jit
def convert(OUT, X, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(OUT + at, tl.load(X + at).to(OUT.dtype.element_ty))


@triton.jit
def fused(OUT, X, Y, Z, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(OUT + at, tl.fma(tl.load(X + at), tl.load(Y + at), tl.load(Z + at)))


def bit_patterns(dtype: torch.dtype) -> torch.Tensor:
    """Random bits, so every exponent, sign and NaN; values near 1 with their ties; and the specials."""
    info = torch.finfo(dtype)
    specials = [0.0, -0.0, math.inf, -math.inf, math.nan, info.max, info.min, info.tiny, info.smallest_normal * info.eps]
    # Where a narrower dtype rounds: odd and even ties, one bit either side, and the step to infinity.
    ties = [1 + k * 2.0**-e for e in (8, 9, 11, 12) for k in (1, 3, 5)] + [65519.99, 65520.0, 3.3895314e38, 3.3961776e38]
    ties += [t * (1 + s * info.eps) for t in ties for s in (-1, 1)]
    known = torch.tensor(specials + ties, dtype=torch.float64).to(dtype)
    random = torch.randint(-(2**63), 2**63 - 1, (BLOCK,)).to(BITS[dtype])[: (BLOCK - len(known)) // 2].view(dtype)
    near_one = torch.randn(BLOCK - len(known) - len(random)).to(dtype)
    return torch.cat([known, random, near_one])


# Triton's own, unchanged, is right and torch is not: it rounds float64 to float16 twice, by way of float32.
CONVERSIONS = [(s, t) for s in BITS for t in BITS if (s, t) != (torch.float64, torch.float16)]


@pytest.mark.parametrize(("source", "target"), CONVERSIONS, ids=str)
def test_conversions_are_torchs_own(source: torch.dtype, target: torch.dtype) -> None:
    x = bit_patterns(source)
    out = torch.empty(BLOCK, dtype=target)
    convert[(1,)](out, x, BLOCK=BLOCK)
    expected = x.to(target)
    assert torch.equal(out.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(out[numbers].view(BITS[target]), expected[numbers].view(BITS[target]))


@triton.jit
def column_sums(OUT, X, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    columns = tl.arange(0, COLUMNS)
    x = tl.load(X + tl.arange(0, ROWS)[:, None] * COLUMNS + columns[None, :])
    tl.store(OUT + columns, tl.sum(x, axis=0))


def test_sums_are_trees() -> None:
    # Added one after another, each 1 vanishes beside 2^24; in a tree they meet one another first.
    x = torch.ones(256, 4)
    x[0] = 2.0**24
    out = torch.empty(4)
    column_sums[(1,)](out, x, ROWS=256, COLUMNS=4)
    assert out.tolist() == [2.0**24 + 254] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fma_rounds_once(dtype: torch.dtype) -> None:
    x, y, z = torch.randn(3, 1024, dtype=dtype)
    # The product's own rounding error is the answer: an fma that rounds twice gives 0.
    z[:256] = -(x * y)[:256]
    z[256:512] *= torch.linspace(-60, 60, 256, dtype=dtype).exp2()
    # A hair from the middle of two numbers: wider arithmetic that drops the hair rounds every other one wrongly.
    ulp = torch.finfo(dtype).eps
    x[512:] = 1 + ulp
    y[512:] = ulp / 2 * (1 - ulp)
    y[768:] *= -1
    z[512:] = 1 + ulp * torch.arange(1, 513, dtype=dtype)
    out = torch.empty_like(x)
    fused[(1,)](out, x, y, z, BLOCK=1024)
    above, below = (
        torch.nextafter(out, torch.full_like(out, math.inf)),
        torch.nextafter(out, torch.full_like(out, -math.inf)),
    )
    for a, b, c, *found in zip(*(t.tolist() for t in (x, y, z, out, above, below)), strict=True):
        exact = Fraction(a) * Fraction(b) + Fraction(c)
        nearest, *others = (abs(Fraction(number) - exact) for number in found)
        assert all(nearest < other for other in others), (a, b, c, found)


def test_nan_and_overflow_do_not_warn() -> None:
    x = torch.tensor([math.nan, math.inf, 3e38, -1.0])
    out = torch.empty(4, dtype=torch.float16)
    convert[(1,)](out, x, BLOCK=4)
    assert out.isinf().tolist() == [False, True, True, False]


@triton.jit
def triangular(OUT, N):
    total = 0
    for i in range(N):
        total += i
    tl.store(OUT, total)


def test_a_run_time_value_bounds_a_loop() -> None:
    out = torch.zeros(1, dtype=torch.int32)
    triangular[(1,)](out, 5)
    assert out.item() == 10


def test_install_twice_changes_nothing() -> None:
    cast = InterpreterBuilder.cast_impl
    interpreter.install()
    assert InterpreterBuilder.cast_impl is cast


def test_install_after_triton_says_what_to_do() -> None:
    code = "import triton.language; from trinorm import interpreter; interpreter.install()"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ran.returncode == 1
    assert "set TRITON_INTERPRET=1" in ran.stderr
