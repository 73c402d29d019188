"""held.py: what a module's attribute is, however it comes by it."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils import parametrize, prune

from trinorm.held import buffer, parameter


class Doubled(torch.nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def test_a_parameter_is_what_the_attribute_is() -> None:
    norm = torch.nn.LayerNorm(4, bias=False)
    assert parameter(norm, "weight") is norm.weight
    assert parameter(norm, "bias") is None is parameter(norm, None)
    assert parameter(norm, "eps") == norm.eps
    assert parameter(prune.random_unstructured(torch.nn.Linear(4, 4), "weight", 1), "weight").count_nonzero() == 15
    parametrize.register_parametrization(norm, "weight", Doubled())
    assert torch.equal(parameter(norm, "weight"), torch.full((4,), 2.0))
    del norm.parametrizations
    with pytest.raises(AttributeError):
        parameter(norm, "weight")


def test_a_buffer_is_what_the_attribute_is() -> None:
    norm = torch.nn.BatchNorm1d(4)
    assert buffer(norm, "running_mean") is norm.running_mean
    assert buffer(torch.nn.BatchNorm1d(4, track_running_stats=False), "running_var") is None
    del norm.running_mean
    norm.running_mean = torch.ones(4)
    assert buffer(norm, "running_mean") is norm.running_mean
