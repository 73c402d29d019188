"""Starting a kernel, and what the device is."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Triton decides once, when a kernel is defined, so it is read once here too.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


class Count(NamedTuple):
    """A number that follows from how many rows a call has: what it is, and what it is ``of`` any number of them.

    No int, so that none is made of it in passing, which would not follow.
    """

    value: int
    of: Callable[[int], int]


def of_rows(m: int, of: Callable[[int], int] = int) -> Count:
    """``of(m)`` of a call's m rows, for a grid, an argument or a size."""
    return Count(of(m), of)


def plain(numbers: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same with the value of each Count."""
    return tuple([number.value if type(number) is Count else number for number in numbers])


class Leading(NamedTuple):
    """The size of a tensor's dims before the last ``dims``."""

    of: Tensor
    dims: int


class Started(NamedTuple):
    """A launch that happened. compiled: Triton's CompiledKernel, None from its interpreter. The rest as given to launch."""

    compiled: Any
    kernel: Any
    grid: tuple[int | Count, ...]
    args: tuple[Any, ...]


Size = tuple[int | Count, ...] | Tensor | Leading


class Made(NamedTuple):
    """A tensor that was made, and the size that was given to empty."""

    tensor: Tensor
    size: Size


class Watched(NamedTuple):
    """What a function did: the launches, and the memory that it took for them."""

    started: list[Started]
    made: list[Made]


class _Watch(threading.local):
    watched: Watched | None = None


_watch = _Watch()


def empty(size: Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Contiguous memory for a launch, of a size or of a tensor's."""
    if isinstance(size, Leading):
        sizes: tuple[int, ...] = size.of.shape[: size.of.dim() - size.dims]
    else:
        sizes = size.shape if isinstance(size, Tensor) else plain(size)
    made = torch.empty(sizes, dtype=dtype, device=device)
    if _watch.watched is not None:
        _watch.watched.made.append(Made(made, size))
    return made


def empty_like(t: Tensor) -> Tensor:
    """Memory for a launch of t's size, dtype and order, on its device."""
    made = torch.empty_like(t)
    if _watch.watched is not None:
        _watch.watched.made.append(Made(made, tuple(made.shape)))
    return made


def launch(
    kernel: Any, grid: tuple[int | Count, ...], device: torch.device, args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """Run ``kernel`` over ``grid`` on the current stream of ``device``, by Triton's own way.

    args are the kernel's run-time arguments in order; options its constexprs by name and Triton's own (num_warps).
    """
    numbers, given = plain(grid), plain(args)
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        compiled = kernel[numbers](*given, **options)
    else:
        with torch.cuda.device(device):
            compiled = kernel[numbers](*given, **options)
    if _watch.watched is not None:
        _watch.watched.started.append(Started(compiled, kernel, grid, args))


@contextlib.contextmanager
def watched() -> Iterator[Watched]:
    """Inside, what this thread launches and makes is also listed (replay.py repeats it)."""
    _watch.watched = Watched([], [])
    try:
        yield _watch.watched
    finally:
        _watch.watched = None


@dataclass(frozen=True)
class Device:
    """What a launch is sized by.

    warps: how many a multiprocessor keeps at once. shared: its bytes of shared memory. shared_of_program: what one program
    may have of them. l2: bytes of L2. memory: bytes a second that its memory's clock and bus allow.
    dependent_launch: programmatic dependent launch exists (sm_90). programs_wait: programs run side by side, so that one
    may wait for another.
    """

    multiprocessors: int
    warps: int
    shared: int
    shared_of_program: int
    l2: int
    memory: float
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
        return Device(132, 64, 228 << 10, 227 << 10, 60 << 20, 4.9e12, dependent_launch=real, programs_wait=real)
    if not INTERPRETED:
        _prepare_triton()
    properties = torch.cuda.get_device_properties(device)
    return Device(
        properties.multi_processor_count,
        properties.max_threads_per_multi_processor // properties.warp_size,
        properties.shared_memory_per_multiprocessor,
        properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        properties.L2_cache_size,
        # In kHz, of which each moves two bits a line; in bits.
        2e3 * properties.memory_clock_rate * properties.memory_bus_width / 8,
        dependent_launch=torch.version.hip is None and properties.major >= 9,
        programs_wait=torch.version.hip is None and not INTERPRETED,
    )


def _prepare_triton() -> None:
    """Have Triton do side by side what its first launch in a process does one after the other.

    It has C compiled to talk to the driver with, and it hashes all of itself, which its cache's keys begin with: .22 and
    .36 s of a first call's 1.44, which takes 1.24 so (Triton 3.6, two cores, the driver a stub).
    """
    from triton.runtime import cache, driver

    if not hasattr(cache, "triton_key"):  # no promise of Triton's; without it all is done in its turn
        return
    hashing = threading.Thread(target=cache.triton_key)  # remembers what it returned
    hashing.start()
    try:
        driver.active.get_current_device()
    finally:
        hashing.join()
