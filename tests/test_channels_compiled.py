"""What the channel family's kernels compile to, with no GPU: no spill, and accesses of 128 bits in both memory orders."""

from __future__ import annotations

import itertools
from concurrent.futures import Executor
from unittest import mock

import pytest
import torch

from trinorm.inspection import Compiled, compile_call, read
from trinorm.launch import describe
from trinorm.ops import channels
from trinorm.ops.channels import Problem
from trinorm.spec import BATCH_NORM, GROUP_NORM, INSTANCE_NORM
from trinorm.tuning import channel as tuning

PROBLEMS = (
    (Problem(GROUP_NORM, 32, 1e-5, "silu"), (16, 256, 56, 56)),
    (Problem(BATCH_NORM, 256, 1e-5), (16, 256, 56, 56)),
    (Problem(GROUP_NORM, 64, 1e-5), (32, 256, 16, 16)),
    (Problem(INSTANCE_NORM, 256, 1e-5), (16, 256, 32, 32)),
)
WAYS = (False, True), (False, False), (True, False)
WRITING = (
    *("channel_apply", "channel_apply_backward", "channel_forward", "channel_backward"),
    *("held_forward", "held_backward"),
)
READING = ("channel_moments", "channel_sums", *WRITING)


def compiled(target: str) -> list[Compiled]:
    calls = []
    for (problem, shape), (last, whole) in itertools.product(PROBLEMS, WAYS):
        if (not whole and problem is not PROBLEMS[0][0]) or (target != "sm_90" and problem is PROBLEMS[1][0]):
            continue
        x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        x = x.to(memory_format=torch.channels_last) if last else x
        w = torch.empty(256, dtype=torch.bfloat16, device="meta")
        with (
            mock.patch.object(channels, "launch", lambda kernel, grid, device, *call: calls.append((kernel, *call))),
            mock.patch.object(channels, "describe", return_value=describe(torch.device("meta"))),
            mock.patch.object(tuning, "_LEAST_SHARE", 2 if whole else 0),
        ):
            forget()
            _, mean, rstd = channels.forward(problem, x, w, w)
            channels.backward(problem, torch.empty_like(x), x, w, w, mean, rstd, dx=True, dw=w.dtype, db=w.dtype)
            forget()
    if target != "sm_90":
        for _, _, options in calls:
            options.pop("launch_pdl")
            options["PDL"] = False
    return read(compile_call(*call, target) for call in calls)


def forget() -> None:
    """What was chosen with another _LEAST_SHARE."""
    for choose in (tuning.choose_whole, tuning._walk, tuning._tile):
        choose.cache_clear()


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_compiled(target: str, compiling: Executor) -> None:
    found = compiling.submit(compiled, target).result()
    assert len(found) == 2 * 6 + 3 + 3 + 3 + (2 if target == "sm_90" else 0)
    for kernel in found:
        assert not kernel.spills, kernel
        if kernel.kernel in READING:
            assert max(kernel.loads) == 128, kernel
        if kernel.kernel in WRITING:
            assert max(kernel.stores) == 128, kernel
