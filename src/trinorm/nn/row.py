"""torch.nn's row norms, computed by trinorm (nn re-exports them)."""

import torch
from torch import Tensor

from .. import functional
from ..held import parameter
from ..shown import shown


class LayerNorm(torch.nn.LayerNorm):
    r"""Layer normalization, :math:`y = (x - \mathrm{E}[x]) / \sqrt{\mathrm{Var}[x] + \epsilon} \cdot w + b`.

    Constructor, parameters and ``state_dict`` are :class:`torch.nn.LayerNorm`'s; see
    :func:`trinorm.functional.layer_norm` for shapes, dtypes and errors.

    Source: Ba, Kiros, Hinton, "Layer Normalization", arXiv:1607.06450.
    """

    __module__ = "trinorm.nn"  # where pickles and reports name it

    save: functional.Save = "input"
    cast: functional.Cast = "output"
    batch_invariant: bool | None = None

    def forward(self, input: Tensor) -> Tensor:
        return functional.layer_norm(
            input,
            self.normalized_shape,
            parameter(self, "weight"),
            parameter(self, "bias"),
            self.eps,
            save=self.save,
            cast=self.cast,
            batch_invariant=self.batch_invariant,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + shown(self)


class RMSNorm(torch.nn.RMSNorm):
    r"""Root mean square normalization, :math:`y = x / \sqrt{\mathrm{E}[x^2] + \epsilon} \cdot w`.

    Constructor, parameters and ``state_dict`` are :class:`torch.nn.RMSNorm`'s; see
    :func:`trinorm.functional.rms_norm` for shapes, dtypes and errors.

    Source: Zhang, Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
    """

    __module__ = "trinorm.nn"  # where pickles and reports name it

    save: functional.Save = "input"
    cast: functional.Cast = "output"
    batch_invariant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(
            x,
            self.normalized_shape,
            parameter(self, "weight"),
            self.eps,
            save=self.save,
            cast=self.cast,
            batch_invariant=self.batch_invariant,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + shown(self)
