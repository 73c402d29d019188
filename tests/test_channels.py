"""The channel norms: GroupNorm, InstanceNorm and BatchNorm, values, gradients and running statistics."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from paths import forget_channel_choices
from trinorm import functional
from trinorm.compare import assert_no_worse
from trinorm.launch import describe
from trinorm.ops.hosts import channels
from trinorm.reference import channel as reference
from trinorm.reference.channel import Given
from trinorm.spec import BATCH_NORM, CHANNEL_NORMS, GROUP_NORM, INSTANCE_NORM, Activation, ChannelNorm
from trinorm.tuning import channel as tuning

ON_GPU = torch.cuda.is_available()
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# (shape, groups): primes, single positions and channels, groups of 3 channels, several tiles of a pass.
SHAPES = [
    ((2, 6, 5, 7), 2),
    ((3, 12, 1, 1), 3),
    ((5, 64), 16),
    ((2, 9, 29), 3),
    ((1, 4, 3, 4, 5), 4),
    ((2, 70, 3, 3), 10),
    ((2, 8, 33, 67) if ON_GPU else (1, 4, 33, 67), 2),
    *([((4, 70, 6, 6), 10), ((7, 32, 7, 7), 8)] if ON_GPU else ()),
    *([((16, 320, 64, 64), 32), ((2, 96, 301, 17), 3), ((1, 32, 1024, 700), 2), ((300, 1024), 32)] if ON_GPU else ()),
]


@pytest.fixture(params=CHANNEL_NORMS, ids=lambda spec: spec.name)
def spec(request: pytest.FixtureRequest) -> ChannelNorm:
    return request.param


def groups_of(spec: ChannelNorm, shape: tuple[int, ...], groups: int) -> int:
    return groups if spec is GROUP_NORM else shape[1]


def draw(
    shape: tuple[int, ...], dtype: torch.dtype, of_weight: torch.dtype, last: bool, device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """x, weight and bias, which want gradients; dy."""
    x, dy = (torch.randn(shape).to(device, dtype) + shift for shift in (0.5, 0.0))
    if last and len(shape) in (4, 5):
        x = x.contiguous(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    weight, bias = (torch.randn(shape[1]).to(device, of_weight) for _ in range(2))
    return [t.requires_grad_() for t in (x, weight, bias)], dy


def norm(
    spec: ChannelNorm,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    given: Given | None = None,
    **how: Any,
) -> Tensor:
    if spec is GROUP_NORM:
        return functional.group_norm(x, num_groups, weight, bias, **how)
    if spec.of_positions:
        return functional.channel_layer_norm(x, weight, bias, **how)
    mean, var = given or (None, None)
    if spec is INSTANCE_NORM:
        return functional.instance_norm(x, mean, var, weight, bias, given is None, **how)
    return functional.batch_norm(x, mean, var, weight, bias, given is None, **how)


def check(
    spec: ChannelNorm,
    num_groups: int,
    drawn: list[Tensor],
    dy: Tensor,
    given: Given | None = None,
    activation: Activation | None = None,
) -> None:
    """Value and gradients no further from float64 than twice torch's own. drawn: x, weight, bias, and a residual or not."""
    x, weight, bias, residual = (*drawn, None)[:4]
    y = norm(spec, x, num_groups, weight, bias, given, activation=activation, residual=residual)
    assert y.dtype == x.dtype
    problem = spec, x.detach(), num_groups, weight.detach(), bias.detach(), 1e-5
    added = None if residual is None else residual.detach()
    if activation == "relu":  # on which side of the bend a rounding falls is chance
        z = reference.oracle(*problem, given, None, added).y
        dy = dy.masked_fill(z.abs() < 8 * torch.finfo(x.dtype).eps * (1 + z.abs().max()), 0)
    by_torch = reference.composite(spec, x, num_groups, weight, bias, 1e-5, given, None, activation, residual)
    assert_no_worse("y", y.detach(), reference.oracle(*problem, given, activation, added).y, by_torch.detach())
    found, theirs = (torch.autograd.grad(result, drawn, dy) for result in (y, by_torch))
    exact = reference.oracle_gradients(*problem, dy, given, activation, added)
    for what, got, want, torchs in zip(("dx", "dw", "db", "dr"), found, exact, theirs, strict=False):
        assert want is not None
        # Of a handful of numbers torch's error is chance: of 1 and 2 values to a sum it may be none.
        spread = torchs if want.numel() > 32 else want + (torchs.double() - want).abs().max().clamp(min=_slack(want, got))
        assert_no_worse(what, got, want, spread)


def _slack(want: Tensor, got: Tensor) -> float:
    """Two roundings of the largest of a few numbers."""
    return 2 * float(want.abs().max()) * torch.finfo(got.dtype).eps


@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, *([torch.bfloat16] if ON_GPU else ())], ids=str)
def test_shapes(
    spec: ChannelNorm, shape: tuple[int, ...], groups: int, last: bool, dtype: torch.dtype, by: str, device: torch.device
) -> None:
    if last and by == "whole":
        pytest.skip("channels first alone")
    if last and len(shape) not in (4, 5):
        pytest.skip("one memory order")
    if spec is INSTANCE_NORM and math.prod(shape[2:]) == 1:
        pytest.skip("one position")
    drawn, dy = draw(shape, dtype, dtype, last, device)
    check(spec, groups_of(spec, shape, groups), drawn, dy)
    x = drawn[0]
    y = norm(spec, x, groups_of(spec, shape, groups), None, None)
    for t in (y, *torch.autograd.grad(y, x, dy)):
        assert t.shape == x.shape
        assert all(a == b for a, b, size in zip(t.stride(), x.stride(), x.shape, strict=True) if size > 1)


@pytest.mark.parametrize("dtypes", [*itertools.product(FLOATS, [torch.bfloat16, torch.float32, torch.float64])], ids=str)
def test_dtypes(spec: ChannelNorm, dtypes: tuple[torch.dtype, torch.dtype], device: torch.device) -> None:
    shape = (3, 48, 5, 6)
    drawn, dy = draw(shape, *dtypes, True, device)
    check(spec, groups_of(spec, shape, 4), drawn, dy)


@pytest.mark.parametrize("base", [INSTANCE_NORM, BATCH_NORM], ids=lambda spec: spec.name)
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_given_statistics(base: ChannelNorm, last: bool, dtype: torch.dtype, device: torch.device) -> None:
    shape = (3, 40, 5, 6)
    drawn, dy = draw(shape, dtype, dtype, last, device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    given = Given(torch.randn(40, device=device, dtype=wide), torch.rand(40, device=device, dtype=wide) + 0.5)
    check(base, 40, drawn, dy, given)


def test_only_what_is_asked_for(spec: ChannelNorm, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (2, 12, 5, 6)
    actual, asked = channels.backward, []
    monkeypatch.setattr(channels, "backward", lambda *a, **k: (asked.append(k), actual(*a, **k))[1])
    for wanted in itertools.product([False, True], repeat=3):
        if not any(wanted):
            continue
        drawn, dy = draw(shape, torch.float32, torch.float32, False, device)
        for t, wants in zip(drawn, wanted, strict=True):
            t.requires_grad_(wants)
        of = [t for t in drawn if t.requires_grad]
        y = norm(spec, drawn[0], groups_of(spec, shape, 4), *drawn[1:])
        got = torch.autograd.grad(y, of, dy)
        assert [asked[-1][name] not in (None, False) for name in ("dx", "dw", "db")] == list(wanted)
        by_torch = reference.composite(spec, drawn[0], groups_of(spec, shape, 4), *drawn[1:], 1e-5)
        for g, want in zip(got, torch.autograd.grad(by_torch, of, dy), strict=True):
            torch.testing.assert_close(g, want, rtol=1e-4, atol=1e-5)


def test_neither_weight_nor_bias(spec: ChannelNorm, device: torch.device) -> None:
    (x, *_), dy = draw((2, 12, 5, 6), torch.float32, torch.float32, False, device)
    groups = groups_of(spec, (2, 12), 4)
    y = norm(spec, x, groups, None, None)
    problem = spec, x.detach(), groups, None, None, 1e-5
    by_torch = reference.composite(spec, x, groups, None, None, 1e-5)
    assert_no_worse("y", y.detach(), reference.oracle(*problem).y, by_torch.detach())
    (dx,), (theirs,) = (torch.autograd.grad(result, x, dy) for result in (y, by_torch))
    assert_no_worse("dx", dx, reference.oracle_gradients(*problem, dy).dx, theirs)


# Values.

NASTY: dict[str, Callable[[Tensor], Tensor]] = {
    "mean 1e4, std 1e-2": lambda x: 1e4 + 1e-2 * x,
    "one value": lambda x: torch.full_like(x, 3.7),
    "zeros": torch.zeros_like,
    "1e15": lambda x: 1e15 * x,
    "1e-15": lambda x: 1e-15 * x,
}


@pytest.mark.parametrize("what", NASTY)
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_nasty_values(spec: ChannelNorm, what: str, last: bool, device: torch.device) -> None:
    shape = (2, 12, 9, 11)
    drawn, dy = draw(shape, torch.float32, torch.float32, last, device)
    x = NASTY[what](drawn[0].detach()).requires_grad_()
    groups = groups_of(spec, shape, 4)
    y = norm(spec, x, groups, *drawn[1:])
    exact = reference.oracle(spec, x.detach(), groups, *(t.detach() for t in drawn[1:]), 1e-5).y
    assert_no_worse("y", y.detach(), exact, reference.composite(spec, x, groups, *drawn[1:], 1e-5).detach())
    assert all(g.isfinite().all() for g in torch.autograd.grad(y, (x, *drawn[1:]), dy))


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("base", [GROUP_NORM, BATCH_NORM], ids=lambda spec: spec.name)
def test_large_means_of_many_elements(
    base: ChannelNorm, last: bool, by: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recurrence of many steps, whose mean is rounded at each: statistics and dx are no worse for it."""
    if last and by == "whole":
        pytest.skip("channels first alone")
    monkeypatch.setattr(tuning, "_WHOLE", ((0, 256, 1),))
    for table in (tuning._SUMS, tuning._APPLY):
        for key in table:
            monkeypatch.setitem(table, key, (256, 1, 2, 0.1 / describe(device).multiprocessors))
    forget_channel_choices()
    # A group's steps are those of its sample: fewer samples, which take the interpreter long, have as many.
    shape = (16 if ON_GPU or base is BATCH_NORM else 4, 4, 32, 32)
    (x, weight, bias), dy = draw(shape, torch.float32, torch.float32, last, device)
    x = (1e4 + 1e-2 * x.detach().double()).float().requires_grad_()
    groups = groups_of(base, shape, 2)
    problem = base, x.detach(), groups, weight.detach(), bias.detach(), 1e-5
    _, mean, rstd = channels.forward(channels.Problem(base, groups, 1e-5), x.detach(), None, None)
    if base is BATCH_NORM:
        _, torchs_mean, torchs_rstd = torch.native_batch_norm(x.detach(), None, None, None, None, True, 0.0, 1e-5)
    else:
        contiguous = x.detach().contiguous()
        _, torchs_mean, torchs_rstd = torch.native_group_norm(contiguous, None, None, shape[0], 4, 1024, groups, 1e-5)
    exact = reference.oracle(*problem)
    assert mean is not None and rstd is not None
    assert_no_worse("mean", mean.flatten(), exact.mean, torchs_mean.flatten())
    assert_no_worse("rstd", rstd.flatten(), exact.rstd, torchs_rstd.flatten())
    (dx,) = torch.autograd.grad(norm(base, x, groups, weight, bias), x, dy)
    (torchs_dx,) = torch.autograd.grad(reference.composite(base, x, groups, weight, bias, 1e-5), x, dy)
    assert_no_worse("dx", dx, reference.oracle_gradients(*problem, dy).dx, torchs_dx)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_means_near_0_of_16_bits(dtype: torch.dtype, device: torch.device) -> None:
    """Rounded distances from such a mean are off all alike; the held statistic's mean is not."""
    x = torch.randn((8, 320, 32, 32), device=device).to(dtype)
    _, mean, rstd = channels.forward(channels.Problem(BATCH_NORM, 320, 1e-5), x, None, None)
    exact = reference.oracle(BATCH_NORM, x, 320, None, None, 1e-5)
    _, torchs_mean, torchs_rstd = torch.native_batch_norm(x.float(), None, None, None, None, True, 0.0, 1e-5)
    assert mean is not None
    assert_no_worse("mean", mean, exact.mean, torchs_mean)
    assert_no_worse("rstd", rstd, exact.rstd, torchs_rstd)


def test_squares_beyond_fp32(spec: ChannelNorm, device: torch.device) -> None:
    (x, weight, bias), _ = draw((2, 12, 9, 11), torch.float32, torch.float32, False, device)
    with torch.no_grad():
        groups = groups_of(spec, (2, 12), 4)
        expected = norm(spec, x * 2.0**20, groups, weight, bias)
        torch.testing.assert_close(norm(spec, x * 2.0**100, groups, weight, bias), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_one_groups_nan_leaves_the_others(spec: ChannelNorm, value: float, last: bool, device: torch.device) -> None:
    shape = (3, 12, 9, 11)
    (x, weight, bias), _ = draw(shape, torch.float32, torch.float32, last, device)
    groups = groups_of(spec, shape, 4)
    with torch.no_grad():
        clean = norm(spec, x, groups, weight, bias)
        spoiled = x.detach().clone()
        spoiled[1, 4, 3, 3] = value
        y = norm(spec, spoiled, groups, weight, bias)
        of_group = 12 // groups
        first = 4 // of_group * of_group
        hit = torch.zeros(shape, dtype=torch.bool, device=device)
        hit[slice(None) if spec.over_samples else 1, first : first + of_group] = True
        assert torch.equal(y[~hit], clean[~hit])
        assert y[hit].isnan().any()


def test_the_same_bits_on_every_run(spec: ChannelNorm, device: torch.device) -> None:
    drawn, dy = draw((4, 24, 19, 23) if ON_GPU else (2, 12, 9, 11), torch.bfloat16, torch.float32, True, device)
    runs = []
    for _ in range(3 if ON_GPU else 2):
        y = norm(spec, drawn[0], groups_of(spec, drawn[0].shape, 4), *drawn[1:])
        runs.append((y.detach(), *torch.autograd.grad(y, drawn, dy)))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


# Layout and emptiness.


def test_other_layouts(spec: ChannelNorm, device: torch.device) -> None:
    wide = torch.randn(3, 12, 9, 22, device=device)
    groups = groups_of(spec, (3, 12), 4)
    for x in (wide[..., ::2], wide.transpose(2, 3), wide.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)):
        assert torch.equal(norm(spec, x, groups, None, None), norm(spec, x.contiguous(), groups, None, None))
    x = wide.contiguous(memory_format=torch.channels_last).requires_grad_()
    y = norm(spec, x, groups, None, None)
    for dy in (
        torch.ones(1, device=device).expand_as(y),
        torch.randn_like(wide),
        torch.randn_like(wide.transpose(2, 3)).transpose(2, 3),
    ):
        (got,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        (want,) = torch.autograd.grad(norm(spec, x, groups, None, None), x, dy.contiguous())
        assert torch.equal(got, want)
        assert got.stride() == x.stride()


@pytest.mark.parametrize("shape", [(0, 6, 5, 5), (2, 6, 0, 5)], ids=str)
def test_nothing(spec: ChannelNorm, shape: tuple[int, ...], device: torch.device) -> None:
    x, weight, bias = (t.requires_grad_() for t in (torch.empty(shape, device=device), *torch.ones(2, 6, device=device)))
    y = norm(spec, x, groups_of(spec, shape, 2), weight, bias)
    assert y.shape == shape
    for g in torch.autograd.grad(y, (x, weight, bias), torch.empty_like(y)):
        assert not g.any()


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((9, 12, 7, 7), 4), ((2, 6, 70, 61) if ON_GPU else (2, 3, 30, 31), 3), ((130 if ON_GPU else 34, 16), 4)],
    ids=str,
)
def test_programs_that_walk(
    spec: ChannelNorm,
    shape: tuple[int, ...],
    groups: int,
    last: bool,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a device so small that a program takes several tiles, or samples."""
    if spec is INSTANCE_NORM and len(shape) == 2:
        pytest.skip("one position")
    # Slabs, and as few programs as there are tiles of channels: of one multiprocessor's tenth.
    monkeypatch.setattr(tuning, "_LEAST_SHARE", 0)
    for table in (tuning._SUMS, tuning._APPLY):
        for key, (_, warps, stages, _) in table.items():
            monkeypatch.setitem(table, key, (256, warps, max(2, stages), 0.1 / describe(device).multiprocessors))
    forget_channel_choices()
    walked: list[tuple[Any, int]] = []
    for name in ("choose_sums", "choose_apply"):
        actual = getattr(channels, name)
        monkeypatch.setattr(channels, name, lambda *a, actual=actual: (walked.append((actual(*a), a[2])), walked[-1][0])[1])
    try:
        drawn, dy = draw(shape, torch.float32, torch.float32, last, device)
        check(spec, groups_of(spec, shape, groups), drawn, dy)
    finally:
        forget_channel_choices()
    if spec.over_samples or math.prod(shape[2:]) > 256:
        assert any(plan.samples > 1 or plan.shares * plan.tile.chunk < s for plan, s in walked)
