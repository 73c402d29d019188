"""A norm into a linear layer as modules: nn/linear.py."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

import trinorm
from test_norm_linear import bytes_of, kept_by
from trinorm import nn

MODULES = [
    pytest.param(nn.LayerNormLinear, torch.nn.LayerNorm, nn.LayerNorm, id="layer_norm"),
    pytest.param(nn.RMSNormLinear, torch.nn.RMSNorm, nn.RMSNorm, id="rms_norm"),
]
EACH = pytest.mark.parametrize(("module", "theirs", "ours"), MODULES)
Kind = Any


def keeps_y(module: Any, x: Tensor) -> bool:
    """Whether y is kept, besides x, parameters and statistics."""
    _, kept = kept_by(module, x)
    return bytes_of(kept, [x, *module.parameters()]) >= x.numel() * x.element_size()


@EACH
def test_as_the_two_modules(module: Kind, theirs: Kind, ours: Kind, device: torch.device) -> None:
    made = module(40, 24, device=device)
    x, dz = torch.randn(5, 40, device=device, requires_grad=True), torch.randn(5, 24, device=device)
    apart = torch.nn.Sequential(ours(40, device=device), torch.nn.Linear(40, 24, device=device))
    apart.load_state_dict(dict(zip(apart.state_dict(), made.state_dict().values(), strict=True)))
    for one, other in ((made, apart), (made.eval(), apart.eval())):
        z, want = one(x), other(x)
        assert torch.equal(z, want)
        found = torch.autograd.grad(z, [x, *one.parameters()], dz)
        for got, expected in zip(found, torch.autograd.grad(want, [x, *other.parameters()], dz), strict=True):
            assert torch.equal(got, expected)
    assert not keeps_y(made, x)
    assert keeps_y(apart, x)


@EACH
def test_state_dict_is_that_of_the_two(module: Kind, theirs: Kind, ours: Kind) -> None:
    norm, linear = theirs(8), torch.nn.Linear(8, 4)
    pair = {f"norm.{name}": t for name, t in norm.state_dict().items()}
    pair |= {f"linear.{name}": t for name, t in linear.state_dict().items()}
    made = module(8, 4)
    made.load_state_dict(pair)
    assert list(made.state_dict()) == list(pair)
    assert torch.equal(made.linear.weight, linear.weight)
    bare = module((2, 8), 4, bias=False, elementwise_affine=False)
    assert list(bare.state_dict()) == ["linear.weight"]
    assert bare.norm.normalized_shape == (2, 8)
    assert bare.linear.in_features == 8


def test_the_norms_own_bias() -> None:
    assert list(nn.LayerNormLinear(8, 4, norm_bias=False).state_dict()) == ["norm.weight", "linear.weight", "linear.bias"]


@EACH
def test_of_two_that_there_are(module: Kind, theirs: Kind, ours: Kind, device: torch.device) -> None:
    """It holds them: their parameters are its own, and stay theirs."""
    x = torch.randn(5, 40, device=device)
    for kind in (theirs, ours):
        norm, linear = kind(40, 1e-3, device=device), torch.nn.Linear(40, 24, device=device)
        made = module.of(norm, linear)
        assert type(made) is module
        assert made.norm is norm
        assert made.linear is linear
        assert set(made.parameters()) == {*norm.parameters(), *linear.parameters()}
        assert not keeps_y(made, x)
        torch.testing.assert_close(made(x), linear(norm(x)))
        made(x).sum().backward()
        assert all(t.grad is not None for t in (norm.weight, linear.weight))
        assert module.of(norm.eval(), linear).training is False
    norm.cast = "gemma"
    assert torch.equal(made(x), linear(norm(x)))


@EACH
def test_of_others_is_refused(module: Kind, theirs: Kind, ours: Kind) -> None:
    with pytest.raises(TypeError, match=rf"{module.__name__}.of\(\): norm is a Linear; it must be a torch.nn."):
        module.of(torch.nn.Linear(8, 4), torch.nn.Linear(8, 4))
    with pytest.raises(TypeError, match=r"of\(\): linear is a .*Norm; it must be a torch.nn.Linear"):
        module.of(theirs(8), theirs(8))
    with pytest.raises(ValueError, match=r"of\(\): linear has in_features 4; it must be 8, the norm's last dim"):
        module.of(theirs(8), torch.nn.Linear(4, 8))


@EACH
def test_copies_pickles_and_repr(module: Kind, theirs: Kind, ours: Kind, device: torch.device) -> None:
    made, x = module(8, 4, device=device), torch.randn(3, 8, device=device)
    for same in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert type(same) is module
        assert torch.equal(same(x), made(x))
        assert repr(same) == repr(made)
    assert repr(made).splitlines() == [
        f"{module.__name__}(",
        f"  (norm): {made.norm!r}",
        f"  (linear): {made.linear!r}",
        ")",
    ]


@EACH
def test_tied_parameters(module: Kind, theirs: Kind, ours: Kind, device: torch.device) -> None:
    """A head tied to the embedding: one gradient of both uses, and still tied in a copy."""
    model = torch.nn.Sequential(torch.nn.Embedding(24, 40, device=device), module(40, 24, bias=False, device=device))
    model[1].linear.weight = model[0].weight
    model = copy.deepcopy(model)
    assert model[1].linear.weight is model[0].weight
    tokens = torch.arange(6, device=device)
    model(tokens).square().sum().backward()
    found, model[0].weight.grad = model[0].weight.grad, None
    model[1].linear(model[1].norm(model[0](tokens))).square().sum().backward()
    torch.testing.assert_close(found, model[0].weight.grad)


@EACH
@pytest.mark.parametrize(
    "what", ["norm's hook", "linear's hook", "everyone's hook", "another linear", "parametrized", "another forward"]
)
def test_whoever_waits_for_a_call_gets_it(
    what: str, module: Kind, theirs: Kind, ours: Kind, device: torch.device, request: pytest.FixtureRequest
) -> None:
    made, x, called = module(8, 8, device=device), torch.randn(3, 8, device=device), []
    expected = made(x)
    if what == "norm's hook":
        made.norm.register_forward_hook(lambda *_: called.append(1))
    elif what == "linear's hook":
        made.linear.register_forward_pre_hook(lambda *_: called.append(1))
    elif what == "everyone's hook":
        request.addfinalizer(register_module_forward_hook(lambda module, *_: called.append(module)).remove)
    elif what == "parametrized":
        torch.nn.utils.parametrizations.orthogonal(made.linear)
        called.append(1)
        expected = made.linear(made.norm(x))
    elif what == "another linear":
        inner = made.linear
        made.linear = torch.nn.Sequential(inner)
        inner.register_forward_hook(lambda *_: called.append(1))
    else:
        actual = made.linear.forward
        made.linear.forward = lambda t: (called.append(1), actual(t))[1]
    assert torch.equal(made(x), expected)
    assert called
    if what == "everyone's hook":
        assert called == [made.norm, made.linear, made]


@EACH
def test_compiled_and_on_meta(module: Kind, theirs: Kind, ours: Kind, device: torch.device) -> None:
    made = module(64, 24, device=device)
    x = torch.randn(16, 64, device=device)
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), made(x))
    assert not keeps_y(compiled, x)
    on_meta = module(64, 24, device="meta")
    assert on_meta(x.to("meta")).shape == (16, 24)
    on_meta.to_empty(device=device).reset_parameters()
    assert on_meta.norm.weight.eq(1).all()
    assert on_meta.linear.weight.any()


@EACH
def test_replaced(module: Kind, theirs: Kind, ours: Kind, device: torch.device) -> None:
    """trinorm.replace finds the norm inside, and it is computed as before."""
    made, x = module.of(theirs(40, device=device), torch.nn.Linear(40, 8, device=device)), torch.randn(5, 40, device=device)
    expected = made(x)
    trinorm.replace(made)
    assert type(made.norm) is ours
    assert torch.equal(made(x), expected)
    assert not keeps_y(made, x)
