"""How fast: which launch each problem gets, as ordered tables with the measurement beside each row."""

from .channel import choose_apply, choose_combine, choose_walk
from .kinds import (
    ChannelCombine,
    ChannelWalk,
    RowBackward,
    RowBackwardFew,
    RowBackwardSplit,
    RowBackwardWide,
    RowForward,
    RowForwardSplit,
    RowForwardWide,
    Tile,
)
from .row import FORGET, choose_backward, choose_forward, choose_total

__all__ = [
    "FORGET",
    "ChannelCombine",
    "ChannelWalk",
    "RowBackward",
    "RowBackwardFew",
    "RowBackwardSplit",
    "RowBackwardWide",
    "RowForward",
    "RowForwardSplit",
    "RowForwardWide",
    "Tile",
    "choose_apply",
    "choose_backward",
    "choose_combine",
    "choose_forward",
    "choose_total",
    "choose_walk",
]
