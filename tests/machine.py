"""Whether there is a GPU; without one, importing this has the kernels run through Triton's interpreter."""

import os

import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    # Before trinorm is imported: it and Triton read this once.
    os.environ["TRITON_INTERPRET"] = "1"
    from trinorm import interpreter

    interpreter.install()
