"""What the channel norms pass to the CUDA driver, by the ordinary road and by a repeated call; as launched.py."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from norms import Roles, assert_same
from stub_driver import Launch, Stub
from torch import Tensor

from trinorm import functional
from trinorm.launch import describe
from trinorm.ops import channel, repeated
from trinorm.ops.hosts import channel_layers, channels


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for host in (channels, channel_layers):
        monkeypatch.setattr(host, "describe", lambda device: describe(torch.device("meta")))
    monkeypatch.setattr(repeated, "RECORDED_FROM", 1)
    channel.CALLS.clear()


def group(x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor, residual: Tensor) -> Tensor:
    return functional.group_norm(x, 4, w, b, activation="silu")


def instance(x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor, residual: Tensor) -> Tensor:
    return functional.instance_norm(x, None, None, w, b)


def batch(x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor, residual: Tensor) -> Tensor:
    return functional.batch_norm(x, mean, var, w, b, True)


def evaluated(x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor, residual: Tensor) -> Tensor:
    return functional.batch_norm(x, mean, var, w, b, False)


def added(x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor, residual: Tensor) -> Tensor:
    return functional.batch_norm(x, mean, var, w, b, True, activation="relu", residual=residual)


def registered(x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor, residual: Tensor) -> Tensor:
    """As a compiled graph calls it."""
    y: Tensor = torch.ops.trinorm.batch_norm(x, w, b, residual, 1e-5, "relu")[0]
    return y


def layer(x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor, residual: Tensor) -> Tensor:
    return functional.channel_layer_norm(x, w, b)


# Shapes whose statistics are held, read again by a program, split over a team, and made in slabs.
SHAPES = [(64, 32, 8, 8), (32, 64, 24, 24), (64, 64, 48, 48), (1, 16, 40, 40)]


CALLS = [
    *itertools.product(
        (group, instance, batch, evaluated, added, registered), SHAPES, (torch.contiguous_format, torch.channels_last)
    ),
    # Channels that are held, and read twice; of those that are last this is layer_norm.
    (layer, (64, 32, 8, 8), torch.contiguous_format),
    (layer, (2, 4500, 8, 8), torch.contiguous_format),
]


@pytest.mark.parametrize(("norm", "shape", "order"), CALLS, ids=lambda part: getattr(part, "__name__", str(part)))
def test_a_repeated_call_passes_what_the_ordinary_road_passes(
    norm: Any, shape: tuple[int, ...], order: torch.memory_format, stub: Stub, ordinary: list[str]
) -> None:
    def run() -> tuple[list[list[Launch]], list[Roles], list[Tensor]]:
        """What a forward and a backward launch, what is where in each, and the tensors, to keep their addresses taken."""
        x, dy, residual = (torch.randn(shape).bfloat16().contiguous(memory_format=order) for _ in range(3))
        parameters = [torch.randn(shape[1]).requires_grad_() for _ in range(2)]
        running = [torch.zeros(shape[1]), torch.ones(shape[1])]
        drawn = [x.requires_grad_(), *parameters]
        y = norm(*drawn, *running, residual)
        assert y.stride() == x.stride()
        forward = stub.launches()
        gradients = torch.autograd.grad(y, drawn, dy)
        tensors = [y, *drawn, *running, residual, dy, *gradients]
        roles = [{t.data_ptr(): f"tensor {i}" for i, t in enumerate(part)} for part in (tensors[:-4], tensors[1:])]
        return [forward, stub.launches()], roles, tensors

    first, of_first, first_held = run()
    assert ordinary == [launch.kernel for launches in first for launch in launches]
    ordinary.clear()
    second, of_second, second_held = run()
    assert ordinary == []
    assert [t.stride() for t in first_held] == [t.stride() for t in second_held]
    for launches in zip(first, second, of_first, of_second, strict=True):
        assert_same(*launches)


def gradients(x: Tensor, w: Tensor | None, how: tuple[Any, ...]) -> list[Tensor]:
    """As a compiled graph calls them. how: dx, dw, and db's dtype."""
    mean, rstd, dy = torch.zeros(32), torch.ones(32), torch.randn_like(x)
    found: list[Tensor] = torch.ops.trinorm.batch_norm_backward(dy, x, w, None, None, mean, rstd, 1e-5, None, *how, False)
    return found


def test_what_differs_is_kept_apart(stub: Stub, ordinary: list[str]) -> None:
    """By size, order, dtype, absence, activation, eps, momentum, and what gradients are wanted: each is new once."""
    x, w, b = torch.randn(64, 32, 8, 8), torch.ones(32), torch.ones(32)
    running = [torch.zeros(32), torch.ones(32)]
    calls = [
        lambda: functional.group_norm(x, 4, w),
        lambda: functional.group_norm(x, 8, w),
        lambda: functional.group_norm(x, 4, w, b),
        lambda: functional.group_norm(x, 4, w, activation="relu"),
        lambda: functional.group_norm(x, 4, w, activation="relu", residual=torch.ones_like(x)),
        lambda: functional.group_norm(x, 4, w, eps=1e-3),
        lambda: functional.group_norm(x.bfloat16(), 4, w),
        lambda: functional.group_norm(x[:32], 4, w),
        lambda: functional.group_norm(x.contiguous(memory_format=torch.channels_last), 4, w),
        lambda: functional.batch_norm(x, *running, training=True),
        lambda: functional.batch_norm(x, *running, training=True, momentum=0.2),
        lambda: functional.batch_norm(x, *running),
        lambda: functional.batch_norm(x, None, None, training=True),
        lambda: functional.channel_layer_norm(x, w),
        lambda: functional.channel_layer_norm(x, w, eps=1e-3),
        lambda: functional.channel_layer_norm(x, w, b),
        lambda: torch.ops.trinorm.batch_norm(x, w, b, None, 1e-5, None),
        lambda: torch.ops.trinorm.batch_norm(x, w, b, None, 1e-3, None),
        lambda: torch.ops.trinorm.batch_norm(x, w, b, None, 1e-5, "relu"),
        lambda: torch.ops.trinorm.batch_norm(x, w, None, None, 1e-5, None),
        lambda: torch.ops.trinorm.batch_norm(x, None, b, None, 1e-5, None),
        lambda: torch.ops.trinorm.group_norm(x, 4, w, b, None, 1e-5, None, False),
        lambda: torch.ops.trinorm.group_norm(x, 8, w, b, None, 1e-5, None, False),
        lambda: gradients(x, w, (True, True, torch.float32)),
        lambda: gradients(x, w, (True, True, torch.bfloat16)),
        lambda: gradients(x, w, (True, False, None)),
        lambda: gradients(x, None, (True, False, None)),
        lambda: gradients(x.bfloat16(), w, (True, True, torch.float32)),
    ]
    for again in (False, True):
        for call in calls:
            ordinary.clear()
            call()
            assert bool(ordinary) != again
            stub.launches()
