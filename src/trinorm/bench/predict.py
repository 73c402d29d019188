"""With no GPU: what compiling each kernel for one tells, and the time that the bytes alone would take."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..inspection import Call, Compiled, compile_call, recorded
from ..ops import rows
from .cases import OPS, Case

TARGET = "sm_90"
# Bytes a second, read and written together: torch's copy and add of 8192 × 8192 bf16 on an H200 reach 4.2 to 4.3.
MEMORY_SPEED = 4.3e12


@dataclass(frozen=True)
class Prediction:
    """What the kernels of one case compile to, in the order of their launches."""

    case: Case
    kernels: tuple[Compiled, ...]

    @property
    def microseconds(self) -> float:
        """The case's bytes at MEMORY_SPEED: what no kernel can beat on an H200, and not a measurement."""
        return self.case.bytes / MEMORY_SPEED * 1e6


def predict(case: Case) -> Prediction:
    """Compile what the case would launch."""
    return Prediction(case, tuple(compile_call(call.kernel, call.args, call.options, TARGET) for call in launches(case)))


def launches(case: Case) -> list[Call]:
    """What the case would launch on an H200. Nothing runs."""
    op = OPS[case.op]
    meta = torch.device("meta")
    x, weight, bias, dy = case.draw(meta)
    with recorded() as calls, torch.no_grad():
        if dy is None:
            rows.forward(op.spec, x, 1, weight, bias, op.eps, save=False)
        else:
            rstd = torch.empty(case.m, dtype=torch.float64 if case.dtype == torch.float64 else torch.float32, device=meta)
            mean = torch.empty_like(rstd) if op.spec.center else None
            db = None if bias is None else bias.dtype
            rows.backward(op.spec, dy, x, 1, weight, mean, rstd, dx=True, dw=weight.dtype, db=db)
    return calls
