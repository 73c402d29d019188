"""How torch sees the kernels: the guard that picks the road, the calls seen before, autograd, and the registered ops."""

from .norm import channel_norm, row_norm
from .row import CALLS

__all__ = ["CALLS", "channel_norm", "row_norm"]
