"""Norms with a quantized result: the formats bit for bit (kernels/quantize.py), what is quantized, and its gradient."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from machine import ON_GPU
from trinorm import functional, reference
from trinorm.compare import assert_no_worse
from trinorm.formats import FORMAT_NAMES, FORMATS, FormatName
from trinorm.functional import Quantized
from trinorm.ops import quantized, road
from trinorm.ops.hosts import quantized_rows
from trinorm.reference import added as added_reference
from trinorm.reference import quantized as quantized_reference
from trinorm.spec import CASTS, RMS_NORM, ROW_NORMS, Cast, RowNorm
from trinorm.tuning import RowForward, Tile

EPS = 1e-5
NORMS = pytest.mark.parametrize("norm", ROW_NORMS, ids=lambda norm: norm.name)
EVERY_FORMAT = pytest.mark.parametrize("name", FORMAT_NAMES)

# What divides y to be the scale of a block, in the formats that ask for a number of the whole tensor.
WHOLE = 0.02


def whole(name: FormatName, device: torch.device, value: float = WHOLE) -> Tensor | None:
    return torch.tensor([value], device=device) if FORMATS[name].given else None


def ours(norm: RowNorm, x: Tensor, shape: tuple[int, ...], *parameters: Tensor | None, **how: Any) -> Quantized:
    weight, bias = (*parameters, None, None)[:2]
    if norm.center:
        return functional.quantized_layer_norm(x, shape, weight, bias, how.pop("eps", EPS), **how)
    return functional.quantized_rms_norm(x, shape, weight, bias=bias, eps=how.pop("eps", EPS), **how)


def as_bytes(t: Tensor) -> Tensor:
    """Codes, NaN being one of them."""
    nan = t.float().isnan() if t.dtype in (torch.float8_e4m3fn, torch.float8_e8m0fnu) else None
    code = t.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return code if nan is None else torch.where(nan, 0x7F, code)


def assert_same(found: Quantized, data: Tensor, scale: Tensor | None) -> None:
    assert found.data.dtype == data.dtype and found.data.shape == data.shape
    assert torch.equal(as_bytes(found.data), as_bytes(data))
    if scale is not None:
        assert found.scale.dtype == scale.dtype and found.scale.shape == scale.shape
        assert torch.equal(as_bytes(found.scale), as_bytes(scale))


def assert_right(
    norm: RowNorm, name: FormatName, x: Tensor, dims: int, weight: Tensor | None, bias: Tensor | None, cast: Cast = "output"
) -> None:
    """No further from float64 than torch's norm, quantized by the plain reference, may be."""
    norm, shape, scale = norm.with_cast(cast), x.shape[-dims:], whole(name, x.device)
    found = ours(norm, x, tuple(shape), weight, bias, format=name, scale=scale, cast=cast)
    exact = reference.oracle(norm, x, shape, weight, bias, EPS).y
    by_torch = reference.composite(norm, x, shape, weight, bias, EPS)
    codes = quantized_reference.quantize(FORMATS[name], by_torch.flatten(-dims), scale)
    back = quantized_reference.dequantize(FORMATS[name], *codes, scale if name == "nvfp4" else None)
    assert_no_worse(name, found.dequantize().reshape(x.shape), exact, back.reshape(x.shape))


def ones(*shape: int, device: torch.device) -> Tensor:
    """Rows of ±1: their mean square is 1 exactly, so that without eps y is ± the weight, bit for bit."""
    return torch.where(torch.rand(shape, device=device) < 0.5, -1.0, 1.0)


@EVERY_FORMAT
def test_every_number_of_16_bits(name: FormatName, device: torch.device) -> None:
    """All of bf16, in the order of their bits, Inf and NaN among them, as weights of rows of ±1."""
    patterns = torch.arange(-(1 << 15), 1 << 15, device=device).to(torch.int16).view(torch.bfloat16)
    for weight, value in itertools.product(patterns.split(1 << 13), (1.0, 0.7)):
        x, scale = ones(2, 1 << 13, device=device).bfloat16(), whole(name, device, value)
        found = functional.quantized_rms_norm(x, (1 << 13,), weight, 0.0, format=name, scale=scale)
        data, taken = quantized_reference.quantize(FORMATS[name], x.float() * weight.float(), scale)
        assert_same(found, data, None if name == "fp8" else taken)


@pytest.mark.parametrize("name", [name for name in FORMAT_NAMES if FORMATS[name].block])
def test_beside_every_power_of_two(name: FormatName, device: torch.device) -> None:
    """Largest elements by which a scale passes from one power to the next, and those of fp32 beside them."""
    form = FORMATS[name]
    exponents = torch.arange(-149, 128, device=device, dtype=torch.float64)[:, None]
    powers = torch.ldexp(torch.tensor([1.0, form.largest / 256, 1.5], device=device), exponents).float()
    beside = powers[..., None].view(torch.int32) + torch.arange(-2, 3, device=device, dtype=torch.int32)
    for largest in beside.clamp(0, 0x7F7FFFFF).view(torch.float32).flatten().split(8192 // form.block):
        weight = largest.repeat_interleave(form.block)
        x, scale = ones(1, weight.numel(), device=device), whole(name, device, 1.0)
        found = functional.quantized_rms_norm(x, (weight.numel(),), weight, 0.0, format=name, scale=scale)
        assert_same(found, *quantized_reference.quantize(form, x * weight, scale))


@EVERY_FORMAT
@pytest.mark.parametrize("n", [1024, 1000, 96, 16, 2])
def test_numbers_of_every_size(name: FormatName, n: int, device: torch.device) -> None:
    """fp32 over all of its range, and what lies in the middle between two of the format's numbers, and beside it."""
    form = FORMATS[name]
    exponents = torch.randint(-149, 127, (4, 1), device=device) + torch.randint(-12, 1, (4, n), device=device)
    wide = torch.ldexp(1 + torch.rand(4, n, device=device), exponents.clamp(-149, 126)).float()
    steps = torch.randint(0, 2 * int(form.largest), (4, n), device=device).float() * 0.5
    steps[:, 0] = form.largest
    bits = steps.view(torch.int32) + torch.randint(-1, 2, (4, n), device=device).int()
    for weights in (wide, steps, bits.clamp(min=0).view(torch.float32)):
        for weight in weights:
            x, scale = ones(2, n, device=device), whole(name, device, 1.0)
            found = functional.quantized_rms_norm(x, (n,), weight, 0.0, format=name, scale=scale)
            data, taken = quantized_reference.quantize(form, x * weight, scale)
            assert_same(found, data, None if name == "fp8" else taken)


@pytest.mark.parametrize("exponent", [-126, -100, -81, -80, -40, 0, 40, 80, 81, 100, 120])
def test_a_number_of_the_whole_tensor_of_every_size(exponent: int, device: torch.device) -> None:
    """By which a scale is divided: near 1 in another way than far from it."""
    scale = torch.tensor([1.1 * 2.0**exponent], device=device)
    steps = torch.cat((torch.randint(-14, 14, (2048,), device=device), torch.tensor([0, -160, 200], device=device)))
    exponents = (steps.repeat_interleave(16)[: 1 << 15] + exponent).clamp(-149, 126)
    weight = torch.ldexp(1 + torch.rand(1 << 15, device=device, dtype=torch.float64), exponents).float()
    for n, part in ((1 << 10, part) for part in weight.split(1 << 10)):
        x = ones(1, n, device=device)
        found = functional.quantized_rms_norm(x, (n,), part, 0.0, format="nvfp4", scale=scale)
        assert_same(found, *quantized_reference.quantize(FORMATS["nvfp4"], x * part, scale))


def test_the_formats_themselves() -> None:
    """The plain reference beside what the formats' papers say, number by number."""
    e4m3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = e4m3[~e4m3.float().isnan()]
    found, _ = quantized_reference.quantize(FORMATS["fp8"], finite.float(), torch.ones(1))
    assert torch.equal(found.view(torch.uint8), finite.view(torch.uint8))
    e2m1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    data, scale = quantized_reference.quantize(FORMATS["nvfp4"], torch.cat((e2m1, -e2m1)), torch.ones(1))
    assert scale.float().tolist() == [1.0] and data.view(torch.uint8).tolist() == [
        *(0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE)
    ]
    # MX: the largest is 2^floor(log2) of the block's over that of e4m3's, 2^8; what is beyond 448 is cut off.
    block = torch.tensor([1.0, 1.9, 448.0, 500.0] + [0.0] * 28)
    data, scale = quantized_reference.quantize(FORMATS["mxfp8"], block)
    assert scale.float().tolist() == [1.0] and data.float()[:4].tolist() == [1.0, 1.875, 448.0, 448.0]
    # The least power of two by which nothing is beyond 448, where max|y| / 448 may be rounded.
    for largest, power in (
        (448.0, 1.0),
        (448 * (1 + 2.0**-23), 2.0),
        (447.9, 1.0),
        (224.0, 0.5),
        (225.0, 1.0),
        (0.0, 2.0**-126),
    ):
        _, scale = quantized_reference.quantize(FORMATS["fp8_block_pow2"], torch.tensor([largest, -largest / 3]))
        assert scale.dtype == torch.float32 and scale.tolist() == [power]
    data, scale = quantized_reference.quantize(FORMATS["int8_token"], torch.tensor([[127.0, 0.5, 1.5, -2.5]]))
    assert scale.tolist() == [[1.0]] and data.tolist() == [[127, 0, 2, -2]]


@EVERY_FORMAT
@NORMS
@pytest.mark.parametrize("n", [2, 64, 130, 1000, 3072])
def test_beside_torchs_norm(norm: RowNorm, name: FormatName, n: int, device: torch.device) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)[:: 1 if n == 130 else 2]:
        if dtype == torch.float64 and n > 2048:
            continue
        x, weight, bias = (torch.randn(s, device=device).to(dtype) for s in ((3, 2, n), (n,), (n,)))
        assert_right(norm, name, x, 1, weight, bias if norm.center else None)


@NORMS
@pytest.mark.parametrize("cast", CASTS)
def test_casting_modes(norm: RowNorm, cast: Cast, device: torch.device) -> None:
    x, weight, bias = (torch.randn(s, device=device).bfloat16() for s in ((7, 96), (96,), (96,)))
    for name in ("fp8_token", "int8_token", "mxfp8"):
        assert_right(norm, name, x, 1, weight, bias if norm.center else None, cast)


def test_shapes_of_several_dims_and_strides(device: torch.device) -> None:
    x = torch.randn(3, 4, 6, 16, device=device).bfloat16()
    for view, dims in ((x, 2), (x[:, 1:3], 1), (x.transpose(0, 1), 2), (x[..., ::2], 1), (x[0, 0], 2), (x[..., 1:], 1)):
        for name in ("fp8_block", "int8_token"):
            assert_right(RMS_NORM, name, view, dims, None, None)
    one = functional.quantized_rms_norm(x[0, 0, 0], (16,), format="mxfp8")
    assert one.data.shape == (16,) and one.scale.shape == (1,)


@NORMS
@EVERY_FORMAT
@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32], ids=str)
def test_with_a_residual(norm: RowNorm, name: FormatName, stream: torch.dtype, device: torch.device) -> None:
    """The sum is add_rms_norm's, and the result that of quantizing the norm of it."""
    x, residual, weight = (torch.randn(s, device=device).bfloat16() for s in ((5, 192), (5, 192), (192,)))
    residual, scale = residual.to(stream), whole(name, device)
    found = ours(norm, x, (192,), weight, format=name, scale=scale, residual=residual)
    _, total = added_reference.composite(norm, x, residual, (192,), weight, None, EPS, 1.0, x.dtype)
    assert found.residual is not None and torch.equal(found.residual, total)
    assert_same(found, *(alone := ours(norm, total, (192,), weight, format=name, scale=scale))[:1], alone.scale)


@NORMS
@pytest.mark.parametrize("each", [False, True], ids=["of all", "of each row"])
@pytest.mark.parametrize("residual", [None, torch.bfloat16], ids=str)
def test_an_input_of_codes(norm: RowNorm, each: bool, residual: torch.dtype | None, device: torch.device) -> None:
    """Read as the numbers that they stand for."""
    codes = torch.randn(2, 3, 200, device=device).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 3, 1, device=device) if each else torch.rand(1, device=device)
    weight = torch.randn(200, device=device)
    beside = None if residual is None else torch.randn(2, 3, 200, device=device).to(residual)
    found = ours(norm, codes, (200,), weight, format="fp8_block", input_scale=scales, residual=beside)
    x = codes.float() * scales
    if beside is not None:
        x = (x + beside.float()).to(beside.dtype)
        assert found.residual is not None and torch.equal(found.residual, x)
    assert_same(found, *(alone := ours(norm, x, (200,), weight, format="fp8_block"))[:1], alone.scale)


@NORMS
@pytest.mark.parametrize("each", [False, True], ids=["of all", "of each row"])
@pytest.mark.parametrize("by_kernels", [True, False], ids=["kernels", "no kernels"])
def test_an_input_of_codes_of_several_dims(
    norm: RowNorm, each: bool, by_kernels: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row's scale is not that of one of its dims; and the weight's gradient is of what the codes stand for."""
    codes = torch.randn(4, 4, 8, device=device).to(torch.float8_e4m3fn)
    scales = torch.rand(4, 1, device=device) if each else torch.rand(1, 1, 1, device=device)
    x = codes.float() * (scales[..., None] if each else scales)
    weight, dy = torch.randn(4, 8, device=device), torch.randn(4, 4, 8, device=device)
    if not by_kernels:
        monkeypatch.setattr(road, "has_kernels", lambda _: False)
        monkeypatch.setattr(road, "kernels_serve", lambda *_, **__: False)
    found, alone = (
        ours(norm, t, (4, 8), weight.requires_grad_(), format="int8_token", input_scale=s)
        for t, s in ((codes, scales), (x, None))
    )
    assert_same(found, alone.data, alone.scale)
    one, other = (torch.autograd.grad(t.dequantize(), weight, dy)[0] for t in (found, alone))
    torch.testing.assert_close(one, other)


def test_a_row_among_rows(device: torch.device) -> None:
    """With batch_invariant its bits are its own."""
    rows = 600 if ON_GPU else 60
    x, weight = torch.randn(rows, 4096, device=device).bfloat16(), torch.randn(4096, device=device)
    for name in ("fp8_token", "mxfp8"):
        how: dict[str, Any] = dict(format=name, batch_invariant=True)
        many, few = (functional.quantized_rms_norm(t, (4096,), weight, **how) for t in (x, x[:3]))
        assert_same(few, many.data[:3], many.scale[:3])


@NORMS
def test_rows_whose_squares_leave_fp32(norm: RowNorm, device: torch.device) -> None:
    x = torch.randn(6, 300, device=device)
    scale = torch.tensor([2.0**100, 1.0, 2.0**-90, 1.0, 2.0**80, 0.0], device=device)[:, None]
    found = ours(norm, x * scale, (300,), format="fp8_token", eps=0.0)
    plain = ours(norm, x * (scale != 0), (300,), format="fp8_token", eps=0.0)
    rows = slice(0, 5)  # of a row of zeros there is no direction
    distance = (found.dequantize() - plain.dequantize())[rows].abs()
    # At most one number of the format further, where y's last bit decides.
    assert (distance <= plain.dequantize()[rows].abs() / 8 + plain.scale[rows] * 2**-9).all()
    assert (distance == 0).float().mean() > 0.99


@pytest.mark.parametrize("name", FORMAT_NAMES[1:])
def test_what_is_not_finite_shows(name: FormatName, device: torch.device) -> None:
    """A row, or block, with NaN or Inf has no finite scale; others are as they were."""
    weight, scale = torch.randn(512, device=device), whole(name, device)
    x = ones(2, 512, device=device)
    good = functional.quantized_rms_norm(x, (512,), weight, format=name, scale=scale)
    for value in (float("nan"), float("inf")):
        spoilt = weight.clone()
        spoilt[200] = value
        found = functional.quantized_rms_norm(x, (512,), spoilt, format=name, scale=scale)
        block = FORMATS[name].block or 512
        of = torch.arange(found.scale.shape[-1], device=device) == 200 // block
        assert not found.scale.float()[:, of].isfinite().any()
        assert torch.equal(found.scale.float()[:, ~of], good.scale.float()[:, ~of])


@pytest.mark.parametrize("name", ["fp8_token", "int8_token", "nvfp4"])
@pytest.mark.parametrize("n", [2, 8, 30])
def test_what_is_not_finite_shows_in_its_narrow_row_alone(name: FormatName, n: int, device: torch.device) -> None:
    """Of which a thread has several."""
    x, scale = ones(70, n, device=device), whole(name, device)
    x[::3, n // 2] = float("nan")
    found = functional.quantized_rms_norm(x, (n,), eps=0.0, format=name, scale=scale)
    y = torch.where(x.isnan().any(-1, keepdim=True), float("nan"), x)
    assert_same(found, *quantized_reference.quantize(FORMATS[name], y, scale))


@pytest.mark.parametrize("tile", [Tile(1, 32, 1), Tile(4, 64, 4), Tile(2, 512, 4)], ids=str)
@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_other_tiles(name: FormatName, tile: Tile, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that are a chunk, several of a chunk, or one of a narrow row: the same bits."""
    if FORMATS[name].block > tile.chunk:
        pytest.skip("a block is at most a chunk, but in rows of one chunk")
    x, weight, scale = torch.randn(5, 400, device=device), torch.randn(400, device=device), whole(name, device)
    expected = functional.quantized_rms_norm(x, (400,), weight, format=name, scale=scale)
    monkeypatch.setattr(quantized_rows, "choose_quantized", lambda *_: RowForward(tile, 1, False, True, True))
    quantized.CALLS.clear()
    found = functional.quantized_rms_norm(x, (400,), weight, format=name, scale=scale)
    # The sum of squares is another's order, and with it perhaps y's last bit.
    distance = (found.dequantize() - expected.dequantize()).abs()
    assert (distance > expected.dequantize().abs() * 2**-20).float().mean() < 0.01


# --- the gradient ---


@NORMS
@pytest.mark.parametrize("name", ["fp8", "fp8_block", "nvfp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_is_the_norms(norm: RowNorm, name: FormatName, dtype: torch.dtype, device: torch.device) -> None:
    x, weight, bias, dy = (torch.randn(s, device=device).to(dtype) for s in ((4, 3, 64), (64,), (64,), (4, 3, 64)))
    given = [x, weight, *([bias] if norm.center else [])]
    leaves = [t.clone().requires_grad_() for t in given]
    found = ours(norm, leaves[0], (64,), *leaves[1:], format=name, scale=whole(name, device))
    assert found.straight is not None and found.straight.untyped_storage().nbytes() == dtype.itemsize
    assert found.dequantize().dtype == torch.float32
    y = found.dequantize(dtype)
    assert y.dtype == dtype and not found.data.requires_grad and not found.scale.requires_grad
    y.backward(dy)
    exact = reference.oracle_gradients(norm, x, (64,), weight, bias if norm.center else None, EPS, dy)
    plain = [t.clone().requires_grad_() for t in given]
    reference.composite(norm, plain[0], (64,), plain[1], (*plain, None)[2], EPS).backward(dy)
    for what, leaf, want, by_torch in zip(("dx", "dw", "db"), leaves, exact, plain, strict=False):
        assert leaf.grad is not None and by_torch.grad is not None
        assert_no_worse(what, leaf.grad, want, by_torch.grad)


@NORMS
def test_the_gradient_of_a_sum(norm: RowNorm, device: torch.device) -> None:
    """Its own and y's; one of the two alone; and of what is asked for alone."""
    tensors = [torch.randn(s, device=device) for s in ((5, 48), (5, 48), (48,))]
    dy, dsum = (torch.randn(5, 48, device=device) for _ in range(2))
    add = getattr(functional, f"add_{norm.name}")
    for uses, wanted in itertools.product(((1, 1), (1, 0), (0, 1)), ((1, 1, 1), (0, 1, 0), (1, 0, 1))):
        if not uses[0] and not any(wanted[:2]):
            continue
        grads = []
        for quantized_result in (True, False):
            x, residual, weight = leaves = [t.clone().requires_grad_(bool(w)) for t, w in zip(tensors, wanted, strict=True)]
            if quantized_result:
                found = ours(norm, x, (48,), weight, format="fp8_token", residual=residual)
                y, total = found.dequantize(), found.residual
            else:
                y, total = add(x, residual, weight, eps=EPS)
            outs = [(t, g) for t, g, used in zip((y, total), (dy, dsum), uses, strict=True) if used]
            asked = [t for t, w in zip(leaves, wanted, strict=True) if w]
            of = [t for t, _ in outs], asked, [g for _, g in outs]
            grads.append(torch.autograd.grad(*of, allow_unused=True))
        for a, b in zip(*grads, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                torch.testing.assert_close(a, b)
