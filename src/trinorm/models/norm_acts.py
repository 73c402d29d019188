"""Channel norms that hold their activation, as timm's BatchNormAct2d: found by what they hold, and tried on a sample."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..channel_calls import activation_of, of_batches, of_groups
from ..ops.road import KERNEL_DTYPES
from ..reference import autocasts_to_fp32
from ..reference import channel as channel_reference
from ..spec import Activation
from .norm_calls import is_replaced
from .recognize import FORM, extended, undisturbed

# Of which a subclass may hold an activation, with how many dims what they are of has.
_RANKS: dict[type[torch.nn.Module], int] = {
    torch.nn.GroupNorm: 4,
    torch.nn.BatchNorm1d: 3,
    torch.nn.BatchNorm2d: 4,
    torch.nn.BatchNorm3d: 5,
}

# What is tried, of the input; of what the module holds that, or fp32.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class NormAct:
    """What such a module computes: torch's norm, and the activation of that, which ``name`` holds (None: there is none)."""

    norm: type[torch.nn.Module]
    name: str | None
    activation: Activation | None

    def served(self, module: Any, x: Any) -> Tensor | None:
        """What a module's call comes to; None where its own forward is to be called."""
        if type(x) is not Tensor or x.dtype not in KERNEL_DTYPES or x.dim() != _RANKS[self.norm]:
            return None
        held = module._modules
        if any(is_replaced(other) or not self._is(name, other) for name, other in held.items()):
            return None
        if self.norm is not torch.nn.GroupNorm:
            return of_batches(module, x, self.activation)
        # Under autocast torch's norm returns fp32, and another class's may not.
        return None if autocasts_to_fp32("group_norm", x.device.type) else of_groups(module, x, self.activation)

    def _is(self, name: str, other: Any) -> bool:
        return activation_of(other) == self.activation if name == self.name else type(other) is torch.nn.Identity

    def __str__(self) -> str:
        norm = "group_norm" if self.norm is torch.nn.GroupNorm else "batch_norm"
        return f"trinorm.functional.{norm}, activation={self.activation!r}"


@functools.cache
def norm_act(of: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """The class of such a module that was of this one."""
    was = of.forward

    @functools.wraps(was)
    def forward(self: torch.nn.Module, *tensors: Any, **named: Any) -> Any:
        form = vars(self).get(FORM)
        if form is None or named or len(tensors) != 1 or of.forward is not was:
            return of.forward(self, *tensors, **named)
        y = form.served(self, *tensors)
        return of.forward(self, *tensors) if y is None else y

    return extended(of, norm_act, forward)


def recognize_norm_act(module: torch.nn.Module) -> NormAct | str | None:
    """The norm and the activation that a module computes; in words, why it is left; None where it holds nothing."""
    norm = next((kind for kind in _RANKS if isinstance(module, kind)), None)
    held = {name: m for name, m in module._modules.items() if m is not None and type(m) is not torch.nn.Identity}
    if norm is None or not module._modules:
        return None
    if len(held) > 1 or any(m is None for m in module._modules.values()):
        return f"it holds {', '.join(held) or 'None'}, which is more than an activation"
    name, activation = next(iter(held), None), None
    if name is not None and (activation := activation_of(held[name])) is None:
        return f"its {name} is {type(held[name]).__name__}, which is no activation of trinorm's norms"
    if any(is_replaced(child) for child in module.children()):
        return "what it holds has hooks, or another forward"
    form = NormAct(norm, name, activation)
    with undisturbed():
        try:
            alike = all(_is_alike(module, form, *case) for case in _cases())
        except Exception as error:  # whatever somebody else's forward may raise
            return f"on a sample its forward raises {type(error).__name__}: {error}"
    return form if alike else f"its forward is not {norm.__name__}'s and the activation of that"


def _cases() -> Iterator[tuple[torch.dtype, torch.dtype, bool]]:
    """The dtypes of the input and of what the module holds, and whether it is in training."""
    for dtype in _DTYPES:
        for held in (dtype, torch.float32) if dtype.itemsize == 2 else (dtype,):
            yield from ((dtype, held, training) for training in (True, False))


def _is_alike(module: torch.nn.Module, form: NormAct, dtype: torch.dtype, held: torch.dtype, training: bool) -> bool:
    """Whether results, gradients, what is kept up, and attributes are the same, by bits; or torch's own norm takes no such
    dtypes on a CPU.
    """
    try:
        wanted, expected = _called(module, form, functools.partial(_apart, form), dtype, held, training)
    except RuntimeError:
        return True
    found, state = _called(module, form, type(module).forward, dtype, held, training)
    same = state == expected and len(found) == len(wanted)
    return same and all(
        a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b) for a, b in zip(found, wanted, strict=True)
    )


def _apart(form: NormAct, module: torch.nn.Module, x: Tensor) -> Tensor:
    y: Tensor = form.norm.forward(module, x)
    return channel_reference.activated(y, form.activation)


def _called(
    of: torch.nn.Module,
    form: NormAct,
    forward: Callable[..., Tensor],
    dtype: torch.dtype,
    held: torch.dtype,
    training: bool,
) -> tuple[list[Tensor], dict[str, int]]:
    """(the result, gradients, buffers; the module's attributes, by identity, and how often the input was written to)."""
    generator = torch.Generator("cpu").manual_seed(0)

    def drawn(shape: Any) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)

    def kept(buffer: Tensor) -> Tensor:
        return drawn(buffer.shape).square().add(0.5).to(held) if buffer.is_floating_point() else torch.tensor(3)

    module: Any = copy.copy(of)
    module.__dict__ = dict(vars(of), _modules=dict(of._modules), training=training)
    module._parameters = {
        n: p if p is None else torch.nn.Parameter(drawn(p.shape).to(held)) for n, p in of._parameters.items()
    }
    module._buffers = {n: b if b is None else kept(b) for n, b in of._buffers.items()}
    channels = module.num_channels if form.norm is torch.nn.GroupNorm else module.num_features
    x = (drawn((3, channels, 4, 2, 2)[: _RANKS[form.norm]]) * 2 + 0.5).to(dtype).requires_grad_()
    given = x + 0  # no leaf, so that it may be written to
    y = forward(module, given)
    leaves = [t for t in (x, *module._parameters.values()) if t is not None]
    gradients = torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel()).to(y.dtype).view(y.shape))
    own = {name: id(value) for name, value in vars(module).items() if not name.startswith("_")}
    return [y.detach(), *gradients, *filter(_is_tensor, module._buffers.values())], {**own, "": given._version}


def _is_tensor(t: Any) -> bool:
    return isinstance(t, Tensor)
