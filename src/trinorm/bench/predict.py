"""With no GPU: what compiling each kernel for one tells, and the time that the bytes alone would take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..inspection import Compiled, compile_call
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
    return Prediction(case, tuple(compile_call(kernel, args, options, TARGET) for kernel, args, options in launches(case)))


def launches(case: Case) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """The kernels that the case would launch on an H200, each with its arguments and options. Nothing runs."""
    op = OPS[case.op]
    meta = torch.device("meta")
    x, weight, bias, dy = case.draw(meta)
    with _recording(rows) as recorded, torch.no_grad():
        if dy is None:
            rows.forward(op.spec, x, 1, weight, bias, op.eps, save=False)
        else:
            rstd = torch.empty(case.m, dtype=torch.float64 if case.dtype == torch.float64 else torch.float32, device=meta)
            mean = torch.empty_like(rstd) if op.spec.center else None
            db = None if bias is None else bias.dtype
            rows.backward(op.spec, dy, x, 1, weight, mean, rstd, dx=True, dw=weight.dtype, db=db)
    return recorded


@contextlib.contextmanager
def _recording(module: Any) -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    """What ``module`` launches is written down here instead."""
    recorded: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    launch = module.launch

    def record(kernel: Any, grid: Any, device: torch.device, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        recorded.append((kernel, args, options))

    module.launch = record
    try:
        yield recorded
    finally:
        module.launch = launch
