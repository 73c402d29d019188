"""How fast: which launch each problem gets, as ordered tables with the measurement beside each row."""

from .channel import (
    choose_apply,
    choose_combine,
    choose_layer_backward,
    choose_layer_forward,
    choose_sums,
    choose_whole,
)
from .kinds import (
    ChannelCombine,
    ChannelHeld,
    ChannelLayer,
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
from .row import FORGET, backward_turns, choose_backward, choose_forward, choose_total, forward_turns

__all__ = [
    "FORGET",
    "ChannelCombine",
    "ChannelHeld",
    "ChannelLayer",
    "ChannelWalk",
    "ChannelWhole",
    "RowBackward",
    "RowBackwardFew",
    "RowBackwardSplit",
    "RowBackwardWide",
    "RowForward",
    "RowForwardSplit",
    "RowForwardWide",
    "Tile",
    "backward_turns",
    "choose_apply",
    "choose_backward",
    "choose_combine",
    "choose_forward",
    "choose_layer_backward",
    "choose_layer_forward",
    "choose_sums",
    "choose_total",
    "choose_whole",
    "forward_turns",
]
