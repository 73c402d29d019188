"""``fuse(model)``: sums and the norms behind them, and QK-norm with its rotary embedding, become one launch each."""

from __future__ import annotations

import functools
import itertools
import operator
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from . import checks
from .added_functional import norm_of_sum
from .convert import Fused, Left, Report, is_norm, name_of
from .forms import Form
from .heads_fused import deferred, rotary_of, turned
from .made import MARK, NEXT, ROTARY, Made, each, swap
from .norm_calls import asked_of, is_hooked, is_replaced, is_traced, row_of
from .ops import added, stream
from .ops.road import KERNEL_DTYPES
from .recognize import Recognized, form_in_force
from .rewritten import DEFERRED, NORM_OF_SUM, OF_ARGUMENT, RETURNED, SUM, TURNED, Forward, Found
from .row_nn import LayerNorm, RMSNorm
from .sources import UnfitError, functions_within
from .switches import options

# Where a sum has with it what the next block's norm makes of it.
HANDED = "_trinorm_handed"

# From how many elements on: of fewer, all waits for the host, whom this costs more than the launch that it saves (9 µs
# more, on a CPU). Where a CUDA graph records, of any.
HANDED_FROM = 1 << 20


class Block(Made):
    """What a module whose forward was rewritten is besides."""


def fuse(model: torch.nn.Module) -> Report:
    """Make each residual's sum and the norm behind it one launch, and QK-norm with its rotary embedding, in place.

    For norms that are trinorm's (:func:`replace` first), LayerNorm and RMSNorm of the last dims. The forward of each module
    that holds some is read: its source, if that is what runs. Every other statement of it stays, at its line, as do its
    decorators. What is changed:

    - Where the sum of two tensors goes into a norm, both become a call of :func:`trinorm.functional.add_rms_norm` or
      ``add_layer_norm``, whose backward adds the sum's gradient and the norm's in the same launch.
    - Where a norm is of the forward's argument, which a sum has too, its backward adds the two gradients likewise.
    - A sum that a block returns to the next one of a ``ModuleList`` or ``Sequential`` is normalized for that one's first
      norm in the same launch, and handed to it, where no gradient is recorded, outside of inference mode.
    - The RMSNorms of queries and of keys, and the rotary embedding that both go into, become one call of
      :func:`trinorm.functional.qk_norm`, if the function that turns them does what that does: it is called on a sample on
      the CPU, and the results and gradients are compared.

    The second and the third are not done under torch.compile, nor torch.jit.trace. At a call where a norm has hooks, or is
    not served (:func:`replace` says when), where the two are no plain contiguous tensors of one shape, or queries, keys and
    angles not like those of the sample, all is what it was.

    On a CPU results have the bits of the replaced model's, and gradients too, in fp32; in 16 bits these lack one rounding:
    two are added before they are rounded. So do queries and keys of a norm that rounds otherwise than Llama's. On a GPU a
    sum with a norm may be launched otherwise than a norm, and adds in another order then: last bits may differ, and all is
    no further from float64 than the original's, by :mod:`trinorm.compare`.

    The module objects stay and their classes change, as by :func:`replace`; :func:`restore` undoes both.

    Returns:
        A :class:`Report`: of each norm the sums that go into it, or the rotary embedding that it goes into, or why there is
        neither. ``print`` it.

    Raises:
        TypeError: ``model`` is not a module. Whatever is raised, the model is as it was.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"fuse(): model must be a torch.nn.Module, not {type(model).__name__}")
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    plans = {id(module): _Plan(module) for module in each(model)}
    givers = _link(model, plans)
    fused: list[Fused] = []
    left: list[Left] = []
    for of, plan in plans.items():
        for name, norm in plan.norms.items():
            sums = list(plan.found.sums.get(name, ()))
            if name == plan.found.of_argument:
                sums += [f"what {paths[giver][0]} returns, without gradients" for giver in givers.get(of, ())]
                sums += [f"the gradient of {plan.found.stream}, in its backward"] if plan.found.stream else []
            for path in paths[of]:
                row = f"{path}.{name}".removeprefix("."), name_of(type(norm))
                if sums:
                    fused.append(Fused(*row, "; ".join(sums)))
                elif (heads := plan.found.heads) is not None and name in heads.norms and ROTARY in plan.attributes:
                    fused.append(Fused(*row, str(heads), str(plan.attributes[ROTARY])))
                else:
                    left.append(Left(*row, plan.why_left(name)))
    of_use = [plan for of, plan in plans.items() if plan.is_of_use or of in givers]
    order = {path: i for i, (path, _) in enumerate(model.named_modules(remove_duplicate=False))}
    for rows in fused, left:
        rows.sort(key=lambda row: order[row.path])
    swap([(plan.module, plan.kind, plan.attributes) for plan in of_use if plan.kind is not None])
    return Report(left=tuple(left), fused=tuple(fused), by="fuse")


class _Plan:
    """What may become of a module. norms: those that it holds, by name; kind: its new class, None where there is none."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module, self.found, self.reason = module, Found(), ""
        self.kind: type[torch.nn.Module] | None = None
        self.attributes: dict[str, Any] = {}
        self.norms = {name: m for name, m in module._modules.items() if m is not None and is_norm(m)}
        names = frozenset(name for name, norm in self.norms.items() if not _why_apart(norm))
        if names:
            self.reason = _why_unfit(module)
        if names and not self.reason:
            of = type(module)
            kind, self.found = _block(of, names, of.forward)  # type: ignore[arg-type]
            if isinstance(kind, str):
                self.reason = kind
                self.found = Found(apart=self.found.apart)
            else:
                self.kind = kind
                self._find_rotary()

    def _find_rotary(self) -> None:
        """Ask what is computed behind the norms of queries and keys, as long as that is what it is now."""
        heads = self.found.heads
        if heads is None:
            return
        *_, raw = functions_within(type(self.module).forward)
        found = rotary_of(heads, self.norms, raw.__globals__.get(heads.function))
        if isinstance(found, str):
            self.found = replace(self.found, apart=dict.fromkeys(heads.norms, found) | self.found.apart)
        else:
            self.attributes[ROTARY] = found

    @property
    def is_of_use(self) -> bool:
        return bool(self.found.sums or self.found.stream or self.attributes)

    def why_left(self, name: str) -> str:
        reason = _why_apart(self.norms[name]) or self.reason or self.found.apart.get(name)
        return reason or "no sum that its module's forward makes goes into it"


def _link(model: torch.nn.Module, plans: dict[int, _Plan]) -> dict[int, list[int]]:
    """Tell each block which norm the next one begins with. By the next one's id, those of the blocks that hand to it."""
    after: dict[int, dict[int, _Plan]] = {}
    for chain in each(model):
        if isinstance(chain, (torch.nn.ModuleList, torch.nn.Sequential)):
            blocks = [plans[id(m)] for m in chain]
            for this, following in itertools.pairwise(blocks):
                after.setdefault(id(this.module), {})[id(following.module)] = following
    givers: dict[int, list[int]] = {}
    for of, those in after.items():
        (to, plan), *others = those.items()
        first = plan.found.of_argument
        if not others and first is not None and plans[of].found.returned is not None:
            plans[of].attributes[NEXT] = (plan.norms[first],)
            givers.setdefault(to, []).append(of)
    return givers


def _why_apart(norm: torch.nn.Module) -> str:
    """Why no sum may be taken together with a norm; "" where it may."""
    if type(norm) in (LayerNorm, RMSNorm):
        if norm.save != "input":
            return f"its save is {norm.save!r}, and of a sum the sum is kept"
    elif isinstance(norm, Recognized):
        if type(form_in_force(norm)) is not Form:
            return "it is no LayerNorm or RMSNorm of the last dim, or not any more what replace() saw"
    elif MARK in vars(norm) or type(norm).__module__.startswith("trinorm."):
        return "trinorm has no sum with a norm of its kind"
    else:
        return "it is not trinorm's: replace() it first"
    if "forward" in vars(norm):
        return "its forward was replaced on the instance"
    return "it has hooks, which would not be called" if is_hooked(norm) else ""


def _why_unfit(module: torch.nn.Module) -> str:
    """Why a module's forward is not to be rewritten; "" where that may be tried."""
    kind = type(module)
    if isinstance(module, Block):
        return "already fused"
    if isinstance(module, torch.jit.ScriptModule):
        return "its module is scripted or traced"
    if "forward" in vars(module):
        return "its module's forward was replaced on the instance"
    if any(of.__module__.startswith("torch.distributed.") for of in kind.__mro__):
        return "its module's class is made by torch.distributed; fuse before sharding"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "its module's class is made by torch.nn.utils.parametrize; fuse before parametrizing"
    return ""


def block(of: type[torch.nn.Module], names: frozenset[str]) -> type[torch.nn.Module]:
    """The class of modules of a class whose attributes called ``names`` are norms; the class itself where there is none."""
    kind, _ = _block(of, names, of.forward)  # type: ignore[arg-type]
    return of if isinstance(kind, str) else kind


@functools.cache
def _block(
    of: type[torch.nn.Module], names: frozenset[str], was: Callable[..., Any]
) -> tuple[type[torch.nn.Module] | str, Found]:
    """(that class, or why there is none; what its forward has), of the forward that the class has now."""
    try:
        source = Forward(of, names)
        if source.found == Found(apart=source.found.apart):
            return "", source.found
        # Decorators that wrap nothing, but write docstrings, say, are not called again.
        for rewritten in source.rewritten(_HELPERS):
            kind = _made(of, names, was, rewritten)
            if source.is_wrapped_as(kind.forward):
                return kind, source.found
        return "something is wrapped around its module's forward that is not in its source", Found()
    except UnfitError as reason:
        return str(reason), Found()
    except Exception as error:  # of its __init_subclass__, say
        return f"its module's class cannot be extended: {type(error).__name__}: {error}", Found()


def _made(
    of: type[torch.nn.Module], names: frozenset[str], was: Callable[..., Any], rewritten: Callable[..., Any]
) -> type[torch.nn.Module]:
    @functools.wraps(rewritten)
    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        # What has been put in its place since is what the model's author wants.
        return (rewritten if of.forward is was else of.forward)(self, *args, **kwargs)

    named: dict[str, Any] = {"__module__": of.__module__, "__qualname__": of.__qualname__, "forward": forward}
    return type(of.__name__, (Block, of), {**named, "made_by": (block, (of, names))})


# --- what a rewritten forward calls ---


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
    following = None if is_traced() else vars(module).get(NEXT)
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


_HELPERS: dict[str, Callable[..., Any]] = {SUM: _sum, NORM_OF_SUM: _norm_of_sum, RETURNED: _returned}
_HELPERS.update({OF_ARGUMENT: _of_argument, DEFERRED: deferred, TURNED: turned})


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
