"""The arguments of a call that is measured, and what its backward starts from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..norms import Arguments


class Inputs(NamedTuple):
    """The arguments of one call, and the gradients that a backward starts from: y's, and the sum's where it is of one. A
    chain's have a row of weights a link. Of QK-norm x, weight and dy are the queries', beside the keys' own, and cos and
    sin, which have no gradient. Of a modulated norm weight and bias are the scale and the shift; of a sum gate is x's.
    numbers: alpha, and shift. tensor_scale: the number of the whole tensor that a format may ask for.
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    dy: Tensor | None
    residual: Tensor | None = None
    dsum: Tensor | None = None
    key: Tensor | None = None
    key_weight: Tensor | None = None
    dkey: Tensor | None = None
    angles: tuple[Tensor, Tensor] | None = None
    gate: Tensor | None = None
    numbers: tuple[Tensor, ...] = ()
    tensor_scale: Tensor | None = None

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """As Norm.function takes them, what there is: x, key, residual, gate, numbers, weight, key's, bias, cos and sin,
        tensor_scale.
        """
        return *self.leaves, *(self.angles or ()), *_present(self.tensor_scale)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """Those of the arguments that a backward makes gradients of."""
        return (*_present(self.x, self.key, self.residual, self.gate), *self.parameters)

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """Those of a module."""
        return *self.numbers, *_present(self.weight, self.key_weight, self.bias)

    def of(self, eps: float) -> Arguments:
        """The same as Norm has them: queries and keys as one, and numbers."""
        if self.numbers:
            return Arguments(self.x, self.weight, self.bias, eps, torch.cat([t.detach() for t in self.numbers]))
        if self.residual is not None:
            return Arguments(self.x, self.weight, self.bias, eps, self.residual, gate=self.gate)
        if self.weight is None or self.key is None or self.key_weight is None:
            return Arguments(self.x, self.weight, self.bias, eps, self.gate)
        weights = torch.stack((self.weight.detach(), self.key_weight.detach()))
        return Arguments(self.whole, weights, None, eps, None, self.x.shape[-2], self.angles)

    @property
    def whole(self) -> Tensor:
        """x, of QK-norm with the keys behind it."""
        return self.x.detach() if self.key is None else torch.cat((self.x.detach(), self.key.detach()), -2)

    @property
    def gradients(self) -> tuple[Tensor, ...]:
        """Those that a backward starts from; a forward has none."""
        return _present(self.dy, self.dsum, self.dkey)

    @property
    def whole_gradients(self) -> tuple[Tensor, ...]:
        """The same as Norm has them, of ``whole`` and of the sum."""
        return self.gradients if self.dkey is None else (torch.cat(self.gradients, -2),)

    def of_forward(self) -> Inputs:
        """Without gradients."""
        return self._replace(dy=None, dsum=None, dkey=None)

    def for_a_peer(self) -> Inputs:
        """With gradients of its own, since it may write into them."""
        dy, dsum, dkey = (None if t is None else t.clone() for t in (self.dy, self.dsum, self.dkey))
        return self._replace(dy=dy, dsum=dsum, dkey=dkey)


def _present(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(t for t in tensors if t is not None)
