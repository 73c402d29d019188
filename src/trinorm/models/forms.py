"""The norms that a module of an unknown class may turn out to be: functions of trinorm's, of its parameters."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .. import checks, functional, reference
from ..ops import CALLS, row_norm
from ..reference import conditioned as conditioned_reference
from ..spec import ConditionedNorm, GateActivation, RowNorm

# The dtype of the input, and of the parameters, where there are any.
Dtypes = tuple[torch.dtype, torch.dtype | None]

# (weight, bias), where a module has them.
Parameters = tuple[Tensor | None, Tensor | None]


def _may_be_image(x: Tensor) -> bool:
    """Of images a forward may find out by their shape which dim the channels are."""
    return x.dim() == 4 and x.shape[1] == x.shape[-1]


def _order(x: Tensor) -> list[int] | None:
    """x's dims from the outermost in memory to the innermost, the last; None where they lie so already, or share memory. A
    compiled graph has the module's own forward.
    """
    strides = x.stride()
    if 0 in strides or torch.compiler.is_compiling():
        return None
    order = sorted(range(x.dim()), key=strides.__getitem__, reverse=True)
    return order if order != list(range(x.dim())) and order[-1] == x.dim() - 1 else None


@dataclass(frozen=True)
class Form:
    """The norm of the last dim.

    weight, bias: the names of the module's parameters; None where it has none. dtypes, ranks, length: of which, of inputs
    of how many dims, and of how many elements a row (None is any) its results are these; of others the module's own
    forward is called. ordered: whether a result has its input's order of memory, whatever that is.
    """

    norm: RowNorm
    eps: float
    weight: str | None
    bias: str | None
    dtypes: frozenset[Dtypes] = frozenset()
    ranks: frozenset[int] = frozenset()
    length: int | None = None
    ordered: bool = False

    # How many tensors the forward takes.
    tensors: ClassVar[int] = 1

    # Of how many dims an input may be.
    tried: ClassVar[tuple[int, ...]] = (3, 2, 4)

    # Which dim is a row.
    dim: ClassVar[int] = -1

    @staticmethod
    def laid(rows: Tensor, rank: int) -> Tensor:
        """Rows, ``(16, N)``, as the forward takes them."""
        return rows.view(*(rows.shape[0] >> (rank - 2), *[2] * (rank - 2)), rows.shape[1])

    def served(self, parameters: Parameters, *tensors: Any) -> Tensor | None:
        """What a module's call comes to; None where it is not like one of those that were compared.

        A call like one that was served is recalled, and not looked at again: all that ``serves`` asks, the guard of what is
        recalled asks too, but for what leading dims may tell.
        """
        rows = type(self) is Form and len(tensors) == 1 and type(tensors[0]) is Tensor and not _may_be_image(tensors[0])
        if not rows or has_torch_function_variadic(*tensors, *parameters):
            return self(parameters, *tensors) if self.serves(parameters, *tensors) else None
        (x,), (weight, bias), name = tensors, parameters, self.norm.name
        if self.ordered and not x.is_contiguous() and (order := _order(x)) is not None:
            y = self.served(parameters, x.permute(order))
            return None if y is None else y.permute([order.index(dim) for dim in range(x.dim())])
        if (call := CALLS.recall(name, self, x, x.shape[-1:], weight, bias, self.eps)) is not None:
            return call(x, weight, bias)
        if not self.serves(parameters, x):
            return None
        shape, eps, invariant = checks.rows(name, x, x.shape[-1:], weight, bias, self.eps, self.norm.cast, None)
        return row_norm(self.norm, x, shape, weight, bias, eps, (shape, self.eps, self), "input", invariant)

    def serves(self, parameters: Parameters, *tensors: Any) -> bool:
        """Whether the call is like one of those that were compared."""
        if len(tensors) != self.tensors or not all(isinstance(t, Tensor) for t in tensors):
            return False
        x, weight = tensors[0], parameters[0]
        if x.dim() not in self.ranks or (x.dtype, None if weight is None else weight.dtype) not in self.dtypes:
            return False
        n = x.shape[self.dim]
        if self.length is not None and n != self.length:
            return False
        if _may_be_image(x):
            return False
        if any(p is not None and (p.shape != (n,) or p.dtype != weight.dtype) for p in parameters):  # type: ignore[union-attr]
            return False
        if any(t.shape != x.shape for t in tensors):
            return False
        # What is written out returns its result in the input's order of memory, and trinorm in rows'.
        if not (x.is_contiguous() or all(a >= b for a, b in itertools.pairwise(x.stride()))):
            return False
        # It keeps its input's dtype under autocast too, where torch's own norm does not.
        return not reference.autocast_to_fp32(self.norm, x.device.type)

    def __call__(
        self, parameters: Parameters, x: Tensor, gate: Tensor | None = None, *, eps: float | None = None
    ) -> Tensor:
        """eps: another than its own."""
        shape, (weight, bias), eps = x.shape[-1:], parameters, self.eps if eps is None else eps
        if self.norm.center:
            return functional.layer_norm(x, shape, weight, bias, eps, cast=self.norm.cast)
        return functional.rms_norm(x, shape, weight, eps, cast=self.norm.cast)

    def exact(self, parameters: Parameters, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """In float64."""
        return reference.oracle(self.norm, x, x.shape[-1:], *parameters, self.eps).y

    def by_torch(self, parameters: Parameters, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """In torch's own operators."""
        return reference.composite(self.norm, x, x.shape[-1:], *parameters, self.eps)

    def __str__(self) -> str:
        return f"trinorm.functional.{self.norm.name}, eps={self.eps:g}, cast={self.norm.cast!r}"


@dataclass(frozen=True)
class ChannelForm(Form):
    """LayerNorm over the channels of images whose channels are their second dim."""

    tried: ClassVar[tuple[int, ...]] = (4,)
    dim: ClassVar[int] = 1

    @staticmethod
    def laid(rows: Tensor, rank: int) -> Tensor:
        return Form.laid(rows, rank).movedim(-1, 1).contiguous()

    def __call__(
        self, parameters: Parameters, x: Tensor, gate: Tensor | None = None, *, eps: float | None = None
    ) -> Tensor:
        return functional.channel_layer_norm(x, *parameters, self.eps if eps is None else eps)

    def exact(self, parameters: Parameters, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().exact(parameters, x.movedim(1, -1)).movedim(-1, 1)

    def by_torch(self, parameters: Parameters, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().by_torch(parameters, x.movedim(1, -1)).movedim(-1, 1)

    def __str__(self) -> str:
        return f"trinorm.functional.channel_layer_norm, eps={self.eps:g}"


@dataclass(frozen=True)
class GatedForm(Form):
    """The norm of the last dim, or of groups of it, before or behind a gate."""

    activation: GateActivation = "silu"
    before_gate: bool = True
    group_size: int | None = None

    tensors: ClassVar[int] = 2

    @property
    def _how(self) -> dict[str, Any]:
        of_group = {} if self.group_size is None else {"group_size": self.group_size}
        return dict(activation=self.activation, norm_before_gate=self.before_gate, cast=self.norm.cast, **of_group)

    @property
    def _spec(self) -> ConditionedNorm:
        return ConditionedNorm(self.norm, self.activation, not self.before_gate)

    def __call__(
        self, parameters: Parameters, x: Tensor, gate: Tensor | None = None, *, eps: float | None = None
    ) -> Tensor:
        assert gate is not None
        of = functional.gated_layer_norm if self.norm.center else functional.gated_rms_norm
        return of(x, gate, *parameters, self.eps if eps is None else eps, **self._how)

    def exact(self, parameters: Parameters, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return conditioned_reference.oracle(self._spec, 1, self.group_size or x.shape[-1], x, gate, *parameters, self.eps).y

    def by_torch(self, parameters: Parameters, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return conditioned_reference.composite(
            self._spec, 1, self.group_size or x.shape[-1], x, gate, *parameters, self.eps, x.dtype
        )

    def __str__(self) -> str:
        how = ", ".join(f"{name}={value!r}" for name, value in self._how.items())
        return f"trinorm.functional.gated_{self.norm.name}, eps={self.eps:g}, {how}"
