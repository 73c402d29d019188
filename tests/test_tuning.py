"""tuning/: every problem gets a launch that can serve it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trinorm.launch import Device
from trinorm.spec import LAYER_NORM, RMS_NORM, RowNorm
from trinorm.tuning import RowBackward, RowBackwardFew, RowForward, Tile, choose_backward, choose_forward

DEVICES = [Device(132, 227 << 10), Device(108, 163 << 10), Device(84, 99 << 10), Device(304, 64 << 10)]
specs = st.sampled_from([LAYER_NORM, RMS_NORM])
row_counts = st.integers(1, 1 << 33)
widths = st.one_of(st.integers(1, 1 << 20), st.sampled_from([1, 64, 128, 768, 4096, 8192, 12288, 16384, 16385]))
itemsizes = st.sampled_from([2, 4, 8])


def _is_a_tile(tile: Tile) -> None:
    for size in (tile.rows, tile.chunk, tile.warps):
        assert size > 0
        assert size & (size - 1) == 0, "Triton's sizes are powers of two"
    assert tile.warps <= 32


@given(spec=specs, m=row_counts, n=widths, itemsize=itemsizes)
def test_forward(spec: RowNorm, m: int, n: int, itemsize: int) -> None:
    plan = choose_forward(spec, m, n, itemsize)
    _is_a_tile(plan.tile)
    if isinstance(plan, RowForward):
        assert n * itemsize <= 64 << 10
        assert plan.tile.chunk < 2 * n or plan.tile.chunk == 1, "no chunk is twice as wide as its row"


@given(spec=specs, m=row_counts, n=widths, itemsize=itemsizes, device=st.sampled_from(DEVICES))
def test_backward(spec: RowNorm, m: int, n: int, itemsize: int, device: Device) -> None:
    plan = choose_backward(spec, m, n, itemsize, device)
    _is_a_tile(plan.tile)
    if isinstance(plan, RowBackwardFew):
        _is_a_tile(plan.sums)
        return
    programs = plan.programs(m, n, device)
    assert 1 <= programs <= min(m, 4 * device.multiprocessors)
    if isinstance(plan, RowBackward) and plan.stages > 1:
        staged = 2 * (plan.stages - 1) * plan.tile.rows * n * itemsize
        assert staged <= device.shared_memory, "what waits in shared memory fits there"


@pytest.mark.parametrize("spec", [LAYER_NORM, RMS_NORM], ids=lambda spec: spec.name)
@pytest.mark.parametrize("n", [64, 768, 1000, 4096, 8192, 65536])
def test_few_binaries_for_each_width(spec: RowNorm, n: int) -> None:
    """However many rows come: forward as L2 holds them or not; backward for very few, few, as L2 holds them or not."""
    counts = [1, 5, 64, 65, 128, 512, 513, 5000, 1 << 20, 1 << 31]
    assert len({choose_forward(spec, m, n, 2) for m in counts}) <= 2
    assert len({choose_backward(spec, m, n, 2, DEVICES[0]) for m in counts}) <= 4
