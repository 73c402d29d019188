"""What the recipes of this folder share, and none of trinorm's use: text to train on, and whether two curves are one.

In exact arithmetic a model's loss does not depend on who computes its norms. In floating point two curves part by a unit in
the last place, and training amplifies that, so each is compared with a third: of the same model, trained in float64.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pydoc_data.topics import topics
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trinorm
from trinorm.compare import compare

VOCABULARY = 256  # bytes


def windows(count: int, length: int) -> Tensor:
    """``(count, length)`` tokens out of Python's language reference."""
    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)[: count * length].view(count, length).long()


def in_float64(model: nn.Module) -> None:
    """Norms that are written out cast to float32, whatever their model is in: theirs is torch's own here."""
    model.double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and not isinstance(module, nn.RMSNorm):
            module.forward = MethodType(_exact, module)


def _exact(self: nn.Module, x: Tensor) -> Tensor:
    (weight,) = self.parameters()
    eps = next(value for name, value in vars(self).items() if name in ("eps", "variance_epsilon"))
    return F.rms_norm(x, weight.shape, weight, eps)


def by_trinorm(model: nn.Module) -> None:
    print(trinorm.replace(model))
    print(trinorm.fuse(model))


def compare_curves(train: Callable[[Callable[[nn.Module], object]], list[float]]) -> int:
    """Train three times, and print the losses. The exit status: 0 if they fall, and trinorm's are as good as torch's."""
    # Of several GPUs Trainer makes copies, which in_float64's are not.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    ours, theirs, exact = (torch.tensor(train(prepare)) for prepare in (by_trinorm, lambda model: None, in_float64))
    for step, losses in enumerate(zip(ours.tolist(), theirs.tolist(), exact.tolist(), strict=True)):
        print("step {:2}: trinorm {:.7f}, torch {:.7f}, float64 {:.7f}".format(step, *losses))
    comparison = compare("losses", ours, exact.double(), theirs)
    print(comparison)
    return 0 if comparison.ok and ours[-1] < ours[0] else 1
