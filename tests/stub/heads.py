"""What QK-norm passes to the CUDA driver, by the ordinary road and by a repeated call; as launched.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from norms import Roles, assert_same
from stub_driver import Launch, Stub
from torch import Tensor

from trinorm import functional
from trinorm.launch import describe
from trinorm.ops import qk, repeated
from trinorm.ops.hosts import heads


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "describe", lambda device: describe(torch.device("meta")))
    monkeypatch.setattr(repeated, "RECORDED_FROM", 1)
    qk.CALLS.clear()


def eager(*tensors: Any) -> tuple[Tensor, ...]:
    *given, cos, sin = tensors
    return functional.qk_norm(*given, 1e-6, cos=cos, sin=sin)


def registered(*tensors: Any) -> tuple[Tensor, ...]:
    """As a compiled graph calls it."""
    return torch.ops.trinorm.qk_norm(*tensors, 1e-6, False, False, "output")[:2]


# (tokens, heads of both, elements of a head, of these turned): few and many tokens, turned and not.
SHAPES = [((3,), (4, 2), 64, 64), ((2, 700), (32, 8), 128, 128), ((2, 9), (6, 1), 80, 0)]


@pytest.mark.parametrize("norm", [eager, registered])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_repeated_call_passes_what_the_ordinary_road_passes(
    norm: Any, shape: tuple[Any, ...], weighted: bool, stub: Stub, ordinary: list[str]
) -> None:
    lead, (of_query, of_key), size, turned = shape

    def run() -> tuple[list[list[Launch]], Roles, list[Tensor]]:
        """What a forward and a backward launch, what is where, and the tensors, to keep their addresses taken."""
        packed = torch.randn(*lead, of_query + 2 * of_key, size).bfloat16()
        views = packed.split((of_query, of_key, of_key), -2)[:2]
        drawn = [*(t.detach().requires_grad_() for t in views), *(torch.ones(size, requires_grad=True) for _ in range(2))]
        weights: list[Any] = drawn[2:] if weighted else [None, None]
        angles = [torch.randn(lead[-1], turned) if turned else None for _ in range(2)]
        ys = norm(*drawn[:2], *weights, *angles)
        forward, dys = stub.launches(), [torch.randn_like(y) for y in ys]
        gradients = torch.autograd.grad(ys, drawn if weighted else drawn[:2], dys)
        tensors = [*ys, *drawn, *dys, *gradients, *(t for t in angles if t is not None)]
        return [forward, stub.launches()], {t.data_ptr(): f"tensor {i}" for i, t in enumerate(tensors)}, tensors

    first, of_first, first_held = run()
    assert ordinary == [launch.kernel for launches in first for launch in launches]
    assert ordinary == ["heads_forward", "heads_backward", "sum_partials"][: 3 if weighted else 2]
    ordinary.clear()
    second, of_second, second_held = run()
    assert ordinary == []
    assert len(first_held) == len(second_held)
    for launches in zip(first, second, strict=True):
        assert_same(*launches, of_first, of_second)
