"""trinorm: normalization for PyTorch, written in Triton.

- ``trinorm.functional``  layer_norm, rms_norm, group_norm, instance_norm and batch_norm, with torch.nn.functional's
                          signatures; channel_layer_norm; add_layer_norm and add_rms_norm, of a sum; and what
                          docs/variants.md has besides
- ``trinorm.nn``          the modules of these, subclasses of torch's
- ``trinorm.replace``     swap a model's norms for these, in place: torch's, and others by what they compute
- ``trinorm.fuse``        make one launch of sums and the norms behind them, of QK-norm with what turns it, and of
                          channel norms with the activations behind them
- ``trinorm.restore``     undo both
- ``trinorm.options``     switches for the whole process: batch_invariant, autocast_keeps_dtype, inductor_fuses
"""

from . import functional, nn
from .models.convert import Report, replace, restore
from .models.fusing import fuse
from .switches import options

__version__ = "0.1.0"

__all__ = ["Report", "functional", "fuse", "nn", "options", "replace", "restore"]
