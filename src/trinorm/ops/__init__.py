"""How torch sees the kernels: the guard that picks the road, the calls seen before, autograd, and the registered ops."""

from .row import CALLS, row_norm

__all__ = ["CALLS", "row_norm"]
