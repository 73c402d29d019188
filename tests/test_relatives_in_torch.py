"""What torch sees of RMSNorm's relatives: what is launched, a compiled graph, modules, bad input. What they share with the
other conditioned norms, test_conditioned_in_torch.py has.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trinorm import functional, nn


def test_only_what_is_asked_for(device: torch.device, launched: list[Any]) -> None:
    x, weight = torch.randn(100, 24, device=device), torch.randn(24, device=device)
    for of_x, of_weight in ((True, False), (False, True), (True, True)):
        for _ in range(3):  # the third is a repetition of the second
            launched.clear()
            leaves = [t.detach().requires_grad_(want) for t, want in ((x, of_x), (weight, of_weight))]
            y = functional.partial_rms_norm(leaves[0], (24,), leaves[1])
            torch.autograd.grad(y, [t for t in leaves if t.requires_grad], torch.ones_like(y))
            names = ["conditioned_forward", "conditioned_backward", *["sum_partials"] * of_weight]
            assert [kernel.fn.__name__ for kernel in launched] == names


def test_compiled(device: torch.device) -> None:
    """One graph for any number of rows."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    def norms(x: Tensor) -> Tensor:
        return functional.partial_rms_norm(x, x.shape[-1:], p=0.3) * functional.l2_norm(x)

    compiled = torch.compile(norms, fullgraph=True, dynamic=True, backend=backend)
    for shape in ((3, 70), (5, 70), (9, 70)):
        x = torch.randn(shape, device=device)
        assert torch.equal(compiled(x), norms(x))
    assert len(graphs) == 1
    assert sum("conditioned_rms_norm" in str(node.target) for node in graphs[0].graph.nodes) == 2
    torch._dynamo.reset()


def test_modules(device: torch.device) -> None:
    x = torch.randn(3, 4, 8, device=device)
    weight = torch.randn(8, device=device)
    l2 = nn.L2Norm(8)
    assert torch.equal(l2(x), functional.l2_norm(x)) and not l2.state_dict()
    assert repr(l2) == "L2Norm((8,), eps=1e-06, elementwise_affine=False)"
    assert nn.L2Norm(np.int64(8)).normalized_shape == (8,)
    owner = nn.L2Norm((4, 8), eps=1e-3, elementwise_affine=True, device=device, dtype=torch.float64)
    assert owner.state_dict()["weight"].equal(torch.ones(4, 8, device=device, dtype=torch.float64))
    owner.cast = "gemma"
    expected = functional.l2_norm(x.double(), (4, 8), owner.weight, 1e-3, cast="gemma")
    assert torch.equal(owner(x.double()), expected)
    assert repr(owner) == "L2Norm((4, 8), eps=0.001, elementwise_affine=True, cast='gemma')"

    partial = nn.PartialRMSNorm(8, 0.5, eps=1e-3, device=device)
    partial.load_state_dict(dict(weight=weight))
    assert torch.equal(partial(x), functional.partial_rms_norm(x, (8,), weight, 1e-3, count=4))
    partial.batch_invariant = True
    assert repr(partial) == "PartialRMSNorm((8,), p=0.5, eps=0.001, elementwise_affine=True, batch_invariant=True)"
    partial.reset_parameters()
    assert torch.equal(partial.weight, torch.ones_like(weight))
    assert not nn.PartialRMSNorm(8, elementwise_affine=False).state_dict()
    assert not isinstance(partial, torch.nn.RMSNorm)

    scale = nn.ScaleNorm(8**0.5, device=device)
    assert [*scale.state_dict()] == ["weight"] and scale.weight.shape == ()
    assert scale.weight.item() == pytest.approx(8**0.5)
    assert torch.equal(scale(x), functional.scale_norm(x, scale.weight))
    assert repr(nn.ScaleNorm(2.0, eps=1e-3)) == "ScaleNorm(scale=2.0, eps=0.001)"
    assert nn.ScaleNorm(1.0, dtype=torch.bfloat16).weight.dtype == torch.bfloat16


# --- bad input ---


def _x(*shape: int, **how: Any) -> Tensor:
    return torch.randn(shape or (3, 2, 8), **how)


NORMS = [
    ((None, (8,)), {}, TypeError, "input must be a Tensor"),
    ((_x(), 8), {}, TypeError, r"normalized_shape must be a tuple.* write \(8,\)"),
    ((_x(), -1), {}, TypeError, "normalized_shape must be a tuple or a list of ints, not -1$"),
    ((_x(), ()), {}, RuntimeError, "normalized_shape is empty"),
    ((_x(3, 1), ()), {}, RuntimeError, "normalized_shape is empty"),
    ((_x(), (7,)), {}, RuntimeError, r"normalized_shape is \(7,\), but input has shape"),
    ((_x(), (8,), _x(7)), {}, RuntimeError, r"weight has shape \(7,\), but normalized_shape is \(8,\)"),
    ((_x(), (8,), 3.0), {}, TypeError, "weight must be a Tensor or None"),
    ((_x(), (8,), _x(8, device="meta")), {}, RuntimeError, "weight is on meta"),
    ((_x().int(), (8,)), {}, NotImplementedError, "input has dtype torch.int32"),
    ((_x().to_sparse(), (8,)), {}, NotImplementedError, "input has layout"),
    ((_x(), (8,)), dict(eps=-1.0), ValueError, "eps is"),
    ((_x(), (8,)), dict(eps="1"), TypeError, "eps must be"),
    ((_x(), (8,)), dict(cast="wide"), ValueError, "cast is"),
    ((_x(), (8,)), dict(batch_invariant=1), TypeError, "batch_invariant must be"),
]
SCALED = [
    ((None, _x(1)), {}, TypeError, "input must be a Tensor"),
    ((_x(), None), {}, TypeError, "weight must be a Tensor, not NoneType"),
    ((_x(), 2.0), {}, TypeError, "weight must be a Tensor, not float"),
    ((_x(), _x(8)), {}, RuntimeError, r"weight has shape \(8,\); it must be \(\) or \(1,\)"),
    ((_x(), _x(1, 1)), {}, RuntimeError, r"weight has shape \(1, 1\); it must be"),
    ((torch.tensor(1.0), _x(1)), {}, RuntimeError, "input has no dims"),
    ((_x(), _x(1).int()), {}, NotImplementedError, "weight has dtype torch.int32"),
    ((_x(), _x(1, device="meta")), {}, RuntimeError, "weight is on meta"),
    ((_x(), _x(1)), dict(eps=-1.0), ValueError, "eps is"),
    ((_x(), _x(1)), dict(batch_invariant=1), TypeError, "batch_invariant must be"),
]
PARTS = [
    ((_x(), None), {}, TypeError, "normalized_shape must be a tuple"),
    ((_x(), (8,)), dict(p=0.5, count=4), TypeError, "p is 0.5 and count is 4; only one of them"),
    ((_x(), (8,)), dict(p=0.0), ValueError, "p is 0.0; it must be above 0 and at most 1"),
    ((_x(), (8,)), dict(p=1.5), ValueError, "p is 1.5"),
    ((_x(), (8,)), dict(p=float("nan")), ValueError, "p is nan"),
    ((_x(), (8,)), dict(p="1"), TypeError, "p must be a float or None"),
    ((_x(), (8,)), dict(p=True), TypeError, "p must be a float or None"),
    ((_x(), (8,)), dict(count=0), ValueError, "count is 0; it must be from 1 to 8"),
    ((_x(), (8,)), dict(count=9), ValueError, "count is 9"),
    ((_x(), (8,)), dict(count=True), TypeError, "count must be an int or None"),
    ((_x(), (8,)), dict(count=2.0), TypeError, "count must be an int or None"),
]


@pytest.mark.parametrize(
    ("name", "args", "how", "kind", "message"),
    [
        *((name, *case) for name in ("l2_norm", "partial_rms_norm") for case in NORMS),
        ("l2_norm", (torch.tensor(1.0),), {}, RuntimeError, "input has no dims"),
        ("l2_norm", (_x(),), dict(eps=None), TypeError, "eps must be a float, not None"),
        ("scale_norm", (_x(), _x(1)), dict(eps=None), TypeError, "eps must be a float, not None"),
        *(("scale_norm", *case) for case in SCALED),
        *(("partial_rms_norm", *case) for case in PARTS),
    ],
)
def test_bad_input(
    name: str, args: tuple[Any, ...], how: dict[str, Any], kind: type[Exception], message: str, launched: list[object]
) -> None:
    functional.partial_rms_norm(_x(), (8,), p=1.0, count=None)  # after which a like call would be known
    launched.clear()
    for _ in range(2):
        with pytest.raises(kind, match=rf"{name}\(\): .*{message}"):
            getattr(functional, name)(*args, **how)
    assert launched == []


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused(layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(3, 8)], layout=layout)
    for name, args in (("l2_norm", ()), ("l2_norm", ((8,),)), ("scale_norm", (_x(1),)), ("partial_rms_norm", ((8,),))):
        with pytest.raises(RuntimeError, match=rf"{name}\(\): input is a nested tensor"):
            getattr(functional, name)(nested, *args)


def test_a_function_mode_sees_one_call() -> None:
    seen: list[Any] = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    x = _x()
    for function, args, how in (
        (functional.l2_norm, (x, (8,)), dict(weight=x[0, 0], eps=1e-3, cast="gemma")),
        (functional.scale_norm, (x, x[0, 0, 0]), dict(eps=1e-3)),
        (functional.partial_rms_norm, (x, (8,)), dict(weight=x[0, 0], count=3, batch_invariant=True)),
    ):
        seen.clear()
        with Mode():
            y = function(*args, **how)
        assert seen[0] is function
        assert torch.equal(y, function(*args, **how))
