"""Jagged tensors (torch.nested): the rows of their values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def is_jagged(x: Tensor | None) -> bool:
    """Whether x is one. Its layout is not to be asked of other subclasses, which would hear of it."""
    from torch.nested._internal.nested_tensor import NestedTensor

    return isinstance(x, NestedTensor)


def of_values(norm: Callable[..., Tensor], x: Any, normalized_shape: Sequence[int], **rest: Any) -> Tensor:
    """``norm`` of x's values, jagged as x is: the ragged dim is one of those that rows are told apart by."""
    if isinstance(normalized_shape, Sequence) and len(normalized_shape) >= x.dim() - x._ragged_idx:
        # As torch's own norms raise of jagged tensors.
        refused = RuntimeError if norm.__name__.startswith("layer_norm") else ValueError
        raise refused(
            f"{norm.__name__}(): normalized_shape is {tuple(normalized_shape)}, but input is jagged, of shape "
            f"{tuple(x.shape)}; only dims after the ragged one can be normalized"
        )
    return torch.nested.nested_tensor_from_jagged(
        norm(x.values(), normalized_shape, **rest),
        x.offsets(),
        x.lengths(),
        jagged_dim=x._ragged_idx,
        min_seqlen=x._maybe_min_seqlen,
        max_seqlen=x._maybe_max_seqlen,
    )
