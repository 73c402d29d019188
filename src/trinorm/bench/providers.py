"""Who is measured: trinorm, and each peer by the call that its own users write."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional
from ..norms import ROW_OPS, Results, num_groups
from .cases import OPS, Case

# (x, weight) -> y or (x, weight, bias) -> y, differentiable; of a sum, the residual after x and (y, sum).
Norm = Callable[..., Results]

OURS = "trinorm"


@dataclass(frozen=True)
class Provider:
    """A name, and the norm that it offers for a case. weight_dtypes: by op, where it takes weights of one dtype only. ops:
    those that it has.
    """

    name: str
    build: Callable[[Case], Norm]
    weight_dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    ops: Collection[str] = tuple(OPS)

    def served(self, case: Case) -> Case:
        """The case, with the weight dtype that this provider takes."""
        return replace(case, weight_dtype=self.weight_dtypes.get(case.op, case.weight_dtype))


def load(peers: Sequence[str]) -> tuple[list[Provider], dict[str, str]]:
    """trinorm and those of ``peers`` (names in PEERS) that can be imported; for the others, why not."""
    providers, absent = [Provider(OURS, functools.partial(_functional, functional))], {}
    for name in peers:
        try:
            providers.append(PEERS[name]())
        except Exception as error:  # an installed package may fail to import in any way
            absent[name] = f"{type(error).__name__}: {error}"
    return providers, absent


@functools.cache
def version_of(name: str) -> str | None:
    """The installed version of the package a provider comes in; None of torch's and ours, of which a record says more."""
    try:
        return importlib.metadata.version(_PACKAGES[name])
    except (KeyError, importlib.metadata.PackageNotFoundError):
        return None


def _functional(functions: ModuleType, case: Case) -> Norm:
    """The norm of a module with torch.nn.functional's signatures; of the running statistics that some have, without."""
    op = OPS[case.op]
    return op.norm.function(functions, case.shape, op.eps)


def _compiled(case: Case) -> Norm:
    """torch's norm through Inductor, compiled anew for each shape: what it learnt of another shape must not show."""
    torch._dynamo.reset()
    return torch.compile(_functional(F, case), dynamic=False)


def _liger() -> Provider:
    """By default its RMSNorms' and PolyNorm's backwards write dx into dy, and are timed so: dy drifts from call to call."""
    norms = importlib.import_module("liger_kernel.transformers.functional")

    def build(case: Case) -> Norm:
        eps = OPS[case.op].eps
        if case.op == "group_norm":
            c = case.shape[1]
            return lambda x, weight, bias: norms.liger_group_norm(x, weight, bias, c, num_groups(c), eps)
        if case.op == "layer_norm":
            return lambda x, weight, bias: norms.liger_layer_norm(x, weight, bias, eps)
        if case.op == "add_rms_norm":
            return lambda x, residual, weight: norms.liger_fused_add_rms_norm(x, residual, weight, eps)
        if case.op == "dynamic_tanh":
            return norms.liger_dyt
        if case.op == "poly_norm":
            return lambda x, weight, bias: norms.liger_poly_norm(x, weight, bias, eps)
        return lambda x, weight: norms.liger_rms_norm(x, weight, eps)

    return Provider("liger", build, ops=(*ROW_OPS, "group_norm", "add_rms_norm", "dynamic_tanh", "poly_norm"))


def _quack() -> Provider:
    """Its LayerNorm is a pair of functions without autograd, with fp32 weights: joined here, as a user would have to."""
    norms = importlib.import_module("quack.rmsnorm")

    class LayerNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
            y, rstd, mean = norms.layernorm_fwd(x, weight, bias, eps, return_rstd=True, return_mean=True)
            ctx.save_for_backward(x, weight, rstd, mean)
            return y

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
            x, weight, rstd, mean = ctx.saved_tensors
            return *norms.layernorm_bwd(x, weight, dy, rstd, mean), None

    layer_norm: Norm = LayerNorm.apply

    def build(case: Case) -> Norm:
        eps = OPS[case.op].eps
        if case.op == "rms_norm":
            return lambda x, weight: norms.rmsnorm(x, weight, eps=eps)
        if case.op == "add_rms_norm":
            return lambda x, residual, weight: norms.rmsnorm(x, weight, residual=residual, eps=eps, prenorm=True)
        if case.backward:
            return lambda x, weight, bias: layer_norm(x, weight, bias, eps)
        return lambda x, weight, bias: norms.layernorm_fwd(x, weight, bias, eps)

    return Provider("quack", build, {"layer_norm": torch.float32}, (*ROW_OPS, "add_rms_norm"))


PEERS: dict[str, Callable[[], Provider]] = {
    "torch": lambda: Provider("torch", functools.partial(_functional, F)),
    "compile": lambda: Provider("compile", _compiled),
    "liger": _liger,
    "quack": _quack,
}

# What packages the others come in.
_PACKAGES = {"liger": "liger-kernel", "quack": "quack-kernels"}
