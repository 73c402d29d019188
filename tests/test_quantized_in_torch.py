"""Norms with a quantized result in PyTorch: registered ops, compiled graphs, transforms, modules, bad input."""

from __future__ import annotations

import copy
import functools
import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from machine import ON_GPU
from test_quantized import EPS, EVERY_FORMAT, NORMS, as_bytes, assert_same, ours, whole
from trinorm import functional, nn
from trinorm.formats import FORMAT_NAMES, FORMATS, FormatName
from trinorm.functional import Quantized, quantized_layer_norm, quantized_rms_norm
from trinorm.ops import quantized, road
from trinorm.spec import LAYER_NORM, RowNorm


def draw(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, a residual and a weight."""
    return [torch.randn(s, device=device).to(dtype) for s in (shape, shape, shape[-1:])]


@NORMS
@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_registered(norm: RowNorm, name: FormatName, device: torch.device) -> None:
    op = getattr(torch.ops.trinorm, f"quantized_{norm.name}").default
    x, residual, weight = draw(2, 3, 32, device=device)
    for layout, save, beside in (("row_major", False, None), ("column_major", True, residual)):
        opcheck(op, (x, None, beside, weight, None, whole(name, device), 1, EPS, name, layout, False, save, "output"))


@pytest.mark.parametrize("name", ["fp8_token", "nvfp4"])
def test_compiled(name: FormatName, device: torch.device) -> None:
    """One graph for any number of rows, with an eager call's bits, and its gradients."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    def step(x: Tensor, residual: Tensor, weight: Tensor) -> Quantized:
        return quantized_rms_norm(x, (32,), weight, EPS, format=name, residual=residual, scale=whole(name, device))

    once = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for rows in (3, 5, 6):
        given = draw(2, rows, 32, device=device, dtype=torch.bfloat16)
        eager, together = step(*given), once(*given)
        assert_same(together, eager.data, eager.scale)
    assert len(graphs) == 1
    grads = []
    for call in (step, compiled):
        leaves = [t.clone().requires_grad_() for t in given]
        found = call(*leaves)
        assert found.residual is not None
        (found.dequantize().float().square().sum() + found.residual.float().sum()).backward()
        grads.append([leaf.grad for leaf in leaves])
    for a, b in zip(*grads, strict=True):
        assert a is not None and b is not None and torch.equal(a, b)


def test_exported(device: torch.device) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.QuantizedRMSNorm(32, format="fp8_block", device=device)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            found = self.norm(x)
            return found.data, found.scale

    model, (x, *_) = Model(), draw(4, 32, device=device)
    with torch.no_grad():
        data, scale = torch.export.export(model, (x,)).module()(x)
        assert_same(model.norm(x), data, scale)


@NORMS
def test_second_derivatives(norm: RowNorm, device: torch.device) -> None:
    """As of the norm itself: what was rounded counts as not rounded."""
    x, _, weight = (t.double() for t in draw(3, 12, device=device))
    dy = torch.randn(3, 12, device=device, dtype=torch.float64)
    found = []
    plain = getattr(functional, norm.name)
    for quantized_result in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, weight, dy)]
        if quantized_result:
            y = ours(norm, leaves[0], (12,), leaves[1], format="fp8_token").dequantize()
        else:
            y = plain(leaves[0], (12,), leaves[1], eps=EPS)
        first = torch.autograd.grad(y, leaves[:2], leaves[2], create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(g.sin().sum() for g in first), leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:.*runs torch's own operator")  # a GPU says so of torch.func and forward mode
def test_transforms(device: torch.device) -> None:
    x, _, weight = draw(4, 16, device=device)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return quantized_rms_norm(x, (16,), weight, EPS, format="fp8_token").dequantize().sin().sum()

    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for a, b in zip(torch.func.grad(loss, (0, 1))(x, weight), expected, strict=True):
        torch.testing.assert_close(a, b)
    each = torch.func.vmap(torch.func.grad(loss, (0, 1)), (0, None))(x, weight)
    torch.testing.assert_close(each[0], expected[0])
    torch.testing.assert_close(each[1].sum(0), expected[1])

    def data(x: Tensor) -> Tensor:
        return quantized_rms_norm(x, (16,), weight, EPS, format="int8_token").data

    assert torch.equal(torch.func.vmap(data)(x), data(x))


@pytest.mark.filterwarnings("ignore:.*runs torch's own operator")
@pytest.mark.parametrize("name", ["fp8_token", "int8_token"])
def test_transforms_of_transforms_and_compiled(name: FormatName, device: torch.device) -> None:
    """Whose tensors do not say that a gradient is asked for."""
    x, residual, weight = draw(2, 3, 16, device=device)
    grad, vmap = torch.func.grad, torch.func.vmap

    def loss(x: Tensor, residual: Tensor | None = None) -> Tensor:
        found = quantized_rms_norm(x, (16,), weight, EPS, format=name, residual=residual)
        return found.dequantize().sin().sum() + (0 if found.residual is None else found.residual.cos().sum())

    of_both, of_x = grad(loss, (0, 1)), grad(loss)
    leaves = [t.clone().requires_grad_() for t in (x, residual)]
    want = torch.autograd.grad(loss(*leaves), leaves)
    (alone,) = torch.autograd.grad(loss(leaves[0]), leaves[:1])
    for found in (of_both(x, residual), torch.compile(lambda *z: of_both(*z), backend="aot_eager")(x, residual)):
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b)
    each = vmap(vmap(of_x))
    for of in (
        each,
        torch.compile(lambda x: each(x), backend="aot_eager", fullgraph=True),
        grad(lambda x: vmap(vmap(loss))(x).sum()),
        grad(torch.func.functionalize(loss)),
    ):
        torch.testing.assert_close(of(x), alone)
    assert vmap(vmap(loss))(leaves[0]).requires_grad
    with torch.no_grad():
        assert not vmap(loss)(leaves[0]).requires_grad


@pytest.mark.filterwarnings("ignore:.*runs torch's own operator")
def test_forward_mode_of_fp64_is_of_fp64(device: torch.device) -> None:
    x, tangent, weight = draw(3, 32, device=device, dtype=torch.float64)

    def straight(x: Tensor) -> Tensor | None:
        return quantized_rms_norm(x, (32,), weight, EPS, format="fp8_token").straight

    plain = functools.partial(functional.rms_norm, normalized_shape=(32,), weight=weight, eps=EPS)
    torch.testing.assert_close(*(torch.func.jvp(of, (x,), (tangent,))[1] for of in (straight, plain)))


@pytest.mark.filterwarnings("ignore:.*runs torch's own operator")
def test_a_tensor_subclass_and_another_default_dtype(device: torch.device) -> None:
    class Own(Tensor):
        pass

    x, residual, weight = draw(3, 32, device=device)
    plain, found = (
        quantized_rms_norm(t, (32,), weight, EPS, format="nvfp4", scale=whole("nvfp4", device), residual=residual)
        for t in (x, x.as_subclass(Own))
    )
    assert isinstance(found, Quantized) and isinstance(found.scale, Own) and found.format == "nvfp4"
    assert_same(found, plain.data, plain.scale)
    torch.set_default_dtype(torch.float64)
    try:
        assert plain.dequantize().dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_scale_that_is_given_has_no_derivative(device: torch.device) -> None:
    x, scale = torch.randn(3, 32, device=device), torch.full((), 0.01, device=device)

    def dequantized(scale: Tensor) -> Tensor:
        return quantized_rms_norm(x, (32,), format="fp8", scale=scale).dequantize()

    with pytest.raises(RuntimeError, match="scale requires a gradient, and there is none"):
        torch.func.grad(lambda scale: dequantized(scale).sum())(scale)
    with pytest.raises(RuntimeError, match="scale has a tangent, and there is none"):
        torch.func.jvp(dequantized, (scale,), (torch.ones_like(scale),))


@NORMS
@pytest.mark.filterwarnings("ignore:.*runs torch's own operator")  # a GPU says so of torch.func and forward mode
def test_forward_mode(norm: RowNorm, device: torch.device) -> None:
    """The norm's own, whether or not a gradient is asked for."""
    (x, residual, weight), tangents = (draw(3, 16, device=device) for _ in range(2))
    add = getattr(functional, f"add_{norm.name}")

    def quantized_sum(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        found = ours(norm, x, (16,), weight, format="fp8_token", residual=residual)
        assert found.residual is not None
        return found.dequantize(), found.residual

    given = (x, residual, weight), tuple(tangents)
    (_, got), (_, want) = (torch.func.jvp(of, *given) for of in (quantized_sum, functools.partial(add, eps=EPS)))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


def test_a_function_of_ones_own_hands_in_the_gradient(device: torch.device) -> None:
    """A product in fp8 takes data and scale, and gives ``straight`` the gradient of y."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, straight: Tensor, data: Tensor, scale: Tensor, a: Tensor) -> Tensor:
            ctx.save_for_backward(a)
            return (data.float() * scale).to(a.dtype) @ a

        @staticmethod
        def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
            return dz @ ctx.saved_tensors[0].t(), None, None, None

    x, _, weight = (t.requires_grad_() for t in draw(5, 32, device=device))
    a, dz = torch.randn(32, 7, device=device), torch.randn(5, 7, device=device)
    found = quantized_rms_norm(x, (32,), weight, EPS, format="fp8_token")
    got = torch.autograd.grad(Product.apply(found.straight, found.data, found.scale, a), (x, weight), dz)
    y = functional.rms_norm(x, (32,), weight, EPS)
    for one, other in zip(got, torch.autograd.grad(y, (x, weight), dz @ a.t()), strict=True):
        torch.testing.assert_close(one, other)


def test_no_gradient_is_kept_where_none_is_asked(device: torch.device) -> None:
    x, _, weight = draw(3, 32, device=device)
    for found in (
        quantized_rms_norm(x, (32,), weight, format="fp8_token"),
        torch.no_grad()(quantized_rms_norm)(x.clone().requires_grad_(), (32,), weight, format="fp8_token"),
    ):
        assert found.straight is None and found.dequantize().dtype == torch.float32
        assert not found.dequantize(torch.bfloat16).requires_grad


@EVERY_FORMAT
def test_nothing_to_normalize(name: FormatName, device: torch.device) -> None:
    found = quantized_rms_norm(torch.empty(2, 0, 32, device=device), (32,), format=name, scale=whole(name, device))
    assert found.data.shape == (2, 0, 32 // FORMATS[name].packed)
    assert FORMATS[name].scaling == "tensor" or found.scale.shape == (2, 0, FORMATS[name].scales(32))


def test_without_kernels(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """ATen's ops make the same, but for y's last bit."""
    x, residual, weight = draw(4, 256, device=device, dtype=torch.bfloat16)
    for name, layout in itertools.product(FORMAT_NAMES, ("row_major", "column_major")):
        how: dict[str, Any] = dict(format=name, scale=whole(name, device), residual=residual, scale_layout=layout)
        by_kernels = quantized_rms_norm(x, (256,), weight, EPS, **how)
        with monkeypatch.context() as patch:
            patch.setattr(road, "kernels_serve", lambda *_, **__: False)
            quantized.CALLS.clear()
            by_ops = quantized_rms_norm(x, (256,), weight, EPS, **how)
        assert by_ops.scale.stride() == by_kernels.scale.stride()
        assert by_ops.data.dtype == by_kernels.data.dtype and by_ops.scale.dtype == by_kernels.scale.dtype
        assert (as_bytes(by_ops.data) != as_bytes(by_kernels.data)).float().mean() < 0.01


def test_wide_rows_have_torchs_ops(device: torch.device) -> None:
    x = torch.randn(2, 9000, device=device)
    road._warn_once.cache_clear()
    if ON_GPU:
        with pytest.warns(UserWarning, match="over 32768 bytes"):
            found = quantized_rms_norm(x, (9000,), format="int8_token")
    else:
        found = quantized_rms_norm(x, (9000,), format="int8_token")
    y = torch.nn.functional.rms_norm(x.double(), (9000,), eps=torch.finfo(torch.float32).eps)
    assert ((found.dequantize() - y).abs() <= found.scale * 0.501).all()


# --- modules ---


@NORMS
@EVERY_FORMAT
def test_modules(norm: RowNorm, name: FormatName, device: torch.device) -> None:
    kind: Any = nn.QuantizedLayerNorm if norm.center else nn.QuantizedRMSNorm
    torchs: Any = torch.nn.LayerNorm if norm.center else torch.nn.RMSNorm
    module = kind(32, eps=EPS, format=name, device=device)
    other = torchs(32, eps=EPS, device=device)
    torch.nn.init.normal_(other.weight)
    assert isinstance(module, torchs)
    missing = module.load_state_dict(other.state_dict(), strict=False).missing_keys
    assert missing == (["scale"] if FORMATS[name].given else [])
    if module.scale is not None:
        module.scale.fill_(0.02)
    expected_scale = None if module.scale is None else module.scale.tolist()
    x, residual, _ = draw(3, 32, device=device, dtype=torch.float32)
    parameters = (module.weight, module.bias) if norm.center else (module.weight,)
    expected = ours(norm, x, (32,), *parameters, format=name, scale=module.scale, residual=residual)
    assert f"format={name!r}" in repr(module)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    for copied in (module, copy.deepcopy(module), torch.load(saved, weights_only=False)):
        assert_same(copied(x, residual), expected.data, expected.scale)
    assert module.to(torch.float16)(x.half()).scale.dtype == FORMATS[name].scale_dtype
    module.float()
    if module.scale is not None:
        assert module.scale.tolist() == expected_scale
        module.reset_parameters()
        assert module.scale.tolist() == [1.0]
    module.scale_layout = "column_major"
    assert "scale_layout='column_major'" in repr(module)
    module(x).dequantize().sum().backward()
    assert module.weight.grad is not None
    with torch.device("meta"):
        assert kind(32, format=name).weight.is_meta


# --- bad input ---


@NORMS
def test_bad_input(norm: RowNorm, device: torch.device) -> None:
    call: Any = quantized_layer_norm if norm is LAYER_NORM else quantized_rms_norm
    x, residual, weight = draw(3, 32, device=device)
    one, codes = torch.ones(1, device=device), x.to(torch.float8_e4m3fn)
    for error, message, given, how in (
        (ValueError, "format is 'fp9'", x, dict(format="fp9")),
        (ValueError, "format is None", x, dict(format=None)),
        (ValueError, "scale is None, but with format 'fp8'", x, dict(format="fp8")),
        (ValueError, "scale is given, but with format 'mxfp8'", x, dict(format="mxfp8", scale=one)),
        (ValueError, "input_scale is None", codes, dict(format="fp8_token")),
        (ValueError, "input_scale is given", x, dict(format="fp8_token", input_scale=one)),
        (RuntimeError, "scale has shape", x, dict(format="fp8", scale=torch.ones(2, device=device))),
        (NotImplementedError, "scale has dtype", x, dict(format="fp8", scale=one.int())),
        (RuntimeError, "scale requires a gradient", x, dict(format="fp8", scale=one.clone().requires_grad_())),
        (RuntimeError, "input_scale has shape", codes, dict(format="fp8_token", input_scale=one.expand(2))),
        (RuntimeError, "residual has shape", x, dict(format="fp8_token", residual=residual[:2])),
        (TypeError, "residual must be a Tensor", x, dict(format="fp8_token", residual=1)),
        (TypeError, "scale must be a Tensor", x, dict(format="fp8", scale=0.5)),
        (ValueError, "scale_layout is 1", x, dict(format="fp8_token", scale_layout=1)),
        (ValueError, "cast is", x, dict(format="fp8_token", cast="wide")),
        (ValueError, "eps is", x, dict(format="fp8_token", eps=-1.0)),
        (NotImplementedError, "input has dtype", x.int(), dict(format="fp8_token")),
        (TypeError, "input must be a Tensor", 1, dict(format="fp8_token")),
    ):
        with pytest.raises(error, match=message):
            call(given, (32,), weight, **how)
    with pytest.raises(RuntimeError, match="must be even"):
        call(x[:, :31], (31,), format="nvfp4", scale=one)
    with pytest.raises(RuntimeError, match="weight has shape"):
        call(x, (32,), weight[:31], format="fp8_token")
    with pytest.raises(ValueError, match="format is"):
        nn.QuantizedRMSNorm(32, format="int4")


@NORMS
def test_a_registered_op_reads_nothing_that_is_not_there(norm: RowNorm, device: torch.device) -> None:
    op = getattr(torch.ops.trinorm, f"quantized_{norm.name}")
    x, residual, weight = draw(3, 32, device=device)
    one = torch.ones(1, device=device)
    how = (1, EPS, "fp8_token", "row_major", False, False, "output")
    for given, rest in (
        ((x, None, residual[:2], weight, None, None), how),
        ((x, None, None, weight[:3], None, None), how),
        ((x, one, None, weight, None, None), how),
        ((x, None, None, weight, None, one), how),
        ((x, None, None, weight, None, None), (3, *how[1:])),
        ((x, None, None, weight, None, None), (1, EPS, "fp9", *how[3:])),
        ((x, None, None, weight, None, None), (*how[:-1], "wide")),
    ):
        with pytest.raises((RuntimeError, KeyError)):
            op(*given, *rest)


def test_shapes_without_elements(device: torch.device) -> None:
    for name in FORMAT_NAMES[1:6]:
        assert quantized_rms_norm(torch.empty(2, 0, device=device), (0,), format=name).data.shape == (2, 0)


def test_zeros_keep_their_sign(device: torch.device) -> None:
    """Whether or not a gradient is asked for."""
    x = torch.tensor([[-1e-30, 1.0, -0.0, 0.0]], device=device)
    found = quantized_rms_norm(x.clone().requires_grad_(), (4,), format="fp8_token").dequantize()
    assert found.signbit().tolist() == [[True, False, True, False]]


def test_calls_are_remembered(device: torch.device) -> None:
    x, _, weight = draw(3, 32, device=device)
    quantized.CALLS.clear()
    for _ in range(5):
        found = quantized_rms_norm(x, (32,), weight, EPS, format="fp8_block")
        again = quantized_rms_norm(x * 2, (32,), weight, EPS * 4, format="fp8_block")
        assert_same(again, found.data, found.scale)
    assert len(quantized.CALLS._kept) == 2
