"""Modules: torch.nn's own norms, computed by trinorm.

Each is a subclass of torch's with the same constructor, parameters, ``state_dict`` and repr, so checkpoints load both
ways and ``isinstance`` keeps working; only ``forward`` differs. The attributes ``save`` ("input" unless it is set),
``cast`` ("output") and ``batch_invariant`` (None) are the functions' arguments of these names. With ``cast`` "gemma" the
weight is its distance from 1, where a fresh one is 1: it is to be loaded, or zeroed, as that model's is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import functional


class LayerNorm(torch.nn.LayerNorm):
    r"""Layer normalization, :math:`y = (x - \mathrm{E}[x]) / \sqrt{\mathrm{Var}[x] + \epsilon} \cdot w + b`.

    Constructor, parameters and ``state_dict`` are :class:`torch.nn.LayerNorm`'s; see
    :func:`trinorm.functional.layer_norm` for shapes, dtypes and errors.

    Source: Ba, Kiros, Hinton, "Layer Normalization", arXiv:1607.06450.
    """

    save: functional.Save = "input"
    cast: functional.Cast = "output"
    batch_invariant: bool | None = None

    def forward(self, input: Tensor) -> Tensor:
        return functional.layer_norm(
            input,
            self.normalized_shape,
            self.weight,
            self.bias,
            self.eps,
            save=self.save,
            cast=self.cast,
            batch_invariant=self.batch_invariant,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + _shown(self)


class RMSNorm(torch.nn.RMSNorm):
    r"""Root mean square normalization, :math:`y = x / \sqrt{\mathrm{E}[x^2] + \epsilon} \cdot w`.

    Constructor, parameters and ``state_dict`` are :class:`torch.nn.RMSNorm`'s; see
    :func:`trinorm.functional.rms_norm` for shapes, dtypes and errors.

    Source: Zhang, Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
    """

    save: functional.Save = "input"
    cast: functional.Cast = "output"
    batch_invariant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(
            x,
            self.normalized_shape,
            self.weight,
            self.eps,
            save=self.save,
            cast=self.cast,
            batch_invariant=self.batch_invariant,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + _shown(self)


def _shown(module: LayerNorm | RMSNorm) -> str:
    """What is not torch's, where it is not the default."""
    of_class = {name: getattr(type(module), name) for name in ("save", "cast", "batch_invariant")}
    return "".join(
        f", {name}={getattr(module, name)!r}" for name, usual in of_class.items() if getattr(module, name) != usual
    )
