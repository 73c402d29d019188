"""Conditioned norms as torch's citizens: derivatives, the registered ops, compiled, remembered, as modules, bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from conditioned_norms import EPS, Call, gated, modulated, of_heads, relative
from machine import JACOBIAN, ON_GPU
from trinorm import functional, nn, options
from trinorm.compare import assert_no_worse
from trinorm.ops import conditioned, road
from trinorm.reference import conditioned as conditioned_reference
from trinorm.spec import LAYER_NORM, RMS_NORM, RowNorm

Norm = Callable[..., Tensor]


def calls(dtype: torch.dtype, device: torch.device, lead: tuple[int, int] = (2, 3), n: int = 8) -> dict[str, Call]:
    """One of each kind, all of their tensors given."""

    def t(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    x, gate, weight, bias = t(*lead, n), t(*lead, n), t(n), t(n)
    return {
        "modulated": modulated(LAYER_NORM, x, t(lead[0], 1, n), t(lead[0], 1, n)),
        "of a token": modulated(RMS_NORM, x, t(*lead, n), t(*lead, n)),
        "of a head": of_heads(RMS_NORM, x, t(lead[1], n)),
        "norm first": gated(LAYER_NORM, x, gate, weight, bias),
        "gate first": gated(RMS_NORM, x, gate, weight, size=n // 2, first=True),
        "sigmoid": gated(RMS_NORM, x, gate, weight, bias, activation="sigmoid"),
        "L2": relative(x, divisor=1),
        "scale": relative(x, t(1), divisor=1),
        "partial": relative(x, weight, count=n // 2 - 1),
    }


KINDS = pytest.mark.parametrize("kind", list(calls(torch.float32, torch.device("cpu"))))


def registered(call: Call) -> Tensor:
    """The same by the registered op."""
    return getattr(torch.ops.trinorm, f"conditioned_{call.spec.norm.name}")(*arguments(call))[0]


def arguments(call: Call) -> tuple[Any, ...]:
    spec, dims, size, *tensors, eps = call
    by = dims, size, spec.counted, spec.divisor, eps, spec.gate, spec.gate_first, spec.modulated
    return *tensors, *by, call.x.dtype, False, spec.norm.cast


def present(call: Call) -> list[Tensor]:
    return [t for t in call.tensors if t is not None]


def given(call: Call, tensors: Any) -> Call:
    """With other tensors in the places of those that there are."""
    there = iter(tensors)
    return call.of([None if t is None else next(there) for t in call.tensors])


@pytest.mark.filterwarnings("ignore:.*runs torch's own operator")  # a GPU says so of torch.func and forward mode
@pytest.mark.parametrize(
    ("norm", "kind"),
    [
        *((Call.__call__, kind) for kind in ("modulated", "of a token", "norm first", "gate first", "sigmoid", "scale")),
        *((registered, kind) for kind in ("modulated", "of a head", "gate first", "L2", "partial")),
    ],
)
def test_derivatives(norm: Norm, kind: str, device: torch.device) -> None:
    """Numerically, and twice; batched; by torch.func; and, by torch's operators, in forward mode."""
    call = calls(torch.float64, device, (1, 2), 4)[kind]
    leaves = [t.requires_grad_() for t in present(call)]

    def of_given(*tensors: Tensor) -> Tensor:
        return norm(given(call, tensors))

    torch.autograd.gradcheck(of_given, leaves, check_batched_grad=True, **JACOBIAN)
    torch.autograd.gradgradcheck(of_given, leaves, **JACOBIAN)
    if norm is not registered:
        torch.autograd.gradcheck(of_given, leaves, check_forward_ad=True, check_backward_ad=False, **JACOBIAN)
    plain = [t.detach() for t in leaves]

    def expected(x: Tensor) -> Tensor:
        return conditioned_reference.composite(*given(call, (x, *plain[1:])), torch.float64)

    found, wanted = (torch.func.jacrev(f)(plain[0]) for f in (lambda x: of_given(x, *plain[1:]), expected))
    torch.testing.assert_close(found, wanted)
    batch = torch.stack([plain[0], 2 * plain[0]])
    found = torch.func.vmap(lambda x: of_given(x, *plain[1:]))(batch)
    for i in range(2):
        torch.testing.assert_close(found[i], of_given(batch[i], *plain[1:]))


@pytest.mark.parametrize("kind", [kind for kind in KINDS.args[1] if kind != "scale"])  # of L2's op
def test_registered(kind: str, device: torch.device) -> None:
    call = calls(torch.bfloat16 if kind == "modulated" else torch.float32, device)[kind]
    for t in present(call):
        t.requires_grad_()
    op = getattr(torch.ops.trinorm, f"conditioned_{call.spec.norm.name}").default
    opcheck(op, arguments(call))
    # Of no elements a functional's call asks no op, but a rank's empty shard does, and an exported program.
    none = calls(torch.float32, device, (0, 3))[kind]
    for t in present(none):
        t.requires_grad_()
    opcheck(op, arguments(none))


@pytest.mark.parametrize(
    ("dynamic", "kind"),
    [(False, "gate first"), *((True, kind) for kind in ("modulated", "of a token", "of a head", "gate first", "scale"))],
)
def test_compiled(dynamic: bool, kind: str, device: torch.device) -> None:
    """One graph for any number of tokens, with an eager call's bits."""
    torch._dynamo.reset()
    graphs = []
    call = calls(torch.bfloat16, device)[kind]
    heads, there = kind == "of a head", call.of([None if t is None else () for t in call.tensors])

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    def step(*tensors: Tensor) -> Tensor:
        return given(there, tensors)()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    compiled_once = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (4, 5, 9):
        sizes = ((tokens, *t.shape[1:]) if heads and t is call.x else t.shape for t in present(call))
        sizes = [tuple(tokens if s == 3 and not heads else s for s in size) for size in sizes]
        tensors = [torch.randn(size, device=device).bfloat16() for size in sizes]
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
            assert any("conditioned_" in str(node.target) for node in graphs[0].graph.nodes)
    torch._dynamo.reset()


@KINDS
def test_exported(kind: str, device: torch.device) -> None:
    call = calls(torch.float32, device)[kind]

    class Norm(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return given(call, tensors)()

    tensors = tuple(present(call))
    torch.testing.assert_close(torch.export.export(Norm(), tensors).module()(*tensors), call())


def test_what_was_saved_may_come_back_otherwise(device: torch.device) -> None:
    """In another layout or dtype, from a hook; and a gradient may have no storage."""
    call = calls(torch.float32, device)["norm first"]
    leaves = [t.requires_grad_() for t in present(call)]

    def gradients(unpack: Callable[[Tensor], Tensor], dy: Tensor) -> tuple[Tensor, ...]:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), unpack):
            return torch.autograd.grad(call(), leaves, dy)

    dy = torch.randn_like(call.x)
    for of_y in (dy, torch._efficientzerotensor(dy.shape, device=device)):
        expected = gradients(lambda t: t, of_y + 0 if of_y is dy else torch.zeros_like(dy))
        for unpack in (lambda t: torch.stack((t, t), -1)[..., 0], lambda t: torch._neg_view(-t), lambda t: t.double()):
            for _ in range(2):
                for got, want in zip(gradients(unpack, of_y), expected, strict=True):
                    torch.testing.assert_close(got, want)


def test_a_call_is_remembered(device: torch.device) -> None:
    """And found again, of views too; another shape, dtype, layout or manner is another call."""
    for i in range(3):
        for dtype in (torch.float32, torch.bfloat16):
            for call in calls(dtype, device).values():
                for x in (call.x, torch.cat((call.x, call.x), -1)[..., :8]):
                    of = call._replace(x=x)
                    by_torch = conditioned_reference.composite(*of, dtype)
                    assert_no_worse("y", of(), conditioned_reference.oracle(*of).y, by_torch)
        assert sum(map(len, conditioned.CALLS._kept.values())) == 36, i
    with options(batch_invariant=True):
        assert not conditioned.CALLS._kept


@pytest.mark.parametrize("kind", ["modulated", "norm first", "gate first", "L2"])
def test_under_autocast_as_the_norm(kind: str, device: torch.device) -> None:
    """The result has the dtype that torch's own norm has there."""
    call = calls(torch.bfloat16, device)[kind]
    with torch.autocast(device.type, torch.bfloat16):
        norm = torch.nn.functional.layer_norm if call.spec.norm.center else torch.nn.functional.rms_norm
        dtype = norm(call.x, (8,)).dtype
        for y in (call(), registered(call)):
            assert y.dtype == dtype
            expected = conditioned_reference.oracle(*call).y
            assert_no_worse("y", y, expected, conditioned_reference.composite(*call, dtype))
        with options(autocast_keeps_dtype=True):
            for y in (call(), registered(call)):
                assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["modulated", "norm first", "gate first"])
def test_a_result_in_fp32_of_16_bits(kind: str, device: torch.device) -> None:
    """As autocast asks for it, forward and backward."""
    call = calls(torch.bfloat16, device)[kind]
    leaves, plain = ([t.detach().requires_grad_() for t in present(call)] for _ in range(2))
    op, how = getattr(torch.ops.trinorm, f"conditioned_{call.spec.norm.name}"), arguments(call)[4:]
    of = given(call, leaves)
    y = op(*of.tensors, *(torch.float32 if value is torch.bfloat16 else value for value in how))[0]
    by_torch = conditioned_reference.composite(*given(call, plain), torch.float32)
    assert y.dtype == torch.float32
    assert_no_worse("y", y.detach(), conditioned_reference.oracle(*call).y, by_torch.detach())
    dy = torch.randn_like(y)
    for got, want in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(by_torch, plain, dy), strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("norm", [LAYER_NORM, RMS_NORM], ids=lambda norm: norm.name)
def test_modulated_modules(norm: RowNorm, device: torch.device) -> None:
    kind, of_torch = (nn.ModulatedLayerNorm, torch.nn.LayerNorm) if norm.center else (nn.ModulatedRMSNorm, torch.nn.RMSNorm)
    x, scale, shift = (torch.randn(*lead, 8, device=device) for lead in ((2, 3), (2, 1), (2, 1)))
    function = getattr(functional, f"modulated_{norm.name}")
    module = kind(8, eps=1e-3, device=device)
    assert isinstance(module, of_torch)
    assert not module.state_dict()
    for shifts in ((shift,), ()):
        assert torch.equal(module(x, scale, *shifts), function(x, (8,), scale, *shifts, eps=1e-3))
    owner = kind((8,), elementwise_affine=True, device=device)
    assert [*owner.state_dict()] == [*of_torch(8).state_dict()]
    owner.weight.data = torch.randn(8, device=device)
    assert torch.equal(owner(x, scale, shift), function(x, (8,), scale, shift, owner.weight, eps=owner.eps))
    assert kind(np.int64(8)).normalized_shape == of_torch(np.int64(8)).normalized_shape
    module.batch_invariant = True
    of_torchs = of_torch(8, eps=1e-3, elementwise_affine=False).extra_repr()
    assert repr(module) == f"{kind.__name__}({of_torchs}, batch_invariant=True)"


def test_per_head_module(device: torch.device) -> None:
    module = nn.PerHeadRMSNorm(3, 8, eps=1e-3, device=device)
    assert torch.equal(module.state_dict()["weight"], torch.ones(3, 8, device=device))
    x, weight = torch.randn(2, 3, 8, device=device), torch.randn(3, 8, device=device)
    module.load_state_dict(dict(weight=weight))
    module.cast = "gemma"
    assert torch.equal(module(x), functional.per_head_rms_norm(x, weight, 1e-3, cast="gemma"))
    assert repr(module) == "PerHeadRMSNorm(3, 8, eps=0.001, cast='gemma')"
    for has_bias in (True, False):
        layer_norm = nn.PerHeadLayerNorm(3, 8, bias=has_bias, device=device)
        assert [*layer_norm.state_dict()] == ["weight", "bias"][: 1 + has_bias]
        assert torch.equal(layer_norm.weight, torch.ones_like(weight))
        layer_norm.weight.data = weight
        bias = None if layer_norm.bias is None else torch.nn.init.normal_(layer_norm.bias).detach()
        assert torch.equal(layer_norm(x), functional.per_head_layer_norm(x, weight, bias))
        assert repr(layer_norm) == f"PerHeadLayerNorm(3, 8, eps=1e-05{'' if has_bias else ', bias=False'})"


def test_gated_modules(device: torch.device) -> None:
    x, gate, weight, bias = torch.randn(4, 2, 8, device=device).unbind()
    weight, bias = weight[0], bias[0]
    for kind, function in (
        (nn.GatedRMSNorm, functional.gated_rms_norm),
        (nn.GatedLayerNorm, functional.gated_layer_norm),
    ):
        module = kind(8, eps=1e-3, bias=True, group_size=4, device=device)
        assert [*module.state_dict()] == ["weight", "bias"]
        assert torch.equal(module.weight, torch.ones_like(weight)) and not module.bias.any()
        module.load_state_dict(dict(weight=weight, bias=bias))
        for name, value in dict(activation="sigmoid", norm_before_gate=False, cast="llama", batch_invariant=True).items():
            setattr(module, name, value)
            how: dict[str, Any] = dict(activation=module.activation, norm_before_gate=module.norm_before_gate)
            how.update(cast=module.cast, batch_invariant=module.batch_invariant, group_size=4)
            assert torch.equal(module(x, gate), function(x, gate, weight, bias, 1e-3, **how))
        assert repr(module) == (
            f"{kind.__name__}(8, eps=0.001, elementwise_affine=True, bias=True, group_size=4, norm_before_gate=False, "
            "cast='llama', batch_invariant=True, activation='sigmoid')"
        )
        assert "bias=False" in repr(kind(8, bias=False))
        assert not kind(8, elementwise_affine=False).state_dict()
    assert [*nn.GatedRMSNorm(8).state_dict()] == ["weight"]


@pytest.mark.skipif(not ON_GPU, reason="a CPU without the interpreter has no kernels to fall back from")
def test_a_gpu_says_once_what_has_no_kernel(device: torch.device) -> None:
    x = torch.randn(1, conditioned.MOST_OF_ROW + 1, device=device)
    road._warn_once.cache_clear()  # a test before this one may have been told
    with pytest.warns(UserWarning, match="over 1048576 elements"):
        functional.gated_rms_norm(x, x)


def test_the_default_epsilon_is_rms_norms(device: torch.device) -> None:
    for dtype in (torch.bfloat16, torch.float64):
        x = torch.randn(3, 16, device=device).to(dtype) * 1e-3
        zero, eps = torch.zeros_like(x), 2.0**-52 if dtype == torch.float64 else 2.0**-23
        call = modulated(RMS_NORM, x, zero, None, eps=eps)
        for y in (functional.modulated_rms_norm(x, (16,), zero), functional.per_head_rms_norm(x, zero + 1)):
            assert_no_worse("y", y, conditioned_reference.oracle(*call).y, torch.nn.functional.rms_norm(x, (16,)))
        y = functional.modulated_layer_norm(x, (16,), zero)
        of = call._replace(spec=call.spec._replace(norm=LAYER_NORM), eps=EPS)
        assert_no_worse("y", y, conditioned_reference.oracle(*of).y, torch.nn.functional.layer_norm(x, (16,)))
