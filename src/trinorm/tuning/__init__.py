"""How fast: which launch each problem gets, as ordered tables with the measurement beside each row."""

from .row import RowBackward, RowBackwardFew, RowBackwardWide, RowForward, RowForwardWide, choose_backward, choose_forward

__all__ = [
    "RowBackward",
    "RowBackwardFew",
    "RowBackwardWide",
    "RowForward",
    "RowForwardWide",
    "choose_backward",
    "choose_forward",
]
