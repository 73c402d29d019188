"""Channel norms and the activations behind them: what ``replace`` and ``fuse`` make of them computes what it did."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trinorm
from data_parallel import ON_TWO_GPUS, data_parallel
from trinorm.compare import compare
from trinorm.models import activations_fused, norm_acts
from trinorm.ops import road
from unfused import Float64, Results, are_bits_alike, assert_alike, exact_copy, flat, original_copy
from written_activations import Apart, Branching, Doubled, Dropping, GroupNormAct, Inline, NormAct, Residual

NAMED = "trinorm.functional."

# Of so many elements the largest error is no matter of luck.
X = 8, 4, 12, 10


def sequence() -> nn.Sequential:
    """Of which the second pair's activation is in a module of its own."""
    first = (nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    return nn.Sequential(*first, nn.InstanceNorm2d(4, track_running_stats=True), nn.GELU(), nn.GroupNorm(2, 4), nn.Tanh())


BLOCKS: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    # what is made, and by a norm's name what is said of it
    "residual": (
        Residual,
        {"bn1": "self.relu(out), line 26", "bn2": "out += identity, line 31, and self.relu(out), line 32"},
    ),
    "residual alone": (lambda: Residual(downsample=False), {"bn1": "self.relu(out)", "bn2": "out += identity"}),
    "dropping": (Dropping, {"bn1": "self.act1(x)", "bn2": "x = x + shortcut"}),
    "branching": (Branching, {"norm1": "self.nonlinearity(hidden)", "norm2": "self.nonlinearity(hidden), line 80"}),
    "scaled": (lambda: Branching("scale"), {"norm1": "", "norm2": ""}),
    "else": (lambda: Branching("else"), {"norm1": "", "norm2": ""}),
    "inline": (
        Inline,
        {
            "norm": "F.relu(self.norm(x), inplace=True)",
            "other": "F.gelu(y, approximate='none')",
            "bn": "torch.relu(self.bn(x))",
        },
    ),
    "sequence": (sequence, {"1": "2: ReLU(inplace=True)", "3": "4: GELU(approximate='none')"}),
}


def of(x: Tensor, training: bool) -> Callable[[nn.Module], Results]:
    """What a model makes of x: also of gradients, and of what it keeps up."""

    def run(model: nn.Module) -> Results:
        model.train(training)
        given = x.to(next(model.parameters()).dtype, copy=True).requires_grad_()
        y = model(given)
        y.backward(torch.linspace(-1, 1, y.numel(), device=y.device).to(y.dtype).view(y.shape))
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found: Results = {"y": [y], "dx": [given.grad], "gradients": gradients}  # type: ignore[list-item]
        kept = [b.to(y.dtype) for b in model.buffers()]
        return {**found, "kept": kept} if kept else found

    return run


def fused(make: Callable[[], nn.Module], device: torch.device) -> tuple[nn.Module, nn.Module, trinorm.Report]:
    before = make().to(device)
    with torch.no_grad():
        for p in before.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    trinorm.replace(before)
    after = copy.deepcopy(before)
    return before, after, trinorm.fuse(after)


def assert_as_before(run: Callable[[nn.Module], Results], after: Any, before: nn.Module, by_bits: bool = True) -> None:
    """By bits where both are of torch's operators. A kernel rounds once where two calls do twice: there it is no further
    from float64 than torch's own, or, as what follows in a block is of another norm's last bits, than what is not fused.
    """
    original, exact = original_copy(before), exact_copy(before)
    yard, unfused, actual = (seeded(run, model) for model in (original, before, after))
    with Float64():
        exactly = seeded(run, exact)
    assert actual.keys() == unfused.keys()
    for what, found in actual.items():
        assert [(t.shape, t.dtype, t.stride()) for t in found] == [(t.shape, t.dtype, t.stride()) for t in unfused[what]]
        ours, theirs, exact_ones = flat(found), flat(unfused[what]), flat(exactly[what])
        if (by_bits and are_bits_alike(ours)) or not compare(what, ours, exact_ones, theirs).ok:
            assert_alike(what, ours, theirs, exact_ones, flat(yard[what]), by_bits=by_bits)


def seeded(run: Callable[[nn.Module], Results], model: nn.Module) -> Results:
    torch.manual_seed(1)
    return run(model)


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU torch's own operators, as without the interpreter."""
    monkeypatch.setattr(road, "INTERPRETED", False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The activations that were computed with a norm."""
    found: list[Any] = []
    for module, name in (
        (activations_fused, "of_groups"),
        (activations_fused, "of_batches"),
        (activations_fused, "of_instances"),
        (norm_acts, "of_batches"),
        (norm_acts, "of_groups"),
    ):
        actual = getattr(module, name)

        def noted(norm: Any, x: Tensor, activation: Any, *more: Any, _actual: Any = actual) -> Tensor:
            found.append((activation, "residual") if more and isinstance(more[0], Tensor) else activation)
            return _actual(norm, x, activation, *more)  # type: ignore[no-any-return]

        monkeypatch.setattr(module, name, noted)
    return found


# --- fuse ---


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.usefixtures("by_torch")
def test_by_torch_all_has_the_same_bits(name: str, training: bool, device: torch.device, calls: list[Any]) -> None:
    make, said = BLOCKS[name]
    before, after, report = fused(make, device)
    assert {entry.path for entry in report.fused} == set(said)
    for entry in report.fused:
        assert said[entry.path] in entry.by and entry.to.startswith(NAMED)
        assert f"-> {entry.to}, with {entry.by}" in str(report)
    assert_as_before(of(torch.randn(X, device=device), training), after, before)
    assert {
        "residual": ["relu", ("relu", "residual")],
        "residual alone": ["relu", ("relu", "residual")],
        "dropping": ["silu", ("gelu", "residual")],
        "branching": ["silu", "silu"],
        "scaled": ["silu"],
        "else": ["silu", "silu"],
        "inline": ["relu", "relu", "gelu", "relu", "gelu", "silu"],
        "sequence": ["relu", "gelu"],
    }[name] == calls
    trinorm.restore(after)
    assert {type(m) for m in after.modules()} == {type(m) for m in make().modules()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["residual", "branching", "sequence"])
def test_by_kernels_it_is_no_further_from_float64(name: str, dtype: torch.dtype, device: torch.device) -> None:
    before, after, _ = fused(lambda: BLOCKS[name][0]().to(dtype), device)

    def run(model: nn.Module) -> Results:
        model.train()
        y = model(x.to(next(model.parameters()).dtype))
        return {"y": [y]} if dtype is not torch.float32 else of(x, True)(model)

    x = torch.randn(X, device=device).to(dtype)
    assert_as_before(run, after, before, by_bits=False)


@pytest.mark.usefixtures("by_torch")
def test_what_does_not_belong_together_stays_apart(device: torch.device, calls: list[Any]) -> None:
    before, after, report = fused(Apart, device)
    assert not report.fused and type(after) is Apart
    assert {"no activation that it has is right behind it alone" in entry.reason for entry in report.left} == {True}
    for make in (lambda: Dropping(se=nn.Conv2d(4, 4, 1)), lambda: Dropping(drop=nn.Dropout(0.5))):
        before, after, _ = fused(make, device)
        assert_as_before(of(torch.randn(X, device=device), True), after, before)
    assert calls == ["silu", ("gelu", "residual")]


def hook(module: Any) -> None:
    module.register_forward_hook(lambda module, given, y: y * 2)


def of_instance(module: Any) -> None:
    forward = module.forward
    module.forward = lambda x: forward(x) * 2


def no_change(module: Any) -> None:
    pass


@pytest.mark.parametrize("change", [hook, of_instance, no_change], ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", ["bn1", "relu", "bn2", "conv2"])
@pytest.mark.usefixtures("by_torch")
def test_at_a_call_that_is_not_served_both_are_called(
    change: Callable[[Any], None], name: str, device: torch.device, calls: list[Any]
) -> None:
    before, after, _ = fused(Residual, device)
    changed = change is not no_change
    for model in (before, after):
        change(getattr(model, name))
    x = torch.randn(3, 4, 2, 2, device=device)
    for training in (True, False):
        model, like = copy.deepcopy(after), copy.deepcopy(before)
        model.train(training), like.train(training)
        if model.bn1.running_mean.is_cpu:
            assert torch.equal(model(x), like(x))
        else:
            torch.testing.assert_close(model(x), like(x))
    both = {"bn1": [("relu", "residual")], "relu": [], "bn2": ["relu"], "conv2": ["relu"]}
    if change is not of_instance or name == "relu":  # a bound method's copy is of the module that it was of
        assert calls == (both[name] if changed else ["relu", ("relu", "residual")]) * 2


@pytest.mark.usefixtures("by_torch")
def test_another_activation_or_norm_is_called(device: torch.device, calls: list[Any]) -> None:
    x = torch.randn(3, 4, 2, 2, device=device)
    for name, other in {"relu": nn.Tanh(), "bn1": nn.BatchNorm2d(4), "bn2": nn.Identity(), "conv2": nn.Identity()}.items():
        before, after, _ = fused(Residual, device)
        for model in (before, after):
            setattr(model, name, copy.deepcopy(other).to(device))
        torch.testing.assert_close(after(x), before(x))
    assert calls == [("relu", "residual"), "relu", "relu"]
    _, after, _ = fused(Residual, device)
    after.bn1.activation = "silu"
    after.bn2.momentum = None
    after(x)
    assert calls[3:] == [("relu", "residual")] and "has an activation" in activations_fused.why_no_activation(after.bn1)
    _, after, _ = fused(Residual, device)
    after.downsample = nn.Conv2d(4, 1, 1).to(device)  # whose result is broadcast
    del calls[:]
    after(x)
    assert calls == ["relu"]


def test_dtypes_under_autocast_and_of_unbatched_inputs(device: torch.device) -> None:
    for make in (Residual, Branching, sequence):
        before, after, _ = fused(make, device)
        x = torch.randn(2, 4, 3, 2, device=device)
        with torch.autocast(device.type, torch.bfloat16):
            assert after(x).dtype == before(x).dtype
    model = nn.Sequential(nn.InstanceNorm1d(4, affine=True), nn.ReLU()).to(device)
    x, by_torch = torch.randn(4, 5, device=device), copy.deepcopy(model)
    trinorm.replace(model)
    assert trinorm.fuse(model).fused
    torch.testing.assert_close(model(x), by_torch(x))
    with pytest.raises(ValueError, match="to match num_features"):
        model(x[:3])


@pytest.mark.parametrize("make", [Residual, Branching, sequence, lambda: NormAct(nn.SiLU())])
def test_it_is_one_graph(make: Callable[[], nn.Module], device: torch.device) -> None:
    before, after, _ = fused(make, device)
    called: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)  # type: ignore[no-any-return]

    compiled = torch.compile(after, fullgraph=True, backend=backend)
    assert_as_before(of(torch.randn(X, device=device), True), compiled, before, by_bits=False)
    assert [name for name in called if name.startswith("trinorm.")]
    assert not [name for name in called if any(f in name.lower() for f in ("relu", "silu", "gelu"))]


@pytest.mark.parametrize("make", [Residual, sequence, lambda: NormAct(nn.SiLU()), lambda: GroupNormAct(nn.ReLU())])
@pytest.mark.usefixtures("by_torch")
def test_copies_and_pickles_are_fused_too(make: Callable[[], nn.Module], device: torch.device) -> None:
    before, after, _ = fused(make, device)
    kind, x = type(make()), torch.randn(X, device=device)
    for other in (copy.deepcopy(after), pickle.loads(pickle.dumps(after))):
        assert type(other) is type(after) is not kind and isinstance(other, kind) and type(other).__name__ == kind.__name__
        assert other.state_dict().keys() == before.state_dict().keys()
        assert_as_before(of(x, True), other, copy.deepcopy(before))
        trinorm.restore(other)
        assert type(other) is kind


def test_a_shared_norm_and_a_sequence_of_ones_own_are_left(device: torch.device) -> None:
    """As the residual's other branch might call the norm in between."""
    model = Residual()
    model.downsample = nn.Sequential(nn.Conv2d(4, 4, 1), model.bn2)
    trinorm.replace(model)
    assert [entry.path for entry in trinorm.fuse(model).fused] == ["bn1"]

    class Own(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    other = Own(nn.BatchNorm2d(4), nn.ReLU())
    trinorm.replace(other)
    assert not trinorm.fuse(other).fused


# --- replace ---


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    ("make", "activation"),
    [
        (lambda: NormAct(nn.ReLU(inplace=True)), "relu"),
        (lambda: NormAct(nn.SiLU(), momentum=None), "silu"),
        (lambda: NormAct(nn.GELU(), track_running_stats=False), "gelu"),
        (lambda: NormAct(nn.Identity()), None),
        (lambda: GroupNormAct(nn.SiLU(inplace=True)), "silu"),
    ],
)
def test_a_norm_that_holds_its_activation(
    make: Callable[[], nn.Module], activation: str | None, training: bool, device: torch.device, calls: list[Any]
) -> None:
    by_torch = make().to(device)
    model = copy.deepcopy(by_torch)
    (entry,) = trinorm.replace(model).replaced
    assert entry.by == f"{NAMED}{'group' if 'Group' in entry.module else 'batch'}_norm, activation={activation!r}"
    assert [entry.reason for entry in trinorm.replace(model).left] == ["already trinorm's"]
    assert entry.by in repr(model)
    assert_as_before(of(torch.randn(X, device=device), training), model, by_torch, by_bits=False)
    assert calls == [activation]
    trinorm.restore(model)
    assert type(model) is type(by_torch)


@pytest.mark.parametrize("make", [lambda: NormAct(nn.SiLU()), lambda: GroupNormAct(nn.SiLU())])
def test_data_parallel(
    make: Callable[[], nn.Module], device: torch.device, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies, whose parameters and buffers are plain tensors, are trinorm's too."""
    model = make().to(device).eval()
    x = torch.randn(X, device=device)
    expected = model(x)
    trinorm.replace(model)
    torch.testing.assert_close(data_parallel(model, monkeypatch)(x), expected)
    assert calls == ["silu"] * (2 if ON_TWO_GPUS else 1)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (NormAct(nn.Tanh()), "its act is Tanh"),
        (NormAct(nn.GELU(approximate="tanh")), "its act is GELU"),
        (NormAct(nn.ReLU(), nn.Dropout(0.5)), "it holds drop, act"),
        (Doubled(nn.ReLU()), "its forward is not BatchNorm2d's and the activation of that"),
    ],
)
def test_of_another_kind_it_is_left(model: nn.Module, why: str) -> None:
    assert why in trinorm.replace(model).left[0].reason


@pytest.mark.usefixtures("by_torch")
def test_its_own_forward_runs_where_it_holds_something_else(device: torch.device, calls: list[Any]) -> None:
    x = torch.randn(3, 4, 2, 2, device=device)

    def changed(what: Callable[[Any], None]) -> None:
        by_torch = NormAct(nn.ReLU()).to(device)
        model = copy.deepcopy(by_torch)
        trinorm.replace(model)
        what(model), what(by_torch)
        torch.testing.assert_close(model(x), by_torch(x))

    changed(lambda m: setattr(m, "act", nn.Tanh()))
    changed(lambda m: setattr(m, "drop", nn.Tanh()))
    changed(lambda m: hook(m.act))
    changed(lambda m: setattr(m, "eps", 1.0))
    assert not calls
    changed(no_change)
    changed(hook)  # of its own, which is called behind
    assert calls == ["relu", "relu"]


@pytest.mark.filterwarnings("ignore")
def test_timms(device: torch.device, calls: list[Any]) -> None:
    layers = pytest.importorskip("timm.layers", reason="timm is not installed")
    for model in (layers.BatchNormAct2d(4), layers.GroupNormAct(4, 2, act_layer="silu"), layers.GroupNorm1Act(4)):
        by_torch = copy.deepcopy(model.to(device))
        assert trinorm.replace(model).replaced
        assert_as_before(of(torch.randn(X, device=device), True), model, by_torch, by_bits=False)
    assert calls == ["relu", "silu", "relu"]
