"""One case over all providers: each is compared with float64 first, and timed afterwards."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch._functorch.config as functorch_config
from torch import Tensor

from ..compare import Comparison, compare
from ..functional.quantized import Quantized
from ..norms import Arguments, Results, as_tuple
from .cases import CHAIN, OPS, Case, Inputs, Op
from .providers import OURS, Norm, Provider
from .records import Provenance, Record
from .timing import Replay, device_time, host_times, sets_past_l2

# A forward's or a chain's results, or a backward's gradients: of each argument, in their order.
TimedCall = Callable[[], Results]


class Expected(NamedTuple):
    """A call's inputs, and of each result its name, its value in float64, and what torch's own op gives. terms: as
    ``compare`` takes them, by the name.
    """

    inputs: Inputs
    results: tuple[tuple[str, Tensor, Tensor], ...]
    terms: Mapping[str, Tensor] = MappingProxyType({})


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
        norm = _chain(case, provider.build(case))
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
        for gradient in inputs.gradients:
            gradient.normal_()  # a peer may have written into it
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


def chained(norm: Norm, handed_on: int = 1) -> Norm:
    """Norms one after the other: each has its own row of the weights, and its y is the next one's x. handed_on: 2 where its
    sum, too, is the next one's residual.
    """

    def chain(*arguments: Tensor) -> Results:
        handed, parameters = arguments[:handed_on], arguments[handed_on:]
        for own in zip(*parameters, strict=True):
            handed = as_tuple(norm(*handed, *own))
        return handed if handed_on > 1 else handed[0]

    return chain


def _chain(case: Case, norm: Norm) -> Norm:
    """All the results go on."""
    return chained(norm, len(OPS[case.op].norm.results))


def _replayed(norm: Norm, stream: torch.cuda.Stream, *arguments: Tensor) -> tuple[Tensor, ...]:
    """The norm's results as a replay of its graph computes them."""
    (results,) = Replay([functools.partial(norm, *arguments)], stream).results
    # The graph's own memory goes with the graph.
    return tuple(result.clone() for result in as_tuple(results))  # type: ignore[arg-type]


def calls_of(norm: Norm, sets: Sequence[Inputs]) -> list[TimedCall]:
    """The timed calls, one for each set: the forward, or the backward alone of a forward done here."""
    calls: list[TimedCall] = []
    for inputs in sets:
        forward = functools.partial(norm, *inputs.arguments)
        if not inputs.gradients:
            calls.append(forward)
        else:
            how = forward(), inputs.leaves, inputs.gradients
            calls.append(functools.partial(torch.autograd.grad, *how, retain_graph=True))
    return calls


def ceiling_calls(case: Case, sets: Sequence[Inputs]) -> list[TimedCall]:
    """What moves the same bytes with no arithmetic to speak of, as Op.ceilings names it.

    For a chain, copies of which each copies what the one before wrote.
    """
    if case.pass_ == CHAIN:
        copies = chained(lambda x, *_: x.clone())
        return [functools.partial(copies, _all_read(inputs), inputs.weight) for inputs in sets]
    return [ceiling_call(case, inputs) for inputs in sets]


def ceiling_call(
    case: Case, inputs: Inputs, copy: Callable[[Tensor, Tensor], Tensor] = lambda x, out: out.copy_(x)
) -> TimedCall:
    """The same of one call. copy: of x into out."""
    if case.bytes_stored:
        half = inputs.x.new_zeros(-(-case.bytes_of_ceiling // (2 * inputs.x.itemsize)))
        return functools.partial(copy, half, torch.empty_like(half))
    gradients = inputs.whole_gradients
    if inputs.gate is not None and inputs.residual is not None and gradients:
        three = torch.stack((inputs.whole, *gradients))
        return functools.partial(copy, three, torch.empty_like(three))
    if inputs.gate is not None and inputs.residual is None and not gradients:
        x, gate = inputs.whole.contiguous(), inputs.gate.detach().contiguous()
        return functools.partial(torch.add, x, gate, out=torch.empty_like(x))
    if inputs.gate is not None and inputs.residual is None:
        of_both = torch.cat([t.detach().flatten() for t in (inputs.whole, inputs.gate, gradients[0].flatten()[::2])])
        return functools.partial(copy, of_both, torch.empty_like(of_both))
    x = inputs.whole if gradients else _all_read(inputs)
    out = torch.empty_like(x)
    if not gradients:
        return functools.partial(copy, x, out)
    return functools.partial(torch.add if len(gradients) == 1 else torch.addcmul, x, *gradients, out=out)


def _all_read(inputs: Inputs) -> Tensor:
    """What a forward reads, but for the parameters, and for cos and sin: x, or x and the residual as one tensor."""
    x = inputs.whole
    return x if inputs.residual is None else torch.stack([x, inputs.residual.detach()])


def expect(case: Case, inputs: Inputs) -> Expected:
    """What a case's results should be."""
    op = OPS[case.op]
    norm, of = op.norm, inputs.of(op.eps)
    if inputs.gradients:
        gradients = inputs.whole_gradients
        both = norm.oracle_gradients(of, *gradients), norm.torch_gradients(of, *gradients)
        named = {name: tuple(getattr(found, name).detach() for found in both) for name in of.differentiable}
        sizes = {name: size for name in named if (size := norm.terms(of, name, gradients[0])) is not None}
        return Expected(inputs, tuple(_reported(op, of, named)), _terms(op, of, sizes))

    def exact(*arguments: Tensor) -> Results:
        return norm.oracle_results(of.with_these(*arguments))

    def by_torch(*arguments: Tensor) -> Results:
        return norm.composite(of.with_these(*arguments))

    functions = [exact, by_torch] if case.pass_ != CHAIN else [_chain(case, exact), _chain(case, by_torch)]
    found = (as_tuple(function(*of.differentiable.values())) for function in functions)
    of_y = norm.terms(of, "y", of.x)
    named = dict(zip(norm.results, zip(*found, strict=True), strict=True))
    return Expected(inputs, tuple(_reported(op, of, named)), _terms(op, of, {} if of_y is None else dict(y=of_y)))


def _reported(op: Op, of: Arguments, found: dict[str, tuple[Tensor, ...]]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What was found, in float64 and by torch, as a caller of the function has it."""
    for what, both in found.items():
        exact, by_torch = (op.norm.parts(of, what, t) for t in both)
        yield from ((name, exact[name], by_torch[name]) for name in exact)


def _terms(op: Op, of: Arguments, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same of the terms' sizes."""
    return {name: size for what, t in found.items() for name, size in op.norm.parts(of, what, t).items()}


class Verified(NamedTuple):
    """A norm, its first call's results compared with float64, and the wall seconds that building and calling it took."""

    norm: Norm
    comparisons: list[Comparison]
    first_call_s: float


def verify(build: Callable[[], Norm], expected: Expected, stream: torch.cuda.Stream) -> Verified:
    """Build a norm and call it once, a backward with its forward. ``stream`` is the current stream."""
    inputs = expected.inputs.for_a_peer()
    stream.synchronize()
    start = time.perf_counter()
    norm = build()
    (call,) = calls_of(norm, [inputs])
    results = call()
    stream.synchronize()
    seconds = time.perf_counter() - start
    return Verified(norm, compared(results, expected), seconds)


def compared(found: Results, expected: Expected) -> list[Comparison]:
    """Each result that was found compared with float64; of a quantized one, what it stands for."""
    found = found.dequantize(expected.inputs.x.dtype) if isinstance(found, Quantized) else found
    return [
        compare(name, result, exact, by_torch, expected.terms.get(name))
        for result, (name, exact, by_torch) in zip(as_tuple(found), expected.results, strict=True)
    ]


def reason(error: Exception) -> str:
    """What a record says of a failure."""
    first_line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first_line}"[:160]
