"""What the kernels of LayerNorm over channels compile to, with no GPU: no spill, and accesses of 128 bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

# In a process of its own: where there is no GPU, this one interprets the kernels.
SCRIPT = """
import json, sys, torch
from trinorm.inspection import compile_call, read
from trinorm.ops import channel_layers, rows
from trinorm.targets import TARGETS

target, calls = sys.argv[1], []
for module in (channel_layers, rows):
    module.launch = lambda kernel, grid, device, args, options: calls.append((kernel, args, options))
    module.describe = lambda device: TARGETS[target].device
for shape in ((32, 96, 56, 56), (64, 768, 16, 16), (4, 4500, 32, 32)):
    x, w = (torch.empty(size, dtype=torch.bfloat16, device="meta") for size in (shape, shape[1]))
    _, mean, rstd = channel_layers.forward(x, w, w, 1e-6, save=True)
    channel_layers.backward(torch.empty_like(x), x, w, mean, rstd, dx=True, dw=w.dtype, db=w.dtype)
own = [call for call in calls if call[0].fn.__name__ != "sum_partials"]  # the row family's
for found in read(compile_call(*call, target) for call in own):
    print(json.dumps(dict(
        kernel=found.kernel, spills=found.spills, loads=max(found.loads), stores=max(found.stores)
    )))
"""


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_compiled(target: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    ran = subprocess.run([sys.executable, "-c", SCRIPT, target], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found: list[dict[str, Any]] = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(found) == 2 + 2 + 3
    for kernel in found:
        assert not kernel["spills"], kernel
        assert kernel["loads"] == 128, kernel
        if kernel["kernel"] != "channel_layer_moments":  # few numbers
            assert kernel["stores"] == 128, kernel
