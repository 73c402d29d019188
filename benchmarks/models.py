"""Steps of real models' blocks with random weights in bf16: with torch's norms, torch.compile, and trinorm's.

    python benchmarks/models.py --json models.jsonl

unet and vae are the residual blocks of SDXL's UNet, trained, and of its VAE's decoder, forward alone; resnet is ResNet-50
(He et al., arXiv:1512.03385) and convnext ConvNeXt-T (arXiv:2201.03545, by timm), trained under autocast. fused has
activations, and ResNet's residual, in the norms' pass. Times are medians in milliseconds: a step, the host's part, its
kernels.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import trinorm
from trinorm import nn as tnn

FORMATS = {"first": torch.contiguous_format, "last": torch.channels_last}
Change = Callable[[nn.Module], nn.Module]


class Residual(nn.Module):
    """GroupNorm, SiLU and a convolution, twice, with a time embedding between them or none."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(32, channels) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.time = nn.Linear(embedding, channels) if embedding else None
        self.fused = False

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        h = x
        for i, (norm, conv) in enumerate(zip(self.norms, self.convs, strict=True)):
            h = conv(norm(h) if self.fused else F.silu(norm(h)))
            if self.time is not None and t is not None and i == 0:
                h = h + self.time(F.silu(t))[:, :, None, None]
        return x + h


class Bottleneck(nn.Module):
    """ResNet's, whose last norm takes the shortcut along where it is fused."""

    def __init__(self, entering: int, inner: int, stride: int) -> None:
        super().__init__()
        sizes = ((entering, inner, 1, 1), (inner, inner, 3, stride), (inner, 4 * inner, 1, 1))
        self.convs = nn.ModuleList(nn.Conv2d(a, b, k, s, k // 2, bias=False) for a, b, k, s in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for _, b, _, _ in sizes)
        alike = stride == 1 and entering == 4 * inner
        way = (nn.Conv2d(entering, 4 * inner, 1, stride, bias=False), nn.BatchNorm2d(4 * inner))
        self.shortcut = nn.Identity() if alike else nn.Sequential(*way)
        self.fused = False

    def forward(self, x: Tensor) -> Tensor:
        shortcut, y = self.shortcut(x), x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = conv(y)
            if self.fused:
                y = norm(y, residual=shortcut) if i == 2 else norm(y)
            else:
                y = F.relu(norm(y) + shortcut) if i == 2 else F.relu(norm(y))
        return y


class ResNet50(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        blocks, entering = [], 64
        for inner, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for i in range(depth):
                blocks.append(Bottleneck(entering, inner, stride if i == 0 else 1))
                entering = 4 * inner
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(entering, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 3, 2, 1)
        return self.head(self.blocks(x).mean((2, 3)))


def replaced(model: nn.Module) -> nn.Module:
    """trinorm's norms; timm's LayerNorm2d too, which is no class of torch's."""
    trinorm.replace(model)
    for path, child in list(model.named_modules()):
        if type(child).__name__ not in ("LayerNorm2d", "LayerNorm") or isinstance(child, tnn.LayerNorm):
            continue
        kind = tnn.ChannelLayerNorm if type(child).__name__ == "LayerNorm2d" else tnn.LayerNorm
        norm = kind(child.weight.numel(), eps=child.eps).to(child.weight.device)
        norm.weight, norm.bias = child.weight, child.bias
        model.set_submodule(path, norm)
    return model


def fused(model: nn.Module) -> nn.Module:
    for block in replaced(model).modules():
        if isinstance(block, (Residual, Bottleneck)):
            block.fused = True
            for norm in block.norms:
                norm.activation = "silu" if isinstance(block, Residual) else "relu"  # type: ignore[assignment]
    return model


VARIANTS: dict[str, Change] = {
    "torch": lambda model: model,
    "compile": torch.compile,
    "trinorm": replaced,
    "fused": fused,
    "fused+compile": lambda model: torch.compile(fused(model)),
}


def models(
    names: list[str], orders: list[str], device: str, small: bool
) -> Iterator[tuple[str, nn.Module, tuple[Tensor, ...], bool, bool]]:
    """(what, model, inputs, whether it is trained, whether under autocast) of each model, in each order of memory."""
    part = 8 if small else 1
    for order in orders:
        memory = FORMATS[order]

        def image(*shape: int, dtype: torch.dtype = torch.bfloat16, memory: torch.memory_format = memory) -> Tensor:
            return torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=memory)

        how: dict[str, Any] = dict(device=device, dtype=torch.bfloat16, memory_format=memory)
        for channels, side in ((640, 64), (320, 128)) if "unet" in names else ():
            time_ = torch.randn(4, 1280, device=device, dtype=torch.bfloat16)
            x = image(4, channels, side // part, side // part).requires_grad_()
            yield f"unet {'x'.join(map(str, x.shape))} {order}", Residual(channels, 1280).to(**how), (x, time_), True, False
        if "vae" in names:
            x = image(1, 256, 512 // part, 512 // part)
            yield f"vae {'x'.join(map(str, x.shape))} {order}", Residual(256, 0).to(**how), (x,), False, False
        images = [image(max(1, n // part**2), 3, 224, 224, dtype=torch.float32) for n in (64, 256)]
        for x in images if "resnet" in names else ():
            yield f"resnet {len(x)} {order}", ResNet50().to(device, memory_format=memory), (x,), True, True
        if "convnext" in names:
            import timm

            model = timm.create_model("convnext_tiny").to(device, memory_format=memory)
            yield f"convnext {len(images[0])} {order}", model, (images[0],), True, True


def measure(step: Callable[[], None], device: str, steps: int) -> dict[str, float]:
    """Milliseconds of a step, of the host in it, and of its kernels together."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(6):
        step()
    whole, host = [], []
    for _ in range(steps):
        synchronize()
        start = time.perf_counter()
        step()
        host.append(time.perf_counter() - start)
        synchronize()
        whole.append(time.perf_counter() - start)
    found = {"ms": statistics.median(whole) * 1e3, "host_ms": statistics.median(host) * 1e3}
    if device == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
            synchronize()
        found["kernels_ms"] = sum(event.device_time for event in profile.events()) / 1e3
        found["peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return {name: round(value, 3) for name, value in found.items()}


def run(
    model: nn.Module, change: Change, inputs: tuple[Tensor, ...], train: bool, autocast: bool, args: Any
) -> dict[str, float]:
    torch._dynamo.reset()
    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = change(copy.deepcopy(model))

    def step() -> None:
        with torch.autocast(args.device, torch.bfloat16, enabled=autocast), torch.set_grad_enabled(train):
            y = model(*inputs)
        if train:
            y.float().square().mean().backward()
            for t in (*model.parameters(), *inputs):
                t.grad = None

    return measure(step, args.device, args.steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="unet,vae,resnet,convnext", help="comma-separated")
    parser.add_argument("--orders", default=",".join(FORMATS), help="comma-separated")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json", type=Path, help="append a record a line to this file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="small shapes, to see that it runs")
    args = parser.parse_args()
    console, asked = Console(), args.variants.split(",")
    table = Table("model", *asked, title="milliseconds a step (host; kernels)")
    for what, model, inputs, train, autocast in models(
        args.models.split(","), args.orders.split(","), args.device, args.small
    ):
        cells = []
        for variant in asked:
            found = run(model, VARIANTS[variant], inputs, train, autocast, args)
            kernels = f"; {found['kernels_ms']:.2f}" if "kernels_ms" in found else ""
            cells.append(f"{found['ms']:.2f} ({found['host_ms']:.2f}{kernels})")
            gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
            record = dict(model=what, variant=variant, **found, train=train, gpu=gpu, torch=torch.__version__)
            console.print(record)
            if args.json:
                with args.json.open("a") as file:
                    file.write(json.dumps(record) + "\n")
        table.add_row(what, *cells)
    console.print(table)


if __name__ == "__main__":
    main()
