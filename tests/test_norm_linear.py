"""A norm into a linear layer: functional/linear.py and ops/linear.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from machine import ON_GPU
from paths import PATHS, SPECS, WIDE
from trinorm import functional, reference
from trinorm.compare import assert_no_worse
from trinorm.forced import forced
from trinorm.ops import linear
from trinorm.ops.hosts import rows
from trinorm.spec import CASTS, LAYER_NORM, RMS_NORM, RowNorm

EPS = 1e-5
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(params=SPECS)
def spec(request: pytest.FixtureRequest) -> RowNorm:
    return request.param


def together(spec: RowNorm, x: Tensor, w: Tensor | None, b: Tensor | None, *of: Tensor | None, **how: Any) -> Tensor:
    shape = how.pop("shape", x.shape[-1:])
    norm = (w, b) if spec.center else (w,)
    return getattr(functional, f"{spec.name}_linear")(x, shape, *norm, *of, eps=EPS, **how)


def apart(spec: RowNorm, x: Tensor, w: Tensor | None, b: Tensor | None, *of: Tensor | None, **how: Any) -> Tensor:
    shape = how.pop("shape", x.shape[-1:])
    norm = (w, b) if spec.center else (w,)
    return F.linear(getattr(functional, spec.name)(x, shape, *norm, eps=EPS, **how), *of)  # type: ignore[arg-type]


def draw(
    spec: RowNorm, shape: tuple[int, ...], out: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> list[Tensor | None]:
    """x, the norm's weight and bias (of a norm that has one), the linear layer's weight and bias."""
    n = shape[-1]
    x, w, b, c = (torch.randn(size, device=device).to(dtype) for size in (shape, (n,), (n,), (out,)))
    a = (torch.randn(out, n, device=device) / n**0.5).to(dtype)
    return [x, w, b if spec.center else None, a, c]


def leaves_of(given: list[Tensor | None], wanted: tuple[bool, ...] = (True,) * 5) -> list[Tensor | None]:
    return [None if t is None else t.detach().requires_grad_(on) for t, on in zip(given, wanted, strict=True)]


def gradients(function: Callable[..., Tensor], given: list[Tensor | None], dy: Tensor) -> list[Tensor]:
    """z, and the gradients of all that is there."""
    leaves = leaves_of(given)
    z = function(*leaves)
    return [z.detach(), *torch.autograd.grad(z, [t for t in leaves if t is not None], dy)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


def kept_by(function: Callable[..., Tensor], *given: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """z, and what is kept for its backward."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        z = function(*given)
    return z, kept


def bytes_of(kept: list[Tensor], given: list[Tensor | None]) -> int:
    """Of what is kept besides what was given, each storage once."""
    theirs = {t.untyped_storage().data_ptr() for t in given if t is not None}
    more = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for address, size in more.items() if address not in theirs)


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("shape", [(40, 96), (2, 5, 300)], ids=str)
def test_beside_float64(spec: RowNorm, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    given = draw(spec, shape, 33, device, dtype)
    x, w, b, a, c = given
    assert x is not None
    assert a is not None
    assert c is not None
    dz = torch.randn(*shape[:-1], 33, device=device).to(dtype)
    found = gradients(lambda *t: together(spec, *t), given, dz)
    by_torch = gradients(
        lambda x, w, b, *of: F.linear(reference.composite(spec, x, x.shape[-1:], w, b, EPS), *of), given, dz
    )
    problem = spec, x, shape[-1:], w, b, EPS
    y, flat = reference.oracle(*problem).y, dz.double().flatten(0, -2)
    of_norm = reference.oracle_gradients(*problem, dz.double() @ a.double())
    exact = [y @ a.double().T + c.double(), *(t for t in of_norm if t is not None), flat.T @ y.flatten(0, -2), flat.sum(0)]
    names = ("z", "dx", "dw", *(["db"] if spec.center else []), "dA", "dc")
    for what, got, want, torchs in zip(names, found, exact, by_torch, strict=True):
        assert_no_worse(what, got, want, torchs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "biased"), [((96,), True), ((7, 96), True), ((2, 3, 40), True), ((2, 3, 40), False)], ids=str
)
def test_the_bits_of_the_two_functions(
    spec: RowNorm, dtype: torch.dtype, shape: tuple[int, ...], biased: bool, device: torch.device
) -> None:
    given = draw(spec, shape, 24, device, dtype)
    given[4] = given[4] if biased else None
    for _ in range(2):  # the second is a repetition
        dz = torch.randn(*shape[:-1], 24, device=device).to(dtype)
        found = gradients(lambda *t: together(spec, *t), given, dz)
        assert_same(found, gradients(lambda *t: apart(spec, *t), given, dz))


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("batch_invariant", [True, False])
def test_the_bits_of_the_norms_modes(spec: RowNorm, cast: str, batch_invariant: bool, device: torch.device) -> None:
    given, dz = draw(spec, (9, 96), 24, device, torch.bfloat16), torch.randn(9, 24, device=device).bfloat16()
    how = dict(cast=cast, batch_invariant=batch_invariant)
    found = gradients(lambda *t: together(spec, *t, **how), given, dz)
    assert_same(found, gradients(lambda *t: apart(spec, *t, **how), given, dz))


def test_the_bits_of_other_layouts(spec: RowNorm, device: torch.device) -> None:
    packed = torch.randn(4, 6, 96, device=device)
    _, *others = draw(spec, (4, 6, 32), 24, device)
    for x in (packed[..., 32:64], packed.transpose(0, 1)[..., :32], packed[..., ::3], torch._neg_view(packed[..., :32])):
        dz = torch.randn(*x.shape[:-1], 24, device=device).transpose(0, 1).contiguous().transpose(0, 1)
        for _ in range(2):
            leaf = x.detach().requires_grad_()
            z, kept = kept_by(lambda *t: together(spec, *t), *leaves_of([leaf, *others]))
            assert bytes_of(kept, [leaf, *others]) == 24 * (8 if spec.center else 4), "no copy of x is kept"
            assert torch.equal(z, apart(spec, x, *others))
            found = gradients(lambda *t: together(spec, *t), [x, *others], dz)
            assert_same(found, gradients(lambda *t: apart(spec, *t), [x, *others], dz))


def test_several_dims_and_no_parameters(spec: RowNorm, device: torch.device) -> None:
    x, _, _, a, _ = draw(spec, (5, 4, 16), 24, device)
    dz = torch.randn(5, 4, 24, device=device)
    for parameters in ((torch.randn(4, 16, device=device), None), (None, None)):
        given, how = [x, *parameters, a, None], dict(shape=(4, 16))
        found = gradients(lambda *t, how=how: together(spec, *t, **how), given, dz)
        assert_same(found, gradients(lambda *t, how=how: apart(spec, *t, **how), given, dz))


@pytest.mark.parametrize("path", [*PATHS, "wide"])
def test_y_is_made_again_bit_for_bit(
    spec: RowNorm, path: str, device: torch.device, monkeypatch: pytest.MonkeyPatch, launched: list[object]
) -> None:
    """By the same launch as the forward's, whichever that is."""
    again: list[Tensor] = []
    actual = linear._again
    monkeypatch.setattr(linear, "_again", lambda *a: (again.append(actual(*a)), again[-1])[1])
    forward, backward = (PATHS | {"wide": WIDE})[path]
    with forced(forward=forward, backward=backward):
        given = draw(spec, (5, 1100), 8, device)
        x, w, b, *_ = given
        y, *_ = rows.forward(spec, x, 1, w, b, EPS, save=True)
        for _ in range(2):
            launched.clear()
            z = together(spec, *leaves_of(given))
            of_forward = list(launched)
            launched.clear()
            z.backward(torch.ones_like(z))
            assert launched[: len(of_forward)] == of_forward
            assert torch.equal(again.pop(), y)


@pytest.mark.parametrize("wanted", [w for w in itertools.product((False, True), repeat=5) if any(w)], ids=str)
def test_only_what_is_asked_for(wanted: tuple[bool, ...], device: torch.device, launched: list[object]) -> None:
    given, dz = draw(LAYER_NORM, (5, 40), 8, device), torch.randn(5, 8, device=device)
    names: list[list[str]] = []
    for function in (together, apart):
        leaves = leaves_of(given, wanted)
        z = function(LAYER_NORM, *leaves)
        launched.clear()
        z.backward(dz)
        names.append([kernel.fn.__name__ for kernel in launched])  # type: ignore[attr-defined]
        if function is together:
            found = leaves
    for got, want in zip(found, leaves, strict=True):
        assert (got.grad is None) == (want.grad is None)  # type: ignore[union-attr]
        assert got.grad is None or torch.equal(got.grad, want.grad)  # type: ignore[union-attr]
    of_forward = [name for name in names[0] if "forward" in name]
    assert bool(of_forward) == wanted[3], "y is made for the linear weight's gradient alone"
    assert [name for name in names[0] if name not in of_forward] == names[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_kept(spec: RowNorm, dtype: torch.dtype, device: torch.device) -> None:
    """Besides what was given, of m rows of n: the statistics; where the two functions keep y too."""
    m, n = 12, 4096
    given = leaves_of(draw(spec, (m, n), 16, device, dtype))
    statistics = m * (8 if spec.center else 4)
    z, kept = kept_by(lambda *t: together(spec, *t), *given)
    assert bytes_of(kept, given) == statistics
    assert not any(t.untyped_storage().data_ptr() == z.untyped_storage().data_ptr() for t in kept)
    _, kept = kept_by(lambda *t: apart(spec, *t), *given)
    assert bytes_of(kept, given) == statistics + m * n * dtype.itemsize
    # Whoever has x of an op that does not keep it has half to keep.
    of_x = m * n * dtype.itemsize
    assert (statistics + of_x) / (statistics + 2 * of_x) == pytest.approx(0.5, rel=2e-3)


def test_bytes_kept_of_a_transformers_layer(device: torch.device) -> None:
    """Two norms into one linear layer each, on a residual stream: less two y."""
    m, n, kept_bytes = 16, 64, {}
    x = torch.randn(m, n, device=device, requires_grad=True)
    sizes = ((n,), (3 * n, n), (n, n), (n,), (8 * n, n), (n, 4 * n))
    w, qkv, o, w2, gate_up, down = parameters = [torch.randn(s, device=device, requires_grad=True) for s in sizes]
    for function in (together, apart):

        def layer(x: Tensor, function: Callable[..., Tensor] = function) -> Tensor:
            q, k, v = function(RMS_NORM, x, w, None, qkv).view(m, 3, 4, 16).permute(1, 2, 0, 3)[:, None]
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + F.linear(attended[0].transpose(0, 1).reshape(m, n), o)
            gate, up = function(RMS_NORM, x, w2, None, gate_up).chunk(2, -1)
            return x + F.linear(F.silu(gate) * up, down)

        _, kept = kept_by(layer, x)
        kept_bytes[function] = bytes_of(kept, parameters)
    assert kept_bytes[apart] - kept_bytes[together] == 2 * m * n * 4


@pytest.mark.skipif(not ON_GPU, reason="no GPU whose memory could be measured")
def test_memory_of_a_gpu(spec: RowNorm, device: torch.device) -> None:
    """Of ten layers, one behind the other: what is in use after the forward, and the most in use in the backward."""
    used = {}
    given = leaves_of(draw(spec, (4096, 2048), 2048, device, torch.bfloat16))
    for function in (together, apart):
        for _ in range(2):  # the first loads kernels and makes workspaces
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            z = given[0]
            for _ in range(10):
                z = function(spec, z, *given[1:])
            after = torch.cuda.memory_allocated() - before
            z.sum().backward()  # type: ignore[union-attr]
            used[function] = after, torch.cuda.max_memory_allocated() - before
            for t in given:
                if t is not None:
                    t.grad = None
            del z
    of_y = 4096 * 2048 * 2
    assert used[apart][0] - used[together][0] >= 10 * of_y
    assert used[apart][1] - used[together][1] >= 9 * of_y, "one y is there at a time"


def test_inference_keeps_nothing(spec: RowNorm, device: torch.device, launched: list[object]) -> None:
    given = draw(spec, (5, 40), 8, device)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            launched.clear()
            z, kept = kept_by(lambda *t: together(spec, *t), *given)
            assert len(launched) == 1
            assert not kept
            assert torch.equal(z, apart(spec, *given))


@pytest.mark.parametrize(("shape", "out"), [((0, 8), 3), ((3, 0, 8), 3), ((4, 0), 3), ((4, 8), 0), ((0, 0), 0)], ids=str)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_no_elements(spec: RowNorm, shape: tuple[int, ...], out: int, device: torch.device) -> None:
    x, *of_norm = (torch.randn(size, device=device) for size in (shape, shape[-1:], shape[-1:]))
    of_norm[1:] = of_norm[1:] if spec.center else [None]
    given = [x, *of_norm, torch.randn(out, shape[-1], device=device), torch.randn(out, device=device)]
    dz = torch.randn(*shape[:-1], out, device=device)
    found = gradients(lambda *t: together(spec, *t), given, dz)
    assert_same(found, gradients(lambda *t: apart(spec, *t), given, dz))


def _x(*shape: int, **how: Any) -> Tensor:
    return torch.ones(shape or (3, 8), **how)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (dict(input=None), TypeError, "input must be a Tensor"),
        (dict(linear_weight=None), TypeError, "linear_weight must be a Tensor, not NoneType"),
        (dict(linear_bias=1.0), TypeError, "linear_bias must be a Tensor or None, not float"),
        (dict(weight=_x(7)), RuntimeError, "weight has shape"),
        (dict(normalized_shape=8), TypeError, "normalized_shape must be"),
        (dict(normalized_shape=(7,)), RuntimeError, "normalized_shape is"),
        (dict(eps=-1.0), ValueError, "eps is"),
        (dict(cast="wide"), ValueError, "cast is"),
        (dict(batch_invariant=1), TypeError, "batch_invariant must be"),
        (dict(linear_weight=_x(8)), RuntimeError, r"linear_weight has shape \(8,\); it must be \(out_features, 8\)"),
        (dict(linear_weight=_x(8, 5)), RuntimeError, r"linear_weight has shape \(8, 5\); it must be \(out_features, 8\)"),
        (dict(linear_weight=_x(5, 8).to_sparse()), NotImplementedError, "linear_weight has layout"),
        (dict(linear_weight=_x(5, 8).int()), NotImplementedError, "linear_weight has dtype torch.int32"),
        (
            dict(linear_weight=_x(5, 8).half()),
            RuntimeError,
            r"linear_weight has dtype .*: linear_weight.to\(torch.float32\)",
        ),
        (dict(linear_weight=_x(5, 8, device="meta")), RuntimeError, "linear_weight is on meta"),
        (dict(linear_bias=_x(8)), RuntimeError, r"linear_bias has shape \(8,\); it must be \(5,\)"),
        (
            dict(linear_bias=_x(5).double()),
            RuntimeError,
            r"linear_bias has dtype .*: linear_bias.to\(torch.float32\), or auto",
        ),
        (dict(linear_bias=_x(5, device="meta")), RuntimeError, "linear_bias is on meta"),
    ],
)
def test_bad_input(given: dict[str, Any], kind: type[Exception], message: str, spec: RowNorm) -> None:
    good: dict[str, Any] = dict(input=_x(), normalized_shape=(8,), weight=None, linear_weight=_x(5, 8))
    function = getattr(functional, f"{spec.name}_linear")
    if spec.center:
        good["bias"] = None
    for _ in range(2):
        with pytest.raises(kind, match=rf"{spec.name}_linear\(\): {message}"):
            function(**good | given)
        function(**good)


def test_more_dims_than_the_inputs() -> None:
    """torch's own classes of error, which differ."""
    for function, kind in ((functional.rms_norm_linear, ValueError), (functional.layer_norm_linear, RuntimeError)):
        with pytest.raises(kind, match="normalized_shape is"):
            function(_x(8), (3, 8), None, linear_weight=_x(5, 8), **({} if kind is ValueError else dict(bias=None)))


def test_epsilon_of_its_own(device: torch.device) -> None:
    for dtype in (torch.float32, torch.float64):
        x, a = (torch.randn(3, 8, device=device).to(dtype) * 1e-4 for _ in range(2))
        expected = F.linear(functional.rms_norm(x, (8,)), a)
        assert torch.equal(functional.rms_norm_linear(x, (8,), None, a), expected)
