"""LayerNorm over channels at each position: values, gradients, memory orders, and what torch asks of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from trinorm import functional, nn, reference
from trinorm.compare import assert_no_worse
from trinorm.functional import channel_layer_norm
from trinorm.launch import describe
from trinorm.ops import road
from trinorm.ops.hosts import channel_layers, rows
from trinorm.spec import LAYER_NORM
from trinorm.tuning import channel as tuning

ON_GPU = torch.cuda.is_available()
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Single channels and positions, primes, ragged chunks, samples that share a tile, one to three dims of positions.
SHAPES = [
    (2, 1, 7),
    (5, 64),
    (3, 13, 1, 1),
    (2, 3, 16, 24),
    (7, 64, 4, 4),
    (3, 96, 7, 7),
    (2, 257, 13) if ON_GPU else (1, 257, 5),
    (1, 768, 2, 3, 4) if ON_GPU else (1, 768, 2, 3),
    (2, 1500, 4) if ON_GPU else (1, 1500, 3),
    *(
        [(16, 96, 56, 56), (32, 768, 7, 7), (8, 257, 97, 3), (2, 256, 64, 64), (1, 30, 700, 102), (4, 1500, 14, 14)]
        if ON_GPU
        else ()
    ),
]


def drawn_for(
    shape: tuple[int, ...], dtype: torch.dtype, of_weight: torch.dtype, device: torch.device, last: bool = False
) -> tuple[list[Tensor], Tensor]:
    """x, weight and bias, which want gradients; dy."""
    x, dy = (torch.randn(shape).to(device, dtype) + shift for shift in (0.5, 0.0))
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
    weight, bias = (torch.randn(shape[1]).to(device, of_weight) for _ in range(2))
    return [t.requires_grad_() for t in (x, weight, bias)], dy


def composite(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-6) -> Tensor:
    return reference.composite(LAYER_NORM, x.movedim(1, -1), x.shape[1:2], weight, bias, eps).movedim(-1, 1)


def check(drawn: list[Tensor], dy: Tensor) -> None:
    """Value and gradients no further from float64 than twice torch's own."""
    x, weight, bias = drawn
    y, by_torch = channel_layer_norm(*drawn), composite(*drawn)
    assert y.dtype == x.dtype and y.shape == x.shape
    plain = x.detach().movedim(1, -1), x.shape[1:2], weight.detach(), bias.detach(), 1e-6
    exact = reference.oracle(LAYER_NORM, *plain).y.reshape(plain[0].shape).movedim(-1, 1)
    assert_no_worse("y", y.detach(), exact, by_torch.detach())
    found, theirs = (torch.autograd.grad(result, drawn, dy) for result in (y, by_torch))
    gradients = reference.oracle_gradients(LAYER_NORM, *plain, dy.movedim(1, -1))
    assert gradients.dx is not None
    for what, got, want, torchs in zip(
        ("dx", "dw", "db"), found, (gradients.dx.movedim(-1, 1), *gradients[1:]), theirs, strict=True
    ):
        assert want is not None
        # Of a handful of numbers torch's error is chance, and may be none.
        slack = 2 * float(want.abs().max()) * torch.finfo(got.dtype).eps
        few = want + (torchs.double() - want).abs().max().clamp(min=slack)
        assert_no_worse(what, got, want, torchs if want.numel() > 256 else few)


def forget_choices() -> None:
    for choose in (tuning.choose_layer_forward, tuning.choose_layer_backward):
        choose.cache_clear()


@pytest.fixture(params=["held", "streamed"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Programs that hold all channels, and, whatever the size, programs that read them twice."""
    if request.param == "streamed":
        for tensors, (elements, run, _, *threads) in tuning._LAYER.items():
            monkeypatch.setitem(tuning._LAYER, tensors, (elements, run, 0, *threads))
    forget_choices()
    yield request.param
    forget_choices()


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that a test launches."""
    names: list[str] = []
    for module in (channel_layers, rows):
        actual = module.launch
        monkeypatch.setattr(
            module, "launch", lambda kernel, *a, actual=actual: (names.append(kernel.fn.__name__), actual(kernel, *a))[1]
        )
    return names


# Values and gradients.


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, *([torch.bfloat16] if ON_GPU else ())], ids=str)
def test_shapes(shape: tuple[int, ...], last: bool, dtype: torch.dtype, device: torch.device) -> None:
    drawn, dy = drawn_for(shape, dtype, dtype, device, last)
    check(drawn, dy)
    x = drawn[0]
    y = channel_layer_norm(x)
    for t in (y, *torch.autograd.grad(y, x, dy)):
        assert all(a == b for a, b, size in zip(t.stride(), x.stride(), x.shape, strict=True) if size > 1)


@pytest.mark.parametrize("shape", [(2, 300, 8), *([(3, 96, 7, 7), (4, 1500, 14, 14)] if ON_GPU else ())], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_either_way(shape: tuple[int, ...], dtype: torch.dtype, by: str, kernels: list[str], device: torch.device) -> None:
    drawn, dy = drawn_for(shape, dtype, dtype, device)
    check(drawn, dy)
    held = ["channel_layer_forward", "channel_layer_backward", "sum_partials"]
    streamed = ["channel_layer_forward_streamed", "channel_layer_moments", "channel_layer_apply", "sum_partials"]
    assert kernels == (held if by == "held" else streamed)


@pytest.mark.parametrize("dtypes", [*itertools.product(FLOATS, [torch.bfloat16, torch.float32, torch.float64])], ids=str)
def test_dtypes(dtypes: tuple[torch.dtype, torch.dtype], device: torch.device) -> None:
    check(*drawn_for((2, 40, 4, 6), *dtypes, device))


@pytest.mark.parametrize("shape", [(5, 6, 64), (3, 40, 7, 11) if ON_GPU else (2, 20, 3, 5)], ids=str)
def test_programs_that_walk(
    shape: tuple[int, ...], by: str, kernels: list[str], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a device so small that a program takes several tiles."""
    small = replace(describe(device), multiprocessors=1)
    for module in (channel_layers, rows):
        monkeypatch.setattr(module, "describe", lambda _: small)
    for tensors, (_, run, most, _, of_chunk) in tuning._LAYER.items():
        monkeypatch.setitem(tuning._LAYER, tensors, (1, run, most, 1, of_chunk))
    monkeypatch.setattr(tuning, "_LAYER_WARPS", 2)
    monkeypatch.setattr(tuning, "_LAYER_STREAMED", (2048, 4, 3, 1))
    actual, walked = channel_layers.choose_layer_backward, []
    monkeypatch.setattr(
        channel_layers, "choose_layer_backward", lambda *a: (walked.append((a, actual(*a))), walked[-1][1])[1]
    )
    check(*drawn_for(shape, torch.float32, torch.float32, device))
    ((m, c, *_), plan), *_ = walked
    assert plan.partials(m, c, small) < plan.tiles(m)


def test_only_what_is_asked_for(by: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    actual, asked = channel_layers.backward, []
    monkeypatch.setattr(channel_layers, "backward", lambda *a, **k: (asked.append(k), actual(*a, **k))[1])
    for wanted in [wanted for wanted in itertools.product([False, True], repeat=3) if any(wanted)]:
        drawn, dy = drawn_for((2, 12, 5, 6), torch.float32, torch.float32, device)
        of = [t.requires_grad_(wants) for t, wants in zip(drawn, wanted, strict=True)]
        of = [t for t in of if t.requires_grad]
        got = torch.autograd.grad(channel_layer_norm(*drawn), of, dy)
        assert [asked[-1][name] not in (None, False) for name in ("dx", "dw", "db")] == list(wanted)
        for g, want in zip(got, torch.autograd.grad(composite(*drawn), of, dy), strict=True):
            torch.testing.assert_close(g, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("absent", [("weight",), ("bias",), ("weight", "bias")], ids="-".join)
def test_without_weight_or_bias(absent: tuple[str, ...], by: str, device: torch.device) -> None:
    (x, weight, bias), dy = drawn_for((2, 12, 5, 6), torch.float32, torch.float32, device)
    given = None if "weight" in absent else weight, None if "bias" in absent else bias
    of = [t for t in (x, *given) if t is not None]
    results = channel_layer_norm(x, *given), composite(x, *given)
    for got, want in zip(*((y, *torch.autograd.grad(y, of, dy)) for y in results), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


NASTY: dict[str, Callable[[Tensor], Tensor]] = {
    "mean 1e4, std 1e-2": lambda x: 1e4 + 1e-2 * x,
    "one value": lambda x: torch.full_like(x, 3.7),
    "zeros": torch.zeros_like,
    "1e15": lambda x: 1e15 * x,
    "1e-15": lambda x: 1e-15 * x,
}


@pytest.mark.parametrize("what", NASTY)
def test_nasty_values(what: str, by: str, device: torch.device) -> None:
    drawn, dy = drawn_for((2, 40, 9, 8), torch.float32, torch.float32, device)
    x = NASTY[what](drawn[0].detach()).requires_grad_()
    y = channel_layer_norm(x, *drawn[1:])
    plain = x.detach().movedim(1, -1), x.shape[1:2], *(t.detach() for t in drawn[1:]), 1e-6
    exact = reference.oracle(LAYER_NORM, *plain).y.reshape(plain[0].shape).movedim(-1, 1)
    assert_no_worse("y", y.detach(), exact, composite(x, *drawn[1:]).detach())
    assert all(g.isfinite().all() for g in torch.autograd.grad(y, (x, *drawn[1:]), dy))


def test_squares_beyond_fp32(by: str, device: torch.device) -> None:
    """Also where one position of a tile alone is so: the others keep their bits."""
    (x, weight, bias), _ = drawn_for((2, 40, 9, 8), torch.float32, torch.float32, device)
    with torch.no_grad():
        expected = channel_layer_norm(x * 2.0**20, weight, bias)
        torch.testing.assert_close(channel_layer_norm(x * 2.0**100, weight, bias), expected, rtol=1e-5, atol=1e-5)
        scaled = x * 2.0**20
        scaled[1, :, 3, 5] *= 2.0**80
        y = channel_layer_norm(scaled, weight, bias)
        torch.testing.assert_close(y[1, :, 3, 5], expected[1, :, 3, 5], rtol=1e-5, atol=1e-5)
        y[1, :, 3, 5] = expected[1, :, 3, 5]
        assert torch.equal(y, expected)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_positions_nan_leaves_the_others(value: float, by: str, device: torch.device) -> None:
    (x, weight, bias), dy = drawn_for((3, 12, 9, 11), torch.float32, torch.float32, device)
    spoiled = x.detach().clone()
    spoiled[1, 4, 3, 3] = value
    hit = torch.zeros_like(x, dtype=torch.bool)
    hit[1, :, 3, 3] = True
    clean, found = (
        (y.detach(), *torch.autograd.grad(y, t, dy))
        for t in (x, spoiled.requires_grad_())
        for y in [channel_layer_norm(t, weight, bias)]
    )
    for got, want in zip(found, clean, strict=True):
        assert torch.equal(got[~hit], want[~hit])
        assert got[hit].isnan().all()


def test_the_same_bits_on_every_run(by: str, device: torch.device) -> None:
    drawn, dy = drawn_for((4, 24, 19, 8), torch.bfloat16, torch.float32, device)
    runs = [(y.detach(), *torch.autograd.grad(y, drawn, dy)) for y in (channel_layer_norm(*drawn) for _ in range(3))]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


# Layout and emptiness.


def test_other_layouts(kernels: list[str], device: torch.device) -> None:
    wide = torch.randn(3, 12, 9, 22, device=device)
    expected = functional.layer_norm(wide.movedim(1, -1).contiguous(), (12,), eps=1e-6).movedim(-1, 1)
    torch.testing.assert_close(channel_layer_norm(wide), expected)
    for x in (wide[..., ::2], wide.transpose(2, 3), wide.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)):
        assert torch.equal(channel_layer_norm(x), channel_layer_norm(x.contiguous()))
    minus = torch._neg_view(wide)
    assert torch.equal(channel_layer_norm(minus), channel_layer_norm(-wide))
    x = wide.clone().requires_grad_()
    y = channel_layer_norm(x)
    dy = torch.randn(3, 9, 22, 12, device=device).movedim(-1, 1)
    got, want = (torch.autograd.grad(y, x, t, retain_graph=True)[0] for t in (dy, dy.contiguous()))
    assert torch.equal(got, want)
    kernels.clear()
    channel_layer_norm(wide.contiguous(memory_format=torch.channels_last))
    assert kernels == ["row_forward"]


@pytest.mark.parametrize("shape", [(0, 6, 5, 5), (2, 6, 0, 5), (2, 0, 3)], ids=str)
def test_nothing(shape: tuple[int, ...], device: torch.device) -> None:
    x, weight, bias = (
        t.requires_grad_() for t in (torch.empty(shape, device=device), *torch.ones(2, shape[1], device=device))
    )
    y = channel_layer_norm(x, weight, bias)
    assert y.shape == shape
    for g in torch.autograd.grad(y, (x, weight, bias), torch.empty_like(y)):
        assert not g.any()


# In torch.


@pytest.mark.filterwarnings("ignore:trinorm:UserWarning")
def test_derivatives(by: str, device: torch.device) -> None:
    drawn, _ = drawn_for((2, 4, 3), torch.float64, torch.float64, device)
    torch.autograd.gradcheck(channel_layer_norm, drawn, fast_mode=not ON_GPU)
    torch.autograd.gradgradcheck(channel_layer_norm, drawn, fast_mode=not ON_GPU)
    y = channel_layer_norm(*drawn)
    batched = torch.randn(3, *y.shape, device=device, dtype=torch.float64)
    at_once = torch.autograd.grad(y, drawn, batched, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(y, drawn, dy, retain_graph=True) for dy in batched]
    for got, *want in zip(at_once, *one_by_one, strict=True):
        torch.testing.assert_close(got, torch.stack(want))
    by_func = torch.func.grad(lambda *t: channel_layer_norm(*t).sin().sum(), (0, 1, 2))(*drawn)
    for got, want in zip(by_func, torch.autograd.grad(y.sin().sum(), drawn), strict=True):
        torch.testing.assert_close(got, want)


def test_compiled_with_channels_last(device: torch.device) -> None:
    """As layer_norm; test_channel_library.py has the op of those that are first."""
    torch._dynamo.reset()
    drawn, dy = drawn_for((2, 12, 5, 6), torch.float32, torch.float32, device, last=True)
    run = torch.compile(channel_layer_norm, backend="aot_eager", fullgraph=True)
    found, expected = ([y, *torch.autograd.grad(y, drawn, dy)] for y in (run(*drawn), channel_layer_norm(*drawn)))
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert found[0].stride() == expected[0].stride()


def test_by_torch_where_kernels_do_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(road, "INTERPRETED", False)
    drawn, dy = drawn_for((3, 12, 5, 6), torch.float32, torch.float32, torch.device("cpu"))
    check(drawn, dy)
    assert channel_layer_norm(*drawn).is_contiguous()


def test_autocast(device: torch.device) -> None:
    """As layer_norm: of the two orders of memory alike, and registered."""
    x = torch.randn(2, 12, 5, 6, device=device).bfloat16()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        first, last = channel_layer_norm(x), channel_layer_norm(x.contiguous(memory_format=torch.channels_last))
        registered, *_ = torch.ops.trinorm.channel_layer_norm(x, None, None, 1e-6, False)
        assert first.dtype == last.dtype == registered.dtype == functional.layer_norm(x, (6,)).dtype


def test_bad_input(device: torch.device) -> None:
    x, w = torch.ones(2, 6, 4, device=device), torch.ones(6, device=device)
    bad: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (RuntimeError, r"input has shape \(6,\)", lambda: channel_layer_norm(w)),
        (RuntimeError, r"weight has shape \(3,\)", lambda: channel_layer_norm(x, w[:3])),
        (RuntimeError, "bias is on meta", lambda: channel_layer_norm(x, w, w.to("meta"))),
        (NotImplementedError, "input has dtype torch.int64", lambda: channel_layer_norm(x.long())),
        (NotImplementedError, "bias has dtype torch.int64", lambda: channel_layer_norm(x, w, w.long())),
        (ValueError, "eps is nan", lambda: channel_layer_norm(x, eps=math.nan)),
        (ValueError, "eps is -1", lambda: channel_layer_norm(x, eps=-1)),
        (TypeError, "eps must be a float", lambda: channel_layer_norm(x, eps="a")),  # type: ignore[arg-type]
        (TypeError, "input must be a Tensor", lambda: channel_layer_norm([1.0])),  # type: ignore[arg-type]
        (TypeError, "weight must be a Tensor or None", lambda: channel_layer_norm(x, 1.0)),  # type: ignore[arg-type]
    ]
    for error, message, call in bad:
        with pytest.raises(error, match=message):
            call()


class LayerNorm2d(torch.nn.Module):
    """As Segment Anything has it."""

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(num_channels))
        self.bias = torch.nn.Parameter(torch.zeros(num_channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


def test_module(device: torch.device) -> None:
    theirs, ours = LayerNorm2d(12).to(device), nn.ChannelLayerNorm(12, device=device)
    torch.nn.init.normal_(theirs.weight)
    torch.nn.init.normal_(theirs.bias)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 12, 5, 6, device=device)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert repr(ours) == "ChannelLayerNorm(12, eps=1e-06, affine=True)"
    assert [*nn.ChannelLayerNorm(12, bias=False).state_dict()] == ["weight"]
    plain = nn.ChannelLayerNorm(12, 1e-3, affine=False)
    assert not plain.state_dict()
    assert torch.equal(plain(x), channel_layer_norm(x, eps=1e-3))
    assert nn.ChannelLayerNorm(12, dtype=torch.bfloat16).weight.dtype == torch.bfloat16  # type: ignore[union-attr]
