"""The channel norms in torch: running statistics, modules, derivatives of derivatives, what looks inside, bad input."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from machine import ON_GPU
from test_channels import check, draw, groups_of, norm
from trinorm import functional, nn
from trinorm.ops import channel, road
from trinorm.reference import channel as reference
from trinorm.reference.channel import Given
from trinorm.spec import CHANNEL_NORMS, GROUP_NORM, ChannelNorm


@pytest.fixture(params=CHANNEL_NORMS, ids=lambda spec: spec.name)
def spec(request: pytest.FixtureRequest) -> ChannelNorm:
    return request.param


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


# Derivatives of derivatives, and what looks inside.


@pytest.mark.filterwarnings("ignore:trinorm:UserWarning")
def test_derivatives(spec: ChannelNorm, device: torch.device) -> None:
    shape = (2, 4, 2)
    groups = groups_of(spec, shape, 2)
    drawn, _ = draw(shape, torch.float64, torch.float64, False, device)
    given = (
        None if spec is GROUP_NORM else Given(*(torch.rand(4, device=device, dtype=torch.float64) + 0.5 for _ in range(2)))
    )
    # The activations' own second derivatives do not depend on the norm before them.
    for statistics, activation in ((None, None), (None, "silu") if given is None else (given, "gelu")):

        def run(*t: torch.Tensor, s: Given | None = statistics, f: Any = activation) -> torch.Tensor:
            return norm(spec, t[0], groups, *t[1:3], s, activation=f, residual=t[3])

        residual = torch.randn_like(drawn[0]).requires_grad_()
        torch.autograd.gradcheck(run, [*drawn, residual], fast_mode=not ON_GPU)
        torch.autograd.gradgradcheck(run, [*drawn, residual], fast_mode=not ON_GPU)
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


def test_saved_tensors_come_back_strided(spec: ChannelNorm, device: torch.device) -> None:
    drawn, dy = draw((3, 12, 5, 6), torch.float32, torch.float32, False, device)
    groups = groups_of(spec, (3, 12), 4)
    expected = torch.autograd.grad(norm(spec, drawn[0], groups, *drawn[1:], activation="silu"), drawn, dy)
    for _ in range(2):  # the second time as it was recorded, if it was
        with torch.autograd.graph.saved_tensors_hooks(lambda t: torch.stack([t, t], -1)[..., 0], lambda t: t):
            y = norm(spec, drawn[0], groups, *drawn[1:], activation="silu")
        for got, want in zip(torch.autograd.grad(y, drawn, dy), expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("fill", [2e36, -2e36, 3.3e9])
def test_constant_channels_of_large_values(spec: ChannelNorm, fill: float, by: str, device: torch.device) -> None:
    """What lies outside a ragged tile has an infinite x̂, which nothing finite may meet."""
    x = torch.full((4, 8, 7), fill, device=device)
    x[:, ::2] = torch.randn(4, 4, 7, device=device)
    x.requires_grad_()
    y = norm(spec, x, groups_of(spec, x.shape, 8), None, None)
    assert not y[:, 1::2].any()
    assert all(g.isfinite().all() for g in (y, *torch.autograd.grad(y, x, torch.randn_like(x))))


def test_relu_passes_on_a_gradient_at_nan(spec: ChannelNorm, device: torch.device) -> None:
    x, residual = torch.randn(2, 2, 4, 5, 6, device=device)
    residual[0, 1, 2, 3] = math.nan
    residual.requires_grad_()
    y = norm(spec, x, groups_of(spec, x.shape, 2), None, None, activation="relu", residual=residual)
    (got,) = torch.autograd.grad(y, residual, torch.ones_like(y))
    (want,) = torch.autograd.grad(F.relu(residual + 0), residual, torch.ones_like(y))
    assert got[0, 1, 2, 3] == want[0, 1, 2, 3] == 1


def test_torchs_own_faults_do_not_come_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of CPU operators: the gradient of one sample in another order, a bias alone, channels-last x that wants none."""
    monkeypatch.setattr(road, "INTERPRETED", False)
    x, dy = torch.randn(2, 1, 4, 5, 6)
    last = dict(memory_format=torch.channels_last)
    of_x = x.clone().requires_grad_()
    plain, turned = (torch.autograd.grad(functional.instance_norm(of_x), of_x, t)[0] for t in (dy, dy.contiguous(**last)))
    assert torch.equal(plain, turned)
    bias = torch.zeros(4, requires_grad=True)
    for t in (x, x.contiguous(**last)):
        y = functional.group_norm(t, 2, None, bias)
        assert y.stride() == t.stride()
        torch.testing.assert_close(torch.autograd.grad(y, bias, dy)[0], dy.sum((0, 2, 3)))


def test_a_momentum_of_one_call_is_not_kept(device: torch.device) -> None:
    bn = nn.BatchNorm2d(4, momentum=None).to(device)
    for _ in range(5):
        bn(torch.randn(2, 4, 3, 3, device=device))
    assert len(channel.CALLS._kept) == 0


@pytest.mark.parametrize("first", [False, True], ids=["no_grad first", "grad first"])
def test_calls_with_grad_and_under_no_grad_are_kept_apart(spec: ChannelNorm, first: bool, device: torch.device) -> None:
    """Each is recalled among the others, and what no gradient was asked of is not given to who asks for one."""
    drawn, dy = draw((2, 12, 5, 6), torch.float32, torch.float32, False, device)
    groups = groups_of(spec, (2, 12), 4)
    problem = spec, drawn[0].detach(), groups, drawn[1].detach(), drawn[2].detach(), 1e-5
    exact = reference.oracle_gradients(*problem, dy)
    for turn, grad in enumerate((first, not first) * 3, 1):
        with torch.set_grad_enabled(grad):
            y = norm(spec, drawn[0], groups, *drawn[1:])
        assert y.requires_grad == grad
        for got, want in zip(torch.autograd.grad(y, drawn, dy), exact, strict=False) if grad else ():
            torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-5)
        assert len(channel.CALLS._kept) == min(turn, 2)


def test_folded_into_a_convolution(device: torch.device) -> None:
    """By torch's own utility, which takes our module for what it is a subclass of."""
    conv, norm_ = torch.nn.Conv2d(3, 8, 3).to(device).eval(), nn.BatchNorm2d(8).to(device)
    norm_(torch.randn(4, 8, 5, 5, device=device) + 2)
    x = torch.randn(2, 3, 9, 9, device=device)
    folded = torch.nn.utils.fuse_conv_bn_eval(conv, norm_.eval())
    torch.testing.assert_close(folded(x), norm_(conv(x)), rtol=1e-4, atol=1e-4)


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
        (TypeError, "num_groups must be an int", lambda: functional.group_norm(x, True)),
        (RuntimeError, "running_var is one number", lambda: functional.batch_norm(x, w, w[:1].expand(6), training=True)),
        (RuntimeError, "running_mean has shape", lambda: functional.batch_norm(x, w[:2], w)),
        (ValueError, "activation is 'tanh'", lambda: functional.group_norm(x, 2, activation="tanh")),  # type: ignore[arg-type]
        (
            RuntimeError,
            r"residual is torch.float32 of shape \(1, 6, 4\)",
            lambda: functional.group_norm(x, 2, residual=x[:1]),
        ),
        (RuntimeError, "residual is torch.float64", lambda: functional.batch_norm(x, w, w, residual=x.double())),
        (RuntimeError, "residual is on meta", lambda: functional.instance_norm(x, residual=x.to("meta"))),
        (TypeError, "residual must be a Tensor", lambda: functional.group_norm(x, 2, residual=2.0)),  # type: ignore[arg-type]
        (RuntimeError, r"scale has shape \(6,\)", lambda: functional.group_norm(x, 2, scale=w)),
        (RuntimeError, r"shift has shape \(2, 6, 4\)", lambda: functional.group_norm(x, 2, shift=x)),
        (RuntimeError, "shift is on meta", lambda: functional.instance_norm(x, shift=x[..., 0].to("meta"))),
        (TypeError, "scale must be a Tensor", lambda: functional.group_norm(x, 2, scale=2.0)),  # type: ignore[arg-type]
        (NotImplementedError, "scale has dtype", lambda: functional.group_norm(x, 2, scale=x[..., 0].long())),
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


def test_a_modules_mode_that_is_no_bool(device: torch.device) -> None:
    """As torch's module takes it, whose function does not."""
    ours, theirs, x = nn.BatchNorm1d(4).to(device), torch.nn.BatchNorm1d(4).to(device), torch.randn(5, 4, device=device)
    ours.training = theirs.training = 1  # type: ignore[assignment]
    torch.testing.assert_close(ours(x), theirs(x))
