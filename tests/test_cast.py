"""The casting modes: where a norm is rounded, and what its weight is kept as."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import trinorm
from machine import JACOBIAN, ON_GPU
from paths import PATHS, SPLIT, WIDE
from trinorm import functional, nn, reference
from trinorm.compare import assert_no_worse
from trinorm.ops import road
from trinorm.ops.hosts import rows
from trinorm.spec import CASTS, LAYER_NORM, RMS_NORM, Cast, RowNorm

HALVES = [torch.float16, torch.bfloat16]
FLOATS = [*HALVES, torch.float32, torch.float64]
CAST_SPECS = [
    pytest.param(spec.with_cast(cast), id=f"{spec.name}-{cast}")
    for spec, cast in itertools.product((LAYER_NORM, RMS_NORM), CASTS)
    if cast != "output"
]


@pytest.fixture(params=CAST_SPECS)
def spec(request: pytest.FixtureRequest) -> RowNorm:
    return request.param


def inputs(spec: RowNorm, shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype], device: torch.device) -> Any:
    """x, weight and a bias for a norm that has one; dy."""
    dtype, of_weight = dtypes
    x, dy = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(shape[-1], device=device).to(of_weight).requires_grad_() for _ in range(2))
    return [x.requires_grad_(), weight, *([bias] if spec.center else [])], dy


def norm(spec: RowNorm, x: Tensor, *parameters: Tensor | None, **how: Any) -> Tensor:
    return getattr(functional, spec.name)(x, x.shape[-1:], *parameters, eps=1e-5, cast=spec.cast, **how)


def registered(spec: RowNorm, x: Tensor, *parameters: Tensor | None) -> Tensor:
    return getattr(torch.ops.trinorm, spec.name)(x, x.shape[-1:], *parameters, 1e-5, False, spec.cast)[0]


def written_out(spec: RowNorm, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The norm as a model's own code has it, and nothing of ours: the yardstick, of its gradients too."""
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    xhat = x.to(wide)
    xhat = xhat - xhat.mean(-1, keepdim=True) if spec.center else xhat
    xhat = xhat * torch.rsqrt(xhat.pow(2).mean(-1, keepdim=True) + 1e-5)
    xhat = xhat.to(x.dtype).to(wide) if spec.cast == "llama" else xhat
    y = xhat * (1.0 + weight.to(wide) if spec.cast == "gemma" else weight.to(wide))
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def assert_right(spec: RowNorm, f: Callable[..., Tensor], given: list[Tensor], dy: Tensor) -> None:
    """Value and gradients no further from the definition than twice what a model's own code makes of the same casts."""
    x, weight, *bias = given
    problem = spec, x.detach(), x.shape[-1:], weight.detach(), bias[0].detach() if bias else None, 1e-5
    y, theirs = f(spec, *given), written_out(spec, *given)
    assert y.dtype == x.dtype
    assert_no_worse("y", y.detach(), reference.oracle(*problem).y, theirs.detach())
    gradients = (torch.autograd.grad(result, given, dy) for result in (y, theirs))
    exact = reference.oracle_gradients(*problem, dy)
    for what, want, got, by_torch in zip(exact._fields, exact, *gradients, strict=False):
        assert_no_worse(what, got, want, by_torch)


@pytest.mark.parametrize("path", [*PATHS, "split", "wide"])
@pytest.mark.parametrize("n", [1000, *((3072,) if ON_GPU else ())])
def test_every_kernel(spec: RowNorm, path: str, n: int, force: Any, device: torch.device) -> None:
    launches = PATHS.get(path) or (SPLIT if path == "split" else WIDE)
    if path == "split":
        if device.type == "cpu":
            pytest.skip("programs of a team wait for each other")
        if n % 1024:
            pytest.skip("a team takes whole blocks")
    force(*launches)
    given, dy = inputs(spec, (37 if ON_GPU else 13, n), (torch.bfloat16, torch.bfloat16), device)
    assert_right(spec, norm, given, dy)


@pytest.mark.parametrize("dtypes", [*itertools.product(FLOATS, [torch.bfloat16, torch.float32, torch.float64])], ids=str)
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "composite"])
def test_dtypes(
    spec: RowNorm, dtypes: tuple[torch.dtype, torch.dtype], kernels: bool, device: torch.device, monkeypatch: Any
) -> None:
    if not kernels:
        device = torch.device("cpu")
        monkeypatch.setattr(road, "INTERPRETED", False)
    given, dy = inputs(spec, (40, 96), dtypes, device)
    assert_right(spec, norm, given, dy)
    if ON_GPU or dtypes[1] == torch.float32:  # the same kernels, which the interpreter takes long for
        assert_right(spec, registered, given, dy)


def test_rows_beyond_fp32s_squares(spec: RowNorm, device: torch.device) -> None:
    (x, *parameters), _ = inputs(spec, (40, 96), (torch.bfloat16, torch.bfloat16), device)
    scaled = x.detach() * 2.0**100
    with torch.no_grad():
        assert torch.equal(norm(spec, scaled, *parameters), norm(spec, scaled * 2.0**-50, *parameters))


# --- bit for bit ---


def by_casts(spec: RowNorm, x: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor) -> Tensor:
    """The casts that the mode is named for, in torch's operators, of given statistics."""
    xhat = (x.float() if mean is None else x.float() - mean[:, None]) * rstd[:, None]
    xhat = xhat.to(x.dtype).float() if spec.cast == "llama" else xhat
    return (xhat * (1.0 + weight.float() if spec.cast == "gemma" else weight.float())).to(x.dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("base", [LAYER_NORM, RMS_NORM], ids=lambda spec: spec.name)
@pytest.mark.parametrize("n", [96, 1000, 4096, *((2048, 8192, 16384, 65536) if ON_GPU else ())])
def test_statistics_given_every_bit_is_the_models(
    cast: Cast, n: int, dtype: torch.dtype, base: RowNorm, device: torch.device
) -> None:
    spec = base.with_cast(cast)
    x, weight = torch.randn(64 if ON_GPU else 16, n, device=device).to(dtype), torch.randn(n, device=device).to(dtype)
    y, mean, rstd = rows.forward(spec, x, 1, weight, None, 1e-6, save=True)
    assert rstd is not None
    assert torch.equal(y, by_casts(spec, x, mean, rstd, weight))


@pytest.mark.parametrize("path", [*PATHS, "split", "wide", "second derivatives"])
def test_dw_is_of_what_the_weight_met(path: str, force: Any, device: torch.device) -> None:
    """Of one row, and dy of ones, dw is x̂: rounded with "llama", not with "output"."""
    if path == "split" and device.type == "cpu":
        pytest.skip("programs of a team wait for each other")
    if path != "second derivatives":
        force(*(PATHS.get(path) or (SPLIT if path == "split" else WIDE)))
    for spec, cast in itertools.product((LAYER_NORM, RMS_NORM), ("llama", "output")):
        (x, weight, *bias), _ = inputs(spec, (1, 2048), (torch.bfloat16, torch.float32), device)
        y = norm(spec.with_cast(cast), x, weight, *bias)
        (dw,) = torch.autograd.grad(y, weight, torch.ones_like(y), create_graph=path == "second derivatives")
        assert torch.equal(dw, dw.bfloat16().float()) == (cast == "llama")


MODELS = {
    "LlamaRMSNorm": ("llama", "llama"),
    "Gemma3RMSNorm": ("gemma3", "gemma"),
    "Olmo2RMSNorm": ("olmo2", "output"),
    "T5LayerNorm": ("t5", "llama"),
}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("n", [96, *((2048, 4096, 5120) if ON_GPU else ())])
def test_a_models_own_norm(name: str, n: int, dtype: torch.dtype, device: torch.device) -> None:
    """The same bits in every row whose rstd is what the model's is; elsewhere the neighbouring number at most.

    rstd is the root of a sum that torch takes in an order of its own, which changes with the rows that are beside it.
    """
    transformers = pytest.importorskip("transformers")
    folder, cast = MODELS[name]
    module = getattr(getattr(transformers.models, folder), f"modeling_{folder}")
    theirs = getattr(module, name)(n).to(device, dtype)
    theirs.weight.data = torch.randn(n, device=device).to(dtype)
    x = torch.randn(256 if ON_GPU else 64, n, device=device).to(dtype)
    with torch.no_grad():
        want = theirs(x)
        got = functional.rms_norm(x, (n,), theirs.weight, 1e-6, cast=cast)
    _, _, rstd = rows.forward(RMS_NORM.with_cast(cast), x, 1, theirs.weight, None, 1e-6, save=True)
    same = rstd == torch.rsqrt(x.float().pow(2).mean(-1) + 1e-6)
    assert got.dtype == want.dtype
    assert same.any()
    assert torch.equal(got[same], want[same])
    # Of neighbours, the numbers as integers are one apart; x̂'s neighbour times a weight may be two products further.
    apart = (got.view(torch.int16).int() - want.view(torch.int16).int()).abs()
    assert apart.max() <= 2
    assert (apart != 0).float().mean() < 1e-3


# --- the ways there ---


def test_the_module_and_the_argument_are_one(spec: RowNorm, device: torch.device) -> None:
    (x, *parameters), _ = inputs(spec, (3, 8), (torch.bfloat16, torch.bfloat16), device)
    module: Any = (nn.LayerNorm if spec.center else nn.RMSNorm)(8, eps=1e-5, device=device, dtype=x.dtype)
    module.cast = spec.cast
    assert repr(module).endswith(f", cast={spec.cast!r})")
    y = torch.func.functional_call(module, dict(zip(("weight", "bias"), parameters, strict=False)), (x,))
    assert torch.equal(y, norm(spec, x, *parameters))


def test_no_weight_is_one(spec: RowNorm, device: torch.device) -> None:
    (x, *_), dy = inputs(spec, (3, 8), (torch.bfloat16, torch.bfloat16), device)
    plain = getattr(functional, spec.name)(x, (8,), eps=1e-5)
    for f in (norm, registered):
        y = f(spec, x, *[None] * (2 if spec.center else 1))
        assert torch.equal(y, plain)
        for got, want in zip(
            torch.autograd.grad(y, x, dy), torch.autograd.grad(plain, x, dy, retain_graph=True), strict=True
        ):
            assert torch.equal(got, want)


def test_compiled(spec: RowNorm, device: torch.device) -> None:
    torch._dynamo.reset()
    given, dy = inputs(spec, (5, 8), (torch.bfloat16, torch.bfloat16), device)
    run = torch.compile(norm, backend="aot_eager", fullgraph=True)
    found, expected = ([y, *torch.autograd.grad(y, given, dy)] for y in (f(spec, *given) for f in (run, norm)))
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.skipif(not ON_GPU and shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("fuses", [False, True])
@pytest.mark.parametrize("kernels", [False, True], ids=["composite", "kernels"])
def test_inductor_keeps_the_rounding(fuses: bool, kernels: bool, device: torch.device, monkeypatch: Any) -> None:
    if not kernels:
        device = torch.device("cpu")
        monkeypatch.setattr(road, "INTERPRETED", False)
    torch._dynamo.reset()
    for base in (LAYER_NORM, RMS_NORM):
        spec = base.with_cast("llama")
        (x, *parameters), _ = inputs(spec, (64, 256), (torch.bfloat16, torch.bfloat16), device)
        with torch.no_grad(), trinorm.options(inductor_fuses=fuses):
            assert torch.equal(torch.compile(norm, fullgraph=True)(spec, x, *parameters), norm(spec, x, *parameters))


def test_batch_invariance_is_not_left_to_inductor(device: torch.device, launched: list[object]) -> None:
    torch._dynamo.reset()
    (x, weight), _ = inputs(RMS_NORM, (5, 8), (torch.bfloat16, torch.bfloat16), device)
    with trinorm.options(inductor_fuses=True), torch.no_grad():
        torch.compile(norm, backend="aot_eager", fullgraph=True)(RMS_NORM, x, weight, batch_invariant=True)
    assert launched


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "composite"])
def test_autocast_leaves_the_models_modes_alone(
    spec: RowNorm, kernels: bool, device: torch.device, monkeypatch: Any
) -> None:
    monkeypatch.setattr(reference, "_policy_is_fp32", lambda *_: True)
    if not kernels:
        device = torch.device("cpu")
        monkeypatch.setattr(road, "INTERPRETED", False)
    (x, *parameters), _ = inputs(spec, (5, 8), (torch.bfloat16, torch.bfloat16), device)
    expected = norm(spec, x, *parameters)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        for f in (norm, registered):
            y = f(spec, x, *parameters)
            assert y.dtype == torch.bfloat16
            assert torch.equal(y, expected)


def test_side_roads_have_the_mode(spec: RowNorm, device: torch.device) -> None:
    """Jagged tensors, function modes, vmap."""
    (x, *parameters), _ = inputs(spec, (6, 8), (torch.bfloat16, torch.bfloat16), device)
    with torch.no_grad():
        expected = norm(spec, x, *parameters)
        jagged = torch.nested.nested_tensor_from_jagged(x, torch.tensor([0, 2, 6], device=device))
        assert torch.equal(
            getattr(functional, spec.name)(jagged, (8,), *parameters, eps=1e-5, cast=spec.cast).values(), expected
        )

        class Mode(TorchFunctionMode):
            def __torch_function__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                return f(*args, **(kwargs or {}))

        with Mode():
            assert torch.equal(norm(spec, x, *parameters), expected)
        mapped = torch.func.vmap(lambda x: registered(spec, x, *parameters))(x.view(2, 3, 8))
        assert torch.equal(mapped.view(6, 8), expected)


@pytest.mark.filterwarnings("ignore:trinorm:UserWarning")  # forward mode and torch.func take torch's operator
def test_derivatives(spec: RowNorm, device: torch.device) -> None:
    given, _ = inputs(spec, (2, 3), (torch.float64, torch.float64), device)
    for f in (norm, registered):
        torch.autograd.gradcheck(lambda *t, f=f: f(spec, *t), given, check_forward_ad=f is norm, **JACOBIAN)
        torch.autograd.gradgradcheck(lambda *t, f=f: f(spec, *t), given, **JACOBIAN)
    by_func = torch.func.grad(lambda x, *p: norm(spec, x, *p).sin().sum())(*given)
    (expected,) = torch.autograd.grad(norm(spec, *given).sin().sum(), given[0])
    torch.testing.assert_close(by_func, expected)


def test_calls_are_told_apart(device: torch.device) -> None:
    """Of one shape, each thrice in turn, so that each is recalled among the others."""
    x, weight = torch.randn(3, 64, device=device).bfloat16(), torch.randn(64, device=device).bfloat16()
    found: dict[Cast, list[Tensor]] = {}
    for _ in range(3):
        for cast in CASTS:
            found.setdefault(cast, []).append(functional.rms_norm(x, (64,), weight, cast=cast))
    for cast, ys in found.items():
        assert all(torch.equal(y, ys[0]) for y in ys)
        assert all(not torch.equal(ys[0], others[0]) for other, others in found.items() if other != cast)


def test_save_output(device: torch.device) -> None:
    """1 + w is what y is divided by: a weight of 0 can be undone, one of -1 cannot."""
    x, dy = (torch.randn(40, 96, device=device) for _ in range(2))
    for cast, w, undone in (("gemma", 0.0, True), ("gemma", -1.0, False), ("output", 0.0, False)):
        weight = torch.randn(96, device=device) * 0.1 if cast == "gemma" else torch.rand(96, device=device) + 0.5
        weight[7] = w
        given = [x.clone().requires_grad_(), weight.requires_grad_()]
        kept = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: (kept.append(t.data_ptr()), t)[1], lambda t: t
        )
        with hooks, pytest.MonkeyPatch.context() as patch:
            patch.setattr("trinorm.ops.row._warn_once", lambda _: None)
            y = functional.rms_norm(given[0], (96,), given[1], 1e-5, save="output", cast=cast)
        assert (y.data_ptr() in kept) == undone
        assert (given[0].data_ptr() in kept) != undone
        problem = RMS_NORM.with_cast(cast), x, (96,), weight.detach(), None, 1e-5
        exact, by_torch = reference.oracle_gradients(*problem, dy), reference.torch_gradients(*problem, dy)
        got = torch.autograd.grad(y, given, dy)
        bound = 8 if undone else 1  # what y's rounding adds (test_save_output.py derives it)
        for g, want, torchs in zip(got, exact, by_torch, strict=False):
            assert_no_worse("gradient", g, want, want + bound * (torchs.double() - want))


def test_bad_input(device: torch.device) -> None:
    x = torch.ones(2, 3, device=device)
    for cast in ("Gemma", None, 1, ["gemma"]):
        with pytest.raises(ValueError, match=r"cast is .*; it must be one of 'output', 'llama', 'gemma'"):
            functional.rms_norm(x, (3,), cast=cast)
    for _ in range(2):  # also once a call has been seen that this one could be taken for
        functional.rms_norm(x, (3,), cast="gemma", batch_invariant=True)
        with pytest.raises(ValueError, match="save is"):
            functional.rms_norm(x, (3,), save=("input", "gemma", True))
        with pytest.raises(TypeError, match="batch_invariant must be"):
            functional.rms_norm(x, (3,), cast="gemma", batch_invariant=1)
    with pytest.raises(ValueError, match="save is 'output' and cast is 'llama'"):
        functional.layer_norm(x, (3,), save="output", cast="llama")
    with pytest.raises(RuntimeError, match="cast is 'Gemma'; it must be one of output, llama, gemma"):
        torch.ops.trinorm.rms_norm(x, (3,), None, 1e-5, False, "Gemma")
    assert trinorm.functional.rms_norm(x, (3,), cast="gemma").isfinite().all()
