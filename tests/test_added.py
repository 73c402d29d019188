"""The norms of a sum: functional/added.py, ops/added.py, ops/library/added.py and kernels/added.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from machine import ON_GPU
from paths import PATHS, SPECS, SPLIT, WIDE
from trinorm import functional, reference
from trinorm.compare import assert_no_worse
from trinorm.forced import forced
from trinorm.ops import added
from trinorm.ops.hosts import rows
from trinorm.reference import added as added_reference
from trinorm.spec import CASTS, LAYER_NORM, RowNorm

EPS = 1e-5
STREAMS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float16, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float64),
    (torch.float32, torch.float64),
]


@pytest.fixture(autouse=True)
def _nothing_remembered() -> None:
    added.CALLS.clear()


@pytest.fixture(params=SPECS)
def spec(request: pytest.FixtureRequest) -> RowNorm:
    return request.param


def public(spec: RowNorm, x: Tensor, residual: Tensor, *parameters: Tensor | None, **how: Any) -> tuple[Tensor, Tensor]:
    weight, bias = (*parameters, None, None)[:2]
    return getattr(functional, f"add_{spec.name}")(x, residual, weight, eps=how.pop("eps", EPS), bias=bias, **how)


def draw(
    m: int, n: int, stream: tuple[torch.dtype, torch.dtype], device: torch.device, weight: torch.dtype | None = None
) -> list[Tensor]:
    """x, residual, weight, bias, dy and the sum's own gradient."""
    x, residual, dy, dsum = (torch.randn(m, n, device=device) for _ in range(4))
    w, b = (torch.randn(n, device=device).to(weight or stream[0]) for _ in range(2))
    total = torch.promote_types(*stream)
    return [x.to(stream[0]), residual.to(stream[1]), w, b, dy.to(stream[0]), dsum.to(total)]


def assert_right(
    spec: RowNorm, given: list[Tensor], alpha: float, biased: bool, factor: Tensor | None = None, **how: Any
) -> None:
    """The sum beside float64 and torch's own; and of the sum, as it is kept, y and every gradient. factor: x's, float64."""
    *tensors, dy, dsum = given
    tensors = tensors if biased else tensors[:3]
    leaves = [t.detach().requires_grad_() for t in tensors]
    y, total = public(spec, *leaves, alpha=alpha, **how)
    found = torch.autograd.grad((y, total), leaves, (dy, dsum))
    assert y.dtype == given[0].dtype
    assert total.dtype == dsum.dtype

    x, residual, *parameters = tensors
    exact_sum, torch_sum = x.double() + alpha * residual.double(), torch.add(x, residual, alpha=alpha)
    wide = torch.promote_types(dsum.dtype, torch.float32)
    if factor is not None:
        exact_sum = x.double() * factor + alpha * residual.double()
        torch_sum = torch.add(x.to(wide) * factor.to(wide), residual.to(wide), alpha=alpha).to(dsum.dtype)
    assert_no_worse("sum", total.detach(), exact_sum, torch_sum)
    weight, bias = (*parameters, None)[:2]
    problem = spec, total.detach(), (x.shape[-1],), weight, bias, EPS
    dx, *sums = reference.oracle_gradients(*problem, dy)
    assert dx is not None
    ds = dx + dsum.double()
    dx = ds if factor is None else ds * factor
    # torch's own, of the same sum.
    apart = [t.detach().requires_grad_() for t in (total, *parameters)]
    torch_y, torch_total = added_reference.composite(
        spec, apart[0], torch.zeros_like(total), (x.shape[-1],), *(*apart[1:], None)[:2], EPS, 1.0, x.dtype
    )
    torch_ds, *torch_sums = torch.autograd.grad((torch_y, torch_total), apart, (dy, dsum))
    assert_no_worse("y", y.detach(), reference.oracle(*problem).y, torch_y.detach())
    torch_dx = torch_ds if factor is None else torch_ds * factor.to(wide)
    assert_no_worse("dx", found[0], dx, torch_dx.to(x.dtype))
    assert_no_worse("dresidual", found[1], alpha * ds, (alpha * torch_ds).to(residual.dtype))
    for what, got, want, torchs in zip(("dw", "db"), found[2:], sums, torch_sums, strict=False):
        assert want is not None
        assert_no_worse(what, got, want, torchs)


LAUNCHES = {**PATHS, "wide": WIDE} | ({"team": SPLIT} if ON_GPU else {})


@pytest.mark.parametrize(("stream", "alpha"), list(zip(STREAMS[:4], (0.75, 1.0, 0.75, 1.0), strict=True)), ids=str)
@pytest.mark.parametrize("path", LAUNCHES)
def test_every_launch(
    spec: RowNorm, path: str, stream: tuple[torch.dtype, torch.dtype], alpha: float, device: torch.device
) -> None:
    forward, backward = LAUNCHES[path]
    n = 4096 if path == "team" else 1100
    with forced(forward=forward, backward=backward):
        assert_right(spec, draw(9, n, stream, device), alpha, biased=spec.center)


@pytest.mark.parametrize("stream", STREAMS, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (5, 768)], ids=str)
def test_every_stream(
    spec: RowNorm, stream: tuple[torch.dtype, torch.dtype], biased: bool, shape: tuple[int, int], device: torch.device
) -> None:
    for weight in (stream[0], torch.float32):
        assert_right(spec, draw(*shape, stream, device, weight), 1.0, biased)


@pytest.mark.skipif(not ON_GPU, reason="the interpreter takes minutes")
@pytest.mark.parametrize("stream", STREAMS[1:3], ids=str)
@pytest.mark.parametrize(
    "shape", [(2048, 1024), (700, 4096), (300, 8192), (300, 12288), (160, 16384), (70, 65536), (9, 100003)], ids=str
)
def test_the_launches_of_real_sizes(
    spec: RowNorm, stream: tuple[torch.dtype, torch.dtype], shape: tuple[int, int], device: torch.device
) -> None:
    assert_right(spec, draw(*shape, stream, device), 1.0, biased=spec.center)


@pytest.mark.parametrize("stream", STREAMS[:3], ids=str)
def test_as_adding_first_and_normalizing_then(
    spec: RowNorm, stream: tuple[torch.dtype, torch.dtype], device: torch.device
) -> None:
    """Bit for bit, by the same launch, where y has the sum's dtype; and the statistics, which are kept for the backward."""
    x, residual, w, b, dy, _ = draw(7, 1000, stream, device)
    bias = b if spec.center else None
    forward, backward = PATHS["row a program"]
    with forced(forward=forward, backward=backward):
        total = x + residual
        memory = torch.empty_like(total)
        sums = rows.Added(residual, memory, x.dtype, 1.0)
        y, mean, rstd = rows.forward(spec, x, 1, w, bias, EPS, save=True, added=sums)
        y_alone, mean_alone, rstd_alone = rows.forward(spec, total, 1, w, bias, EPS, save=True)
        assert torch.equal(memory, total)
        assert rstd is not None
        assert rstd_alone is not None
        assert torch.equal(rstd, rstd_alone)
        assert mean is mean_alone is None or torch.equal(mean, mean_alone)  # type: ignore[arg-type]
        if total.dtype == x.dtype:
            assert torch.equal(y, y_alone)
            asked: dict[str, Any] = dict(dx=True, dw=w.dtype, db=None)
            both = rows.AddedBackward(None, None, x.dtype, 1.0)
            found = rows.backward(spec, dy, total, 1, w, mean, rstd, **asked, added=both)
            for got, want in zip(found, rows.backward(spec, dy, total, 1, w, mean, rstd, **asked), strict=True):
                assert got is want is None or torch.equal(got, want)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", LAUNCHES)
def test_rows_beyond_the_squares_of_fp32(spec: RowNorm, path: str, device: torch.device) -> None:
    """They are read again, from the sum."""
    forward, backward = LAUNCHES[path]
    m, n = 6, 4096 if path == "team" else 1100
    x, residual = (torch.randn(m, n, device=device).bfloat16() for _ in range(2))
    large = torch.tensor([1.0, 2.0**90, 1.0, 2.0**100, 1.0, 2.0**-100], device=device)[:, None].bfloat16()
    w, b = torch.randn(n, device=device).bfloat16(), torch.randn(n, device=device).bfloat16() if spec.center else None
    total = x + residual
    unscaled = reference.oracle(spec, total, (n,), w, b, 0.0).y
    by_torch = reference.composite(spec, total, (n,), w, b, 1e-30)
    with forced(forward=forward, backward=backward):
        for place in (None, residual * large):
            y, s = public(spec, x * large, residual * large if place is None else place, w, b, eps=1e-300, out=place)
            assert torch.equal(s, total * large)
            assert_no_worse("y", y, unscaled, by_torch)


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("stream", STREAMS[1:4], ids=str)
def test_casting_modes(spec: RowNorm, cast: str, stream: tuple[torch.dtype, torch.dtype], device: torch.device) -> None:
    given = draw(9, 96, stream, device)
    assert_right(spec.with_cast(cast), given, 1.0, biased=False, cast=cast)  # type: ignore[arg-type]


@pytest.mark.parametrize("wanted", [w for w in itertools.product((False, True), repeat=4) if any(w)], ids=str)
@pytest.mark.parametrize("used", ["y", "sum", "both"])
@pytest.mark.parametrize("stream", STREAMS[1:3], ids=str)
def test_only_what_is_asked_for(
    wanted: tuple[bool, ...], used: str, stream: tuple[torch.dtype, torch.dtype], device: torch.device
) -> None:
    *tensors, dy, dsum = draw(5, 40, stream, device)

    def gradients(norm: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor | None]:
        leaves = [t.detach().requires_grad_(is_wanted) for t, is_wanted in zip(tensors, wanted, strict=True)]
        y, total = norm(*leaves)
        assert total.requires_grad == (wanted[0] or wanted[1])
        outs, their = {"y": ((y,), (dy,)), "sum": ((total,), (dsum,)), "both": ((y, total), (dy, dsum))}[used]
        if not all(out.requires_grad for out in outs):
            outs, their = (y,), (dy,)
        asked = [leaf for leaf in leaves if leaf.requires_grad]
        return list(torch.autograd.grad(outs, asked, their, allow_unused=True))

    def composite(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return added_reference.composite(LAYER_NORM, x, residual, (40,), w, b, EPS, 1.0, x.dtype)

    for _ in range(3):  # the third is a repetition of the second
        found = gradients(lambda x, r, w, b: functional.add_layer_norm(x, r, w, b, EPS))
        for got, want in zip(found, gradients(composite), strict=True):
            assert (got is None or not got.any()) if want is None else got is not None
            if got is not None and want is not None:
                torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_in_place_and_elsewhere(spec: RowNorm, device: torch.device) -> None:
    """out is the residual, the input, or neither: with the same bits, on a first call and on repeated ones."""
    for dtype in (torch.float32, torch.bfloat16):
        w = torch.randn(96, device=device).to(dtype)
        for place, _ in itertools.product(("residual", "input", "neither", None), range(4)):
            x, residual = (torch.randn(6, 96, device=device).to(dtype) for _ in range(2))
            y, total = public(spec, x, residual, w)
            memory = {"residual": residual, "input": x, "neither": torch.empty_like(x), None: None}[place]
            version = None if memory is None else memory._version
            found, s = public(spec, x, residual, w, out=memory)
            assert torch.equal(found, y)
            assert torch.equal(s, total)
            if memory is not None:
                assert s is memory
                assert memory._version > version  # which autograd is to know


def test_strided_inputs(spec: RowNorm, device: torch.device) -> None:
    packed = torch.randn(4, 3, 96, device=device)
    w = torch.randn(32, device=device)
    for view in (packed[..., 32:64], packed.transpose(0, 1)[..., :32], packed[..., ::3], torch._neg_view(packed[..., :32])):
        for residual in (torch.randn(view.shape, device=device), torch.randn(1, 1, 32, device=device).expand(view.shape)):
            y, total = public(spec, view, residual, w)
            expected = public(spec, view.clone(), residual.contiguous(), w)
            assert torch.equal(total, view + residual)
            assert torch.equal(y, expected[0])
            assert y.is_contiguous()
            assert total.is_contiguous()


@pytest.mark.parametrize("dims", [1, 2])
def test_the_shape_that_is_normalized(spec: RowNorm, dims: int, device: torch.device) -> None:
    x, residual = torch.randn(3, 4, 6, device=device), torch.randn(3, 4, 6, device=device)
    shape = x.shape[-dims:]
    w = torch.randn(shape, device=device)
    by_weight, _ = public(spec, x, residual, w)
    assert torch.equal(by_weight, public(spec, x, residual, w, normalized_shape=shape)[0])
    assert torch.equal(by_weight, public(spec, x, residual, w, normalized_shape=list(shape))[0])
    plain, _ = public(spec, x, residual, normalized_shape=shape)
    torch.testing.assert_close(plain, reference.composite(spec, x + residual, shape, None, None, EPS))
    if dims == 1:
        assert torch.equal(plain, public(spec, x, residual)[0])


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (4, 0)], ids=str)
def test_no_elements(spec: RowNorm, shape: tuple[int, ...], device: torch.device) -> None:
    x, residual = (torch.randn(shape, device=device, requires_grad=True) for _ in range(2))
    w = torch.ones(shape[-1:], device=device, requires_grad=True)
    y, total = public(spec, x, residual, w)
    assert y.shape == total.shape == x.shape
    for gradient, t in zip(torch.autograd.grad(y.sum() + total.sum(), (x, residual, w)), (x, residual, w), strict=True):
        assert torch.equal(gradient, torch.ones_like(t) if t is not w else torch.zeros_like(t))


def test_what_is_forced_is_of_remembered_calls_too(spec: RowNorm, device: torch.device) -> None:
    x, residual = (torch.randn(3, 40, device=device) for _ in range(2))
    public(spec, x, residual)
    assert added.CALLS._kept
    with forced(forward=WIDE[0]):
        assert not added.CALLS._kept
        public(spec, x, residual)
    assert not added.CALLS._kept
