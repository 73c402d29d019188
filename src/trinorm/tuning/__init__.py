"""How fast: which launch each problem gets, as ordered tables with the measurement beside each row."""

from .row import (
    TOTAL,
    RowBackward,
    RowBackwardFew,
    RowBackwardWide,
    RowForward,
    RowForwardWide,
    Tile,
    choose_backward,
    choose_forward,
)

__all__ = [
    "TOTAL",
    "RowBackward",
    "RowBackwardFew",
    "RowBackwardWide",
    "RowForward",
    "RowForwardWide",
    "Tile",
    "choose_backward",
    "choose_forward",
]
