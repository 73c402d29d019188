"""How fast: which launch each problem gets, as ordered tables with the measurement beside each row."""

from .row import (
    FORGET,
    RowBackward,
    RowBackwardFew,
    RowBackwardSplit,
    RowBackwardWide,
    RowForward,
    RowForwardSplit,
    RowForwardWide,
    Tile,
    choose_backward,
    choose_forward,
    choose_total,
)

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
