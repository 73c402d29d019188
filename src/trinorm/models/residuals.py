"""What a rewritten forward calls for sums and the norms behind them: one launch, or what stood there."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .. import checks
from ..functional.added import norm_of_sum
from ..nn.row import LayerNorm, RMSNorm
from ..ops import added, stream
from ..ops.road import KERNEL_DTYPES
from ..switches import options
from .forms import Form
from .heads_fused import deferred, turned
from .made import NEXT
from .norm_calls import asked_of, is_replaced, is_traced, row_of
from .recognize import form_in_force
from .rewritten import DEFERRED, NORM_OF_SUM, OF_ARGUMENT, RETURNED, SUM, TURNED

# Where a sum has with it what the next block's norm makes of it.
HANDED = "_trinorm_handed"

# From how many elements on: of fewer, all waits for the host, whom this costs more than the launch that it saves (9 µs
# more, on a CPU). Where a CUDA graph records, of any.
HANDED_FROM = 1 << 20


def _sum(norm: Any, a: Any, b: Any) -> tuple[Any, list[Tensor]]:
    """(a + b, what the norm makes of that: nothing where it is to be called)."""
    both = None if norm is None else _both(norm, a, b)
    return (a + b, []) if both is None else (both[1], [both[0]])


def _norm_of_sum(norm: Any, a: Any, b: Any) -> Any:
    both = _both(norm, a, b)
    return norm(a + b) if both is None else both[0]


def _returned(module: torch.nn.Module, a: Any, b: Any) -> Any:
    """a + b, which has with it what the next block's norm makes of it.

    That is on the tensor itself, and goes with it. Of a recorded gradient it would take a part away from the sum's own, for
    which anybody may ask; in inference mode nobody sees a tensor written to.
    """
    # The next block of a copy of DataParallel's is a copy too.
    following = None if is_traced() or "_is_replica" in vars(module) else vars(module).get(NEXT)
    if following is None or torch.is_grad_enabled() or torch.is_inference_mode_enabled() or is_replaced(module):
        return a + b
    if type(a) is not Tensor or not (a.numel() >= HANDED_FROM or (a.is_cuda and torch._C._cuda_isCurrentStreamCapturing())):
        return a + b
    (norm,) = following
    if (both := _both(norm, a, b, _fits)) is None:
        return a + b
    y, total = both
    setattr(total, HANDED, _Handed(y, norm, total))
    return total


def _of_argument(module: torch.nn.Module, norm: Any, x: Any) -> tuple[Any, list[Tensor]]:
    """(x, what the norm makes of it: nothing where it is to be called).

    That is what came with x, where x and the norm are still what they were. Where a gradient is recorded, what is returned
    for x is x with another gradient, which is added to the norm's in one pass.
    """
    if type(x) is not Tensor or is_traced():
        return x, []
    # Another thread may have taken it in between.
    handed = vars(x).pop(HANDED, None) if hasattr(x, HANDED) else None
    if torch.is_grad_enabled():
        both = _stream(norm, x)
        return (x, []) if both is None else (both[1], [both[0]])
    if isinstance(handed, _Handed) and handed.is_of(norm, x) and not is_replaced(norm) and not is_replaced(module):
        return x, [handed.y]
    return x, []


HELPERS: dict[str, Callable[..., Any]] = {SUM: _sum, NORM_OF_SUM: _norm_of_sum, RETURNED: _returned}
HELPERS.update({OF_ARGUMENT: _of_argument, DEFERRED: deferred, TURNED: turned})


class _Handed:
    """What a norm makes of a sum: y. Of a copy of the sum it is none, nor in a file."""

    __slots__ = "_norm", "_parameters", "_state", "_total", "y"

    def __init__(self, y: Tensor, norm: torch.nn.Module, total: Tensor) -> None:
        self.y, self._norm, self._total = y, norm, weakref.ref(total)
        self._parameters = _parameters(norm)
        self._state = _state(norm, total, self._parameters)

    def is_of(self, norm: torch.nn.Module, x: Tensor) -> bool:
        """Whether x and the norm are those that it was made of, and still as they were then."""
        if self._norm is not norm or self._total() is not x:
            return False
        now = _parameters(norm)
        same = len(now) == len(self._parameters) and all(map(operator.is_, now, self._parameters))
        return same and self._state == _state(norm, x, now)

    def __reduce__(self) -> Any:
        return set, ()  # which torch.load(weights_only=True) takes


def _parameters(norm: torch.nn.Module) -> list[Tensor]:
    form = form_in_force(norm)
    if type(form) is Form:
        names = form.weight, form.bias
    else:  # what has no form any more is not served, whatever its parameters are called
        names = "weight" if type(norm) in (LayerNorm, RMSNorm) else None, "bias" if type(norm) is LayerNorm else None
    return [p for name in names if name is not None and (p := getattr(norm, name)) is not None]


def _state(norm: Any, x: Tensor, parameters: list[Tensor]) -> tuple[object, ...]:
    """What is another once x or a parameter was written to, autocast entered, the norm set, or the stream, whose y is."""
    own = type(norm) in (LayerNorm, RMSNorm)
    how = (norm.normalized_shape, norm.eps, norm.cast, norm.save, norm.batch_invariant) if own else (form_in_force(norm),)
    stream = torch._C._cuda_getCurrentRawStream(x.device.index) if x.is_cuda else 0
    of_each = ((p._version, p.data_ptr()) for p in parameters)
    return x._version, torch._C._is_any_autocast_enabled(), stream, options.batch_invariant, *how, *of_each


def _fits(norm: Any, x: Any) -> bool:
    """Whether a norm that the forward itself does not call could be of a tensor like x, just now.

    Between two blocks a tensor may be brought to another width or device, and parameters from where they are kept.
    """
    if type(x) is not Tensor or x.layout is not torch.strided or x.is_nested or x.dtype not in KERNEL_DTYPES:
        return False
    shape = norm.normalized_shape if type(norm) in (LayerNorm, RMSNorm) else x.shape[-1:]
    return tuple(x.shape[-len(shape) :]) == tuple(shape) and all(
        type(p) is torch.nn.Parameter
        and p.shape == x.shape[-len(shape) :]
        and p.device == x.device
        and not p.is_inference()
        for p in _parameters(norm)
    )


def _both(
    norm: Any, a: Any, b: Any, fits: Callable[[Any, Tensor], bool] = lambda norm, a: True
) -> tuple[Tensor, Tensor] | None:
    """(y, sum) in one launch; None where the sum and the norm are to be called. fits: what else is asked."""
    if type(a) is not Tensor or type(b) is not Tensor:
        return None
    asked = asked_of(norm)
    if asked is None or has_torch_function_variadic(a, b):
        return None
    manner, weight, bias = asked
    # What follows was asked of one like it.
    if (call := added.recall(manner, a, b, weight, bias, None, None, None)) is not None:
        return call(a, b, weight, bias, None, None, None)
    if a.shape != b.shape or a.device != b.device or not (a.is_contiguous() and b.is_contiguous()):
        return None  # the sum's order of memory would be another
    if a.dtype != b.dtype:  # y has the dtype of what comes first
        wide = torch.promote_types(a.dtype, b.dtype)
        if wide not in (a.dtype, b.dtype):
            return None
        a, b, manner = (a, b, manner) if a.dtype == wide else (b, a, None)
    if not fits(norm, a) or (row := row_of(norm, a)) is None:
        return None
    spec, shape, weight, bias, eps, batch_invariant = row
    by = eps, shape, 1.0, 0.0, None, spec.cast, batch_invariant
    return norm_of_sum(spec.with_cast("output"), (a, b, weight, bias, None, None), by, manner)


def _stream(norm: Any, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """(y, x), of which the gradients are added in one pass."""
    if not x.requires_grad or (asked := asked_of(norm)) is None or has_torch_function_variadic(x):
        return None
    if (both := stream.recall(asked[0], x, *asked[1:])) is not None:
        return both
    if (row := row_of(norm, x)) is None:
        return None
    spec, shape, weight, bias, eps, batch_invariant = row
    eps = checks.own_epsilon(spec, x, eps)
    size, eps, invariant = checks.rows(spec.name, x, shape, weight, bias, eps, spec.cast, batch_invariant)
    return stream.stream_norm(spec, x, size, weight, bias, eps, invariant, asked[0])
