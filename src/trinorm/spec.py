"""What is computed. A variant of a norm is a value of a spec, not another kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

# Where a norm rounds to its input's dtype, and what its weight stands for: models differ.
Cast = Literal["output", "llama", "gemma"]
CASTS: tuple[Cast, ...] = get_args(Cast)


# What a channel norm may do to its result at once.
Activation = Literal["relu", "silu", "gelu"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)

# What a gate is passed through before a norm's input or result is multiplied by it.
GateActivation = Literal["silu", "sigmoid"]
GATE_ACTIVATIONS: tuple[GateActivation, ...] = get_args(GateActivation)


@dataclass(frozen=True)
class RowNorm:
    """A norm whose statistics run over the last dims of each row.

    center: subtract the mean, so that the statistic is the variance (LayerNorm); otherwise it is the mean square (RMSNorm).
    """

    name: str
    center: bool
    cast: Cast = "output"

    @property
    def rounded(self) -> bool:
        """Whether the normalized input is rounded to the input's dtype before it meets weight and bias."""
        return self.cast == "llama"

    @property
    def offset(self) -> float:
        """What is added to the weight."""
        return 1.0 if self.cast == "gemma" else 0.0

    def with_cast(self, cast: Cast) -> RowNorm:
        """The same norm in another casting mode."""
        return _IN_CAST[self.name, cast]


LAYER_NORM = RowNorm("layer_norm", center=True)
RMS_NORM = RowNorm("rms_norm", center=False)

ROW_NORMS = (LAYER_NORM, RMS_NORM)

# Made beforehand, so that a call finds one without making it, in a traced graph too.
_IN_CAST = {(spec.name, cast): replace(spec, cast=cast) for spec in ROW_NORMS for cast in CASTS}


class ConditionedNorm(NamedTuple):
    """A row norm whose rows may have weights and biases of their own, with a gate or without.

    gate: what the gate is passed through; None where there is none. gate_first: it multiplies the norm's input, and not its
    result. modulated: the weight is a scale, its distance from 1. counted, divisor: rstd is of the squares of so many of a
    row's elements, its first, over so much; None is the row's size. What centers has both None.
    """

    norm: RowNorm
    gate: GateActivation | None = None
    gate_first: bool = False
    modulated: bool = False
    counted: int | None = None
    divisor: int | None = None

    @property
    def offset(self) -> float:
        """What is added to the weight."""
        return 1.0 if self.modulated else self.norm.offset

    def statistic(self, size: int) -> tuple[int, int]:
        """(K, D) of rows of ``size`` elements: rstd is that of the sum of K squares over D."""
        return (size if self.counted is None else self.counted), (size if self.divisor is None else self.divisor)


class DynamicNorm(NamedTuple):
    """What stands where a norm does and has no statistics: ``function(alpha·x + shift)·weight + bias``, of each element.

    shifted: whether there is a shift.
    """

    name: str
    function: Literal["tanh", "erf"]
    shifted: bool


DYNAMIC_TANH = DynamicNorm("dynamic_tanh", "tanh", shifted=False)
DYNAMIC_ERF = DynamicNorm("dynamic_erf", "erf", shifted=True)

DYNAMIC_NORMS = (DYNAMIC_TANH, DYNAMIC_ERF)


@dataclass(frozen=True)
class ChannelNorm:
    """A norm over x seen as samples × channels × positions, whose weight and bias are a channel's.

    over_samples: statistics run over the samples too, and are a channel's (BatchNorm). of_positions: they run over the
    channels alone, and are those of a position of one sample (LayerNorm over channels). Otherwise they are those of a group
    of channels of one sample (GroupNorm; InstanceNorm, whose groups are single channels).
    """

    name: str
    over_samples: bool = False
    of_positions: bool = False


GROUP_NORM = ChannelNorm("group_norm")
INSTANCE_NORM = ChannelNorm("instance_norm")
BATCH_NORM = ChannelNorm("batch_norm", over_samples=True)

# Kept apart: its kernels are of the row family, and know no activation.
CHANNEL_LAYER_NORM = ChannelNorm("channel_layer_norm", of_positions=True)

CHANNEL_NORMS = (GROUP_NORM, INSTANCE_NORM, BATCH_NORM)
