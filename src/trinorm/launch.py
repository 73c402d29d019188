"""Starting a kernel, and what the device is."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Run ``kernel`` over ``grid`` on the current stream of ``device``.

    args are the kernel's run-time arguments in order; options its constexprs by name and Triton's own (num_warps).
    """
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[grid](*args, **options)
        return
    with torch.cuda.device(device):
        kernel[grid](*args, **options)


def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, in its interpreter (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a device has: what a persistent grid is sized by. An H200's where there is no GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
