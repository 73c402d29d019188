"""QK-norm: functional/qk.py, reference/qk.py, ops/qk.py, ops/hosts/heads.py and kernels/heads.py."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from machine import ON_GPU
from trinorm import functional, reference
from trinorm.compare import assert_no_worse
from trinorm.ops.hosts import heads
from trinorm.reference import qk as qk_reference
from trinorm.spec import CASTS, RMS_NORM, Cast, RowNorm
from trinorm.tuning import Heads, Tile, choose_heads_forward
from trinorm.tuning import heads as tuning

EPS = 1e-5
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# How many elements a head has, and of these how many are turned.
SIZES = [(1, 0), (2, 2), (64, 64), (80, 80), (80, 32), (96, 0), (128, 128), (128, 64), (256, 256)]


@pytest.fixture(params=["a head", "heads"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What a program has forward: one head, as where tokens are few, or all that are together where they are many."""
    monkeypatch.setattr(tuning, "_SCARCE", 1 << 20 if request.param == "a head" else 0)
    choose_heads_forward.cache_clear()
    yield request.param
    choose_heads_forward.cache_clear()


def draw(
    lead: tuple[int, ...],
    of: tuple[int, int],
    size: int,
    turned: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    weight: torch.dtype | None = None,
    angle: torch.dtype = torch.float32,
    offset: int = 0,
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor]]:
    """Views of queries and keys into a packed projection that begins ``offset`` elements into its memory, and both weights;
    cos and sin of the last of the leading dims, or None; and the gradients of both results.
    """
    heads_, width = sum(of) + of[1], (sum(of) + of[1]) * size
    rows = torch.Size(lead).numel()
    packed = torch.randn(rows * width + offset, device=device).to(dtype)[offset:].view(*lead, heads_, size)
    query, key = packed[..., : of[0], :], packed[..., of[0] : sum(of), :]
    weights = [torch.randn(size, device=device).to(weight or dtype) for _ in range(2)]
    angles = torch.rand(*lead[-1:], turned, device=device) * 6
    cos, sin = (t.to(angle) if turned else None for t in (angles.cos(), angles.sin()))
    dys = [torch.randn(*lead, n, size, device=device).to(dtype) for n in of]
    return [query, key, *weights], [cos, sin], dys


def assert_right(
    given: list[Tensor],
    angles: list[Tensor | None],
    dys: list[Tensor],
    *,
    eps: float = EPS,
    interleaved: bool = False,
    cast: Cast = "output",
    weighted: tuple[bool, bool] = (True, True),
) -> None:
    """Both results, and every gradient, beside float64 and torch's own."""
    leaves = [t.detach().requires_grad_() for t in given]
    asked = [leaf for leaf, there in zip(leaves, (True, True, *weighted), strict=True) if there]
    query_weight, key_weight = (w if there else None for w, there in zip(leaves[2:], weighted, strict=True))
    how: dict[str, Any] = dict(cos=angles[0], sin=angles[1], interleaved=interleaved, cast=cast)
    ys = functional.qk_norm(*leaves[:2], query_weight, key_weight, eps, **how)
    found = iter(torch.autograd.grad(ys, asked, dys))
    gradients = [next(found) if any(leaf is t for t in asked) else None for leaf in leaves]

    spec = RMS_NORM.with_cast(cast)
    for i, name in enumerate(("query", "key")):
        x, dy, weight = given[i], dys[i], given[2 + i] if weighted[i] else None
        problem = (spec, x, weight, eps, *angles, interleaved)
        assert ys[i].dtype == x.dtype
        assert ys[i].is_contiguous()
        plain = [t.detach().requires_grad_() for t in ((x,) if weight is None else (x, weight))]
        by_torch = qk_reference.composite(spec, *(*plain, None)[:2], *problem[3:])
        assert_no_worse(name, ys[i].detach(), qk_reference.oracle(*problem), by_torch.detach())
        exact = qk_reference.oracle_gradients(*problem, dy)
        of_torch = torch.autograd.grad(by_torch, plain, dy)
        for what, got, want, torchs, terms in zip(
            ("d", "dw of "), gradients[i::2], exact, of_torch, terms_of_gradients(*problem, dy), strict=False
        ):
            assert got is not None and want is not None
            assert_no_worse(what + name, got, want, torchs, terms)


def terms_of_gradients(
    spec: RowNorm,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    dy: Tensor,
) -> tuple[Tensor, Tensor]:
    """How large what dx and dw are sums of is: dx's terms, which all but cancel in a head of one or two elements; and of dw
    the sums on the way, which are as large as the root of the sum of its terms' squares.
    """
    x, dn = x.double(), dy.double()
    if cos is not None and sin is not None:
        dn = qk_reference.unrotated(dn, cos.double(), sin.double(), interleaved)
    rstd = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    xhat = x * rstd
    g = dn if weight is None else dn * (weight.double() + spec.offset)
    dx = rstd * (g.abs() + (xhat * (g * xhat).mean(-1, keepdim=True)).abs())
    return dx, (dn * xhat).flatten(0, -2).square().sum(0).sqrt()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "turned"), SIZES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_every_size(dtype: torch.dtype, size: int, turned: int, interleaved: bool, device: torch.device) -> None:
    assert_right(*draw((2, 5), (4, 2), size, turned, dtype, device), interleaved=interleaved)


@pytest.mark.parametrize("of", [(1, 1), (3, 1), (8, 8), (12, 2), (7, 7), (16, 1)], ids=str)
@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 9), (2, 3, 4), (70,)], ids=str)
@pytest.mark.usefixtures("by")
def test_heads_and_tokens(of: tuple[int, int], lead: tuple[int, ...], device: torch.device) -> None:
    """One tile of tokens, and several with a ragged last; heads that a program has together, and that it has not."""
    turned = 16 if lead else 0
    assert_right(*draw(lead, of, 16, turned, torch.bfloat16, device))


@pytest.mark.parametrize(("turned", "interleaved"), [(0, False), (32, False), (16, True)])
@pytest.mark.parametrize("plan", [Heads(Tile(2, 32, 1), 2, 1, 1), Heads(Tile(8, 64, 4), 3, 3, 1)], ids=str)
def test_programs_that_walk(
    turned: int, interleaved: bool, plan: Heads, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over more tiles than there are programs, of queries and of keys, more than one turn of each; with lanes to spare."""
    monkeypatch.setattr(heads, "choose_heads_forward", lambda *_: plan)
    monkeypatch.setattr(heads, "choose_heads_backward", lambda *_: plan)
    monkeypatch.setattr(Heads, "partials", lambda *_: 3)
    assert_right(*draw((2, 11), (6, 3), 32, turned, torch.float32, device), interleaved=interleaved)


@pytest.mark.parametrize("weighted", list(itertools.product((False, True), repeat=2)), ids=str)
@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_without_weights(weighted: tuple[bool, bool], cast: Cast, interleaved: bool, device: torch.device) -> None:
    """An absent one is 1, beside one that is its distance from 1 too."""
    given = draw((2, 5), (4, 2), 48, 32, torch.bfloat16, device)
    assert_right(*given, cast=cast, weighted=weighted, interleaved=interleaved)


@pytest.mark.parametrize("dtypes", [d for d in itertools.product(DTYPES, repeat=3) if len(set(d)) > 1], ids=str)
def test_weights_and_angles_of_other_dtypes(dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    of_input, weight, angle = dtypes
    assert_right(*draw((7,), (2, 1), 24, 16, of_input, device, weight=weight, angle=angle))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("turned", [0, 32])
def test_casting_modes(dtype: torch.dtype, cast: Cast, turned: int, device: torch.device) -> None:
    assert_right(*draw((2, 9), (4, 2), 32, turned, dtype, device, angle=dtype), cast=cast)


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
@pytest.mark.parametrize("angle", DTYPES[:3], ids=str)
@pytest.mark.parametrize("turned", [32, 16])
def test_llamas_roundings_bit_for_bit(dtype: torch.dtype, angle: torch.dtype, turned: int, device: torch.device) -> None:
    """As a model writes it out: of ones, so that rstd is 1, and of numbers whose rstd may differ in its last bit."""
    (query, key, *weights), angles, _ = draw((2, 9), (4, 2), 32, turned, dtype, device, angle=angle)
    cos, sin = (t for t in angles if t is not None)
    for given, eps in ((query.sign(), key.sign()), 0.0), ((query, key), EPS):
        ys = functional.qk_norm(*given, *weights, eps, cos=cos, sin=sin, cast="llama")
        for x, weight, y in zip(given, weights, ys, strict=True):
            xhat = (x.float() * (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()).to(dtype)
            part, rest = (xhat * weight).tensor_split((turned,), -1)
            other = torch.cat((-part[..., turned // 2 :], part[..., : turned // 2]), -1)
            expected = torch.cat((((part * cos[:, None]) + (other * sin[:, None])).to(dtype), rest), -1)
            # And a sum of products in fp32 may be fused, which is rounded otherwise where it lies next to a tie.
            assert (y != expected).float().mean() <= (0 if eps == 0 and angle == dtype else 0.01)


@pytest.mark.parametrize("cast", ["output", "llama"])
def test_a_weights_gradient_is_of_what_it_met(cast: Cast, device: torch.device) -> None:
    """Of one token and head, whose dw is no sum: x̂ as it was rounded, or was not."""
    (query, key, *weights), _, dys = draw((1,), (1, 1), 256, 0, torch.bfloat16, device, weight=torch.float32)
    leaves = [w.detach().requires_grad_() for w in weights]
    found = torch.autograd.grad(functional.qk_norm(query, key, *leaves, EPS, cast=cast), leaves, dys)
    for x, dy, dw in zip((query, key), dys, found, strict=True):
        xhat = x.float() * (x.float().square().mean(-1, keepdim=True) + EPS).rsqrt()
        met = xhat.bfloat16().float() if cast == "llama" else xhat
        assert torch.isclose(dw, (dy.float() * met).view(-1), rtol=1e-5, atol=0).float().mean() > 0.98


def test_as_the_norm_alone(device: torch.device) -> None:
    """Without angles it is RMSNorm, of which the bits are."""
    (query, key, *weights), _, _ = draw((2, 9), (4, 2), 128, 0, torch.bfloat16, device)
    ys = functional.qk_norm(query, key, *weights, EPS)
    for x, weight, y in zip((query, key), weights, ys, strict=True):
        assert_no_worse("y", y, *(2 * [functional.rms_norm(x, (128,), weight, EPS)]))


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_memory_of_any_alignment(offset: int, dtype: torch.dtype, device: torch.device) -> None:
    assert_right(*draw((2, 5), (4, 2), 64, 64, dtype, device, offset=offset))


def test_other_layouts(device: torch.device) -> None:
    """Heads before tokens, as attention has them; strided elements, which are copied; a negative; and their gradients."""
    for view in (
        lambda t: t.transpose(-2, -3).contiguous().transpose(-2, -3),
        lambda t: torch.stack((t, t), -1)[..., 0],
        lambda t: t.expand(2, *t.shape[1:]),
        lambda t: torch._neg_view(-t),
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        (query, key, *weights), angles, dys = draw((2, 5), (4, 2), 16, 16, torch.float32, device)
        query, key, *dys = (view(t) for t in (query, key, *dys))
        assert_right([query, key, *weights], angles, dys)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 5), (2, 1), (1, 1), (1,), ()], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_angles_are_broadcast(shape: tuple[int, ...], interleaved: bool, device: torch.device) -> None:
    given, _, dys = draw((2, 5), (4, 2), 16, 0, torch.float32, device)
    angles = torch.rand(*shape, 12, device=device) * 6
    for cos, sin in (
        (angles.cos(), angles.sin()),
        (angles.cos().mT.contiguous().mT, angles.sin()) if len(shape) else (angles.cos(), angles.sin()),
        (torch.cat((angles.cos(), angles.sin()), -1)[..., :12], angles.sin()),
    ):
        assert_right(given, [cos, sin], dys, interleaved=interleaved)
        ys = functional.qk_norm(*given, EPS, cos=cos, sin=sin, interleaved=interleaved)
        full = (t.expand(2, 5, 12).contiguous() for t in (cos, sin))
        expected = functional.qk_norm(*given, EPS, **dict(zip(("cos", "sin"), full, strict=True)), interleaved=interleaved)
        for y, want in zip(ys, expected, strict=True):
            assert torch.equal(y, want)


@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)], ids=str)
def test_no_tokens(lead: tuple[int, ...], device: torch.device) -> None:
    given, angles, dys = draw(lead, (4, 2), 16, 8, torch.bfloat16, device)
    leaves = [t.detach().requires_grad_() for t in given]
    ys = functional.qk_norm(*leaves, cos=angles[0], sin=angles[1])
    for y, x, gradient, leaf in zip(ys * 2, given[:2] * 2, torch.autograd.grad(ys, leaves, dys), leaves, strict=True):
        assert y.shape == x.shape
        assert torch.equal(gradient, torch.zeros_like(leaf))


def test_neither_heads_nor_elements(device: torch.device) -> None:
    for query, key in ((torch.ones(3, 0, 8), torch.ones(3, 2, 8)), (torch.ones(3, 2, 0), torch.ones(3, 1, 0))):
        ys = functional.qk_norm(query.to(device), key.to(device))
        assert [y.shape for y in ys] == [query.shape, key.shape]


@pytest.mark.filterwarnings("ignore:.*runs torch's own operator")
def test_heads_without_a_kernel(device: torch.device, launched: list[object]) -> None:
    for size, kernels in ((1024, 2), (1025, 0)):
        assert_right(*draw((3,), (2, 1), size, 64, torch.float32, device))
        assert (len(launched) > 0) == bool(kernels)
        launched.clear()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("scale", [2.0**70, 2.0**-70, 2.0**-125])
@pytest.mark.usefixtures("by")
def test_heads_beyond_the_squares_of_fp32(interleaved: bool, scale: float, device: torch.device) -> None:
    """As the same heads within them, to the last bit: a power of two is exact, and rstd is as far the other way."""
    given, angles, _ = draw((2, 5), (4, 2), 32, 32, torch.float32, device)
    query, key, *weights = given
    how: dict[str, Any] = dict(cos=angles[0], sin=angles[1], interleaved=interleaved)
    expected = functional.qk_norm(query, key, *weights, 0.0, **how)
    mixed = query.clone()
    mixed[:, 1::2, 1] *= scale
    found = functional.qk_norm(mixed, key * scale, *weights, 0.0, **how)
    for y, want in zip(found, expected, strict=True):
        torch.testing.assert_close(y, want, rtol=1e-6, atol=1e-6)
    if scale < 2.0**-100:
        return
    dy, gradients = torch.randn_like(expected[0]), []
    for x in (query, query * scale):
        leaf = x.detach().requires_grad_()
        gradients += torch.autograd.grad(functional.qk_norm(leaf, key, *weights, 0.0, **how)[0], leaf, dy)
    torch.testing.assert_close(gradients[1] * scale, gradients[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("turned", [0, 16, 32])
@pytest.mark.usefixtures("by")
def test_what_is_no_number_stays_where_it_is(interleaved: bool, turned: int, device: torch.device) -> None:
    """NaN, infinities and zeros: as the definition has it, head by head and pair by pair."""
    given, angles, _ = draw((4, 5), (2, 2), 32, turned, torch.float32, device)
    query, key, *weights = (t.clone() for t in given)
    query[0, 1, 0, 3], query[1, 1, 1, 20], query[2, 2, 0, 31], query[3, 3] = torch.nan, torch.inf, -torch.inf, 0.0
    for eps in (EPS, 0.0):
        how: dict[str, Any] = dict(cos=angles[0], sin=angles[1], interleaved=interleaved)
        y, _ = functional.qk_norm(query, key, *weights, eps, **how)
        problem = (query, weights[0], eps, *angles, interleaved)
        by_torch = qk_reference.composite(RMS_NORM, *problem)
        assert_no_worse("y", y, qk_reference.oracle(RMS_NORM, *problem), by_torch)


@pytest.mark.usefixtures("by")
def test_the_same_bits_on_every_run_and_beside_any_tokens(device: torch.device) -> None:
    """The kernels promise it without being asked: forward and backward, of one token and of many."""
    given, angles, dys = draw((40,), (4, 2), 64, 64, torch.bfloat16, device)
    cos, sin = (t for t in angles if t is not None)

    def everything(tokens: slice) -> list[Tensor]:
        leaves = [t.detach()[tokens].requires_grad_() for t in given[:2]]
        leaves += [t.detach().requires_grad_() for t in given[2:]]
        ys = functional.qk_norm(*leaves, cos=cos[tokens], sin=sin[tokens])
        return [*ys, *torch.autograd.grad(ys, leaves, [dy[tokens] for dy in dys])]

    whole = everything(slice(None))
    for got, want in zip(everything(slice(None)), whole, strict=True):
        assert torch.equal(got, want)
    for tokens in (slice(7, 8), slice(0, 33)):
        for got, want in zip(everything(tokens)[:4], whole[:4], strict=True):
            assert torch.equal(got, want[tokens])


def test_one_weight_of_both(device: torch.device) -> None:
    """Its gradient is the sum of both."""
    (query, key, weight, _), angles, dys = draw((2, 5), (4, 2), 16, 16, torch.float32, device)
    turn = dict(cos=angles[0], sin=angles[1])
    for _ in range(3):
        one, *two = (weight.detach().clone().requires_grad_() for _ in range(3))
        together = torch.autograd.grad(functional.qk_norm(query, key, one, one, **turn), one, dys)[0]
        apart = torch.autograd.grad(functional.qk_norm(query, key, *two, **turn), two, dys)
        torch.testing.assert_close(together, apart[0] + apart[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("wanted", [w for w in itertools.product((False, True), repeat=4) if any(w)], ids=str)
@pytest.mark.parametrize("used", ["query", "key", "both"])
def test_only_what_is_asked_for(wanted: tuple[bool, ...], used: str, device: torch.device, launched: list[Any]) -> None:
    given, angles, dys = draw((2, 5), (4, 2), 16, 16, torch.float32, device)
    sides = {"query": (0,), "key": (1,), "both": (0, 1)}[used]

    def gradients(norm: Any) -> list[Tensor | None]:
        leaves = [t.detach().requires_grad_(want) for t, want in zip(given, wanted, strict=True)]
        ys = norm(*leaves)
        assert [y.requires_grad for y in ys] == [wanted[0] or wanted[2], wanted[1] or wanted[3]]
        kept = [i for i in sides if ys[i].requires_grad]
        if not kept:
            return []
        asked = [leaf for leaf in leaves if leaf.requires_grad]
        return list(torch.autograd.grad([ys[i] for i in kept], asked, [dys[i] for i in kept], allow_unused=True))

    def composite(query: Tensor, key: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            qk_reference.composite(RMS_NORM, x, w, EPS, *angles, False) for x, w in zip((query, key), weights, strict=True)
        )

    for _ in range(3):  # the third is a repetition of the second
        launched.clear()
        found = gradients(lambda *leaves: functional.qk_norm(*leaves, EPS, cos=angles[0], sin=angles[1]))
        sums = any(wanted[2 + i] for i in sides)
        assert sums == any(kernel.fn.__name__ == "sum_partials" for kernel in launched)
        for got, want in zip(found, gradients(composite), strict=True):
            assert (got is None) == (want is None)
            if got is not None and want is not None:
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_the_default_epsilon_is_rms_norms(device: torch.device) -> None:
    for dtype in DTYPES:
        x = torch.randn(3, 2, 16, device=device).to(dtype) * 1e-3
        y, _ = functional.qk_norm(x, x)
        exact = reference.oracle(RMS_NORM, x, (16,), None, None, 2.0**-52 if dtype == torch.float64 else 2.0**-23).y
        assert_no_worse("y", y, exact, F.rms_norm(x, (16,)))


@pytest.mark.skipif(not ON_GPU, reason="the interpreter takes minutes")
@pytest.mark.parametrize(("of", "size"), [((32, 8), 128), ((16, 8), 128), ((32, 32), 64), ((8, 4), 256)], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_launches_of_real_sizes(of: tuple[int, int], size: int, interleaved: bool, device: torch.device) -> None:
    assert_right(*draw((2, 1024), of, size, size, torch.bfloat16, device), interleaved=interleaved)
