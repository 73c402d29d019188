"""Weight normalization as a parametrization (nn re-exports it)."""

from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils import parametrizations

from .. import functional

M = TypeVar("M", bound=torch.nn.Module)


class WeightNorm(torch.nn.Module):
    r"""The parametrization that :func:`weight_norm` gives a module: :math:`w = g \cdot v / \lVert v \rVert`; see
    :func:`trinorm.functional.weight_norm` for shapes, dtypes and errors.

    Args:
        dim: which dim's slices have lengths of their own; None is one length of all.

    Source: Salimans, Kingma, "Weight Normalization: A Simple Reparameterization to Accelerate Training of Deep Neural
    Networks", arXiv:1602.07868.
    """

    def __init__(self, dim: int | None = 0) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        return functional.weight_norm(v, g, self.dim)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(g, v) that give this weight."""
        return torch.norm_except_dim(weight, 2, -1 if self.dim is None else self.dim), weight

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


def weight_norm(module: M, name: str = "weight", dim: int | None = 0) -> M:
    r"""Weight normalization of a module's parameter, :math:`w = g \cdot v / \lVert v \rVert`: in place of w the module has
    parameters g and v, as ``parametrizations.<name>.original0`` and ``original1``.

    The arguments, names and ``state_dict``, and what else can be done with the module, are those of
    :func:`torch.nn.utils.parametrizations.weight_norm`, so that checkpoints load both ways, older ones' ``<name>_g`` and
    ``<name>_v`` too, and :func:`torch.nn.utils.parametrize.remove_parametrizations` takes it off again; only what computes
    w differs, which is :class:`WeightNorm`.

    Args:
        module: any that has such a parameter.
        name: the parameter's.
        dim: which dim's slices have lengths of their own, 0 as a rule (of a transposed convolution 1 are the output
            channels); None is one length of all.

    Returns:
        The module, changed in place.

    Raises:
        What torch's raises; and, when the weight is asked for, what :func:`trinorm.functional.weight_norm` does.

    Source: Salimans, Kingma, "Weight Normalization: A Simple Reparameterization to Accelerate Training of Deep Neural
    Networks", arXiv:1602.07868.
    """
    parametrizations.weight_norm(module, name, dim)  # type: ignore[arg-type]
    module.parametrizations[name][-1] = WeightNorm(dim)  # type: ignore[index, assignment]
    return module
