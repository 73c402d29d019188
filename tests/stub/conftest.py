"""The fixtures of the tests that run on the recording driver, in a process of their own (test_launch.py starts it)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from stub_driver import Stub
from triton.runtime.jit import JITFunction

from trinorm.launch import describe
from trinorm.ops import CALLS, road, row, rows


@pytest.fixture(scope="session")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Stub:
    road.INTERPRETED = True  # the kernels serve CPU tensors,
    rows.describe = lambda device: describe(torch.device("meta"))  # as on an H200
    return Stub(tmp_path_factory.mktemp("driver"))


@pytest.fixture(autouse=True)
def _as_new(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    CALLS.clear()
    monkeypatch.setattr(row, "RECORDED_FROM", 1)  # the first of two calls is the ordinary one, the second its repetition
    torch.manual_seed(0)
    stub.launches()
    yield
    stub.current.device = stub.current.stream = 0


@pytest.fixture
def ordinary(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels started by Triton's own way. A repeated call does not show here."""
    started: list[str] = []
    run = JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda self, *a, **k: (started.append(self.fn.__name__), run(self, *a, **k))[1])
    return started
