"""What weight normalization's kernels compile to, with no GPU: no spill, accesses of 128 bits, registers within written
bounds, nothing that is passed through shared memory but sums; which launch rows of all lengths get.
"""

from __future__ import annotations

from concurrent.futures import Executor

import pytest
import torch
from torch import Tensor

from trinorm.inspection import Compiled, compile_call, read, recorded
from trinorm.ops.hosts import weight_rows
from trinorm.targets import TARGETS
from trinorm.tuning import choose_weight

# Registers of a thread, bf16, at the most, by the elements of a row: forward, then backward, of shared rows the sums first.
REGISTERS = {1024: (72, 96), 4608: (56, 80), 65536: (48, 40, 56, 48), (1 << 31) + 16: (48, 40, 56, 48)}


def compiled(n: int) -> list[Compiled]:
    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    v, g = meta(4096, n), meta(4096, 1)
    with recorded("sm_90") as calls:
        weight_rows.forward(0, v, g)
        weight_rows.backward(0, (True, True), v, v, g)
    return read(compile_call(call.kernel, call.args, call.options, "sm_90") for call in calls)


@pytest.mark.parametrize("n", REGISTERS)
def test_compiled(n: int, compiling: Executor) -> None:
    found = compiling.submit(compiled, n).result()
    sums = ["weight_sums"] * (n > 8192)
    assert [kernel.kernel for kernel in found] == [*sums, "weight_forward", *sums, "weight_backward"]
    for kernel, most in zip(found, REGISTERS[n], strict=True):
        assert kernel.spills == 0, kernel
        assert kernel.registers <= most, kernel
        assert max(kernel.loads, default=0) >= 128, kernel
        assert kernel.kernel == "weight_sums" or max(kernel.stores) >= 128, kernel
        assert kernel.shared <= 512, kernel


@pytest.mark.parametrize("n", [1, 3, 9, 64, 129, 768, 1152, 4608, 8192, 8193, 1 << 31])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_launches_have_all_elements(n: int, itemsize: int) -> None:
    device = TARGETS["sm_90"].device
    plans = [choose_weight(m, n, 3, itemsize, device) for m in (1, 5, 1 << 14)]
    assert len({(plan.tile, plan.parts) for plan in plans}) == 1, "a row's bits are the same beside any others"
    for m, plan in zip((1, 5, 1 << 14), plans, strict=True):
        chunks = -(-n // plan.tile.chunk)
        if plan.parts is None:
            assert n <= 8192 and chunks * plan.tile.chunk < 2 * n
            assert plan.programs(m, n) * plan.tile.rows >= m
        else:
            assert plan.tile.rows == 1 and 1 < plan.parts <= min(chunks, 512)
            assert plan.programs(m, n) == m * chunks
