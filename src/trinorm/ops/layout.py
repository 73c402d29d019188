"""A tensor seen as rows: how its leading dims collapse, with no copy wherever that is possible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .road import is_known


class Rows(NamedTuple):
    """The leading dims of a tensor after collapsing, as the kernels take them (index.row_offsets).

    odd_sizes: ``2 * size + 1`` of each but the outermost. Triton compiles anew for an int that is 1 or a multiple of 16,
    and inside a tuple it cannot be told not to; an odd number over 1 is neither. strides: of each, in elements.
    """

    odd_sizes: tuple[int, ...]
    strides: tuple[int, ...]


def readable(x: Tensor, dims: int) -> Tensor:
    """x itself when the last ``dims`` dims of it are one contiguous run, else a contiguous copy."""
    if x.is_neg():  # its memory holds the negative, for whoever reads it
        x = x.resolve_neg()
    if x.is_contiguous():
        return x
    expected = 1
    for size, stride in zip(reversed(x.shape[-dims:]), reversed(x.stride()[-dims:]), strict=True):
        if size != 1 and stride != expected:
            return x.contiguous()
        expected *= size
    return x


def is_in_order(x: Tensor) -> bool:
    """Whether x is contiguous. torch would ask a tracer whether there are elements at all, who may not know."""
    if not torch.compiler.is_compiling():
        return x.is_contiguous()
    expected = 1
    for size, stride in zip(reversed(x.shape), reversed(x.stride()), strict=True):
        if not (is_known(stride == expected) or is_known(size == 1)):
            return False
        expected *= size
    return True


def rows_of(x: Tensor, dims: int, n: int) -> Rows:
    """The rows of a readable tensor whose last ``dims`` dims hold ``n`` elements."""
    if x.is_contiguous():
        return Rows((), (n,))
    return collapse(x.shape[:-dims], x.stride()[:-dims])


def collapse(shape: Sequence[int], strides: Sequence[int]) -> Rows:
    """Merge neighbouring dims that step through memory as one, and drop dims of size 1.

    >>> collapse((2, 3, 4), (60, 20, 4))  # the two outer dims are one of 6
    Rows(odd_sizes=(9,), strides=(20, 4))
    """
    sizes: list[int] = []
    steps: list[int] = []
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if steps and steps[-1] == stride * size:
            sizes[-1] *= size
            steps[-1] = stride
        else:
            sizes.append(size)
            steps.append(stride)
    return Rows(tuple(2 * size + 1 for size in sizes[1:]), tuple(steps)) if steps else Rows((), (0,))


def is_channels_last(x: Tensor) -> bool:
    """Whether x, which is in one of the two orders that the channel family reads, has its channels last in memory.

    Where there is one position both orders are one; a row of channels is then read along.
    """
    return not x.is_contiguous() or (x.shape[1] > 1 and x.shape[2:].numel() == 1)


_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _lies_by_channels(t: Tensor) -> bool:
    """Whether t's memory has its channels last. (Of images torch knows it; a view of them takes 2.5 µs more.)"""
    order = _LAST.get(t.dim())
    return t.movedim(1, -1).is_contiguous() if order is None else t.is_contiguous(memory_format=order)


def channels_readable(x: Tensor) -> Tensor:
    """x itself when its memory is in either order, channels first or channels last, else a contiguous copy."""
    if x.is_neg():
        x = x.resolve_neg()
    return x if x.is_contiguous() or _lies_by_channels(x) else x.contiguous()


def dense(t: Tensor) -> Tensor:
    """A parameter's elements one after the other, as they are: itself, or a copy."""
    return t.resolve_neg().contiguous()


def in_order_of(x: Tensor, t: Tensor) -> Tensor:
    """t, of x's shape, in the order of memory that x has; itself where it is in that order."""
    if t.is_neg():
        t = t.resolve_neg()
    if x.is_contiguous():
        return t.contiguous()
    return t if _lies_by_channels(t) else t.movedim(1, -1).contiguous().movedim(-1, 1)


def beside(x: Tensor, residual: Tensor | None) -> Tensor | None:
    """A residual, where there is one, in x's order."""
    return None if residual is None else in_order_of(x, residual)


def row_dims(dim: int | None, v: Tensor) -> int:
    """How many of v's last dims a row has where ``dim``, the first, has a length for each, or all have one."""
    return v.dim() if dim is None else v.dim() - 1
