"""The channel norms by teams of programs. In the interpreter a program ends before the next starts: there a kernel runs
three times, and finds in each run the words that it told in the one before, of as many exchanges as a rescue takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from machine import ON_GPU
from test_channels import check, draw, groups_of, norm
from trinorm import functional
from trinorm.compare import assert_no_worse
from trinorm.kernels import channel_split
from trinorm.launch import describe
from trinorm.ops.hosts import channels
from trinorm.reference import channel as reference
from trinorm.spec import BATCH_NORM, CHANNEL_NORMS, GROUP_NORM, ChannelNorm
from trinorm.tuning import ChannelSplit
from trinorm.tuning import channel as tuning


@triton.jit
def _there(WORDS, TEAM, LANES: tl.constexpr):
    words = WORDS + 2 * tl.arange(0, LANES) + tl.zeros([LANES], tl.int64)
    told = tl.arange(0, LANES) < TEAM
    a, b = tl.load(words, mask=told, other=0), tl.load(words + 1, mask=told, other=0)
    return a.to(tl.float64, bitcast=True), b.to(tl.float64, bitcast=True)


@pytest.fixture(autouse=True)
def by_teams(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every statistic goes to a team of small tiles; the kernels that ran."""
    elements, warps, registers, _ = tuning._SPLIT
    if not ON_GPU:
        elements, warps = 128, 1
        monkeypatch.setattr(channel_split, "awaited_wide", _there)
    monkeypatch.setattr(tuning, "_SPLIT", (elements, warps, registers, 0))
    monkeypatch.setattr(tuning, "_HELD", {tensors: (0, *how[1:]) for tensors, how in tuning._HELD.items()})
    monkeypatch.setattr(channels, "describe", lambda device: replace(describe(device), programs_wait=True))
    tuning.choose_whole.cache_clear()
    ran: list[str] = []
    actual = channels.launch

    def launch(kernel: Any, *rest: Any) -> None:
        ran.append(kernel.__name__)
        again = kernel in (channel_split.split_forward, channel_split.split_backward) and not ON_GPU
        running = [t for t in rest[2][4:6] if t is not None] if again and kernel is channel_split.split_forward else []
        before = [t.clone() for t in running]
        for _ in range(3 if again else 1):
            for kept, was in zip(running, before, strict=True):
                kept.copy_(was)
            actual(kernel, *rest)

    monkeypatch.setattr(channels, "launch", launch)
    yield ran
    tuning.choose_whole.cache_clear()


@pytest.fixture(params=CHANNEL_NORMS, ids=lambda spec: spec.name)
def spec(request: pytest.FixtureRequest) -> ChannelNorm:
    return request.param


# Runs longer than a tile and shorter, that fill it and do not; teams that share a run, and that have several.
RAGGED = (2, 4, 11, 13), 2
SHAPES = [
    ((2, 6, 16, 32) if ON_GPU else (2, 4, 16, 16), 2),
    RAGGED,
    ((3, 12, 5, 7), 2),
    *([((4, 512, 128, 128), 32), ((16, 320, 64, 64), 32), ((64, 256, 56, 56), 32)] if ON_GPU else ()),
]


# The interpreter has one of them in fp64, which differs in what a word tells, whatever the shape.
CASES = (
    [(*case, dtype) for case in SHAPES for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)]
    if ON_GPU
    else [*((*case, torch.float32) for case in SHAPES), (*RAGGED, torch.float64)]
)


@pytest.mark.parametrize(("shape", "groups", "dtype"), CASES, ids=str)
def test_values_and_gradients(
    spec: ChannelNorm, shape: tuple[int, ...], groups: int, dtype: torch.dtype, by_teams: list[str], device: torch.device
) -> None:
    drawn, dy = draw(shape, dtype, dtype, False, device)
    residual = torch.randn_like(drawn[0]).requires_grad_()
    check(spec, groups_of(spec, shape, groups), [*drawn, residual], dy, activation="silu")
    assert {"split_forward", "split_backward"} <= set(by_teams)


def test_no_more_than_asked_for(spec: ChannelNorm, by_teams: list[str], device: torch.device) -> None:
    drawn, dy = draw((2, 4, 11, 13), torch.float32, torch.float32, False, device)
    groups = groups_of(spec, (2, 4), 2)
    check(spec, groups, drawn, dy)
    x, weight, bias = (t.detach() for t in drawn)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(norm(spec, x, groups, weight, bias), x, dy)
    assert by_teams[-2:] == ["forget_words", "split_backward"], "no sums of parameters"
    assert torch.equal(dx, torch.autograd.grad(norm(spec, drawn[0], groups, *drawn[1:]), drawn[0], dy)[0])


@pytest.mark.parametrize(
    ("of", "dtype"), [(0.0, torch.float32), (1e4, torch.float32), (2.0**100, torch.float32), (1e4, torch.float64)], ids=str
)
def test_nasty_values(spec: ChannelNorm, of: float, dtype: torch.dtype, by_teams: list[str], device: torch.device) -> None:
    """Large means with small variances, and squares beyond fp32."""
    (x, weight, bias), _ = draw((2, 4, 11, 13), dtype, dtype, False, device)
    with torch.no_grad():
        x = x * of if of > 1e9 else of + 1e-2 * x
        groups = groups_of(spec, (2, 4), 2)
        y = norm(spec, x, groups, weight, bias)
        exact = reference.oracle(spec, x, groups, weight, bias, 1e-5).y
        usual = x * 2.0**-100 if of > 1e9 else x
        assert_no_worse("y", y, exact, reference.composite(spec, usual, groups, weight, bias, 1e-5))


def test_one_statistics_nan_leaves_the_others(spec: ChannelNorm, by_teams: list[str], device: torch.device) -> None:
    """Of all bits too, which no word may be."""
    (x, weight, bias), _ = draw((2, 4, 11, 13), torch.float64, torch.float64, False, device)
    with torch.no_grad():
        groups = groups_of(spec, (2, 4), 2)
        clean = norm(spec, x, groups, weight, bias)
        spoiled = x.clone()
        spoiled.view(torch.int64)[1, 2, 5, 5] = -1
        y = norm(spec, spoiled, groups, weight, bias)
    hit = torch.zeros_like(x, dtype=torch.bool)
    channels_hit = slice(2, 4) if spec is GROUP_NORM else slice(2, 3)
    hit[slice(None) if spec is BATCH_NORM else 1, channels_hit] = True
    assert torch.equal(y[~hit], clean[~hit])
    assert y[hit].isnan().all()


@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
def test_running_statistics(op: str, by_teams: list[str], device: torch.device) -> None:
    x = torch.randn((64, 32, 28, 28) if ON_GPU else (3, 4, 11, 13), device=device) + 3
    ours, theirs = ([t.to(device) for t in (torch.zeros(x.shape[1]), torch.ones(x.shape[1]))] for _ in "ab")
    for functions, running in ((functional, ours), (F, theirs)):
        getattr(functions, op)(x, *running, None, None, True)
    assert "split_forward" in by_teams
    for kept, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(kept, want, rtol=1e-5, atol=1e-6)


def test_each_samples_scale_and_shift(by_teams: list[str], device: torch.device) -> None:
    shape = (4, 64, 64, 64) if ON_GPU else (2, 4, 11, 13)
    drawn, dy = draw(shape, torch.float32, torch.float32, False, device)
    tensors = [*drawn, *torch.randn(2, *shape[:2], device=device).requires_grad_()]
    found, expected = (
        [y, *torch.autograd.grad(y, of, dy.to(y.dtype))]
        for of in (tensors, [t.detach().double().requires_grad_() for t in tensors])
        for x, weight, bias, scale, shift in [of]
        for y in [
            functional.group_norm(x, 2, weight, bias, scale=scale, shift=shift)
            if of is tensors
            else F.group_norm(x, 2, weight, bias) * (1 + scale[..., None, None]) + shift[..., None, None]
        ]
    )
    assert {"split_forward", "split_backward"} <= set(by_teams)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_teams_fit_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    device = describe(torch.device("meta"))
    for runs, s in ((16, 16384), (64, 3136), (10, 4096), (256, 2048), (4, 1 << 20)):
        plan = tuning.choose_whole(2048, runs, s, 2, 1, False, True, device)
        assert isinstance(plan, ChannelSplit) == (s < 1 << 20), "a team of 66 does not hold 4 times 2^20"
        if isinstance(plan, ChannelSplit):
            assert 1 < plan.team <= min(device.multiprocessors // 2, plan.lanes)
            assert plan.team * plan.tile.rows * plan.tile.chunk >= runs * s
