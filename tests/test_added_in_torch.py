"""The norms of a sum as torch's citizens: derivatives, registered ops, compiled, remembered, modules, bad input."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from machine import JACOBIAN, ON_GPU
from paths import SPECS
from test_added import EPS, STREAMS, draw, public
from trinorm import functional, nn, reference
from trinorm.ops import added
from trinorm.spec import RMS_NORM, RowNorm


@pytest.fixture(autouse=True)
def _nothing_remembered() -> None:
    added.CALLS.clear()


COMPILER = pytest.mark.skipif(
    not torch.cuda.is_available() and shutil.which("g++") is None, reason="Inductor needs a C++ compiler on a CPU"
)


@pytest.fixture(params=SPECS)
def spec(request: pytest.FixtureRequest) -> RowNorm:
    return request.param


@pytest.mark.filterwarnings("ignore:.*runs torch's own operator")  # a GPU says so of torch.func and forward mode
def test_derivatives(spec: RowNorm, device: torch.device) -> None:
    """Numerically, by both roads, and twice; forward mode and torch.func have torch's operators."""
    given = [
        torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True) for shape in ((3, 5),) * 2 + ((5,),) * 2
    ]

    def eager(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return public(spec, x, residual, w, b, alpha=0.7)

    def registered(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        op = getattr(torch.ops.trinorm, f"add_{spec.name}")
        return op(x, residual, (5,), w, b, None, None, EPS, 0.7, 0.0, torch.float64, False, "output")[:2]

    for norm in (eager, registered):
        torch.autograd.gradcheck(norm, given, check_batched_grad=True, **JACOBIAN)
        torch.autograd.gradgradcheck(norm, given, **JACOBIAN)
    torch.autograd.gradcheck(eager, given, check_forward_ad=True, check_backward_ad=False, **JACOBIAN)
    plain = [t.detach() for t in given]

    def expected(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        total = x + 0.7 * residual
        return reference.composite(spec, total, (5,), w, b, EPS), total

    for transform in (torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        for norm in (eager, registered) if transform is torch.func.jacrev else (eager,):
            found, wanted = (transform(lambda x, f=f: f(x, *plain[1:])[0])(plain[0]) for f in (norm, expected))
            torch.testing.assert_close(found, wanted)
    for norm in (eager, registered):
        batch = [torch.stack([t, 2 * t]) for t in plain[:2]]
        found = torch.func.vmap(lambda x, r, norm=norm: norm(x, r, *plain[2:]))(*batch)
        for i in range(2):
            torch.testing.assert_close([t[i] for t in found], list(norm(batch[0][i], batch[1][i], *plain[2:])))


@pytest.mark.parametrize("stream", STREAMS[:3], ids=str)
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_registered(spec: RowNorm, stream: tuple[torch.dtype, torch.dtype], alpha: float, device: torch.device) -> None:
    x, residual, w, b, *_ = draw(4, 16, stream, device)
    for t in (x, residual, w, b):
        t.requires_grad_()
    op = getattr(torch.ops.trinorm, f"add_{spec.name}").default
    for bias, cast in ((b, "output"), (None, "llama")):
        opcheck(op, (x, residual, (16,), w, bias, None, None, EPS, alpha, 0.0, x.dtype, False, cast))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(spec: RowNorm, dynamic: bool, device: torch.device) -> None:
    """One graph for any number of rows, with an eager call's bits."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    def step(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return public(spec, x, residual, w, alpha=0.5)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    torch.compile(step, fullgraph=True, dynamic=True, backend=backend)(
        *(torch.randn(3, 32, device=device),) * 2, torch.ones(32, device=device)
    )
    for m in (3, 5, 9):
        given = [
            torch.randn(m, 32, device=device).bfloat16(),
            torch.randn(m, 32, device=device),
            torch.randn(32, device=device),
        ]
        found, expected = [], []
        for f, results in ((compiled, found), (step, expected)):
            leaves = [t.detach().requires_grad_() for t in given]
            y, total = f(*leaves)
            results += [y, total, *torch.autograd.grad(y.float().sum() + (total * total).sum(), leaves)]
        for got, want in zip(found, expected, strict=True):
            assert torch.equal(got, want)
    assert len(graphs) == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=COMPILER)])
def test_compiled_for_the_sum_alone(spec: RowNorm, backend: str, device: torch.device) -> None:
    torch._dynamo.reset()
    x, residual, w = (torch.randn(s, device=device, requires_grad=True) for s in ((3, 32), (3, 32), (32,)))
    total = torch.compile(lambda x, r, w: public(spec, x, r, w)[1] * 2, fullgraph=True, backend=backend)(x, residual, w)
    for gradient in torch.autograd.grad(total.sum(), (x, residual)):
        assert torch.equal(gradient, torch.full_like(x, 2.0))
    torch._dynamo.reset()


def test_what_was_saved_may_come_back_otherwise(spec: RowNorm, device: torch.device) -> None:
    """In another layout or dtype, from a hook; and the sum's own gradient may have no storage."""
    x, residual = (torch.randn(6, 16, device=device, requires_grad=True) for _ in range(2))
    w, c = torch.randn(16, device=device), torch.tensor([0, 1, 2, 0, 1, 2.0], device=device)
    dy = torch.randn(6, 16, device=device)

    def gradients(unpack: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        torch.manual_seed(4)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), unpack):
            y, total = public(spec, x, residual, w, row_scale=c, dropout_p=0.5)
            return torch.autograd.grad((y, total), (x, residual), (dy, torch._efficientzerotensor((6, 16), device=device)))

    expected = gradients(lambda t: t)
    for unpack in (
        lambda t: torch.stack((t, t), -1)[..., 0],
        lambda t: torch._neg_view(-t),
        lambda t: t.double() if t.is_floating_point() else t,
    ):
        for _ in range(2):
            for got, want in zip(gradients(unpack), expected, strict=True):
                torch.testing.assert_close(got, want)
    found = torch.autograd.grad(public(spec, x, residual, w, row_scale=c), x, (dy, torch.zeros(6, 16, device=device)))
    zeros = torch._efficientzerotensor((6, 16), device=device)
    torch.testing.assert_close(torch.autograd.grad(public(spec, x, residual, w, row_scale=c), x, (dy, zeros)), found)


def test_compiled_with_out(spec: RowNorm, device: torch.device) -> None:
    torch._dynamo.reset()
    x, residual = torch.randn(3, 32, device=device), torch.randn(3, 32, device=device)
    expected = public(spec, x, residual)
    with torch.no_grad():
        y, total = torch.compile(lambda x, r: public(spec, x, r, out=r), fullgraph=True, backend="aot_eager")(x, residual)
    assert torch.equal(y, expected[0])
    assert torch.equal(residual, expected[1])
    assert torch.equal(total, expected[1])
    torch._dynamo.reset()


def test_a_call_is_remembered(spec: RowNorm, device: torch.device, launched: list[object]) -> None:
    """And found again, whatever the gradients that are asked for; another shape, dtype or layout is another call."""
    w = torch.randn(32, device=device)
    for _, m, dtype in itertools.product(range(3), (3, 5), (torch.float32, torch.bfloat16)):
        x, residual = torch.randn(m, 32, device=device).to(dtype), torch.randn(m, 32, device=device)
        y, total = public(spec, x, residual, w)
        torch.testing.assert_close(total, x + residual)
        torch.testing.assert_close(y, reference.composite(spec, x + residual, (32,), w, None, EPS, dtype))
    assert len(added.CALLS._kept) == 2


@pytest.mark.skipif(not ON_GPU, reason="autocast's list of a CPU has no norm")
def test_autocast(device: torch.device) -> None:
    """y is what adding and layer_norm give there; the sum is what adding gives."""
    x, residual = torch.randn(3, 32, device=device).bfloat16(), torch.randn(3, 32, device=device).bfloat16()
    w, b = torch.randn(32, device=device), torch.randn(32, device=device)
    for _ in range(3):
        with torch.autocast("cuda", torch.bfloat16):
            y, total = functional.add_layer_norm(x, residual, w, b)
            want = F.layer_norm(x + residual, (32,), w, b)
        assert y.dtype == want.dtype == torch.float32
        assert total.dtype == torch.bfloat16
        torch.testing.assert_close(y, want)


def test_batch_invariant(spec: RowNorm, device: torch.device) -> None:
    x, residual = (torch.randn(64, 300, device=device).bfloat16() for _ in range(2))
    whole = public(spec, x, residual, batch_invariant=True)
    for m in (1, 7):
        for got, want in zip(public(spec, x[:m], residual[:m], batch_invariant=True), whole, strict=True):
            assert torch.equal(got, want[:m])


@pytest.mark.parametrize(
    ("module", "function"), [(nn.AddLayerNorm, functional.add_layer_norm), (nn.AddRMSNorm, functional.add_rms_norm)]
)
def test_modules(module: type[torch.nn.Module], function: Callable[..., Any], device: torch.device) -> None:
    norm: Any = module(32, eps=1e-3, device=device)
    plain = {nn.AddLayerNorm: torch.nn.LayerNorm, nn.AddRMSNorm: torch.nn.RMSNorm}[module](32)
    assert norm.state_dict().keys() == plain.state_dict().keys()
    norm.load_state_dict(plain.state_dict())
    x, residual = torch.randn(3, 32, device=device), torch.randn(3, 32, device=device)
    for t in norm.parameters():
        torch.nn.init.normal_(t)
    for found, want in zip(norm(x, residual), function(x, residual, *norm.parameters(), eps=1e-3), strict=True):
        assert torch.equal(found, want)
    norm.alpha = 0.5
    for found, want in zip(norm(x, residual), function(x, residual, *norm.parameters(), eps=1e-3, alpha=0.5), strict=True):
        assert torch.equal(found, want)
    with torch.no_grad():
        assert norm(x, residual, out=residual)[1] is residual
    assert "alpha=0.5" in repr(norm)
    assert "alpha" not in repr(module(32))


def _x(*shape: int, **how: Any) -> Tensor:
    return torch.randn(shape or (3, 8), **how)


@pytest.mark.parametrize(
    ("args", "how", "kind", "message"),
    [
        ((None, _x()), {}, TypeError, "input must be a Tensor"),
        ((_x(), None), {}, TypeError, "residual must be a Tensor"),
        ((_x(), _x(8)), {}, RuntimeError, "residual has shape"),
        ((_x(), _x().int()), {}, NotImplementedError, "residual has dtype"),
        ((_x().int(), _x()), {}, NotImplementedError, "input has dtype"),
        ((_x(), _x(device="meta")), {}, RuntimeError, "residual is on meta"),
        ((_x(), _x().to_sparse()), {}, NotImplementedError, "residual has layout"),
        ((_x(), _x(), _x(9)), {}, RuntimeError, "normalized_shape is"),
        ((_x(), _x()), dict(normalized_shape=8), TypeError, "normalized_shape must be"),
        ((_x(), _x()), dict(normalized_shape=(7,)), RuntimeError, "normalized_shape is"),
        ((_x(), _x()), dict(alpha="1"), TypeError, "alpha must be"),
        ((_x(), _x()), dict(alpha=True), TypeError, "alpha must be"),
        ((_x(), _x()), dict(eps=-1.0), ValueError, "eps is"),
        ((_x(), _x()), dict(cast="wide"), ValueError, "cast is"),
        ((_x(), _x()), dict(batch_invariant=1), TypeError, "batch_invariant must be"),
        ((_x(), _x()), dict(out=3), TypeError, "out must be"),
        ((_x(), _x()), dict(out=_x(8, 3).T), RuntimeError, "out is"),
        ((_x(), _x()), dict(out=_x().double()), RuntimeError, "out is"),
        ((_x(), _x(requires_grad=True)), dict(out=_x()), RuntimeError, "out is given"),
    ],
)
def test_bad_input(args: tuple[Any, ...], how: dict[str, Any], kind: type[Exception], message: str, spec: RowNorm) -> None:
    for _ in range(2):
        with pytest.raises(kind, match=rf"add_{spec.name}\(\): {message}"):
            getattr(functional, f"add_{spec.name}")(*args, **how)


def test_out_with_a_part_of_another(spec: RowNorm) -> None:
    memory = torch.randn(5, 8)
    public(spec, _x(), _x(), out=_x())  # after which a like call would be known
    with pytest.raises(RuntimeError, match="out has a part of residual's memory"):
        public(spec, _x(), memory[:3], out=memory[1:4])
    with pytest.raises(RuntimeError, match="out has a part of input's memory"):
        public(spec, memory[:3], _x(), out=memory[2:])
    public(spec, memory[:2], _x(2, 8), out=memory[2:4])
    residual = _x()
    public(spec, _x(), residual, out=residual)  # in place a call is known again, wherever its tensors lie
    residual = memory[1:4]
    with pytest.raises(RuntimeError, match="out has a part of input's memory"):
        public(spec, memory[:3], residual, out=residual)
    halves = memory.view(torch.bfloat16)[:, :8]
    with pytest.raises(RuntimeError, match="out has a part of input's memory"):
        public(spec, memory.view(-1).view(torch.bfloat16)[:40].view(5, 8), _x(5, 8), out=memory)
    assert halves.shape == memory.shape
    with pytest.raises(RuntimeError, match="out has a part of weight's memory"):
        public(spec, _x(), _x(), memory[1], out=memory[:3])
    with pytest.raises(RuntimeError, match="out has a part of row_scale's memory"):
        public(spec, _x(), _x(), out=memory[:3], row_scale=memory.view(-1)[:3])
    with pytest.raises(RuntimeError, match="no view of a negative"):
        public(spec, _x(), _x(), out=torch._neg_view(memory[:3]))
    one = torch.randn(2, 24)[:1, :8]
    assert public(spec, one, _x(1, 8), out=one.view(-1).view(1, 8))[1].data_ptr() == one.data_ptr()


def test_the_registered_op_refuses_what_does_not_fit(spec: RowNorm, device: torch.device) -> None:
    op = getattr(torch.ops.trinorm, f"add_{spec.name}")
    x, how = torch.randn(3, 8, device=device), (None, None, EPS, 1.0, 0.0, torch.float32, False)
    with pytest.raises(RuntimeError, match="residual is not of the input's shape"):
        op(x, x[:2], (8,), None, None, *how, "output")
    with pytest.raises(RuntimeError, match="does not fit normalized_shape"):
        op(x, x, (7,), None, None, *how, "output")
    with pytest.raises(RuntimeError, match="cast is"):
        op(x, x, (8,), None, None, *how, "wide")
    with pytest.raises(NotImplementedError, match="a dtype other than"):
        op(x, x.int(), (8,), None, None, *how, "output")


def test_rms_norm_is_the_default_norm_of_its_epsilon(device: torch.device) -> None:
    for stream in ((torch.float32, torch.float32), (torch.float32, torch.float64)):
        x, residual = torch.randn(3, 8, device=device) * 1e-4, torch.randn(3, 8, device=device).to(stream[1]) * 1e-4
        y, total = functional.add_rms_norm(x, residual)
        torch.testing.assert_close(y, F.rms_norm(total, (8,)).to(y.dtype))
    assert RMS_NORM.name == "rms_norm"
