"""compare.py: what it accepts, and that it refuses all else."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trinorm.compare import assert_no_worse, compare, unit_in_last_place

HALF_AND_SINGLE = [torch.float16, torch.bfloat16, torch.float32]
DTYPES = [*HALF_AND_SINGLE, torch.float64]


def next_up(x: Tensor, steps: int = 1) -> Tensor:
    for _ in range(steps):
        x = torch.nextafter(x, torch.full_like(x, math.inf))
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accepts_torchs_own_result(dtype: torch.dtype) -> None:
    exact = torch.randn(100, dtype=torch.float64)
    by_torch = (exact * 1.01).to(dtype)
    found = compare("y", by_torch, exact, by_torch)
    assert found.ok
    assert found.error == found.torch_error > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_floor_is_one_unit_in_the_last_place(dtype: torch.dtype) -> None:
    exact = torch.tensor([1.0, -1.0, 1.5, 1024.0, 0.0, 3e-5], dtype=dtype)
    for at in range(len(exact)):
        result = exact.clone()
        result[at] = next_up(exact[at])
        assert compare("y", result, exact.double(), exact).ok
        result[at] = next_up(exact[at], 3)
        assert not compare("y", result, exact.double(), exact).ok


@pytest.mark.parametrize("terms", [0.1, 2.0, 1000.0])
def test_the_unit_is_that_of_the_larger_of_terms_and_sum(terms: float) -> None:
    """Terms may be smaller than what they sum to: the last of many additions of them is rounded as the sum is."""
    exact = torch.full((1,), 1.5)
    for steps, ok in ((1, True), (3 if terms < 4 else 3 * 2**9, False)):
        assert compare("mean", next_up(exact, steps), exact.double(), exact, torch.tensor([terms])).ok is ok


@pytest.mark.parametrize("factor", [-2.0, -0.5, 1.0, 2.0])
def test_accepts_twice_torchs_error_and_no_more(factor: float) -> None:
    exact = torch.linspace(1, 2, 50, dtype=torch.float64)
    by_torch = exact.clone()
    by_torch[7] += 1e-3
    result = exact.clone()
    result[31] += factor * 1e-3
    assert compare("y", result, exact, by_torch).ok
    result[31] += math.copysign(2.01e-3 - abs(factor) * 1e-3, factor)
    found = compare("y", result, exact, by_torch)
    assert not found.ok
    assert found.worst.startswith("at 31:")


@pytest.mark.parametrize("exact", [1.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("actual", [1.0, math.nan, math.inf, -math.inf])
def test_specials_lie_where_float64_has_them(exact: float, actual: float) -> None:
    expected, result = torch.ones(5, dtype=torch.float64), torch.ones(5)
    expected[2], result[2] = exact, actual
    same = exact == actual or (math.isnan(exact) and math.isnan(actual))
    assert compare("y", result, expected, expected.float()).ok == same


def test_what_the_dtype_cannot_hold_is_an_infinity() -> None:
    exact = torch.tensor([1e39, -1e39], dtype=torch.float64)
    assert compare("y", torch.tensor([math.inf, -math.inf]), exact, exact.float()).ok
    assert not compare("y", torch.full((2,), 3.4e38), exact, exact.float()).ok


def test_where_torch_overflows_its_error_excuses_nothing() -> None:
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    by_torch = torch.tensor([math.inf, 2.0])
    assert not compare("y", torch.tensor([1.0, 2.1]), exact, by_torch).ok
    assert compare("y", torch.tensor([1.0, 2.0]), exact, by_torch).ok


def test_a_shape_is_not_broadcast() -> None:
    found = compare("y", torch.ones(3, 1), torch.ones(3, 3, dtype=torch.float64), torch.ones(3, 3))
    assert not found.ok
    assert "(3, 1) is not (3, 3)" in found.worst


def test_nothing_is_right() -> None:
    empty = torch.empty(0, 4)
    assert compare("y", empty, empty.double(), empty).ok


def test_assert_no_worse_says_where() -> None:
    exact = torch.zeros(2, 2, dtype=torch.float64)
    assert_no_worse("y", exact, exact, exact)
    with pytest.raises(AssertionError, match=r"^y: .*WRONG; at 3: got 0.5, float64 0.0"):
        assert_no_worse("y", torch.tensor([[0.0, 0.0], [0.0, 0.5]]), exact, exact)


values = st.lists(st.floats(width=32, min_value=-60000, max_value=60000), min_size=1, max_size=8)


@given(values, st.sampled_from(HALF_AND_SINGLE), st.floats(0, 10), st.data())
def test_any_result_is_right_within_the_bound_and_wrong_beyond(
    exact_values: list[float], dtype: torch.dtype, torch_error: float, data: st.DataObject
) -> None:
    exact = torch.tensor(exact_values, dtype=torch.float64)
    rounded = exact.to(dtype)
    by_torch = exact.clone()
    by_torch[data.draw(st.integers(0, len(exact) - 1))] += torch_error
    assert compare("y", rounded, exact, by_torch).ok

    at = data.draw(st.integers(0, len(exact) - 1))
    largest = (by_torch - exact).abs().max()
    allowed = 2 * largest + unit_in_last_place(exact, dtype)[at]
    result = rounded.clone()
    result[at] = data.draw(st.floats(width=16, allow_nan=True))
    within = bool((result[at].double() - exact[at]).abs() <= allowed)
    assert compare("y", result, exact, by_torch).ok == within


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.sampled_from(HALF_AND_SINGLE))
def test_a_unit_in_the_last_place_is_the_gap_to_the_next_number(value: float, dtype: torch.dtype) -> None:
    exact = torch.tensor(value, dtype=torch.float64).clamp(torch.finfo(dtype).min / 2, torch.finfo(dtype).max / 2)
    number = exact.to(dtype).abs()
    # Rounding may have reached the next power of two, above which gaps are wider.
    below = number if number.double() <= exact.abs() else torch.nextafter(number, torch.zeros_like(number))
    assert unit_in_last_place(exact, dtype) == next_up(below).double() - below.double()
