"""convert.py: what replace() swaps, what it leaves, and that it says so."""

from __future__ import annotations

import copy
import io

import pytest
import torch

import trinorm
from trinorm import nn


class Block(torch.nn.Module):
    """A model with one norm under two names, and two norms of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.LayerNorm(8)
        self.again = self.first
        self.second = torch.nn.RMSNorm(8)
        self.tied = torch.nn.RMSNorm(8)
        self.tied.weight = self.second.weight
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tied(self.linear(self.second(self.again(self.first(x)))))


def test_norms_are_swapped_in_place_and_shared_ones_stay_shared() -> None:
    model = Block()
    first, weight = model.first, model.second.weight
    parameters = {name: id(p) for name, p in model.named_parameters()}
    x = torch.randn(3, 8)
    before = model(x)
    report = trinorm.replace(model)
    assert model.first is first
    assert model.again is first
    assert type(first) is nn.LayerNorm
    assert type(model.second) is type(model.tied) is nn.RMSNorm
    assert model.tied.weight is model.second.weight is weight
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert [entry.path for entry in report.replaced] == ["first", "again", "second", "tied"]
    assert report.left == ()
    torch.testing.assert_close(model(x), before)


def test_a_norm_alone_and_a_model_without_norms() -> None:
    norm = torch.nn.LayerNorm(8)
    assert [entry.path for entry in trinorm.replace(norm).replaced] == [""]
    assert type(norm) is nn.LayerNorm
    report = trinorm.replace(torch.nn.Linear(2, 2))
    assert (report.replaced, report.left) == ((), ())
    assert str(report) == "trinorm.replace: 0 replaced, 0 left"


def test_hooks_and_training_mode_survive(device: torch.device) -> None:
    norm = torch.nn.LayerNorm(8, device=device).eval()
    seen = []
    norm.register_forward_hook(lambda *_: seen.append(True))
    trinorm.replace(norm)
    norm(torch.randn(2, 8, device=device))
    assert seen == [True]
    assert not norm.training


def test_every_norm_that_there_is_is_swapped(device: torch.device) -> None:
    """With its buffers, and what it computes in training and in evaluation."""
    shapes = {1: (4, 8, 10), 2: (4, 8, 5, 6), 3: (2, 8, 3, 4, 5)}
    kinds: list[tuple[torch.nn.Module, int]] = [
        (torch.nn.GroupNorm(2, 8), 2),
        (torch.nn.LayerNorm(6), 2),
        (torch.nn.RMSNorm(6), 2),
    ]
    for dims in shapes:
        kinds += [
            (getattr(torch.nn, f"BatchNorm{dims}d")(8), dims),
            (getattr(torch.nn, f"InstanceNorm{dims}d")(8, affine=True, track_running_stats=True), dims),
        ]
    for theirs, dims in kinds:
        theirs = theirs.to(device)
        ours = copy.deepcopy(theirs)
        assert len(trinorm.replace(ours).replaced) == 1
        assert type(ours).__module__ == "trinorm.nn"
        for training in (True, False):
            x = torch.randn(shapes[dims], device=device)
            torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-6)


class HouseNorm(torch.nn.Module):
    """A norm that only its name betrays."""


class MyLayerNorm(torch.nn.LayerNorm):
    """A subclass, whose forward is something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).abs()


def _replaced_before() -> torch.nn.Module:
    norm = torch.nn.RMSNorm(8)
    trinorm.replace(norm)
    return norm


def _buffered() -> torch.nn.Module:
    norm = torch.nn.RMSNorm(8)
    del norm.weight
    norm.register_buffer("weight", torch.ones(8, dtype=torch.int64))
    return norm


def _narrow_bias() -> torch.nn.Module:
    norm = torch.nn.LayerNorm(8)
    norm.bias = torch.nn.Parameter(torch.zeros(8, dtype=torch.float8_e4m3fn), requires_grad=False)
    return norm


def _instance_forward() -> torch.nn.Module:
    norm = torch.nn.LayerNorm(8)
    norm.forward = lambda x: x  # type: ignore[method-assign]
    return norm


def _parametrized() -> torch.nn.Module:
    norm = torch.nn.LayerNorm(8)
    torch.nn.utils.parametrize.register_parametrization(norm, "weight", torch.nn.Identity())
    return norm


LEFT = {
    "synchronized": (lambda: torch.nn.SyncBatchNorm(8), "no kernel for this norm yet"),
    "of trinorm's": (lambda: nn.BatchNorm2d(8), "already trinorm's"),
    "local response": (lambda: torch.nn.LocalResponseNorm(2), "no kernel for this norm yet"),
    "lazy": (lambda: torch.nn.LazyBatchNorm1d(), "lazy"),
    "quantized": (lambda: torch.ao.nn.quantized.LayerNorm(8, None, None, 1.0, 0), "quantized"),
    "unknown": (HouseNorm, "its forward raises NotImplementedError"),
    "a subclass": (lambda: MyLayerNorm(8), "no norm that trinorm has"),
    "replaced already": (_replaced_before, "already trinorm's"),
    "forward replaced": (_instance_forward, "forward was replaced"),
    "an eps that is refused": (lambda: torch.nn.LayerNorm(8, eps=-1.0), "eps is -1.0"),
    "an eps that is no number": (lambda: torch.nn.RMSNorm(8, eps=float("nan")), "eps is nan"),
    "a subclass of ours": (lambda: type("Mine", (trinorm.nn.LayerNorm,), {})(8), "a subclass of trinorm's"),
    "scripted": (lambda: torch.jit.script(torch.nn.LayerNorm(8)), "scripted"),
    "another of torch's": (lambda: torch.nn.CrossMapLRN2d(2), "no kernel for this norm yet"),
    "a weight that is a buffer": (_buffered, "weight is torch.int64"),
    "a bias of fp8": (_narrow_bias, "bias is torch.float8"),
    "parametrized": (_parametrized, "parametrize"),
    "a weight of fp8": (lambda: torch.nn.RMSNorm(8, dtype=torch.float8_e4m3fn), "float8"),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", LEFT)
def test_what_is_left_is_untouched_and_reported(kind: str) -> None:
    make, reason = LEFT[kind]
    module = make()
    cls, state = type(module), dict(module.__dict__)
    report = trinorm.replace(torch.nn.ModuleDict({"norm": module}))
    assert report.replaced == ()
    assert [entry.path for entry in report.left] == ["norm"]
    assert reason in report.left[0].reason
    assert report.left[0].module in str(report)
    assert type(module) is cls
    assert module.__dict__ == state


def test_a_class_whose_forward_was_replaced_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.LayerNorm, "forward", lambda self, x: x)
    norm = torch.nn.LayerNorm(8)
    assert "of its class" in trinorm.replace(norm).left[0].reason
    assert type(norm) is torch.nn.LayerNorm


def test_not_a_module() -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        trinorm.replace(torch.ones(3))  # type: ignore[arg-type]


# --- which, and back ---


def test_include_exclude_and_a_dry_run() -> None:
    model = Block()
    planned = trinorm.replace(model, dry_run=True)
    assert [entry.path for entry in planned.replaced] == ["first", "again", "second", "tied"]
    assert not any(type(module).__module__.startswith("trinorm") for module in model.modules())
    some = trinorm.replace(model, include=["second", "t*", torch.nn.LayerNorm], exclude=["tied"])
    assert [entry.path for entry in some.replaced] == ["first", "again", "second"]
    assert [(entry.path, entry.reason) for entry in some.left] == [("tied", "not asked for")]
    assert type(model.second) is nn.RMSNorm and type(model.tied) is torch.nn.RMSNorm
    for wrong in ("second", 3, [3], [int]):
        with pytest.raises(TypeError, match=r"replace\(\): exclude (must be|has)"):
            trinorm.replace(model, exclude=wrong)  # type: ignore[arg-type]


def test_restore_is_of_what_was_replaced() -> None:
    model = torch.nn.ModuleList([Block(), nn.LayerNorm(8), torch.nn.BatchNorm1d(8)])
    classes, kept = [type(m) for m in model.modules()], [dict(vars(m)) for m in model.modules()]
    trinorm.replace(model)
    assert trinorm.replace(model).replaced == ()
    assert trinorm.restore(copy.deepcopy(model)) == trinorm.restore(model)
    assert [type(m) for m in model.modules()] == classes
    assert [dict(vars(m)) for m in model.modules()] == kept
    assert trinorm.restore(model) == ()
    with pytest.raises(TypeError, match=r"restore\(\): model must be"):
        trinorm.restore(3)  # type: ignore[arg-type]


def test_an_exception_in_the_middle_leaves_the_model_as_it_was() -> None:
    class Sealed(torch.nn.RMSNorm):
        def __setattr__(self, name: str, value: object) -> None:
            if name == "__class__":
                raise RuntimeError("sealed")
            super().__setattr__(name, value)

    model = torch.nn.ModuleList([torch.nn.LayerNorm(8), Sealed(8), torch.nn.LayerNorm(8)])
    before = [(type(m), dict(vars(m))) for m in model.modules()]
    with pytest.raises(RuntimeError, match="sealed"):
        trinorm.replace(model)
    assert [(type(m), dict(vars(m))) for m in model.modules()] == before


def test_restore_says_what_has_become_another_class_since() -> None:
    model = torch.nn.ModuleList([torch.nn.LayerNorm(8), torch.nn.LayerNorm(8)])
    trinorm.replace(model)
    torch.nn.utils.parametrize.register_parametrization(model[1], "weight", torch.nn.Identity())
    classes = [type(m) for m in model]
    with pytest.raises(RuntimeError, match=r"restore\(\): 1 has become a .*Parametrized"):
        trinorm.restore(model)
    assert [type(m) for m in model] == classes


def test_a_shared_norm_is_asked_for_under_any_of_its_names() -> None:
    norm = torch.nn.LayerNorm(8)
    model = torch.nn.ModuleDict({"a": norm, "b": norm})
    assert trinorm.replace(model, exclude=["b"]).replaced == ()
    assert [entry.path for entry in trinorm.replace(model, include=["a"], exclude=None).replaced] == ["a", "b"]


def test_a_report_is_a_table_of_richs() -> None:
    rich = pytest.importorskip("rich.console")
    console = rich.Console(width=160, record=True, file=io.StringIO())
    console.print(trinorm.replace(torch.nn.ModuleList([torch.nn.LayerNorm(8), torch.nn.LocalResponseNorm(2)])))
    shown = console.export_text()
    for word in ("1 replaced, 1 left", "torch.nn.modules.LayerNorm", "trinorm.nn.LayerNorm", "no kernel for this norm yet"):
        assert word in shown
