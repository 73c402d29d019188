"""Modules: torch.nn's own norms, computed by trinorm; AddLayerNorm and AddRMSNorm, which take a residual besides,
ModulatedLayerNorm and ModulatedRMSNorm, which take a scale and a shift, and AddModulatedLayerNorm and AddModulatedRMSNorm,
which take a residual and a gate too; QuantizedLayerNorm and QuantizedRMSNorm, which are told a format of 8 bits or 4; and
ChannelLayerNorm, QKNorm, GatedLayerNorm, GatedRMSNorm, PerHeadLayerNorm, PerHeadRMSNorm, L2Norm, ScaleNorm, PartialRMSNorm,
LayerNormLinear, RMSNormLinear, DynamicTanh, DynamicErf and PolyNorm, which torch.nn has not.

Each but these fourteen is a subclass of torch's with the same constructor, parameters, ``state_dict`` and repr, so
checkpoints load both ways and ``isinstance`` keeps working; only ``forward`` differs. The attributes ``save`` ("input"
unless it is set), ``cast`` ("output"), ``batch_invariant`` (None), ``activation`` (None; "silu" of a gate),
``interleaved`` (False), ``norm_before_gate`` (True), ``alpha`` (1.0) and, in training, ``dropout_p`` (0.0) are the
arguments of these names of the functions that have them. GroupNorm, BatchNorm and the two that add take the functions'
other tensors too: ``bn(x, residual=shortcut)``. With ``cast`` "gemma" the weight is its distance from 1, where a fresh
one is 1: it is to be loaded, or zeroed, as that model's is.

weight_norm, with the parametrization WeightNorm, is torch.nn.utils.parametrizations' function of this name.
"""

import torch
from torch import Tensor

from .. import functional
from ..channel_calls import of_batches, of_instances
from ..held import parameter
from ..shown import shown
from ..spec import Activation
from .conditioned import (
    AddModulatedLayerNorm,
    AddModulatedRMSNorm,
    GatedLayerNorm,
    GatedRMSNorm,
    ModulatedLayerNorm,
    ModulatedRMSNorm,
)
from .dynamic import DynamicErf, DynamicTanh
from .heads import PerHeadLayerNorm, PerHeadRMSNorm, QKNorm
from .linear import LayerNormLinear, RMSNormLinear
from .poly import PolyNorm
from .quantized import QuantizedLayerNorm, QuantizedRMSNorm
from .relatives import L2Norm, PartialRMSNorm, ScaleNorm
from .row import LayerNorm, RMSNorm
from .weight import WeightNorm, weight_norm

__all__ = [
    "AddLayerNorm",
    "AddModulatedLayerNorm",
    "AddModulatedRMSNorm",
    "AddRMSNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "ChannelLayerNorm",
    "DynamicErf",
    "DynamicTanh",
    "GatedLayerNorm",
    "GatedRMSNorm",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "L2Norm",
    "LayerNorm",
    "LayerNormLinear",
    "ModulatedLayerNorm",
    "ModulatedRMSNorm",
    "PartialRMSNorm",
    "PerHeadLayerNorm",
    "PerHeadRMSNorm",
    "PolyNorm",
    "QKNorm",
    "QuantizedLayerNorm",
    "QuantizedRMSNorm",
    "RMSNorm",
    "RMSNormLinear",
    "ScaleNorm",
    "WeightNorm",
    "weight_norm",
]


class AddLayerNorm(torch.nn.LayerNorm):
    r"""Adds a residual and normalizes the sum: ``y, residual = norm(x, residual)``, :math:`s = x + \alpha r` and
    :math:`y = (s - \mathrm{E}[s]) / \sqrt{\mathrm{Var}[s] + \epsilon} \cdot w + b`, of which (y, s) is returned.

    Constructor, parameters and ``state_dict`` are :class:`torch.nn.LayerNorm`'s; see
    :func:`trinorm.functional.add_layer_norm` for shapes, dtypes and errors.

    Source: Ba, Kiros, Hinton, "Layer Normalization", arXiv:1607.06450.
    """

    alpha: float = 1.0
    dropout_p: float = 0.0
    cast: functional.Cast = "output"
    batch_invariant: bool | None = None

    def forward(  # type: ignore[override]
        self, input: Tensor, residual: Tensor, *, row_scale: Tensor | None = None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return functional.add_layer_norm(
            input,
            residual,
            parameter(self, "weight"),
            parameter(self, "bias"),
            self.eps,
            normalized_shape=self.normalized_shape,
            alpha=self.alpha,
            dropout_p=self.dropout_p if self.training else 0.0,
            row_scale=row_scale,
            out=out,
            cast=self.cast,
            batch_invariant=self.batch_invariant,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + shown(self)


class AddRMSNorm(torch.nn.RMSNorm):
    r"""Adds a residual and normalizes the sum: ``y, residual = norm(x, residual)``, :math:`s = x + \alpha r` and
    :math:`y = s / \sqrt{\mathrm{E}[s^2] + \epsilon} \cdot w`, of which (y, s) is returned.

    Constructor, parameters and ``state_dict`` are :class:`torch.nn.RMSNorm`'s; see
    :func:`trinorm.functional.add_rms_norm` for shapes, dtypes and errors.

    Source: Zhang, Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
    """

    alpha: float = 1.0
    dropout_p: float = 0.0
    cast: functional.Cast = "output"
    batch_invariant: bool | None = None

    def forward(  # type: ignore[override]
        self, x: Tensor, residual: Tensor, *, row_scale: Tensor | None = None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return functional.add_rms_norm(
            x,
            residual,
            parameter(self, "weight"),
            self.eps,
            normalized_shape=self.normalized_shape,
            alpha=self.alpha,
            dropout_p=self.dropout_p if self.training else 0.0,
            row_scale=row_scale,
            out=out,
            cast=self.cast,
            batch_invariant=self.batch_invariant,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + shown(self)


class GroupNorm(torch.nn.GroupNorm):
    r"""Group normalization. Constructor, parameters and ``state_dict`` are :class:`torch.nn.GroupNorm`'s; see
    :func:`trinorm.functional.group_norm` for the formula, shapes, dtypes and errors.

    Source: Wu, He, "Group Normalization", arXiv:1803.08494.
    """

    activation: Activation | None = None
    batch_invariant: bool | None = None

    def forward(
        self,
        input: Tensor,
        *,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        return functional.group_norm(
            input,
            self.num_groups,
            parameter(self, "weight"),
            parameter(self, "bias"),
            self.eps,
            activation=self.activation,
            scale=scale,
            shift=shift,
            residual=residual,
            batch_invariant=self.batch_invariant,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + shown(self)


class ChannelLayerNorm(torch.nn.Module):
    r"""Layer normalization over the channels of ``(N, C, *)``, at each position of each sample; see
    :func:`trinorm.functional.channel_layer_norm` for the formula, shapes, dtypes and errors.

    ``state_dict`` has what that of the LayerNorm2d of SAM and timm has, and of ConvNeXt's channels-first LayerNorm.

    Args:
        num_channels: C.
        eps: added to the variance; >= 0.
        affine: has a weight, ones at first; and, unless ``bias`` is False, a bias, zeros at first.
        bias: see ``affine``.
        device, dtype: of both.

    Source: Liu, Mao, Wu, Feichtenhofer, Darrell, Xie, "A ConvNet for the 2020s", arXiv:2201.03545.
    """

    weight: torch.nn.Parameter | None
    bias: torch.nn.Parameter | None
    batch_invariant: bool | None = None

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-6,
        affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_channels, self.eps, self.affine = num_channels, eps, affine
        for name, wanted in (("weight", affine), ("bias", affine and bias)):
            empty = torch.nn.Parameter(torch.empty(num_channels, device=device, dtype=dtype)) if wanted else None
            self.register_parameter(name, empty)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            torch.nn.init.ones_(self.weight)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return functional.channel_layer_norm(input, self.weight, self.bias, self.eps, batch_invariant=self.batch_invariant)

    def extra_repr(self) -> str:
        return f"{self.num_channels}, eps={self.eps}, affine={self.affine}" + shown(self)


class _InstanceNorm(torch.nn.modules.instancenorm._InstanceNorm):
    activation: Activation | None = None
    batch_invariant: bool | None = None

    # What torch's own forward calls once it has looked at the input's dims, and has added that of samples if there is none.
    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        return of_instances(self, input, self.activation, self.batch_invariant)

    def extra_repr(self) -> str:
        return super().extra_repr() + shown(self)


class InstanceNorm1d(_InstanceNorm, torch.nn.InstanceNorm1d):
    r"""Instance normalization of ``(N, C, L)`` or ``(C, L)``. Constructor, parameters and ``state_dict`` are
    :class:`torch.nn.InstanceNorm1d`'s; see :func:`trinorm.functional.instance_norm` for the formula, dtypes and errors.
    """


class InstanceNorm2d(_InstanceNorm, torch.nn.InstanceNorm2d):
    r"""The same of ``(N, C, H, W)`` or ``(C, H, W)``: :class:`torch.nn.InstanceNorm2d`."""


class InstanceNorm3d(_InstanceNorm, torch.nn.InstanceNorm3d):
    r"""The same of ``(N, C, D, H, W)`` or ``(C, D, H, W)``: :class:`torch.nn.InstanceNorm3d`."""


class _BatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    activation: Activation | None = None

    def forward(self, input: Tensor, *, residual: Tensor | None = None) -> Tensor:
        return of_batches(self, input, self.activation, residual)

    def extra_repr(self) -> str:
        return super().extra_repr() + shown(self)


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    r"""Batch normalization of ``(N, C)`` or ``(N, C, L)``. Constructor, parameters, buffers and ``state_dict`` are
    :class:`torch.nn.BatchNorm1d`'s; see :func:`trinorm.functional.batch_norm` for the formula, dtypes and errors.
    """


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    r"""The same of ``(N, C, H, W)``: :class:`torch.nn.BatchNorm2d`."""


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    r"""The same of ``(N, C, D, H, W)``: :class:`torch.nn.BatchNorm3d`."""
