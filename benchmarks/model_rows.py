"""One row of benchmarks/models.py: a model, its columns' steps by turns, and how far each is from the fp32 model."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from model_cases import Arguments, Case, Shape
from model_columns import COLUMNS, LackingError
from torch import Tensor, nn

Say = Callable[[str], None]

# A column is timed until it has had so many steps, and further up to the most while it had less than so many seconds.
STEPS, MOST, SECONDS = 10, 60, 1.0
WARMUPS = 2

Outcome = tuple[Tensor | None, list[Tensor | None]]


@dataclass
class Variant:
    """A column of a row: what is called, and what was found of it."""

    column: str
    model: nn.Module | None = None
    found: dict[str, Any] = field(default_factory=dict)
    failure: str | None = None
    times: list[tuple[float, float]] = field(default_factory=list)


@dataclass
class Row:
    """A case with so many layers, and its columns."""

    case: Case
    tiny: bool
    device: torch.device
    layers: int | None
    columns: list[str]
    variants: list[Variant] = field(default_factory=list)

    @property
    def shape(self) -> Shape:
        return self.case.tiny if self.tiny else self.case.shape

    @property
    def compared(self) -> Shape:
        """Few layers are compared on what is timed, so that what is compiled, for one shape, can be compared too."""
        return self.case.compared if self.case.compared and self.layers is None and not self.tiny else self.shape

    @property
    def title(self) -> str:
        of = f", {self.layers} of {self.case.layers} layers" if self.layers else ""
        last = ", channels last" if self.case.last else ""
        return f"{self.case.title}{of}, {self.case.what}{last}, {'×'.join(map(str, self.shape))}"

    def build(self) -> nn.Module:
        """Vectors (norms' weights, biases) are not the ones and zeros that they start from."""
        torch.manual_seed(0)
        with torch.device(self.device):
            model = self.case.build(self.layers, self.tiny)
            for p in model.parameters():
                if p.dim() == 1:
                    p.data.add_(torch.randn_like(p), alpha=0.1)
        # Models of transformers are bf16 already, but for what they keep in fp32.
        if self.case.autocast:
            model.float()
        elif not hasattr(model, "config"):
            model.bfloat16()
        if self.case.last:
            model.to(memory_format=torch.channels_last)
        return model.train(self.case.loss is not None)

    def inputs(self, model: nn.Module, shape: Shape) -> Arguments:
        torch.manual_seed(1)
        with torch.no_grad():
            given = self.case.inputs(model, shape)
        for name, t in given.items():
            if self.case.last and is_image(t):
                kept = t.detach().contiguous(memory_format=torch.channels_last)
                given[name] = kept.requires_grad_(t.requires_grad)
        return given

    def step(self, model: nn.Module, given: Arguments, autocast: bool | None = None) -> Any:
        """One step; a trained model's gradients are left for the caller."""
        enabled = self.case.autocast if autocast is None else autocast
        with (
            torch.autocast(self.device.type, torch.bfloat16, enabled=enabled),
            torch.set_grad_enabled(bool(self.case.loss)),
        ):
            output = model(**given)
            loss = self.case.loss(output) if self.case.loss else None
        if loss is not None:
            loss.backward()
        return output


def is_image(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4


def drop_gradients(model: nn.Module, given: Arguments) -> None:
    for t in (*model.parameters(), *given.values()):
        if isinstance(t, Tensor):
            t.grad = None


def of_its_own(model: nn.Module) -> nn.Module:
    """Another model with the same parameters, so that a column more costs no memory."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def distance(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> float | None:
    """‖a − b‖/‖b‖ of all tensors together, by pieces, since logits of a long batch are gigabytes."""
    if any((x is None) != (y is None) for x, y in zip(a, b, strict=True)) or all(x is None for x in a):
        return None
    off = of = 0.0
    for x, y in zip(a, b, strict=True):
        if x is None or y is None:
            continue
        for p, q in zip(x.detach().flatten().split(1 << 26), y.detach().flatten().split(1 << 26), strict=True):
            off += (p.double() - q.double()).square().sum().item()
            of += q.double().square().sum().item()
    error = (off / of) ** 0.5
    return error if math.isfinite(error) else None


def outcome(row: Row, model: nn.Module, given: Arguments, fp32: bool = False) -> Outcome:
    """The logits, and the gradients of all parameters (of none in a forward alone)."""
    if row.case.before:
        row.case.before(given)
    output = row.step(model, given, autocast=False if fp32 else None)
    logits = output if isinstance(output, Tensor) else output.logits
    grads = [p.grad for p in model.parameters()] if row.case.loss else []
    drop_gradients(model, given)
    return None if logits is None else logits.detach(), grads


def exact(row: Row, model: nn.Module) -> Outcome:
    """Of the fp32 model with these weights, and these arguments."""
    fp32 = copy.deepcopy(model).float()
    given = row.inputs(fp32 if row.case.before else model, row.compared)  # a cache has its own keys and values
    for name, t in given.items():
        if isinstance(t, Tensor) and t.is_floating_point():
            given[name] = t.float().detach().requires_grad_(t.requires_grad)
    return outcome(row, fp32, given, fp32=True)


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def tried(variant: Variant, what: Callable[[], None]) -> None:
    """What raises has a failure for its times."""
    try:
        what()
    except LackingError:
        variant.failure = "lacking"
    except Exception as error:
        variant.failure = " ".join(f"{type(error).__name__}: {error}".split())[:400]
    if variant.failure:
        variant.model = None
        variant.times = []


def prepare(row: Row, say: Say) -> Arguments:
    """Every column's model, and its distance from the fp32 one. Returns what is timed."""
    model = row.build()
    reference: Outcome | None = None
    try:
        reference = exact(row, model)
    except torch.OutOfMemoryError:
        say(f"{row.title}: no memory for the fp32 model")
    free(row.device)
    timed = row.inputs(model, row.shape)
    for name in row.columns:
        variant = Variant(name)

        def change(variant: Variant = variant) -> None:
            variant.model = COLUMNS[variant.column].change(of_its_own(model))

        def compare(variant: Variant = variant) -> None:
            if (COLUMNS[variant.column].compiled and row.compared != row.shape) or reference is None:
                return
            # By its own keys and values, where a cache holds them.
            given = row.inputs(variant.model if not COLUMNS[variant.column].compiled else model, row.compared)
            logits, grads = outcome(row, variant.model, given)
            variant.found["logits_error"] = distance([logits], [reference[0]])
            variant.found["gradients_error"] = distance(grads, reference[1]) if grads else None

        def first(variant: Variant = variant) -> None:
            if row.case.before:
                row.case.before(timed)
            row.step(variant.model, timed)
            drop_gradients(model, timed)

        start = time.perf_counter()
        for act in (change, compare, first):
            if variant.failure is None:
                tried(variant, act)
                drop_gradients(model, timed)
        free(row.device)
        if variant.failure != "lacking":
            variant.found["first_s"] = round(time.perf_counter() - start, 2)
            say(f"{row.title}: {name} {variant.failure or 'is ready'}")
            row.variants.append(variant)
    return timed


def time_once(row: Row, variant: Variant, given: Arguments) -> None:
    cuda = row.device.type == "cuda"
    if row.case.before:
        row.case.before(given)
    if cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        start.record()
    began = time.perf_counter()
    row.step(variant.model, given)
    host = whole = (time.perf_counter() - began) * 1e3
    if cuda:
        end.record()
        torch.cuda.synchronize()
        whole = start.elapsed_time(end)
        peak = torch.cuda.max_memory_allocated()
        variant.found["peak_mb"] = round(max(peak / 2**20, variant.found.get("peak_mb", 0)), 1)
        variant.found["held_mb"] = round(held / 2**20, 1)
    variant.times.append((whole, host))


def measure(row: Row, given: Arguments, say: Say) -> None:
    """Every column's times, by turns; each round begins with another one."""
    steps, warmups = (1, 0) if row.tiny else (STEPS, WARMUPS)
    live = [variant for variant in row.variants if variant.failure is None]
    for i in range(warmups + MOST):
        for variant in live[i % len(live) :] + live[: i % len(live)] if live else ():
            model = variant.model
            tried(variant, lambda variant=variant: time_once(row, variant, given))
            drop_gradients(model, given)  # another column's parameters too, also where this one raised
        live = [variant for variant in live if variant.failure is None]
        if i + 1 == warmups:
            for variant in live:
                variant.times.clear()
        done = i + 1 - warmups
        if done >= steps and (row.tiny or all(sum(t for t, _ in v.times) > SECONDS * 1e3 for v in live)):
            break
    for variant in live:
        whole, host = zip(*variant.times, strict=True)
        found = dict(ms=round(statistics.median(whole), 3), host_ms=round(statistics.median(host), 3), steps=len(whole))
        variant.found |= found | dict(ms_min=round(min(whole), 3), ms_max=round(max(whole), 3))
        if row.device.type == "cuda":
            with contextlib.suppress(RuntimeError):  # the times stay where the profiler fails
                variant.found["kernels_ms"] = round(kernels(row, variant, given), 3)
    say(f"{row.title}: " + ", ".join(f"{v.column} {v.found.get('ms', v.failure)}" for v in row.variants))


def kernels(row: Row, variant: Variant, given: Arguments) -> float:
    """Milliseconds that a step's kernels take together."""
    if row.case.before:
        row.case.before(given)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        row.step(variant.model, given)
        torch.cuda.synchronize()
    drop_gradients(variant.model, given)
    on_device = torch.autograd.DeviceType.CUDA
    return sum(e.self_device_time_total for e in profile.events() if e.device_type == on_device) / 1e3
