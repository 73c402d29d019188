"""What a channel norm does to its result at once: activations, residuals, each sample's scale and shift."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from machine import ON_GPU
from test_channels import check, draw, groups_of, norm
from trinorm import nn
from trinorm.compare import assert_no_worse
from trinorm.reference import channel as reference
from trinorm.reference.channel import Given
from trinorm.spec import ACTIVATIONS, BATCH_NORM, CHANNEL_NORMS, GROUP_NORM, INSTANCE_NORM, Activation, ChannelNorm


@pytest.fixture(params=CHANNEL_NORMS, ids=lambda spec: spec.name)
def spec(request: pytest.FixtureRequest) -> ChannelNorm:
    return request.param


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(3, 12, 5, 6), *([(16, 320, 64, 64)] if ON_GPU else ())], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, *([torch.bfloat16] if ON_GPU else ())], ids=str)
def test_activations(
    spec: ChannelNorm,
    activation: Activation,
    shape: tuple[int, ...],
    last: bool,
    dtype: torch.dtype,
    by: str,
    device: torch.device,
) -> None:
    if last and by == "whole":
        pytest.skip("channels first alone")
    drawn, dy = draw(shape, dtype, dtype, last, device)
    check(spec, groups_of(spec, shape, 4), drawn, dy, activation=activation)


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_activations_of_given_statistics(last: bool, device: torch.device) -> None:
    drawn, dy = draw((3, 40, 5, 6), torch.float32, torch.float32, last, device)
    given = Given(torch.randn(40, device=device), torch.rand(40, device=device) + 0.5)
    check(BATCH_NORM, 40, drawn, dy, given, "silu")


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("given", [False, True], ids=["taken", "given"])
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("shape", [(3, 12, 5, 6), *([(64, 256, 56, 56)] if ON_GPU else ())], ids=str)
def test_residuals(
    spec: ChannelNorm,
    activation: Activation | None,
    given: bool,
    last: bool,
    shape: tuple[int, ...],
    by: str,
    device: torch.device,
) -> None:
    """Added before the activation; also those of the other order in memory, and alone in wanting a gradient."""
    if (last and by == "whole") or (given and spec is not BATCH_NORM):
        pytest.skip("channels first alone" if last else "BatchNorm alone")
    drawn, dy = draw(shape, torch.float32, torch.float32, last, device)
    of_channels = torch.randn(2, shape[1], device=device)
    statistics = Given(of_channels[0], of_channels[1].abs() + 0.5) if given else None
    residual = torch.randn(shape, device=device, requires_grad=True)
    groups = groups_of(spec, shape, 4)
    check(spec, groups, [*drawn, residual], dy, statistics, activation)
    if drawn[0].numel() > 1 << 20:
        return  # so many that some lie at relu's bend, on one side of it by one kernel and on the other by another
    x, weight, bias = (t.detach() for t in drawn)
    how = dict(activation=activation)
    alone = norm(spec, x, groups, weight, bias, statistics, residual=residual, **how)
    both = norm(spec, drawn[0], groups, *drawn[1:], statistics, residual=residual, **how)
    without = norm(spec, drawn[0], groups, *drawn[1:], statistics, residual=residual.detach(), **how)
    dx, dr = torch.autograd.grad(both, (drawn[0], residual), dy)
    torch.testing.assert_close(torch.autograd.grad(alone, residual, dy)[0], dr)
    torch.testing.assert_close(torch.autograd.grad(without, drawn[0], dy)[0], dx)


@pytest.mark.parametrize("spec", [GROUP_NORM, INSTANCE_NORM], ids=lambda spec: spec.name)
@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("shape", [(3, 48, 5, 6), *([(8, 640, 32, 32)] if ON_GPU else ())], ids=str)
def test_scale_and_shift(
    spec: ChannelNorm, affine: bool, last: bool, shape: tuple[int, ...], by: str, device: torch.device
) -> None:
    """Those of each sample: value and gradients, beside the same in torch's ops, of which float64's are the oracle."""
    if last and by == "whole":
        pytest.skip("channels first alone")
    drawn, dy = draw(shape, torch.float32, torch.float32, last, device)
    groups = groups_of(spec, shape, 4)
    drawn = [
        *(drawn if affine else drawn[:1]),
        *(torch.randn(*shape[:2], 1, 1, device=device).requires_grad_() for _ in "ab"),
    ]

    def by_torch(*tensors: Tensor) -> Tensor:
        x, *parameters, scale, shift = tensors
        weight, bias = parameters or (None, None)
        return F.silu(reference.composite(spec, x, groups, weight, bias, 1e-5) * (1 + scale) + shift)

    def ours(*tensors: Tensor) -> Tensor:
        x, *parameters, scale, shift = tensors
        weight, bias = parameters or (None, None)
        return norm(spec, x, groups, weight, bias, activation="silu", scale=scale, shift=shift)

    wide = [t.detach().double().requires_grad_() for t in drawn]
    results = [
        (y.detach(), *torch.autograd.grad(y, of, dy.to(y.dtype)))
        for y, of in ((ours(*drawn), drawn), (by_torch(*wide), wide), (by_torch(*drawn), drawn))
    ]
    for what, got, want, theirs in zip(("y", "dx", "dw", "db", "ds", "dt"), *results, strict=False):
        assert got.shape == want.shape
        assert_no_worse(what, got, want, theirs)
    (alone,) = torch.autograd.grad(norm(spec, drawn[0], groups, None, None, shift=drawn[-1]), drawn[-1], dy)
    torch.testing.assert_close(alone, dy.sum((2, 3), keepdim=True), rtol=1e-4, atol=1e-4)


def test_modules(device: torch.device) -> None:
    """The activation is an attribute, the tensors are arguments; state_dict and repr are torch's but for the activation."""
    x, residual = torch.randn(2, 3, 12, 5, 6, device=device)
    scale, shift = torch.randn(2, 3, 12, device=device)
    ours, theirs = (kind(12).to(device) for kind in (nn.BatchNorm2d, torch.nn.BatchNorm2d))
    ours.activation = "relu"
    for module in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        module.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(module(x, residual=residual), F.relu(copy.deepcopy(theirs)(x) + residual))
        assert "activation='relu'" in repr(module)
    assert repr(nn.BatchNorm2d(12)) == repr(torch.nn.BatchNorm2d(12))

    group = nn.GroupNorm(4, 12).to(device)
    group.activation = "silu"
    z = F.group_norm(x, 4) * (1 + scale[..., None, None]) + shift[..., None, None]
    torch.testing.assert_close(group(x, scale=scale, shift=shift, residual=residual), F.silu(z + residual))
    instance = nn.InstanceNorm2d(12)
    instance.activation = "gelu"
    torch.testing.assert_close(instance(x), F.gelu(F.instance_norm(x)), rtol=1e-5, atol=1e-5)
