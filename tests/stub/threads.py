"""Calls of many threads at once, on the recording driver: each passes what it would have passed alone; as launched.py."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from norms import Roles, assert_same
from stub_driver import Launch, Stub
from torch import Tensor

from trinorm import functional
from trinorm.launch import describe
from trinorm.ops import CALLS, channel, repeated
from trinorm.ops.hosts import channel_layers, channels

THREADS, CALLS_OF_EACH = 8, 150

# (the norm of x, a weight and an eps; the shape of a sample). Channels are as many as a row has elements.
NORMS: dict[str, tuple[Callable[[Tensor, Tensor, float], Tensor], tuple[int, ...]]] = {
    "layer_norm": (lambda x, w, eps: functional.layer_norm(x, (32,), w, None, eps), (32,)),
    "rms_norm": (lambda x, w, eps: functional.rms_norm(x, (32,), w, eps), (32,)),
    "group_norm": (lambda x, w, eps: functional.group_norm(x, 4, w, None, eps, activation="silu"), (32, 8, 8)),
    "channel_layer_norm": (lambda x, w, eps: functional.channel_layer_norm(x, w, None, eps), (32, 8, 8)),
}


class Tensors(NamedTuple):
    x: Tensor
    weight: Tensor
    dy: Tensor

    def roles(self) -> Roles:
        return {t.data_ptr(): name for name, t in self._asdict().items()}


def draw(*shape: int) -> Tensors:
    x, dy = torch.randn(shape), torch.randn(shape)
    return Tensors(x.requires_grad_(), torch.randn(shape[1]).requires_grad_(), dy)


@pytest.fixture(autouse=True)
def _as_on_a_gpu_and_often_interrupted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for host in (channels, channel_layers):
        monkeypatch.setattr(host, "describe", lambda device: describe(torch.device("meta")))
    monkeypatch.setattr(repeated, "RECORDED_FROM", 1)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("op", NORMS)
def test_threads_do_not_mix(op: str, stub: Stub) -> None:
    """Each on its own stream, with its own tensors, and sizes and eps that others have too, from the first call on; forward
    and backward.
    """
    norm, of_sample = NORMS[op]

    def run(tensors: Tensors, eps: float) -> None:
        torch.autograd.grad(norm(*tensors[:2], eps), tensors[:2], tensors.dy)

    def forget() -> None:
        CALLS.clear()
        channel.CALLS.clear()

    drawn = [[draw(m, *of_sample) for m in (8, 16 + i % 2, 40)] for i in range(THREADS)]
    alone: dict[tuple[int, float], tuple[list[Launch], Roles]] = {}
    for tensors in (*drawn[0], drawn[1][1]):
        for eps in (0.5, 0.25):
            forget()
            run(tensors, eps)
            alone[len(tensors.x), eps] = stub.launches(), tensors.roles()
    forget()
    start_line = threading.Barrier(THREADS)
    faults: list[BaseException] = []

    def work(i: int) -> None:
        try:
            stub.current.stream = 1 + i
            start_line.wait()
            for j in range(CALLS_OF_EACH):
                run(drawn[i][j % 3], 0.5 if j % 2 else 0.25)
        except BaseException as fault:
            faults.append(fault)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert faults == []
    launches = stub.launches()
    for i in range(THREADS):
        mine = [launch for launch in launches if launch.stream == 1 + i]
        for j in range(CALLS_OF_EACH):
            tensors = drawn[i][j % 3]
            expected, roles = alone[len(tensors.x), 0.5 if j % 2 else 0.25]
            call, mine = mine[: len(expected)], mine[len(expected) :]
            # What is made between a forward and its gradients may lie where something else lay: launch by launch.
            for a, b in zip(expected, call, strict=True):
                assert_same([a], [replace(b, stream=a.stream)], roles, tensors.roles())
        assert mine == []
