"""GroupNorm, InstanceNorm and BatchNorm."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from .. import reference
from ..reference import Exact
from ..reference import channel as channel_reference
from ..reference.channel import Averages, Given
from ..reference.channel import ChannelGradients as Gradients
from ..spec import GROUP_NORM, Activation, ChannelNorm
from .norm import MOMENTUM, Arguments, Norm, Normalized, Shape, all_gradients

# A GroupNorm has so many groups; of channels that they do not divide, as many as divide both.
GROUPS = 32


def num_groups(channels: int) -> int:
    """GroupNorm's."""
    return math.gcd(GROUPS, channels)


@dataclass(frozen=True)
class OfChannels(Norm):
    """GroupNorm, InstanceNorm and BatchNorm.

    modulated: weight and bias are a scale, to which 1 is added, and a shift of each sample. statistics: those of the input;
    or of the input, with running ones "kept" up; or running ones that are "given".
    """

    spec: ChannelNorm
    activation: Activation | None = None
    modulated: bool = False
    statistics: Literal["input", "kept", "given"] = "input"
    residual: bool = False

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def follows_scale(self) -> bool:
        return self.statistics == "input"

    def groups(self, x: Tensor) -> int:
        return num_groups(x.shape[1]) if self.spec is GROUP_NORM else x.shape[1]

    def takes(self, shape: Shape) -> bool:
        return super().takes(shape) and self.rows(torch.empty(shape, device="meta")).shape[1] > 1

    def parameter_shape(self, shape: Shape) -> Shape:
        return shape[:2] if self.modulated else shape[1:2]

    def running(self, x: Tensor) -> Given | None:
        if self.statistics == "input":
            return None
        how: dict[str, Any] = dict(device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        return Given(torch.linspace(-1, 1, x.shape[1], **how), torch.linspace(0.5, 2, x.shape[1], **how))

    def running_after(self, x: Tensor, before: Given, momentum: float = MOMENTUM) -> Given | None:
        if self.statistics != "kept":
            return None
        lift, lower, quiet = reference.precise(x)
        with quiet:
            rows, (mean, var) = lift(self.rows(x)), map(lift, before)
            of_rows = rows.mean(axis=1)
            unbiased = ((rows - of_rows.reshape(-1, 1)) ** 2).sum(axis=1) / (rows.shape[1] - 1)
            now = (t.reshape(-1, x.shape[1]).mean(axis=0) for t in (of_rows, unbiased))
            return Given(*(lower(kept + momentum * (t - kept)) for kept, t in zip((mean, var), now, strict=True)))

    def settled(self, of: Arguments, dy: Tensor) -> Tensor:
        if self.activation != "relu":
            return dy
        z = replace(self, activation=None).oracle(of).y.abs().nan_to_num(0.0, posinf=0.0)
        return dy.masked_fill(z < 8 * torch.finfo(dy.dtype).eps * (1 + z.max()), 0)

    def rows(self, x: Tensor) -> Tensor:
        if self.spec.over_samples:
            return x.transpose(0, 1).reshape(x.shape[1], -1)
        return x.reshape(x.shape[0] * self.groups(x), -1)

    def of_rows(self, rows: Tensor, shape: Shape) -> Tensor:
        if self.spec.over_samples:
            return rows.reshape(shape[1], shape[0], *shape[2:]).transpose(0, 1)
        return rows.reshape(shape)

    def function(
        self, functions: ModuleType, shape: Shape, eps: float, running: Given | None = None
    ) -> Callable[..., Tensor]:
        norm = getattr(functions, self.name)
        how: dict[str, Any] = {} if self.activation is None else dict(activation=self.activation)
        before: tuple[Any, ...] = running or (None, None)
        after: tuple[Any, ...] = (self.statistics != "given", MOMENTUM, eps)
        if self.spec is GROUP_NORM:
            before, after = (num_groups(shape[1]),), (eps,)
        if self.modulated:
            return lambda x, scale, shift: norm(x, *before, None, None, *after, scale=scale, shift=shift, **how)
        if self.residual:
            return lambda x, residual, weight, bias: norm(x, *before, weight, bias, *after, residual=residual, **how)
        return lambda x, weight, bias: norm(x, *before, weight, bias, *after, **how)

    def module(self, namespace: ModuleType, x: Tensor, eps: float) -> torch.nn.Module | None:
        channels, dims, how = x.shape[1], max(1, x.dim() - 2), dict(eps=eps, affine=True, device=x.device)
        if self.spec is GROUP_NORM:
            return namespace.GroupNorm(self.groups(x), channels, **how)
        made = "BatchNorm" if self.spec.over_samples else "InstanceNorm"
        return getattr(namespace, f"{made}{dims}d")(channels, **how)

    def oracle(self, of: Arguments) -> Exact:
        return channel_reference.oracle(self.spec, *self._problem(of), self._given(of.x), self.activation, of.residual)

    def oracle_gradients(self, of: Arguments, dy: Tensor, dsum: Tensor | None = None) -> Gradients:
        how = dy, self._given(of.x), self.activation, of.residual
        return channel_reference.oracle_gradients(self.spec, *self._problem(of), *how)

    def composite(self, of: Arguments, running: Given | None = None) -> Tensor:
        averages = None if running is None or self.statistics != "kept" else Averages(*running, MOMENTUM)
        how = self._given(of.x), averages, self.activation, of.residual
        return channel_reference.composite(self.spec, *self._problem(of), *how)

    def torch_statistics(self, x: Tensor, eps: float) -> tuple[Tensor | None, Tensor]:
        if self.spec is GROUP_NORM:
            n, c, *positions = x.shape
            found = torch.native_group_norm(x.contiguous(), None, None, n, c, math.prod(positions), self.groups(x), eps)
        else:
            x = x if self.spec.over_samples else x.reshape(1, -1, *x.shape[2:])  # as torch's instance_norm does
            found = torch.native_batch_norm(x, None, None, None, None, True, 0.0, eps)
        return found[1].flatten(), found[2].flatten()

    def forward(self, of: Arguments, *, save: bool) -> Normalized:
        from ..ops.hosts import channels

        x, num_groups, weight, bias, eps = self._problem(of)
        given = self._given(x)
        problem = channels.Problem(self.spec, num_groups, eps, self.activation, given is not None)
        if given is not None:
            return Normalized(channels.apply(problem, x, weight, bias, *given, of.residual), None, None)
        return Normalized(*channels.forward(problem, x, weight, bias, of.residual))

    def backward(
        self, dy: Tensor, of: Arguments, mean: Tensor | None, rstd: Tensor, dsum: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        from ..ops.hosts import channels

        assert mean is not None
        x, num_groups, weight, bias, eps = self._problem(of)
        problem = channels.Problem(self.spec, num_groups, eps, self.activation)
        how = all_gradients(of) | dict(dr=of.residual is not None)
        return channels.backward(problem, dy, x, weight, bias, mean, rstd, of.residual, **how)

    def _problem(self, of: Arguments) -> tuple[Tensor, int, Tensor | None, Tensor | None, float]:
        """(x, num_groups, weight, bias, eps), the scale as the weight that it comes to."""
        x, weight, bias, eps, *_ = of
        weight = 1 + weight if self.modulated and weight is not None else weight
        return x, self.groups(x), weight, bias, eps

    def _given(self, x: Tensor) -> Given | None:
        return self.running(x) if self.statistics == "given" else None
