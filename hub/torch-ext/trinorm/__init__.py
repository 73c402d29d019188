"""trinorm's functions and its layers for transformers, as a kernel of the hub. All else is laid beside it by layout.py."""

from . import functional
from .integrations import layers

__all__ = ["functional", "layers"]
