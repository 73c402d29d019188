"""Layers as Hugging Face's kernels has them: a forward, which becomes that of a model's own module, and no state.

The module keeps its class, and that says what is computed: the casting mode, and the dtypes in which it holds, are found by
a trial of that class's forward (:mod:`trinorm.models.recognize`), once for all of its modules. A call that is not like
those of the trial gets the class's own forward, and so do all calls of a class that is no norm of trinorm's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..models.forms import Form
from ..models.recognize import recognize

# Lengths of rows in the trial: what holds for both holds for any.
_LENGTHS = 64, 96


class RMSNorm(nn.Module):
    """``weight * x / sqrt(mean(x²) + variance_epsilon)``, rounded where the module's class rounds (Llama's, Olmo2's)."""

    has_backward = True
    can_torch_compile = True

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _called(self, RMSNorm, hidden_states)


class RMSNormGated(nn.Module):
    """That times ``activation(gate)``, silu or sigmoid (Qwen3-Next's, Kimi Linear's)."""

    has_backward = True
    can_torch_compile = True

    weight: Tensor
    variance_epsilon: float
    activation: str

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        return _called(self, RMSNormGated, hidden_states, gate)


class RMSNormZeroCentered(nn.Module):
    """``(1 + weight) * x / sqrt(mean(x²) + eps)`` (Qwen3.5's, as Gemma's)."""

    has_backward = True
    can_torch_compile = True

    weight: Tensor
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        return _called(self, RMSNormZeroCentered, x)


LAYERS: dict[str, type[nn.Module]] = {layer.__name__: layer for layer in (RMSNorm, RMSNormGated, RMSNormZeroCentered)}

# What a layer's forward reads of its module besides the weight, as it declares it: an epsilon, and words.
_EPS = {layer: next(name for name, kind in layer.__annotations__.items() if kind == "float") for layer in LAYERS.values()}
_WORDS = {layer: tuple(name for name, kind in layer.__annotations__.items() if kind == "str") for layer in LAYERS.values()}

# Of the trial, and like none that a forward may have in itself.
_TRIED_EPS = 3e-6


class _Found:
    """What has been found, each as an attribute: Dynamo guards the one that it reads, and of a dict or list the length."""


def form_of(module: nn.Module, layer: type[nn.Module]) -> Form | str:
    """What a layer computes for a module; or, in words, why that runs its own forward."""
    form = _form(module, layer)
    return form if isinstance(form, str) else replace(form, eps=getattr(module, _EPS[layer]))


def _called(module: Any, layer: type[nn.Module], *tensors: Any) -> Tensor:
    form = _form(module, layer)
    if isinstance(form, str) or not form.serves((module.weight, None), *tensors):
        return type(module).forward(module, *tensors)
    return form((module.weight, None), *tensors, eps=getattr(module, _EPS[layer]))


def _form(module: nn.Module, layer: type[nn.Module]) -> Form | str:
    """Of any epsilon, which is no constant of a traced graph."""
    missing = [name for name in ("weight", _EPS[layer], *_WORDS[layer]) if not hasattr(module, name)]
    if missing:
        return f"it has no {missing[0]}, which the layer reads"
    words = tuple(getattr(module, name) for name in _WORDS[layer])
    found: Form | str = getattr(_Found, _tried(type(module), layer, words))
    return found


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _tried(kind: type[nn.Module], layer: type[nn.Module], words: tuple[str, ...]) -> str:
    """The name, in _Found, of what a class's forward computes of what the layer reads; in a traced graph a constant."""
    asked = kind, kind.forward, layer, words  # of another forward that it gets, it is found anew
    if asked not in _NAMES:
        first, second = (_trial(kind, layer, words, length) for length in _LENGTHS)
        name = f"of_{kind.__name__}_{len(vars(_Found))}"
        setattr(_Found, name, first if first == second else "what its forward computes depends on a row's length")
        _NAMES[asked] = name
    return _NAMES[asked]


_NAMES: dict[tuple[type[nn.Module], Callable[..., Tensor], type[nn.Module], tuple[str, ...]], str] = {}


def _trial(kind: type[nn.Module], layer: type[nn.Module], words: tuple[str, ...], length: int) -> Form | str:
    """Of a module that has what the layer reads, and nothing else that its own constructor may give it."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    module.weight = nn.Parameter(torch.empty(length, device="cpu"))
    for name, value in ((_EPS[layer], _TRIED_EPS), *zip(_WORDS[layer], words, strict=True)):
        setattr(module, name, value)
    form = recognize(module)
    if isinstance(form, Form) and form.eps != _TRIED_EPS:
        return f"its epsilon is {form.eps:g} whatever its {_EPS[layer]} is"
    return form if isinstance(form, str) else replace(form, length=None)
