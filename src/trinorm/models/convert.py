"""``replace(model)``: a model's torch norms become trinorm's, in place, and a report says what was and was not."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch

from .. import checks, nn
from ..ops.road import KERNEL_DTYPES
from .forms import Form
from .made import MARK, NEXT, ROTARY, each, original, swap
from .norm_acts import NormAct, norm_act, recognize_norm_act
from .recognize import FORM, Recognized, recognize, recognized

# torch's norms that trinorm.nn has under the same name.
_REPLACEMENTS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    theirs: ours
    for name, ours in vars(nn).items()
    if isinstance(ours, type) and isinstance(theirs := getattr(torch.nn, name, None), type)
}

_ORIGINALS = {ours: theirs for theirs, ours in _REPLACEMENTS.items()}

# What those compute, as long as nobody puts another function in its place.
_FORWARDS = {theirs: theirs.forward for theirs in _REPLACEMENTS}


@dataclass(frozen=True)
class Replaced:
    """A norm that was swapped. path is its name in the model ("" for the model itself); by, what computes it now."""

    path: str
    module: str
    by: str


@dataclass(frozen=True)
class Left:
    """A norm that was left as it was, and why."""

    path: str
    module: str
    reason: str


@dataclass(frozen=True)
class Fused:
    """A norm that is computed with the sum that goes into it, or with the rotary embedding or activation that it goes into.
    by: that, and where it is; to: what computes the two, where that is no norm of a sum.
    """

    path: str
    module: str
    by: str
    to: str = ""


@dataclass(frozen=True)
class Report:
    """What ``replace`` or ``fuse`` did, or would do. A module that the model holds under several names appears under each.

    by: which of the two; or ``register``, of the transformers integration.

    ``print`` shows it in lines, and rich's ``print`` as a table.
    """

    replaced: tuple[Replaced, ...] = field(default_factory=tuple)
    left: tuple[Left, ...] = field(default_factory=tuple)
    fused: tuple[Fused, ...] = field(default_factory=tuple)
    by: str = "replace"

    def __str__(self) -> str:
        lines = [self._title()]
        lines += [f"  {entry.path or '(model)'}: {entry.module} -> {entry.by}" for entry in self.replaced]
        lines += [f"  {e.path}: {e.module} {f'-> {e.to}, with' if e.to else '<-'} {e.by}" for e in self.fused]
        lines += [f"  {entry.path or '(model)'}: {entry.module} left: {entry.reason}" for entry in self.left]
        return "\n".join(lines)

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table("module", "from", "to, or why it was left", title=self._title())
        for entry in self.replaced:
            table.add_row(entry.path or "(model)", entry.module, entry.by)
        for fused in self.fused:
            table.add_row(fused.path, fused.module, f"{fused.to}, with {fused.by}" if fused.to else f"of {fused.by}")
        for left in self.left:
            table.add_row(left.path or "(model)", left.module, f"left: {left.reason}", style="dim")
        return table

    def _title(self) -> str:
        done = f"{len(self.fused)} fused" if self.by == "fuse" else f"{len(self.replaced)} replaced"
        return f"trinorm.{self.by}: {done}, {len(self.left)} left"


# Which modules: patterns of their names in the model ("*.input_layernorm"), and classes.
Which = Sequence[str | type[torch.nn.Module]]


def replace(
    model: torch.nn.Module, *, include: Which | None = None, exclude: Which | None = None, dry_run: bool = False
) -> Report:
    """Make the norms inside ``model`` trinorm's, in place.

    ``torch.nn.LayerNorm``, ``RMSNorm``, ``GroupNorm``, ``InstanceNorm1d`` to ``3d`` and ``BatchNorm1d`` to ``3d`` become
    :mod:`trinorm.nn`'s of that name. A norm of another class (transformers' RMSNorms, gated norms, LayerNorms over
    channels) is recognized by what its forward computes: it is called on a sample on the CPU, in fp32, bf16 and fp16, in
    both modes, and its results and gradients are compared with each of trinorm's norms in float64; what it rounds, and
    where, is found by its bits. Such a module keeps its class's name and its ``isinstance``; and its own forward for what
    was not compared: other dtypes, shapes and orders of memory, further arguments, autocast where that would give
    trinorm's another dtype, and all calls once one of its attributes has been set, or its class has another forward.

    A subclass of torch's GroupNorm or BatchNorm that holds an activation and nothing else (timm's ``BatchNormAct2d`` and
    ``GroupNormAct``; :class:`torch.nn.ReLU`, ``SiLU``, ``GELU``, and Identities beside it) is called on a sample too: its
    results, gradients and running statistics have to have the bits of torch's norm and the activation of that. It becomes
    one call with ``activation``, as long as what it holds is that, without hooks.

    Norms of any other kind are left, and the report says why.

    The module object stays the same one and its class changes (an attribute says so): parameters, buffers, hooks, names,
    optimizers that hold its parameters, and every other place that refers to it are untouched, so shared modules and tied
    weights stay shared. :func:`restore` undoes it.

    torch's own fused inference paths (``nn.TransformerEncoderLayer`` in eval under no_grad) read a norm's parameters and
    never call it: there a replaced norm changes nothing. ``torch.ao.quantization`` knows torch's classes and no subclass of
    them: quantize first, and replace then.

    Args:
        model: any module; it may itself be a norm.
        include: only these: patterns as :mod:`fnmatch` has them of names in the model, and classes; None is all. Of a
            module of several names one is enough.
        exclude: not these, likewise; None is none.
        dry_run: whether the model is left as it is, and the report says what would be done.

    Returns:
        A :class:`Report`; ``print`` it.

    Raises:
        TypeError: ``model`` is not a module, or ``include`` or ``exclude`` has what is neither a string nor a class of
            modules. Whatever is raised, the model is as it was.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"replace(): model must be a torch.nn.Module, not {type(model).__name__}")
    for name, which in (("include", include), ("exclude", exclude)):
        _check_which(name, which)
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    replaced: list[Replaced] = []
    left: list[Left] = []
    swapped: list[tuple[torch.nn.Module, type[torch.nn.Module], dict[str, Any]]] = []
    known: dict[Hashable, Form | NormAct | str] = {}
    for module in each(model):
        kind, names = name_of(type(module)), paths[id(module)]
        asked = (include is None or _is_among(names, module, include)) and not _is_among(names, module, exclude or ())
        found = _found(module, known) if asked else "not asked for"
        if isinstance(found, (Form, NormAct)) and not dry_run:
            try:
                made: Callable[..., type[torch.nn.Module]] = recognized if isinstance(found, Form) else norm_act
                swapped.append((module, made(type(module)), {FORM: found}))
            except Exception as error:  # of its __init_subclass__, say
                found = f"its class cannot be extended: {type(error).__name__}: {error}"
        elif found is None:
            swapped.append((module, _REPLACEMENTS[type(module)], {}))
        if not isinstance(found, str):
            by = str(found or name_of(_REPLACEMENTS[type(module)]))
            replaced += [Replaced(path, kind, by) for path in names]
        elif is_norm(module):
            left += [Left(path, kind, found) for path in names]
    # What merely holds a norm that was swapped is none itself.
    within = tuple(entry.path for entry in replaced)
    left = [entry for entry in left if not any(path.startswith(f"{entry.path}." if entry.path else "") for path in within)]
    if not dry_run:
        swap(swapped)
    order = {path: i for i, (path, _) in enumerate(model.named_modules(remove_duplicate=False))}
    replaced.sort(key=lambda entry: order[entry.path])
    left.sort(key=lambda entry: order[entry.path])
    return Report(tuple(replaced), tuple(left))


def restore(model: torch.nn.Module) -> tuple[str, ...]:
    """Undo :func:`replace` and :func:`fuse`: every norm and block in ``model`` gets the class back that it had.

    Norms that were made as trinorm's stay so. What was set on a module since (``save``, ``cast``) stays there, unread.

    Returns:
        The names in the model of what was swapped back.

    Raises:
        TypeError: ``model`` is not a module.
        RuntimeError: a class was changed once more since (``torch.nn.utils.parametrize``, ``fully_shard``); nothing
            is restored then.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"restore(): model must be a torch.nn.Module, not {type(model).__name__}")
    swapped = [(path, m) for path, m in model.named_modules(remove_duplicate=False) if MARK in vars(m)]
    before = {id(m): original(type(m)) or _ORIGINALS.get(type(m)) for _, m in swapped}
    for path, module in swapped:
        if before[id(module)] is None:
            now = name_of(type(module))
            raise RuntimeError(f"restore(): {path or 'the model'} has become a {now} since; undo that first")
    for _, module in swapped:
        if MARK in vars(module):
            module.__class__ = before[id(module)]
            for name in (MARK, FORM, NEXT, ROTARY):
                vars(module).pop(name, None)
    return tuple(path for path, _ in swapped)


def _found(module: torch.nn.Module, known: dict[Hashable, Form | NormAct | str]) -> Form | NormAct | str | None:
    """None for a torch norm that trinorm.nn has; the form of another that is recognized; or why a module is left."""
    if type(module) in _REPLACEMENTS and _obstacle(module) is None:
        return None
    reason = _why_left(module)
    if reason is not None or not is_norm(module):
        return reason or ""
    # Layers' norms are alike: one trial for all that are in whatever a forward may read.
    asked = _identity(module)
    if asked not in known:
        known[asked] = recognize_norm_act(module) or recognize(module)
    return known[asked]


def _identity(value: Any) -> Hashable:
    if isinstance(value, torch.nn.Module):
        return type(value), *((name, _identity(of)) for name, of in sorted(vars(value).items()))
    if isinstance(value, dict):  # parameters, hooks
        return tuple((name, tuple(t.shape) if isinstance(t, torch.Tensor) else _identity(t)) for name, t in value.items())
    if isinstance(value, set):  # of names
        return frozenset(value)
    return (type(value), value) if isinstance(value, (bool, int, float, str, type(None))) else id(value)


def _check_which(name: str, which: Which | None) -> None:
    if isinstance(which, str) or (which is not None and not isinstance(which, Sequence)):
        raise TypeError(f"replace(): {name} must be a sequence of patterns and classes, not {which!r}")
    for one in which or ():
        if not isinstance(one, str) and not (isinstance(one, type) and issubclass(one, torch.nn.Module)):
            raise TypeError(f"replace(): {name} has {one!r}; it must have strings and classes of modules")


def _is_among(paths: list[str], module: torch.nn.Module, which: Which) -> bool:
    of_name = (fnmatchcase(path, one) for one in which if isinstance(one, str) for path in paths)
    return any(of_name) or isinstance(module, tuple(one for one in which if not isinstance(one, str)))


def name_of(kind: type) -> str:
    module = re.sub(r"\.(normalization|batchnorm|instancenorm)$", "", kind.__module__)
    return f"{module}.{kind.__qualname__}"


def is_norm(module: torch.nn.Module) -> bool:
    """Whether a module is some norm: by torch's own classes, else by its class's name, which is all there is to go by."""
    if isinstance(module, torch.jit.ScriptModule):
        return "norm" in module.original_name.lower()
    # weight_norm's and spectral_norm's, which are of parameters.
    if type(module).__module__ == "torch.nn.utils.parametrizations":
        return False
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


def _why_left(module: torch.nn.Module) -> str | None:
    """Why a module that no torch norm's swap is for is left; None where its forward is to be tried."""
    kind = type(module)
    if isinstance(module, Recognized) or kind is getattr(nn, kind.__name__, None):
        return "already trinorm's"
    if isinstance(module, tuple(_REPLACEMENTS.values())):
        return "a subclass of trinorm's"
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted or traced: what it runs is fixed; replace before that"
    if kind in _REPLACEMENTS:
        return _obstacle(module)
    if any(of.__module__.startswith("torch.distributed.") for of in kind.__mro__):
        return "its class is made by torch.distributed; replace before sharding"
    if isinstance(module, torch.nn.modules.lazy.LazyModuleMixin):
        return "lazy: its kind is not settled before its first call"
    if ".quantized" in kind.__module__ or ".quantizable" in kind.__module__:
        return "quantized: its input is not a floating tensor"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "parametrized: its class is made by torch.nn.utils.parametrize; replace before parametrizing"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if kind.__module__.startswith("torch.") and isinstance(module, _TORCH_NORMS):
        return "trinorm has no kernel for this norm yet"
    return None
