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
# A replay holds at least so many calls, so that what comes before its first kernel (about 1 µs) does not show.
_CALLS_A_REPLAY = 32
_MOST_SETS = 256

_HOST_BLOCKS = 30
# So few that the device's queue never fills: a full queue would make the host wait for the device.
_CALLS_A_BLOCK = 20


@dataclass(frozen=True)
class DeviceTime:
    """Device time of one call in microseconds, over ``replays`` replays of one graph."""

    mean: float
    std: float
    median: float
    replays: int


def sets_past_l2(set_bytes: int, l2_bytes: int) -> int:
    """How many sets of buffers to rotate through so that together they are over twice L2: at least 2, at most 256."""
    return min(_MOST_SETS, max(2, 2 * l2_bytes // set_bytes + 1))


def device_time(calls: Sequence[Call], stream: torch.cuda.Stream) -> DeviceTime:
    """Time one graph that makes each of ``calls``, one for each set of buffers, in turn.

    What the calls return is kept until the same set's next turn, so the outputs rotate through memory as the inputs do.
    ``stream`` is the current stream.
    """
    for _ in range(_WARMUPS):
        calls[0]()
    rounds = -(-_CALLS_A_REPLAY // len(calls))
    alive: list[object] = [None] * len(calls)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            for i, call in enumerate(calls):
                alive[i] = call()
    for _ in range(_WARMUPS):
        graph.replay()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(_REPLAYS)]
    for start, end in marks:
        start.record(stream)
        graph.replay()
        end.record(stream)
    stream.synchronize()
    times = [start.elapsed_time(end) * 1e3 / (rounds * len(calls)) for start, end in marks]
    return DeviceTime(statistics.fmean(times), statistics.stdev(times), statistics.median(times), len(times))


def host_time(call: Call, stream: torch.cuda.Stream) -> float:
    """Median host time of one eager ``call``: how long it keeps the CPU, whatever the device still has to do."""
    times = []
    for _ in range(_HOST_BLOCKS):
        stream.synchronize()
        start = time.perf_counter()
        for _ in range(_CALLS_A_BLOCK):
            call()
        times.append((time.perf_counter() - start) * 1e6 / _CALLS_A_BLOCK)
    stream.synchronize()
    return statistics.median(times)
