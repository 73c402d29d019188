"""How torch sees the kernels: the guard that picks the road, and autograd."""

from .row import row_norm

__all__ = ["row_norm"]
