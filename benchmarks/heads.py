"""Device time of QK-norm with its rotary embedding: trinorm's, torch's eager operators, torch.compile of these, and a copy.

    python benchmarks/heads.py --json heads.jsonl

All are in bf16; queries and keys are views into a packed projection, and cos and sin have a row for each place, which all
samples share. The ceiling moves as many bytes: queries and keys are read and written (forward), and with the backward read
once more, as their gradients are, of which others are written. Times are medians of a CUDA graph's replays over buffers
that together are past L2, in microseconds.
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
    """batch × tokens of query, key and as many value heads, each of ``size`` elements."""

    batch: int
    tokens: int
    query_heads: int
    key_heads: int
    size: int

    @property
    def elements(self) -> int:
        """Of queries and keys together."""
        return self.batch * self.tokens * (self.query_heads + self.key_heads) * self.size


CASES = (Case(4, 4096, 32, 8, 128), Case(4, 4096, 16, 8, 128))
Norm = Callable[..., tuple[Tensor, ...]]


def by_trinorm(query: Tensor, key: Tensor, weights: list[Tensor], cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    return functional.qk_norm(query, key, *weights, EPS, cos=cos, sin=sin)


def by_torch(query: Tensor, key: Tensor, weights: list[Tensor], cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """As a model writes it: two norms, and transformers' rotate_half, in the input's dtype."""
    cos, sin, found = cos[:, None], sin[:, None], []
    for x, weight in zip((query, key), weights, strict=True):
        n = F.rms_norm(x, weight.shape, weight, EPS)
        first, second = n.chunk(2, -1)
        found.append(n * cos + torch.cat((-second, first), -1) * sin)
    return tuple(found)


def calls_of(norm: Norm, case: Case, train: bool, device: torch.device) -> Iterator[Call]:
    """A forward, or a forward and a backward, of each set of buffers."""
    angles = torch.rand(case.tokens, case.size, device=device) * 6
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    heads = case.query_heads, case.key_heads, case.key_heads
    for _ in range(sets_past_l2(4 * case.elements, describe(device).l2)):
        packed = torch.randn(case.batch, case.tokens, sum(heads), case.size, device=device).bfloat16()
        query, key, _ = (t.detach().requires_grad_(train) for t in packed.split(heads, -2))
        weights = [torch.ones(case.size, device=device, dtype=torch.bfloat16, requires_grad=train) for _ in range(2)]
        dys = [torch.randn(t.shape, device=device).bfloat16() for t in (query, key)]

        def call(query: Tensor, key: Tensor, weights: list[Tensor], dys: list[Tensor]) -> object:
            ys = norm(query, key, weights, cos, sin)
            return torch.autograd.grad(ys, [query, key, *weights], dys) if train else ys

        yield functools.partial(call, query, key, weights, dys)


def copies_of(case: Case, train: bool, device: torch.device) -> Iterator[Call]:
    """Of a forward: queries and keys read and written. With the backward x and dy are read besides, and dx written."""
    elements = case.elements * 5 // 2 if train else case.elements
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
    table = Table(*(*Case._fields, "pass", "by", "µs", "copy / it"), title=f"QK-norm and rotary embedding, bf16, {gpu}")
    with (path or Path("/dev/null")).open("w") as file:
        for record in records(device):
            file.write(json.dumps(record | dict(gpu=gpu, torch=torch.__version__)) + "\n")
            file.flush()
            table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for v in record.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
