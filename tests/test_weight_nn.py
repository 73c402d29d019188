"""Weight normalization as a parametrization: nn/weight.py."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch.nn.utils import parametrizations, parametrize

from trinorm import nn

MODULES: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...], int | None]] = {
    "linear": (lambda: torch.nn.Linear(6, 4), (3, 6), 0),
    "conv": (lambda: torch.nn.Conv2d(2, 4, 3), (2, 2, 5, 5), 0),
    "transposed": (lambda: torch.nn.ConvTranspose1d(4, 3, 3), (2, 4, 8), 1),
    "of all": (lambda: torch.nn.Linear(6, 4), (3, 6), None),
}


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.filterwarnings("ignore:.*neither 0 nor None")
def test_in_torchs_place(kind: str, device: torch.device) -> None:
    """The same parameters, results and gradients; checkpoints load both ways."""
    make, shape, dim = MODULES[kind]
    ours = make().to(device)
    torchs = copy.deepcopy(ours)
    weight, x = ours.weight.detach().clone(), torch.randn(shape, device=device)
    assert nn.weight_norm(ours, dim=dim) is ours
    parametrizations.weight_norm(torchs, dim=dim)  # type: ignore[arg-type]
    torch.testing.assert_close(ours.weight, weight)
    assert [*ours.state_dict()] == [*torchs.state_dict()]
    assert all(map(torch.equal, ours.state_dict().values(), torchs.state_dict().values()))
    for _ in range(2):
        found = []
        for module in (ours, torchs):
            y = module(x)
            found.append([y, *torch.autograd.grad(y.square().sum(), list(module.parameters()))])
        torch.testing.assert_close(*found)
        state = {key: torch.randn_like(t) for key, t in ours.state_dict().items()}
        ours.load_state_dict(state)
        torchs.load_state_dict(ours.state_dict())
    torchs.load_state_dict(state)
    ours.load_state_dict(torchs.state_dict())
    copied = copy.deepcopy(ours)
    assert torch.equal(copied.weight, ours.weight)
    before = ours.weight.detach().clone()
    parametrize.remove_parametrizations(ours, "weight")
    assert type(ours.weight) is torch.nn.Parameter and torch.equal(ours.weight, before)
    assert not parametrize.is_parametrized(ours)


def test_what_else_torchs_can_do(device: torch.device) -> None:
    module = nn.weight_norm(torch.nn.Linear(6, 4, device=device))
    assert repr(module.parametrizations["weight"][0]) == "WeightNorm(dim=0)"  # type: ignore[index]
    g, v = module.parametrizations["weight"].original0, module.parametrizations["weight"].original1  # type: ignore[index]
    assert g.shape == (4, 1)
    # The weight may be set; it is taken once under parametrize.cached.
    module.weight = wanted = torch.randn(4, 6, device=device)
    torch.testing.assert_close(module.weight.detach(), wanted)
    torch.testing.assert_close(g.detach(), wanted.norm(dim=1, keepdim=True))
    with parametrize.cached():
        assert module.weight is module.weight
    # Checkpoints of torch.nn.utils.weight_norm, which is older.
    older = {"weight_g": torch.rand(4, 1, device=device), "weight_v": torch.randn(4, 6, device=device)}
    module.load_state_dict(older | {"bias": torch.zeros(4, device=device)})
    assert torch.equal(g, older["weight_g"]) and torch.equal(v, older["weight_v"])
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        pickle.dumps(module)
    with pytest.raises(ValueError, match="does not have a parameter"):
        nn.weight_norm(torch.nn.Linear(6, 4), "wight")
    with pytest.raises(IndexError):
        nn.weight_norm(torch.nn.Linear(6, 4), dim=2)


def test_a_step_compiled(device: torch.device) -> None:
    """In one graph, with an eager step's bits."""
    module, x = nn.weight_norm(torch.nn.Linear(6, 4, device=device)), torch.randn(3, 6, device=device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = []
    for of in (module, compiled):
        found.append(torch.autograd.grad(of(x).square().sum(), list(module.parameters())))
    assert all(map(torch.equal, *found))
    torch._dynamo.reset()


def test_a_model_of_weights_that_are_normalized_trains(device: torch.device) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(nn.weight_norm(torch.nn.Conv1d(2, 4, 3)), torch.nn.ReLU(), torch.nn.Conv1d(4, 1, 3)).to(
        device
    )
    x = torch.randn(8, 2, 9, device=device)
    target, optimizer = x.mean((1, 2)), torch.optim.SGD(model.parameters(), 0.05)
    losses = []
    for _ in range(20):
        loss = (model(x).mean((1, 2)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
