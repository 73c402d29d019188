"""One case over all providers: each is compared with float64 first, and timed afterwards."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch._functorch.config as functorch_config
from torch import Tensor

from ..compare import Comparison, compare
from ..norms import Arguments
from .cases import CHAIN, OPS, Case, Inputs
from .providers import OURS, Norm, Provider
from .records import Provenance, Record
from .timing import Replay, device_time, host_times, sets_past_l2

# A forward's or a chain's y, or a backward's (dx, dw) or (dx, dw, db).
TimedCall = Callable[[], Tensor | tuple[Tensor, ...]]


class Expected(NamedTuple):
    """A call's inputs, and of each result its name, its value in float64, and what torch's own op gives."""

    inputs: Inputs
    results: tuple[tuple[str, Tensor, Tensor], ...]


def measure(
    case: Case, providers: Sequence[Provider], provenance: Provenance, device: torch.device, started: Callable[[str], None]
) -> list[Record]:
    """A record for each provider that has the op; one that fails says why in its record.

    ``started`` hears each name before its turn. A provider that takes weights of one dtype only is measured with those,
    beside a ceiling of its own.
    """
    records: list[Record] = []
    stream = torch.cuda.Stream(device)
    serving = [provider for provider in providers if case.op in provider.ops]
    for served, group in itertools.groupby(serving, key=lambda provider: provider.served(case)):
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
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        # A chain's x are just written, wherever the allocator put them: that is what is to be seen.
        count = 1 if case.pass_ == CHAIN else sets_past_l2(case.bytes, l2_bytes)
        sets = [case.draw(device, generator) for _ in range(count)]
        ceiling = device_time(ceiling_calls(case, sets), stream, case.norms).median
    except Exception as error:  # out of memory, above all: no provider can be measured
        return [replace(blank(provider=provider.name), failure=reason(error)) for provider in providers]
    for provider in providers:
        started(provider.name)
        record = replace(blank(provider=provider.name), ceiling_us=ceiling)
        try:
            record = _measure_one(record, case, provider, expected, sets, stream)
        except Exception as error:  # whatever a provider raises is its row
            record = replace(record, failure=reason(error))
        records.append(record)
    return records


def _measure_one(
    record: Record, case: Case, provider: Provider, expected: Expected, sets: Sequence[Inputs], stream: torch.cuda.Stream
) -> Record:
    if case.pass_ == CHAIN:
        norm = chained(provider.build(case))
        # Norms that overlap do so only where the host is not between them, in a graph: that is what must be right.
        comparisons = compared(_replayed(norm, stream, *expected.inputs.arguments), expected)
    else:
        norm, comparisons, seconds = verify(functools.partial(provider.build, case), expected, stream)
        record = replace(record, first_call_s=seconds)
    ratios = [found.error / found.torch_error for found in comparisons if found.torch_error]
    record = replace(record, ok=all(found.ok for found in comparisons), error_ratio=max(ratios, default=None))
    if provider.name == OURS and not record.ok:
        return replace(record, failure=next(str(found) for found in comparisons if not found.ok))
    for inputs in sets:
        if inputs.dy is not None:
            inputs.dy.normal_()  # a peer may have written into it
    calls = calls_of(norm, sets)
    device = device_time(calls, stream, case.norms)
    return replace(
        record,
        device_us=device.median,
        device_us_mean=device.mean,
        device_us_std=device.std,
        replays=device.replays,
        rotated=len(sets),
        host_us=None if case.pass_ == CHAIN else host_times(calls[:1], stream)[0],
    )


def chained(norm: Norm) -> Norm:
    """Norms one after the other: each has its own row of the weights, and its y is the next one's x."""

    def chain(x: Tensor, *parameters: Tensor) -> Tensor:
        for own in zip(*parameters, strict=True):
            x = norm(x, *own)
        return x

    return chain


def _replayed(norm: Norm, stream: torch.cuda.Stream, *arguments: Tensor) -> Tensor:
    """The norm's result as a replay of its graph computes it."""
    (y,) = Replay([functools.partial(norm, *arguments)], stream).results
    assert isinstance(y, Tensor)
    return y.clone()  # the graph's own memory goes with the graph


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


def ceiling_calls(case: Case, sets: Sequence[Inputs]) -> list[TimedCall]:
    """What moves the same bytes with no arithmetic to speak of.

    torch's copy for a forward, its add for a backward; for a chain, copies of which each copies what the one before wrote.
    """
    if case.pass_ == CHAIN:
        return calls_of(chained(lambda x, *_: x.clone()), sets)
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
    norm = op.norm
    if inputs.dy is None:

        def exact_y(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            return norm.oracle(Arguments(x, weight, bias, op.eps)).y

        def y_by_torch(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            return norm.composite(Arguments(x, weight, bias, op.eps))

        norms: tuple[Norm, Norm] = (exact_y, y_by_torch)
        if case.pass_ == CHAIN:
            norms = chained(exact_y), chained(y_by_torch)
        y, by_torch_y = (function(*inputs.arguments) for function in norms)
        return Expected(inputs, (("y", y, by_torch_y),))
    of = Arguments(inputs.x, inputs.weight, inputs.bias, op.eps)
    exact, by_torch = norm.oracle_gradients(of, inputs.dy), norm.torch_gradients(of, inputs.dy)
    return Expected(
        inputs,
        tuple(
            (name, gradient, torch_gradient.detach())
            for name, gradient, torch_gradient in zip(exact._fields, exact, by_torch, strict=True)
            if gradient is not None and torch_gradient is not None
        ),
    )


class Verified(NamedTuple):
    """A norm, its first call's results compared with float64, and the wall seconds that building and calling it took."""

    norm: Norm
    comparisons: list[Comparison]
    first_call_s: float


def verify(build: Callable[[], Norm], expected: Expected, stream: torch.cuda.Stream) -> Verified:
    """Build a norm and call it once, a backward with its forward. ``stream`` is the current stream."""
    inputs = expected.inputs
    if inputs.dy is not None:
        inputs = inputs._replace(dy=inputs.dy.clone())  # a peer may write into it
    stream.synchronize()
    start = time.perf_counter()
    norm = build()
    (call,) = calls_of(norm, [inputs])
    results = call()
    stream.synchronize()
    seconds = time.perf_counter() - start
    return Verified(norm, compared(results, expected), seconds)


def compared(found: Tensor | tuple[Tensor, ...], expected: Expected) -> list[Comparison]:
    """Each result that was found compared with float64."""
    results = (found,) if isinstance(found, Tensor) else found
    return [
        compare(name, result, exact, by_torch)
        for result, (name, exact, by_torch) in zip(results, expected.results, strict=True)
    ]


def reason(error: Exception) -> str:
    """What a record says of a failure."""
    first_line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first_line}"[:160]
