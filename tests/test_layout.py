"""ops/layout.py against torch's own indexing."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trinorm.ops.layout import Rows, channels_readable, collapse, in_order_of, readable, rows_of


@given(
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=5),
    order=st.permutations(range(5)),
    steps=st.lists(st.integers(1, 3), min_size=5, max_size=5),
)
def test_collapsed_rows_visit_the_same_elements(shape: list[int], order: list[int], steps: list[int]) -> None:
    """Row i of the collapsed layout is row i of the tensor, whatever dims were permuted or strided."""
    dims = len(shape)
    order = [i for i in order if i < dims]
    base = torch.arange(4000).reshape(-1)
    strides, step = [0] * dims, 1
    for i in reversed(order):
        strides[i] = step * steps[i]
        step = strides[i] * shape[i]
    x = base.as_strided([*shape, 1], [*strides, 1]) if step < 4000 else base[:1].reshape([1] * (dims + 1))
    odd_sizes, collapsed = collapse(x.shape[:-1], x.stride()[:-1])
    sizes = [size // 2 for size in odd_sizes]
    expected = x.flatten().tolist()
    found = []
    for row in range(len(expected)):
        offset, rest = 0, row
        for level in range(len(sizes) - 1, -1, -1):
            offset += rest % sizes[level] * collapsed[level + 1]
            rest //= sizes[level]
        found.append(offset + rest * collapsed[0])
    assert found == expected


def test_leading_dims_that_step_as_one_are_one() -> None:
    assert rows_of(torch.empty(2, 3, 4, 8), 1, 8) == Rows((), (8,))
    assert rows_of(torch.empty(2, 3, 4, 8), 2, 32) == Rows((), (32,))
    packed = torch.empty(2, 3, 5, 3 * 16)
    assert rows_of(packed[..., :16], 1, 16) == Rows((), (48,))
    assert rows_of(torch.empty(2, 3, 8).transpose(0, 1), 1, 8) == Rows((5,), (8, 24))
    assert rows_of(torch.empty(1, 8).expand(5, 8), 1, 8) == Rows((), (0,))


def test_only_a_broken_run_of_normalized_dims_is_copied() -> None:
    x = torch.randn(4, 6, 8)
    for view in (x, x[::2], x[:, 1:3], x[..., :5], x.transpose(0, 1), x.expand(3, 4, 6, 8)):
        assert readable(view, 1) is view
    assert readable(x[::2], 2).data_ptr() == x.data_ptr()
    for view, dims in ((x.transpose(1, 2), 1), (x[..., ::2], 1), (x[:, :, :5], 2), (x.transpose(0, 1), 2)):
        copy = readable(view, dims)
        assert copy.is_contiguous()
        assert torch.equal(copy, view)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 3, 1, 1), (2, 1, 4, 4), (2, 3, 2, 2, 2), (2, 3, 7), (4, 3)], ids=str)
def test_channels_are_last_as_a_view_says(shape: tuple[int, ...]) -> None:
    """torch's own answer for images, and a view's for the others, are one, whatever the order of memory."""
    for order in itertools.permutations(range(len(shape))):
        t = torch.empty([shape[i] for i in order]).permute(*(order.index(i) for i in range(len(shape))))
        last = t.movedim(1, -1).is_contiguous()
        assert (channels_readable(t) is t) == (last or t.is_contiguous())
        assert in_order_of(t, t) is t or not (last or t.is_contiguous())
        assert in_order_of(torch.empty(shape), t).is_contiguous()
