"""Compiles, with no GPU, what the row family would launch for one target, and prints it as JSON.

A process of its own: tests on a CPU interpret the kernels, and one process cannot do both.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import torch

from trinorm import inspection, launch
from trinorm.ops import rows
from trinorm.spec import LAYER_NORM, RMS_NORM, RowNorm

# Shared memory of a program on each target, in bytes.
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}
WIDTHS = (128, 768, 1024, 4096, 5120, 8192, 16384, 65536)
ROWS = (100, 8192)


def main(target: str) -> None:
    """Print one JSON list: for each distinct kernel, its spec, width, rows and what inspection found."""
    launch.describe = rows.describe = lambda _: launch.Device(132, SHARED[target])
    found, seen = [], set()
    for spec in (LAYER_NORM, RMS_NORM):
        for n in WIDTHS:
            for m in ROWS:
                for call in _calls(spec, m, n):
                    key = (call.kernel.__name__, tuple(sorted((k, str(v)) for k, v in call.options.items())))
                    if key in seen:
                        continue
                    seen.add(key)
                    compiled = asdict(inspection.compile_call(call.kernel, call.args, call.options, target))
                    compiled["accesses"] = [[*key, count] for key, count in compiled["accesses"].items()]
                    tile = {"rows": call.options.get("ROWS", 1), "chunk": call.options["CHUNK"]}
                    found.append({"spec": spec.name, "n": n, "m": m, **tile, **compiled})
    print(json.dumps(found))


def _calls(spec: RowNorm, m: int, n: int) -> list[inspection.Call]:
    x, dy = (torch.empty(m, n, dtype=torch.bfloat16, device="meta") for _ in range(2))
    w = torch.empty(n, dtype=torch.bfloat16, device="meta")
    b = w if spec.center else None
    with inspection.recorded() as calls:
        _, mean, rstd = rows.forward(spec, x, 1, w, b, 1e-5, save=True)
        assert rstd is not None
        rows.backward(spec, dy, x, 1, w, mean, rstd, dx=True, dw=w.dtype, db=None if b is None else b.dtype)
    return calls


if __name__ == "__main__":
    main(sys.argv[1])
