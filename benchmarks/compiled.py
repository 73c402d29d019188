"""Device time of compiled graphs with an RMSNorm in them: torch's, which Inductor fuses with its neighbours, and trinorm's.

    python benchmarks/compiled.py --json compiled.jsonl

residual is ``h = x + r; y = rms_norm(h)``, with gradients for both results; block a LLaMA decoder layer. A forward keeps no
gradients, training is a forward and its backward. Times are medians of a CUDA graph's replays, in microseconds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from trinorm import functional
from trinorm.bench.timing import device_time

Norm = Callable[[Tensor, tuple[int, ...], Tensor, float], Tensor]
NORMS: dict[str, Norm] = {"torch": F.rms_norm, "trinorm": functional.rms_norm}


class Residual(nn.Module):
    """The stream with what is added to it, and the norm of that."""

    def __init__(self, width: int, norm: Norm) -> None:
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.ones(width)), norm

    def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        h = x + r
        return h, self.norm(h, self.weight.shape, self.weight, 1e-5)


class Block(nn.Module):
    """A LLaMA decoder layer (Touvron et al., arXiv:2302.13971) with grouped queries, less the rotary embedding."""

    def __init__(self, width: int, hidden: int, heads: int, kv_heads: int, norm: Norm) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head = heads, kv_heads, width // heads
        self.before_attention, self.before_mlp = (nn.Parameter(torch.ones(width)) for _ in range(2))
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * self.head, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.norm = norm

    def forward(self, x: Tensor) -> tuple[Tensor]:
        weight = self.before_attention
        qkv = self.qkv(self.norm(x, weight.shape, weight, 1e-5)).unflatten(-1, (-1, self.head)).transpose(-2, -3)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), -3)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(attended.transpose(-2, -3).flatten(-2))
        gate, up = self.up(self.norm(x, weight.shape, self.before_mlp, 1e-5)).chunk(2, -1)
        return (x + self.down(F.silu(gate) * up),)


class Case(NamedTuple):
    """What is compiled (build), of which inputs."""

    name: str
    build: Callable[[Norm], nn.Module]
    shape: tuple[int, ...]
    inputs: int = 1


def residual(rows: int, width: int) -> Case:
    return Case("residual", lambda norm: Residual(width, norm), (rows, width), inputs=2)


CASES = (
    residual(16384, 2048),
    residual(8192, 4096),
    residual(128, 4096),
    Case("block, Llama-3.2-1B", lambda norm: Block(2048, 8192, 32, 8, norm), (4, 4096, 2048)),
    Case("block, Llama-3.1-8B", lambda norm: Block(4096, 14336, 32, 8, norm), (2, 4096, 4096)),
    Case("block, Llama-3.2-1B", lambda norm: Block(2048, 8192, 32, 8, norm), (16, 1, 2048)),
)


def measure(case: Case, norm: Norm, train: bool, device: torch.device) -> float:
    """Microseconds of one forward, or of one forward and backward."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = case.build(norm).to(device, torch.bfloat16)
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    inputs = [torch.randn(case.shape, device=device, dtype=torch.bfloat16, requires_grad=train) for _ in range(case.inputs)]
    wanted = [*inputs, *model.parameters()]
    with torch.no_grad():
        dys = [torch.randn_like(y) for y in model(*inputs)]

    def call() -> object:
        results = compiled(*inputs)
        return torch.autograd.grad(results, wanted, dys) if train else results

    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream), torch.set_grad_enabled(train):
        return device_time([call], stream, norms=8).median * 8


def records(device: torch.device) -> Iterator[dict[str, object]]:
    for case in CASES:
        for train in (False, True):
            if train and case.shape[-2] == 1:
                continue  # tokens are decoded without gradients
            for name, norm in NORMS.items():
                us = measure(case, norm, train, device)
                what = "training" if train else "forward"
                yield dict(case=case.name, shape=case.shape, what=what, norm=name, device_us=us)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write a line for each time")
    path = parser.parse_args().json
    device = torch.device("cuda")
    table = Table("case", "shape", "pass", "norm", "µs", title=f"compiled, bf16, {torch.cuda.get_device_name(device)}")
    with (path or Path("/dev/null")).open("w") as file:
        for record in records(device):
            file.write(json.dumps(record | dict(torch=torch.__version__)) + "\n")
            file.flush()
            table.add_row(*(f"{v:.1f}" if isinstance(v, float) else str(v) for v in record.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
