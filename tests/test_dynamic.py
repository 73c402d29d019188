"""DyT and Derf: functional/dynamic.py, ops/dynamic.py and kernels/dynamic.py. What they share with PolyNorm is
test_inputs_only.py's.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from inputs_only_norms import DTYPES, assert_right, dynamic, gradients
from machine import ON_GPU
from trinorm import functional
from trinorm.compare import assert_no_worse
from trinorm.kernels import index, saturating
from trinorm.ops.hosts import dynamic_rows
from trinorm.reference import dynamic as dynamic_reference
from trinorm.spec import DYNAMIC_ERF, DYNAMIC_NORMS, DYNAMIC_TANH, DynamicNorm
from trinorm.tuning import RowBackward, RowForward, Tile

SPECS = pytest.mark.parametrize("spec", DYNAMIC_NORMS, ids=lambda spec: spec.name)
# At the edges of tiles, and within them; wider than a chunk.
SIZES = [(33, 1), (5, 2), (300, 5), (9, 64), (3, 257), (3, 1160), (2, 4097)]
EVERY_SIZE = [(*of, dtype) for of in SIZES for dtype in (DTYPES if of[1] == 257 else DTYPES[:1])]


def draw(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device) -> list[Tensor]:
    """x, and a weight and a bias."""
    return [torch.randn(s, device=device).to(dtype) for s in (shape, shape[-1:], shape[-1:])]


@SPECS
@pytest.mark.parametrize(("m", "n", "dtype"), EVERY_SIZE, ids=str)
def test_every_size(spec: DynamicNorm, m: int, n: int, dtype: torch.dtype, device: torch.device) -> None:
    assert_right(dynamic(spec, *draw(m, n, dtype=dtype, device=device)))


@SPECS
@pytest.mark.parametrize("given", list(itertools.product((False, True), repeat=2)), ids=str)
def test_with_and_without_parameters(spec: DynamicNorm, given: tuple[bool, bool], device: torch.device) -> None:
    x, *parameters = draw(3, 4, 40, dtype=torch.bfloat16, device=device)
    assert_right(dynamic(spec, x, *(t if there else None for t, there in zip(parameters, given, strict=True))))


@pytest.mark.parametrize(
    "dtypes", [d for d in itertools.product(DTYPES[::-1][:3], repeat=3) if len(set(d)) > 1][::3], ids=str
)
def test_numbers_and_weights_of_other_dtypes(dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    x, weight, bias = (t.to(dtype) for t, dtype in zip(draw(6, 24, device=device), dtypes, strict=True))
    assert_right(dynamic(DYNAMIC_ERF, x, weight, bias, dtype=dtypes[2]))


def test_several_dims_and_numbers_without_dims(device: torch.device) -> None:
    x, (weight, bias) = torch.randn(3, 4, 6, device=device), torch.randn(2, 4, 6, device=device)
    assert_right(dynamic(DYNAMIC_ERF, x, weight, bias, dims=2))
    call = dynamic(DYNAMIC_TANH, x, weight[0], bias[0])
    flat = call._replace(tensors=tuple(t.reshape(()) if i == 1 else t for i, t in enumerate(call.tensors) if t is not None))
    flat = call._replace(tensors=(*flat.tensors[:2], None, *flat.tensors[2:]))
    assert torch.equal(flat(), call())
    dy = torch.randn_like(x)
    (_, found), (_, expected) = (gradients(type(of).__call__, of, dy) for of in (flat, call))
    assert found[1] is not None and expected[1] is not None
    assert found[1].shape == ()
    assert torch.equal(found[1], expected[1].reshape(()))


@SPECS
def test_where_tensors_lie(spec: DynamicNorm, device: torch.device) -> None:
    """Strided rows, aligned or not; and layouts that are copied."""
    for n, offset in ((64, 0), (64, 1), (50, 3)):
        packed = torch.randn(2, 7, 2 * n + offset, device=device).bfloat16()
        weight, bias = torch.randn(2, n + 1, device=device).bfloat16()[:, 1:].unbind()
        assert_right(dynamic(spec, packed[..., offset : offset + n], weight, bias), packed[..., -n:])
    x, weight, bias = draw(3, 4, 32, device=device)
    for view in (
        lambda t: t.movedim(0, -2).contiguous().movedim(-2, 0) if t.dim() > 1 else t,
        lambda t: torch.stack((t, t), -1)[..., 0],
        lambda t: torch._neg_view(-t),
    ):
        assert_right(dynamic(spec, view(x), view(weight), bias), view(torch.randn_like(x)))
    assert_right(dynamic(spec, x[:1].expand(3, 4, 32), weight, bias), torch.randn(32, device=device).expand(3, 4, 32))


@SPECS
@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("tile", [Tile(2, 32, 1), Tile(4, 16, 4)], ids=str)
def test_programs_that_walk(
    spec: DynamicNorm, programs: int, tile: Tile, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each chunk's rows by one program and by several, of more than one turn each; the last ragged, or the only one."""
    forward, backward = RowForward(tile, 1, True, True, True), RowBackward(tile, 1, 3, 1, True)
    monkeypatch.setattr(dynamic_rows, "choose_dynamic_forward", lambda *_: forward)
    monkeypatch.setattr(dynamic_rows, "choose_dynamic_backward", lambda *_: backward)
    monkeypatch.setattr(dynamic_rows, "programs_of_a_chunk", lambda *_: programs)
    for n in (40, 16, 7):
        assert_right(dynamic(spec, *draw(27, n, device=device)))


@SPECS
@pytest.mark.parametrize("scale", [1e-30, 1e-4, 30.0, 1e6, 1e30])
def test_small_and_large_arguments(spec: DynamicNorm, scale: float, device: torch.device) -> None:
    """Of tiny ones y has its digits, of huge ones it is ±1: nothing overflows."""
    x, weight, bias = draw(8, 64, device=device)
    assert_right(dynamic(spec, x * scale, weight, None, shift=0.0))
    assert_right(dynamic(spec, x * scale, weight, bias))


@SPECS
def test_what_is_no_number_stays_where_it_is(spec: DynamicNorm, device: torch.device) -> None:
    x, weight, bias = draw(8, 33, device=device)
    x[0, 3], x[1, 20], x[2, 31] = torch.nan, torch.inf, -torch.inf
    call = dynamic(spec, x, weight, bias)
    dy = torch.randn_like(x)
    y, (dx, *_) = gradients(type(call).__call__, call, dy)
    by_torch, (dx_of_torch, *_) = gradients(type(call).composite, call, dy)
    assert dx is not None and dx_of_torch is not None
    assert_no_worse("y", y, call.oracle(), by_torch)
    exact = call.oracle_gradients(dy)[0]
    assert exact is not None
    assert_no_worse("dx", dx, exact, dx_of_torch)


@SPECS
def test_the_same_bits_on_every_run_and_beside_any_rows(spec: DynamicNorm, device: torch.device) -> None:
    x, weight, bias = draw(60, 96, dtype=torch.bfloat16, device=device)
    dy = torch.randn_like(x)

    def everything(rows: slice) -> list[Tensor | None]:
        call = dynamic(spec, x[rows], weight, bias)
        y, found = gradients(type(call).__call__, call, dy[rows])
        return [y, *found]

    whole = everything(slice(None))
    for got, want in zip(everything(slice(None)), whole, strict=True):
        assert (got is None and want is None) or (got is not None and want is not None and torch.equal(got, want))
    for rows in (slice(7, 8), slice(0, 33)):
        for got, want in zip(everything(rows)[:2], whole[:2], strict=True):
            assert got is not None and want is not None
            assert torch.equal(got, want[rows])


@pytest.mark.parametrize("wanted", [w for w in itertools.product((False, True), repeat=5) if any(w)][::5], ids=str)
def test_only_what_is_asked_for(wanted: tuple[bool, ...], device: torch.device, launched: list[Any]) -> None:
    given = dynamic(DYNAMIC_ERF, *draw(300, 24, device=device))
    dy = torch.randn_like(given.x)
    for _ in range(3):  # the third is a repetition of the second
        launched.clear()
        found = []
        for by in (type(given).__call__, type(given).composite):
            leaves = [t.detach().requires_grad_(want) for t, want in zip(given.present, wanted, strict=True)]
            found.append(torch.autograd.grad(by(given.given(leaves)), [t for t in leaves if t.requires_grad], dy))
        sums = ["sum_columns_and_numbers"] * any(wanted[1:])
        assert [kernel.fn.__name__ for kernel in launched] == ["dynamic_forward", "dynamic_backward", *sums]
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_the_papers_own_module(device: torch.device) -> None:
    """As its code writes it: alpha is of one element, and weight and bias come last."""
    x, weight, bias = draw(4, 9, 48, device=device)
    alpha, shift = torch.full((1,), 0.5, device=device), torch.zeros(1, device=device)
    want = torch.tanh(alpha * x) * weight + bias
    torch.testing.assert_close(functional.dynamic_tanh(x, (48,), alpha, weight, bias), want)
    want = torch.erf(alpha * x + shift) * weight + bias
    torch.testing.assert_close(functional.dynamic_erf(x, [48], alpha, shift, weight, bias), want)


@pytest.mark.skipif(not ON_GPU, reason="its kernel needs a GPU")
def test_in_liger(device: torch.device) -> None:
    """The meaning of LigerDyT's arguments."""
    dyt = pytest.importorskip("liger_kernel.transformers.dyt")
    module = dyt.LigerDyT(48).to(device)
    x = torch.randn(4, 48, device=device)
    found = functional.dynamic_tanh(x, (48,), module.alpha, module.gamma, module.beta)
    torch.testing.assert_close(found, module(x))


# --- the helpers, each alone ---


@triton.jit
def _function_kernel(OUT, X, FUNCTION: tl.constexpr, COARSE: tl.constexpr, CHUNK: tl.constexpr):
    columns = index.chunk_columns(0, CHUNK)
    x = tl.load(X + columns)
    tl.store(OUT + columns, saturating.saturated(x, FUNCTION, COARSE, not COARSE))
    tl.store(OUT + CHUNK + columns, saturating.saturated_slope(x, FUNCTION, COARSE))


def _functions(
    spec: DynamicNorm, dtype: torch.dtype, device: torch.device, coarse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments from denormals to infinity; f and f' of them, and exact ones, in float64."""
    n = 1024
    v = torch.cat([torch.linspace(-12, 12, n // 2), torch.linspace(-0.7, 0.7, n // 2 - 9), torch.tensor([0.0, 1e-38])])
    v = torch.cat([v, torch.tensor([-1e-20, 1e-3, -0.0078, 1.0, 1e30, torch.inf, torch.nan])]).to(device, dtype)
    out = torch.empty(2, n, dtype=dtype, device=device)
    _function_kernel[(1,)](out, v, FUNCTION=spec.function, COARSE=coarse, CHUNK=n)
    wide = v.double().cpu().numpy().astype("longdouble")
    with np.errstate(all="ignore"):
        exact = [dynamic_reference._saturated(spec, wide), dynamic_reference._slope(spec, wide)]
    f, slope = (torch.from_numpy(t.astype("float64")).to(device) for t in exact)
    return v, out[0].double(), out[1].double(), f, slope


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@SPECS
def test_functions(spec: DynamicNorm, dtype: torch.dtype, device: torch.device) -> None:
    """Every digit, from denormals to infinity; 3 units in the last place of f, and of f' where exp(-v²) has them."""
    v, found, found_slope, f, slope = _functions(spec, dtype, device, coarse=False)
    ulp = torch.finfo(dtype).eps
    # A GPU's erf has no numbers below fp32's least normal one.
    torch.testing.assert_close(found, f, rtol=3 * ulp, atol=2.0**-126, equal_nan=True)
    # exp of a rounded argument has its error times the argument, and of less than 2^-126 fp32 has no digits.
    of_argument = 2 * v.double().abs() if spec is DYNAMIC_TANH else v.double().square()
    bound = slope * ulp * (3 + of_argument.nan_to_num(0, posinf=0)) + 2.0**-126
    assert (slope.isnan() == found_slope.isnan()).all()
    assert ((found_slope - slope).abs() <= bound)[~slope.isnan()].all()


@SPECS
def test_coarse_functions(spec: DynamicNorm, device: torch.device) -> None:
    """An eighth of what rounding to fp16 changes, and of f' what rounding its argument does."""
    v, found, found_slope, f, slope = _functions(spec, torch.float32, device, coarse=True)
    torch.testing.assert_close(found, f, rtol=2.0**-15, atol=2.0**-126, equal_nan=True)
    of_argument = 2 * v.double().abs() if spec is DYNAMIC_TANH else v.double().square()
    bound = slope * 2.0**-22 * (3 + of_argument.nan_to_num(0, posinf=0)) + 2.0**-125
    assert (slope.isnan() == found_slope.isnan()).all()
    assert ((found_slope - slope).abs() <= bound)[~slope.isnan()].all()


@SPECS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1e-6, 2e-3, 8e-3, 1e-2, 3.0, 1e4])
def test_small_and_large_arguments_of_16_bits(
    spec: DynamicNorm, dtype: torch.dtype, scale: float, device: torch.device
) -> None:
    """By the functions that are coarse; with a weight of fp32, whose gradient asks for more, too."""
    x, weight, bias = draw(8, 64, device=device)
    x = (x * scale).to(dtype)
    assert_right(dynamic(spec, x, weight.to(dtype), None, shift=0.0))
    assert_right(dynamic(spec, x, weight, bias))


def test_the_oracles_erf_has_more_digits_than_float64() -> None:
    mpmath = pytest.importorskip("mpmath")
    v = np.concatenate([np.linspace(-7.2, 7.2, 61), [1e-30, -0.03]]).astype(np.longdouble)
    with mpmath.workdps(30):
        for x, found in zip(v, dynamic_reference._precise_erf(v), strict=True):
            exact = mpmath.erf(mpmath.mpf(float(x)) + mpmath.mpf(float(x - np.longdouble(float(x)))))
            got = mpmath.mpf(float(found)) + mpmath.mpf(float(found - np.longdouble(float(found))))
            assert abs(got - exact) <= 1e-18 * abs(exact)


@pytest.mark.skipif(not ON_GPU, reason="the interpreter takes minutes")
@SPECS
@pytest.mark.parametrize(("m", "n"), [(65536, 128), (16384, 1152), (4096, 8192), (40, 262144)], ids=str)
def test_the_launches_of_real_sizes(spec: DynamicNorm, m: int, n: int, device: torch.device) -> None:
    assert_right(dynamic(spec, *draw(m, n, dtype=torch.bfloat16, device=device)))
