"""residuals.py: what a fused sum computes, what goes from a block into the next, and what ``fuse`` says of a model."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import trinorm
from trinorm.models import residuals
from unfused import Results, assert_alike, assert_as_unfused, exactly
from written_blocks import Holding, Inline, Plain, fused
from written_norms import BeforeTheWeightNorm

pytestmark = pytest.mark.usefixtures("every_sum")


def of(x: Tensor) -> Callable[[torch.nn.Module], Results]:
    """What a model returns for x; in float64 too, without what was handed over with it."""
    return lambda model: {"y": [model(x if next(model.parameters()).dtype == x.dtype else x.double())]}


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
    assert_as_unfused(of(x.T), after, before)
    assert after(x.T).stride() == before(x.T).stride()
    for a, b in ((x, x.double()), (x.half(), x), (x.bfloat16(), x.half())):
        both = residuals._both(after.other, a, b)
        if both is not None:
            y, total = both
            assert torch.equal(total, a + b)
            assert_alike("y", y, after.other(a + b), exactly(after.other, total))
    after.norm.save = "output"
    assert residuals._both(norm, x, x) is None


def test_a_recognized_norm_is_asked_whether_it_still_is_one(device: torch.device) -> None:
    norm, x = BeforeTheWeightNorm(16).to(device), torch.randn(2, 16, device=device)
    trinorm.replace(norm)
    y, total = residuals._both(norm, x, x)
    assert torch.equal(total, x + x)
    assert_alike("y", y, norm(x + x), exactly(norm, x + x))
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
    y, exact = model(x), exactly(model, x)
    assert not seen
    model.norm.register_forward_pre_hook(lambda module, given: (given[0] * 1,))
    model.norm.register_full_backward_hook(lambda *of: seen.append(of))
    assert_alike("y", y, model(x), exact)
    model(x).sum().backward()
    assert len(seen) == 1
    norm = model.norm
    model.norm = torch.nn.RMSNorm(16, device=device)  # another, since
    torch.testing.assert_close(model(x), y)
    model.norm = norm
    norm.forward = lambda x: x * 0
    torch.testing.assert_close(model(x), model.layer(x * 0) + (x + model.layer(model.other(x))))


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
    assert_as_unfused(of(x), after, before)
    total = after[0](x)
    handed = vars(total)[residuals.HANDED].y
    assert_alike("handed", handed, after[1].other(total), exactly(after[1].other, total))
    for _ in range(2):
        assert_as_unfused(of(total), after[1], before[1])
        assert residuals.HANDED not in vars(total)
    kept = weakref.ref(vars(after[0](x))[residuals.HANDED].y)
    gc.collect()
    assert kept() is None
    assert residuals.HANDED not in vars(after[2](x))


def no_change(model: torch.nn.Module, total: Tensor) -> None:
    pass


def written_to(model: torch.nn.Module, total: Tensor) -> None:
    total.mul_(2)


def exchanged(model: torch.nn.Module, total: Tensor) -> None:
    model[1].other.weight = torch.nn.Parameter(torch.full_like(model[1].other.weight, 2.0))


def hooked(model: torch.nn.Module, total: Tensor) -> None:
    model[1].other.register_forward_hook(lambda *of: of[2] * 0.5)


def parameter_written_to(model: torch.nn.Module, total: Tensor) -> None:
    model[1].other.weight.mul_(2)


def parameter_of_other_memory(model: torch.nn.Module, total: Tensor) -> None:
    model[1].other.weight.data = model[1].other.weight.data * 2


def eps_set(model: torch.nn.Module, total: Tensor) -> None:
    model[1].other.eps = 1.0


CHANGES = [no_change, written_to, exchanged, hooked, parameter_written_to, parameter_of_other_memory, eps_set]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_does_not_hold_any_more_is_not_taken(
    change: Callable[[torch.nn.Module, Tensor], None], device: torch.device
) -> None:
    before, after = blocks(device)
    x, handed = torch.randn(4, 16, device=device), []

    def run(model: torch.nn.Module) -> Results:
        with torch.no_grad():
            total = model[0](x.to(model[0].layer.weight.dtype))
            handed.append(residuals.HANDED in vars(total))
            change(model, total)
            return {"y": [model[1](total)]}

    assert_as_unfused(run, after, before)
    assert handed[1]
    with torch.no_grad():
        total = after[0](x)
        assert (residuals.HANDED in vars(total)) == (change is not hooked)  # nor made for a norm with hooks
    assert after[1](total).requires_grad


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


@torch.no_grad()
def test_sums_of_few_elements_are_handed_on_in_graphs_alone(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host takes longer to hand one on than to launch a norm."""
    monkeypatch.setattr(residuals, "HANDED_FROM", 5 * 16)
    _, after = blocks(device)
    few, more = (torch.randn(m, 16, device=device) for m in (4, 5))
    assert residuals.HANDED not in vars(after[0](few))
    assert residuals.HANDED in vars(after[0](more))
    if device.type == "cuda":
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            assert residuals.HANDED in vars(after[0](few))


def test_nothing_is_handed_on_with_gradients_or_in_inference_mode(device: torch.device) -> None:
    before, after = blocks(device)
    x = torch.randn(4, 16, device=device)
    assert residuals.HANDED not in vars(after[0](x))

    def run(model: torch.nn.Module) -> Results:
        total = model[0](x.to(model[0].layer.weight.dtype))
        return {"gradient": list(torch.autograd.grad(model[1](total).square().sum(), total))}

    assert_as_unfused(run, after, before)
    with torch.inference_mode():
        assert residuals.HANDED not in vars(after[0](x))
        assert_as_unfused(of(x), after, before)


@torch.no_grad()
def test_copies_and_files_of_a_sum_have_nothing_with_it(device: torch.device) -> None:
    before, after = blocks(device)
    total, file = after[0](torch.randn(4, 16, device=device)), io.BytesIO()
    torch.save(total, file)
    file.seek(0)
    for other in (torch.load(file, weights_only=True), copy.deepcopy(total)):
        assert torch.equal(other, total) and not residuals._of_argument(after[1], after[1].other, other)[1]
    shallow = copy.copy(total)  # of the same memory, but its own count of writes
    total.mul_(2)
    assert not residuals._of_argument(after[1], after[1].other, shallow)[1]
    assert_as_unfused(of(shallow), after[1], before[1])


def not_of_its_width(block: torch.nn.Module) -> None:
    block.other = trinorm.nn.LayerNorm(32)


def on_another_device(block: torch.nn.Module) -> None:
    block.to("meta")


def sharded(block: torch.nn.Module) -> None:
    block.other.weight.data = torch.empty(0)


def no_parameter(block: torch.nn.Module) -> None:
    """As fully sharded ones are between their forwards."""
    weight = torch.ones(16)
    del block.other.weight
    block.other.weight = weight


def made_in_inference_mode(block: torch.nn.Module) -> None:
    with torch.inference_mode():
        block.other.weight = torch.nn.Parameter(torch.ones_like(block.other.weight))


@pytest.mark.parametrize(
    "change",
    [not_of_its_width, on_another_device, sharded, no_parameter, made_in_inference_mode],
    ids=lambda change: change.__name__,
)
@torch.no_grad()
def test_a_norm_that_could_not_be_of_a_sum_is_let_be(
    change: Callable[[torch.nn.Module], None], device: torch.device
) -> None:
    """The next block's, between the two: as of a wider stage, or one that is elsewhere until it runs."""
    model = torch.nn.Sequential(Plain(), Plain())
    change(model[1]) if change is not_of_its_width else None
    trinorm.replace(model.to(device))
    before = copy.deepcopy(model[0])
    trinorm.fuse(model)
    change(model[1]) if change is not not_of_its_width else None
    x = torch.randn(4, 16, device=device)
    assert residuals.HANDED not in vars(model[0](x))
    assert_as_unfused(of(x), model[0], before)


@torch.no_grad()
def test_sums_of_integers_are_returned_as_they_were(device: torch.device) -> None:
    class Doubled(Holding):
        def forward(self, x: Tensor) -> Tensor:
            return x + x

    model = torch.nn.Sequential(Doubled(), Plain()).to(device)
    trinorm.replace(model)
    trinorm.fuse(model)
    x = torch.arange(16, device=device)
    assert torch.equal(model[0](x), x * 2) and torch.equal(model[0](x * 1j), x * 2j)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_is_the_same_with_and_without_gradients(device: torch.device) -> None:
    """torch.jit.trace traces once more without them, and compares."""
    before, after = blocks(device)
    x = torch.randn(4, 16, device=device)
    traced = torch.jit.trace(after, x)
    torch.testing.assert_close(traced(x + 1), before(x + 1))


def test_a_sum_that_another_thread_has_taken_from(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look and the taking."""
    _, after = blocks(device)
    with torch.no_grad():
        total = after[0](torch.randn(4, 16, device=device))
        actual = residuals.is_traced
        monkeypatch.setattr(residuals, "is_traced", lambda: (vars(total).clear(), actual())[1])
        assert not residuals._of_argument(after[1], after[1].other, total)[1]


def test_a_block_that_stands_in_several_places_hands_nothing_on(device: torch.device) -> None:
    block = Plain().to(device)
    model = torch.nn.Sequential(block, Plain().to(device), block, Plain().to(device))
    trinorm.replace(model)
    plain = copy.deepcopy(model)
    said = [entry.path for entry in trinorm.fuse(model).fused if "returns" in entry.by]
    assert said == ["0.other", "2.other"]
    x = torch.randn(4, 16, device=device)
    with torch.no_grad():
        assert_as_unfused(of(x), model, plain)
