"""A small LLaMA-style language model over characters, trained with torch's RMSNorm and with trinorm's.

    python examples/train_gpt.py --plot curves.png --json curves.json

The text is Python's language reference. The same model is trained three times from one seed on the same batches in the same
order, and only its norms differ: torch's, trinorm's, and torch's computed in float64, forward and backward, and rounded
once, which is as exact as a norm of float32 tensors can be. In exact arithmetic the three loss curves are one. In floating
point they part by a few units in the last place at first, and training amplifies every such difference from step to step:
a gap that grows is expected, of any two norms that do not round alike. So trinorm's error is shown beside torch's own: how
far each curve is from the exact norm's. Two good norms are equally far; which of them is further at a step is chance.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trinorm
from trinorm.compare import Comparison, compare
from trinorm.ops import road

HEAD = 32  # width of one attention head


@dataclass(frozen=True)
class Config:
    """The model and its training. context counts characters, batch windows of that many; lr is the peak learning rate."""

    steps: int = 1000
    layers: int = 6
    width: int = 384
    context: int = 256
    batch: int = 32
    lr: float = 1e-3
    seed: int = 0
    amp: bool = False


class Attention(nn.Module):
    """Causal self-attention with rotary position embeddings (Su et al., arXiv:2104.09864)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        frequency = 10000.0 ** -(torch.arange(0, HEAD, 2) / HEAD)
        angle = torch.arange(config.context)[:, None] * frequency
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def rotate(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * self.cos - b * self.sin, a * self.sin + b * self.cos), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        # (batch, context, 3 * width) -> three of (batch, heads, context, HEAD)
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, HEAD)).movedim(2, 0).transpose(2, 3)
        y = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, arXiv:2002.05202), its inner width 8/3 of the outer, a multiple of 32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = -(-8 * width // 96) * 32
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.mlp = SwiGLU(config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """Characters (batch, context) to logits (batch, context, vocabulary); the two embeddings are tied."""

    def __init__(self, config: Config, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, config.width)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.layers)))
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, characters: Tensor) -> Tensor:
        return F.linear(self.norm(self.blocks(self.embedding(characters))), self.embedding.weight)


class ExactRMSNorm(nn.RMSNorm):
    """torch's RMSNorm in float64, its result and its gradients rounded once to float32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.double(), self.normalized_shape, self.weight.double(), self.eps).float()


def make_exact(model: nn.Module) -> None:
    """Swap a model's norms for ExactRMSNorm, in place, as ``trinorm.replace`` swaps them for trinorm's."""
    for module in model.modules():
        if type(module) is nn.RMSNorm:
            module.__class__ = ExactRMSNorm


@dataclass(frozen=True)
class Outcome:
    """The loss of every step, (steps,) each, by torch's norms, by trinorm's, and by torch's in float64."""

    torch: Tensor
    trinorm: Tensor
    exact: Tensor

    @property
    def gap(self) -> Tensor:
        return (self.trinorm - self.torch).abs()

    @property
    def comparison(self) -> Comparison:
        """trinorm's curve and torch's, as distances from the exact norm's."""
        return compare("loss curve", self.trinorm, self.exact.double(), self.torch)

    def __str__(self) -> str:
        comparison = self.comparison
        return "\n".join(
            [
                f"trinorm's curve and torch's: largest gap {self.gap.max():.3g} at step {int(self.gap.argmax())}, "
                f"mean {self.gap.mean():.3g}",
                f"largest distance from the exact norm's curve: trinorm {comparison.error:.3g}, "
                f"torch {comparison.torch_error:.3g}",
                f"final loss: torch {self.torch[-1]:.6f}, trinorm {self.trinorm[-1]:.6f}, exact norm {self.exact[-1]:.6f}",
            ]
        )


def encoded_text() -> tuple[Tensor, int]:
    """(characters as numbers, how many different ones) of ``pydoc_data.topics``."""
    text = "\n\n".join(topics.values())
    vocabulary = {character: number for number, character in enumerate(sorted(set(text)))}
    return torch.tensor([vocabulary[character] for character in text]), len(vocabulary)


def train(config: Config, device: torch.device, prepare: Callable[[nn.Module], object] = lambda model: None) -> Tensor:
    """The loss of every step, (steps,), fp32. ``prepare`` is given the model to change its norms before the training."""
    data, vocabulary = encoded_text()
    windows = data.to(device).unfold(0, config.context + 1, 1)  # every window of the text, as views
    torch.manual_seed(config.seed)
    model = GPT(config, vocabulary).to(device)
    prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95), eps=1e-5)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 10 * (step + 1) / config.steps))
    losses = []
    for _ in range(config.steps):
        batch = windows[torch.randint(len(windows), (config.batch,)).to(device)]
        with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
            logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        warm_up.step()
        losses.append(loss.detach())
    return torch.stack(losses).cpu()


def compare_curves(config: Config, device: torch.device) -> Outcome:
    """Train three times; only the norms differ."""
    curves = []
    for name, prepare in (("torch", lambda model: None), ("trinorm", trinorm.replace), ("exact norm", make_exact)):
        start = time.perf_counter()
        curve = train(config, device, prepare)
        seconds = time.perf_counter() - start
        print(f"{name:10}  {config.steps} steps in {seconds:.1f} s, loss {curve[0]:.4f} -> {curve[-1]:.4f}", flush=True)
        curves.append(curve)
    return Outcome(*curves)


def draw(outcome: Outcome, path: Path) -> None:
    """The curves over each other, and below them their distances from the exact norm's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), layout="constrained")
    losses, gaps = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    losses.plot(outcome.torch, label="torch.nn.RMSNorm", linewidth=3, color="0.75")
    losses.plot(outcome.trinorm, label="trinorm.replace(model)", linewidth=1, color="C0")
    losses.set(ylabel="training loss (nats per character)", title=f"largest gap {outcome.gap.max():.2g}")
    losses.legend()
    for name, curve, color in (("torch.nn.RMSNorm", outcome.torch, "0.6"), ("trinorm", outcome.trinorm, "C0")):
        gaps.plot((curve - outcome.exact).abs(), label=name, linewidth=1, color=color)
    # Linear below one rounding of a loss near 1, so that equal losses have a place on the axis.
    gaps.set_yscale("symlog", linthresh=torch.finfo(torch.float32).eps)
    gaps.set(xlabel="step", ylabel="distance from the\nexact norm's curve")
    gaps.legend()
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in asdict(Config()).items():
        if name != "amp":
            parser.add_argument(
                f"--{name}", type=type(default), default=default, metavar="N", help="(default: %(default)s)"
            )
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    parser.add_argument("--device", choices=devices, default=devices[min(1, len(devices) - 1)])
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves (needs matplotlib)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the curves and the configuration")
    options = parser.parse_args(arguments)
    if options.width % HEAD:
        parser.error(f"--width is {options.width}; it must be a multiple of {HEAD}, the width of a head")
    for name, value in asdict(Config()).items():
        if type(value) is int and name != "seed" and getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; it must be 1 or more")
    for name in ("plot", "json"):
        if (path := getattr(options, name)) and not path.parent.is_dir():
            parser.error(f"--{name} is {path}; {path.parent} must be a folder that is there")
    place = torch.device(options.device)
    config = Config(**{name: getattr(options, name) for name in asdict(Config())})

    # The same bits on every run: only the norms may differ. cuBLAS reads its variable when it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    if place.type == "cpu" and not road.INTERPRETED:
        print("CPU: trinorm runs torch's own operators here; TRITON_INTERPRET=1 runs its kernels (slowly)")
    device = torch.cuda.get_device_name(place) if place.type == "cuda" else "CPU"
    print(f"{device}, torch {torch.__version__}, {config}")
    outcome = compare_curves(config, place)
    print(outcome)
    if options.plot:
        draw(outcome, options.plot)
    if options.json:
        losses = {name: curve.tolist() for name, curve in vars(outcome).items()}
        record = {"device": device, "torch": torch.__version__, "config": asdict(config), "losses": losses}
        options.json.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
