"""RMSNorm's relatives as modules (nn re-exports them)."""

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..functional.relatives import PART
from ..shown import shown


class _OfShape(torch.nn.Module):
    """With a weight of ``normalized_shape``, ones at first, or without one. No subclass of torch.nn.RMSNorm, in whose place
    tools would take it for one.
    """

    weight: torch.nn.Parameter | None
    cast: functional.Cast = "output"
    batch_invariant: bool | None = None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None,
        elementwise_affine: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        sizes: Any = (normalized_shape,) if isinstance(normalized_shape, numbers.Integral) else normalized_shape
        self.normalized_shape: tuple[int, ...] = tuple(sizes)
        self.eps, self.elementwise_affine = eps, elementwise_affine
        weight = torch.empty(self.normalized_shape, device=device, dtype=dtype) if elementwise_affine else None
        self.register_parameter("weight", None if weight is None else torch.nn.Parameter(weight))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            torch.nn.init.ones_(self.weight)

    def _how(self) -> dict[str, Any]:
        return dict(cast=self.cast, batch_invariant=self.batch_invariant)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}" + shown(self)


class L2Norm(_OfShape):
    r"""L2 normalization, :math:`y = x / \sqrt{\sum x^2 + \epsilon}`, times a weight where there is one; see
    :func:`trinorm.functional.l2_norm` for shapes, dtypes and errors.

    Args:
        normalized_shape: the sizes of the dims that the sum runs over; an int is the last one's.
        eps: added to the sum of squares; >= 0.
        elementwise_affine: has a weight, ones at first.
        device, dtype: of the weight.

    Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks", arXiv:2412.06464.
    """

    eps: float

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-6,
        elementwise_affine: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        return functional.l2_norm(input, self.normalized_shape, self.weight, self.eps, **self._how())


class PartialRMSNorm(_OfShape):
    r"""Root mean square normalization by the mean square of the first elements of a row; see
    :func:`trinorm.functional.partial_rms_norm` for the formula, shapes, dtypes and errors.

    Args:
        normalized_shape, device, dtype: as :class:`L2Norm`.
        p: what part of the elements; above 0 and at most 1.
        eps: added to the mean square; >= 0. None: as :func:`trinorm.functional.rms_norm`.
        elementwise_affine: has a weight, ones at first.

    Source: Zhang, Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        p: float = PART,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        given = input, self.normalized_shape, self.weight, self.eps
        return functional.partial_rms_norm(*given, p=self.p, **self._how())

    def extra_repr(self) -> str:
        shape, _, rest = super().extra_repr().partition(", eps=")
        return f"{shape}, p={self.p}, eps={rest}"


class ScaleNorm(torch.nn.Module):
    r"""L2 normalization of the last dim, to a length that is learned: :math:`y = g \cdot x / \sqrt{\sum x^2 + \epsilon}`;
    see :func:`trinorm.functional.scale_norm` for shapes, dtypes and errors.

    Args:
        scale: g at first; the paper has :math:`\sqrt{N}`. The parameter is ``weight``, a scalar.
        eps: added to the sum of squares; >= 0.
        device, dtype: of the weight.

    Source: Nguyen, Salazar, "Transformers without Tears", arXiv:1910.05895.
    """

    weight: torch.nn.Parameter
    batch_invariant: bool | None = None

    def __init__(
        self,
        scale: float,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.scale, self.eps = scale, eps
        self.weight = torch.nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.constant_(self.weight, self.scale)

    def forward(self, input: Tensor) -> Tensor:
        return functional.scale_norm(input, self.weight, self.eps, batch_invariant=self.batch_invariant)

    def extra_repr(self) -> str:
        return f"scale={self.scale}, eps={self.eps}" + shown(self)
