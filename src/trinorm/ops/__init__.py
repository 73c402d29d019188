"""How torch sees the kernels: the guard that picks the road, the calls seen before, autograd, and the registered ops."""

from .norm import added_norm, channel_norm, conditioned_norm, gated_sum_norm, qk_norm, quantized_norm, row_norm
from .row import CALLS

__all__ = [
    "CALLS",
    "added_norm",
    "channel_norm",
    "conditioned_norm",
    "gated_sum_norm",
    "qk_norm",
    "quantized_norm",
    "row_norm",
]
