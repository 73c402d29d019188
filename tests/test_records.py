"""bench/records.py: which version of a peer was measured."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator

import pytest
import torch

from trinorm.bench.cases import Case
from trinorm.bench.providers import OURS, PEERS, version_of
from trinorm.bench.records import Provenance, Record

CASE = Case("rms_norm", "forward", (6, 40), torch.bfloat16, torch.bfloat16)
HERE = Provenance(gpu="Made-up GPU 9", torch="0.0", triton="0.0", commit=None, date="2000-01-01")


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    version_of.cache_clear()
    yield
    version_of.cache_clear()


def written(provider: str) -> object:
    return json.loads(Record.of(CASE, provider, HERE).to_json())["provider_version"]


def test_a_record_has_the_version_of_its_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", {"liger-kernel": "0.8", "quack-kernels": "0.6"}.__getitem__)
    # Of the others torch's version and the commit stand in each record.
    assert {name: written(name) for name in (OURS, f"{OURS}.nn", *PEERS)} == {
        OURS: None,
        f"{OURS}.nn": None,
        "torch": None,
        "compile": None,
        "liger": "0.8",
        "quack": "0.6",
    }


def test_a_peer_that_is_no_package_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert written("liger") is None
