"""ops/jagged.py: nested tensors of layout torch.jagged, and what is said of the others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from paths import SPECS
from trinorm import functional, nn
from trinorm.ops.hosts import rows
from trinorm.spec import RowNorm

pytestmark = [
    # What torch.nested itself does under torch.compile.
    pytest.mark.parametrize("spec", SPECS),
]

JAGGED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "(B, *, H, D)": lambda values, offsets: torch.nested.nested_tensor_from_jagged(values, offsets),
    "(B, H, *, D)": lambda values, offsets: torch.nested.nested_tensor_from_jagged(values, offsets, jagged_dim=2),
    "(B, H, *, D), a view": lambda values, offsets: torch.nested.nested_tensor_from_jagged(values, offsets).transpose(1, 2),
    "(B, *, H, D), with holes": lambda values, offsets: torch.nested.nested_tensor_from_jagged(
        values, offsets, offsets.diff() - 1
    ),
    "(B, *, H, D), of known lengths": lambda values, offsets: torch.nested.nested_tensor_from_jagged(
        values, offsets, min_seqlen=1, max_seqlen=3
    ),
}


def norm(spec: RowNorm, x: Tensor, shape: Any, *parameters: Tensor) -> Tensor:
    return getattr(functional, spec.name)(x, shape, *parameters, eps=1e-5)


def pieces(device: torch.device) -> tuple[Tensor, Tensor]:
    """Values of 6 × 4 rows, and the offsets of three sequences among them."""
    return torch.randn(6, 4, 8, device=device, requires_grad=True), torch.tensor([0, 1, 4, 6], device=device)


def parameters(spec: RowNorm, device: torch.device) -> list[Tensor]:
    return [torch.randn(8, device=device, requires_grad=True) for _ in range(2 if spec.center else 1)]


@pytest.mark.parametrize("layout", JAGGED)
def test_values_are_the_rows(spec: RowNorm, layout: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels: list[Any] = []
    actual = rows.launch
    monkeypatch.setattr(rows, "launch", lambda kernel, *args: (kernels.append(kernel), actual(kernel, *args))[1])
    values, offsets = pieces(device)
    inputs = values, *parameters(spec, device)
    x = JAGGED[layout](values, offsets)
    y = norm(spec, x, (8,), *inputs[1:])
    expected = norm(spec, x.values(), (8,), *inputs[1:])
    assert y.layout == torch.jagged
    assert y.shape == x.shape  # which holds of the same offsets alone
    assert (y._maybe_min_seqlen, y._maybe_max_seqlen) == (x._maybe_min_seqlen, x._maybe_max_seqlen)
    assert torch.equal(y.values(), expected)
    dy = torch.randn_like(expected)
    found = torch.autograd.grad(y.values(), inputs, dy)
    assert all(map(torch.equal, found, torch.autograd.grad(expected, inputs, dy)))
    assert len(kernels) == 2 * len(set(kernels)) > 0


def test_goes_on_as_jagged(spec: RowNorm, device: torch.device) -> None:
    """Through its neighbours and back, as torch's own. (Jagged tensors have no second derivatives in torch.)"""
    values, offsets = pieces(device)
    inputs = [t.detach().double().requires_grad_() for t in (values, *parameters(spec, device))]
    x = torch.nested.nested_tensor_from_jagged(inputs[0], offsets)
    found, expected = (
        torch.autograd.grad((x + f(x, (8,), *inputs[1:], eps=1e-5) * 2).sin().values().sum(), inputs)
        for f in (getattr(functional, spec.name), getattr(torch.nn.functional, spec.name))
    )
    torch.testing.assert_close(found, expected)


def test_two_dims(spec: RowNorm, device: torch.device) -> None:
    values, offsets = pieces(device)
    y = norm(spec, torch.nested.nested_tensor_from_jagged(values, offsets), (4, 8))
    assert torch.equal(y.values(), norm(spec, values, (4, 8)))


def test_module(spec: RowNorm, device: torch.device) -> None:
    module = (nn.LayerNorm if spec.center else nn.RMSNorm)(8, device=device)
    same = copy.deepcopy(module)
    values, offsets = pieces(device)
    module(torch.nested.nested_tensor_from_jagged(values, offsets)).sin().values().sum().backward()
    found = [t.grad for t in (values, *module.parameters())]
    values.grad = None
    same(values).sin().sum().backward()
    assert all(map(torch.equal, found, [t.grad for t in (values, *same.parameters())]))


def test_compiled(spec: RowNorm, device: torch.device) -> None:
    def f(values: Tensor, offsets: Tensor, *parameters: Tensor) -> Tensor:
        return norm(spec, torch.nested.nested_tensor_from_jagged(values, offsets) * 2, (8,), *parameters).values()

    torch._dynamo.reset()
    values, offsets = pieces(device)
    given = parameters(spec, device)
    dy = torch.randn_like(values)
    found, expected = (
        [y, *torch.autograd.grad(y, [values, *given], dy)]
        for y in (g(values, offsets, *given) for g in (torch.compile(f, fullgraph=True, backend="aot_eager"), f))
    )
    assert all(map(torch.equal, found, expected))


def test_the_ragged_dim_is_refused_as_by_torch(spec: RowNorm, device: torch.device) -> None:
    values, offsets = pieces(device)
    x = torch.nested.nested_tensor_from_jagged(values, offsets)
    turned = torch.nested.nested_tensor_from_jagged(values.transpose(0, 2), offsets, jagged_dim=3)
    for input, shape in ((x, x.shape[1:]), (x, (3, 4, 8)), (x, x.shape), (turned, turned.shape[3:])):
        with pytest.raises(RuntimeError if spec.center else ValueError, match=r"normalized_shape .* ragged"):
            norm(spec, input, shape)


def test_other_arguments_are_checked(spec: RowNorm, device: torch.device) -> None:
    x = torch.nested.nested_tensor_from_jagged(*pieces(device))
    with pytest.raises(RuntimeError, match="normalized_shape"):
        norm(spec, x, (4,))
    with pytest.raises(TypeError, match="normalized_shape"):
        norm(spec, x, 8)


def test_a_jagged_weight_is_refused(spec: RowNorm, device: torch.device) -> None:
    x = torch.randn(4, 8, device=device)
    weight = torch.nested.nested_tensor([x[0], x[1]], layout=torch.jagged, device=device)
    with pytest.raises(RuntimeError, match=r"weight has shape"):
        getattr(functional, spec.name)(x, (8,), weight)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_strided_nested_tensors_are_refused(spec: RowNorm, device: torch.device) -> None:
    x = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)], device=device)
    with pytest.raises(RuntimeError, match="input is a nested tensor"):
        norm(spec, x, (8,))
    for refused in (lambda: norm(spec, torch.randn(3, 8, device=device), (8,), x), lambda: of_sum(spec, x)):
        with pytest.raises(RuntimeError, match="weight is a nested tensor"):
            refused()


def of_sum(spec: RowNorm, weight: Tensor) -> None:
    x = torch.randn(3, 8, device=weight.device)
    getattr(functional, f"add_{spec.name}")(x, x, weight, normalized_shape=(8,))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_strided_nested_weights_are_refused_after_a_call_that_is_recalled(spec: RowNorm, device: torch.device) -> None:
    """They have no strides to be told apart by, and torch's guard ends the process that asks for them."""
    x, weight = torch.randn(2, 8, device=device), torch.randn(8, device=device)
    nested = torch.nested.nested_tensor([weight], device=device)
    gated = getattr(functional, f"gated_{spec.name}")
    for _ in range(2):
        norm(spec, x, (8,), weight)
        gated(x, x.clone(), weight)
    for refused in (lambda: norm(spec, x, (8,), nested), lambda: gated(x, nested), lambda: gated(x, x.clone(), nested)):
        with pytest.raises(RuntimeError, match=r"[Nn]ested ?[Tt]ensor"):
            refused()
