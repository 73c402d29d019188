"""What the channel family's kernels compile to, with no GPU: no spill, and accesses of 128 bits in both memory orders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

# In a process of its own: where there is no GPU, this one interprets the kernels.
SCRIPT = """
import itertools, json, sys, torch
from trinorm.inspection import compile_call, read
from trinorm.launch import describe
from trinorm.ops import channels
from trinorm.ops.channels import Problem
from trinorm.spec import BATCH_NORM, GROUP_NORM, INSTANCE_NORM
from trinorm.tuning import channel as tuning

calls, binaries = [], []
channels.launch = lambda kernel, grid, device, args, options: calls.append((kernel, args, options))
channels.describe = lambda device: describe(torch.device("meta"))
problems = (
    (Problem(GROUP_NORM, 32, 1e-5, "silu"), (16, 256, 56, 56)),
    (Problem(BATCH_NORM, 256, 1e-5), (16, 256, 56, 56)),
    (Problem(GROUP_NORM, 64, 1e-5), (32, 256, 16, 16)),
    (Problem(INSTANCE_NORM, 256, 1e-5), (16, 256, 32, 32)),
)
ways = (False, True), (False, False), (True, False)
for (problem, shape), (last, whole) in itertools.product(problems, ways):
    if not whole and problem is not problems[0][0] or sys.argv[1] != "sm_90" and problem is problems[1][0]:
        continue
    tuning._LEAST_SHARE = 2 if whole else 0
    for choose in (tuning.choose_whole, tuning._walk, tuning._tile):
        choose.cache_clear()
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    x = x.to(memory_format=torch.channels_last) if last else x
    w = torch.empty(256, dtype=torch.bfloat16, device="meta")
    calls.clear()
    y, mean, rstd = channels.forward(problem, x, w, w)
    channels.backward(problem, torch.empty_like(x), x, w, w, mean, rstd, dx=True, dw=w.dtype, db=w.dtype)
    for kernel, args, options in calls:
        if sys.argv[1] != "sm_90":
            options.pop("launch_pdl")
            options["PDL"] = False
        binaries.append(compile_call(kernel, args, options, sys.argv[1]))
for found in read(binaries):
    print(json.dumps(dict(
        kernel=found.kernel, spills=found.spills, loads=max(found.loads), stores=max(found.stores)
    )))
"""
WRITING = (
    *("channel_apply", "channel_apply_backward", "channel_forward", "channel_backward"),
    *("held_forward", "held_backward"),
)
READING = ("channel_moments", "channel_sums", *WRITING)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_compiled(target: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    ran = subprocess.run([sys.executable, "-c", SCRIPT, target], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found: list[dict[str, Any]] = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(found) == 2 * 6 + 3 + 3 + 3 + (2 if target == "sm_90" else 0)
    for kernel in found:
        assert not kernel["spills"], kernel
        if kernel["kernel"] in READING:
            assert kernel["loads"] == 128, kernel
        if kernel["kernel"] in WRITING:
            assert kernel["stores"] == 128, kernel
