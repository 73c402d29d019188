"""The channel norms: GroupNorm, InstanceNorm and BatchNorm, values, gradients and running statistics."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trinorm import channel_reference as reference
from trinorm import functional, nn
from trinorm.channel_reference import Given
from trinorm.compare import assert_no_worse
from trinorm.launch import describe
from trinorm.ops import channels, road
from trinorm.spec import BATCH_NORM, CHANNEL_NORMS, GROUP_NORM, INSTANCE_NORM, ChannelNorm
from trinorm.tuning import channel as tuning

ON_GPU = torch.cuda.is_available()
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# (shape, groups): primes, single positions and channels, groups of 3 channels, several tiles of a pass.
SHAPES = [
    ((2, 6, 5, 7), 2),
    ((3, 12, 1, 1), 3),
    ((5, 64), 16),
    ((2, 9, 13), 3),
    ((1, 4, 3, 4, 5), 4),
    ((4, 70, 6, 6), 10),
    ((2, 8, 33, 67), 2),
    ((7, 32, 7, 7), 8),
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
    spec: ChannelNorm, x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, given: Given | None = None
) -> Tensor:
    if spec is GROUP_NORM:
        return functional.group_norm(x, num_groups, weight, bias)
    mean, var = given or (None, None)
    if spec is INSTANCE_NORM:
        return functional.instance_norm(x, mean, var, weight, bias, given is None)
    return functional.batch_norm(x, mean, var, weight, bias, given is None)


def check(spec: ChannelNorm, num_groups: int, drawn: list[Tensor], dy: Tensor, given: Given | None = None) -> None:
    """Value and gradients no further from float64 than twice torch's own."""
    x, weight, bias = drawn
    y = norm(spec, x, num_groups, weight, bias, given)
    assert y.dtype == x.dtype
    problem = spec, x.detach(), num_groups, weight.detach(), bias.detach(), 1e-5
    by_torch = reference.composite(spec, x, num_groups, weight, bias, 1e-5, given)
    assert_no_worse("y", y.detach(), reference.oracle(*problem, given).y, by_torch.detach())
    found, theirs = (torch.autograd.grad(result, drawn, dy) for result in (y, by_torch))
    exact = reference.oracle_gradients(*problem, dy, given)
    for what, got, want, torchs in zip(("dx", "dw", "db"), found, exact, theirs, strict=True):
        # Of a handful of numbers torch's error is chance: of 1 and 2 values to a sum it may be none.
        spread = torchs if want.numel() > 32 else want + (torchs.double() - want).abs().max().clamp(min=_slack(want, got))
        assert_no_worse(what, got, want, spread)


def _slack(want: Tensor, got: Tensor) -> float:
    """Two roundings of the largest of a few numbers."""
    return 2 * float(want.abs().max()) * torch.finfo(got.dtype).eps


@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_shapes(
    spec: ChannelNorm, shape: tuple[int, ...], groups: int, last: bool, dtype: torch.dtype, device: torch.device
) -> None:
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
    drawn, dy = draw((4, 24, 19, 23), torch.bfloat16, torch.float32, True, device)
    runs = []
    for _ in range(3):
        y = norm(spec, drawn[0], groups_of(spec, (4, 24), 4), *drawn[1:])
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


# Running statistics and modules.

PAIRS = [
    (nn.GroupNorm, torch.nn.GroupNorm, (3, 12), (4, 12, 5, 6)),
    (nn.InstanceNorm1d, torch.nn.InstanceNorm1d, (12,), (4, 12, 30)),
    (nn.InstanceNorm2d, torch.nn.InstanceNorm2d, (12,), (4, 12, 5, 6)),
    (nn.InstanceNorm3d, torch.nn.InstanceNorm3d, (12,), (2, 12, 3, 4, 5)),
    (nn.BatchNorm1d, torch.nn.BatchNorm1d, (12,), (9, 12)),
    (nn.BatchNorm1d, torch.nn.BatchNorm1d, (12,), (4, 12, 30)),
    (nn.BatchNorm2d, torch.nn.BatchNorm2d, (12,), (4, 12, 5, 6)),
    (nn.BatchNorm3d, torch.nn.BatchNorm3d, (12,), (2, 12, 3, 4, 5)),
]
KEYWORDS: list[dict[str, Any]] = [
    {},
    dict(momentum=None),
    dict(track_running_stats=True, affine=True, momentum=0.3),
    dict(track_running_stats=False),
    dict(affine=False),
]


@pytest.mark.parametrize(("ours", "theirs", "arguments", "shape"), PAIRS, ids=lambda p: getattr(p, "__name__", str(p)))
@pytest.mark.parametrize("keywords", KEYWORDS, ids=str)
def test_modules(
    ours: Any,
    theirs: Any,
    arguments: tuple[int, ...],
    shape: tuple[int, ...],
    keywords: dict[str, Any],
    device: torch.device,
) -> None:
    """Three steps of training and one of evaluation beside torch's own module, state and all."""
    if theirs is torch.nn.GroupNorm:
        keywords = {name: value for name, value in keywords.items() if name == "affine"}
    if theirs is torch.nn.InstanceNorm1d and keywords.get("momentum", 0) is None:
        keywords = keywords | dict(track_running_stats=True)
    torch.manual_seed(1)
    pair = [kind(*arguments, **keywords).to(device) for kind in (ours, theirs)]
    pair[0].load_state_dict(pair[1].state_dict())
    assert isinstance(pair[0], theirs)
    assert repr(pair[0]) == repr(pair[1])
    for step in range(4):
        if step == 3:
            for module in pair:
                module.eval()
        x = torch.randn(shape, device=device) * 2 + 1
        y, expected = (module(x.clone()) for module in pair)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for (name, got), want in zip(pair[0].state_dict().items(), pair[1].state_dict().values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, msg=name)
    again = copy.deepcopy(pair[0])
    assert torch.equal(again(x), pair[0](x))


def test_running_statistics_of_other_dtypes_and_strides(device: torch.device) -> None:
    x = torch.randn(6, 8, 5, device=device)
    for dtype in (torch.float16, torch.float32, torch.float64):
        ours, theirs = (
            [torch.zeros(16, device=device, dtype=dtype)[::2], torch.ones(16, device=device, dtype=dtype)[::2]]
            for _ in range(2)
        )
        before = ours[0]._version
        y = functional.batch_norm(x, *ours, training=True, momentum=0.25)
        assert ours[0]._version > before
        wide = [t.double() for t in theirs]
        expected = F.batch_norm(x.double(), *wide, training=True, momentum=0.25)
        torch.testing.assert_close(y, expected.float(), rtol=1e-5, atol=1e-5)
        for got, want in zip(ours, wide, strict=True):
            torch.testing.assert_close(got, want.to(dtype))


def test_running_statistics_are_overwritten_by_a_momentum_of_one(device: torch.device) -> None:
    """The first batch's where momentum is None: nothing is left of what stood there."""
    x = torch.randn(6, 8, 5, device=device)
    running = [torch.full((8,), 1e20, device=device) for _ in range(2)]
    functional.batch_norm(x, *running, training=True, momentum=1.0)
    expected = x.mean((0, 2)), x.var((0, 2))
    for got, want in zip(running, expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_given_statistics_that_go_on_running(name: str, device: torch.device) -> None:
    """Between a forward and its backward, which is of what they were."""
    x = torch.randn(3, 4, 5, device=device, requires_grad=True)
    mean, var = torch.zeros(4, device=device), torch.ones(4, device=device)
    y = getattr(functional, name)(x, mean, var, None, None, False)
    getattr(functional, name)(x.detach() * 3, mean, var, None, None, True)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(dx, torch.full_like(dx, 1.00001**-0.5))


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "composite"])
@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_running_statistics_of_another_dtype_by_either_road(
    name: str, kernels: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels:
        device = torch.device("cpu")
        monkeypatch.setattr(road, "INTERPRETED", False)
    x, weight = torch.randn(6, 8, 5, device=device).bfloat16(), torch.ones(8, device=device)
    running = [torch.zeros(8, device=device, dtype=torch.float64), torch.ones(8, device=device, dtype=torch.float64)]
    wide = [t.clone() for t in running]
    y = getattr(functional, name)(x, *running, weight, None, True)
    expected = getattr(F, name)(x.double(), *wide, weight.double(), None, True)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected.bfloat16())
    for got, want in zip(running, wide, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_negative_bits(spec: ChannelNorm, device: torch.device) -> None:
    """A tensor that holds its negative is read as what it says it is."""
    (x, weight, bias), _ = draw((2, 6, 5, 4), torch.float32, torch.float32, False, device)
    groups = groups_of(spec, (2, 6), 2)
    minus = [torch._neg_view(t.detach()) for t in (x, weight, bias)]
    plain = [-t.detach() for t in (x, weight, bias)]
    assert torch.equal(norm(spec, minus[0], groups, *minus[1:]), norm(spec, plain[0], groups, *plain[1:]))
    if spec is not GROUP_NORM:
        given = Given(torch.rand(6, device=device), -torch.rand(6, device=device) - 0.5)
        seen = Given(given.mean, torch._neg_view(given.var))
        assert torch.equal(
            norm(spec, x, groups, None, None, seen), norm(spec, x, groups, None, None, Given(given.mean, -given.var))
        )


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize(("shape", "groups"), [((9, 12, 7, 7), 4), ((2, 6, 70, 61), 3), ((130, 16), 4)], ids=str)
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
    monkeypatch.setattr(tuning, "_WALKING", 0.1 / describe(device).multiprocessors)
    monkeypatch.setattr(tuning, "_WALK", (256, 4))
    tuning.choose_walk.cache_clear()
    tuning._tile.cache_clear()
    walked: list[Any] = []
    actual = channels.choose_walk
    monkeypatch.setattr(channels, "choose_walk", lambda *a: (walked.append((actual(*a), a)), walked[-1][0])[1])
    try:
        drawn, dy = draw(shape, torch.float32, torch.float32, last, device)
        check(spec, groups_of(spec, shape, groups), drawn, dy)
    finally:
        tuning.choose_walk.cache_clear()
    if spec.over_samples or math.prod(shape[2:]) > 256:
        assert any(plan.samples > 1 or plan.slab > plan.tile.chunk for plan, _ in walked)


# Derivatives of derivatives, and what looks inside.


@pytest.mark.filterwarnings("ignore:trinorm:UserWarning")
def test_derivatives(spec: ChannelNorm, device: torch.device) -> None:
    shape = (2, 4, 3)
    groups = groups_of(spec, shape, 2)
    drawn, _ = draw(shape, torch.float64, torch.float64, False, device)
    given = (
        None if spec is GROUP_NORM else Given(*(torch.rand(4, device=device, dtype=torch.float64) + 0.5 for _ in range(2)))
    )
    for statistics in {None, given}:
        torch.autograd.gradcheck(lambda *t, s=statistics: norm(spec, t[0], groups, *t[1:], s), drawn)
        torch.autograd.gradgradcheck(lambda *t, s=statistics: norm(spec, t[0], groups, *t[1:], s), drawn)
    expected = torch.autograd.grad(norm(spec, drawn[0], groups, *drawn[1:]).sin().sum(), drawn)
    batched = torch.randn(3, *shape, device=device, dtype=torch.float64)
    y = norm(spec, drawn[0], groups, *drawn[1:])
    at_once = torch.autograd.grad(y, drawn, batched, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(y, drawn, dy, retain_graph=True) for dy in batched]
    for got, *want in zip(at_once, *one_by_one, strict=True):
        torch.testing.assert_close(got, torch.stack(want))
    by_func = torch.func.grad(lambda *t: norm(spec, t[0], groups, *t[1:]).sin().sum(), (0, 1, 2))(*drawn)
    for got, want in zip(by_func, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_compiled(spec: ChannelNorm, device: torch.device) -> None:
    torch._dynamo.reset()
    shape = (2, 12, 5, 6)
    groups = groups_of(spec, shape, 4)
    drawn, dy = draw(shape, torch.float32, torch.float32, True, device)
    run = torch.compile(lambda *t: norm(spec, t[0], groups, *t[1:]), backend="aot_eager", fullgraph=True)
    found, expected = (
        [y, *torch.autograd.grad(y, drawn, dy)] for y in (run(*drawn), norm(spec, drawn[0], groups, *drawn[1:]))
    )
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# Bad input.


def test_bad_input(device: torch.device) -> None:
    x = torch.ones(2, 6, 4, device=device)
    w = torch.ones(6, device=device)
    bad: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (RuntimeError, "num_groups is 4, but input has 6 channels", lambda: functional.group_norm(x, 4)),
        (RuntimeError, "num_groups is 0", lambda: functional.group_norm(x, 0)),
        (TypeError, "num_groups must be an int", lambda: functional.group_norm(x, 2.0)),  # type: ignore[arg-type]
        (RuntimeError, r"input has shape \(6,\)", lambda: functional.group_norm(w, 2)),
        (RuntimeError, r"weight has shape \(3,\)", lambda: functional.group_norm(x, 2, w[:3])),
        (RuntimeError, "weight is on meta", lambda: functional.group_norm(x, 2, w.to("meta"))),
        (NotImplementedError, "input has dtype torch.int64", lambda: functional.group_norm(x.long(), 2)),
        (NotImplementedError, "bias has dtype torch.int64", lambda: functional.group_norm(x, 2, w, w.long())),
        (ValueError, "eps is nan", lambda: functional.group_norm(x, 2, eps=math.nan)),
        (ValueError, "eps is -1", lambda: functional.batch_norm(x, None, None, training=True, eps=-1)),
        (TypeError, "eps must be a float", lambda: functional.group_norm(x, 2, eps="a")),  # type: ignore[arg-type]
        (TypeError, "input must be a Tensor", lambda: functional.group_norm([1.0], 1)),  # type: ignore[arg-type]
        (ValueError, "more than 1 value per group", lambda: functional.group_norm(x[:1, :1, :1], 1)),
        (
            ValueError,
            "more than 1 value per channel",
            lambda: functional.batch_norm(x[:1, :, :1], None, None, training=True),
        ),
        (ValueError, "more than 1 spatial element", lambda: functional.instance_norm(x[..., :1])),
        (RuntimeError, "running_mean is None", lambda: functional.batch_norm(x, None, w)),
        (ValueError, "running_var is None", lambda: functional.batch_norm(x, w, None, training=True)),
        (RuntimeError, "running_mean requires a gradient", lambda: functional.batch_norm(x, w.clone().requires_grad_(), w)),
        (RuntimeError, "running_mean has shape", lambda: functional.batch_norm(x, w[:2], w)),
        (TypeError, "momentum must be a float", lambda: functional.batch_norm(x, w, w, training=True, momentum="a")),  # type: ignore[arg-type]
    ]
    for error, message, call in bad:
        with pytest.raises(error, match=message):
            call()
    assert torch.equal(w, torch.ones_like(w)), "nothing half written"


def test_by_torch_where_kernels_do_not_serve(spec: ChannelNorm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(road, "INTERPRETED", False)
    drawn, dy = draw((3, 12, 5, 6), torch.float32, torch.float32, True, torch.device("cpu"))
    check(spec, groups_of(spec, (3, 12), 4), drawn, dy)
    if spec is not GROUP_NORM:
        kept, theirs = ([torch.zeros(12), torch.ones(12)] for _ in range(2))
        f = getattr(functional, spec.name), getattr(F, spec.name)
        for g, running in zip(f, (kept, theirs), strict=True):
            g(drawn[0].detach(), *running, None, None, True)
        assert all(torch.equal(a, b) for a, b in zip(kept, theirs, strict=True))
