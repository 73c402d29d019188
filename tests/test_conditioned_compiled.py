"""What conditioned norms' kernels compile to, with no GPU: no spill, accesses of 128 bits, registers within written bounds;
how programs share the work.
"""

from __future__ import annotations

from concurrent.futures import Executor

import pytest
import torch
from torch import Tensor

from trinorm.inspection import Compiled, compile_call, read, recorded
from trinorm.ops.hosts import conditioned_rows
from trinorm.ops.problems.conditioned import Conditioned
from trinorm.spec import LAYER_NORM, RMS_NORM, ConditionedNorm
from trinorm.targets import TARGETS, occupancy
from trinorm.tuning import choose_conditioned_backward, choose_conditioned_forward, programs_of_a_set

# What models have: adaLN's modulation of each sample, gates behind and before the norm, and heads.
KINDS = {
    "adaLN": ConditionedNorm(LAYER_NORM, modulated=True),
    "norm first": ConditionedNorm(RMS_NORM, "silu"),
    "gate first": ConditionedNorm(RMS_NORM, "silu", gate_first=True),
    "heads": ConditionedNorm(RMS_NORM),
}
# Of the L2 norm, which has no weight, and of a part of a row that ends within a chunk.
RELATIVES = {"L2": ConditionedNorm(RMS_NORM, divisor=1), "partial": ConditionedNorm(RMS_NORM, counted=188, divisor=188)}

# Registers of a thread: (forward, backward) by the elements of a row, bf16, at the most of KINDS; of rows that no program
# holds, by the kernel: forward, the inputs' gradients, the parameters'.
REGISTERS = {64: (48, 128), 128: (48, 128), 1024: (96, 96), 3072: (80, 168), 4096: (80, 128)}
WIDE = {
    "conditioned_forward_wide": 64,
    "conditioned_inputs_backward_wide": 80,
    "conditioned_parameters_backward_wide": 64,
}


def compiled(
    target: str,
    kind: str,
    n: int,
    asked: tuple[bool, ...] = (True, True, True, True),
    dtype: torch.dtype = torch.bfloat16,
) -> list[Compiled]:
    """The forward's and the backward's kernel of 4 samples of 4096 rows."""

    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    spec, x = (KINDS | RELATIVES)[kind], meta(4, 4096, n)
    gate = None if spec.gate is None else meta(4, 4096, n)
    weight = meta(4, 1, n) if spec.modulated else meta(n) if spec.gate or kind in RELATIVES else meta(4096, n)
    inputs = conditioned_rows.Inputs(x, gate, None if kind == "L2" else weight, weight if spec.modulated else None)
    problem = Conditioned(spec, 1, n, 1e-6, dtype)
    wanted = tuple(want and t is not None for want, t in zip(asked, inputs, strict=True))
    with recorded(target) as calls:
        y, mean, rstd = conditioned_rows.forward(problem, inputs, save=True)
        assert y is not None and rstd is not None
        conditioned_rows.backward(problem, inputs, y, mean, rstd, wanted)
    there = [call for call in calls if call.kernel.__name__ != "sum_partials"]
    return read(compile_call(call.kernel, call.args, call.options, target) for call in there)


CASES = [("sm_80", "adaLN", 1024), ("gfx942", "gate first", 1024), ("sm_90", "norm first", 80), ("sm_90", "heads", 128)]
CASES += [("sm_90", kind, n) for n in REGISTERS for kind in ("adaLN", "norm first")] + [("sm_90", "gate first", 4096)]
CASES += [("sm_90", "L2", 128), ("sm_90", "partial", 3072)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled(case: tuple[str, str, int], compiling: Executor) -> None:
    target, kind, n = case
    found = compiling.submit(compiled, *case).result()
    assert [kernel.kernel for kernel in found] == ["conditioned_forward", "conditioned_backward"]
    for kernel, most in zip(found, REGISTERS.get(n, (48, 128)), strict=True):
        assert kernel.spills == 0, kernel
        assert target == "gfx942" or kernel.registers <= most, kernel
        assert target == "gfx942" or max(kernel.loads) >= 128, kernel
        assert target == "gfx942" or max(kernel.stores) >= 64, kernel
    backward, spec = found[1], (KINDS | RELATIVES)[kind]
    there = occupancy(TARGETS[target], backward.warps, backward.registers, backward.shared, grid=1 << 20)
    plan = choose_conditioned_backward(4096, 4, n, 2, TARGETS[target].device, spec.gate is not None, False)
    assert target != "sm_90" or there.programs >= plan.per_sm, "all persistent programs are at work at once"


@pytest.mark.parametrize(("n", "dtype"), [(1025, torch.bfloat16), (1152, torch.float16), (1152, torch.float32)], ids=str)
def test_a_tile_of_1152_columns_does_not_spill(n: int, dtype: torch.dtype, compiling: Executor) -> None:
    for kernel in compiling.submit(compiled, "sm_90", "adaLN", n, dtype=dtype).result():
        assert kernel.spills == 0, kernel


WIDE_CASES = [("sm_80", "adaLN", 65536), ("gfx942", "gate first", 16384), ("sm_90", "partial", 10000)]
WIDE_CASES += [("sm_90", kind, 16384) for kind in KINDS]


@pytest.mark.parametrize("case", WIDE_CASES, ids=str)
def test_compiled_for_rows_that_no_program_holds(case: tuple[str, str, int], compiling: Executor) -> None:
    target, kind, _ = case
    found = compiling.submit(compiled, *case).result()
    assert [kernel.kernel for kernel in found] == list(WIDE)
    for kernel in found:
        assert kernel.spills == 0, kernel
        assert target != "sm_90" or kernel.registers <= WIDE[kernel.kernel], kernel
        assert target == "gfx942" or min(max(kernel.loads), max(kernel.stores)) >= 128, kernel
    summing, spec = found[2], (KINDS | RELATIVES)[kind]
    there = occupancy(TARGETS[target], summing.warps, summing.registers, summing.shared, grid=1 << 20)
    plan = choose_conditioned_backward(4096, 4, 16384, 2, TARGETS[target].device, spec.gate is not None, False)
    assert target == "gfx942" or there.programs >= plan.per_sm, "all persistent programs are at work at once"


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_is_not_asked_for_compiles_too(kind: str, compiling: Executor) -> None:
    for asked in ((True, False, False, False), (False, True, False, False), (False, False, True, False)):
        if asked[1] and KINDS[kind].gate is None:
            continue
        whole, part = (compiling.submit(compiled, "sm_90", kind, 128, of).result()[1] for of in ((True,) * 4, asked))
        assert sum(part.instructions.values()) < sum(whole.instructions.values())


@pytest.mark.parametrize("n", [1, 3, 64, 80, 128, 768, 1000, 3072, 8192, 8193, 65536, 1 << 20])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("sets", [1, 8, 300, 1 << 16])
def test_launches_have_all_rows(n: int, itemsize: int, gated: bool, sets: int) -> None:
    device = TARGETS["sm_90"].device
    for members in (1, 5, 100, 1 << 14):
        forward = choose_conditioned_forward(members * sets, n, itemsize, device)
        backward = choose_conditioned_backward(members, sets, n, itemsize, device, gated, False)
        for plan in (forward, backward):
            assert plan.tile.rows & (plan.tile.rows - 1) == 0 < plan.tile.rows
            assert plan.tile.chunk & (plan.tile.chunk - 1) == 0
        assert backward.tile.rows < 2 * members, "no more lanes than rows"
        programs = programs_of_a_set(backward, members, sets, n, device)
        assert 1 <= programs <= -(-members // backward.tile.rows)
        # Each lane's sum stays short, as long as scratch has room for the partials.
        assert members <= programs * backward.tile.rows * 128 or programs >= 4 * device.multiprocessors
    fixed = {choose_conditioned_backward(m, 1, n, itemsize, device, gated, True).tile for m in (1, 100, 1 << 14)}
    assert len(fixed) == 1
