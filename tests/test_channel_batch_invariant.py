"""batch_invariant of the channel norms: what becomes of a sample does not depend on how many are beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import trinorm
from machine import ON_GPU
from paths import forget_channel_choices
from test_channel_layer import forget_choices
from test_channels import groups_of, norm
from trinorm import functional, nn
from trinorm.launch import describe
from trinorm.ops import channel
from trinorm.ops.hosts import channel_layers, channels, rows
from trinorm.reference.channel import Given
from trinorm.spec import BATCH_NORM, CHANNEL_LAYER_NORM, GROUP_NORM, INSTANCE_NORM, ChannelNorm
from trinorm.tuning import channel as tuning

# The interpreter takes a millisecond and more for each program: there, fewer samples beside fewer.
COUNTS = (1, 2, 5) if ON_GPU else (1, 3)
# Held by programs and read again by them. On a GPU also by teams, of groups too large for those, and of 96 KB of channels.
# Without batch_invariant all of them, but some of LayerNorm over channels, would have another launch for one sample.
SHAPES = [
    (64 if ON_GPU else 32, 32, 7, 7),
    (16 if ON_GPU else 8, 64, 33),
    (40 if ON_GPU else 20, 3, 50),
    (8, 8, 64, 64) if ON_GPU else (5, 4, 64, 64),
    *([(40, 320, 64, 64), (12, 32, 700, 701), (40, 24576, 5)] if ON_GPU else ()),
]


@pytest.fixture(params=[GROUP_NORM, INSTANCE_NORM, CHANNEL_LAYER_NORM], ids=lambda spec: spec.name)
def spec(request: pytest.FixtureRequest) -> ChannelNorm:
    return request.param


@pytest.fixture(params=[False, True], ids=["first", "last"])
def last(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture
def read_twice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is held, by a device so small that another sample is another share of each."""
    monkeypatch.setattr(channels, "choose_whole", lambda *_: None)
    for table in (tuning._SUMS, tuning._APPLY):
        for key, (_, warps, stages, _) in table.items():
            monkeypatch.setitem(table, key, (256, warps, stages, 48 / describe(torch.device("cpu")).multiprocessors))
    for tensors, (elements, run, _, *threads) in tuning._LAYER.items():
        monkeypatch.setitem(tuning._LAYER, tensors, (elements, run, 0, *threads))
    forget_channel_choices()
    forget_choices()
    yield
    forget_channel_choices()
    forget_choices()


def draw(shape: tuple[int, ...], dtype: torch.dtype, last: bool, device: torch.device) -> list[Tensor]:
    """x, dy and a residual; weight and bias."""
    found = [torch.randn(shape).to(device, dtype) for _ in range(3)]
    if last:
        found = [t.movedim(1, -1).contiguous().movedim(-1, 1) for t in found]
    return [*found, *(torch.randn(shape[1]).to(device, dtype) for _ in range(2))]


def groups(spec: ChannelNorm, channels: int) -> int:
    return groups_of(spec, (1, channels), 4 if channels % 4 == 0 else 3)


def bits(spec: ChannelNorm, drawn: list[Tensor], count: int, style: list[Tensor], **how: Any) -> list[Tensor]:
    """y and dx of so many samples. style: scale and shift, or nothing; a residual is added where something follows it."""
    x, dy, residual, weight, bias = (t[:count] if t.dim() > 1 else t for t in drawn)
    x = x.detach().requires_grad_()
    how |= dict(zip(("scale", "shift"), (t[:count] for t in style), strict=False))
    if "activation" in how:
        how["residual"] = residual.detach().requires_grad_()
    y = norm(spec, x, groups(spec, x.shape[1]), weight.requires_grad_(), bias.requires_grad_(), **how)
    return [y.detach(), *torch.autograd.grad(y, [x, weight, *([how["residual"]] if "residual" in how else [])], dy)]


def are_of_all(spec: ChannelNorm, drawn: list[Tensor], counts: tuple[int, ...] = COUNTS, *rest: Any, **how: Any) -> bool:
    """Whether y, dx and dr of some samples are those of all: their beginning. (dw, asked for too, is of all samples.)"""
    style = [torch.randn(drawn[0].shape[:2]).to(drawn[0]) for _ in range(2)] if "style" in rest else []
    most = bits(spec, drawn, len(drawn[0]), style, **how)
    for count in counts:
        few = bits(spec, drawn, count, style, **how)
        if not all(torch.equal(few[i], most[i][:count]) for i in range(len(few)) if i != 2):
            return False
    return True


@pytest.mark.parametrize("dtype", [torch.float32, *([torch.bfloat16] if ON_GPU else ())], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_samples_bits(
    spec: ChannelNorm, shape: tuple[int, ...], dtype: torch.dtype, last: bool, device: torch.device
) -> None:
    assert are_of_all(spec, draw(shape, dtype, last, device), batch_invariant=True)


@pytest.mark.parametrize(
    ("base", "shape"), [(GROUP_NORM, (40, 3, 50)), (CHANNEL_LAYER_NORM, (8 if ON_GPU else 4, 32, 64, 64))]
)
def test_without_it_they_differ(base: ChannelNorm, shape: tuple[int, ...], device: torch.device) -> None:
    assert not are_of_all(base, draw(shape, torch.float32, False, device))


@pytest.mark.parametrize("shape", [(8 if ON_GPU else 4, 6, 9, 31), (16 if ON_GPU else 8, 24, 5, 5)], ids=str)
def test_read_twice(spec: ChannelNorm, shape: tuple[int, ...], last: bool, read_twice: None, device: torch.device) -> None:
    drawn = draw(shape, torch.float32, last, device)
    assert are_of_all(spec, drawn, batch_invariant=True)
    if not spec.of_positions and shape[-1] == 31:
        assert not are_of_all(spec, drawn)


@pytest.mark.parametrize("twice", [False, True], ids=["held", "read twice"])
@pytest.mark.parametrize("style", [(), ("style",)], ids=["", "style"])
@pytest.mark.parametrize("base", [GROUP_NORM, INSTANCE_NORM], ids=lambda spec: spec.name)
def test_with_what_is_fused(
    base: ChannelNorm, style: tuple[str, ...], twice: bool, last: bool, request: pytest.FixtureRequest, device: torch.device
) -> None:
    if twice:
        request.getfixturevalue("read_twice")
    drawn = draw((16 if ON_GPU else 8, 6, 5, 7), torch.float32, last, device)
    assert are_of_all(base, drawn, COUNTS, *style, activation="gelu", batch_invariant=True)


@pytest.mark.parametrize("base", [INSTANCE_NORM, BATCH_NORM], ids=lambda spec: spec.name)
@pytest.mark.parametrize("how", [{}, dict(activation="silu")], ids=["", "with residual and activation"])
@pytest.mark.parametrize("dtype", [torch.float32, *([torch.bfloat16] if ON_GPU else ())], ids=str)
def test_of_given_statistics(
    base: ChannelNorm, how: dict[str, Any], dtype: torch.dtype, last: bool, device: torch.device
) -> None:
    """Of BatchNorm, which has no such argument, too: each element is by itself."""
    drawn = draw((40, 6, 5, 7), dtype, last, device)
    given = Given(torch.randn(6, device=device), torch.rand(6, device=device) + 0.5)
    asked = {} if base is BATCH_NORM else dict(batch_invariant=True)
    assert are_of_all(base, drawn, given=given, **how, **asked)


# One way to ask for it, or not to.
Way = Callable[[ChannelNorm, Tensor, Tensor, Tensor], Tensor]


def not_asked(spec: ChannelNorm, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return norm(spec, x, groups(spec, x.shape[1]), weight, bias)


def by_argument(spec: ChannelNorm, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return norm(spec, x, groups(spec, x.shape[1]), weight, bias, batch_invariant=True)


def by_option(spec: ChannelNorm, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with trinorm.options(batch_invariant=True):
        return not_asked(spec, x, weight, bias)


def by_module(spec: ChannelNorm, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    channels = x.shape[1]
    module: Any = {
        GROUP_NORM: lambda: nn.GroupNorm(groups(spec, channels), channels),
        INSTANCE_NORM: lambda: nn.InstanceNorm2d(channels, affine=True),
        CHANNEL_LAYER_NORM: lambda: nn.ChannelLayerNorm(channels),
    }[spec]()
    assert "batch_invariant" not in repr(module)
    module.batch_invariant = True
    assert repr(module).endswith(", batch_invariant=True)")
    return torch.func.functional_call(module.to(x.device, x.dtype), dict(weight=weight, bias=bias), (x,))


def by_op(spec: ChannelNorm, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if spec.of_positions:
        return torch.ops.trinorm.channel_layer_norm(x, weight, bias, 1e-6, True)[0]
    of_groups = groups(spec, x.shape[1]), weight, bias, None, 1e-5, None, True
    return torch.ops.trinorm.group_norm(x, *of_groups)[0]


def compiled(spec: ChannelNorm, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.compile(by_argument, backend="aot_eager", fullgraph=True)(spec, x, weight, bias)


def compiled_by_option(spec: ChannelNorm, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with trinorm.options(batch_invariant=True):
        return torch.compile(not_asked, backend="aot_eager", fullgraph=True)(spec, x, weight, bias)


def launches(f: Way, spec: ChannelNorm, last: bool, device: torch.device) -> list[list[tuple[str, Any]]]:
    """For each number of samples, the kernels of a forward and of dx, with all that they are compiled for.

    Without a GPU they are not run: the interpreter would take long, and what they compute is not looked at.
    """
    # Of channels last LayerNorm's launch turns where rows are fewer than in the others' images.
    shape = (64, 4, 4) if spec.of_positions and last else (64, 32, 32)
    found = []
    for count in (*COUNTS, 40, 300):
        x, dy = (torch.empty(count, *shape, dtype=torch.bfloat16, device=device) for _ in range(2))
        if last:
            x, dy = (t.to(memory_format=torch.channels_last) for t in (x, dy))
        weight = torch.ones(shape[0], dtype=torch.bfloat16, device=device)
        launched: list[tuple[str, Any]] = []
        with pytest.MonkeyPatch.context() as patch:
            for module in (channels, channel_layers, rows):
                actual = module.launch if ON_GPU else lambda *_: None
                patch.setattr(
                    module,
                    "launch",
                    lambda k, *a, to=launched, run=actual: (to.append((k.__name__, a[-1])), run(k, *a))[1],
                )
            y = f(spec, x.requires_grad_(), weight, weight.clone())
            torch.autograd.grad(y, x, dy)
        found.append(launched)
    return found


WAYS = [by_argument, by_option, by_module, by_op, compiled, compiled_by_option]


@pytest.mark.parametrize("f", WAYS)
def test_one_launch_for_any_number_of_samples(f: Way, spec: ChannelNorm, last: bool, device: torch.device) -> None:
    if f is by_op and spec.of_positions and last:
        pytest.skip("the op has channels first")
    torch._dynamo.reset()
    first, *others = launches(f, spec, last, device)
    assert first
    assert all(other == first for other in others)


def test_without_it_launches_differ(spec: ChannelNorm, last: bool, device: torch.device) -> None:
    first, *others = launches(not_asked, spec, last, device)
    assert any(other != first for other in others)


@pytest.mark.parametrize(("runs", "s", "kind"), [(8, 256, "Held"), (10, 2048, "Whole"), (10, 4096, "Split")])
def test_of_many_statistics(runs: int, s: int, kind: str) -> None:
    """The launch for any number is that of many, but where a program alone would take long with what no team has."""
    device = replace(describe(torch.device("cpu")), programs_wait=True)
    plan = tuning.choose_whole(None, runs, s, 2, 1, False, True, device)
    assert type(plan).__name__ == f"Channel{kind}"
    assert plan == tuning.choose_whole(1 << 16, runs, s, 2, 1, False, True, device)
    large = 10, 1 << 18, 2, 1, False, True, device
    assert tuning.choose_whole(1 << 16, *large) is not None
    assert tuning.choose_whole(None, *large) is None


@pytest.mark.parametrize("choose", [tuning.choose_layer_forward, tuning.choose_layer_backward])
@pytest.mark.parametrize("c", [3, 96, 1 << 15])
def test_of_many_positions(choose: Callable[..., object], c: int) -> None:
    device = describe(torch.device("cpu"))
    assert choose(None, c, 16, 2, device) == choose(1 << 20, c, 16, 2, device)


@pytest.mark.parametrize("base", [GROUP_NORM, CHANNEL_LAYER_NORM], ids=lambda spec: spec.name)
def test_calls_of_one_shape_are_told_apart(base: ChannelNorm, device: torch.device) -> None:
    """Each kind of call thrice in turn, so that each is recalled among the others."""
    shape, of_groups = (1, 8, 32, 33), (4,) if base is GROUP_NORM else ()
    x, dy, _, weight, bias = draw(shape, torch.float32, False, device)
    op, backward = (getattr(torch.ops.trinorm, f"{base.name}{name}") for name in ("", "_backward"))
    middle = (None, 1e-5, None) if of_groups else (1e-5,)  # residual, eps, activation
    _, mean, rstd = op(x, *of_groups, weight, bias, *middle, False)
    parameters, activation = ((weight, None, None), (None,)) if of_groups else ((weight,), ())
    saved = *parameters, mean, rstd, 1e-5, *activation
    channel.CALLS.clear()
    calls: dict[str, Callable[[bool], object]] = {
        "eager": lambda invariant: norm(base, x, 4, weight, bias, batch_invariant=invariant),
        "op": lambda invariant: op(x, *of_groups, weight, bias, *middle, invariant),
        "backward": lambda invariant: backward(
            dy, x, *of_groups, *saved, invariant, True, False, None, *([False] if of_groups else [])
        ),
    }
    launched: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        for module in (channels, channel_layers):
            actual = module.launch
            patch.setattr(
                module, "launch", lambda k, *a, run=actual: (launched.append((k.__name__, str(a[-1]))), run(k, *a))[1]
            )
        found: dict[tuple[str, bool], list[Any]] = {}
        for _ in range(3):
            for name, call in calls.items():
                for invariant in (False, True):
                    launched.clear()
                    call(invariant)
                    found.setdefault((name, invariant), []).append(tuple(launched))
    assert all(len(set(kernels)) == 1 for kernels in found.values())
    assert all(found[name, False] != found[name, True] for name in calls)


def test_a_remembered_call_is_not_what_the_options_say_no_more(spec: ChannelNorm, device: torch.device) -> None:
    with torch.no_grad():
        x = torch.ones(1, 64, 32, 32, dtype=torch.bfloat16, device=device)
        for _ in range(3):
            not_asked(spec, x, x[0, :, 0, 0].clone(), x[0, :, 0, 1].clone())
    assert launches(by_option, spec, False, device) == launches(by_argument, spec, False, device)


def test_compiled_it_has_an_eager_calls_bits(spec: ChannelNorm, last: bool, device: torch.device) -> None:
    """Also where Inductor is to have torch's operators, which promise nothing."""
    torch._dynamo.reset()
    x, dy, _, weight, bias = draw((5, 12, 7, 6), torch.float32, last, device)
    x.requires_grad_()
    y = by_argument(spec, x, weight, bias)
    (dx,) = torch.autograd.grad(y, x, dy)
    run = torch.compile(by_argument, backend="aot_eager", fullgraph=True, dynamic=True)
    with trinorm.options(inductor_fuses=True):
        for count in (5, 2):
            part = x[:count].detach().requires_grad_()
            again = run(spec, part, weight, bias)
            assert torch.equal(again, y[:count])
            assert torch.equal(torch.autograd.grad(again, part, dy[:count])[0], dx[:count])


def test_what_is_no_switch_is_refused(spec: ChannelNorm, device: torch.device) -> None:
    """Also where it is equal to one by which a call is recalled."""
    x = torch.randn(2, 4, 3, device=device)
    for _ in range(2):
        norm(spec, x, 2, None, None, batch_invariant=True)
    with pytest.raises(TypeError, match=rf"{spec.name}\(\): batch_invariant must be True, False or None, not 1"):
        norm(spec, x, 2, None, None, batch_invariant=1)


def test_it_is_what_it_is_without(spec: ChannelNorm, device: torch.device) -> None:
    """To rounding: another launch sums in another order."""
    x, *_, weight, bias = draw((2, 8, 9, 10), torch.float32, False, device)
    torch.testing.assert_close(by_argument(spec, x, weight, bias), not_asked(spec, x, weight, bias))


def test_functions_see_it(spec: ChannelNorm, device: torch.device) -> None:
    """A TorchFunctionMode is told of it."""
    seen: list[Any] = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (functional.group_norm, functional.instance_norm, functional.channel_layer_norm):
                seen.append((kwargs or {}).get("batch_invariant"))
            return func(*args, **(kwargs or {}))

    with Mode():
        norm(spec, torch.randn(2, 4, 3, device=device), 2, None, None, batch_invariant=True)
    assert seen == [True]
