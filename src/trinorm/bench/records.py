"""What a measurement leaves: one record, one JSON line, with where it comes from."""

from __future__ import annotations

import datetime
import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from .cases import Case
from .providers import version_of


@dataclass(frozen=True)
class Provenance:
    """Where a measurement comes from. commit: None where it is unknown; with "-dirty" where files differ from it."""

    gpu: str
    torch: str
    triton: str
    commit: str | None
    date: str


def provenance(device: torch.device) -> Provenance:
    """This device's, this environment's, today's (UTC)."""
    import triton

    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return Provenance(torch.cuda.get_device_name(device), torch.__version__, triton.__version__, _commit(), today)


def _commit() -> str | None:
    """The commit of this source tree: TRINORM_COMMIT where it is set (a copy without .git), else what git says."""
    if "TRINORM_COMMIT" in os.environ:
        return os.environ["TRINORM_COMMIT"]
    if shutil.which("git") is None:
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    # An installed copy may lie inside someone else's repository, whose commit says nothing about it.
    if not git("ls-files", Path(__file__).name):
        return None
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None


@dataclass(frozen=True)
class Record:
    """One provider at one case.

    device_us: median device time of a call, or of one norm of a chain. host_us: median host time of an eager call: of the
    forward without grad, of ``torch.autograd.grad`` alone, or of what a pass of HOST_PASSES names. ceiling_us: the copy
    (forward), the add (backward) or a link of the chain of copies, of the same run; of a sum, two copies or addcmul; of a
    quantized result, a copy of half of what moves. bytes: the fewest that the pass can move. rotated: the sets of buffers
    rotated through. ok: whether ``trinorm.compare`` finds the result right; error_ratio: its largest distance from float64
    over that of torch's own. failure: why a figure is missing.
    first_call_s: wall seconds from before the provider builds its norm until its first result is on the GPU, a backward's
    forward included; where nothing is cached that is mostly compiling, but for torch, which has nothing to compile. A chain
    has none, since its first call is one of those that warm its graph up, nor has a host time, whose norm is called in
    several ways before. provider_version: of Liger-Kernel and QuACK, since 2026-11-26. None: not measured.
    """

    op: str
    pass_: str
    shape: tuple[int, ...]
    layout: str
    dtype: str
    weight_dtype: str
    provider: str
    device_us: float | None
    host_us: float | None
    ceiling_us: float | None
    bytes: int
    gpu: str
    torch: str
    triton: str
    commit: str | None
    date: str
    device_us_mean: float | None = None
    device_us_std: float | None = None
    replays: int | None = None
    rotated: int | None = None
    ok: bool | None = None
    error_ratio: float | None = None
    failure: str | None = None
    first_call_s: float | None = None
    provider_version: str | None = None

    @classmethod
    def of(cls, case: Case, provider: str, provenance: Provenance) -> Record:
        """A record with nothing measured yet."""
        return cls(
            op=case.op,
            pass_=case.pass_,
            shape=case.shape,
            layout=case.layout,
            dtype=_name(case.dtype),
            weight_dtype=_name(case.weight_dtype),
            provider=provider,
            device_us=None,
            host_us=None,
            ceiling_us=None,
            bytes=case.bytes,
            provider_version=version_of(provider),
            **asdict(provenance),
        )

    @property
    def ceiling_ratio(self) -> float | None:
        """The ceiling's time over this one: 1 is the memory's own speed."""
        return self.ceiling_us / self.device_us if self.ceiling_us and self.device_us else None

    @property
    def gigabytes_a_second(self) -> float | None:
        return self.bytes / self.device_us * 1e-3 if self.device_us else None

    def to_json(self) -> str:
        """One line. JSON has neither infinity nor NaN: they become null."""
        return json.dumps({field.name.rstrip("_"): _finite(getattr(self, field.name)) for field in fields(self)})


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def results_path(given: Path, gpu: str, date: str, what: str) -> Path:
    """``given`` if it names a .json or .jsonl file; else, in that folder, ``<gpu>/<date>-<what>.jsonl``."""
    if given.suffix in (".json", ".jsonl"):
        return given
    return given / re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") / f"{date}-{what}.jsonl"
