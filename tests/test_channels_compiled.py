"""What the channel family's kernels compile to, with no GPU: no spill, and accesses of 128 bits in both memory orders."""

from __future__ import annotations

import itertools
from concurrent.futures import Executor
from unittest import mock

import pytest
import torch

from paths import forget_channel_choices
from trinorm.inspection import Compiled, compile_call, read, recorded
from trinorm.ops.hosts import channels
from trinorm.ops.hosts.channels import Problem
from trinorm.spec import BATCH_NORM, GROUP_NORM, INSTANCE_NORM
from trinorm.tuning import channel as tuning

# Statistics that a program reads twice, that a team holds, and that a program holds.
PROBLEMS = (
    (Problem(GROUP_NORM, 32, 1e-5, "silu"), (16, 256, 56, 56)),
    (Problem(BATCH_NORM, 256, 1e-5), (16, 256, 56, 56)),
    (Problem(GROUP_NORM, 64, 1e-5), (32, 256, 16, 16)),
    (Problem(INSTANCE_NORM, 256, 1e-5), (16, 256, 32, 32)),
)
# Channels last; and whole, or in slabs.
WAYS = (False, True), (False, False), (True, False)
WRITING = {
    *("channel_apply", "channel_apply_backward", "channel_forward", "channel_backward"),
    *("held_forward", "held_backward"),
}
OF_TEAMS = {"split_forward", "split_backward"}
READING = {"channel_moments", "channel_sums", *WRITING, *OF_TEAMS}
COMBINING = {"channel_combine", "channel_combine_backward"}

# As in test_inspection.py: one value, which ptxas parks to keep within the registers that it is given.
SPILLED_VALUE = 8


def compiled(target: str) -> list[Compiled]:
    with recorded(target) as calls:
        for (problem, shape), (last, whole) in itertools.product(PROBLEMS, WAYS):
            if (not whole and problem is not PROBLEMS[0][0]) or (target == "sm_80" and problem is PROBLEMS[1][0]):
                continue
            x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
            x = x.to(memory_format=torch.channels_last) if last else x
            w = torch.empty(256, dtype=torch.bfloat16, device="meta")
            with (
                mock.patch.object(tuning, "_LEAST_SHARE", 2 if whole else 0),
                mock.patch.object(tuning, "_SPLIT", tuning._SPLIT if whole else (*tuning._SPLIT[:3], 1 << 60)),
            ):
                forget_channel_choices()
                _, mean, rstd = channels.forward(problem, x, w, w)
                assert mean is not None and rstd is not None
                channels.backward(problem, torch.empty_like(x), x, w, w, mean, rstd, dx=True, dw=w.dtype, db=w.dtype)
                forget_channel_choices()
        # An evaluation: of given statistics, whose root and quotient are rounded by other instructions.
        x = torch.empty(PROBLEMS[1][1], dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
        w, given = torch.empty(256, dtype=torch.bfloat16, device="meta"), torch.empty(256, device="meta")
        channels.apply(PROBLEMS[1][0]._replace(given=True), x, w, w, given, given)
    return read(compile_call(call.kernel, call.args, call.options, target) for call in calls)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_compiled(target: str, compiling: Executor) -> None:
    found = compiling.submit(compiled, target).result()
    of_teams = {*OF_TEAMS, "forget_words"} if target == "sm_90" else set()
    assert {kernel.kernel for kernel in found} == WRITING | READING - OF_TEAMS | COMBINING | of_teams
    for kernel in found:
        assert kernel.spills <= (SPILLED_VALUE if kernel.kernel in OF_TEAMS else 0), kernel
        if kernel.kernel in READING:
            assert max(kernel.loads) == 128, kernel
        if kernel.kernel in WRITING | OF_TEAMS:
            assert max(kernel.stores) == 128, kernel
