"""checks.py: arguments of kinds that torch refuses are refused as torch does, and nothing is kept of the call."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from trinorm import functional


@pytest.fixture(params=["layer_norm", "rms_norm"])
def op(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def test_an_iterator_leaves_nothing_behind(op: str, device: torch.device) -> None:
    """It is refused before a call is kept, of which an empty normalized_shape would be another."""
    x, norm = torch.randn(4, 8, device=device), getattr(functional, op)
    for _ in range(2):
        with pytest.raises(TypeError, match="normalized_shape"):
            norm(x, (n for n in (4, 8)))
        with pytest.raises(RuntimeError, match="at least one dim"):
            norm(x, [])


@pytest.mark.parametrize(
    "eps",
    [torch.tensor(1e-3, requires_grad=True), torch.tensor([1e-3]), Fraction(1, 3), Decimal("0.1"), 1j, np.array(1e-3)],
    ids=str,
)
def test_eps_that_is_no_number_of_torchs(op: str, eps: Any, device: torch.device) -> None:
    """A gradient of eps would be dropped."""
    x = torch.randn(2, 8, device=device)
    for norm in (getattr(F, op), getattr(functional, op)):
        with pytest.raises(TypeError, match="eps"):
            norm(x, (8,), eps=eps)


@pytest.mark.parametrize("value", ["yes", 1, None, torch.tensor(True)], ids=str)
def test_flags_that_are_none(value: Any, device: torch.device) -> None:
    """Also after a call whose flag is equal to it."""
    x = torch.randn(2, 4, 3, device=device)
    for op, name in (("batch_norm", "training"), ("instance_norm", "use_input_stats")):
        for _ in range(2):
            given = (None, None) if op == "batch_norm" else ()
            getattr(functional, op)(x, *given, **{name: True})
            with pytest.raises(TypeError, match=name):
                getattr(functional, op)(x, *given, **{name: value})


def test_a_bool_is_no_size(op: str, device: torch.device) -> None:
    x, norm = torch.randn(4, 1, device=device), getattr(functional, op)
    for _ in range(3):
        norm(x, (1,))
        with pytest.raises(TypeError, match="normalized_shape"):
            norm(x, (True,))


def test_types_are_looked_at_first(op: str, device: torch.device) -> None:
    """As torch's parser of arguments does, whatever else is wrong."""
    x = torch.randn(2, 8, device=device)
    for norm in (getattr(F, op), getattr(functional, op)):
        with pytest.raises(TypeError):
            norm(x, (7,), eps="1e-5")
        with pytest.raises(TypeError):
            norm(x, (7,), weight=[1.0])
