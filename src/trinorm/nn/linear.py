"""A norm and the linear layer behind it as one module (nn re-exports these)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .. import functional
from ..held import is_replaced
from .row import LayerNorm, RMSNorm

if TYPE_CHECKING:
    from typing_extensions import Self


class _NormLinear(torch.nn.Module):
    """``linear(norm(x))``, of two modules that keep their names, parameters and places. Where both are what they are taken
    for, and nobody waits for a call of theirs, they are computed as one.
    """

    norm: torch.nn.Module
    linear: torch.nn.Module
    _norms: ClassVar[tuple[type[torch.nn.Module], ...]]

    @classmethod
    def of(cls, norm: torch.nn.Module, linear: torch.nn.Module) -> "Self":
        """The module of these two, which it holds: their parameters are its own.

        Args:
            norm: of torch's class or of trinorm's, whose ``cast`` and ``batch_invariant`` are kept to.
            linear: a :class:`torch.nn.Linear`, of the norm's last dim.

        Raises:
            TypeError: one is of another class.
            ValueError: their sizes differ.
        """
        for name, module, wanted in (("norm", norm, cls._norms[0]), ("linear", linear, torch.nn.Linear)):
            if not isinstance(module, wanted):
                raise TypeError(
                    f"{cls.__name__}.of(): {name} is a {type(module).__name__}; it must be a torch.nn.{wanted.__name__}"
                )
        _check_sizes(f"{cls.__name__}.of()", norm, linear)
        made = cls.__new__(cls)
        torch.nn.Module.__init__(made)
        made.norm, made.linear, made.training = norm, linear, norm.training
        return made

    def reset_parameters(self) -> None:
        for module in (self.norm, self.linear):
            module.reset_parameters()  # type: ignore[operator]

    def forward(self, input: Tensor) -> Tensor:
        norm, linear = self.norm, self.linear
        if type(norm) not in self._norms or type(linear) is not torch.nn.Linear or is_replaced(norm) or is_replaced(linear):
            result: Tensor = linear(norm(input))
            return result
        how = dict(cast=getattr(norm, "cast", "output"), batch_invariant=getattr(norm, "batch_invariant", None))
        return self._together(input, norm, linear, how)

    @staticmethod
    def _together(x: Tensor, norm: Any, linear: torch.nn.Linear, how: dict[str, Any]) -> Tensor:
        raise NotImplementedError


class LayerNormLinear(_NormLinear):
    r"""A linear layer of a layer normalization, whose result is not kept for the backward; see
    :func:`trinorm.functional.layer_norm_linear` for the formula, shapes, dtypes and errors.

    It holds ``norm``, a :class:`trinorm.nn.LayerNorm`, and ``linear``, a :class:`torch.nn.Linear`, so that its
    ``state_dict`` is theirs under these names: ``norm.weight``, ``norm.bias``, ``linear.weight``, ``linear.bias``. Casting
    mode and batch invariance are attributes of ``norm``; its ``save`` has no meaning. ``of(norm, linear)`` makes one of two
    modules that there are. Where one of the two has been replaced by a module of another class (LoRA, quantization), is
    parametrized, or has hooks, both are called, one after the other, and y is kept.

    Args:
        normalized_shape: the sizes of the dims that share statistics; the linear layer is of the last.
        out_features: of the linear layer.
        bias: the linear layer has one.
        eps: added to the variance; >= 0.
        elementwise_affine: the norm has a weight; and, unless ``norm_bias`` is False, a bias.
        norm_bias: see ``elementwise_affine``.
        device, dtype: of all parameters.

    Source: Ba, Kiros, Hinton, "Layer Normalization", arXiv:1607.06450.
    """

    _norms = (torch.nn.LayerNorm, LayerNorm)

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        out_features: int,
        bias: bool = True,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        norm_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = normalized_shape if isinstance(normalized_shape, int) else list(normalized_shape)
        norm = LayerNorm(shape, eps, elementwise_affine, norm_bias, device, dtype)
        linear = torch.nn.Linear(norm.normalized_shape[-1], out_features, bias, device, dtype)
        self.norm, self.linear = norm, linear

    @staticmethod
    def _together(x: Tensor, norm: Any, linear: torch.nn.Linear, how: dict[str, Any]) -> Tensor:
        parameters = norm.weight, norm.bias, linear.weight, linear.bias
        return functional.layer_norm_linear(x, norm.normalized_shape, *parameters, norm.eps, **how)


class RMSNormLinear(_NormLinear):
    r"""A linear layer of a root mean square normalization, whose result is not kept for the backward; see
    :func:`trinorm.functional.rms_norm_linear` for the formula, shapes, dtypes and errors.

    It holds ``norm``, a :class:`trinorm.nn.RMSNorm`, and ``linear``, as :class:`LayerNormLinear` does.

    Args:
        normalized_shape, out_features, bias, device, dtype: as :class:`LayerNormLinear`.
        eps: added to the mean square; >= 0. None: as :func:`trinorm.functional.rms_norm`.
        elementwise_affine: the norm has a weight.

    Source: Zhang, Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
    """

    _norms = (torch.nn.RMSNorm, RMSNorm)

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        out_features: int,
        bias: bool = True,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = normalized_shape if isinstance(normalized_shape, int) else list(normalized_shape)
        norm = RMSNorm(shape, eps, elementwise_affine, device, dtype)
        linear = torch.nn.Linear(norm.normalized_shape[-1], out_features, bias, device, dtype)
        self.norm, self.linear = norm, linear

    @staticmethod
    def _together(x: Tensor, norm: Any, linear: torch.nn.Linear, how: dict[str, Any]) -> Tensor:
        parameters = norm.weight, linear.weight, linear.bias
        return functional.rms_norm_linear(x, norm.normalized_shape, *parameters, norm.eps, **how)


def _check_sizes(op: str, norm: Any, linear: Any) -> None:
    n = norm.normalized_shape[-1]
    if linear.in_features != n:
        raise ValueError(f"{op}: linear has in_features {linear.in_features}; it must be {n}, the norm's last dim")
