"""Which road a call takes: the kernels, or the ATen composite."""

from __future__ import annotations

import functools
import importlib.util
import sys
import warnings

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..launch import INTERPRETED
from ..switches import options

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

HAS_TRITON = importlib.util.find_spec("triton") is not None

# Types that are no tensor subclass, which the kernels would bypass.
PLAIN = frozenset((Tensor, Parameter))
PLAIN_OR_NONE = PLAIN | {type(None)}

# By the modules they come with: none is there before an import that takes a second, which is left to others.
_DISTRIBUTED = (
    ("torch.distributed.tensor", "DTensor"),
    ("torch.distributed._functional_collectives", "AsyncCollectiveTensor"),
)


def is_empty(*tensors: Tensor) -> bool:
    """Whether a kernel would have nothing to do for one of these. A compiled graph is not asked: how many rows it has may
    be known when it runs (``x[mask]``), and its operators take none too.
    """
    return not torch.compiler.is_compiling() and any(not t.numel() for t in tensors)


def is_known(holds: bool | torch.SymBool) -> bool:
    """Whether this holds, as far as a tracer knows: of a number of rows that is known when its graph runs it does not."""
    if not isinstance(holds, torch.SymBool) and not torch.compiler.is_compiling():
        return holds
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # its import takes a second, before there is a tracer

    return guard_or_false(holds)


def has_kernels(x: Tensor) -> bool:
    """Whether there are kernels for where x is."""
    return HAS_TRITON and _is_launched_on(x)


def are_distributed(*args: object) -> bool:
    """Whether one of these is a wrapper of torch.distributed's, which takes registered ops to the tensor that it holds."""
    classes = tuple(getattr(sys.modules[module], name) for module, name in _DISTRIBUTED if module in sys.modules)
    return any(isinstance(t, classes) for t in args)


def takes_op(op: str, *tensors: Tensor | None, whole: bool) -> bool:
    """Whether this call is the registered op's: one of distributed tensors, whose rules hold without kernels too; or one
    that torch.compile or torch.export records, where the kernels will serve it.

    Elsewhere, and with ``options.inductor_fuses``, the composite is recorded, which Inductor fuses with what is around it;
    unless the call promises what would be lost so (``whole``). tensors: the input first.
    """
    x, others = tensors[0], [t for t in tensors if type(t) not in PLAIN_OR_NONE]
    assert x is not None
    if others and are_distributed(*others):
        if x.is_cuda and not HAS_TRITON and not torch.compiler.is_compiling():
            _warn_once(op, _NO_TRITON)
        return True
    if not torch.compiler.is_compiling() or any(is_traceable_wrapper_subclass(t) for t in others):
        return False
    return whole or (has_kernels(x) and not options.inductor_fuses)


def kernels_serve(op: str, x: Tensor, *others: Tensor | None, lacking: str | None = None) -> bool:
    """Whether the kernels compute this call; a GPU call that they do not serve says why, once.

    The composite serves CPU tensors, other tensor subclasses, and whatever looks inside an op (``observer``). lacking: why
    there is no kernel for such a call, where there is none.
    """
    if not _is_launched_on(x):
        return False
    reason = observer()
    if reason is None and not HAS_TRITON:
        reason = _NO_TRITON
    elif reason is None and lacking is not None:
        reason = lacking
    elif reason is None and any(t is not None and not _has_storage(t) for t in (x, *others)):
        reason = "an argument has no memory of its own"
    elif reason is None and not PLAIN_OR_NONE.issuperset(map(type, (x, *others))):
        reason = "an argument is a tensor subclass"
    if reason is None:
        return True
    if x.is_cuda and reason != _TRACER:
        _warn_once(op, reason)
    return False


def _has_storage(t: Tensor) -> bool:
    """Whether there are numbers at t's address: not of zeros that are none, nor of what functionalization wraps."""
    return not (t._is_zerotensor() or torch._is_functional_tensor(t))


def _is_launched_on(x: Tensor) -> bool:
    """Whether x is where Triton launches: a GPU, and a CPU for its interpreter. A meta tensor is neither's."""
    return x.is_cuda or (INTERPRETED and x.is_cpu)


def accumulator_dtype(*tensors: Tensor | None) -> torch.dtype:
    """What statistics, products and sums are computed in: fp32, or fp64 as soon as one tensor is."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def is_differentiated(*tensors: Tensor | None) -> bool:
    """Whether autograd is to know how a result came of these: never in inference mode, whatever grad mode is in there."""
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return False
    return any(t is not None and t.requires_grad for t in tensors)


def within_transform() -> bool:
    """Whether a transform of torch.func is active: what a tensor says of gradients and tangents is then of its own level,
    and others may ask for them below.
    """
    return torch._C._are_functorch_transforms_active()


# What torch.compiler.assume_constant_result says, whose import takes a second. Dynamo guards torch.func's state itself.
within_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def observer() -> str | None:
    """What looks inside ops just now and would not see a kernel: torch.compile and torch.jit, torch.func, forward-mode AD,
    modes that count or record ATen ops. None when nothing does.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return _TRACER
    if torch._C._are_functorch_transforms_active():  # within_transform, without its call
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode AD is active"
    if torch._C._len_torch_dispatch_stack() or torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH):
        return "a TorchDispatchMode is active"
    return None


_TRACER = "a tracer"
_NO_TRITON = "Triton is not installed"

# Where modes stand that look before autograd: make_fx(pre_dispatch=True), torch.export's.
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch


@functools.cache
def _warn_once(op: str, reason: str) -> None:
    warnings.warn(
        f"trinorm.{op}: {reason}; this call runs torch's own operator instead of trinorm's kernel (said once)",
        stacklevel=4,
    )
