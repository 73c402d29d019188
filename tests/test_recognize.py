"""recognize.py: norms of other classes, found by what they compute."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor

import trinorm
from data_parallel import ON_TWO_GPUS, data_parallel
from trinorm.compare import assert_no_worse
from trinorm.models import recognize
from trinorm.models.forms import Form
from written_norms import (
    KNOWN,
    AlphaBeta,
    AtTheEnd,
    BeforeTheWeight,
    BeforeTheWeightNorm,
    GateBefore,
    GateBehind,
    OneAndAWeight,
    Positions,
    Written,
    inputs,
    named_norm,
)

EVERY = pytest.mark.parametrize("kind", KNOWN, ids=lambda kind: kind.__name__)


@EVERY
def test_known(kind: type[torch.nn.Module]) -> None:
    assert str(recognize.recognize(kind())) == f"trinorm.functional.{KNOWN[kind]}"


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_and_gradients(kind: type[torch.nn.Module], dtype: torch.dtype, device: torch.device) -> None:
    """Values no further from float64 than the module's before; gradients the function's, or, where that is not what it
    computes, as of what rounds at each step in 16 bits, its own.
    """
    before = named_norm(kind)().to(device, dtype)
    after = copy.deepcopy(before)
    assert len(trinorm.replace(after).replaced) == 1
    given, form = [t.requires_grad_() for t in inputs(kind, dtype, device)], after._trinorm_form
    assert isinstance(form, Form)
    weight, bias = (None if name is None else getattr(after, name) for name in (form.weight, form.bias))
    y = after(*given)
    assert_no_worse("y", y.detach(), form.exact((weight, bias), *given), before(*given).detach())
    leaves, dy = [*given, *after.parameters()], torch.randn_like(y)
    served = (dtype, None if weight is None else dtype) in form.dtypes
    assert served or (kind in (AlphaBeta, Positions) and dtype != torch.float32)
    expected = form((weight, bias), *given) if served else type(before).forward(after, *given)
    for ours, want in zip(*(torch.autograd.grad(of, leaves, dy) for of in (y, expected)), strict=True):
        assert torch.equal(ours, want)


class OfGroups(torch.nn.Module):
    """Whose weight is shorter than its rows, and so tells nothing of them."""

    def __init__(self) -> None:
        super().__init__()
        self.group = 8

    def forward(self, x: Tensor) -> Tensor:
        groups = x.unflatten(-1, (-1, self.group))
        return (groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + 1e-6)).flatten(-2)


def test_a_length_that_is_one_group_is_one_form(device: torch.device) -> None:
    module = named_norm(OfGroups)().to(device)
    plain = copy.deepcopy(module)
    trinorm.replace(module)
    x = torch.randn(3, 5, 48, device=device) * torch.arange(48, device=device)
    assert torch.equal(module(x), plain(x))
    torch.testing.assert_close(module(x[..., 8:16]), plain(x[..., 8:16]))


class OtherwiseInFourDims(BeforeTheWeight):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.dim() < 4 else x


def test_what_was_not_tried_has_the_modules_own_forward(device: torch.device) -> None:
    before = named_norm(OtherwiseInFourDims)().to(device)
    after = copy.deepcopy(before)
    trinorm.replace(after)
    x = torch.randn(2, 3, 4, 48, device=device)
    assert torch.equal(after(x), x)  # of four dims it is none
    narrow = torch.randn(3, 48, device=device).bfloat16()
    assert after(narrow).dtype == before(narrow).dtype == torch.float32  # of a wider weight
    with pytest.raises(TypeError):
        after(x, x)
    gated = named_norm(GateBefore)().to(device)
    plain = copy.deepcopy(gated)
    trinorm.replace(gated)
    assert torch.equal(gated(narrow.float()), plain(narrow.float()))  # without its gate
    assert torch.equal(gated(narrow.float(), gate=narrow.float()), plain(narrow.float(), gate=narrow.float()))


@pytest.mark.parametrize("kind", [BeforeTheWeight, AtTheEnd], ids=lambda kind: kind.__name__)
def test_under_autocast_it_keeps_its_dtype(kind: type[torch.nn.Module], device: torch.device) -> None:
    module = named_norm(kind)().to(device, torch.bfloat16)
    trinorm.replace(module)
    x = torch.randn(3, 48, device=device).bfloat16()
    with torch.autocast(device.type, torch.bfloat16):
        assert module(x).dtype == torch.bfloat16


def test_copies_pickles_and_checkpoints(device: torch.device) -> None:
    module = BeforeTheWeightNorm().to(device)
    trinorm.replace(module)
    x = torch.randn(3, 48, device=device)
    kept = io.BytesIO()
    torch.save(module, kept)
    kept.seek(0)
    loaded = torch.load(kept, weights_only=False)
    for other in (copy.copy(module), copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert type(other) is type(module) and isinstance(other, BeforeTheWeightNorm)
        assert torch.equal(other(x), module(x))
    plain = BeforeTheWeightNorm().to(device)
    plain.load_state_dict(module.state_dict())
    module.load_state_dict(plain.state_dict())
    assert repr(module).startswith("BeforeTheWeightNorm(") and "trinorm.functional.rms_norm" in repr(module)


@EVERY
def test_data_parallel(kind: type[torch.nn.Module], device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies with parameters that are plain tensors are trinorm's too."""
    module, served = named_norm(kind)().to(device), []
    trinorm.replace(module)
    given = inputs(kind, torch.float32, device)
    expected, actual = module(*given), type(module._trinorm_form).served
    monkeypatch.setattr(type(module._trinorm_form), "served", lambda *of: (served.append(of), actual(*of))[1])
    torch.testing.assert_close(data_parallel(module, monkeypatch)(*given), expected)
    assert len(served) == (2 if ON_TWO_GPUS else 1)


def test_compiled_in_one_graph(device: torch.device) -> None:
    module = BeforeTheWeightNorm().to(device)
    trinorm.replace(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for rows in (3, 5):
        x = torch.randn(rows, 48, device=device, requires_grad=True)
        assert torch.equal(compiled(x), module(x))
        (a,), (b,) = (torch.autograd.grad(of(x).square().sum(), x) for of in (compiled, module))
        assert torch.equal(a, b)


def test_one_trial_serves_all_that_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    actual = recognize.recognize

    def counted(module: torch.nn.Module) -> Form | str:
        tried.append(module)
        return actual(module)

    monkeypatch.setattr("trinorm.models.convert.recognize", counted)
    model = torch.nn.ModuleList([BeforeTheWeightNorm() for _ in range(5)] + [BeforeTheWeightNorm(48, 1e-5)])
    report = trinorm.replace(model)
    assert len(report.replaced) == 6 and len(tried) == 2
    assert report.replaced[0].by != report.replaced[5].by


def test_what_was_set_since_counts(device: torch.device) -> None:
    """The epsilon, and a class's forward: then it is the module's own that runs."""
    x = torch.randn(3, 48, device=device) * 1e-3
    module = BeforeTheWeightNorm().to(device)
    trinorm.replace(module)
    module.weight = torch.nn.Parameter(module.weight.detach() * 2)
    module.eval().train()
    assert "_trinorm_form" in vars(module)
    module.variance_epsilon = 1e-2
    plain = BeforeTheWeightNorm(48, 1e-2).to(device)
    plain.load_state_dict(module.state_dict())
    assert torch.equal(module(x), plain(x)) and "trinorm" not in repr(module)
    other = named_norm(AtTheEnd)
    module = other().to(device)
    trinorm.replace(module)
    other.forward = lambda self, x: x  # type: ignore[method-assign,assignment]
    assert module(x) is x


def test_other_shapes_and_orders_have_the_modules_own_forward(device: torch.device) -> None:
    gain = named_norm(BeforeTheWeight)(1).to(device)  # one number for rows of any length
    plain = copy.deepcopy(gain)
    trinorm.replace(gain)
    x = torch.randn(4, 2, 48, device=device)
    assert torch.equal(gain(x), plain(x))
    norm = BeforeTheWeightNorm().to(device)
    plain = copy.deepcopy(norm)
    trinorm.replace(norm)
    turned = x.transpose(0, 1)
    assert norm(turned).stride() == plain(turned).stride()
    half = torch.randn(4, 96, device=device).chunk(2, -1)[1]
    torch.testing.assert_close(norm(half), plain(half))
    gated = named_norm(GateBehind)().to(device)
    plain = copy.deepcopy(gated)
    trinorm.replace(gated)
    assert torch.equal(gated(x, x[:, :1]), plain(x, x[:, :1]))
    again = type(norm)(48).to(device)  # of its class, but not replaced
    assert torch.equal(again(x), BeforeTheWeight.forward(again, x))


class InRows(BeforeTheWeight):
    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden).contiguous()


@pytest.mark.parametrize("kind", [BeforeTheWeight, OneAndAWeight, InRows])
def test_a_result_lies_in_memory_as_the_modules_own_does(kind: type[Written], device: torch.device) -> None:
    """Queries are normalized behind their transpose, or within a packed projection."""
    module = kind(48).to(device)
    form = recognize.recognize(module)
    assert isinstance(form, Form) and form.ordered == (kind is not InRows)
    packed = torch.randn(3, 7, 6 * 48, device=device)
    for x in packed[..., 48:].view(3, 7, 5, 48).transpose(1, 2), packed[..., :192].view(3, 7, 4, 48)[:, :, :3]:
        for _ in range(2):  # as it is met first, and recalled
            leaf, other = (x.detach().requires_grad_() for _ in range(2))
            y, own = form.served((module.weight, None), leaf), kind.forward(module, other)
            if kind is InRows and x.stride(1) < x.stride(2):
                assert y is None
                continue
            assert y is not None and y.stride() == own.stride()
            dy = torch.randn_like(own)
            found, by_torch = (torch.autograd.grad(z, t, dy)[0] for z, t in ((y, leaf), (own, other)))
            exact = form.exact((module.weight.detach(), None), x)
            assert_no_worse("y", y.detach(), exact, own.detach())
            leaf = x.detach().double().requires_grad_()
            wide = copy.deepcopy(module).double()
            n = leaf * torch.rsqrt(leaf.square().mean(-1, keepdim=True) + wide.variance_epsilon)
            n = n * (wide.weight + (kind is OneAndAWeight))
            assert_no_worse("dx", found, torch.autograd.grad(n, leaf, dy.double())[0], by_torch)
