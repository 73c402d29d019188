"""GPUs that kernels can be compiled for with none at hand, as data; and how many programs fit on a multiprocessor."""

from __future__ import annotations

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

from .launch import Device

# Alike on all of TARGETS: a multiprocessor has four schedulers, each with the same share of its warps and registers, and
# gives a thread its registers in steps of 8.
SCHEDULERS = 4
_REGISTERS_OF_LANE = 512
_REGISTER_STEP = 8
_SHARED_STEP = 128


@dataclass(frozen=True)
class Speed:
    """As measured. memory: bytes a second, read and written together. clock: of a multiprocessor, in Hz. launch: seconds
    that a kernel takes which has next to nothing to do.
    """

    memory: float
    clock: float
    launch: float


@dataclass(frozen=True)
class Target:
    """One GPU.

    warps, programs: how many a multiprocessor keeps at once. shared, shared_of_program, l2, memory: as of its Device.
    speed: None where nobody has measured it.
    """

    gpu: GPUTarget
    multiprocessors: int
    warps: int
    programs: int
    shared: int
    shared_of_program: int
    l2: int
    memory: float
    speed: Speed | None = None

    @property
    def device(self) -> Device:
        """What a launch is sized by."""
        nvidia = self.gpu.backend == "cuda"
        early = nvidia and self.gpu.arch >= 90
        memory = self.shared, self.shared_of_program, self.l2, self.memory
        return Device(self.multiprocessors, self.warps, *memory, dependent_launch=early, programs_wait=nvidia)


@dataclass(frozen=True)
class Occupancy:
    """Programs, and their warps, that a multiprocessor keeps at once. limit: the resource of which there is no more."""

    programs: int
    warps: int
    limit: str


# NVIDIA: the CUDA programming guide's table of compute capabilities; AMD: the CDNA3 instruction set's. Multiprocessors, L2,
# as torch reports it, and memory are those of A100, RTX 3090, RTX 4090, H200, B200, RTX 5090 and MI300X (L2 of one of its 8
# dies).
# The speed of an H200: torch's copy and add of 8192 × 8192 bf16 reach 4.2 to 4.3 TB/s; the clock that Nsight Compute finds
# under norms (1.92 to 1.97 GHz); the copy of 128 × 768 in a CUDA graph, for most of which nothing moves (1.5 µs).
TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 108, 64, 32, 164 << 10, 163 << 10, 40 << 20, 1.6e12),
    "sm_86": Target(GPUTarget("cuda", 86, 32), 82, 48, 16, 100 << 10, 99 << 10, 6 << 20, 0.94e12),
    "sm_89": Target(GPUTarget("cuda", 89, 32), 128, 48, 24, 100 << 10, 99 << 10, 72 << 20, 1.0e12),
    "sm_90": Target(
        GPUTarget("cuda", 90, 32), 132, 64, 32, 228 << 10, 227 << 10, 60 << 20, 4.9e12, Speed(4.3e12, 1.95e9, 1.5e-6)
    ),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 148, 64, 32, 228 << 10, 227 << 10, 126 << 20, 8.0e12),
    "sm_120": Target(GPUTarget("cuda", 120, 32), 170, 48, 24, 100 << 10, 99 << 10, 96 << 20, 1.8e12),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 304, 32, 32, 64 << 10, 64 << 10, 4 << 20, 5.3e12),
}


def occupancy(target: Target, warps: int, registers: int, shared: int, grid: int) -> Occupancy:
    """Of ``grid`` programs of ``warps`` warps, with ``registers`` a thread and ``shared`` bytes a program."""
    of_scheduler = _REGISTERS_OF_LANE // _rounded_up(registers, _REGISTER_STEP)
    fitting = {
        "registers": SCHEDULERS * of_scheduler // warps,
        "shared memory": target.shared // (_rounded_up(shared + target.device.shared_reserved, _SHARED_STEP) or 1),
        "warps": target.warps // warps,
        "programs": target.programs,
        "grid": -(-grid // target.multiprocessors),
    }
    limit = min(fitting, key=lambda resource: fitting[resource])
    return Occupancy(fitting[limit], fitting[limit] * warps, limit)


def _rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step
