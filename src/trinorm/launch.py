"""Starting a kernel, and what the device is."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

# Triton decides once, when a kernel is defined, so it is read once here too.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


class Started(NamedTuple):
    """A launch that happened. compiled: Triton's CompiledKernel, None from its interpreter. The rest as given to launch."""

    compiled: Any
    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]


class _Watch(threading.local):
    started: list[Started] | None = None


_watch = _Watch()


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """Run ``kernel`` over ``grid`` on the current stream of ``device``, by Triton's own way.

    args are the kernel's run-time arguments in order; options its constexprs by name and Triton's own (num_warps).
    """
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        compiled = kernel[grid](*args, **options)
    else:
        with torch.cuda.device(device):
            compiled = kernel[grid](*args, **options)
    if _watch.started is not None:
        _watch.started.append(Started(compiled, kernel, grid, args))


@contextlib.contextmanager
def watched() -> Iterator[list[Started]]:
    """Inside, the launches of this thread are also listed (replay.py repeats them)."""
    started: list[Started] = []
    _watch.started = started
    try:
        yield started
    finally:
        _watch.started = None


@dataclass(frozen=True)
class Device:
    """What a launch is sized by.

    warps: how many a multiprocessor keeps at once. shared: its bytes of shared memory. shared_of_program: what one program
    may have of them. l2: bytes of L2. dependent_launch: programmatic dependent launch exists (sm_90). programs_wait:
    programs run side by side, so that one may wait for another.
    """

    multiprocessors: int
    warps: int
    shared: int
    shared_of_program: int
    l2: int
    dependent_launch: bool
    programs_wait: bool

    @property
    def shared_reserved(self) -> int:
        """Bytes of shared memory that the driver takes besides, for each program: what one that is alone cannot have."""
        return self.shared - self.shared_of_program


@functools.cache
def describe(device: torch.device) -> Device:
    """The device's own figures; an H200's where there is no GPU (the interpreter, and compiling for a target)."""
    if device.type != "cuda":
        real = device.type == "meta"
        return Device(132, 64, 228 << 10, 227 << 10, 60 << 20, dependent_launch=real, programs_wait=real)
    properties = torch.cuda.get_device_properties(device)
    return Device(
        properties.multi_processor_count,
        properties.max_threads_per_multi_processor // properties.warp_size,
        properties.shared_memory_per_multiprocessor,
        properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        properties.L2_cache_size,
        dependent_launch=torch.version.hip is None and properties.major >= 9,
        programs_wait=torch.version.hip is None and not INTERPRETED,
    )
