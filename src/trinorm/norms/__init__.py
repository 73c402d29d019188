"""Each norm as one kind of thing: of the same arguments, the function, its definition, torch's own, and the kernels.

What else a function takes is fixed here. ``trinorm check``, ``bench`` and ``inspect`` know norms only in this form.
"""

from __future__ import annotations

from ..formats import FORMAT_NAMES, SWIZZLED
from ..functional.relatives import PART
from ..spec import (
    BATCH_NORM,
    CASTS,
    CHANNEL_NORMS,
    DYNAMIC_NORMS,
    GROUP_NORM,
    INSTANCE_NORM,
    LAYER_NORM,
    RMS_NORM,
    ROW_NORMS,
    ConditionedNorm,
)
from .channels import OfChannels, num_groups
from .conditioned import OfConditioned
from .elements import OfDynamic, OfPoly
from .gated_sums import OfGatedSums
from .heads import OfHeads
from .linear import OfLinear
from .norm import Arguments, Norm, Results, Shape, as_tuple
from .quantized import OfQuantized
from .relatives import OfRelative
from .rows import OfRows, OverChannels
from .sums import OfSums
from .weight import OfWeight

__all__ = [
    "CONDITIONED_OPS",
    "ELEMENT_OPS",
    "NORMS",
    "QUANTIZED_OPS",
    "ROW_OPS",
    "SUM_OPS",
    "VARIANTS",
    "Arguments",
    "Norm",
    "OfChannels",
    "OfConditioned",
    "OfDynamic",
    "OfGatedSums",
    "OfHeads",
    "OfLinear",
    "OfPoly",
    "OfQuantized",
    "OfRelative",
    "OfRows",
    "OfSums",
    "OfWeight",
    "OverChannels",
    "Results",
    "Shape",
    "as_tuple",
    "num_groups",
]

# Those of each sample, as of a condition, of a gated sum too; of the gates, the one that transformers' models have behind
# the norm; of heads; and those that differ by their statistic.
_CONDITIONED = (
    *(OfConditioned(ConditionedNorm(spec, modulated=True), "sample") for spec in ROW_NORMS),
    *(OfGatedSums(ConditionedNorm(spec, modulated=True), "sample") for spec in ROW_NORMS),
    *(OfConditioned(ConditionedNorm(spec, "silu")) for spec in ROW_NORMS),
    *(OfConditioned(ConditionedNorm(spec)) for spec in ROW_NORMS),
    OfRelative(ConditionedNorm(RMS_NORM, divisor=1)),
    OfRelative(ConditionedNorm(RMS_NORM, divisor=1), scalar=True),
    OfRelative(ConditionedNorm(RMS_NORM), part=PART),
)

_ELEMENTS = (*map(OfDynamic, DYNAMIC_NORMS), OfPoly(), OfWeight())

# By the function's name.
NORMS: dict[str, Norm] = {
    **{spec.name: OfRows(spec) for spec in ROW_NORMS},
    **{spec.name: OfChannels(spec) for spec in CHANNEL_NORMS},
    "channel_layer_norm": OverChannels(),
    **{norm.name: norm for norm in map(OfSums, ROW_NORMS)},
    **{norm.name: norm for norm in map(OfLinear, ROW_NORMS)},
    "qk_norm": OfHeads(),
    **{norm.name: norm for norm in _CONDITIONED},
    "quantized_layer_norm": OfQuantized(LAYER_NORM, "fp8_block"),
    "quantized_rms_norm": OfQuantized(RMS_NORM, "fp8_token"),
    **{norm.name: norm for norm in _ELEMENTS},
}
ROW_OPS = tuple(spec.name for spec in ROW_NORMS)
SUM_OPS = tuple(name for name, norm in NORMS.items() if norm.of_sum and not norm.of_gated_sum)
CONDITIONED_OPS = tuple(norm.name for norm in _CONDITIONED)
ELEMENT_OPS = tuple(norm.name for norm in _ELEMENTS)

# With other arguments: casting modes; a residual stream of fp32 that has a factor, a sum that goes nowhere; activations, a
# scale and a shift of each sample, running statistics, a residual; heads that are turned otherwise; a scale and a shift of
# each token or of all; gates that come first, as Mamba2 has them, of groups too, and other ones; other formats, and their
# scales swizzled.
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
    "modulated_layer_norm/token": OfConditioned(ConditionedNorm(LAYER_NORM, modulated=True), "token"),
    "modulated_rms_norm/all": OfConditioned(ConditionedNorm(RMS_NORM, modulated=True)),
    "add_modulated_layer_norm/stream": OfGatedSums(ConditionedNorm(LAYER_NORM, modulated=True), "sample", wide=True),
    "add_modulated_rms_norm/all": OfGatedSums(ConditionedNorm(RMS_NORM, modulated=True)),
    "gated_layer_norm/first": OfConditioned(ConditionedNorm(LAYER_NORM, "sigmoid", gate_first=True)),
    "gated_rms_norm/first": OfConditioned(ConditionedNorm(RMS_NORM, "silu", gate_first=True)),
    "gated_rms_norm/groups": OfConditioned(ConditionedNorm(RMS_NORM, "silu", gate_first=True), groups=8),
    "gated_rms_norm/sigmoid": OfConditioned(ConditionedNorm(RMS_NORM, "sigmoid")),
    "gated_rms_norm/llama": OfConditioned(ConditionedNorm(RMS_NORM.with_cast("llama"), "silu")),
    "gated_rms_norm/gemma": OfConditioned(ConditionedNorm(RMS_NORM.with_cast("gemma"), "silu")),
    **{f"quantized_rms_norm/{name}": OfQuantized(RMS_NORM, name) for name in FORMAT_NAMES if name != "fp8_token"},
    **{f"quantized_rms_norm/{name}_swizzled": OfQuantized(RMS_NORM, name, "swizzled") for name in SWIZZLED},
    "per_head_rms_norm/llama": OfConditioned(ConditionedNorm(RMS_NORM.with_cast("llama"))),
    "per_head_rms_norm/gemma": OfConditioned(ConditionedNorm(RMS_NORM.with_cast("gemma"))),
}

# Both names and variants: each has a format.
QUANTIZED_OPS = tuple(name for name, norm in (NORMS | VARIANTS).items() if norm.form is not None)
