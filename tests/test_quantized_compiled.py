"""What the layouts of quantized results' scales compile to, and a format's own rounding, with no GPU: without a spill."""

from __future__ import annotations

from concurrent.futures import Executor

import pytest
import torch
from torch import Tensor

from trinorm.formats import FORMATS, FormatName, ScaleLayout
from trinorm.inspection import Compiled, compile_call, read, recorded
from trinorm.ops.hosts import quantized_rows
from trinorm.ops.problems.quantized import Given, Quantizing
from trinorm.spec import RMS_NORM


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def compiled(target: str, name: FormatName, layout: ScaleLayout, n: int) -> list[Compiled]:
    scale = meta(1, dtype=torch.float32) if FORMATS[name].given else None
    problem = Quantizing(RMS_NORM, 1, 1e-6, name, layout, False, False)
    with recorded(target) as calls:
        quantized_rows.forward(problem, Given(meta(8193, n), None, None, meta(n), None, scale))
    assert calls[0].grid[0] * calls[0].options["ROWS"] >= (8320 if layout == "swizzled" else 8193)
    return read(compile_call(call.kernel, call.args, call.options, target) for call in calls)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize(
    ("name", "layout"),
    [("mxfp8", "swizzled"), ("nvfp4", "swizzled"), ("fp8_block", "column_major"), ("fp8_block_pow2", "row_major")],
)
def test_every_target_compiles_it(target: str, name: FormatName, layout: ScaleLayout, compiling: Executor) -> None:
    """One launch is all that there is: padding is no other kernel's."""
    for n in (80, 1040) if target == "sm_90" else (4096,):
        (found,) = compiling.submit(compiled, target, name, layout, n).result()
        assert found.kernel == "quantized_forward" and found.spills == 0
        assert target == "gfx942" or found.registers <= 96
