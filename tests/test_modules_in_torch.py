"""What torch's modules can be put through, ours can: every test does the same to torch's module and to ours."""

from __future__ import annotations

import copy
import functools
import io
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils import parametrize, prune, skip_init
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from trinorm import nn
from trinorm.compare import assert_no_worse
from trinorm.ops import CALLS, channel


class Kind(NamedTuple):
    """A class of modules, and the arguments that one is built with: those before its number of channels, and after."""

    of: type[Module]
    positions: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[Any, ...]
    channels: int = 8

    @property
    def arguments(self) -> tuple[Any, ...]:
        return *self.before, self.channels, *self.after

    def __call__(self, device: torch.device | str | None = None) -> Module:
        return self.of(*self.arguments, device=device)

    def drawn(self, device: torch.device | str, *batches: int, samples: int = 4) -> Tensor:
        """An input that it takes; batches: dims before those."""
        return torch.randn(*batches, samples, self.channels, *self.positions, device=device)


class ChannelLayerNorm(torch.nn.LayerNorm):
    """Of torch's parts, as the models that have it write it."""

    def __init__(self, channels: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(channels, eps=1e-6, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1).contiguous()

    def extra_repr(self) -> str:
        return f"{self.normalized_shape[0]}, eps={self.eps}, affine={self.elementwise_affine}"


# Names, and what Kind says of them. Where there can be parameters and running statistics, there are.
FAMILIES: list[tuple[tuple[str, ...], tuple[int, ...], tuple[int, ...], tuple[Any, ...]]] = [
    (("LayerNorm", "RMSNorm", "BatchNorm1d"), (), (), ()),
    (("GroupNorm",), (3, 2), (2,), ()),
    (("ChannelLayerNorm", "BatchNorm2d"), (3, 2), (), ()),
    (("BatchNorm3d",), (3, 1, 2), (), ()),
    (("InstanceNorm1d",), (6,), (), (1e-5, 0.1, True, True)),
    (("InstanceNorm2d",), (3, 2), (), (1e-5, 0.1, True, True)),
    (("InstanceNorm3d",), (3, 1, 2), (), (1e-5, 0.1, True, True)),
]
PAIRS = {
    name: (Kind(getattr(nn, name), *how), Kind(getattr(torch.nn, name, ChannelLayerNorm), *how))
    for names, *how in FAMILIES
    for name in names
}


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest) -> tuple[Kind, Kind]:
    """Ours and torch's."""
    return PAIRS[request.param]


def filled(module: Module) -> Module:
    """The module with parameters and statistics that tell one place from another, the same ones each time."""
    for t in module.state_dict().values():
        t.copy_(torch.linspace(1.5, 0.5, t.numel()).view_as(t))
    return module


def results(module: Module, x: Tensor) -> dict[str, Tensor]:
    """y, every gradient, and what the buffers are then."""
    x = x.detach().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(torch.linspace(-1, 2, x.numel(), device=x.device).view_as(x).to(y.dtype))
    gradients = {name: p.grad for name, p in module.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **gradients, **{name: b.clone() for name, b in module.named_buffers()}}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


class Doubled(Module):
    """A parametrization."""

    def forward(self, t: Tensor) -> Tensor:
        return t * 2

    def right_inverse(self, t: Tensor) -> Tensor:
        return t / 2


def _loaded(kind: Kind, device: torch.device) -> Module:
    file = io.BytesIO()
    torch.save(filled(kind(device)).state_dict(), file)
    file.seek(0)
    module = kind(device)
    module.load_state_dict(torch.load(file, weights_only=True))
    return module


def _assigned(kind: Kind, device: torch.device) -> Module:
    module = kind("meta")
    module.load_state_dict(filled(kind(device)).state_dict(), assign=True)
    return module


def _built_on_the_default_device(kind: Kind, device: torch.device) -> Module:
    with device:
        return filled(kind())


def _built_with_the_default_dtype(kind: Kind, device: torch.device) -> Module:
    torch.set_default_dtype(torch.float64)
    try:
        return filled(kind(device))
    finally:
        torch.set_default_dtype(torch.float32)


def _parametrized(kind: Kind, device: torch.device) -> Module:
    return parametrize.register_parametrization(filled(kind(device)), "weight", Doubled())


def _parametrization_removed(kind: Kind, device: torch.device) -> Module:
    return parametrize.remove_parametrizations(_parametrized(kind, device), "weight")


TREATMENTS: dict[str, Callable[[Kind, torch.device], Module]] = {
    "saved and loaded": _loaded,
    "assigned to meta": _assigned,
    "deepcopied": lambda kind, device: copy.deepcopy(filled(kind(device))),
    "pickled": lambda kind, device: pickle.loads(pickle.dumps(filled(kind(device)))),
    "to_empty": lambda kind, device: filled(kind("meta").to_empty(device=device)),
    "reset_parameters": lambda kind, device: reset(kind("meta").to_empty(device=device)),
    "skip_init": lambda kind, device: filled(skip_init(kind.of, *kind.arguments, device=device)),
    "the default device": _built_on_the_default_device,
    "the default dtype": _built_with_the_default_dtype,
    "double": lambda kind, device: filled(kind(device)).to(torch.float64),
    "parametrized": _parametrized,
    "parametrization removed": _parametrization_removed,
    "weight_norm": lambda kind, device: torch.nn.utils.parametrizations.weight_norm(filled(kind(device))),
    "pruned": lambda kind, device: prune.l1_unstructured(filled(kind(device)), "weight", amount=3),
}


def reset(module: Any) -> Module:
    module.reset_parameters()
    return module


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_treated(pair: tuple[Kind, Kind], treatment: str, device: torch.device, launched: list[Any]) -> None:
    ours, theirs = (TREATMENTS[treatment](kind, device) for kind in pair)
    assert isinstance(ours, pair[0].of)
    assert repr(ours) == repr(theirs)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    x = pair[0].drawn(device).to(next(ours.parameters()).dtype)
    torch.testing.assert_close(results(ours, x), results(theirs, x))
    assert launched


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_checkpoints_load_both_ways(pair: tuple[Kind, Kind], assign: bool, device: torch.device) -> None:
    x = pair[0].drawn(device)
    for kind, other in (pair, pair[::-1]):
        module = kind("meta" if assign else device)
        module.load_state_dict(filled(other(device)).state_dict(), assign=assign)
        assert_same_bits(results(module, x), results(filled(kind(device)), x))


def test_meta(pair: tuple[Kind, Kind], launched: list[Any]) -> None:
    x = pair[0].drawn("meta")
    ours, theirs = (results(kind("meta"), x) for kind in pair)
    described = [{name: (t.shape, t.stride(), t.dtype, t.device) for name, t in r.items()} for r in (ours, theirs)]
    assert described[0] == described[1]
    assert not launched


@pytest.fixture
def set_default_device() -> Iterator[Callable[[str], None]]:
    yield torch.set_default_device
    torch.set_default_device(None)


def test_the_default_device_is_that_of_new_tensors_alone(
    pair: tuple[Kind, Kind], device: torch.device, set_default_device: Callable[[str], None]
) -> None:
    first, *modules = (filled(pair[0](device)) for _ in range(3))
    x = pair[0].drawn(device)
    expected = results(first, x)
    set_default_device("meta")
    for module in modules:  # once as it was recorded, once from the start
        assert_same_bits(results(module, x), expected)
        CALLS.clear()
        channel.CALLS.clear()


def heard(module: Module, x: Tensor) -> dict[str, Any]:
    """What hooks of every kind are told, in their order. Each changes what it may change."""
    events: dict[str, Any] = {}

    def doubling(name: str, changed: int = -1) -> Callable[..., Any]:
        def hook(_: Module, *told: Any) -> Any:
            events[name] = told
            return tree_map(lambda t: t * 2, told[changed])

        return hook

    def of_the_gradient(gradient: Tensor) -> Tensor:
        events["gradient"] = gradient
        return gradient * 2

    module.register_forward_pre_hook(doubling("forward pre"))
    module.register_forward_hook(doubling("forward"))
    module.register_full_backward_pre_hook(doubling("backward pre"))
    module.register_full_backward_hook(doubling("backward", changed=0))
    weight: Any = module.weight
    weight.register_hook(of_the_gradient)
    weight.register_post_accumulate_grad_hook(lambda p: events.update(accumulated=p.grad.clone()))
    return events | results(module, x)


def test_hooks(pair: tuple[Kind, Kind], device: torch.device) -> None:
    x = pair[0].drawn(device)
    ours, theirs = (heard(filled(kind(device)), x) for kind in pair)
    assert list(ours) == list(theirs)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:trinorm:UserWarning")
def test_an_ensemble_at_once(pair: tuple[Kind, Kind], device: torch.device) -> None:
    """Modules' parameters and buffers stacked, and mapped over, in the backward too."""
    bare, *modules = pair[0]("meta"), *(filled(pair[0](device)) for _ in range(3))
    for factor, module in enumerate(modules, 1):
        for t in module.state_dict().values():
            t *= factor
    x = pair[0].drawn(device, len(modules))

    def loss(parameters: dict[str, Tensor], x: Tensor, buffers: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        y = torch.func.functional_call(bare, (parameters, buffers), (x,))
        return (y * torch.linspace(-1, 2, x.numel(), device=device).view_as(x)).sum(), y

    parameters, buffers = torch.func.stack_module_state(modules)
    of_each = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1), has_aux=True))
    (gradients, dx), y = of_each(parameters, x, buffers)
    one_by_one = [results(module, t) for module, t in zip(modules, x, strict=True)]
    expected = {name: torch.stack([found[name] for found in one_by_one]) for name in one_by_one[0]}
    torch.testing.assert_close({"y": y, "x": dx, **gradients, **buffers}, expected)


class Checkpointed(Module):
    """A part of a model that has the module. saved: whether its op's results are, None where no one is asked."""

    def __init__(self, module: Module, saved: bool | None) -> None:
        super().__init__()
        self.module, self.asked = module, set[str]()

        def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            self.asked.add(str(op))
            return CheckpointPolicy.MUST_SAVE if saved and "_norm" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

        selective = dict(context_fn=functools.partial(create_selective_checkpoint_contexts, policy))
        self.run = functools.partial(checkpoint, self.part, use_reentrant=False, **({} if saved is None else selective))

    def part(self, x: Tensor) -> Tensor:
        return self.module(x * 2).sin()

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


@pytest.mark.filterwarnings("ignore:trinorm:UserWarning")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("saved", [None, True, False], ids=["all", "selective, saved", "selective, recomputed"])
@pytest.mark.parametrize("pair", ["GroupNorm", "ChannelLayerNorm", "BatchNorm2d", "InstanceNorm1d"], indirect=True)
def test_checkpointed(
    pair: tuple[Kind, Kind], saved: bool | None, compiled: bool, device: torch.device, launched: list[Any]
) -> None:
    """What is run once more keeps running statistics up once more, as torch's; compiled they are kept up once."""
    torch._dynamo.reset()
    x = pair[0].drawn(device)
    ours, theirs = (Checkpointed(filled(kind(device)), saved) for kind in pair)
    found, expected = (
        results(torch.compile(part, fullgraph=True, backend="aot_eager") if compiled else part, x)
        for part in (ours, theirs)
    )
    torch.testing.assert_close(found, expected)
    assert any("trinorm." in op for op in ours.asked) == (compiled and saved is not None)
    launches = len(launched)
    results(filled(pair[0](device)), x)
    of_one_run = len(launched) - launches
    if compiled or saved is None:
        assert (launches > of_one_run) == (not saved)
    else:
        assert launches == 0, "who is asked of ATen's ops is given them"


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
def test_grad_scaler(pair: tuple[Kind, Kind], device: torch.device) -> None:
    """Its scale rises, and falls with the batch that overflows and takes no step, as with torch's module."""
    shape = pair[0].drawn("meta")[0].shape
    batches, first = torch.randn(5, 16, 8, device=device), torch.randn(shape.numel(), 8, device=device)

    def train(kind: Kind, dtype: torch.dtype) -> tuple[list[float], list[Tensor]]:
        linear = torch.nn.Linear(8, shape.numel(), bias=False, device=device)
        model = torch.nn.Sequential(linear, torch.nn.Unflatten(1, shape), filled(kind(device)))
        model[0].load_state_dict({"weight": first})
        model.to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=2)
        scales = []
        for x, size in zip(batches.to(dtype), (1, 1, float("inf"), 1, 1), strict=True):
            with torch.autocast(device.type, dtype=torch.float16, enabled=dtype == torch.float32):
                y = model(x)
            optimizer.zero_grad()
            scaler.scale((y.to(dtype) * size).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        return scales, [p.detach() for p in model.parameters()]

    (scales, ours), (theirs_scales, theirs) = (train(kind, torch.float32) for kind in pair)
    assert scales == theirs_scales == [2.0**10, 2.0**11, 2.0**10, 2.0**10, 2.0**11]
    _, exact = train(pair[1], torch.float64)
    for got, want, by_torch in zip(ours, exact, theirs, strict=True):
        assert_no_worse("parameter", got, want, by_torch)


def test_deterministic_algorithms(pair: tuple[Kind, Kind], device: torch.device) -> None:
    """The same bits on every run. What is allocated is NaN then, and no NaN comes of it."""
    positions = math.prod(pair[0].positions)
    kind = pair[0]._replace(channels=300 // positions)
    x = kind.drawn(device, samples=(5000 if device.type == "cuda" else 40) // positions)
    first, *modules = (filled(kind(device)) for _ in range(4))
    expected = results(first, x)
    torch.use_deterministic_algorithms(True)
    try:
        for module in modules:
            assert_same_bits(results(module, x), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_data_parallel(pair: tuple[Kind, Kind]) -> None:
    """A thread for each GPU, forward and backward, with copies of the module whose parameters are plain tensors."""
    x = pair[0].drawn("cuda:0", samples=64)
    ours, theirs = (torch.nn.DataParallel(filled(kind("cuda:0")), [0, 1]) for kind in pair)
    for _ in range(2):
        torch.testing.assert_close(results(ours, x), results(theirs, x))
