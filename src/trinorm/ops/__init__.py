"""How torch sees the kernels: the guard that picks the road, the calls seen before, and autograd."""

from .calls import call_key
from .row import SEEN, row_norm

__all__ = ["SEEN", "call_key", "row_norm"]
