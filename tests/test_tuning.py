"""tuning/: every problem gets a launch that can serve it."""

from __future__ import annotations

import itertools
import math
from concurrent.futures import Executor
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trinorm.bench.cases import Case
from trinorm.bench.sweep import compiled
from trinorm.launch import Device
from trinorm.spec import LAYER_NORM, RMS_NORM, RowNorm
from trinorm.targets import TARGETS, occupancy
from trinorm.tuning import (
    RowBackward,
    RowBackwardFew,
    RowBackwardSplit,
    RowForward,
    RowForwardSplit,
    Tile,
    backward_turns,
    choose_backward,
    choose_forward,
    forward_turns,
)

H200 = TARGETS["sm_90"].device
# As fast, but for its memory.
H100 = replace(H200, l2=50 << 20, memory=3.35e12)
# One that has less of everything than any GPU.
SCARCE = Device(14, 16, 48 << 10, 47 << 10, 1 << 20, 1e11, dependent_launch=False, programs_wait=True)
DEVICES = [*(target.device for target in TARGETS.values()), H100, SCARCE]
specs = st.sampled_from([LAYER_NORM, RMS_NORM])
row_counts = st.integers(1, 1 << 33)
widths = st.one_of(st.integers(1, 1 << 20), st.sampled_from([1, 64, 128, 768, 4096, 8192, 12288, 16384, 16385]))
itemsizes = st.sampled_from([2, 4, 8])


def _is_a_tile(tile: Tile) -> None:
    for size in (tile.rows, tile.chunk, tile.warps):
        assert size > 0
        assert size & (size - 1) == 0, "Triton's sizes are powers of two"
    assert tile.warps <= 32


def _is_a_split(plan: RowForwardSplit | RowBackwardSplit, lanes: int, n: int, itemsize: int, device: Device) -> None:
    assert device.programs_wait
    assert itemsize <= 4, "a word holds two fp32 numbers"
    assert n % plan.block == 0
    assert plan.block % plan.tile.chunk == 0
    assert n // plan.block <= lanes, "a thread for each word"
    assert 2 * (n // plan.block) <= device.multiprocessors, "room for two teams"


@given(spec=specs, m=row_counts, n=widths, itemsize=itemsizes, device=st.sampled_from(DEVICES))
def test_forward(spec: RowNorm, m: int, n: int, itemsize: int, device: Device) -> None:
    plan = choose_forward(spec, m, n, itemsize, device)
    _is_a_tile(plan.tile)
    if isinstance(plan, RowForwardSplit):
        _is_a_split(plan, plan.lanes, n, itemsize, device)
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
    if isinstance(plan, RowBackwardSplit):
        _is_a_split(plan, plan.lanes(n), n, itemsize, device)
    partials = plan.partials(m, n, device)
    assert 1 <= partials <= m
    assert max(partials, plan.most_partials(n, device)) <= 4 * device.multiprocessors, "scratch for dw and db"
    rows, together = (plan.tile.rows, plan.tiles) if isinstance(plan, RowBackward) else (1, 1)
    if partials + plan.most_partials(n, device) <= 4 * device.multiprocessors:
        assert m <= 128 * rows * partials, "few enough to be summed one after the other"
    if partials < -(-m // (rows * together)):
        assert partials % plan.most_partials(n, device) == 0, "all who are at work at once have as much to do"
    assert plan.per_sm * plan.tile.warps <= device.warps
    if plan.stages > 1:
        program = (plan.stages - 1) * 2 * math.prod(plan.stage(n)) * itemsize + device.shared_reserved
        assert plan.per_sm * program <= device.shared, "what waits in shared memory fits there, of all programs at once"
    if isinstance(plan, RowBackward):
        assert plan.stage(n)[1] >= n, "whole rows"


@given(spec=specs, m=row_counts, n=widths.filter(lambda n: n > 2), device=st.sampled_from([H200, H100]))
def test_a_gpu_gets_what_was_measured_on_it(spec: RowNorm, m: int, n: int, device: Device) -> None:
    """bf16: no launch of the tables is cut to what there is room for. (Tiles of rows of 1 or 2 are mostly statistics.)"""
    vast = replace(device, warps=1 << 20, shared=1 << 40, shared_of_program=1 << 40)
    assert choose_backward(spec, m, n, 2, device) == choose_backward(spec, m, n, 2, vast)


@pytest.mark.parametrize(
    ("op", "n"),
    [
        ("layer_norm", 768),
        ("layer_norm", 1024),
        ("layer_norm", 3072),
        ("rms_norm", 3072),
        ("layer_norm", 5120),
        ("rms_norm", 5120),
    ],
)
def test_slower_memory_has_launches_of_its_own(op: str, n: int, compiling: Executor) -> None:
    """Whose programs have room together, and do not spill."""
    spec = {"layer_norm": LAYER_NORM, "rms_norm": RMS_NORM}[op]
    launch = choose_backward(spec, 1 << 16, n, 2, H100)
    assert isinstance(launch, RowBackward)
    assert launch != choose_backward(spec, 1 << 16, n, 2, H200)
    case = Case(op, "backward", (1 << 16, n), torch.bfloat16, torch.bfloat16)
    trial = compiling.submit(compiled, case, launch, "sm_90").result()
    assert trial.why is None
    assert trial.spills == 0
    assert trial.registers is not None
    there = occupancy(TARGETS["sm_90"], launch.tile.warps, trial.registers, 0, grid=1 << 20)
    assert there.programs >= launch.per_sm


@pytest.mark.parametrize("spec", [LAYER_NORM, RMS_NORM], ids=lambda spec: spec.name)
@pytest.mark.parametrize("n", [64, 768, 4096, 12288, 65536, 66000])
def test_programs_that_do_not_fit_together_have_fewer_stages(spec: RowNorm, n: int) -> None:
    """As many programs as on an H200, and the most stages that fit, or 1: 2 are often worse than 1."""
    for kilobytes, itemsize in itertools.product(range(48, 229), (2, 4)):
        device = replace(H200, shared=kilobytes << 10, shared_of_program=(kilobytes - 1) << 10)
        wish, plan = (choose_backward(spec, 1 << 20, n, itemsize, on) for on in (H200, device))
        assert not isinstance(wish, RowBackwardFew)
        assert plan == replace(wish, stages=plan.stages)
        rows, columns = wish.stage(n)
        waiting = 2 * rows * columns * itemsize
        # What the driver takes is certain. Statistics take up to 16 bytes a row, sums of rows less than 1 KB a program.
        least, most = (
            max((s for s in (wish.stages, 3) if wish.per_sm * ((s - 1) * stage + of_program) <= device.shared), default=1)
            for stage, of_program in ((waiting + 16 * rows, 2 << 10), (waiting, 1 << 10))
        )
        assert least <= plan.stages <= most


@pytest.mark.parametrize("device", DEVICES)
def test_what_l2_cannot_keep_streams_through_it(device: Device) -> None:
    for spec, itemsize in itertools.product((LAYER_NORM, RMS_NORM), (2, 4)):
        for tensors, choose in ((2, choose_forward), (3, choose_backward)):
            of_l2 = device.l2 // (tensors * 4096 * itemsize)  # so many rows fill it
            kept, passing = (choose(spec, m, 4096, itemsize, device) for m in (of_l2 // 2, of_l2 + 1))
            assert not getattr(kept, "stream", False)
            assert getattr(passing, "stream", True)


def test_an_h200_streams_above_32_mb() -> None:
    for choose, rows in ((choose_forward, 2048), (choose_backward, 1365)):
        at_most, above = (choose(RMS_NORM, m, 4096, 2, H200) for m in (rows, rows + 1))
        assert not at_most.stream
        assert above.stream


@pytest.mark.parametrize("spec", [LAYER_NORM, RMS_NORM], ids=lambda spec: spec.name)
@pytest.mark.parametrize("n", [64, 768, 1000, 2048, 4096, 8192, 65536])
def test_few_binaries_for_each_width(spec: RowNorm, n: int) -> None:
    """However many rows come: forward for few, as L2 holds them or not; backward for very few, few, as L2 holds them or
    not. Besides, a backward's partials are summed by one more.
    """
    counts = {1, 5, 5000, 1 << 20, 1 << 31}
    counts |= {turn + i for of in (forward_turns, backward_turns) for turn in of(n, 2, H200) for i in (-1, 0, 1)} - {0}
    assert len({choose_forward(spec, m, n, 2, H200) for m in counts}) <= 3
    assert len({choose_backward(spec, m, n, 2, H200) for m in counts}) <= 4
