"""The Triton kernels. Nothing here imports torch or knows anything of the host.

Launched families over small jit helpers:

- ``index``   which rows and columns a program owns, their offsets and masks
- ``stats``   mean and rstd of a row, held in registers or streamed
- ``affine``  y = x̂·w + b and its gradients
- ``row``     the launched forward kernels
- ``row_backward``, ``row_backward_wide``  the launched backward kernels
- ``partials``  the last step of a backward: the sums of what its programs made
- ``row_split``  both, of rows that several programs share
- ``channel``, ``channel_backward``  the launched kernels of channel norms; ``channel_tiles``  what their programs own
- ``channel_layer``  the launched kernels of LayerNorm over channels that are first in memory
- ``added``, ``heads``, ``conditioned``  norms of sums, of heads, and of rows with parameters of their own; of these,
  ``conditioned_wide`` and ``conditioned_backward_wide`` have the rows that no program holds
- ``dynamic``, ``poly``  functions of an element (DyT, Derf), and a polynomial of normalized powers (PolyNorm)
- ``weight``  weight normalization, of rows held and of those that several programs share
- ``overlap`` what lets a kernel be put on the device before the one ahead of it ends
"""
