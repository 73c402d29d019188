"""What conditioned norms pass to the CUDA driver, by the ordinary road and by a repeated call; as launched.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from norms import Roles, assert_same
from stub_driver import Launch, Stub
from torch import Tensor

from trinorm import functional
from trinorm.launch import describe
from trinorm.ops import conditioned, repeated
from trinorm.ops.hosts import conditioned_rows, rows


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in (conditioned_rows, rows):
        monkeypatch.setattr(family, "describe", lambda device: describe(torch.device("meta")))
    monkeypatch.setattr(repeated, "RECORDED_FROM", 1)
    conditioned.CALLS.clear()


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return functional.modulated_layer_norm(x, x.shape[-1:], scale, shift)


def gated(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    return functional.gated_rms_norm(x, gate, weight, eps=1e-6, group_size=64)


def registered(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    """As a compiled graph calls it."""
    how = 1, 64, None, None, 1e-6, "silu", False, False, x.dtype, False, "output"
    return torch.ops.trinorm.conditioned_rms_norm(x, gate, weight, None, *how)[0]


# (norm, sizes of its tensors, whether programs share a set of rows): of a sample, of a token, of a group; of no weight, and
# of one for all.
CASES = [
    (modulated, ((2, 700, 128), (2, 1, 128), (2, 1, 128)), True),
    (modulated, ((2, 70, 128), (2, 70, 128), (2, 70, 128)), False),
    (gated, ((2, 700, 192), (2, 700, 192), (192,)), True),
    (registered, ((2, 700, 192), (2, 700, 192), (192,)), True),
    (functional.l2_norm, ((2, 700, 128),), False),
    (functional.scale_norm, ((2, 700, 128), ()), True),
]


@pytest.mark.parametrize(("norm", "sizes", "shared"), CASES)
def test_a_repeated_call_passes_what_the_ordinary_road_passes(
    norm: Any, sizes: tuple[tuple[int, ...], ...], shared: bool, stub: Stub, ordinary: list[str]
) -> None:
    def run() -> tuple[list[list[Launch]], Roles, list[Tensor]]:
        """What a forward and a backward launch, what is where, and the tensors, to keep their addresses taken."""
        drawn = [torch.randn(size).bfloat16().requires_grad_() for size in sizes]
        y = norm(*drawn)
        forward, dy = stub.launches(), torch.randn_like(y)
        tensors = [y, *drawn, dy, *torch.autograd.grad(y, drawn, dy)]
        return [forward, stub.launches()], {t.data_ptr(): f"tensor {i}" for i, t in enumerate(tensors)}, tensors

    first, of_first, first_held = run()
    assert ordinary == [launch.kernel for launches in first for launch in launches]
    assert ordinary == ["conditioned_forward", "conditioned_backward", "sum_partials"][: 3 if shared else 2]
    ordinary.clear()
    second, of_second, second_held = run()
    assert ordinary == []
    assert len(first_held) == len(second_held)
    for launches in zip(first, second, strict=True):
        assert_same(*launches, of_first, of_second)
