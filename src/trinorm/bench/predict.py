"""With no GPU: what each kernel of a call compiles to, how many of its programs run at once, and what bounds their time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton

from ..inspection import Binary, Call, Compiled, compile_call, read, recorded
from ..targets import SCHEDULERS, TARGETS, Occupancy, occupancy
from .cases import OPS, Case

TARGET = "sm_90"

# Constexprs that give a kernel a path for rows it hardly ever meets, turned off.
_ORDINARY = {"RESCUE": False}


@dataclass(frozen=True)
class Kernel:
    """One launch of a call. ordinary: what would be compiled without the paths of rows that hardly ever come."""

    call: Call
    compiled: Compiled
    ordinary: Compiled

    @property
    def programs(self) -> int:
        return math.prod(self.call.grid)

    @property
    def occupancy(self) -> Occupancy:
        """Of one multiprocessor."""
        compiled = self.compiled
        return occupancy(TARGETS[compiled.target], compiled.warps, compiled.registers, compiled.shared, grid=self.programs)

    @property
    def bytes(self) -> int:
        """Of the tensors that the kernel is given, each read or written once: inputs, outputs and scratch."""
        return sum(argument.nbytes for argument in self.call.args if isinstance(argument, torch.Tensor))

    @property
    def instructions(self) -> float:
        """That all warps execute together, as far as one can tell: each once, those of the loop until all bytes are moved.

        Of 8192 × 4096 bf16 RMSNorm, Nsight Compute counts 14.0 million where this says 13.1 (row_forward), and 15.4 where
        this says 15.4 (row_backward). Of heads_forward, whose programs run the queries' code or the keys', it counts both.
        """
        code, target = self.ordinary, TARGETS[self.ordinary.target]
        warps = self.programs * code.warps
        in_loop = sum(code.loop.values())
        turns = self.bytes / (warps * target.gpu.warp_size * code.loop_bytes) if code.loop else 0.0
        return warps * (sum(code.instructions.values()) - in_loop + max(1.0, turns) * in_loop)

    @property
    def memory_us(self) -> float | None:
        """Its bytes at the memory's speed."""
        speed = TARGETS[self.compiled.target].speed
        return None if speed is None else self.bytes / speed.memory * 1e6

    @property
    def issue_us(self) -> float | None:
        """Its instructions, one per scheduler and clock."""
        target = TARGETS[self.compiled.target]
        if target.speed is None:
            return None
        return self.instructions / (target.multiprocessors * SCHEDULERS * target.speed.clock) * 1e6


@dataclass(frozen=True)
class Prediction:
    """The kernels of one case on one target, in the order of their launches."""

    case: Case
    target: str
    kernels: tuple[Kernel, ...]

    @property
    def microseconds(self) -> float | None:
        """A launch and the larger of memory_us and issue_us for each kernel: a prediction from below, not a measurement.

        Latency is not in it: a kernel takes longer where too few bytes are in flight, or its warps wait for one another. On
        an H200 the measured times were 1.02 to 1.19 of it where they were over 30 µs, and up to 1.7 where they were less.
        None where nobody has measured the target's speed.
        """
        speed = TARGETS[self.target].speed
        bounds = [max(kernel.memory_us or 0, kernel.issue_us or 0) for kernel in self.kernels]
        return None if speed is None else sum(bounds) + len(bounds) * speed.launch * 1e6

    @property
    def ceiling_ratio(self) -> float | None:
        """The time of what torch moves the same bytes with (Op.ceilings), predicted in the same way, over this one."""
        speed, case = TARGETS[self.target].speed, self.case
        if speed is None or self.microseconds is None:
            return None
        return (speed.launch + case.bytes_of_ceiling / speed.memory) * 1e6 / self.microseconds

    def to_json(self) -> Iterator[str]:
        """One line for each kernel, which says with what it was compiled."""
        case = self.case
        for i, kernel in enumerate(self.kernels):
            compiled, ordinary = asdict(kernel.compiled), asdict(kernel.ordinary)
            found: dict[str, Any] = dict(
                op=case.op,
                shape=case.shape,
                layout=case.layout,
                dtype=str(case.dtype).removeprefix("torch."),
                weight_dtype=str(case.weight_dtype).removeprefix("torch."),
                launch=i,
                triton=triton.__version__,
                **compiled,
                ordinary={name: ordinary[name] for name in ("loads", "stores", "instructions", "loop")},
                options={name: value for name, value in kernel.call.options.items() if isinstance(value, int)},
                grid=kernel.call.grid,
                occupancy=asdict(kernel.occupancy),
                bytes=kernel.bytes,
                memory_us=kernel.memory_us,
                issue_us=kernel.issue_us,
                call_bytes=case.bytes,
                call_us=self.microseconds,
                call_ceiling_ratio=self.ceiling_ratio,
            )
            yield json.dumps({"pass": case.pass_, **found})


def predict(cases: Iterable[Case], target: str = TARGET) -> list[Prediction]:
    """Compile what each case would launch on ``target``."""
    asked = [(case, [(call, *_binaries(call, target)) for call in launches(case, target)]) for case in cases]
    found = iter(read([binary for _, kernels in asked for _, *both in kernels for binary in both]))
    return [
        Prediction(case, target, tuple(Kernel(call, next(found), next(found)) for call, *_ in kernels))
        for case, kernels in asked
    ]


def _binaries(call: Call, target: str) -> tuple[Binary, Binary]:
    """The kernel's, and its ordinary one's."""
    options = call.options | {name: value for name, value in _ORDINARY.items() if name in call.options}
    compiled = compile_call(call.kernel, call.args, call.options, target)
    same = options == call.options
    return compiled, compiled if same else compile_call(call.kernel, call.args, options, target)


def launches(case: Case, target: str = TARGET) -> list[Call]:
    """What the case would launch on ``target``. Nothing runs."""
    op, meta = OPS[case.op], torch.device("meta")
    inputs = case.draw(meta)
    of = inputs.of(op.eps)
    with recorded(target) as calls, torch.no_grad():
        if not inputs.gradients:
            op.norm.forward(of, save=False)
        else:
            dy, *dsum = inputs.whole_gradients
            stats = torch.promote_types(case.dtype, torch.float32)
            rstd = torch.empty(len(op.norm.rows(of.x)), dtype=stats, device=meta)
            op.norm.backward(dy, of, torch.empty_like(rstd) if op.norm.centers else None, rstd, *dsum)
    return calls
