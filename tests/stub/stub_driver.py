"""Triton's real launcher over a CUDA driver that only records: what a launch hands to a GPU, without one.

Kernels are compiled as for an H200 and never run, and CPU tensors stand for a GPU's. To be used in a process of its own
(test_launch.py starts them): tests on a CPU interpret the kernels, and one process cannot do both.
"""

from __future__ import annotations

import ctypes
import os
import re
import struct
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LAUNCHES, PARAMETERS = 65536, 32


class _Launch(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32),
        ("shared", ctypes.c_uint32),
        ("attributes", ctypes.c_uint32 * 4),
        ("attribute_count", ctypes.c_uint32),
        ("parameter_count", ctypes.c_uint32),
        ("parameters", ctypes.c_uint64 * PARAMETERS),
    )


@dataclass(frozen=True)
class Launch:
    """What the driver was given. kernel: its name; function: the handle of the binary; parameters: their bits."""

    kernel: str
    function: int
    stream: int
    grid: tuple[int, ...]
    block: int
    shared: int
    attributes: tuple[int, ...]
    parameters: tuple[int, ...]


class _Current(threading.local):
    device = 0
    stream = 0


class Stub:
    """The recording driver. current: the device and stream that it says are current on this thread; may be set."""

    def __init__(self, folder: Path) -> None:
        import triton

        include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
        source, library = Path(__file__).with_name("stub_driver.c"), folder / "libcuda.so.1"
        compiler = os.environ.get("CC", "cc")
        soname = "-Wl,-soname,libcuda.so.1"
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", f"-I{include}", soname, source, "-o", library], check=True)
        # Loaded under its own name, so that Triton finds this one when it asks for libcuda.so.1.
        self._library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
        self.current = _Current()
        self._names: dict[int, str] = {}
        self._seen = 0
        triton.runtime.driver.set_active(self._driver())

    def _driver(self) -> Any:
        import torch
        from triton.backends.nvidia.driver import CudaDriver

        driver = CudaDriver()
        driver.get_device_capability = lambda device=0: (9, 0)
        driver.get_current_device = lambda: self.current.device
        if hasattr(torch._C, "_cuda_getDevice"):  # a torch that was built for CUDA
            torch._C._cuda_getDevice = driver.get_current_device
        driver.get_current_stream = lambda device: self.current.stream
        load = driver.utils.load_binary

        def load_binary(name: str, binary: bytes, *rest: Any) -> Any:
            loaded = load(name, binary, *rest)
            sizes = _parameter_sizes(binary)
            self._library.stub_parameters(ctypes.c_uint64(loaded[1]), len(sizes), (ctypes.c_uint32 * PARAMETERS)(*sizes))
            self._names[loaded[1]] = name
            return loaded

        driver.utils.load_binary = load_binary
        return driver

    def launches(self) -> list[Launch]:
        """The launches since this was asked last."""
        records = (_Launch * LAUNCHES).in_dll(self._library, "stub_launches")
        count = ctypes.c_uint32.in_dll(self._library, "stub_launched").value
        assert count <= LAUNCHES, "the stub's memory is full"
        found = [
            Launch(
                self._names[r.function],
                r.function,
                r.stream,
                tuple(r.grid),
                r.block,
                r.shared,
                tuple(r.attributes[: r.attribute_count]),
                tuple(r.parameters[: r.parameter_count]),
            )
            for r in (records[i] for i in range(self._seen, count))
        ]
        self._seen = count
        return found


def _parameter_sizes(binary: bytes) -> list[int]:
    """The bytes of each parameter of a cubin's one kernel, from its EIATTR_KPARAM_INFO attributes."""
    found = {}
    for match in re.finditer(rb"\x04\x17\x0c\x00(.{12})", binary, re.DOTALL):
        index, ordinal, _, flags = struct.unpack("<IHHI", match[1])
        if index == 0 and ordinal < 64:  # else other bytes that look so
            found[ordinal] = flags >> 18
    assert sorted(found) == list(range(len(found))), "every parameter was found"
    return [found[ordinal] for ordinal in sorted(found)]
