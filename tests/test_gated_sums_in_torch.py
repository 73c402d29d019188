"""Norms of a gated sum as torch's citizens: derivatives, the registered ops, compiled, exported, remembered, as modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from machine import JACOBIAN
from test_gated_sums import BY_NORM, Call, drawn
from trinorm import functional, nn, options
from trinorm.ops import gated_sum
from trinorm.spec import LAYER_NORM, RMS_NORM, RowNorm

Results = tuple[Tensor, Tensor]


def present(call: Call) -> list[Tensor]:
    return [t for t in call.tensors if t is not None]


def arguments(call: Call) -> tuple[Any, ...]:
    return *call.tensors, call.dims, call.size, call.eps, call.modulated, call.x.dtype, False


def registered(call: Call) -> Results:
    """The same by the registered op."""
    y, total, *_ = getattr(torch.ops.trinorm, f"add_modulated_{call.norm.name}")(*arguments(call))
    return y, total


@pytest.mark.filterwarnings("ignore:.*runs torch's own operator")  # a GPU says so of torch.func and forward mode
@pytest.mark.parametrize("own", [(1, 1), (1, 2)], ids=str)
@pytest.mark.parametrize(("norm", "by"), [(LAYER_NORM, Call.__call__), (RMS_NORM, registered)])
def test_derivatives(own: tuple[int, int], norm: RowNorm, by: Callable[..., Results], device: torch.device) -> None:
    """Numerically, and twice; batched; by torch.func; and, by torch's operators, in forward mode."""
    call = drawn(norm, (1, 2), own, 4, torch.float64, device)
    leaves = [t.requires_grad_() for t in present(call)]

    def of_given(*tensors: Tensor) -> Results:
        return by(call.of(tensors))

    torch.autograd.gradcheck(of_given, leaves, check_batched_grad=True, **JACOBIAN)
    torch.autograd.gradgradcheck(of_given, leaves, **JACOBIAN)
    if by is not registered:
        torch.autograd.gradcheck(of_given, leaves, check_forward_ad=True, check_backward_ad=False, **JACOBIAN)
    plain = [t.detach() for t in leaves]
    found, wanted = (
        torch.func.jacrev(f)(plain[0])
        for f in (lambda x: of_given(x, *plain[1:]), lambda x: call.of((x, *plain[1:])).by_torch())
    )
    torch.testing.assert_close(found, wanted)
    batch = torch.stack([plain[0], 2 * plain[0]])
    for i in range(2):
        found = torch.func.vmap(lambda x: of_given(x, *plain[1:]))(batch)
        torch.testing.assert_close([t[i] for t in found], list(of_given(batch[i], *plain[1:])))


@BY_NORM
def test_registered(norm: RowNorm, device: torch.device) -> None:
    call = drawn(norm, (2, 3), (2, 1), 8, torch.bfloat16 if norm.center else torch.float32, device)
    for t in present(call):
        t.requires_grad_()
    op = getattr(torch.ops.trinorm, f"add_modulated_{norm.name}").default
    opcheck(op, arguments(call))
    opcheck(op, arguments(call._replace(scale=None, shift=None)))
    none = drawn(norm, (0, 3), (0, 1), 8, torch.float32, device)  # as a rank's empty shard has
    for t in present(none):
        t.requires_grad_()
    opcheck(op, arguments(none))
    for wrong, error in ((call.residual[:1], "residual"), (call.gate[..., :4], "gate")):
        at = 1 if error == "residual" else 2
        with pytest.raises(RuntimeError, match=error):
            op(*(wrong if i == at else t for i, t in enumerate(arguments(call))))


@pytest.mark.parametrize("used", [0, 1], ids=["y", "sum"])
def test_a_result_that_nobody_uses(used: int, device: torch.device) -> None:
    """By the registered op; scale and shift have no part in the sum."""
    call = drawn(LAYER_NORM, (2, 3), (2, 1), 8, torch.float32, device)
    leaves = [t.requires_grad_() for t in present(call)]
    found, expected = (
        torch.autograd.grad(results[used].square().sum(), leaves, allow_unused=True)
        for results in (registered(call), call.by_torch())
    )
    torch.testing.assert_close(found, expected)


def test_compiled(device: torch.device) -> None:
    """One graph for any number of tokens, with an eager call's bits."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    def step(*tensors: Tensor) -> Results:
        x, residual, gate, scale, shift = tensors
        return functional.add_modulated_layer_norm(x, residual, gate, (16,), scale, shift)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled_once = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (4, 5, 9):
        call = drawn(LAYER_NORM, (2, tokens), (2, 1), 16, torch.bfloat16, device)
        found, expected = [], []
        for f, results in ((compiled, found), (step, expected)):
            leaves = [t.detach().requires_grad_() for t in present(call)]
            y, total = f(*leaves)
            results += [y, total, *torch.autograd.grad((y * total).float().sum(), leaves)]
        for got, want in zip(found, expected, strict=True):
            assert torch.equal(got, want)
        compiled_once(*present(call))
        assert len(graphs) == 1
        assert any("add_modulated_" in str(node.target) for node in graphs[0].graph.nodes)
    torch._dynamo.reset()


def test_exported(device: torch.device) -> None:
    call = drawn(RMS_NORM, (2, 3), (2, 1), 8, torch.float32, device)

    class Norm(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Results:
            return call.of(tensors)()

    tensors = tuple(present(call))
    torch.testing.assert_close(torch.export.export(Norm(), tensors).module()(*tensors), call())


def test_what_was_saved_may_come_back_otherwise(device: torch.device) -> None:
    """In another layout or dtype, from a hook; and a gradient may have no storage."""
    call = drawn(LAYER_NORM, (2, 3), (2, 1), 8, torch.float32, device)
    leaves = [t.requires_grad_() for t in present(call)]

    def gradients(unpack: Callable[[Tensor], Tensor], *of: Tensor) -> tuple[Tensor, ...]:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), unpack):
            return torch.autograd.grad(call(), leaves, of)

    dy, dsum = torch.randn(2, *call.x.shape, device=device)
    none = torch._efficientzerotensor(dy.shape, device=device)
    for of in ((dy, dsum), (dy, none), (none, dsum)):
        expected = gradients(lambda t: t, *(torch.zeros_like(dy) if t is none else t for t in of))
        unpacks = (lambda t: torch.stack((t, t), -1)[..., 0], lambda t: torch._neg_view(-t), lambda t: t.double())
        for unpack in unpacks[: 1 if any(t is none for t in of) else 3]:
            for _ in range(2):
                for got, want in zip(gradients(unpack, *of), expected, strict=True):
                    torch.testing.assert_close(got, want)


def test_a_call_is_remembered(device: torch.device) -> None:
    """And found again, of views too; another dtype, layout or manner is another call."""
    for i in range(3):
        for dtype in (torch.float32, torch.bfloat16):
            call = drawn(RMS_NORM, (2, 3), (2, 1), 8, dtype, device)
            for x in (call.x, torch.cat((call.x, call.x), -1)[..., :8]):
                torch.testing.assert_close(call._replace(x=x)(), call.by_torch())
        assert sum(map(len, gated_sum.CALLS._kept.values())) == 4, i
    with options(batch_invariant=True):
        assert not gated_sum.CALLS._kept


@BY_NORM
def test_under_autocast_as_the_norm(norm: RowNorm, device: torch.device) -> None:
    """y has the dtype that torch's own norm has there; the stream keeps its own."""
    call = drawn(norm, (2, 3), (2, 1), 8, torch.bfloat16, device)
    with torch.autocast(device.type, torch.bfloat16):
        dtype = getattr(torch.nn.functional, norm.name)(call.x, (8,)).dtype
        for y, total in (call(), registered(call)):
            assert (y.dtype, total.dtype) == (dtype, torch.bfloat16)
        with options(autocast_keeps_dtype=True):
            for y, _ in (call(), registered(call)):
                assert y.dtype == torch.bfloat16


@BY_NORM
def test_modules(norm: RowNorm, device: torch.device) -> None:
    kind, of_torch = (
        (nn.AddModulatedLayerNorm, torch.nn.LayerNorm) if norm.center else (nn.AddModulatedRMSNorm, torch.nn.RMSNorm)
    )
    call = drawn(norm, (2, 3), (2, 1), 8, torch.float32, device)._replace(eps=1e-3)
    module = kind(8, eps=1e-3, device=device)
    assert isinstance(module, of_torch) and not module.state_dict()
    assert all(map(torch.equal, module(*present(call)), call()))
    owner = kind(8, eps=1e-3, elementwise_affine=True, device=device)
    assert [*owner.state_dict()] == [*of_torch(8).state_dict()]
    owner.weight.data = torch.randn(8, device=device)
    function = getattr(functional, f"add_modulated_{norm.name}")
    x, residual, gate, scale, shift = present(call)
    for given in ((), (scale, shift)):
        found = owner(x, residual, gate, *given)
        assert all(map(torch.equal, found, function(x, residual, gate, (8,), *given, weight=owner.weight, eps=1e-3)))
    module.batch_invariant = True
    of_torchs = of_torch(8, eps=1e-3, elementwise_affine=False).extra_repr()
    assert repr(module) == f"{kind.__name__}({of_torchs}, batch_invariant=True)"


def test_a_block_of_a_diffusion_transformer(device: torch.device) -> None:
    """Two branches, adaLN-Zero's, as written out: values, and gradients of what makes the condition."""
    n = 16
    x = torch.randn(2, 5, n, device=device)
    made, first, second = (torch.nn.Linear(a, b, device=device) for a, b in ((n, 6 * n), (n, n), (n, n)))
    condition = torch.randn(2, n, device=device)

    def fused() -> Tensor:
        shift, scale, gate, shift_, scale_, gate_ = made(condition)[:, None].chunk(6, -1)
        h = functional.modulated_layer_norm(x, (n,), scale, shift, eps=1e-6)
        h, stream = functional.add_modulated_layer_norm(first(h), x, gate, (n,), scale_, shift_, eps=1e-6)
        return stream + gate_ * second(h)

    def written_out() -> Tensor:
        shift, scale, gate, shift_, scale_, gate_ = made(condition)[:, None].chunk(6, -1)
        norm = torch.nn.LayerNorm(n, elementwise_affine=False, eps=1e-6, device=device)
        stream = x + gate * first(norm(x) * (1 + scale) + shift)
        return stream + gate_ * second(norm(stream) * (1 + scale_) + shift_)

    parameters = [*made.parameters(), *first.parameters(), *second.parameters()]
    torch.testing.assert_close(fused(), written_out())
    gradients = (torch.autograd.grad(f().square().sum(), parameters) for f in (fused, written_out))
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
