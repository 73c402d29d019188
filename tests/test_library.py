"""ops/library/rows.py: the registered ops, and what records them: torch.compile, torch.export, checkpointing."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from machine import ON_GPU
from paths import SPECS
from trinorm import functional, reference
from trinorm.ops import road
from trinorm.ops.library import rows as library
from trinorm.spec import RowNorm

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
OPCHECKED = [(t, a) for i, t in enumerate(FLOATS) for a in (True, False) if ON_GPU or a == bool(i % 2)]
COMPILERS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=pytest.mark.skipif(
            not torch.cuda.is_available() and shutil.which("g++") is None, reason="Inductor needs a C++ compiler on a CPU"
        ),
    ),
]


@pytest.fixture(params=SPECS)
def spec(request: pytest.FixtureRequest) -> RowNorm:
    return request.param


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def parameters(spec: RowNorm, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """The weight, and the bias of a norm that has one."""
    return [torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(2 if spec.center else 1)]


def public(spec: RowNorm, x: Tensor, shape: tuple[int, ...], *parameters: Tensor | None) -> Tensor:
    return getattr(functional, spec.name)(x, shape, *parameters, eps=1e-5)


def torchs(spec: RowNorm, x: Tensor, shape: tuple[int, ...], *parameters: Tensor | None) -> Tensor:
    return getattr(F, spec.name)(x, shape, *parameters, eps=1e-5)


def registered(spec: RowNorm, x: Tensor, shape: tuple[int, ...], *parameters: Tensor | None) -> Tensor:
    return getattr(torch.ops.trinorm, spec.name)(x, shape, *parameters, 1e-5, False, "output")[0]


def results(f: Callable[..., Tensor], dy: Tensor, *inputs: Tensor) -> list[Tensor]:
    """f's value and its gradients."""
    y = f(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


@pytest.mark.parametrize(("dtype", "affine"), OPCHECKED, ids=str)
def test_opcheck(spec: RowNorm, dtype: torch.dtype, affine: bool, device: torch.device) -> None:
    check_ops(spec, (2, 3, 8), dtype, affine, device)


@pytest.mark.parametrize("shape", [(2, 3, 8), (8,)], ids=str)
def test_opcheck_without_kernels(spec: RowNorm, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(road, "INTERPRETED", False)
    check_ops(spec, shape, torch.float64, True, torch.device("cpu"))


def check_ops(spec: RowNorm, shape: tuple[int, ...], dtype: torch.dtype, affine: bool, device: torch.device) -> None:
    op, backward = (getattr(torch.ops.trinorm, name) for name in (spec.name, f"{spec.name}_backward"))
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    given = parameters(spec, (8,), dtype, device) if affine else [None] * (2 if spec.center else 1)
    torch.library.opcheck(op, (x, (8,), *given, 1e-5, False, "output"))
    y, *mean, rstd = op(x, (8,), *given, 1e-5, False, "output")
    db = dtype if affine and spec.center else None
    dy = torch.randn_like(y.detach())
    for dx in (True, False) if affine else (True,):
        wanted = dx, affine, db, False, "output"
        arguments = x, (8,), given[0], mean[0] if mean else None, rstd, 1e-5
        torch.library.opcheck(backward, (dy, *arguments, *wanted))
        # Which opcheck does not see.
        assert all(t is None or t.data_ptr() != dy.data_ptr() for t in backward(dy, *arguments, *wanted))
        torch.library.opcheck(backward, (dy.requires_grad_(), *arguments, *wanted))
        dy = dy.detach()


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)], ids=str)
def test_opcheck_of_no_rows(spec: RowNorm, shape: tuple[int, ...], device: torch.device) -> None:
    x = torch.randn(shape, device=device, requires_grad=True)
    op = getattr(torch.ops.trinorm, spec.name)
    torch.library.opcheck(op, (x, (8,), *parameters(spec, (8,), x.dtype, device), 1e-5, False, "output"))


def test_no_columns(spec: RowNorm, device: torch.device) -> None:
    x = torch.randn(2, 3, 0, device=device, requires_grad=True)
    inputs = x, *parameters(spec, (0,), x.dtype, device)
    dy = torch.randn_like(x.detach())
    assert_same_bits(results(lambda x, *p: registered(spec, x, (0,), *p), dy, *inputs), [x, *inputs])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_kernels_are_an_eager_calls(
    spec: RowNorm, dtype: torch.dtype, device: torch.device, launched: list[Any]
) -> None:
    shape = (4, 6)
    x = torch.randn(5, 3, *shape, device=device).to(dtype).transpose(0, 1).requires_grad_()
    dy = torch.randn(3, 5, *shape, device=device).to(dtype)
    inputs = x, *parameters(spec, shape, torch.float32, device)
    by_op = results(lambda x, *p: registered(spec, x, shape, *p), dy, *inputs)
    kernels = launched.copy()
    launched.clear()
    assert_same_bits(by_op, results(lambda x, *p: public(spec, x, shape, *p), dy, *inputs))
    assert kernels == launched != []


def test_statistics(spec: RowNorm, device: torch.device) -> None:
    for dtype in FLOATS:
        x = torch.randn(2, 3, 8, device=device).to(dtype)
        _, *found = getattr(torch.ops.trinorm, spec.name)(
            x, (8,), *[None] * (2 if spec.center else 1), 1e-5, False, "output"
        )
        exact = reference.oracle(spec, x, (8,), None, None, 1e-5)
        for got, want in zip(found, (exact.mean, exact.rstd) if spec.center else (exact.rstd,), strict=True):
            assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert not got.requires_grad
            torch.testing.assert_close(got, want.view(2, 3).to(got.dtype))


def test_what_does_not_fit_is_refused(spec: RowNorm, device: torch.device) -> None:
    """Where functional has not looked before, a kernel would read beyond a tensor."""
    op, backward = (getattr(torch.ops.trinorm, name) for name in (spec.name, f"{spec.name}_backward"))
    x, rest = torch.randn(3, 8, device=device), [None] * spec.center
    for shape, weight in (((4,), None), ((), None), ((1, 3, 8), None), ((8,), torch.ones(4, device=device))):
        with pytest.raises(RuntimeError, match="does not fit"):
            op(x, shape, weight, *rest, 1e-5, False, "output")
    with pytest.raises(NotImplementedError, match="dtype"):
        op(x.int(), (8,), None, *rest, 1e-5, False, "output")
    _, *mean, rstd = op(x, (8,), None, *rest, 1e-5, False, "output")
    for dy, mean_, rstd_ in (
        (x.int(), mean, rstd),
        (x, mean, rstd.half()),
        (x, [] if mean else [rstd], rstd),
    ):
        with pytest.raises(RuntimeError, match="as the forward gives them"):
            backward(dy, x, (8,), None, mean_[0] if mean_ else None, rstd_, 1e-5, True, False, None, False, "output")
    with pytest.raises(RuntimeError, match="there is no weight"):
        backward(x, x, (8,), None, mean[0] if mean else None, rstd, 1e-5, True, True, None, False, "output")
    for dy, rstd_ in ((x[:2], rstd), (x, rstd[:2])):
        with pytest.raises(RuntimeError, match="input's shape"):
            backward(dy, x, (8,), None, mean[0] if mean else None, rstd_, 1e-5, True, False, None, False, "output")


# Derivatives.


def test_first_and_second_derivatives(spec: RowNorm, device: torch.device) -> None:
    x = torch.randn(2, 3, device=device, dtype=torch.float64, requires_grad=True)
    inputs = x, *parameters(spec, (3,), torch.float64, device)
    torch.autograd.gradcheck(lambda x, *p: registered(spec, x, (3,), *p), inputs, check_batched_grad=True)
    torch.autograd.gradgradcheck(lambda x, *p: registered(spec, x, (3,), *p), inputs)


def test_third_derivative(spec: RowNorm, device: torch.device) -> None:
    """As of the definition. torch's own layer_norm has another, which is wrong (2.13)."""

    def definition(x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if spec.center else x
        return x * ((x * x).mean(-1, keepdim=True) + 1e-5).rsqrt()

    def third(f: Callable[[Tensor], Tensor]) -> Tensor:
        (first,) = torch.autograd.grad(f(x).sin().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.cos().sum(), x, create_graph=True)
        return torch.autograd.grad(second.sin().sum(), x)[0]

    x = torch.randn(2, 3, device=device, dtype=torch.float64, requires_grad=True)
    none = [None] * (2 if spec.center else 1)
    torch.testing.assert_close(third(lambda x: registered(spec, x, (3,), *none)), third(definition))


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, x, *p: torch.func.grad(lambda x, *p: f(x, *p).sin().sum(), tuple(range(1 + len(p))))(x, *p),
    "grad of grad": lambda f, x, *p: torch.func.grad(
        lambda x: torch.func.grad(lambda x: f(x, *p).sin().sum())(x).cos().sum()
    )(x),
    "vmap": lambda f, x, *p: torch.func.vmap(lambda x: f(x, *p), in_dims=1)(x.unsqueeze(0).expand(2, -1, -1)),
    "vmap of parameters": lambda f, x, *p: torch.func.vmap(lambda *p: f(x, *p), out_dims=1)(
        *(torch.stack([t, -t]) for t in p)
    ),
    "vmap of both": lambda f, x, *p: torch.func.vmap(f)(x, *(t.expand(len(x), -1) for t in p)),
    "per-sample gradients": lambda f, x, *p: torch.func.vmap(
        torch.func.grad(lambda p, x: f(x, *p).sin().sum()), in_dims=(None, 0)
    )(p, x),
    "per-sample gradients of x": lambda f, x, *p: torch.func.vmap(torch.func.grad(lambda x: f(x, *p).sin().sum()))(x),
    "jacrev": lambda f, x, *p: torch.func.jacrev(f)(x, *p),
    "jvp": lambda f, x, *p: torch.func.jvp(f, (x, *p), (x.cos(), *(t.sin() for t in p))),
    "jacfwd": lambda f, x, *p: torch.func.jacfwd(lambda x: f(x, *p))(x),
    "hessian": lambda f, x, *p: torch.func.hessian(lambda x: f(x, *p).sin().sum())(x),
}


@pytest.mark.filterwarnings("ignore:trinorm:UserWarning")
@pytest.mark.parametrize("by", [registered, public])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(spec: RowNorm, transform: str, by: Callable[..., Tensor], device: torch.device) -> None:
    x = torch.randn(3, 4, device=device, dtype=torch.float64)
    given = [p.detach() for p in parameters(spec, (4,), torch.float64, device)]
    found, expected = (TRANSFORMS[transform](lambda x, *p, f=f: f(spec, x, (4,), *p), x, *given) for f in (by, torchs))
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:trinorm:UserWarning")
def test_tangents_are_not_dropped(spec: RowNorm, device: torch.device) -> None:
    none = [None] * (2 if spec.center else 1)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(*torch.randn(2, 3, 4, device=device))
        by_op, eager, theirs = (f(spec, dual, (4,), *none) for f in (registered, public, torchs))
        for y in (by_op, eager):
            torch.testing.assert_close(forward_ad.unpack_dual(y), forward_ad.unpack_dual(theirs))


@pytest.mark.parametrize("grad", [False, True])
def test_a_compiled_graphs_tangents_are_not_dropped(spec: RowNorm, grad: bool, device: torch.device) -> None:
    """It enters a level that Python does not hear of."""

    @torch.compile(backend="eager")
    def tangent(x: Tensor, of_x: Tensor) -> Tensor | None:
        with forward_ad.dual_level():
            y = registered(spec, forward_ad.make_dual(x, of_x), (4,), *[None] * (2 if spec.center else 1))
            found: Tensor | None = forward_ad.unpack_dual(y).tangent
            return found

    x = torch.randn(2, 3, 4, device=device)
    with (
        torch.set_grad_enabled(grad),
        pytest.raises((NotImplementedError, torch._dynamo.exc.TorchRuntimeError), match="jvp"),
    ):
        tangent(x, x)
    torch._C._exit_dual_level(level=0)  # an error leaves a compiled graph's level as it is


@pytest.mark.parametrize("parameter_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("policy", ["torch's", "fp32"])
def test_autocast(
    spec: RowNorm,
    policy: str,
    dtype: torch.dtype,
    parameter_dtype: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As an eager call, which has torch's dtypes (test_functional.py); fp32 is the policy of no norm on a CPU."""
    if policy == "fp32":
        monkeypatch.setattr(reference, "_policy_is_fp32", lambda *_: True)
    x = torch.randn(4, 8, device=device).to(dtype).requires_grad_()
    inputs = x, *parameters(spec, (8,), parameter_dtype, device)

    def run(f: Callable[..., Tensor]) -> list[Tensor]:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            y = f(spec, x, (8,), *inputs[1:])
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), inputs)]

    eager = run(public)
    assert policy != "fp32" or eager[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_same_bits(run(registered), eager)
    assert_same_bits(run(lambda *a: torch.compile(public, fullgraph=True, backend="aot_eager")(*a)), eager)


# torch.compile.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", COMPILERS)
def test_compiled_has_an_eager_calls_bits(
    spec: RowNorm, backend: str, dtype: torch.dtype, device: torch.device, launched: list[Any]
) -> None:
    """Between neighbours, which Inductor fuses among themselves and computes as eager does."""

    def f(x: Tensor, *p: Tensor) -> Tensor:
        return public(spec, x * 2, (8,), *p) * 2

    compiled = torch.compile(f, fullgraph=True, dynamic=False, backend=backend)
    inputs = torch.randn(5, 8, device=device).to(dtype).requires_grad_(), *parameters(spec, (8,), dtype, device)
    dy = torch.randn(5, 8, device=device).to(dtype)
    found = results(compiled, dy, *inputs)
    kernels = launched.copy()
    launched.clear()
    assert_same_bits(found, results(f, dy, *inputs))
    assert kernels == launched != []


@pytest.mark.parametrize("backend", COMPILERS)
def test_compiled_once_for_any_number_of_rows(spec: RowNorm, backend: str, device: torch.device) -> None:
    f = functools.partial(public, spec)
    compiled = torch.compile(lambda x, *p: f(x, (8,), *p), fullgraph=True, dynamic=True, backend=backend)
    given = parameters(spec, (8,), torch.float32, device)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for m in (3, 5, 70):
            x, dy = torch.randn(m, 8, device=device, requires_grad=True), torch.randn(m, 8, device=device)
            assert_same_bits(results(compiled, dy, x, *given), results(lambda x, *p: f(x, (8,), *p), dy, x, *given))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU captures graphs")
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # torch's own first one is
def test_in_cuda_graphs(spec: RowNorm, device: torch.device) -> None:
    """mode="reduce-overhead": replayed for other values of x and of the weights, forward and backward."""

    def f(x: Tensor, *p: Tensor) -> Tensor:
        return public(spec, x * 2, (768,), *p) * 2

    compiled = torch.compile(f, fullgraph=True, mode="reduce-overhead")
    given = parameters(spec, (768,), torch.bfloat16, device)
    for _ in range(5):
        x, dy = (torch.randn(130, 768, device=device, dtype=torch.bfloat16) for _ in range(2))
        x.requires_grad_()
        torch.compiler.cudagraph_mark_step_begin()
        found = [t.clone() for t in results(compiled, dy, x, *given)]
        assert_same_bits(found, results(f, dy, x, *given))
        with torch.no_grad():
            given[0].mul_(1.5)


def test_a_call_seen_before_is_recalled(spec: RowNorm, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = torch.randn(5, 8, device=device, requires_grad=True), *parameters(spec, (8,), torch.float32, device)
    dy = torch.randn(5, 8, device=device)
    expected = results(lambda x, *p: registered(spec, x, (8,), *p), dy, *inputs)
    for made in ("prepared", "RowCall"):
        monkeypatch.delattr(library, made)
    assert_same_bits(results(lambda x, *p: registered(spec, x, (8,), *p), dy, *inputs), expected)


def recorded(spec: RowNorm, x: Tensor) -> bool:
    """Whether Dynamo's graph has the op."""
    nodes: list[torch.fx.Node] = []
    torch.compile(public, fullgraph=True, backend=lambda g, _: (nodes.extend(g.graph.nodes), g.forward)[1])(spec, x, (8,))
    return getattr(torch.ops.trinorm, spec.name) in [node.target for node in nodes]


def test_compiled_graph_has_the_op(spec: RowNorm, device: torch.device) -> None:
    assert recorded(spec, torch.randn(3, 8, device=device))


def test_compiled_on_a_cpu_without_kernels_is_the_composite(spec: RowNorm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(road, "INTERPRETED", False)
    assert not recorded(spec, torch.randn(3, 8))


@pytest.mark.parametrize("transform", ["grad", "vmap", "vmap of parameters", "per-sample gradients", "jacrev"])
def test_compiled_transforms(spec: RowNorm, transform: str, device: torch.device) -> None:
    x = torch.randn(3, 4, device=device, dtype=torch.float64)
    given = [p.detach() for p in parameters(spec, (4,), torch.float64, device)]
    apply = TRANSFORMS[transform]
    compiled = torch.compile(
        lambda x, *p: apply(lambda x, *p: public(spec, x, (4,), *p), x, *p), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x, *given), apply(lambda x, *p: torchs(spec, x, (4,), *p), x, *given))


@pytest.mark.filterwarnings("ignore:trinorm:UserWarning")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("saved", [None, True, False], ids=["all", "selective, saved", "selective, recomputed"])
def test_checkpointed(spec: RowNorm, compiled: bool, saved: bool | None, device: torch.device) -> None:
    op = getattr(torch.ops.trinorm, spec.name).default
    asked: list[Any] = []

    def policy(_: Any, what: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        asked.append(what)
        return CheckpointPolicy.MUST_SAVE if saved and what is op else CheckpointPolicy.PREFER_RECOMPUTE

    def f(x: Tensor, *p: Tensor) -> Tensor:
        return public(spec, x * 2, (8,), *p) * 2

    options = {} if saved is None else dict(context_fn=functools.partial(create_selective_checkpoint_contexts, policy))
    run = functools.partial(checkpoint, f, use_reentrant=False, **options)
    run = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
    inputs = torch.randn(5, 8, device=device, requires_grad=True), *parameters(spec, (8,), torch.float32, device)
    dy = torch.randn(5, 8, device=device)
    exactly = dict(rtol=0, atol=0) if compiled else {}
    torch.testing.assert_close(results(run, dy, *inputs), results(f, dy, *inputs), **exactly)
    assert saved is None or (op in asked) == compiled
