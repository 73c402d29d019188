"""Conditioned norms as modules (nn re-exports them)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import functional
from ..shown import shown
from ..spec import GateActivation


class ModulatedLayerNorm(torch.nn.LayerNorm):
    r"""Layer normalization that a condition scales and shifts: ``y = norm(x, scale, shift)``; see
    :func:`trinorm.functional.modulated_layer_norm` for the formula, shapes, dtypes and errors.

    Constructor, parameters and ``state_dict`` are :class:`torch.nn.LayerNorm`'s, but that ``elementwise_affine`` is False
    unless asked for: scale and shift are what a model of this kind learns.

    Source: Peebles, Xie, "Scalable Diffusion Models with Transformers", arXiv:2212.09748.
    """

    batch_invariant: bool | None = None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)

    def forward(self, input: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:  # type: ignore[override]
        given = input, self.normalized_shape, scale, shift
        return functional.modulated_layer_norm(
            *given, self.weight, self.bias, self.eps, batch_invariant=self.batch_invariant
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + shown(self)


class ModulatedRMSNorm(torch.nn.RMSNorm):
    r"""Root mean square normalization that a condition scales and shifts: ``y = norm(x, scale, shift)``; see
    :func:`trinorm.functional.modulated_rms_norm` for the formula, shapes, dtypes and errors.

    Constructor, parameters and ``state_dict`` are :class:`torch.nn.RMSNorm`'s, but that ``elementwise_affine`` is False
    unless asked for.

    Source: Zhang, Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
    """

    batch_invariant: bool | None = None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:  # type: ignore[override]
        given = x, self.normalized_shape, scale, shift
        return functional.modulated_rms_norm(*given, self.weight, self.eps, batch_invariant=self.batch_invariant)

    def extra_repr(self) -> str:
        return super().extra_repr() + shown(self)


class AddModulatedLayerNorm(ModulatedLayerNorm):
    r"""The same of a gated sum, adaLN-Zero's: ``y, residual = norm(x, residual, gate, scale, shift)``; see
    :func:`trinorm.functional.add_modulated_layer_norm` for the formula, shapes, dtypes and errors. Constructor, parameters
    and ``state_dict`` are :class:`ModulatedLayerNorm`'s.

    Source: Peebles, Xie, "Scalable Diffusion Models with Transformers", arXiv:2212.09748.
    """

    def forward(  # type: ignore[override]
        self, input: Tensor, residual: Tensor, gate: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        given = input, residual, gate, self.normalized_shape, scale, shift
        return functional.add_modulated_layer_norm(
            *given, self.weight, self.bias, self.eps, batch_invariant=self.batch_invariant
        )


class AddModulatedRMSNorm(ModulatedRMSNorm):
    r"""The same of a gated sum: ``y, residual = norm(x, residual, gate, scale, shift)``; see
    :func:`trinorm.functional.add_modulated_rms_norm` for the formula, shapes, dtypes and errors. Constructor, parameters
    and ``state_dict`` are :class:`ModulatedRMSNorm`'s.

    Source: Zhang, Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
    """

    def forward(  # type: ignore[override]
        self, x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        given = x, residual, gate, self.normalized_shape, scale, shift
        return functional.add_modulated_rms_norm(*given, self.weight, self.eps, batch_invariant=self.batch_invariant)


class _Gated(torch.nn.Module):
    weight: torch.nn.Parameter | None
    bias: torch.nn.Parameter | None
    activation: GateActivation = "silu"
    norm_before_gate: bool = True
    cast: functional.Cast = "output"
    batch_invariant: bool | None = None
    _norm: Callable[..., Tensor]

    def __init__(
        self,
        hidden_size: int,
        eps: float | None,
        elementwise_affine: bool,
        bias: bool,
        group_size: int | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.hidden_size, self.eps, self.group_size = hidden_size, eps, group_size
        self.elementwise_affine = elementwise_affine
        for name, wanted in (("weight", elementwise_affine), ("bias", elementwise_affine and bias)):
            empty = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype)) if wanted else None
            self.register_parameter(name, empty)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            torch.nn.init.ones_(self.weight)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(self, input: Tensor, gate: Tensor) -> Tensor:
        return self._norm(
            input,
            gate,
            self.weight,
            self.bias,
            self.eps,
            group_size=self.group_size,
            activation=self.activation,
            norm_before_gate=self.norm_before_gate,
            cast=self.cast,
            batch_invariant=self.batch_invariant,
        )

    def extra_repr(self) -> str:
        groups = "" if self.group_size is None else f", group_size={self.group_size}"
        parameters = f"elementwise_affine={self.elementwise_affine}, bias={self.bias is not None}"
        return f"{self.hidden_size}, eps={self.eps}, {parameters}{groups}" + shown(self)


class GatedLayerNorm(_Gated):
    r"""Layer normalization before or behind a gate: ``y = norm(x, gate)``; see
    :func:`trinorm.functional.gated_layer_norm` for the formula, shapes, dtypes and errors.

    Args:
        hidden_size: N, the input's last dim.
        eps: added to the variance; >= 0.
        elementwise_affine: has a weight, ones at first; and, unless ``bias`` is False, a bias, zeros at first.
        bias: see ``elementwise_affine``.
        group_size: how many elements share statistics; None is all.
        device, dtype: of both.

    Source: Ba, Kiros, Hinton, "Layer Normalization", arXiv:1607.06450.
    """

    _norm = staticmethod(functional.gated_layer_norm)

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        group_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, eps, elementwise_affine, bias, group_size, device, dtype)


class GatedRMSNorm(_Gated):
    r"""Root mean square normalization before or behind a gate: ``y = norm(x, gate)``; see
    :func:`trinorm.functional.gated_rms_norm` for the formula, shapes, dtypes and errors. Mamba2's has ``norm_before_gate``
    False.

    Args:
        hidden_size, group_size, device, dtype: as :class:`GatedLayerNorm`.
        eps: added to the mean square; >= 0. None: as :func:`trinorm.functional.rms_norm`.
        elementwise_affine: has a weight, ones at first; and, if ``bias``, a bias, zeros at first.
        bias: see ``elementwise_affine``.

    Sources: Dao, Gu, "Transformers are SSMs", arXiv:2405.21060; Yang, Kautz, Hatamizadeh, "Gated Delta Networks",
    arXiv:2412.06464.
    """

    _norm = staticmethod(functional.gated_rms_norm)

    def __init__(
        self,
        hidden_size: int,
        eps: float | None = None,
        elementwise_affine: bool = True,
        bias: bool = False,
        group_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, eps, elementwise_affine, bias, group_size, device, dtype)
