"""Registered ops as a compiled graph calls them: what they pass to the CUDA driver, first and again; as launched.py."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from norms import assert_same
from stub_driver import Stub
from torch import Tensor

from trinorm.launch import describe
from trinorm.ops import added, channel, conditioned, gated_sum, inputs_only, qk, quantized, repeated, row
from trinorm.ops.hosts import (
    channels,
    conditioned_rows,
    dynamic_rows,
    gated_sum_rows,
    heads,
    poly_rows,
    quantized_rows,
    weight_rows,
)

HOSTS = channels, conditioned_rows, dynamic_rows, gated_sum_rows, heads, poly_rows, quantized_rows, weight_rows
FAMILIES = added, channel, conditioned, gated_sum, inputs_only, qk, quantized, row

Case = tuple[str, list[Any]]


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for host in HOSTS:
        monkeypatch.setattr(host, "describe", lambda device: describe(torch.device("meta")))
    monkeypatch.setattr(repeated, "RECORDED_FROM", 1)
    for family in FAMILIES:
        family.CALLS.clear()


M, N = 96, 256


def draw(*size: int) -> Tensor:
    return torch.randn(size).bfloat16()


def statistics(*size: int) -> Tensor:
    return torch.rand(size)


def of_rows() -> Case:
    how = [1e-5, True, True, torch.bfloat16, False, "output"]
    return "layer_norm_backward", [draw(M, N), draw(M, N), [N], draw(N), statistics(M), statistics(M), *how]


def of_a_sum() -> Case:
    how = [None, None, 1e-5, 1.0, 0.0, torch.bfloat16, False, "output"]
    return "add_layer_norm", [draw(M, N), draw(M, N), [N], draw(N), draw(N), *how]


def of_a_sum_backward() -> Case:
    how = [None, None, 1e-5, 1.0, 0.0, torch.bfloat16, torch.bfloat16, True, torch.bfloat16, False, "output"]
    saved = [[N], draw(N), statistics(M), statistics(M)]
    return "add_layer_norm_backward", [draw(M, N), draw(M, N), draw(M, N), *saved, *how]


def gated() -> Case:
    how = [1, N, None, None, 1e-6, "silu", False, False]
    tensors = [draw(M, N), draw(M, N), draw(M, N), draw(N), None, None, statistics(M, 1)]
    return "conditioned_rms_norm_backward", [*tensors, *how, True, True, True, False, False, "output"]


def of_a_gated_sum() -> Case:
    wanted = [torch.bfloat16, True, True, True, True]
    tensors = [draw(2, M, N), statistics(2, M, 1), draw(2, M, N), draw(2, 1, N), draw(2, M, N), draw(2, M, N)]
    tensors += [draw(2, 1, N), draw(2, 1, N), statistics(2, M, 1)]
    return "add_modulated_layer_norm_backward", [*tensors, 1, N, 1e-6, True, *wanted, False]


def of_heads() -> Case:
    query, key = draw(2, 24, 4, 64), draw(2, 24, 2, 64)
    saved = [query, key, draw(64), draw(64), draw(2, 24, 64), draw(2, 24, 64), statistics(2, 24, 4), statistics(2, 24, 2)]
    return "qk_norm_backward", [*saved, draw(2, 24, 4, 64), draw(2, 24, 2, 64), 1e-6, False, *[True] * 4, False, "output"]


def with_codes(format: str = "fp8_token", scale_layout: str = "row_major") -> Case:
    how = [1, 1e-6, format, scale_layout, False, False, "output"]
    return "quantized_rms_norm", [draw(M, N), None, None, draw(N), None, None, *how]


def with_scales_by_columns() -> Case:
    return with_codes("fp8_block", "column_major")


def with_swizzled_scales() -> Case:
    return with_codes("mxfp8", "swizzled")


def dynamic() -> Case:
    tensors = [draw(M, N), draw(M, N), torch.rand(1), None, draw(N), draw(N)]
    return "dynamic_tanh_backward", [*tensors, 1, True, True, False, True, True]


def of_groups() -> Case:
    tensors = [
        draw(2, 8, 4, 4),
        draw(2, 8, 4, 4),
        2,
        draw(8),
        draw(8),
        draw(2, 8, 4, 4),
        statistics(2, 2),
        statistics(2, 2),
    ]
    return "group_norm_backward", [*tensors, 1e-5, "silu", False, True, True, torch.bfloat16, True]


def of_powers() -> Case:
    return "poly_norm_backward", [draw(M, N), draw(M, N), draw(3), draw(1), 1e-6, True, True, True]


def of_a_weight() -> Case:
    return "weight_norm_backward", [draw(M, N), draw(M, N), draw(M, 1), 0, True, True]


OF_FORMATS = with_codes, with_scales_by_columns, with_swizzled_scales
CASES = (
    of_rows,
    of_a_sum,
    of_a_sum_backward,
    gated,
    of_a_gated_sum,
    of_heads,
    *OF_FORMATS,
    dynamic,
    of_groups,
    of_powers,
    of_a_weight,
)


def op(name: str) -> Any:
    return getattr(torch.ops.trinorm, name).default


@pytest.mark.parametrize("case", CASES)
def test_a_repeated_call_passes_what_the_first_passed(case: Callable[[], Case], stub: Stub, ordinary: list[str]) -> None:
    first: Any = None
    for again in range(7):  # what serves any number of rows gives way to a shape's own
        name, args = case()
        ordinary.clear()
        results = op(name)(*args)
        results = results if isinstance(results, tuple) else (results,)
        launches, tensors = stub.launches(), [t for t in (*args, *results) if isinstance(t, Tensor)]
        roles = {t.data_ptr(): f"tensor {i}" for i, t in enumerate(tensors)}
        if again == 0:
            first, held = (launches, roles), tensors  # whose addresses stay taken
            assert ordinary == [launch.kernel for launch in launches] != []
        else:
            assert len(held) == len(tensors)
            assert_same(first[0], launches, first[1], roles)
    assert ordinary == []


def test_a_call_of_one_tensor_twice_is_repeated(stub: Stub, ordinary: list[str]) -> None:
    """As y and the sum have one gradient where a graph adds them."""
    for again in range(4):
        name, (total, dy, _, *others) = of_a_sum_backward()
        ordinary.clear()
        op(name)(total, dy, dy, *others)
        assert bool(ordinary) == (again == 0)
        (launch,) = stub.launches()
        assert launch.parameters.count(dy.data_ptr()) == 2


@pytest.mark.parametrize("case", CASES)
def test_no_tensor_is_held(case: Callable[[], Case], stub: Stub) -> None:
    for _ in range(3):
        name, args = case()
        results = op(name)(*args)
        results = results if isinstance(results, tuple) else (results,)
        held = [weakref.ref(kept) for t in (*args, *results) if isinstance(t, Tensor) for kept in (t, t.untyped_storage())]
        del args, results
        gc.collect()
        assert [ref() for ref in held] == [None] * len(held)


@pytest.mark.parametrize("case", CASES)
def test_bad_tensors_are_refused_after_good_ones(case: Callable[[], Case], stub: Stub) -> None:
    """Of each tensor in its turn: half of it, and of another dtype."""
    for _ in range(7):
        name, args = case()
        op(name)(*args)
    stub.launches()
    refused = 0
    for i, t in enumerate(args):
        if isinstance(t, Tensor):
            for bad in (t[..., : t.shape[-1] // 2], t.to(torch.int32)):
                try:
                    op(name)(*args[:i], bad, *args[i + 1 :])
                except (RuntimeError, NotImplementedError):
                    refused += 1
                    assert stub.launches() == [], (name, i)
                else:
                    assert bad.numel() <= 1, (name, i)  # half of one element is none
    assert refused
