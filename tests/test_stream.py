"""ops/stream.py: a norm of the stream that hands it on, and adds its gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from machine import JACOBIAN
from paths import SPECS
from trinorm import reference
from trinorm.compare import assert_no_worse
from trinorm.ops import stream
from trinorm.spec import CASTS, Cast, RowNorm

EPS = 1e-5
SPEC = pytest.mark.parametrize("spec", SPECS)


def stream_norm(
    spec: RowNorm,
    x: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    invariant: bool,
) -> tuple[Tensor, Tensor] | None:
    """As ``fuse`` calls it: recalled, or looked at."""
    manner = spec.name, spec.cast, shape, eps, invariant
    both = stream.recall(manner, x, weight, bias)
    return stream.stream_norm(spec, x, shape, weight, bias, eps, invariant, manner) if both is None else both


def given(spec: RowNorm, dtype: torch.dtype, device: torch.device, rows: int = 5, n: int = 48) -> list[Tensor | None]:
    x, dx, dy = (torch.randn(rows, n, device=device).to(dtype) for _ in range(3))
    weight = torch.rand(n, device=device).to(dtype) + 0.5
    return [x, weight, torch.randn(n, device=device).to(dtype) if spec.center else None, dy, dx]


@SPEC
@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_values_and_gradients(spec: RowNorm, cast: Cast, dtype: torch.dtype, device: torch.device) -> None:
    """No further from float64 than the norm, and the sum of both gradients, by torch; once launches are repeated too."""
    spec = spec.with_cast(cast)
    for _ in range(3):
        x, weight, bias, dy, dx = given(spec, dtype, device)
        leaves = [None if t is None else t.clone().requires_grad_() for t in (x, weight, bias)]
        both = stream_norm(spec, leaves[0], (48,), leaves[1], leaves[2], EPS, False)
        assert both is not None and torch.equal(both[1], x)
        assert_no_worse(
            "y", both[0].detach(), *(of(spec, x, (48,), weight, bias, EPS) for of in (exact, reference.composite))
        )
        found = torch.autograd.grad(both, [t for t in leaves if t is not None], (dy, dx))
        want, yard = (
            of(spec, x, (48,), weight, bias, EPS, dy) for of in (reference.oracle_gradients, reference.torch_gradients)
        )
        assert_no_worse("dx", found[0], want.dx + dx.double(), yard.dx + dx)
        for name, ours, true, theirs in zip(("dw", "db"), found[1:], want[1:], yard[1:], strict=False):
            assert_no_worse(name, ours, true, theirs)


def exact(*of: object) -> Tensor:
    return reference.oracle(*of).y  # type: ignore[arg-type]


@SPEC
def test_either_gradient_alone(spec: RowNorm, device: torch.device) -> None:
    x, weight, bias, dy, dx = given(spec, torch.float32, device)
    x.requires_grad_()
    y, again = stream_norm(spec, x, (48,), weight, bias, EPS, False)
    assert torch.equal(torch.autograd.grad(again, x, dx, retain_graph=True)[0], dx)
    (alone,) = torch.autograd.grad(y, x, dy)
    want, yard = (
        of(spec, x.detach(), (48,), weight, bias, EPS, dy).dx
        for of in (reference.oracle_gradients, reference.torch_gradients)
    )
    assert_no_worse("dx", alone, want, yard)


@SPEC
def test_second_derivatives(spec: RowNorm, device: torch.device) -> None:
    inputs = [t.requires_grad_() for t in given(spec, torch.float64, device, 2, 6)[:3] if t is not None]

    def norm(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        both = stream_norm(spec, x + 0, (6,), *(*parameters, None)[:2], EPS, False)
        assert both is not None
        return both

    assert torch.autograd.gradcheck(norm, inputs, **JACOBIAN)
    assert torch.autograd.gradgradcheck(norm, inputs, **JACOBIAN)


@SPEC
def test_calls_are_told_apart(spec: RowNorm, device: torch.device) -> None:
    x, weight, bias, *_ = given(spec, torch.bfloat16, device)
    x.requires_grad_()
    for cast, eps in itertools.product(CASTS, (EPS, 1.0)):
        of = spec.with_cast(cast), x, (48,), weight, bias, eps
        both = stream_norm(*of, False)
        assert both is not None
        assert_no_worse("y", both[0].detach(), exact(*of), reference.composite(*of).detach())


def test_where_it_is_nothing_but_the_norm(device: torch.device) -> None:
    """Without a gradient of x, of memory in another order, and where the kernels do not serve."""
    spec = SPECS[1].values[0]
    x, weight, *_ = given(spec, torch.float32, device, 48)
    assert stream_norm(spec, x, (48,), weight, None, EPS, False) is None
    x.requires_grad_()
    assert stream_norm(spec, x, (48,), weight, None, EPS, False) is not None
    for other in (x.T, torch.cat([x, x], 1)[:, :48]):
        assert stream_norm(spec, other, (48,), weight, None, EPS, False) is None
    assert stream_norm(spec, x.to("meta"), (48,), weight.to("meta"), None, EPS, False) is None
    with torch.no_grad():
        assert stream_norm(spec, x, (48,), weight, None, EPS, False) is None
    with torch.inference_mode():
        assert stream_norm(spec, x, (48,), weight, None, EPS, False) is None
