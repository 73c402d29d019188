"""The norms of a sum without Triton: ATen's ops, differentiable any number of times."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..spec import RowNorm


def composite(
    spec: RowNorm,
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    alpha: float,
    dtype: torch.dtype,
    seed: Tensor | None = None,
    row_scale: Tensor | None = None,
    drop: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(y, sum): the sum by torch's own op, and the norm's composite of it, in the dtype given."""
    kept = torch.promote_types(x.dtype, residual.dtype)
    if seed is not None or row_scale is not None:  # rounded once, as the kernels do
        wide = torch.promote_types(kept, torch.float32)
        x, residual = branch(x.to(wide), len(normalized_shape), seed, row_scale, drop), residual.to(wide)
    total = torch.add(x, residual, alpha=alpha).to(kept)
    return reference.composite(spec, total, normalized_shape, weight, bias, eps, dtype), total


def composite_gradients(
    spec: RowNorm,
    total: Tensor,
    dims: int,
    weight: Tensor | None,
    eps: float,
    alpha: float,
    dy: Tensor | None,
    dsum: Tensor | None,
    dx: torch.dtype | None,
    dresidual: torch.dtype | None,
    dw: bool,
    db: torch.dtype | None,
    y: torch.dtype,
    seed: Tensor | None = None,
    row_scale: Tensor | None = None,
    drop: float = 0.0,
) -> tuple[Tensor | None, ...]:
    """(dx, dresidual, dw, db) of y's gradient and of the sum's own, each or not, as reference's: those that are wanted, in
    the dtypes given.
    """
    found = None if dy is None else reference.composite_gradients(spec, total, dims, weight, db, eps, dy, y)
    ds = dsum if found is None else found.dx
    if found is not None and found.dx is not None and dsum is not None:
        ds = found.dx + dsum
    assert ds is not None
    return (
        None if dx is None else branch(ds, dims, seed, row_scale, drop).to(dx),
        None if dresidual is None else (ds if alpha == 1 else ds * alpha).to(dresidual),
        found.dw if found is not None and dw else None,
        None if found is None or db is None else found.db,
    )


def branch(x: Tensor, dims: int, seed: Tensor | None, row_scale: Tensor | None, drop: float) -> Tensor:
    """What is added of x (kernels/added.py): its rows scaled, and elements dropped."""
    if row_scale is not None:
        x = x * row_scale.to(x.dtype).reshape(*x.shape[:-dims], *[1] * dims)
    if seed is not None:
        n = math.prod(x.shape[-dims:])
        kept = words(seed, x.numel() // max(n, 1), n) >= int(drop * 2**32)
        x = torch.where(kept.view(x.shape), x * (1 / (1 - drop) if drop < 1 else 0), 0)
    return x


def words(seed: Tensor, m: int, n: int) -> Tensor:
    """The kernels' random 32-bit words of m rows of n elements, as int64: Philox of 4 words, 10 rounds."""
    group, row = (torch.arange(size, device=seed.device) for size in (-(-n // 4), m))
    zero = torch.zeros(m, group.numel(), dtype=torch.int64, device=seed.device)
    counter = [group + zero, (row & _LOW)[:, None] + zero, (row >> 32)[:, None] + zero, zero]
    keys = [seed & _LOW, seed >> 32 & _LOW]
    for _ in range(10):
        (first_high, first_low), (third_high, third_low) = (
            _product(factor, word) for factor, word in zip(_FACTORS, counter[::2], strict=True)
        )
        counter = [third_high ^ counter[1] ^ keys[0], third_low, first_high ^ counter[3] ^ keys[1], first_low]
        keys = [key + step & _LOW for key, step in zip(keys, _STEPS, strict=True)]
    return torch.stack(counter, -1).flatten(1)[:, :n]


def _product(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """(upper, lower) 32 bits of a product of 32-bit numbers, whose 64 an int64 would not hold."""
    upper, lower = (word >> 16) * factor, (word & 0xFFFF) * factor
    return upper + (lower >> 16) >> 16, word * factor & _LOW


_LOW = 0xFFFFFFFF

# Philox's own constants: what words are multiplied by, and what the keys go up by.
_FACTORS = 0xD2511F53, 0xCD9E8D57
_STEPS = 0x9E3779B9, 0xBB67AE85
