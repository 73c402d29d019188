"""Programs that are on the device before the kernel ahead of them has ended, and programs that wait for each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from trinorm import functional
from trinorm.forced import forced
from trinorm.ops.hosts import rows
from trinorm.spec import LAYER_NORM
from trinorm.tuning import RowBackwardSplit, RowForwardSplit, Tile

ON_GPU = torch.cuda.is_available()
EARLY = ON_GPU and rows.describe(torch.device("cuda", 0)).dependent_launch
pytestmark = pytest.mark.skipif(not ON_GPU, reason="only a GPU runs kernels side by side")

LINKS = 32


def _steps(m: int, n: int) -> Callable[[Callable[[], None]], list[torch.Tensor]]:
    """Forwards and backwards, each of what the one before it wrote, the weight among it.

    Intermediates are let go at once, so that a later kernel writes where an earlier one may still read.
    """
    torch.manual_seed(0)
    first = torch.randn(m, n, device="cuda").bfloat16()
    start = torch.randn(n, device="cuda").bfloat16()

    def run(between: Callable[[], None]) -> list[torch.Tensor]:
        x, weight, seen = first.clone(), start.clone(), []
        for _ in range(LINKS):
            y = functional.rms_norm(x, (n,), weight, 1e-6)
            between()
            x = functional.layer_norm(y, (n,), weight)
            between()
            _, mean, rstd = rows.forward(LAYER_NORM, x, 1, weight, None, 1e-5, save=True)
            between()
            assert rstd is not None
            dx, dw, _ = rows.backward(LAYER_NORM, y, x, 1, weight, mean, rstd, dx=True, dw=weight.dtype, db=None)
            between()
            assert dx is not None
            assert dw is not None
            weight.add_(dw, alpha=1e-3).clamp_(-2, 2)
            between()
            x = dx
            seen.append(dw)
        return [*seen, x, weight]

    return run


SHAPES = [(4, 4096), (128, 768), (300, 1024), (2048, 1024), (1000, 8192), (64, 32768)]


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_a_kernel_waits_for_the_ones_before_it(m: int, n: int) -> None:
    """Back to back, eagerly and in a graph, the bits are those of the same steps one by one."""
    run = _steps(m, n)
    expected = run(torch.cuda.synchronize)
    for _ in range(3):
        for got, want in zip(run(lambda: None), expected, strict=True):
            assert torch.equal(got, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(lambda: None)
    for _ in range(10):
        graph.replay()
        for got, want in zip(captured, expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.skipif(not EARLY, reason="needs programmatic dependent launch (sm_90)")
def test_kernels_that_did_not_wait_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain with the wait left out of every second norm, of few rows: all programs of two norms have room at once."""
    actual, count = rows.launch, iter(range(1 << 20))

    def launch(kernel: Any, grid: Any, device: Any, args: Any, options: dict[str, Any]) -> None:
        actual(kernel, grid, device, args, options | dict(PDL=False) if next(count) % 2 else options)

    def chain(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        for weight in weights:
            x, *_ = rows.forward(LAYER_NORM, x, 1, weight, None, 1e-5, save=False)
        return x

    found = []
    for m, n in ((64, 16384), (132, 8192), (132, 16384), (264, 4096)):
        x = torch.randn(m, n, device="cuda").bfloat16()
        weights = torch.randn(LINKS, n, device="cuda").bfloat16()  # else each norm would find what it is about to make
        expected = chain(x, weights)
        with monkeypatch.context() as patch:
            patch.setattr(rows, "launch", launch)
            chain(x, weights)  # compiles
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = chain(x, weights)
            graph.replay()
        found.append(torch.equal(captured, expected))
    assert not all(found), "each kernel found what the one before it wrote, unasked"


def test_teams_of_several_streams_do_not_wait_for_each_other_forever() -> None:
    """Kernels whose programs wait, on more streams than the device has room for at once."""
    forward = RowForwardSplit(Tile(1, 512, 4), 1024)
    backward = RowBackwardSplit(Tile(1, 512, 4), 1024, stages=3, per_sm=4)
    x, dy = (torch.randn(400, 65536, device="cuda").bfloat16() for _ in range(2))
    streams = [torch.cuda.Stream() for _ in range(8)]
    results = []
    with forced(forward=forward, backward=backward):
        torch.cuda.synchronize()
        for stream in streams:
            with torch.cuda.stream(stream):
                y, mean, rstd = rows.forward(LAYER_NORM, x, 1, None, None, 1e-5, save=True)
                assert rstd is not None
                dx, _, _ = rows.backward(LAYER_NORM, dy, x, 1, None, mean, rstd, dx=True, dw=None, db=None)
                results.append((y, dx))
        torch.cuda.synchronize()
    for y, dx in results[1:]:
        assert torch.equal(y, results[0][0])
        assert dx is not None
        assert results[0][1] is not None
        assert torch.equal(dx, results[0][1])
