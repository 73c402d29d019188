"""Whether x̂ can be made again of y, which ``save="output"`` asks: a question to the values of weight and bias.

x̂ = (y - b)/w, and of what y was rounded by, x̂ gets u·|x̂ + b/w|. So where |b| <= |w| it is as good as if x̂ itself, with a 1
added, had been rounded to y's dtype; and for u to be all that y was rounded by, w must be a normal number there, and no
y, of |x̂| <= √N, may overflow.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def undoable(weight: Tensor | None, bias: Tensor | None, n: int, dtype: torch.dtype, offset: float = 0.0) -> bool:
    """Whether y of ``dtype``, of rows of n elements and times ``weight + offset``, can be undone. The host waits for the
    device, to see the values.

    Each time: an answer kept would go stale unseen, as not all who write a weight (fused optimizers, FSDP) count up its
    version. False under CUDA-graph capture, where nobody can wait.
    """
    given = weight if weight is not None else bias
    if given is None or not n:
        return True
    if given.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    w = torch.ones_like(given) if weight is None else weight.detach()
    w = (w.double() + offset if weight is not None and offset else w).abs()
    margin = w if bias is None else w - bias.detach().abs()
    least, most, spared = torch.stack([*(extreme.double() for extreme in w.aminmax()), margin.amin().double()]).tolist()
    limits = torch.finfo(dtype)
    # Written so that NaN, which is in all three if it is anywhere, fails.
    return least >= limits.tiny and most * (math.sqrt(n) + 1) <= limits.max and spared >= 0
