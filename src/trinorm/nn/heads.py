"""Norms of heads as modules (nn re-exports them)."""

from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..shown import shown


class QKNorm(torch.nn.Module):
    r"""RMS normalization of queries and keys, and their rotary embedding: ``q, k = norm(q, k, cos, sin)``; see
    :func:`trinorm.functional.qk_norm` for the formula, shapes, dtypes and errors.

    Args:
        head_dim: D.
        eps: added to the mean square; >= 0. None: as :func:`trinorm.functional.rms_norm`.
        elementwise_affine: has a ``query_weight`` and a ``key_weight``, ones at first.
        device, dtype: of both.

    Source: Henry, Dachapally, Pawar, Chen, "Query-Key Normalization for Transformers", arXiv:2010.04245.
    """

    query_weight: torch.nn.Parameter | None
    key_weight: torch.nn.Parameter | None
    interleaved: bool = False
    cast: functional.Cast = "output"
    batch_invariant: bool | None = None

    def __init__(
        self,
        head_dim: int,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.head_dim, self.eps, self.elementwise_affine = head_dim, eps, elementwise_affine
        for name in ("query_weight", "key_weight"):
            weight = torch.empty(head_dim, device=device, dtype=dtype) if elementwise_affine else None
            self.register_parameter(name, None if weight is None else torch.nn.Parameter(weight))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.query_weight, self.key_weight):
            if weight is not None:
                torch.nn.init.ones_(weight)

    def forward(
        self, query: Tensor, key: Tensor, cos: Tensor | None = None, sin: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        how = dict(interleaved=self.interleaved, cast=self.cast, batch_invariant=self.batch_invariant)
        weights = self.query_weight, self.key_weight
        return functional.qk_norm(query, key, *weights, self.eps, cos=cos, sin=sin, **how)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"{self.head_dim}, eps={self.eps}, elementwise_affine={self.elementwise_affine}" + shown(self)


class _PerHead(torch.nn.Module):
    weight: torch.nn.Parameter
    bias: torch.nn.Parameter | None
    cast: functional.Cast = "output"
    batch_invariant: bool | None = None

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        eps: float | None,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.eps = num_heads, head_dim, eps
        for name, there in (("weight", True), ("bias", bias)):
            t = torch.nn.Parameter(torch.empty(num_heads, head_dim, device=device, dtype=dtype)) if there else None
            self.register_parameter(name, t)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.ones_(self.weight)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def _how(self) -> dict[str, Any]:
        return dict(cast=self.cast, batch_invariant=self.batch_invariant)

    def extra_repr(self) -> str:
        return f"{self.num_heads}, {self.head_dim}, eps={self.eps}" + shown(self)


class PerHeadLayerNorm(_PerHead):
    r"""Layer normalization of each head of ``(*, num_heads, head_dim)``, by a weight and a bias of its own; see
    :func:`trinorm.functional.per_head_layer_norm` for the formula, shapes, dtypes and errors.

    Args:
        num_heads, head_dim: H and D. The weight is ``(H, D)``, ones at first; so is the bias, zeros at first.
        eps: added to the variance; >= 0.
        bias: whether there is one.
        device, dtype: of weight and bias.

    Source: Ba, Kiros, Hinton, "Layer Normalization", arXiv:1607.06450.
    """

    eps: float

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        eps: float = 1e-5,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_heads, head_dim, eps, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        return functional.per_head_layer_norm(input, self.weight, self.bias, self.eps, **self._how())

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.bias is not None else ", bias=False")


class PerHeadRMSNorm(_PerHead):
    r"""Root mean square normalization of each head of ``(*, num_heads, head_dim)``, by a weight of its own; see
    :func:`trinorm.functional.per_head_rms_norm` for the formula, shapes, dtypes and errors.

    Args:
        num_heads, head_dim: H and D. The weight is ``(H, D)``, ones at first.
        eps: added to the mean square; >= 0. None: as :func:`trinorm.functional.rms_norm`.
        device, dtype: of the weight.

    Source: Zhang, Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        eps: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_heads, head_dim, eps, False, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        return functional.per_head_rms_norm(input, self.weight, self.eps, **self._how())
