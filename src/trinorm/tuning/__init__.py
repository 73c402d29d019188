"""How fast: which launch each problem gets, as ordered tables with the measurement beside each row."""

from .channel import (
    choose_apply,
    choose_combine,
    choose_layer_backward,
    choose_layer_forward,
    choose_sums,
    choose_whole,
    streams,
)
from .conditioned import (
    choose_conditioned_backward,
    choose_conditioned_forward,
    choose_conditioned_total,
    programs_of_a_set,
)
from .dynamic import OF_ONE_NUMBER, choose_dynamic_backward, choose_dynamic_forward, programs_of_a_chunk
from .gated_sum import choose_gated_sum_backward, choose_gated_sum_forward
from .heads import Heads, choose_heads_backward, choose_heads_forward
from .kinds import (
    ChannelCombine,
    ChannelHeld,
    ChannelLayer,
    ChannelSplit,
    ChannelWalk,
    ChannelWhole,
    RowBackward,
    RowBackwardFew,
    RowBackwardSplit,
    RowBackwardWide,
    RowForward,
    RowForwardSplit,
    RowForwardWide,
    Tile,
)
from .poly import OF_THREE_NUMBERS, choose_poly_backward, choose_poly_forward, registers_of
from .quantized import choose_quantized
from .row import FORGET, backward_turns, choose_backward, choose_forward, choose_total, forward_turns
from .weight import WeightRows, choose_weight

__all__ = [
    "FORGET",
    "OF_ONE_NUMBER",
    "OF_THREE_NUMBERS",
    "ChannelCombine",
    "ChannelHeld",
    "ChannelLayer",
    "ChannelSplit",
    "ChannelWalk",
    "ChannelWhole",
    "Heads",
    "RowBackward",
    "RowBackwardFew",
    "RowBackwardSplit",
    "RowBackwardWide",
    "RowForward",
    "RowForwardSplit",
    "RowForwardWide",
    "Tile",
    "WeightRows",
    "backward_turns",
    "choose_apply",
    "choose_backward",
    "choose_combine",
    "choose_conditioned_backward",
    "choose_conditioned_forward",
    "choose_conditioned_total",
    "choose_dynamic_backward",
    "choose_dynamic_forward",
    "choose_forward",
    "choose_gated_sum_backward",
    "choose_gated_sum_forward",
    "choose_heads_backward",
    "choose_heads_forward",
    "choose_layer_backward",
    "choose_layer_forward",
    "choose_poly_backward",
    "choose_poly_forward",
    "choose_quantized",
    "choose_sums",
    "choose_total",
    "choose_weight",
    "choose_whole",
    "forward_turns",
    "programs_of_a_chunk",
    "programs_of_a_set",
    "registers_of",
    "streams",
]
