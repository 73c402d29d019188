"""How the scales of quantized results lie in memory: by rows, by columns, and in the tiles of block-scaled products."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from machine import ON_GPU
from test_quantized import EPS, NORMS, as_bytes, assert_same, ours, whole
from trinorm import nn
from trinorm.formats import FORMAT_NAMES, FORMATS, SCALE_LAYOUTS, SWIZZLED, FormatName, ScaleLayout
from trinorm.functional import Quantized, quantized_rms_norm
from trinorm.launch import empty
from trinorm.ops import quantized, road
from trinorm.ops.hosts import quantized_rows
from trinorm.reference import quantized as quantized_reference
from trinorm.spec import LAYER_NORM, RMS_NORM, RowNorm
from trinorm.tuning import RowForward, Tile

EVERY_SWIZZLED = pytest.mark.parametrize("name", SWIZZLED)
# At a tile's edges; all of them, and of widths, on a GPU alone, as padding is programs, which take the interpreter's time.
ROWS = pytest.mark.parametrize("rows", [1, 127, 128, 129, 300] if ON_GPU else [1, 128, 129])

# What no scale and no padding is: NaN, in either format of a byte, and in fp32.
GARBAGE = 0xFF


# Bytes behind all memory.
BEHIND = 1 << 14


@pytest.fixture(autouse=True)
def _garbage(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In all memory that the kernel is given, so that what it does not write shows; and behind it, which stays as it is."""
    behind: list[Tensor] = []

    def spoilt(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        count = math.prod(size) * dtype.itemsize
        memory = empty((count + BEHIND,), torch.uint8, device).fill_(GARBAGE)
        behind.append(memory[count:])
        return memory[:count].view(dtype).view(size)

    monkeypatch.setattr(quantized_rows, "empty", spoilt)
    yield
    assert all((part == GARBAGE).all() for part in behind)


def tiled(scale: Tensor) -> Tensor:
    """Byte by byte, as cuBLAS's documentation has it."""
    m, n = scale.shape
    down, across = -(-m // 128), -(-n // 4)
    memory = torch.zeros(down * across * 512, dtype=torch.uint8, device=scale.device)
    r, c = torch.meshgrid(torch.arange(m), torch.arange(n), indexing="ij")
    at = (r // 128 * across + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
    memory[at.flatten().to(scale.device)] = scale.contiguous().view(torch.uint8).flatten()
    return memory.reshape(down * 128, across * 4)


def both(name: FormatName, layout: ScaleLayout, *given: Any, norm: RowNorm = RMS_NORM, **how: Any) -> tuple[Quantized, ...]:
    """The same call with its scales by rows, and as the layout has them."""
    how = dict(format=name, scale=whole(name, given[0].device)) | how
    return tuple(ours(norm, *given, **how, scale_layout=one) for one in ("row_major", layout))


# --- swizzled ---


@EVERY_SWIZZLED
@ROWS
@pytest.mark.parametrize("n", [16, 128, 272, 1088] if ON_GPU else [16, 272])
def test_swizzled(name: FormatName, rows: int, n: int, device: torch.device) -> None:
    """Every byte is a scale or zero, of widths whose scales are a multiple of 4 or not."""
    x, weight = torch.randn(rows, n, device=device).bfloat16(), torch.randn(n, device=device)
    plain, found = both(name, "swizzled", x, (n,), weight)
    assert torch.equal(as_bytes(found.data), as_bytes(plain.data))
    assert found.scale.dtype == FORMATS[name].scale_dtype and found.scale.is_contiguous()
    assert torch.equal(found.scale.view(torch.uint8), tiled(plain.scale))
    assert torch.equal(found.dequantize(), plain.dequantize())


@EVERY_SWIZZLED
@pytest.mark.parametrize("tile", [Tile(1, 32, 1), Tile(4, 64, 4), Tile(128, 32, 4), Tile(256, 32, 4)], ids=str)
def test_swizzled_by_other_tiles(
    name: FormatName, tile: Tile, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs of one row, of several, and of more than a tile of scales has."""
    monkeypatch.setattr(quantized_rows, "choose_quantized", lambda *_: RowForward(tile, 1, False, True, True))
    for norm, m, n in ((RMS_NORM, 3, 16), (LAYER_NORM, 3, 96), (RMS_NORM, 130 if tile.rows > 1 else 5, 32)):
        # Rows of which fp32 does not hold the squares are done again, and rows of zeros, without eps, have NaN.
        x = torch.randn(m, n, device=device)
        x[::3] *= 1e30
        x[1::5] = 0
        residual = None if norm is RMS_NORM else torch.randn(m, n, device=device)
        plain, found = both(name, "swizzled", x, (n,), norm=norm, eps=0.0, residual=residual)
        assert torch.equal(found.scale.view(torch.uint8), tiled(plain.scale))
        assert torch.equal(as_bytes(found.data), as_bytes(plain.data))
        if residual is not None:
            assert found.residual is not None and torch.equal(found.residual, x + residual)


@EVERY_SWIZZLED
def test_swizzled_rows_of_several_dims(name: FormatName, device: torch.device) -> None:
    """Leading dims are flattened into rows, of which the scale's shape does not tell how many dims there are."""
    x = torch.randn(3, 5, 4, 48, device=device)
    for of, dims in ((x, 1), (x, 2), (x, 3), (x, 4), (x[0, 0, 0], 1), (x[:, ::2], 2), (x.transpose(0, 1), 1)):
        plain, found = both(name, "swizzled", of, tuple(of.shape[-dims:]))
        assert found.dims == dims and found.scale_layout == "swizzled"
        rows = plain.scale.reshape(-1, plain.scale.shape[-1])
        assert torch.equal(found.scale.view(torch.uint8), tiled(rows))
        assert torch.equal(found.dequantize(), plain.dequantize())
        again = quantized_reference.unswizzled(found.scale, *rows.shape).contiguous()
        assert torch.equal(again.view(torch.uint8), rows.view(torch.uint8))


@EVERY_SWIZZLED
def test_swizzled_of_codes(name: FormatName, device: torch.device) -> None:
    codes, scales = torch.randn(7, 96, device=device).to(torch.float8_e4m3fn), torch.rand(7, 1, device=device)
    plain, found = both(name, "swizzled", codes, (96,), input_scale=scales)
    assert torch.equal(found.scale.view(torch.uint8), tiled(plain.scale))


@EVERY_SWIZZLED
@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (2, 0, 64)], ids=str)
def test_swizzled_of_nothing(name: FormatName, shape: tuple[int, ...], device: torch.device) -> None:
    found = quantized_rms_norm(
        torch.empty(shape, device=device), shape[-1:], format=name, scale=whole(name, device), scale_layout="swizzled"
    )
    scales = -(-FORMATS[name].scales(shape[-1]) // 4) * 4
    assert found.scale.shape == (0 if 0 in shape[:-1] else 128, scales)
    assert found.dequantize().shape == shape


@EVERY_SWIZZLED
@pytest.mark.parametrize("rows", [1, 129])
def test_torchs_products_take_it_as_it_is(name: FormatName, rows: int, device: torch.device) -> None:
    """By their own checks of shapes on a GPU, which refuse what is not swizzled; nothing is computed."""
    one = F.ScalingType.BlockWise1x32 if name == "mxfp8" else F.ScalingType.BlockWise1x16
    swizzle = F.SwizzleType.SWIZZLE_32_4_4
    (plain, x), (_, w) = (both(name, "swizzled", torch.randn(m, 320, device=device), (320,)) for m in (rows, 64))
    given = x.data, w.data.t(), x.scale, w.scale, plain.scale
    with FakeTensorMode():
        of_shape = torch.empty_strided
        a, b, of_a, of_b, by_rows = (of_shape(t.shape, t.stride(), dtype=t.dtype, device="cuda") for t in given)
        assert torch._scaled_mm(a, b, of_a, of_b, out_dtype=torch.bfloat16).shape == (rows, 64)
        assert F.scaled_mm(a, b, of_a, one, of_b, one, swizzle, swizzle).shape == (rows, 64)
        with pytest.raises(RuntimeError, match="caling"):
            torch._scaled_mm(a, b, by_rows, of_b, out_dtype=torch.bfloat16)
        with pytest.raises(RuntimeError, match="caling"):
            F.scaled_mm(a, b, by_rows, one, of_b, one, swizzle, swizzle)


# --- by columns ---


@pytest.mark.parametrize("name", ["fp8_token", "fp8_block", "fp8_block_pow2", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("leading", [(1,), (3, 5), (127,), (128,), (129,), ()], ids=str)
def test_by_columns(name: FormatName, leading: tuple[int, ...], device: torch.device) -> None:
    """Of the same shape; from a block's to the next's it is a multiple of 4 rows where scales of blocks are in fp32."""
    plain, found = both(name, "column_major", torch.randn(*leading, 264, device=device), (264,))
    assert_same(found, plain.data, plain.scale)
    rows = torch.Size(leading).numel()
    apart = -(-rows // 4) * 4 if name.startswith("fp8_block") else rows
    assert found.scale.stride() == (*torch.empty(leading).stride(), apart)
    assert torch.equal(found.dequantize(), plain.dequantize())
    assert found.scale.untyped_storage().nbytes() >= apart * found.scale.shape[-1] * found.scale.itemsize


# --- in torch ---


@pytest.mark.parametrize(
    ("norm", "name", "layout"),
    [
        *((LAYER_NORM if i % 2 else RMS_NORM, name, "column_major") for i, name in enumerate(FORMAT_NAMES)),
        (LAYER_NORM, "mxfp8", "swizzled"),
        (RMS_NORM, "nvfp4", "swizzled"),
    ],
)
def test_registered(norm: RowNorm, name: FormatName, layout: ScaleLayout, device: torch.device) -> None:
    op = getattr(torch.ops.trinorm, f"quantized_{norm.name}").default
    x, weight = torch.randn(2, 3, 160, device=device), torch.randn(160, device=device)
    for save, beside in ((False, None), (True, torch.randn_like(x))):
        opcheck(op, (x, None, beside, weight, None, whole(name, device), 1, EPS, name, layout, False, save, "output"))


@pytest.mark.parametrize(("name", "layout"), [("fp8_block", "column_major"), ("nvfp4", "swizzled")])
def test_compiled(name: FormatName, layout: ScaleLayout, device: torch.device) -> None:
    """One graph for any number of rows, with an eager call's bits, strides and gradients."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    def step(x: Tensor) -> Quantized:
        return quantized_rms_norm(x, (80,), eps=EPS, format=name, scale=whole(name, device), scale_layout=layout)

    once = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for rows in (3, 130):
        x = torch.randn(rows, 80, device=device)
        eager, (alone, leaf) = step(x), (x.clone().requires_grad_() for _ in range(2))
        for found in (once(x), compiled(x), compiled(leaf)):
            assert_same(found, eager.data, eager.scale)
            assert found.scale.stride() == eager.scale.stride() and found.scale_layout == layout and found.dims == 1
        compiled(leaf).dequantize().sin().sum().backward()
        step(alone).dequantize().sin().sum().backward()
        assert leaf.grad is not None and alone.grad is not None and torch.equal(leaf.grad, alone.grad)
    assert len(graphs) == 1


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_without_kernels(name: FormatName, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """ATen's ops make the same shape, strides and padding."""
    x = torch.where(torch.rand(2, 65, 160, device=device) < 0.5, -1.0, 1.0)
    for layout in SCALE_LAYOUTS if name in SWIZZLED else SCALE_LAYOUTS[:2]:
        how: dict[str, Any] = dict(format=name, scale=whole(name, device), scale_layout=layout)
        by_kernels = quantized_rms_norm(x, (160,), None, 0.0, **how)
        with monkeypatch.context() as patch:
            patch.setattr(road, "kernels_serve", lambda *_, **__: False)
            quantized.CALLS.clear()
            by_ops = quantized_rms_norm(x, (160,), None, 0.0, **how)
        assert_same(by_ops, by_kernels.data, by_kernels.scale)
        assert by_ops.scale.stride() == by_kernels.scale.stride()


@pytest.mark.filterwarnings("ignore:.*runs torch's own operator")  # a GPU says so of torch.func
@pytest.mark.parametrize(("name", "layout"), [("fp8_block", "column_major"), ("mxfp8", "swizzled")])
def test_transforms(name: FormatName, layout: ScaleLayout, device: torch.device) -> None:
    """A sample of vmap's has its own rows, and its own padding."""
    x, scale = torch.randn(3, 5, 160, device=device), whole(name, device)

    def loss(x: Tensor) -> tuple[Tensor, Tensor]:
        found = quantized_rms_norm(x, (160,), eps=EPS, format=name, scale=scale, scale_layout=layout)
        return found.dequantize().sin().sum(), found.scale.float()

    grads, scales = torch.func.vmap(torch.func.grad(loss, has_aux=True))(x)
    for one, grad, of in zip(x, grads, scales, strict=True):
        leaf = one.clone().requires_grad_()
        value, expected = loss(leaf)
        torch.testing.assert_close(grad, torch.autograd.grad(value, leaf)[0])
        assert torch.equal(of, expected)


@EVERY_SWIZZLED
def test_a_repeated_call(name: FormatName, device: torch.device) -> None:
    """Of other rows, and of other widths in between."""
    for rows, n in ((129, 96), (5, 96), (129, 96), (5, 160), (129, 96)):
        plain, found = both(name, "swizzled", torch.randn(rows, n, device=device), (n,))
        assert torch.equal(found.scale.view(torch.uint8), tiled(plain.scale))


# --- modules ---


@NORMS
@EVERY_SWIZZLED
def test_modules(norm: RowNorm, name: FormatName, device: torch.device) -> None:
    module: Any = (nn.QuantizedLayerNorm if norm.center else nn.QuantizedRMSNorm)(96, format=name, device=device)
    assert "scale_layout" not in repr(module) and module.scale_layout == "row_major"
    x = torch.randn(3, 96, device=device)
    plain, before = module(x), module.state_dict()
    module.scale_layout = "swizzled"
    assert "scale_layout='swizzled'" in repr(module)
    assert module.state_dict().keys() == before.keys()
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    for copied in (module, copy.deepcopy(module), torch.load(saved, weights_only=False)):
        found = copied(x)
        assert torch.equal(found.scale.view(torch.uint8), tiled(plain.scale))
        assert torch.equal(found.dequantize(), plain.dequantize())
    module.scale_layout = "columns"
    with pytest.raises(ValueError, match="scale_layout is 'columns'; it must be one of 'row_major', 'column_major', 'swiz"):
        module(x)


# --- bad input ---


@pytest.mark.parametrize("name", [name for name in FORMAT_NAMES if name not in SWIZZLED])
def test_formats_without_swizzled_scales(name: FormatName, device: torch.device) -> None:
    x, scale = torch.randn(3, 32, device=device), whole(name, device)
    message = f"scale_layout is 'swizzled', but format is '{name}'; it must be one of 'mxfp8', 'nvfp4'"
    with pytest.raises(ValueError, match=message):
        quantized_rms_norm(x, (32,), format=name, scale=scale, scale_layout="swizzled")
    with pytest.raises(RuntimeError, match="scale_layout is 'swizzled', which the format does not have"):
        torch.ops.trinorm.quantized_rms_norm(
            x, None, None, None, None, scale, 1, EPS, name, "swizzled", False, False, "output"
        )


def test_no_layout(device: torch.device) -> None:
    x: Any = torch.randn(3, 32, device=device)
    for layout in (None, True, 1, "rows", ["swizzled"]):
        with pytest.raises(ValueError, match="it must be one of 'row_major', 'column_major', 'swizzled'"):
            quantized_rms_norm(x, (32,), format="mxfp8", scale_layout=layout)
    with pytest.raises(RuntimeError, match="scale_layout is 'rows'"):
        torch.ops.trinorm.quantized_rms_norm(
            x, None, None, None, None, None, 1, EPS, "mxfp8", "rows", False, False, "output"
        )
