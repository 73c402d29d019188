"""What QK-norm's kernels compile to, with no GPU: no spill, accesses of 128 bits, registers within written bounds; how many
programs share the work.
"""

from __future__ import annotations

from concurrent.futures import Executor
from unittest import mock

import pytest
import torch

from trinorm.inspection import Compiled, compile_call, read
from trinorm.ops.hosts import heads, rows
from trinorm.spec import RMS_NORM
from trinorm.targets import TARGETS, occupancy
from trinorm.tuning import choose_heads_backward, choose_heads_forward

# Registers of a thread: (forward, backward) by the elements of a head, bf16, all turned.
REGISTERS = {64: (96, 128), 128: (96, 128), 256: (96, 128)}


def compiled(target: str, size: int, turned: int, interleaved: bool) -> list[Compiled]:
    """The forward's and the backward's kernel of a packed projection of 32 query heads and 8 key heads."""
    calls = []
    as_there = dict(launch=lambda kernel, grid, device, *call: calls.append((kernel, *call)))
    as_there["describe"] = lambda device: TARGETS[target].device
    with mock.patch.multiple(heads, **as_there), mock.patch.multiple(rows, **as_there):
        packed = torch.empty(4, 4096, 48, size, dtype=torch.bfloat16, device="meta")
        weight = torch.empty(size, dtype=torch.bfloat16, device="meta")
        angles = torch.empty(4096, turned, device="meta") if turned else None
        query, key, _ = (heads.Side(t, weight) for t in packed.split((32, 8, 8), -2))
        rotation = heads.Rotation(angles, angles, interleaved)
        *ys, query_rstd, key_rstd = heads.forward(RMS_NORM, query, key, 1e-6, rotation, save=True)
        wanted = (heads.Wanted(y, rstd, True, True) for y, rstd in zip(ys, (query_rstd, key_rstd), strict=True))
        heads.backward(RMS_NORM, query, key, *wanted, rotation)
    return read(compile_call(*call, target) for call in calls if call[0].__name__ != "sum_partials")


CASES = [("sm_80", 128, 128, False), ("gfx942", 128, 128, False), ("sm_90", 80, 32, False), ("sm_90", 128, 0, False)]
SIZES = REGISTERS if torch.cuda.is_available() else (128,)
CASES += [("sm_90", size, size, interleaved) for size in SIZES for interleaved in (False, True)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled(case: tuple[str, int, int, bool], compiling: Executor) -> None:
    target, size, *_ = case
    found = compiling.submit(compiled, *case).result()
    assert [kernel.kernel for kernel in found] == ["heads_forward", "heads_backward"]
    for kernel, most in zip(found, REGISTERS.get(size, (96, 128)), strict=True):
        assert kernel.spills <= 8, kernel  # one value, which ptxas parks at a step of occupancy
        assert target == "gfx942" or kernel.registers <= most, kernel
        # Statistics are in fp32, one for each head, and so are sums over rows.
        of_statistics = 2 * (8 if kernel.kernel == "heads_forward" else 4) + 2
        for widths in (kernel.loads, kernel.stores):
            assert max(widths) >= (64 if target == "gfx942" else 128), kernel  # of a tile's 1024 elements by 256 lanes
            assert size % 8 or sum(count for width, count in widths.items() if width < 64) <= of_statistics, kernel
    backward = found[1]
    there = occupancy(TARGETS[target], backward.warps, backward.registers, backward.shared, grid=1 << 20)
    plan = choose_heads_backward(1 << 14, (32, 8), size, 2, TARGETS[target].device)
    assert target == "gfx942" or there.programs >= plan.per_sm, "all persistent programs are at work at once"


@pytest.mark.parametrize("size", [1, 2, 3, 64, 80, 128, 1024])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("of", [(32, 8), (7, 7), (5, 1), (12, 4)], ids=str)
def test_launches_have_all_heads_of_all_tokens(size: int, itemsize: int, of: tuple[int, int]) -> None:
    device, tiles = TARGETS["sm_90"].device, set()
    for tokens in (1, 100, 1 << 14):
        forward = choose_heads_forward(tokens, of, size, itemsize, device)
        backward = choose_heads_backward(tokens, of, size, itemsize, device)
        tiles.add((forward.tile, backward.tile))
        assert len(tiles) == 1, "whatever the number of tokens, so that a row's bits are the same"
        for plan in (forward, backward):
            assert size <= plan.tile.chunk < 2 * size
            assert plan.tile.rows & (plan.tile.rows - 1) == 0 < plan.tile.rows
            for heads_ in of:
                assert heads_ % plan.together(heads_) == 0
                assert plan.turns(tokens, heads_) * plan.tile.rows * plan.together(heads_) >= tokens * heads_
        for sides in (of, of[:1]):
            programs = backward.partials(tokens, sides, device)
            assert 1 <= programs <= max(backward.turns(tokens, n) for n in sides)
            assert programs == backward.most_partials(device) or tokens < 1 << 14
    few, many = (choose_heads_forward(tokens, (32, 8), 128, 2, device).heads for tokens in (1, 1 << 14))
    assert few == 1 < many
