"""Launches that force every kernel path of the row family, and the specs that have them."""

import pytest

from trinorm.spec import LAYER_NORM, RMS_NORM
from trinorm.tuning import (
    RowBackward,
    RowBackwardFew,
    RowBackwardSplit,
    RowBackwardWide,
    RowForward,
    RowForwardSplit,
    RowForwardWide,
    Tile,
    channel,
)

SPECS = [pytest.param(LAYER_NORM, id="layer_norm"), pytest.param(RMS_NORM, id="rms_norm")]

# Chunks that divide few of the sizes, so that the last one is ragged.
PATHS = {
    "row a program": (
        RowForward(Tile(1, 1024, 4), tiles=1, stream=False, preload=False, early=True),
        RowBackward(Tile(1, 1024, 4), tiles=1, stages=3, per_sm=1, stream=True),
    ),
    "rows a program": (
        RowForward(Tile(4, 512, 4), tiles=1, stream=False, preload=True, early=False),
        RowBackward(Tile(4, 512, 4), tiles=1, stages=1, per_sm=1, stream=False),
    ),
    "tiles a program": (
        RowForward(Tile(2, 512, 4), tiles=4, stream=False, preload=True, early=True),
        RowBackward(Tile(1, 512, 4), tiles=2, stages=1, per_sm=2, stream=False),
    ),
    "few": (
        RowForward(Tile(2, 2048, 8), tiles=1, stream=True, preload=True, early=True, pairwise=True),
        RowBackwardFew(Tile(2, 2048, 8), sums=Tile(4, 1024, 8)),
    ),
}
# Teams of 2 to 96 programs: of a power of two and not, of more words than a warp has lanes.
SPLIT = (RowForwardSplit(Tile(1, 512, 4), 1024), RowBackwardSplit(Tile(1, 512, 4), 1024, stages=3, per_sm=4))
WIDE = (RowForwardWide(Tile(1, 1024, 4)), RowBackwardWide(Tile(1, 1024, 4), stages=2, per_sm=4))


def forget_channel_choices() -> None:
    """So that a patched table in tuning/channel.py is asked."""
    for choose in (channel.choose_whole, channel._walk, channel._tile):
        choose.cache_clear()
