"""Derivatives of derivatives in every mode, beside the definition's: of layer_norm some of torch's own are wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from paths import SPECS
from trinorm import functional
from trinorm.ops import road
from trinorm.spec import RowNorm

pytestmark = [
    # A GPU call says once that torch's operators serve it here.
    pytest.mark.filterwarnings("ignore:trinorm:UserWarning"),
]

Norm = Callable[..., Tensor]


def public(spec: RowNorm, x: Tensor, *parameters: Tensor) -> Tensor:
    return getattr(functional, spec.name)(x, x.shape[-1:], *parameters, eps=1e-5)


def registered(spec: RowNorm, x: Tensor, *parameters: Tensor) -> Tensor:
    return getattr(torch.ops.trinorm, spec.name)(x, x.shape[-1:], *parameters, 1e-5, False, "output")[0]


def definition(spec: RowNorm, x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True) if spec.center else x
    y = x * ((x * x).mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
    return y + bias[0] if bias else y


def along(f: Callable[..., Any], *at: Tensor) -> Any:
    """The derivative of f in one direction, in forward mode."""
    return torch.func.jvp(f, at, tuple(t.cos() for t in at))[1]


def scalar(f: Norm) -> Norm:
    return lambda *at: f(*at).sin().sum()


OF_DERIVATIVES: dict[str, Callable[..., Any]] = {
    "hessian": lambda f, *at: torch.func.hessian(scalar(f), tuple(range(len(at))))(*at),
    "jvp of jvp": lambda f, *at: along(lambda *at: along(f, *at), *at),
    "grad of jvp": lambda f, x, *rest: torch.func.grad(lambda x: along(lambda x: f(x, *rest), x).sin().sum())(x),
    "jacrev of jacrev": lambda f, *at: torch.func.jacrev(torch.func.jacrev(scalar(f), (0, 1)), (0, 1))(*at),
    "grad of grad of grad": lambda f, x, *rest: torch.func.grad(
        lambda x: torch.func.grad(lambda x: torch.func.grad(lambda x: scalar(f)(x, *rest))(x).cos().sum())(x).sin().sum()
    )(x),
}


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("by", [public, registered])
@pytest.mark.parametrize("transform", OF_DERIVATIVES)
@pytest.mark.parametrize("spec", SPECS)
def test_transforms_of_transforms(
    spec: RowNorm, transform: str, by: Norm, kernels: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels:
        if device.type == "cuda":
            pytest.skip("kernels serve a GPU")
        monkeypatch.setattr(road, "INTERPRETED", False)
    x = torch.randn(2, 3, device=device, dtype=torch.float64)
    at = [x, *(torch.randn(3, device=device, dtype=torch.float64) for _ in range(2 if spec.center else 1))]
    found, expected = (OF_DERIVATIVES[transform](lambda *at, f=f: f(spec, *at), *at) for f in (by, definition))
    torch.testing.assert_close(found, expected)
