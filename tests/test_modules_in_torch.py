"""What torch's modules can be put through, ours can: every test does the same to torch's module and to ours."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils import parametrize, prune, skip_init
from torch.utils._pytree import tree_map

from trinorm import nn
from trinorm.compare import assert_no_worse

Kind = type[Module]


@pytest.fixture(params=[(nn.LayerNorm, torch.nn.LayerNorm), (nn.RMSNorm, torch.nn.RMSNorm)], ids=["LayerNorm", "RMSNorm"])
def pair(request: pytest.FixtureRequest) -> tuple[Kind, Kind]:
    return request.param


def filled(module: Module) -> Module:
    """The module with parameters that tell one place from another, the same ones each time."""
    for parameter in module.parameters():
        with torch.no_grad():
            parameter.copy_(torch.linspace(0.5, 1.5, parameter.numel()).view_as(parameter))
    return module


def results(module: Module, x: Tensor) -> dict[str, Tensor]:
    """y and every gradient."""
    x = x.detach().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(torch.linspace(-1, 2, x.numel(), device=x.device).view_as(x).to(y.dtype))
    return {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}


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
    torch.save(filled(kind(8, device=device)).state_dict(), file)
    file.seek(0)
    module = kind(8, device=device)
    module.load_state_dict(torch.load(file, weights_only=True))
    return module


def _assigned(kind: Kind, device: torch.device) -> Module:
    module = kind(8, device="meta")
    module.load_state_dict(filled(kind(8, device=device)).state_dict(), assign=True)
    return module


def _built_on_the_default_device(kind: Kind, device: torch.device) -> Module:
    with device:
        return filled(kind(8))


def _parametrized(kind: Kind, device: torch.device) -> Module:
    return parametrize.register_parametrization(filled(kind(8, device=device)), "weight", Doubled())


def _parametrization_removed(kind: Kind, device: torch.device) -> Module:
    return parametrize.remove_parametrizations(_parametrized(kind, device), "weight")


TREATMENTS: dict[str, Callable[[Kind, torch.device], Module]] = {
    "saved and loaded": _loaded,
    "assigned to meta": _assigned,
    "to_empty": lambda kind, device: filled(kind(8, device="meta").to_empty(device=device)),
    "reset_parameters": lambda kind, device: reset(kind(8, device="meta").to_empty(device=device)),
    "skip_init": lambda kind, device: filled(skip_init(kind, 8, device=device)),
    "the default device": _built_on_the_default_device,
    "double": lambda kind, device: filled(kind(8, device=device)).to(torch.float64),
    "parametrized": _parametrized,
    "parametrization removed": _parametrization_removed,
    "weight_norm": lambda kind, device: torch.nn.utils.parametrizations.weight_norm(filled(kind(8, device=device))),
    "pruned": lambda kind, device: prune.l1_unstructured(filled(kind(8, device=device)), "weight", amount=3),
}


def reset(module: Any) -> Module:
    module.reset_parameters()
    return module


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_treated(pair: tuple[Kind, Kind], treatment: str, device: torch.device, launched: list[Any]) -> None:
    ours, theirs = (TREATMENTS[treatment](kind, device) for kind in pair)
    assert isinstance(ours, pair[0])
    assert repr(ours) == repr(theirs)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    x = torch.randn(4, 8, device=device).to(next(ours.parameters()).dtype)
    torch.testing.assert_close(results(ours, x), results(theirs, x))
    assert launched


def test_meta(pair: tuple[Kind, Kind], launched: list[Any]) -> None:
    x = torch.randn(4, 3, 8, device="meta").transpose(0, 1)
    ours, theirs = (results(kind(8, device="meta"), x) for kind in pair)
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
    module, x = filled(pair[0](8, device=device)), torch.randn(4, 8, device=device)
    expected = results(module, x)
    set_default_device("meta")
    assert_same_bits(results(module, x), expected)
    assert_same_bits(results(module, x), expected)


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
    x = torch.randn(4, 8, device=device)
    ours, theirs = (heard(filled(kind(8, device=device)), x) for kind in pair)
    assert list(ours) == list(theirs)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
def test_grad_scaler(pair: tuple[Kind, Kind], device: torch.device) -> None:
    """Its scale rises, and falls with the batch that overflows and takes no step, as with torch's module."""
    batches, first = torch.randn(5, 16, 8, device=device), torch.randn(8, 8, device=device)

    def train(kind: Kind, dtype: torch.dtype) -> tuple[list[float], list[Tensor]]:
        model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False, device=device), filled(kind(8, device=device)))
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
    module = filled(pair[0](300, device=device))
    x = torch.randn(5000 if device.type == "cuda" else 40, 300, device=device)
    expected = results(module, x)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            assert_same_bits(results(module, x), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_data_parallel(pair: tuple[Kind, Kind]) -> None:
    """A thread for each GPU, forward and backward, with copies of the module whose parameters are plain tensors."""
    x = torch.randn(64, 8, device="cuda:0")
    ours, theirs = (torch.nn.DataParallel(filled(kind(8, device="cuda:0")), [0, 1]) for kind in pair)
    for _ in range(2):
        torch.testing.assert_close(results(ours, x), results(theirs, x))
