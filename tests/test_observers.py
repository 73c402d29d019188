"""Who looks at a call, or hands it tensors that are none: the kernels stay out of it, and nothing is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import trinorm
from trinorm import functional
from trinorm.ops import road

pytestmark = pytest.mark.filterwarnings("ignore:trinorm:UserWarning", "ignore:Sparse CSR:UserWarning")


@pytest.fixture(params=["layer_norm", "rms_norm"])
def op(request: pytest.FixtureRequest) -> str:
    return request.param


def norm(op: str, *args: Any, **keywords: Any) -> Tensor:
    return getattr(functional, op)(*args, **keywords)


@pytest.mark.parametrize("early", [False, True], ids=["after autograd", "before autograd"])
def test_traced_by_make_fx(op: str, early: bool, device: torch.device) -> None:
    """Also when such a call was made before, and would be recalled."""
    x = torch.randn(4, 8, device=device)
    for _ in range(2):
        norm(op, x, (8,))
    traced = make_fx(lambda x: norm(op, x * 2, (8,)) + 1, pre_dispatch=early)(x)
    x = torch.randn(4, 8, device=device)
    torch.testing.assert_close(traced(x), getattr(F, op)(x * 2, (8,)) + 1)


def test_tensors_without_memory(op: str, device: torch.device) -> None:
    x = torch.randn(4, 8, device=device)
    assert not norm(op, torch._efficientzerotensor(4, 8, device=device), (8,), x[0]).any()
    expected = norm(op, x, (8,))
    y = norm(op, torch._to_functional_tensor(x), (8,))
    torch.testing.assert_close(torch._from_functional_tensor(y), expected)
    with pytest.raises(NotImplementedError, match=r"layout torch\.sparse_csr"):  # after a dense one of that shape too
        norm(op, x.to_sparse_csr(), (8,))


def test_another_arguments_function_is_asked(op: str, device: torch.device) -> None:
    """A weight's ``__torch_function__`` sees the call, as torch's own would be seen, and torch.fx traces it."""
    seen: list[object] = []

    class Weight(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))

    x, weight = torch.randn(4, 8, device=device), torch.randn(8, device=device)
    y = norm(op, x, (8,), weight.as_subclass(Weight))
    assert seen[:1] == [getattr(functional, op)]
    torch.testing.assert_close(y.as_subclass(torch.Tensor), norm(op, x, (8,), weight))

    class Model(torch.nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return norm(op, x, (8,), weight)

    assert torch.equal(torch.fx.symbolic_trace(Model())(weight), norm(op, x, (8,), weight))


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_exported_under_autocast(op: str, strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One operator: how torch's autocast treats it was asked out of the tracer's sight."""
    monkeypatch.setattr(road, "INTERPRETED", False)

    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return norm(op, x, (8,))

    program = torch.export.export(Model(), (torch.randn(4, 8),), strict=strict)
    calls = [
        str(node.target)
        for module in program.graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if node.op == "call_function" and "aten" in str(node.target)
    ]
    assert sum("norm" in call for call in calls) == 1
    assert not any("ones" in call for call in calls)
    torch._dynamo.reset()
    compiled = torch.compile(Model(), backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 8)
    assert compiled(x).dtype == Model()(x).dtype


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm"])
def test_grad_mode_within_inference_mode(name: str, device: torch.device) -> None:
    """There is no gradient there, before and after a call that has one."""
    x, weight = torch.randn(2, 4, 4, device=device), torch.ones(4, device=device, requires_grad=True)
    before = dict(normalized_shape=(4,)) if name.endswith(("layer_norm", "rms_norm")) else {}
    before |= dict(num_groups=2) if name == "group_norm" else {}
    before |= dict(running_mean=None, running_var=None, training=True) if name == "batch_norm" else {}

    def call() -> Tensor:
        y: Tensor = getattr(functional, name)(x, weight=weight, **before)
        return y

    for _ in range(3):
        assert call().requires_grad
        with torch.inference_mode(), torch.enable_grad():
            assert call().is_inference()
            assert not call().requires_grad


def third(f: Any, x: Tensor) -> Tensor:
    (first,) = torch.autograd.grad(f(x).sin().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.cos().sum(), x, create_graph=True)
    return torch.autograd.grad(second.sin().sum(), x)[0]


def test_third_derivative_without_kernels(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of the definition, by function and by module; torch's own layer_norm has another, which is wrong (2.13)."""
    monkeypatch.setattr(road, "INTERPRETED", False)

    def definition(x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if op == "layer_norm" else x
        return x * ((x * x).mean(-1, keepdim=True) + 1e-5).rsqrt()

    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    expected = third(definition, x)
    module = (trinorm.nn.LayerNorm if op == "layer_norm" else trinorm.nn.RMSNorm)(3, eps=1e-5, dtype=torch.float64)
    torch.testing.assert_close(third(lambda x: norm(op, x, (3,), eps=1e-5), x), expected)
    torch.testing.assert_close(third(module, x), expected)
    # The first is torch's own, bit for bit.
    grads = [torch.autograd.grad(f(x, (3,), eps=1e-5).sin().sum(), x)[0] for f in (getattr(functional, op), getattr(F, op))]
    assert torch.equal(*grads)


def test_llamas_rounding_is_of_the_value_alone(op: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that passed it would leave fp16's range."""
    x = (torch.randn(4, 64, device=device) * 100).half().requires_grad_()
    weight = torch.full((64,), 100.0, device=device).half()
    dy = torch.randn(4, 64, device=device).sign().half() * 1000
    found = torch.autograd.grad(norm(op, x, (64,), weight, eps=1e-6, cast="llama"), x, dy)[0]
    by_func = torch.func.vjp(lambda x: norm(op, x, (64,), weight, eps=1e-6, cast="llama"), x.detach())[1](dy)[0]
    assert found.isfinite().all()
    torch.testing.assert_close(by_func, found, rtol=2e-3, atol=2e-3 * float(found.abs().max()))
