"""What the kernels of LayerNorm over channels compile to, with no GPU: no spill, and accesses of 128 bits."""

from __future__ import annotations

from concurrent.futures import Executor
from unittest import mock

import pytest
import torch

from trinorm.inspection import Compiled, compile_call, read
from trinorm.ops.hosts import channel_layers, rows
from trinorm.targets import TARGETS


def compiled(target: str) -> list[Compiled]:
    calls = []
    as_there = dict(launch=lambda kernel, grid, device, *call: calls.append((kernel, *call)))
    as_there["describe"] = lambda device: TARGETS[target].device
    with mock.patch.multiple(channel_layers, **as_there), mock.patch.multiple(rows, **as_there):
        for shape in ((32, 96, 56, 56), (64, 768, 16, 16), (4, 4500, 32, 32)):
            x, w = (torch.empty(size, dtype=torch.bfloat16, device="meta") for size in (shape, shape[1]))
            _, mean, rstd = channel_layers.forward(x, w, w, 1e-6, save=True)
            assert mean is not None and rstd is not None
            channel_layers.backward(torch.empty_like(x), x, w, mean, rstd, dx=True, dw=w.dtype, db=w.dtype)
    own = [call for call in calls if call[0].__name__ != "sum_partials"]  # the row family's
    return read(compile_call(*call, target) for call in own)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_compiled(target: str, compiling: Executor) -> None:
    found = compiling.submit(compiled, target).result()
    assert len(found) == 2 + 2 + 3
    for kernel in found:
        assert not kernel.spills, kernel
        assert max(kernel.loads) == 128, kernel
        if kernel.kernel != "channel_layer_moments":  # few numbers
            assert max(kernel.stores) == 128, kernel
