"""What DyT's, Derf's and PolyNorm's kernels compile to, with no GPU: no spill, accesses of 128 bits, registers within
written bounds; how programs share the work.
"""

from __future__ import annotations

from concurrent.futures import Executor

import pytest
import torch
from torch import Tensor

from trinorm.inspection import Compiled, compile_call, read, recorded
from trinorm.ops.hosts import dynamic_rows, poly_rows
from trinorm.spec import DYNAMIC_NORMS
from trinorm.targets import TARGETS, occupancy
from trinorm.tuning import (
    choose_dynamic_backward,
    choose_dynamic_forward,
    choose_poly_backward,
    choose_poly_forward,
    programs_of_a_chunk,
)

# Registers of a thread: (forward, backward), bf16, at the most. (Triton 3.6 takes 72 and 127 where 3.7.1 takes 64 and 96.)
DYNAMIC, POLY = (72, 96), {1152: (64, 128), 8192: (64, 128)}


def compiled(target: str, kind: str, n: int) -> list[Compiled]:
    """The forward's and the backward's kernel of 16384 rows."""

    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    x = meta(16384, n)
    with recorded(target) as calls:
        if kind == "poly_norm":
            poly_rows.forward(1e-6, x, meta(3), meta(1))
            poly_rows.backward(1e-6, (True,) * 3, x, x, meta(3), meta(1))
        else:
            spec = next(spec for spec in DYNAMIC_NORMS if spec.name == kind)
            inputs = dynamic_rows.Inputs(x, meta(1), meta(1) if spec.shifted else None, meta(n), meta(n))
            dynamic_rows.forward(spec, 1, inputs)
            dynamic_rows.backward(spec, 1, inputs, x, (True,) * 5)
    there = [call for call in calls if not call.kernel.__name__.startswith("sum_")]
    return read(compile_call(call.kernel, call.args, call.options, target) for call in there)


@pytest.mark.parametrize(
    "case",
    [
        ("sm_90", "dynamic_tanh", 1024),
        ("sm_90", "dynamic_erf", 4096),
        *(("sm_90", "poly_norm", n) for n in POLY),
        ("gfx942", "dynamic_tanh", 64),
    ],
    ids=str,
)
def test_compiled(case: tuple[str, str, int], compiling: Executor) -> None:
    target, kind, n = case
    found = compiling.submit(compiled, *case).result()
    family = "poly" if kind == "poly_norm" else "dynamic"
    assert [kernel.kernel for kernel in found] == [f"{family}_forward", f"{family}_backward"]
    for kernel, most in zip(found, POLY[n] if family == "poly" else DYNAMIC, strict=True):
        assert kernel.spills == 0, kernel
        assert target == "gfx942" or kernel.registers <= most, kernel
        assert target == "gfx942" or max(kernel.loads) >= 128, kernel
        assert target == "gfx942" or max(kernel.stores) >= 128, kernel
    if target == "sm_90":
        backward, choose = found[1], choose_poly_backward if family == "poly" else choose_dynamic_backward
        there = occupancy(TARGETS[target], backward.warps, backward.registers, backward.shared, grid=1 << 20)
        plan = choose(16384, n, 2, TARGETS[target].device)
        assert there.programs >= plan.per_sm, "all persistent programs are at work at once"


@pytest.mark.parametrize("n", [1, 3, 64, 80, 129, 768, 1000, 1152, 8192, 262144])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_launches_have_all_rows(n: int, itemsize: int) -> None:
    device = TARGETS["sm_90"].device
    for m in (1, 5, 100, 1 << 14):
        forward, backward = (choose(m, n, itemsize, device) for choose in (choose_dynamic_forward, choose_dynamic_backward))
        for plan in (forward, backward):
            assert plan.tile.rows & (plan.tile.rows - 1) == 0 < plan.tile.rows < 2 * m
            assert plan.tile.chunk & (plan.tile.chunk - 1) == 0
            assert -(-n // plan.tile.chunk) * plan.tile.chunk < n * 2
        programs = programs_of_a_chunk(backward, m, n, device)
        assert 1 <= programs <= -(-m // backward.tile.rows)
        # Each lane's sum stays short, as long as scratch has room for the partials.
        assert m <= programs * backward.tile.rows * 128 or programs >= 4 * device.multiprocessors
    if n <= 2048 or (n <= 8192 and itemsize < 8):
        for poly in (choose_poly_forward, choose_poly_backward):
            assert len({poly(m, n, itemsize, device).tile for m in (1, 100, 1 << 14)}) == 1
