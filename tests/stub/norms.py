"""What the tests on the recording driver share: calls, and when two calls launched the same."""

from __future__ import annotations

import pytest
import torch
from stub_driver import Launch
from torch import Tensor

from trinorm import functional
from trinorm.spec import LAYER_NORM, RMS_NORM, RowNorm

SPECS = [pytest.param(LAYER_NORM, id="layer_norm"), pytest.param(RMS_NORM, id="rms_norm")]

# What is where: the name of the tensor that begins at an address.
Roles = dict[int, str]


def call(spec: RowNorm, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    shape = x.shape[-1:]
    if spec.center:
        return functional.layer_norm(x, shape, weight, bias, eps)
    return functional.rms_norm(x, shape, weight, eps)


def draw(spec: RowNorm, m: int, n: int, dtype: torch.dtype, grad: bool) -> list[Tensor]:
    """x, weight and (for LayerNorm) bias."""
    tensors = [torch.randn(m, n), torch.randn(n), torch.randn(n)][: 3 if spec.center else 2]
    return [t.to(dtype).requires_grad_(grad) for t in tensors]


def assert_same(first: list[Launch], second: list[Launch], of_first: Roles, of_second: Roles) -> None:
    """The same binaries, grids, streams and numbers, and pointers to the same things. What is neither a tensor of the call
    nor equal is scratch: whatever its address, the same one of the call.
    """
    assert len(first) == len(second) > 0
    scratch: dict[int, int] = {}
    for a, b in zip(first, second, strict=True):
        for field in ("kernel", "function", "stream", "grid", "block", "shared", "attributes"):
            assert getattr(a, field) == getattr(b, field)
        for p, q in zip(a.parameters, b.parameters, strict=True):
            if p in of_first or q in of_second:
                assert of_first[p] == of_second[q]
            elif p != q:
                assert p % 16 == q % 16 == 0
                assert scratch.setdefault(p, q) == q
    assert len(set(scratch.values())) == len(scratch)
