"""A small CNN that reads handwritten digits, trained with torch's BatchNorm, GroupNorm and InstanceNorm and with trinorm's.

    python examples/train_digits.py --json digits.json

The images are scikit-learn's: 1797 real digits of 8x8 pixels, of which 360, drawn by the seed, are kept for the test. For
each of the three norms the same network is trained twice from one seed: the same initial weights, the same batches in the
same order, and only the norms differ. In exact arithmetic the two losses of every step are one; in floating point they
part, and training amplifies that from step to step, as of any two norms that do not round alike. So what is asked is what a
user would see: both networks must read 95% of the test images or more, and the numbers that they read may differ by 3 of
the 360 at most. Exit status 1 when a norm fails. Training makes up for many a small error of a norm, which this cannot
show; ``trinorm check`` does.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import trinorm
from trinorm.ops import road

SIDE, CLASSES = 8, 10
TEST_IMAGES = 360
LEAST_ACCURACY = 0.95
# Rounding alone may decide an image that lies between two digits. Between torch's own norms and the same in float64, five
# seeds on a CPU differed by none; 3 leaves room for the roundings of a GPU's convolutions, and is under 1% of the test.
MOST_APART = 3
GROUPS = 2  # of GroupNorm: 16 channels in each of the first layer's, by default

# One norm of so many channels, of torch.nn or of trinorm.nn.
NORMS: dict[str, Callable[[ModuleType, int], nn.Module]] = {
    "BatchNorm": lambda library, channels: library.BatchNorm2d(channels),
    "GroupNorm": lambda library, channels: library.GroupNorm(GROUPS, channels),
    "InstanceNorm": lambda library, channels: library.InstanceNorm2d(channels, affine=True),
}


@dataclass(frozen=True)
class Config:
    """The network and its training. channels: the first layer's; lr is the learning rate of the first step, which falls to
    0; images are how many of the test's 360 are read, and least is the share of them that must be read rightly.
    """

    steps: int = 400
    channels: int = 32
    batch: int = 64
    lr: float = 5e-3
    images: int = TEST_IMAGES
    least: float = LEAST_ACCURACY
    seed: int = 0


@dataclass(frozen=True)
class Digits:
    """images: (N, 1, 8, 8), fp32, from 0 to 1. labels: (N,), the digits that they show."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Trained:
    """One training: the loss of every step, (steps,), and how many of the test images the network then read rightly."""

    losses: Tensor
    right: int


@dataclass(frozen=True)
class Outcome:
    """One norm: the training with torch's and that with trinorm's. images: how many were read, least: the share asked."""

    norm: str
    torch: Trained
    trinorm: Trained
    images: int
    least: float

    @property
    def gap(self) -> float:
        """The largest difference between two losses of a step; NaN where a loss is."""
        return (self.trinorm.losses - self.torch.losses).abs().max().item()

    @property
    def ok(self) -> bool:
        read = self.torch.right, self.trinorm.right
        return math.isfinite(self.gap) and max(read) - min(read) <= MOST_APART and min(read) >= self.least * self.images

    def __str__(self) -> str:
        by_torch, ours = (trained.right / self.images for trained in (self.torch, self.trinorm))
        return f"{self.norm:13}  {by_torch:.4f}  {ours:.4f}   {self.gap:<32.3g}  {'ok' if self.ok else 'FAILED'}"


class Net(nn.Module):
    """Images (N, 1, 8, 8) to logits (N, 10): two convolutions, each with a norm behind it, and a linear layer."""

    def __init__(self, channels: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1, bias=False),
            norm(channels),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False),
            norm(2 * channels),
            nn.ReLU(),
        )
        self.classify = nn.Linear(2 * channels * (SIDE // 2) ** 2, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.features(images).flatten(1))


def read_digits(config: Config, device: torch.device) -> tuple[Digits, Digits]:
    """(those to train on, those to test)."""
    data = load_digits()
    images = torch.from_numpy(data.images).to(device, torch.float32).unsqueeze(1) / 16
    labels = torch.from_numpy(data.target).to(device, torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(config.seed)).to(device)
    test, train = order[: config.images], order[TEST_IMAGES:]
    return Digits(images[train], labels[train]), Digits(images[test], labels[test])


def train(config: Config, device: torch.device, norm: Callable[[int], nn.Module]) -> Trained:
    """Train a network with these norms, and test it."""
    digits, test = read_digits(config, device)
    torch.manual_seed(config.seed)
    model = Net(config.channels, norm).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / config.steps)
    losses = []
    for _ in range(config.steps):
        batch = torch.randint(len(digits.labels), (config.batch,)).to(device)
        loss = F.cross_entropy(model(digits.images[batch]), digits.labels[batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
        losses.append(loss.detach())
    model.eval()
    with torch.inference_mode():
        right = int((model(test.images).argmax(dim=1) == test.labels).sum())
    return Trained(torch.stack(losses).cpu(), right)


def compare_norm(name: str, config: Config, device: torch.device) -> Outcome:
    """Train twice; only the norms differ."""
    trained = []
    for library in (nn, trinorm.nn):
        start = time.perf_counter()
        trained.append(train(config, device, lambda channels, library=library: NORMS[name](library, channels)))
        losses, seconds = trained[-1].losses, time.perf_counter() - start
        print(
            f"{library.__name__ + '.' + name:23}  {config.steps} steps in {seconds:.1f} s, "
            f"loss {losses[0]:.4f} -> {losses[-1]:.4f}",
            flush=True,
        )
    return Outcome(name, *trained, config.images, config.least)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in asdict(Config()).items():
        parser.add_argument(f"--{name}", type=type(default), default=default, metavar="N", help="(default: %(default)s)")
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    parser.add_argument("--device", choices=devices, default=devices[min(1, len(devices) - 1)])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the losses, what was read and the configuration")
    options = parser.parse_args(arguments)
    for name, value in asdict(Config()).items():
        if type(value) is int and name != "seed" and getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; it must be 1 or more")
    if options.channels % GROUPS:
        parser.error(f"--channels is {options.channels}; it must be a multiple of {GROUPS}, GroupNorm's groups")
    if options.images > TEST_IMAGES:
        parser.error(f"--images is {options.images}; the test has {TEST_IMAGES}")
    if not 0 <= options.least <= 1:
        parser.error(f"--least is {options.least}; it must be a share, from 0 to 1")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json is {options.json}; {options.json.parent} must be a folder that is there")
    place = torch.device(options.device)
    config = Config(**{name: getattr(options, name) for name in asdict(Config())})

    # The same bits on every run, and convolutions that round to fp32 as the norms do: only the norms may differ. cuBLAS
    # reads its variable when it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.allow_tf32 = False
    if place.type == "cpu" and not road.INTERPRETED:
        print("CPU: trinorm runs torch's own operators here; TRITON_INTERPRET=1 runs its kernels (slowly)")
    device = torch.cuda.get_device_name(place) if place.type == "cuda" else "CPU"
    print(f"{device}, torch {torch.__version__}, {config}")
    outcomes = [compare_norm(name, config, place) for name in NORMS]
    print("test accuracy  torch   trinorm  largest difference of the losses")
    print(*outcomes, sep="\n")
    if options.json:
        norms = {outcome.norm: {by: _written(getattr(outcome, by)) for by in ("torch", "trinorm")} for outcome in outcomes}
        record = {"device": device, "torch": torch.__version__, "config": asdict(config), "norms": norms}
        options.json.write_text(json.dumps(record) + "\n")
    return 0 if all(outcome.ok for outcome in outcomes) else 1


def _written(trained: Trained) -> dict[str, object]:
    return {"right": trained.right, "losses": trained.losses.tolist()}


if __name__ == "__main__":
    sys.exit(main())
