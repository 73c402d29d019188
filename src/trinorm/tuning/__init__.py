"""How fast: which launch each problem gets, as ordered tables with the measurement beside each row."""

from .kinds import (
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
    "RowBackward",
    "RowBackwardFew",
    "RowBackwardSplit",
    "RowBackwardWide",
    "RowForward",
    "RowForwardSplit",
    "RowForwardWide",
    "Tile",
    "choose_backward",
    "choose_forward",
    "choose_total",
]
