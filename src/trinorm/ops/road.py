"""Which road a call takes: the kernels, or the ATen composite."""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch
from torch import Tensor
from torch.nn import Parameter

from ..launch import INTERPRETED

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

HAS_TRITON = importlib.util.find_spec("triton") is not None

_PLAIN = (Tensor, Parameter)


def kernels_serve(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the kernels compute this call; a GPU call that they do not serve says why, once.

    The composite serves CPU tensors, tensor subclasses, and every transformation that looks inside an op: torch.compile
    (Inductor fuses it), torch.func, forward-mode AD, and modes that count or record ATen ops.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if not x.is_cuda and not INTERPRETED:
        return False
    if not HAS_TRITON:
        reason = "Triton is not installed"
    elif type(x) not in _PLAIN or type(weight) not in _WEIGHTS or type(bias) not in _WEIGHTS:
        reason = "an argument is a tensor subclass"
    elif torch._C._are_functorch_transforms_active():
        reason = "a torch.func transform is active"
    elif torch.autograd.forward_ad._current_level >= 0:
        reason = "forward-mode AD is active"
    elif torch._C._len_torch_dispatch_stack():
        reason = "a TorchDispatchMode is active"
    else:
        return True
    if x.is_cuda:
        _warn_once(op, reason)
    return False


_WEIGHTS = (*_PLAIN, type(None))


@functools.cache
def _warn_once(op: str, reason: str) -> None:
    warnings.warn(
        f"trinorm.{op}: {reason}; this call runs torch's own operator instead of trinorm's kernel (said once)",
        stacklevel=4,
    )
