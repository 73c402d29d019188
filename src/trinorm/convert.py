"""``replace(model)``: a model's torch norms become trinorm's, in place, and a report says what was and was not."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch

from . import checks, nn
from .ops.road import KERNEL_DTYPES

# torch's norms that trinorm.nn has under the same name.
_REPLACEMENTS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    theirs: ours
    for name, ours in vars(nn).items()
    if isinstance(ours, type) and isinstance(theirs := getattr(torch.nn, name, None), type)
}

# What those compute, as long as nobody puts another function in its place.
_FORWARDS = {theirs: theirs.forward for theirs in _REPLACEMENTS}


@dataclass(frozen=True)
class Replaced:
    """A norm that was swapped. path is its name in the model ("" for the model itself)."""

    path: str
    module: str


@dataclass(frozen=True)
class Left:
    """A norm that was left as it was, and why."""

    path: str
    module: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What ``replace`` did. A module that the model holds under several names appears under each of them."""

    replaced: tuple[Replaced, ...] = field(default_factory=tuple)
    left: tuple[Left, ...] = field(default_factory=tuple)

    def __str__(self) -> str:
        lines = [f"trinorm.replace: {len(self.replaced)} replaced, {len(self.left)} left"]
        lines += [f"  {entry.path or '(model)'}: {entry.module} -> trinorm" for entry in self.replaced]
        lines += [f"  {entry.path or '(model)'}: {entry.module} left: {entry.reason}" for entry in self.left]
        return "\n".join(lines)


def replace(model: torch.nn.Module) -> Report:
    """Make every norm of torch's inside ``model`` that trinorm has a trinorm one, in place: ``torch.nn.LayerNorm``,
    ``RMSNorm``, ``GroupNorm``, ``InstanceNorm1d`` to ``3d`` and ``BatchNorm1d`` to ``3d``.

    The module object stays the same one and only its class changes: parameters, buffers, hooks, names, optimizers that
    hold its parameters, and every other place that refers to it are untouched, so shared modules and tied weights stay
    shared. Norms of any other kind are left, and the report says why.

    torch's own fused inference paths (``nn.TransformerEncoderLayer`` in eval under no_grad) read a norm's parameters and
    never call it: there a replaced norm changes nothing. ``torch.ao.quantization`` knows torch's classes and no subclass of
    them: quantize first, and replace then.

    Args:
        model: any module; it may itself be a norm.

    Returns:
        A :class:`Report`; ``print`` it.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"replace(): model must be a torch.nn.Module, not {type(model).__name__}")
    replaced: list[Replaced] = []
    left: list[Left] = []
    swap: list[torch.nn.Module] = []
    for path, module in model.named_modules(remove_duplicate=False):
        kind = _name(type(module))
        if type(module) in _REPLACEMENTS and _obstacle(module) is None:
            replaced.append(Replaced(path, kind))
            swap.append(module)
        elif _is_norm(module):
            left.append(Left(path, kind, _why_left(module)))
    for module in swap:
        # A module held under two names comes by twice, the second time already swapped.
        module.__class__ = _REPLACEMENTS.get(type(module), type(module))
    return Report(tuple(replaced), tuple(left))


def _name(kind: type) -> str:
    module = re.sub(r"\.(normalization|batchnorm|instancenorm)$", "", kind.__module__)
    return f"{module}.{kind.__qualname__}"


def _is_norm(module: torch.nn.Module) -> bool:
    """Whether a module is some norm: by torch's own classes, else by its class's name, which is all there is to go by."""
    if isinstance(module, torch.jit.ScriptModule):
        return "norm" in module.original_name.lower()
    return isinstance(module, _TORCH_NORMS) or "norm" in type(module).__name__.lower()


_TORCH_NORMS = (
    torch.nn.LayerNorm,
    torch.nn.RMSNorm,
    torch.nn.GroupNorm,
    torch.nn.LocalResponseNorm,
    torch.nn.CrossMapLRN2d,
    torch.nn.modules.batchnorm._NormBase,
)


def _obstacle(module: torch.nn.Module) -> str | None:
    """What keeps a torch norm of a known class from being swapped."""
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if type(module).forward is not _FORWARDS[type(module)]:
        return "torch's forward of its class was replaced"
    eps = getattr(module, "eps", None)
    try:
        if eps is not None:  # RMSNorm's: of the input's dtype
            checks.epsilon(type(module).__name__, eps)
    except (TypeError, ValueError):
        return f"its eps is {eps!r}, which trinorm's norms refuse"
    for name in ("weight", "bias"):
        t = getattr(module, name, None)
        if isinstance(t, torch.Tensor) and t.dtype not in KERNEL_DTYPES:
            return f"its {name} is {t.dtype}, which no kernel serves"
    return None


def _why_left(module: torch.nn.Module) -> str:
    kind = type(module)
    ours = getattr(nn, kind.__name__, None)
    if kind is ours:
        return "already trinorm's"
    if isinstance(module, tuple(_REPLACEMENTS.values())):
        return "a subclass of trinorm's"
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted or traced: what it runs is fixed; replace before that"
    if kind in _REPLACEMENTS:
        return str(_obstacle(module))
    if isinstance(module, torch.nn.modules.lazy.LazyModuleMixin):
        return "lazy: its kind is not settled before its first call"
    if ".quantized" in kind.__module__ or ".quantizable" in kind.__module__:
        return "quantized: its input is not a floating tensor"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "parametrized: its class is made by torch.nn.utils.parametrize; replace before parametrizing"
    if isinstance(module, tuple(_REPLACEMENTS)):
        return "a subclass of torch's norm, whose forward may compute something else"
    if isinstance(module, _TORCH_NORMS):
        return "trinorm has no kernel for this norm yet"
    return "not a torch.nn norm: what its forward computes is unknown"
