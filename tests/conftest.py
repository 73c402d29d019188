"""What every test file shares. Without a GPU the kernels run through Triton's interpreter; with one, as they are."""

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor

import hypothesis
import pytest
import torch

from machine import ON_GPU
from paths import forget_channel_choices

# A first call compiles, and the interpreter is slow. The same examples on every run.
hypothesis.settings.register_profile("trinorm", deadline=None, derandomize=True)
hypothesis.settings.load_profile("trinorm")

# Once torch's own testing module is imported (OpInfo's samples, opcheck), no flag of the backends could be set any more, as
# an example does for its process: a test of that would fail after some tests and not after others.
torch.backends.disable_global_flags = lambda: None


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture(scope="session")
def compiling() -> Iterator[Executor]:
    """A process in which the kernels are compiled and not interpreted: one, since it takes seconds to start."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("TRITON_INTERPRET", raising=False)
            process.submit(os.getpid).result()
        yield process


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _memory_given_back() -> Iterator[None]:
    """What a test leaves in torch's cache is no other process's: 24 of them have filled 80 GB with little in use."""
    yield
    if ON_GPU and torch.cuda.memory_reserved() > 1 << 28:
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def _nothing_seen_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that replaces a part of the ordinary road does not pass by what an earlier test's calls left.

    Within one, the first of two calls is ordinary, and the second its repetition where that is possible.
    """
    from trinorm.models import heads_fused
    from trinorm.ops import CALLS, added, channel, conditioned, gated_sum, inputs_only, qk, quantized, repeated, row, stream

    CALLS.clear()
    for family in (added, channel, conditioned, gated_sum, heads_fused, inputs_only, qk, quantized, stream):
        family.CALLS.clear()
    for repeating in (row, repeated):
        monkeypatch.setattr(repeating, "RECORDED_FROM", 1)


@pytest.fixture
def every_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of any size go from one block into the next with what its norm makes of them."""
    monkeypatch.setattr("trinorm.models.residuals.HANDED_FROM", 0)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The kernels that a test has launched, one by one."""
    from trinorm.ops.hosts import (
        channel_layers,
        channels,
        conditioned_rows,
        dynamic_rows,
        gated_sum_rows,
        heads,
        poly_rows,
        rows,
        weight_rows,
    )

    kernels: list[object] = []
    actual = rows.launch
    hosts = rows, channels, channel_layers, conditioned_rows, dynamic_rows, gated_sum_rows, heads, poly_rows, weight_rows
    for family in hosts:
        monkeypatch.setattr(family, "launch", lambda kernel, *args: (kernels.append(kernel), actual(kernel, *args))[1])
    return kernels


@pytest.fixture
def heads_together(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of queries and keys whose norms were put off, whether they were computed together with the rotary embedding."""
    from trinorm.models import heads_fused

    found: list[bool] = []
    actual = heads_fused._both

    def noted(*given: object) -> object:
        both = actual(*given)
        found.append(both is not None)
        return both

    monkeypatch.setattr(heads_fused, "_both", noted)
    return found


@pytest.fixture
def force() -> Iterator[Callable[[object, object], None]]:
    """Makes every call of the test take these launches, whatever its size."""
    from trinorm.forced import forced
    from trinorm.tuning import Tile

    with contextlib.ExitStack() as stack:
        yield lambda forward, backward: stack.enter_context(
            forced(forward=forward, backward=backward, total=Tile(4, 1024, 4))
        )


@pytest.fixture(params=["whole", "in slabs"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Statistics of channel norms that a program has whole, wherever a kernel can; and those of slabs of them, combined."""
    from trinorm.tuning import channel

    monkeypatch.setattr(channel, "_LEAST_SHARE", 1 << 20 if request.param == "whole" else 0)
    monkeypatch.setattr(channel, "_SPLIT", (*channel._SPLIT[:3], 1 << 60))  # teams: test_channel_split.py
    forget_channel_choices()
    yield request.param
    forget_channel_choices()
