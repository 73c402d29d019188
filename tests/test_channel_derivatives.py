"""Derivatives of derivatives of the channel norms, beside the definition's: of batch_norm and instance_norm torch's own are
wrong.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from test_channels import norm
from test_observers import third
from test_transforms import OF_DERIVATIVES
from trinorm import functional
from trinorm.ops import road
from trinorm.reference.channel import Given, oracle_gradients
from trinorm.spec import BATCH_NORM, CHANNEL_NORMS, GROUP_NORM, INSTANCE_NORM, ChannelNorm

pytestmark = pytest.mark.filterwarnings("ignore:trinorm:UserWarning")

GROUPS, CHANNELS = 2, 4


@pytest.fixture(params=[True, False], ids=["kernels", "composite"])
def device(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if not request.param:
        if device.type == "cuda":
            pytest.skip("kernels serve a GPU")
        monkeypatch.setattr(road, "INTERPRETED", False)
    return device


def definition(spec: ChannelNorm, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    seen = x.reshape(x.shape[0], GROUPS if spec is GROUP_NORM else CHANNELS, -1, *x.shape[2:])
    dims = {BATCH_NORM: (0, 2, 3), GROUP_NORM: (2, 3), INSTANCE_NORM: (2, 3)}.get(spec, (1,))
    centered = seen - seen.mean(dims, keepdim=True)
    xhat = centered * ((centered * centered).mean(dims, keepdim=True) + 1e-5).rsqrt()
    return xhat.reshape(x.shape) * weight[:, None] + bias[:, None]


def ours(spec: ChannelNorm, x: Tensor, *parameters: Tensor) -> Tensor:
    return norm(spec, x, GROUPS, *parameters, **(dict(eps=1e-5) if spec.of_positions else {}))


def drawn(device: torch.device) -> list[Tensor]:
    shapes = (2, CHANNELS, 3), (CHANNELS,), (CHANNELS,)
    return [torch.randn(shape, device=device, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("transform", OF_DERIVATIVES)
@pytest.mark.parametrize("spec", CHANNEL_NORMS, ids=lambda spec: spec.name)
def test_transforms_of_transforms(spec: ChannelNorm, transform: str, device: torch.device) -> None:
    at = drawn(device)
    found, expected = (OF_DERIVATIVES[transform](lambda *at, f=f: f(spec, *at), *at) for f in (ours, definition))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("spec", CHANNEL_NORMS, ids=lambda spec: spec.name)
def test_third_derivatives(spec: ChannelNorm, device: torch.device) -> None:
    x, *parameters = drawn(device)
    found, expected = (third(lambda x, f=f: f(spec, x, *parameters), x.requires_grad_()) for f in (ours, definition))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("given", [False, True], ids=["taken", "given"])
@pytest.mark.parametrize("spec", [BATCH_NORM, INSTANCE_NORM], ids=lambda spec: spec.name)
def test_second_derivatives_of_a_bias_alone(spec: ChannelNorm, given: bool, device: torch.device) -> None:
    """Of which torch's own raise."""
    x, mean, bias = (t.requires_grad_() for t in drawn(device))
    statistics = Given(mean.detach(), torch.ones_like(mean)) if given else None
    run = lambda x, bias: norm(spec, x, CHANNELS, None, bias, statistics).sin()  # noqa: E731
    torch.autograd.gradgradcheck(run, (x, bias), fast_mode=True)


@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
def test_tangents_of_given_statistics(op: str, device: torch.device) -> None:
    """Which torch drops."""
    x, mean, weight = drawn(device)
    var = torch.rand_like(mean) + 0.5

    def evaluated(mean: Tensor, var: Tensor) -> Tensor:
        return getattr(functional, op)(x, mean, var, weight, None, False)

    def definition(mean: Tensor, var: Tensor) -> Tensor:
        return (x - mean[:, None]) * (var[:, None] + 1e-5).rsqrt() * weight[:, None]

    tangents = torch.randn_like(mean), torch.randn_like(var)
    found, expected = (torch.func.jvp(f, (mean, var), tangents) for f in (evaluated, definition))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("of_dy", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("samples", [1, 2])
def test_gradients_in_either_order(
    samples: int, order: torch.memory_format, of_dy: torch.memory_format, device: torch.device
) -> None:
    """Of one sample torch's instance_norm confuses the two."""
    x, dy = (
        torch.randn(samples, 3, 4, 5, device=device, dtype=torch.float64).contiguous(memory_format=m)
        for m in (order, of_dy)
    )
    (found,) = torch.autograd.grad(functional.instance_norm(x.requires_grad_()), x, dy)
    exact = oracle_gradients(INSTANCE_NORM, x.detach(), 3, None, None, 1e-5, dy).dx
    torch.testing.assert_close(found, exact)


def test_no_samples_leave_running_statistics_alone(device: torch.device) -> None:
    running = [torch.zeros(4, device=device), torch.ones(4, device=device)]
    for op in (functional.instance_norm, lambda *args: functional.batch_norm(*args, training=True)):
        op(torch.ones(0, 4, 5, device=device), *running)
    torch.testing.assert_close(running, [torch.zeros(4, device=device), torch.ones(4, device=device)])


@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
def test_running_statistics_in_forward_mode(op: str, device: torch.device) -> None:
    """Kept up once, as by a plain call."""
    x, *_ = drawn(device)
    by_jvp, plain = ([x.new_zeros(CHANNELS), x.new_ones(CHANNELS)] for _ in "ab")
    torch.func.jvp(lambda x: getattr(functional, op)(x, *by_jvp, None, None, True), (x,), (x.cos(),))
    getattr(functional, op)(x, *plain, None, None, True)
    torch.testing.assert_close(by_jvp, plain)
