"""Each norm as one kind of thing: of the same arguments, the function, its definition, torch's own, and the kernels.

What else a function takes is fixed here. ``trinorm check``, ``bench`` and ``inspect`` know norms only in this form.
"""

from __future__ import annotations

from ..spec import BATCH_NORM, CASTS, CHANNEL_NORMS, GROUP_NORM, INSTANCE_NORM, ROW_NORMS
from .channels import OfChannels, num_groups
from .norm import Arguments, Norm, Shape
from .rows import OfRows, OverChannels

__all__ = [
    "NORMS",
    "ROW_OPS",
    "VARIANTS",
    "Arguments",
    "Norm",
    "Normalized",
    "OfChannels",
    "OfRows",
    "OverChannels",
    "Shape",
    "num_groups",
]

# By the function's name.
NORMS: dict[str, Norm] = {
    **{spec.name: OfRows(spec) for spec in ROW_NORMS},
    **{spec.name: OfChannels(spec) for spec in CHANNEL_NORMS},
    "channel_layer_norm": OverChannels(),
}
ROW_OPS = tuple(spec.name for spec in ROW_NORMS)

# With other arguments: casting modes; activations, a scale and a shift of each sample, running statistics, a residual.
VARIANTS: dict[str, Norm] = {
    **{f"{spec.name}/{cast}": OfRows(spec.with_cast(cast)) for cast in CASTS if cast != "output" for spec in ROW_NORMS},
    "group_norm/silu": OfChannels(GROUP_NORM, "silu", modulated=True),
    "instance_norm/style": OfChannels(INSTANCE_NORM, modulated=True),
    "instance_norm/kept": OfChannels(INSTANCE_NORM, "gelu", statistics="kept"),
    "batch_norm/kept": OfChannels(BATCH_NORM, "relu", statistics="kept", residual=True),
    "batch_norm/given": OfChannels(BATCH_NORM, statistics="given"),
}
