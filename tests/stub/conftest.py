"""The fixtures of the tests that run on the recording driver, in a process of their own (test_launch.py starts it)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from stub_driver import Stub
from triton.runtime.jit import JITFunction

from trinorm.launch import describe
from trinorm.ops import CALLS, calls, road, row
from trinorm.ops.hosts import rows


@pytest.fixture(scope="session")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Stub:
    # A build of torch for CUDA counts devices once; asked first behind the stub, it warns of a driver that is none.
    assert not torch.cuda.is_available()
    road.INTERPRETED = True  # the kernels serve CPU tensors,
    rows.describe = lambda device: describe(torch.device("meta"))  # as on an H200
    return Stub(tmp_path_factory.mktemp("driver"))


@pytest.fixture(autouse=True, params=[1, 1 << 30], ids=["of its own", "of any rows"])
def own_from(stub: Stub, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[int]:
    """By repetitions that every shape has of its own from its first call on, and by those that serve any number of rows."""
    CALLS.clear()
    monkeypatch.setattr(calls, "OWN_FROM", request.param)
    monkeypatch.setattr(row, "RECORDED_FROM", 1)  # the first of two calls is the ordinary one, the second its repetition
    torch.manual_seed(0)
    stub.launches()
    yield request.param
    stub.current.device = stub.current.stream = 0


@pytest.fixture
def ordinary(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels started by Triton's own way. A repeated call does not show here."""
    started: list[str] = []
    run = JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda self, *a, **k: (started.append(self.fn.__name__), run(self, *a, **k))[1])
    return started
