"""residuals.py: what a fused sum computes, what goes from a block into the next, and what ``fuse`` says of a model."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor

import trinorm
from trinorm import residuals
from written_blocks import Inline, Plain, fused
from written_norms import BeforeTheWeightNorm

# --- at a call ---


def test_a_sum_of_other_than_two_alike_is_what_it_was(device: torch.device) -> None:
    """Broadcast, of numbers, transposed, of a subclass."""

    class Mine(Tensor):
        pass

    before, after, _ = fused(Inline, device)
    norm, x = after.norm, torch.randn(16, 16, device=device)
    assert residuals._both(norm, x, x) is not None
    for a, b in ((x, x[0]), (x, 2.0), (x.T, x), (x, x.as_subclass(Mine)), (x, x.cpu().to("meta"))):
        assert residuals._both(norm, a, b) is None
    assert residuals._both(torch.nn.RMSNorm(16, device=device), x, x) is None
    assert residuals._both(None, x, x) is None
    assert torch.equal(after(x.T), before(x.T)) and after(x.T).stride() == before(x.T).stride()
    for a, b in ((x, x.double()), (x.half(), x), (x.bfloat16(), x.half())):
        both = residuals._both(after.other, a, b)
        if both is not None:
            y, total = both
            assert torch.equal(total, a + b) and torch.equal(y, after.other(a + b)) and y.dtype == after.other(a + b).dtype
    after.norm.save = "output"
    assert residuals._both(norm, x, x) is None


def test_a_recognized_norm_is_asked_whether_it_still_is_one(device: torch.device) -> None:
    norm, x = BeforeTheWeightNorm(16).to(device), torch.randn(2, 16, device=device)
    trinorm.replace(norm)
    y, total = residuals._both(norm, x, x)
    assert torch.equal(total, x + x) and torch.equal(y, norm(x + x))
    assert residuals._both(norm, x.half(), x.half()) is None  # beside fp32 weights its own forward returns fp32
    hook = norm.register_forward_hook(lambda *of: None)
    assert residuals._both(norm, x, x) is None
    hook.remove()
    assert residuals._both(norm, x, x) is not None
    norm.variance_epsilon = 1.0
    assert residuals._both(norm, x, x) is None


def test_hooks_of_a_norm_are_called(device: torch.device) -> None:
    """Whether there before or since."""
    model = Plain().to(device)
    trinorm.replace(model)
    x, seen = torch.randn(2, 16, device=device), []
    hook = model.norm.register_forward_hook(lambda *of: seen.append(of))
    report = trinorm.fuse(model)
    assert "it has hooks" in {entry.path: entry.reason for entry in report.left}["norm"]
    trinorm.restore(model)
    trinorm.replace(model)
    hook.remove()
    assert not trinorm.fuse(model).left
    y = model(x)
    assert not seen
    model.norm.register_forward_pre_hook(lambda module, given: (given[0] * 1,))
    model.norm.register_full_backward_hook(lambda *of: seen.append(of))
    assert torch.equal(model(x), y)
    model(x).sum().backward()
    assert len(seen) == 1
    norm = model.norm
    model.norm = torch.nn.RMSNorm(16, device=device)  # another, since
    torch.testing.assert_close(model(x), y)
    model.norm = norm
    norm.forward = lambda x: x * 0
    assert torch.equal(model(x), residuals._sum(None, model.layer(x * 0), x + model.layer(model.other(x)))[0])


# --- from a block into the next ---


def blocks(device: torch.device) -> tuple[torch.nn.Sequential, torch.nn.Sequential]:
    before = torch.nn.Sequential(*(Plain() for _ in range(3))).to(device)
    trinorm.replace(before)
    after = copy.deepcopy(before)
    said = {entry.path: entry.by for entry in trinorm.fuse(after).fused}
    assert set(said) == {f"{i}.{name}" for i in range(3) for name in ("norm", "other")}
    assert said["0.other"] == "the gradient of x, in its backward"
    assert said["1.other"] == "what 0 returns, without gradients; the gradient of x, in its backward"
    return before, after


@torch.no_grad()
def test_what_is_handed_on_is_taken_once_and_goes_with_the_sum(device: torch.device) -> None:
    before, after = blocks(device)
    x = torch.randn(4, 16, device=device)
    assert torch.equal(after(x), before(x))
    total = after[0](x)
    handed = vars(total)[residuals.HANDED][0]
    assert torch.equal(handed, after[1].other(total))
    assert torch.equal(after[1](total), before[1](before[0](x)))
    assert residuals.HANDED not in vars(total)
    assert torch.equal(after[1](total), before[1](before[0](x)))
    kept = weakref.ref(vars(after[0](x))[residuals.HANDED][0])
    gc.collect()
    assert kept() is None
    assert residuals.HANDED not in vars(after[2](x))


@torch.no_grad()
def test_what_does_not_hold_any_more_is_not_taken(device: torch.device) -> None:
    """The sum written to, a norm's parameter or the norm exchanged, a hook, autocast, a gradient."""
    before, after = blocks(device)
    x = torch.randn(4, 16, device=device)
    for model in (before, after):
        model.changed = [model[0](x).mul_(2), model[0](x), model[0](x), model[0](x)]
    written, exchanged, hooked, recorded = (list(pair) for pair in zip(before.changed, after.changed, strict=True))
    assert torch.equal(before[1](written[0]), after[1](written[1]))
    with torch.enable_grad():
        assert all(y.requires_grad for y in (before[1](recorded[0]), after[1](recorded[1])))
    for model in (before, after):
        model[1].other.weight = torch.nn.Parameter(torch.full_like(model[1].other.weight, 2.0))
    assert torch.equal(before[1](exchanged[0]), after[1](exchanged[1]))
    for model in (before, after):
        model[1].other.register_forward_hook(lambda *of: of[2] * 0)
    assert torch.equal(before[1](hooked[0]), after[1](hooked[1]))
    assert residuals.HANDED not in vars(after[0](x))  # nor made for a norm with hooks


@torch.no_grad()
def test_nothing_is_taken_under_autocast_nor_by_a_block_with_hooks(device: torch.device) -> None:
    _, after = blocks(device)
    x, (_, block, _) = torch.randn(4, 16, device=device), after
    assert residuals._of_argument(block, block.other, after[0](x))[1]
    total = after[0](x)
    with torch.autocast(device.type, torch.bfloat16):
        assert not residuals._of_argument(block, block.other, total)[1]
    hook = block.register_forward_pre_hook(lambda *of: None)
    assert not residuals._of_argument(block, block.other, after[0](x))[1]
    hook.remove()
    assert not residuals._of_argument(block, after[2].other, after[0](x))[1]


def test_nothing_is_handed_on_with_gradients_or_in_inference_mode(device: torch.device) -> None:
    before, after = blocks(device)
    x = torch.randn(4, 16, device=device)
    assert residuals.HANDED not in vars(after[0](x))
    total = after[0](x)
    y = after[1](total).square().sum()
    (got,) = torch.autograd.grad(y, total)
    total = before[0](x)
    (want,) = torch.autograd.grad(before[1](total).square().sum(), total)
    torch.testing.assert_close(got, want)
    with torch.inference_mode():
        assert residuals.HANDED not in vars(after[0](x))
        assert torch.equal(after(x), before(x))


def test_a_block_that_stands_in_several_places_hands_nothing_on(device: torch.device) -> None:
    block = Plain().to(device)
    model = torch.nn.Sequential(block, Plain().to(device), block, Plain().to(device))
    trinorm.replace(model)
    plain = copy.deepcopy(model)
    said = [entry.path for entry in trinorm.fuse(model).fused if "returns" in entry.by]
    assert said == ["0.other", "2.other"]
    x = torch.randn(4, 16, device=device)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))


# --- what it is given ---


def test_models_of_which_nothing_is_fused() -> None:
    assert str(trinorm.fuse(torch.nn.Linear(2, 2))) == "trinorm.fuse: 0 fused, 0 left"
    with pytest.raises(TypeError, match=r"fuse\(\): model must be"):
        trinorm.fuse(3)  # type: ignore[arg-type]
    model = Plain()
    assert {entry.reason for entry in trinorm.fuse(model).left} == {"it is not trinorm's: replace() it first"}
    model.norm = torch.nn.BatchNorm1d(16)
    trinorm.replace(model)
    assert "no sum with a norm of its kind" in {e.path: e.reason for e in trinorm.fuse(model).left}["norm"]
    model = Plain()
    trinorm.replace(model)
    model.forward = model.forward  # type: ignore[method-assign]
    assert "replaced on the instance" in trinorm.fuse(model).left[0].reason
    del model.forward
    assert trinorm.fuse(model).fused
    assert {entry.reason for entry in trinorm.fuse(model).left} == {"already fused"}
    assert {entry.reason for entry in trinorm.replace(model).left} == {"already trinorm's"}
    trinorm.restore(model)
    assert type(model) is Plain and "_trinorm_replaced" not in vars(model)


def test_shared_norms_and_weights_and_a_model_on_meta() -> None:
    model = torch.nn.ModuleList([Plain(), Plain()])
    model[1].norm, model[1].other.weight = model[0].norm, model[0].other.weight
    trinorm.replace(model.to("meta"))
    assert {entry.path for entry in trinorm.fuse(model).fused} == {"0.norm", "0.other", "1.norm", "1.other"}
    assert model[1].norm is model[0].norm
    assert model[0](torch.empty(2, 16, device="meta")).is_meta
    with torch.no_grad():
        assert model[1](model[0](torch.empty(2, 16, device="meta"))).is_meta


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantized_layers_around_a_norm() -> None:
    model = Plain()
    model.layer = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(model.layer), {torch.nn.Linear})[0]
    trinorm.replace(model)
    plain, x = copy.deepcopy(model), torch.randn(2, 16)
    assert trinorm.fuse(model).fused
    assert torch.equal(model(x), plain(x))


def test_an_exception_in_the_middle_leaves_the_model_as_it_was() -> None:
    class Sealed(Plain):
        def __setattr__(self, name: str, value: object) -> None:
            if name == "__class__":
                raise RuntimeError("sealed")
            super().__setattr__(name, value)

        forward = Plain.forward

    model = torch.nn.Sequential(Plain(), Sealed())
    trinorm.replace(model)
    before = [(type(m), dict(vars(m))) for m in model.modules()]
    with pytest.raises(RuntimeError, match="sealed"):
        trinorm.fuse(model)
    assert [(type(m), dict(vars(m))) for m in model.modules()] == before


def test_a_class_that_cannot_be_extended_is_left() -> None:
    class Final(Plain):
        def __init_subclass__(cls) -> None:
            raise ValueError("no more")

        forward = Plain.forward

    model = Final()
    trinorm.replace(model)
    assert "cannot be extended: ValueError: no more" in trinorm.fuse(model).left[0].reason


def test_a_report_is_a_table_of_richs() -> None:
    rich = pytest.importorskip("rich.console")
    console = rich.Console(width=160, record=True)
    model = Plain()
    trinorm.replace(model)
    report = trinorm.fuse(model)
    console.print(report)
    for shown in (console.export_text(), str(report)):
        for word in ("2 fused, 0 left", "residual + self.layer(x), line ", "the gradient of x, in its backward"):
            assert word in shown
