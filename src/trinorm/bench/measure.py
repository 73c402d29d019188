"""One case over all providers: each is compared with float64 first, and timed afterwards."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch._functorch.config as functorch_config
from torch import Tensor

from .. import reference
from ..compare import Comparison, compare
from .cases import OPS, Case, Inputs
from .providers import OURS, Norm, Provider
from .records import Provenance, Record
from .timing import device_time, host_time, sets_past_l2

# A forward's y, or a backward's (dx, dw) or (dx, dw, db).
TimedCall = Callable[[], Tensor | tuple[Tensor, ...]]


class Expected(NamedTuple):
    """A call's inputs, and of each result its name, its value in float64, and what torch's own op gives."""

    inputs: Inputs
    results: tuple[tuple[str, Tensor, Tensor], ...]


def measure(
    case: Case, providers: Sequence[Provider], provenance: Provenance, device: torch.device, started: Callable[[str], None]
) -> list[Record]:
    """A record for each provider; one that fails says why in its record. ``started`` hears each name before its turn.

    A provider that takes weights of one dtype only is measured with those, beside a ceiling of its own.
    """
    records: list[Record] = []
    stream = torch.cuda.Stream(device)
    for served, group in itertools.groupby(providers, key=lambda provider: provider.served(case)):
        with (
            torch.cuda.stream(stream),
            torch.set_grad_enabled(case.backward),
            # One graph's backward runs many times here, which a backward from torch.compile's cache may refuse.
            functorch_config.patch(enable_autograd_cache=False),
        ):
            records += _measure(served, list(group), provenance, device, stream, started)
    return records


def _measure(
    case: Case,
    providers: Sequence[Provider],
    provenance: Provenance,
    device: torch.device,
    stream: torch.cuda.Stream,
    started: Callable[[str], None],
) -> list[Record]:
    blank = functools.partial(Record.of, case, provenance=provenance)
    records: list[Record] = []
    try:
        generator = torch.Generator(device).manual_seed(0)
        expected = expect(case, case.draw(device, generator))
        count = sets_past_l2(case.bytes, torch.cuda.get_device_properties(device).L2_cache_size)
        sets = [case.draw(device, generator) for _ in range(count)]
        ceiling = device_time(ceiling_calls(sets), stream).median
    except Exception as error:  # out of memory, above all: no provider can be measured
        return [replace(blank(provider=provider.name), failure=_reason(error)) for provider in providers]
    for provider in providers:
        started(provider.name)
        record = replace(blank(provider=provider.name), ceiling_us=ceiling)
        try:
            record = _measure_one(record, case, provider, expected, sets, stream)
        except Exception as error:  # whatever a provider raises is its row
            record = replace(record, failure=_reason(error))
        records.append(record)
    return records


def _measure_one(
    record: Record, case: Case, provider: Provider, expected: Expected, sets: Sequence[Inputs], stream: torch.cuda.Stream
) -> Record:
    norm = provider.build(case)
    comparisons = verify(norm, expected)
    ratios = [found.error / found.torch_error for found in comparisons if found.torch_error]
    record = replace(record, ok=all(found.ok for found in comparisons), error_ratio=max(ratios, default=None))
    if provider.name == OURS and not record.ok:
        return replace(record, failure=next(str(found) for found in comparisons if not found.ok))
    for inputs in sets:
        if inputs.dy is not None:
            inputs.dy.normal_()  # a peer may have written into it
    calls = calls_of(norm, sets)
    device = device_time(calls, stream)
    return replace(
        record,
        device_us=device.median,
        device_us_mean=device.mean,
        device_us_std=device.std,
        replays=device.replays,
        rotated=len(sets),
        host_us=host_time(calls[0], stream),
    )


def calls_of(norm: Norm, sets: Sequence[Inputs]) -> list[TimedCall]:
    """The timed calls, one for each set: the forward, or the backward alone of a forward done here."""
    calls: list[TimedCall] = []
    for inputs in sets:
        forward = functools.partial(norm, *inputs.arguments)
        if inputs.dy is None:
            calls.append(forward)
        else:
            calls.append(functools.partial(torch.autograd.grad, forward(), inputs.arguments, inputs.dy, retain_graph=True))
    return calls


def ceiling_calls(sets: Sequence[Inputs]) -> list[TimedCall]:
    """What moves the same bytes with no arithmetic to speak of: torch's copy for a forward, its add for a backward."""
    calls: list[TimedCall] = []
    for inputs in sets:
        x, out = inputs.x.detach(), torch.empty_like(inputs.x)
        if inputs.dy is None:
            calls.append(functools.partial(out.copy_, x))
        else:
            calls.append(functools.partial(torch.add, x, inputs.dy, out=out))
    return calls


def expect(case: Case, inputs: Inputs) -> Expected:
    """What a case's results should be."""
    op = OPS[case.op]
    call = op.spec, inputs.x, (case.n,), inputs.weight, inputs.bias, op.eps
    if inputs.dy is None:
        return Expected(inputs, (("y", reference.oracle(*call).y, reference.composite(*call)),))
    exact = reference.oracle_gradients(*call, inputs.dy)
    by_torch = reference.torch_gradients(*call, inputs.dy)
    return Expected(
        inputs,
        tuple(
            (name, gradient, torch_gradient.detach())
            for name, gradient, torch_gradient in zip(exact._fields, exact, by_torch, strict=True)
            if gradient is not None and torch_gradient is not None
        ),
    )


def verify(norm: Norm, expected: Expected) -> list[Comparison]:
    """Each result of one call compared with float64."""
    inputs = expected.inputs
    if inputs.dy is not None:
        inputs = inputs._replace(dy=inputs.dy.clone())  # a peer may write into it
    found = calls_of(norm, [inputs])[0]()
    results = (found,) if isinstance(found, Tensor) else found
    return [
        compare(name, result, exact, by_torch)
        for result, (name, exact, by_torch) in zip(results, expected.results, strict=True)
    ]


def _reason(error: Exception) -> str:
    first_line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first_line}"[:160]
