"""Starting a kernel, and what the device is."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any

import torch

# Triton decides once, when a kernel is defined, so it is read once here too.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """Run ``kernel`` over ``grid`` on the current stream of ``device``.

    args are the kernel's run-time arguments in order; options its constexprs by name and Triton's own (num_warps).
    """
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[grid](*args, **options)
        return
    with torch.cuda.device(device):
        kernel[grid](*args, **options)


@dataclass(frozen=True)
class Device:
    """What a launch is sized by.

    shared_memory: bytes that one program may have. dependent_launch: programmatic dependent launch exists (sm_90).
    programs_wait: programs run side by side, so that one may wait for another.
    """

    multiprocessors: int
    shared_memory: int
    dependent_launch: bool
    programs_wait: bool


@functools.cache
def describe(device: torch.device) -> Device:
    """The device's own figures; an H200's where there is no GPU (the interpreter, and compiling for a target)."""
    if device.type != "cuda":
        real = device.type == "meta"
        return Device(multiprocessors=132, shared_memory=227 << 10, dependent_launch=real, programs_wait=real)
    properties = torch.cuda.get_device_properties(device)
    return Device(
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        dependent_launch=torch.version.hip is None and properties.major >= 9,
        programs_wait=torch.version.hip is None and not INTERPRETED,
    )
