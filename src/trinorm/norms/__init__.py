"""Each norm as one kind of thing: of the same arguments, the function, its definition, torch's own, and the kernels.

What else a function takes is fixed here. ``trinorm check``, ``bench`` and ``inspect`` know norms only in this form.
"""

from __future__ import annotations

from ..spec import BATCH_NORM, CASTS, CHANNEL_NORMS, GROUP_NORM, INSTANCE_NORM, LAYER_NORM, RMS_NORM, ROW_NORMS
from .channels import OfChannels, num_groups
from .heads import OfHeads
from .norm import Arguments, Norm, Results, Shape, as_tuple
from .rows import OfRows, OverChannels
from .sums import OfSums

__all__ = [
    "NORMS",
    "ROW_OPS",
    "SUM_OPS",
    "VARIANTS",
    "Arguments",
    "Norm",
    "OfChannels",
    "OfHeads",
    "OfRows",
    "OfSums",
    "OverChannels",
    "Results",
    "Shape",
    "as_tuple",
    "num_groups",
]

# By the function's name.
NORMS: dict[str, Norm] = {
    **{spec.name: OfRows(spec) for spec in ROW_NORMS},
    **{spec.name: OfChannels(spec) for spec in CHANNEL_NORMS},
    "channel_layer_norm": OverChannels(),
    **{norm.name: norm for norm in map(OfSums, ROW_NORMS)},
    "qk_norm": OfHeads(),
}
ROW_OPS = tuple(spec.name for spec in ROW_NORMS)
SUM_OPS = tuple(name for name, norm in NORMS.items() if norm.of_sum)

# With other arguments: casting modes; a residual stream of fp32 that has a factor, a sum that goes nowhere; activations, a
# scale and a shift of each sample, running statistics, a residual; heads that are turned otherwise.
VARIANTS: dict[str, Norm] = {
    **{f"{spec.name}/{cast}": OfRows(spec.with_cast(cast)) for cast in CASTS if cast != "output" for spec in ROW_NORMS},
    "add_layer_norm/post": OfSums(LAYER_NORM, post=True),
    "add_rms_norm/stream": OfSums(RMS_NORM, alpha=2.0, wide=True),
    "group_norm/silu": OfChannels(GROUP_NORM, "silu", modulated=True),
    "instance_norm/style": OfChannels(INSTANCE_NORM, modulated=True),
    "instance_norm/kept": OfChannels(INSTANCE_NORM, "gelu", statistics="kept"),
    "batch_norm/kept": OfChannels(BATCH_NORM, "relu", statistics="kept", residual=True),
    "batch_norm/given": OfChannels(BATCH_NORM, statistics="given"),
    "qk_norm/neighbours": OfHeads(interleaved=True),
    "qk_norm/half": OfHeads(turned="half"),
    "qk_norm/alone": OfHeads(turned="none"),
    "qk_norm/llama": OfHeads(RMS_NORM.with_cast("llama")),
    "qk_norm/gemma": OfHeads(RMS_NORM.with_cast("gemma")),
}
