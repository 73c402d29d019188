"""Device time of modulated and gated norms: trinorm's, torch's eager operators, torch.compile of these, and a copy.

    python benchmarks/conditioned.py --json conditioned.jsonl

All are in bf16. scale and shift are chunks of one projection with a row for each sample, a gate is half of one with x. The
ceiling moves as many bytes of x's size: x and the gate are read and y written (forward), and with the backward all are read
once more, as y's gradient is, and their gradients written. Times are medians of a CUDA graph's replays over buffers that
together are past L2, in microseconds.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from trinorm import functional
from trinorm.bench.timing import Call, device_time, sets_past_l2
from trinorm.launch import describe

EPS = 1e-6


class Case(NamedTuple):
    """batch × tokens × n, by what a model does with them; of ``size`` elements are statistics."""

    kind: str
    batch: int
    tokens: int
    n: int
    size: int

    @property
    def elements(self) -> int:
        return self.batch * self.tokens * self.n

    def moved(self, train: bool) -> int:
        """How many tensors of x's size are read or written."""
        forward, backward = (2, 3) if self.kind == "adaLN" else (3, 5)
        return forward + backward if train else forward


# DiT-XL/2 of 256 tokens, and of as wide as Flux; Gated DeltaNet's heads; Mamba2 with one group and with eight.
CASES = (
    Case("adaLN", 64, 256, 1152, 1152),
    Case("adaLN", 4, 4096, 3072, 3072),
    Case("norm first", 4 * 4096, 32, 128, 128),
    Case("gate first", 8, 2048, 5120, 5120),
    Case("gate first", 8, 2048, 8192, 1024),
)
Norm = Callable[[Case, list[Tensor]], Tensor]


def by_trinorm(case: Case, tensors: list[Tensor]) -> Tensor:
    if case.kind == "adaLN":
        return functional.modulated_layer_norm(tensors[0], (case.n,), *tensors[1:], eps=EPS)
    how = dict(group_size=case.size, norm_before_gate=case.kind == "norm first")
    return functional.gated_rms_norm(*tensors, eps=EPS, **how)


def by_torch(case: Case, tensors: list[Tensor]) -> Tensor:
    """As models write it: DiT's modulate, and transformers' gated norms, in fp32 between."""
    x, other, last = tensors
    if case.kind == "adaLN":
        return F.layer_norm(x, (case.n,), eps=EPS) * (1 + other) + last
    s = x.float() if case.kind == "norm first" else x.float() * F.silu(other.float())
    rows = s.unflatten(-1, (-1, case.size))
    n = last * (rows * (rows.square().mean(-1, keepdim=True) + EPS).rsqrt()).flatten(-2).to(x.dtype)
    return (n * F.silu(other.float())).to(x.dtype) if case.kind == "norm first" else n


def draw(case: Case, train: bool, device: torch.device) -> list[Tensor]:
    """x, scale and shift; or x, its gate and a weight."""
    lead = case.batch, case.tokens
    if case.kind == "adaLN":
        shift, scale, *_ = torch.randn(case.batch, 1, 6 * case.n, device=device).bfloat16().chunk(6, -1)
        tensors = [torch.randn(*lead, case.n, device=device).bfloat16(), scale, shift]
    else:
        gate, x = torch.randn(*lead, 2 * case.n, device=device).bfloat16().chunk(2, -1)
        tensors = [x, gate, torch.ones(case.n, device=device, dtype=torch.bfloat16)]
    return [t.detach().requires_grad_(train) for t in tensors]


def calls_of(norm: Norm, case: Case, train: bool, device: torch.device) -> Iterator[Call]:
    """A forward, or a forward and a backward, of each set of buffers."""
    for _ in range(sets_past_l2(4 * case.elements, describe(device).l2)):
        tensors = draw(case, train, device)
        dy = torch.randn(case.batch, case.tokens, case.n, device=device).bfloat16()

        def call(tensors: list[Tensor], dy: Tensor) -> object:
            y = norm(case, tensors)
            return torch.autograd.grad(y, tensors, dy) if train else y

        yield functools.partial(call, tensors, dy)


def copies_of(case: Case, train: bool, device: torch.device) -> Iterator[Call]:
    elements = case.elements * case.moved(train) // 2
    for _ in range(sets_past_l2(4 * elements, describe(device).l2)):
        x, y = (torch.empty(elements, device=device, dtype=torch.bfloat16) for _ in range(2))
        yield functools.partial(y.copy_, x)


def records(device: torch.device) -> Iterator[dict[str, object]]:
    stream = torch.cuda.Stream(device)
    for case in CASES:
        for train in (False, True):
            torch._dynamo.reset()
            norms = dict(trinorm=by_trinorm, torch=by_torch, compile=torch.compile(by_torch, dynamic=False))
            with torch.cuda.stream(stream), torch.set_grad_enabled(train):
                times = {"copy": device_time([*copies_of(case, train, device)], stream).median}
                for name, norm in norms.items():
                    times[name] = device_time([*calls_of(norm, case, train, device)], stream).median
            for name, us in times.items():
                what = "forward and backward" if train else "forward"
                yield dict(**case._asdict(), what=what, by=name, device_us=us, ceiling=times["copy"] / us)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write a line for each time")
    path = parser.parse_args().json
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU to time on")
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = torch.cuda.get_device_name(device)
    table = Table(*(*Case._fields, "pass", "by", "µs", "copy / it"), title=f"Modulated and gated norms, bf16, {gpu}")
    with (path or Path("/dev/null")).open("w") as file:
        for record in records(device):
            file.write(json.dumps(record | dict(gpu=gpu, torch=torch.__version__)) + "\n")
            file.flush()
            table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for v in record.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
