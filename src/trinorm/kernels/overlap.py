"""Programmatic dependent launch: a kernel may be put on the device while the one before it still runs.

PDL is constexpr and goes with the launch option of that name (sm_90 and later). Every launched kernel waits before it
touches memory, whatever is read or written there: the kernel before may still write x or the weight (an optimizer step),
or read the block that y was just given. So the wait is also all that is needed: as a kernel is complete only after its
own wait, the order of a stream holds along any chain. What overlaps is the launch itself, a third of the time of a small
norm.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Return when every kernel before this one on the stream is complete, its writes visible."""
    if PDL:
        gdc_wait()


@triton.jit
def let_next_launch(PDL: tl.constexpr):
    """The next kernel may be put on the device as soon as every program has come here or ended. It will still wait."""
    if PDL:
        gdc_launch_dependents()
