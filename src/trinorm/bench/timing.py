"""Two times of one call, in microseconds: the device's, and the host's.

Both run on the caller's current stream, which is a side stream: a graph is captured on it, and autograd runs a backward
on the stream of its forward.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]

_WARMUPS = 3
_REPLAYS = 50
# A replay holds at least so many norms, so that what comes before its first kernel (about 1 µs) does not show.
_NORMS_A_REPLAY = 32
_MOST_SETS = 256

_HOST_BLOCKS = 30
# So few that the device's queue never fills: a full queue would make the host wait for the device.
_CALLS_A_BLOCK = 20


@dataclass(frozen=True)
class DeviceTime:
    """Device time of one norm in microseconds, over ``replays`` replays of one graph."""

    mean: float
    std: float
    median: float
    replays: int


def sets_past_l2(set_bytes: int, l2_bytes: int) -> int:
    """How many sets of buffers to rotate through so that together they are over twice L2: at least 2, at most 256."""
    return min(_MOST_SETS, max(2, 2 * l2_bytes // set_bytes + 1))


class Replay:
    """One graph that makes each of ``calls``, one for each set of buffers, in turn, ``rounds`` times.

    results: what each call returned, kept until the same set's next turn, so that the outputs rotate through memory as the
    inputs do. ``stream`` is the current stream.
    """

    def __init__(self, calls: Sequence[Call], stream: torch.cuda.Stream, rounds: int = 1) -> None:
        for _ in range(_WARMUPS):
            calls[0]()
        self.results: list[object] = [None] * len(calls)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            for _ in range(rounds):
                for i, call in enumerate(calls):
                    self.results[i] = call()
        for _ in range(_WARMUPS):
            self()

    def __call__(self) -> None:
        self._graph.replay()


def device_time(calls: Sequence[Call], stream: torch.cuda.Stream, norms: int = 1) -> DeviceTime:
    """Time a replay of ``calls``, one for each set of buffers, each of which computes ``norms`` norms."""
    rounds = -(-_NORMS_A_REPLAY // (norms * len(calls)))
    replay = Replay(calls, stream, rounds)
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(_REPLAYS)]
    for start, end in marks:
        start.record(stream)
        replay()
        end.record(stream)
    stream.synchronize()
    times = [start.elapsed_time(end) * 1e3 / (rounds * len(calls) * norms) for start, end in marks]
    return DeviceTime(statistics.fmean(times), statistics.stdev(times), statistics.median(times), len(times))


def host_times(calls: Sequence[Call], stream: torch.cuda.Stream) -> list[float]:
    """Median host time of each eager call: how long it keeps the CPU, whatever the device still has to do.

    The calls take turns, so that what slows the host down for a while slows all of them.
    """
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(_HOST_BLOCKS):
        for call, found in zip(calls, times, strict=True):
            stream.synchronize()
            start = time.perf_counter()
            for _ in range(_CALLS_A_BLOCK):
                call()
            found.append((time.perf_counter() - start) * 1e6 / _CALLS_A_BLOCK)
    stream.synchronize()
    return [statistics.median(found) for found in times]
