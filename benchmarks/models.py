"""Steps of real models with random weights, in bf16: with torch's norms, Liger-Kernel's and trinorm's, and compiled.

    python benchmarks/models.py --quick --json models.jsonl

A training step is the forward, the model's own loss and the backward; gradients are dropped before each, and there is no
optimizer. The columns of a row take turns, step by step, with the same parameters. ms is a step between two CUDA events,
with nothing queued before; host_ms what the host takes to start it; kernels_ms its kernels together, by the profiler: a
step that takes much longer than its kernels waits for the host. peak_mb is the most memory in a step, held_mb what was held
before it. logits_error and gradients_error are ‖a − b‖/‖b‖ to the fp32 model with the same weights: of the logits, and of
the gradients of all parameters together.

compile is torch.compile of the whole model, layers of each layer (one graph for all). With --quick a model of many equal
layers is not compiled whole, but for Llama and Gemma's decoding with few of them, in rows that say so. Liger-Kernel's
kernels need a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before trinorm is imported
    from trinorm import interpreter

    interpreter.install()

from model_cases import CASES, FURTHER
from model_columns import COLUMNS
from model_rows import Row, free, measure, prepare


def rows(cases: list[str], columns: list[str], quick: bool, tiny: bool, device: torch.device) -> Iterator[Row]:
    """Of a case of many layers in a quick run: all, with nothing compiled whole; and few of them, where it says so."""
    for name in cases:
        case = {**CASES, **FURTHER}[name]
        wanted = [column for column in columns if column not in case.without]
        split = quick and case.layers is not None and any(COLUMNS[column].whole for column in wanted)
        yield Row(case, tiny, device, None, [c for c in wanted if not (split and COLUMNS[c].whole)])
        if split and case.few:
            yield Row(case, tiny, device, 1 if tiny else case.few, [c for c in wanted if COLUMNS[c].few])


def records(row: Row, origin: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for variant in row.variants:
        yield dict(
            model=row.case.title,
            **{"pass": row.case.what},
            layers=row.layers or row.case.layers,
            of_layers=row.case.layers,
            shape=row.shape,
            order="channels_last" if row.case.last else "contiguous",
            dtype="bfloat16",
            autocast=row.case.autocast,
            column=variant.column,
            **variant.found,
            compared=row.compared,
            failure=variant.failure,
            **origin,
        )


def origin(device: torch.device) -> dict[str, Any]:
    """The card, the versions, the commit (TRINORM_COMMIT where it is set) and the day, as trinorm bench writes them."""
    from trinorm.bench.records import provenance

    found: dict[str, Any] = asdict(provenance(device)) if device.type == "cuda" else {}
    for package in ("transformers", "timm", "liger_kernel"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def tables(found: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """Times and memory; and errors."""
    columns = list(dict.fromkeys(record["column"] for record in found))
    by_row: dict[str, dict[str, dict[str, Any]]] = {}
    for r in found:
        few = f", {r['layers']} of {r['of_layers']} layers" if r["layers"] != r["of_layers"] else ""
        last = ", last" if r["order"] == "channels_last" else ""
        title = f"{r['model']}{few}{last}, {r['pass']} {'×'.join(map(str, r['shape']))}"
        by_row.setdefault(title, {})[r["column"]] = r

    def times(r: dict[str, Any]) -> str:
        gigabytes = f" {r['peak_mb'] / 1024:.1f}" if "peak_mb" in r else ""
        return f"{r['ms']:.2f} ({r.get('kernels_ms', r['host_ms']):.2f}){gigabytes}" if "ms" in r else "failed"

    def errors(r: dict[str, Any]) -> str:
        both = (r.get("logits_error"), r.get("gradients_error"))
        return " ".join("–" if e is None else f"{e:.2e}" for e in both)

    for title, cell in (("ms (kernels' ms) peak GiB", times), ("‖a − b‖/‖b‖ to fp32: logits, gradients", errors)):
        table = Table("model", *columns, title=title)
        for name, cells in by_row.items():
            table.add_row(name, *(cell(cells[c]) if c in cells else "" for c in columns))
        yield table


def main(given: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help=f"comma-separated; further ones: {','.join(FURTHER)}")
    parser.add_argument("--columns", default=",".join(COLUMNS), help=f"comma-separated, of {','.join(COLUMNS)}")
    parser.add_argument("--quick", action="store_true", help="compile no model of many layers whole")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row later than this")
    parser.add_argument("--json", type=Path, help="append a record a line, to this file or in this folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that it runs; nothing is written")
    parser.add_argument("--show", type=Path, help="only the tables of such a file")
    args = parser.parse_args(given)
    console = Console(width=max(200, Console().width))
    if args.show:
        written = [json.loads(line) for line in args.show.read_text().splitlines()]
        console.print(*tables(written))
        return written
    device = torch.device(args.device)
    if args.json and (args.tiny or device.type != "cuda"):
        parser.error("--json: toy sizes and a CPU's times are no results")
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # the fp32 model's convolutions
    began, found = time.perf_counter(), []
    source = origin(device)

    def say(what: str) -> None:
        console.print(f"[{time.perf_counter() - began:6.1f} s] {what}", markup=False, highlight=False, soft_wrap=True)

    if args.json:
        from trinorm.bench.records import results_path

        args.json = results_path(args.json, source["gpu"], source["date"], "models-bf16")
        args.json.parent.mkdir(parents=True, exist_ok=True)
    for row in rows(args.cases.split(","), args.columns.split(","), args.quick, args.tiny, device):
        if time.perf_counter() - began > args.seconds:
            say(f"{row.title}: not begun, the time is up")
            continue
        torch._dynamo.reset()
        try:
            timed = prepare(row, say)
        except Exception as error:  # of a model that cannot be made here
            say(f"{row.title}: {type(error).__name__}: {error}")
            continue
        free(device)
        measure(row, timed, say)
        for record in records(row, source):
            found.append(record)
            if args.json:
                with args.json.open("a") as file:
                    file.write(json.dumps(record) + "\n")
        row.variants.clear()
        del timed
        free(device)
    console.print(*tables(found))
    return found


if __name__ == "__main__":
    main()
