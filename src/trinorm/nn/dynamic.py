"""Norms without statistics as modules (nn re-exports them)."""

import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import functional


class DynamicTanh(torch.nn.Module):
    r"""Dynamic tanh (DyT): :math:`y = \tanh(\alpha x) \cdot w + b`; see :func:`trinorm.functional.dynamic_tanh` for shapes,
    dtypes and errors. Parameters and ``state_dict`` have the paper's names: alpha, weight, bias.

    Args:
        normalized_shape: the sizes of the input's last dims that weight and bias have; an int is one dim.
        alpha: what alpha is at first.
        elementwise_affine: has a weight, ones at first; and, unless ``bias`` is False, a bias, zeros at first.
        bias: see ``elementwise_affine``.
        device, dtype: of all.

    Source: Zhu, Chen, He, LeCun, Liu, "Transformers without Normalization", CVPR 2025, arXiv:2503.10622.
    """

    weight: torch.nn.Parameter | None
    bias: torch.nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        alpha: float = 0.5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(normalized_shape, numbers.Integral):
            normalized_shape = (int(normalized_shape),)
        self.normalized_shape: tuple[int, ...] = tuple(normalized_shape)  # type: ignore[arg-type]
        self.initial_alpha, self.elementwise_affine = alpha, elementwise_affine

        def parameter(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        for name in self._numbers():
            self.register_parameter(name, parameter(1))
        for name, wanted in (("weight", elementwise_affine), ("bias", elementwise_affine and bias)):
            self.register_parameter(name, parameter(*self.normalized_shape) if wanted else None)
        self.reset_parameters()

    def _numbers(self) -> dict[str, float]:
        """The parameters of one element, and what they are at first."""
        return dict(alpha=self.initial_alpha)

    def reset_parameters(self) -> None:
        for name, value in self._numbers().items():
            torch.nn.init.constant_(getattr(self, name), value)
        if self.weight is not None:
            torch.nn.init.ones_(self.weight)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return functional.dynamic_tanh(input, self.normalized_shape, self.alpha, self.weight, self.bias)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        at_first = "".join(f", {name}={value}" for name, value in self._numbers().items())
        parameters = f"elementwise_affine={self.elementwise_affine}, bias={self.bias is not None}"
        return f"{self.normalized_shape}{at_first}, {parameters}"


class DynamicErf(DynamicTanh):
    r"""Dynamic erf (Derf): :math:`y = \mathrm{erf}(\alpha x + s) \cdot w + b`; see :func:`trinorm.functional.dynamic_erf`
    for shapes, dtypes and errors. Parameters and ``state_dict``: alpha, shift, weight, bias.

    Args:
        normalized_shape, alpha, elementwise_affine, bias, device, dtype: as :class:`DynamicTanh`.
        shift: what s is at first.

    Source: Chen, Lu, Zhu, Sun, Liu, "Stronger Normalization-Free Transformers", arXiv:2512.10938.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        alpha: float = 0.5,
        shift: float = 0.0,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.initial_shift = shift
        super().__init__(normalized_shape, alpha, elementwise_affine, bias, device, dtype)

    def _numbers(self) -> dict[str, float]:
        return dict(alpha=self.initial_alpha, shift=self.initial_shift)

    def forward(self, input: Tensor) -> Tensor:
        numbers = self.alpha, self.shift
        return functional.dynamic_erf(input, self.normalized_shape, *numbers, self.weight, self.bias)  # type: ignore[arg-type]
