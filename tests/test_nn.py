"""nn.py: torch's modules in everything but the forward."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch

from trinorm import nn
from trinorm.ops.hosts import rows

PAIRS = [(nn.LayerNorm, torch.nn.LayerNorm), (nn.RMSNorm, torch.nn.RMSNorm)]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_torchs_module_with_another_forward_and_save(ours: type, theirs: type, device: torch.device) -> None:
    assert issubclass(ours, theirs)
    assert inspect.signature(ours) == inspect.signature(theirs)
    assert set(vars(ours)) - set(vars(torch.nn.Module)) <= {
        "__module__",
        "__doc__",
        "forward",
        "extra_repr",
        "save",
        "cast",
        "batch_invariant",
        "__annotations__",
        "__annotations_cache__",
        "__annotate_func__",
        "__firstlineno__",
        "__static_attributes__",
    }
    for arguments in (dict(normalized_shape=8), dict(normalized_shape=[2, 8], eps=1e-3, elementwise_affine=False)):
        mine, other = ours(**arguments, device=device), theirs(**arguments, device=device)
        assert repr(mine) == repr(other)
        other.load_state_dict(mine.state_dict())
        mine.load_state_dict(other.state_dict())
        x = torch.randn(3, 2, 8, device=device)
        torch.testing.assert_close(mine(x), other(x))


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_forward_launches_the_kernel(
    ours: type, theirs: type, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []
    actual = rows.launch
    monkeypatch.setattr(rows, "launch", lambda *a: (launched.append(a[0]), actual(*a)))
    ours(8, device=device)(torch.randn(2, 8, device=device))
    assert len(launched) == 1


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_copies_and_pickles(ours: type, theirs: type, device: torch.device) -> None:
    module = ours(8, device=device)
    x = torch.randn(2, 8, device=device)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is ours
        assert torch.equal(other(x), module(x))


def test_layer_norm_without_bias(device: torch.device) -> None:
    module = nn.LayerNorm(8, bias=False, device=device)
    assert module.bias is None
    module(torch.randn(2, 8, device=device)).sum().backward()
    assert module.weight.grad is not None
