"""Models as ``torch.nn.DataParallel`` calls them, also where there are no two GPUs."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

ON_TWO_GPUS = torch.cuda.device_count() > 1


def data_parallel(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model on two GPUs; or, without, one of two copies as they are made there, whose parameters are plain tensors."""
    if ON_TWO_GPUS:
        return torch.nn.DataParallel(model, [0, 1])
    parallel = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(parallel, "_broadcast_coalesced_reshape", _cloned)
    monkeypatch.setattr(parallel, "_get_device_index", lambda index, *_: index)
    return parallel.replicate(model, [0, 1])[1]


def _cloned(tensors: list[torch.Tensor], devices: list[int], detach: bool) -> list[list[torch.Tensor]]:
    return [[t.clone() for t in tensors] for _ in devices]
