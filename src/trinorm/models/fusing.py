"""``fuse(model)``: sums and the norms behind them, QK-norm with its rotary embedding, and channel norms with the activation
behind them become one launch each.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..channel_calls import activation_of
from ..held import is_hooked
from ..models import activations_fused
from ..nn.row import LayerNorm, RMSNorm
from .activations_fused import CHANNEL_NORMS, CONVOLUTIONS, in_sequence, pairs_in, why_no_activation
from .convert import Fused, Left, Report, is_norm, name_of
from .forms import Form
from .heads_fused import rotary_of
from .made import MARK, NEXT, ROTARY, Made, each, swap
from .norm_acts import NormAct
from .recognize import Recognized, form_in_force
from .residuals import HELPERS
from .rewritten import Forward, Found, Names
from .sources import UnfitError, functions_within


class Block(Made):
    """What a module whose forward was rewritten is besides."""


def fuse(model: torch.nn.Module) -> Report:
    """Make one launch of each residual's sum and the norm behind it, of QK-norm with its rotary embedding, and of a channel
    norm with the activation behind it, in place.

    For norms that are trinorm's (:func:`replace` first): LayerNorm and RMSNorm of the last dims, and, with an activation,
    GroupNorm, BatchNorm and InstanceNorm. The forward of each module that holds some is read: its source, if that is what
    runs. Every other statement of it stays, at its line, as do its decorators. What is changed:

    - Where the sum of two tensors goes into a norm, both become a call of :func:`trinorm.functional.add_rms_norm` or
      ``add_layer_norm``, whose backward adds the sum's gradient and the norm's in the same launch.
    - Where a norm is of the forward's argument, which a sum has too, its backward adds the two gradients likewise.
    - A sum that a block returns to the next one of a ``ModuleList`` or ``Sequential`` is normalized for that one's first
      norm in the same launch, and handed to it, where no gradient is recorded, outside of inference mode.
    - The RMSNorms of queries and of keys, and the rotary embedding that both go into, become one call of
      :func:`trinorm.functional.qk_norm`, if the function that turns them does what that does: it is called on a sample on
      the CPU, and the results and gradients are compared.
    - GroupNorm, BatchNorm or InstanceNorm and the ReLU, SiLU or GELU (by the error function) that it alone goes into, a
      module or a function, become one call with ``activation``; behind a convolution BatchNorm, the residual that is added
      to it and the activation of the sum, one with ``residual`` too. So do a norm and the next module of a ``Sequential``.

    The second and the third are not done under torch.compile, nor torch.jit.trace. At a call where a norm has hooks, or is
    not served (:func:`replace` says when), where the two are no plain contiguous tensors of one shape, or queries, keys and
    angles not like those of the sample, all is what it was; so it is where an activation has hooks, or has become another.

    On a CPU results have the bits of the replaced model's, and gradients too, in fp32; in 16 bits these lack one rounding:
    two are added before they are rounded. So do queries and keys of a norm that rounds otherwise than Llama's. On a GPU a
    sum with a norm may be launched otherwise than a norm, and adds in another order then: last bits may differ, and all is
    no further from float64 than the original's, by :mod:`trinorm.compare`. The kernels compute an activation before they
    round, once, where the two round twice; gradients in 16 bits of what a kernel recomputed follow.

    The module objects stay and their classes change, as by :func:`replace`; :func:`restore` undoes both.

    Returns:
        A :class:`Report`: of each norm the sums that go into it, or the rotary embedding or the activation that it goes
        into, or why there is none. ``print`` it.

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
            activations = plan.found.activations.get(name)
            for path in paths[of]:
                row = f"{path}.{name}".removeprefix("."), name_of(type(norm))
                if activations:
                    fused.append(Fused(*row, "; ".join(activations), f"trinorm.functional.{CHANNEL_NORMS[type(norm)]}"))
                elif sums:
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
        names = self._names()
        if names.norms or names.channel_norms:
            self.reason = _why_unfit(module)
            if not self.reason:
                self._find(names)

    def _names(self) -> Names:
        """Those of its attributes that matter; of activations and what goes with them where there is a channel norm."""
        held = self.module._modules
        norms = frozenset(name for name, norm in self.norms.items() if not _why_apart(norm))
        channel_norms = frozenset(name for name, norm in self.norms.items() if not why_no_activation(norm))
        if not channel_norms:
            return Names(norms)
        # What is called between a norm and its activation, as a residual's branch, might call that norm too.
        times = Counter(id(m) for _, m in self.module.named_modules(remove_duplicate=False))
        channel_norms = frozenset(name for name in channel_norms if times[id(self.norms[name])] == 1)
        activations = frozenset(name for name, of in (*held.items(), *vars(self.module).items()) if activation_of(of))
        identities = frozenset(name for name, m in held.items() if type(m) is torch.nn.Identity)
        convolutions = frozenset(name for name, m in held.items() if type(m) in CONVOLUTIONS)
        return Names(norms, channel_norms, activations, identities, convolutions)

    def _find(self, names: Names) -> None:
        of = type(self.module)
        if of.forward is torch.nn.Sequential.forward:
            self.found = Found(activations=pairs_in(self.module))
            if not self.found.activations:
                return
        kind, found = _block(of, names, of.forward)  # type: ignore[arg-type]
        if isinstance(kind, str):
            self.reason, self.found = kind, Found(apart=found.apart)
        elif not self.found.activations:
            self.kind, self.found = kind, found
            self._find_rotary()
        else:
            self.kind = kind

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
        return bool(self.found.sums or self.found.stream or self.found.activations or self.attributes)

    def why_left(self, name: str) -> str:
        norm = self.norms[name]
        if type(norm) in CHANNEL_NORMS:
            behind = "there is no sum with a norm of its kind, and no activation that it has is right behind it alone"
            return why_no_activation(norm) or self.reason or behind
        reason = _why_apart(norm) or self.reason or self.found.apart.get(name)
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
        if isinstance(form_in_force(norm), NormAct):
            return "it has its activation already, and trinorm no sum with a norm of its kind"
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


def block(of: type[torch.nn.Module], names: Names) -> type[torch.nn.Module]:
    """The class of modules of a class whose attributes are called ``names``; the class itself where there is none."""
    kind, _ = _block(of, names, of.forward)  # type: ignore[arg-type]
    return of if isinstance(kind, str) else kind


@functools.cache
def _block(of: type[torch.nn.Module], names: Names, was: Callable[..., Any]) -> tuple[type[torch.nn.Module] | str, Found]:
    """(that class, or why there is none; what its forward has), of the forward that the class has now."""
    try:
        if was is torch.nn.Sequential.forward:
            return _made(of, names, was, in_sequence), Found()
        source = Forward(of, names)
        if source.found == Found(apart=source.found.apart):
            return "", source.found
        # Decorators that wrap nothing, but write docstrings, say, are not called again.
        for rewritten in source.rewritten(HELPERS | activations_fused.HELPERS):
            kind = _made(of, names, was, rewritten)
            if source.is_wrapped_as(kind.forward):
                return kind, source.found
        return "something is wrapped around its module's forward that is not in its source", Found()
    except UnfitError as reason:
        return str(reason), Found()
    except Exception as error:  # of its __init_subclass__, say
        return f"its module's class cannot be extended: {type(error).__name__}: {error}", Found()


def _made(
    of: type[torch.nn.Module], names: Names, was: Callable[..., Any], rewritten: Callable[..., Any]
) -> type[torch.nn.Module]:
    @functools.wraps(rewritten)
    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        # What has been put in its place since is what the model's author wants.
        return (rewritten if of.forward is was else of.forward)(self, *args, **kwargs)

    named: dict[str, Any] = {"__module__": of.__module__, "__qualname__": of.__qualname__, "forward": forward}
    return type(of.__name__, (Block, of), {**named, "made_by": (block, (of, names))})
