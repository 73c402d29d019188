"""What is done with a model's norms before it is measured, as a table: functions that change a model and return what is
called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from unittest import mock

import torch
from torch import nn

import trinorm


class LackingError(Exception):
    """There is no such thing for this model."""


@dataclass(frozen=True)
class Column:
    """compiled: for one shape. whole: as one graph, which takes a minute for a model of many layers. few: measured beside
    what is compiled whole of few layers.
    """

    change: Callable[[nn.Module], nn.Module]
    compiled: bool = False
    whole: bool = False
    few: bool = False


def replaced(model: nn.Module, **options: bool) -> nn.Module:
    """trinorm's norms; all that are norms, or it says which are left."""
    report = trinorm.replace(model, **options)
    if report.left or not report.replaced:
        raise RuntimeError(str(report))
    return model


def fused(model: nn.Module) -> nn.Module:
    """trinorm's norms with what stands beside them in their launches; models without such have no such column."""
    report = trinorm.fuse(replaced(model))
    if not report.fused:
        raise LackingError
    return model


# Liger-Kernel's function for each of transformers' model_types, and what the MLP is called in it.
LIGER = {
    "llama": ("apply_liger_kernel_to_llama", "swiglu"),
    "qwen3": ("apply_liger_kernel_to_qwen3", "swiglu"),
    "gemma3_text": ("apply_liger_kernel_to_gemma3_text", "geglu"),
}


def liger(model: nn.Module, full: bool = False) -> nn.Module:
    """Liger-Kernel's norms; full: its rotary embedding, MLP and fused linear cross-entropy as well.

    Its functions patch transformers' own module besides the model; that is undone for the other columns.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in LIGER:
        raise LackingError
    name, mlp = LIGER[kind]
    patch = getattr(import_module("liger_kernel.transformers"), name)
    theirs = import_module(type(model).__module__)
    with mock.patch.dict(vars(theirs)):
        patch(model=model, rms_norm=True, rope=full, fused_linear_cross_entropy=full, cross_entropy=False, **{mlp: full})
        rotary = theirs.apply_rotary_pos_emb
    if full:  # a function of the module, which attention looks up as it runs
        forward = model.forward

        def with_rotary(*args: object, **kwargs: object) -> object:
            with mock.patch.object(theirs, "apply_rotary_pos_emb", rotary):
                return forward(*args, **kwargs)

        model.forward = with_rotary  # type: ignore[method-assign]
    return model


def _compiled(model: nn.Module, change: Callable[[nn.Module], nn.Module] = lambda model: model) -> nn.Module:
    return torch.compile(change(model), dynamic=False, backend=backend(model))


def _layers_compiled(model: nn.Module, change: Callable[[nn.Module], nn.Module] = lambda model: model) -> nn.Module:
    """One graph for all layers that are alike. The mask is made outside it, as in eager mode; see README.md."""
    layers = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    if not hasattr(model, "config") or not layers:
        raise LackingError
    change(model)
    for layer in max(layers, key=len):
        layer.compile(dynamic=False, backend=backend(model))
    return model


def backend(model: nn.Module) -> str:
    """Inductor on a GPU; on a CPU, where no time is meant, what only captures graphs."""
    return "inductor" if next(model.parameters()).is_cuda else "aot_eager"


COLUMNS: dict[str, Column] = {
    "torch": Column(lambda model: model, few=True),
    "compile": Column(_compiled, compiled=True, whole=True, few=True),
    "liger": Column(liger),
    "trinorm": Column(replaced, few=True),
    "fused": Column(fused, few=True),
    "trinorm+compile": Column(partial(_compiled, change=replaced), compiled=True, whole=True, few=True),
    "fused+compile": Column(partial(_compiled, change=fused), compiled=True, whole=True, few=True),
    "layers": Column(_layers_compiled, compiled=True),
    "trinorm+layers": Column(partial(_layers_compiled, change=replaced), compiled=True),
    "fused+layers": Column(partial(_layers_compiled, change=fused), compiled=True),
    "liger-full": Column(partial(liger, full=True)),
}
