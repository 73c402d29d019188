"""DyT, Derf, PolyNorm and weight norm as torch's citizens: derivatives, registered ops, compiled, remembered, bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from inputs_only_norms import KINDS, Call, assert_right, example, gradients
from trinorm import functional, nn, options
from trinorm.ops import inputs_only, road

OF_EACH = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.filterwarnings("ignore:.*runs torch's own operator")  # a GPU says so of torch.func and forward mode
@pytest.mark.parametrize(
    ("norm", "kind"), [*((Call.__call__, kind) for kind in KINDS), *((Call.registered, kind) for kind in KINDS[1:])]
)
def test_derivatives(norm: Callable[[Call], Tensor], kind: str, device: torch.device) -> None:
    """Numerically, and twice; batched; by torch.func; and, by torch's operators, in forward mode."""
    call = example(kind, torch.float64, device, (1, 2), 4)
    leaves = [t.requires_grad_() for t in call.present]

    def of_given(*tensors: Tensor) -> Tensor:
        return norm(call.given(tensors))

    forward = norm is not Call.registered
    torch.autograd.gradcheck(of_given, leaves, check_batched_grad=True, check_forward_ad=forward)
    torch.autograd.gradgradcheck(of_given, leaves)
    plain = [t.detach() for t in leaves]

    def expected(x: Tensor) -> Tensor:
        return call.given((x, *plain[1:])).composite()

    found, wanted = (torch.func.jacrev(f)(plain[0]) for f in (lambda x: of_given(x, *plain[1:]), expected))
    torch.testing.assert_close(found, wanted)
    batch = torch.stack([plain[0], 2 * plain[0]])
    found = torch.func.vmap(lambda x: of_given(x, *plain[1:]))(batch)
    for i in range(2):
        torch.testing.assert_close(found[i], of_given(batch[i], *plain[1:]))


@OF_EACH
def test_registered(kind: str, device: torch.device) -> None:
    call = example(kind, torch.float32, device)
    for t in call.present:
        t.requires_grad_()
    opcheck(getattr(torch.ops.trinorm, kind).default, call.arguments)
    for t in call.present:
        t.requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(call.registered(), call())


@pytest.mark.parametrize(("dynamic", "kind"), [(False, KINDS[2]), *((True, kind) for kind in KINDS)])
def test_compiled(dynamic: bool, kind: str, device: torch.device) -> None:
    """One graph for any number of tokens, with an eager call's bits."""
    torch._dynamo.reset()
    graphs = []
    call = example(kind, torch.bfloat16, device)

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    def step(*tensors: Tensor) -> Tensor:
        return call.given(tensors)()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    compiled_once = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (4, 5, 9)[: 3 if dynamic else 1]:
        tensors = [torch.randn(2, tokens, 8, device=device).bfloat16(), *call.present[1:]]
        found, expected = [], []
        for f, results in ((compiled, found), (step, expected)):
            leaves = [t.detach().requires_grad_() for t in tensors]
            y = f(*leaves)
            results += [y, *torch.autograd.grad((y * y).float().sum(), leaves)]
        for got, want in zip(found, expected, strict=True):
            assert torch.equal(got, want)
        if dynamic:
            compiled_once(*tensors)
            assert len(graphs) == 1
            assert any(kind in str(node.target) for node in graphs[0].graph.nodes)
    torch._dynamo.reset()


@OF_EACH
def test_exported(kind: str, device: torch.device) -> None:
    call = example(kind, torch.float32, device)

    class Norm(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return call.given(tensors)()

    tensors = tuple(call.present)
    torch.testing.assert_close(torch.export.export(Norm(), tensors).module()(*tensors), call())


@OF_EACH
def test_what_was_saved_may_come_back_otherwise(kind: str, device: torch.device) -> None:
    """In another layout or dtype, from a hook; and a gradient may have no storage."""
    call = example(kind, torch.float32, device)
    leaves = [t.requires_grad_() for t in call.present]

    def of_unpacked(unpack: Callable[[Tensor], Tensor], dy: Tensor) -> tuple[Tensor, ...]:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), unpack):
            return torch.autograd.grad(call(), leaves, dy)

    dy = torch.randn_like(call.x)
    for of_y in (dy, torch._efficientzerotensor(dy.shape, device=device)):
        expected = of_unpacked(lambda t: t, dy if of_y is dy else torch.zeros_like(dy))
        for unpack in (lambda t: torch.stack((t, t), -1)[..., 0], lambda t: torch._neg_view(-t), lambda t: t.double()):
            for _ in range(2):
                for got, want in zip(of_unpacked(unpack, of_y), expected, strict=True):
                    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_call_is_remembered(device: torch.device) -> None:
    """And found again, of views too; another shape, dtype or layout is another call."""
    kept = list[int]()
    for _ in range(3):
        for kind in KINDS:
            for dtype in (torch.float32, torch.bfloat16):
                call = example(kind, dtype, device)
                for x in (call.x, torch.cat((call.x, call.x), -1)[..., :8], torch.stack((call.x, call.x), -1)[..., 0]):
                    of = call.given((x, *call.present[1:]))
                    assert torch.equal(of(), of.given([t.clone() for t in of.present]).registered())
        kept.append(sum(map(len, inputs_only.CALLS._kept.values())))
    assert kept[0] > 12
    assert kept == kept[:1] * 3
    with options(batch_invariant=True):
        assert not inputs_only.CALLS._kept


@OF_EACH
def test_autocast_leaves_it_alone(kind: str, device: torch.device) -> None:
    """As torch's elementwise operators: the result has the input's dtype, and no bit changes."""
    for dtype in (torch.float32, torch.bfloat16):
        call = example(kind, dtype, device)
        expected = call()
        with torch.autocast(device.type, torch.bfloat16):
            assert torch.tanh(call.x).dtype == dtype
            for y in (call(), call.registered()):
                assert torch.equal(y, expected)
                assert y.dtype == dtype


@OF_EACH
@pytest.mark.parametrize("shape", [(0, 8), (2, 0)], ids=str)
def test_nothing_to_compute(kind: str, shape: tuple[int, ...], device: torch.device, launched: list[object]) -> None:
    call = example(kind, torch.float32, device, shape[:1], shape[1])
    for norm in (Call.__call__, Call.registered):
        y, found = gradients(norm, call, torch.zeros(shape, device=device))
        assert y.shape == shape
        for t, gradient in zip(call.tensors, found, strict=True):
            assert (t is None) == (gradient is None)
            assert t is None or gradient is None or torch.equal(gradient, torch.zeros_like(t))
    assert launched == []


@OF_EACH
def test_a_device_without_kernels(
    kind: str, device: torch.device, launched: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Has torch's operators, by the function and by the op."""
    monkeypatch.setattr(road, "_is_launched_on", lambda x: False)
    call = example(kind, torch.bfloat16, device)
    assert_right(call)
    dy = torch.randn_like(call.x)
    y, found = gradients(Call.registered, call, dy)
    of_composite, expected = gradients(Call.composite, call, dy)
    torch.testing.assert_close(y, of_composite)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=2**-7, atol=2**-7) if want is not None else None
    assert launched == []


@OF_EACH
def test_a_tensor_may_have_its_own_say(kind: str, device: torch.device) -> None:
    """__torch_function__ sees the function, with every argument."""
    seen: list[tuple[Any, ...]] = []

    class Watching(Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append((function, len(args) + len(kwargs or {})))
            return "seen"

    call = example(kind, torch.float32, device)
    of = call.given([call.present[0], call.present[1].as_subclass(Watching), *call.present[2:]])
    assert of() == "seen"
    arguments = dict(zip(KINDS, (5, 6, 4, 3), strict=True))
    assert seen == [(getattr(functional, kind), arguments[kind])]


@pytest.mark.parametrize(("kind", "function"), [(nn.DynamicTanh, "dynamic_tanh"), (nn.DynamicErf, "dynamic_erf")])
def test_dynamic_modules(kind: type[torch.nn.Module], function: str, device: torch.device) -> None:
    numbers = dict(alpha=0.5, shift=0.0) if kind is nn.DynamicErf else dict(alpha=0.5)
    module, x = kind(8, device=device), torch.randn(2, 3, 8, device=device)
    assert [*module.state_dict()] == [*numbers, "weight", "bias"]
    for name, value in numbers.items():
        assert torch.equal(getattr(module, name), torch.tensor([value], device=device))
    torch.testing.assert_close(module(x), (torch.tanh if kind is nn.DynamicTanh else torch.erf)(x * 0.5))
    state = {name: torch.randn_like(t) for name, t in module.state_dict().items()}
    module.load_state_dict(state)
    assert torch.equal(module(x), getattr(functional, function)(x, (8,), *state.values()))
    at_first = ", ".join(f"{name}={value}" for name, value in numbers.items())
    assert repr(module) == f"{kind.__name__}((8,), {at_first}, elementwise_affine=True, bias=True)"
    module.reset_parameters()
    assert torch.equal(module.weight, torch.ones(8, device=device)) and not module.bias.any()
    assert module.alpha.item() == 0.5
    assert kind(np.int64(8)).normalized_shape == kind([8]).normalized_shape == (8,)
    assert [*kind(8, bias=False).state_dict()] == [*numbers, "weight"]
    bare = kind((3, 8), 0.8, elementwise_affine=False, device=device, dtype=torch.bfloat16)
    assert [*bare.state_dict()] == [*numbers] and bare.alpha.dtype == torch.bfloat16
    assert bare(x).shape == x.shape and abs(bare.alpha.item() - 0.8) < 2**-8


def test_poly_module(device: torch.device) -> None:
    module, x = nn.PolyNorm(eps=1e-3, device=device), torch.randn(2, 3, 8, device=device)
    assert torch.equal(module.weight, torch.full((3,), 1 / 3, device=device))
    assert torch.equal(module.bias, torch.zeros(1, device=device))
    state = dict(weight=torch.randn(3, device=device), bias=torch.randn(1, device=device))
    module.load_state_dict(state)
    assert torch.equal(module(x), functional.poly_norm(x, *state.values(), 1e-3))
    assert repr(module) == "PolyNorm(eps=0.001, bias=True)"
    module.reset_parameters()
    assert module.bias.item() == 0
    assert [*nn.PolyNorm(bias=False, dtype=torch.float64).state_dict()] == ["weight"]


def _x(*shape: int, **how: Any) -> Tensor:
    return torch.randn(shape or (3, 2, 8), **how)


_ONE = torch.ones(1)
DYNAMIC = [
    ((None, (8,), _ONE), TypeError, "input must be a Tensor, not NoneType"),
    ((_x(), (8,), 0.5), TypeError, "alpha must be a Tensor, not float"),
    ((_x(), 8, _ONE), TypeError, "normalized_shape must be a tuple"),
    ((_x(), (7,), _ONE), RuntimeError, r"normalized_shape is \(7,\), but input has shape"),
    ((_x(), (), _ONE), RuntimeError, "normalized_shape is empty"),
    ((_x(), (8,), _x(8)), RuntimeError, r"alpha has shape \(8,\); it must have one element"),
    ((_x().int(), (8,), _ONE), NotImplementedError, "input has dtype torch.int32"),
    ((_x(), (8,), _ONE.int()), NotImplementedError, "alpha has dtype torch.int32"),
    ((_x(), (8,), _x(1, device="meta")), RuntimeError, "alpha is on meta, but input is on cpu"),
    ((_x(), (8,), _ONE, "weight", _x(7)), RuntimeError, r"weight has shape \(7,\)"),
    ((_x(), (8,), _ONE, "bias", 3.0), TypeError, "bias must be a Tensor or None"),
    ((_x().to_sparse(), (8,), _ONE), NotImplementedError, "input has layout"),
]
POLY = [
    ((None, _x(3)), TypeError, "input must be a Tensor, not NoneType"),
    ((_x(), None), TypeError, "weight must be a Tensor, not NoneType"),
    ((torch.tensor(1.0), _x(3)), RuntimeError, "input has no dims"),
    ((_x(), _x(4)), RuntimeError, r"weight has shape \(4,\); it must be \(3,\)"),
    ((_x(), _x(3), _x(2)), RuntimeError, r"bias has shape \(2,\); it must have one element"),
    ((_x(), _x(3), 1.0), TypeError, "bias must be a Tensor or None, not float"),
    ((_x(), _x(3).int()), NotImplementedError, "weight has dtype torch.int32"),
    ((_x(), _x(3, device="meta")), RuntimeError, "weight is on meta"),
    ((_x(), _x(3), None, -1.0), ValueError, "eps is"),
    ((_x(), _x(3), None, "1"), TypeError, "eps must be"),
]


@pytest.mark.parametrize(("given", "error", "words"), DYNAMIC)
@pytest.mark.parametrize("kind", KINDS[:2])
def test_what_dynamic_norms_refuse(kind: str, given: tuple[Any, ...], error: type[Exception], words: str) -> None:
    *given, name, parameter = given if len(given) == 5 else (*given, "weight", None)
    shift = [_ONE] if kind == "dynamic_erf" else []
    with pytest.raises(error, match=rf"^{kind}\(\): {words}"):
        getattr(functional, kind)(*given, *shift, **{name: parameter})


def test_a_shift_is_looked_at_too() -> None:
    for shift, error, words in (
        (None, TypeError, "shift must be a Tensor, not NoneType"),
        (_x(2), RuntimeError, r"shift has shape \(2,\); it must have one element"),
    ):
        with pytest.raises(error, match=words):
            functional.dynamic_erf(_x(), (8,), _ONE, shift)


@pytest.mark.parametrize(("given", "error", "words"), POLY)
def test_what_poly_norm_refuses(given: tuple[Any, ...], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=rf"^poly_norm\(\): {words}"):
        functional.poly_norm(*given)


@OF_EACH
def test_the_registered_op_refuses_what_its_kernels_cannot_read(kind: str, device: torch.device) -> None:
    call = example(kind, torch.float32, device)
    x, *others = call.arguments
    op, backward = (getattr(torch.ops.trinorm, name) for name in (kind, f"{kind}_backward"))
    with pytest.raises(RuntimeError, match=f"trinorm::{kind}: "):
        op(x[..., :3], torch.randn(4, device=device), *others[1:])
    with pytest.raises(NotImplementedError, match="a dtype other than"):
        op(x.int(), *others)
    wanted = [t is not None for t in call.tensors]
    with pytest.raises(RuntimeError, match="dy is not of the input's shape"):
        backward(x[0], x, *others, *wanted)
    if kind == "dynamic_tanh":
        with pytest.raises(RuntimeError, match="a gradient is asked for of what is not there"):
            backward(x, x, *others, *[True] * 5)
