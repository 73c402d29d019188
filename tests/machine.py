"""Whether there is a GPU; without one, importing this has the kernels run through Triton's interpreter."""

import os

import torch

ON_GPU = torch.cuda.is_available()
# Of gradcheck and gradgradcheck: each element of the Jacobian, or, where the interpreter would run for each element, along
# a random direction, in which a wrong element shows as well.
JACOBIAN = {"fast_mode": not ON_GPU}
if not ON_GPU:
    # Before trinorm is imported: it and Triton read this once.
    os.environ["TRITON_INTERPRET"] = "1"
    from trinorm import interpreter

    interpreter.install()
