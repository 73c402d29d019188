"""Host time of eager calls, of functions and modules alike: without grad, with it, and together with the backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .. import nn
from ..compare import Comparison
from ..norms import Results, as_tuple
from .cases import HOST_PASSES, OPS, Case, Inputs
from .measure import compared, expect, reason
from .providers import OURS, Provider
from .records import Provenance, Record
from .timing import host_times

# Providers that have modules too, which are measured as <provider>.nn.
_MODULES = {OURS: nn, "torch": torch.nn}


class _Eager(NamedTuple):
    """A call as a user writes it, and what its result is differentiated by, and from."""

    forward: Callable[[], Results]
    leaves: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]

    def forward_and_backward(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(), self.leaves, self.gradients)


def measure_host(
    case: Case,
    providers: Sequence[Provider],
    provenance: Provenance,
    device: torch.device,
    stream: torch.cuda.Stream,
    started: Callable[[str], None],
) -> list[Record]:
    """A record for each pass of HOST_PASSES of each function and module; one that is wrong or raises is not timed.

    ``case`` is a backward. ``stream`` is the current stream. ``started`` hears each pass before its turn.
    """
    records: dict[str, Record] = {}
    right: dict[str, _Eager] = {}
    for provider in providers:
        if case.op not in provider.ops:
            continue
        served = provider.served(case)
        inputs = served.draw(device, torch.Generator(device).manual_seed(0))
        for name, build in _subjects(provider, served, inputs):
            record = Record.of(served, name, provenance)
            try:
                eager = build()
                wrong = [str(comparison) for comparison in _verify(eager, served, inputs) if not comparison.ok]
            except Exception as error:  # whatever a provider raises is its row
                records[name] = replace(record, failure=reason(error))
                continue
            records[name] = replace(record, ok=not wrong, failure=wrong[0] if wrong else None)
            if not wrong:
                right[name] = eager
    found = []
    for pass_ in HOST_PASSES:
        started(pass_)
        together = pass_ == "host_forward_and_backward"
        with torch.set_grad_enabled(pass_ != "host_forward"):
            calls = [eager.forward_and_backward if together else eager.forward for eager in right.values()]
            times = dict(zip(right, host_times(calls, stream), strict=True))
        found += [replace(record, pass_=pass_, host_us=times.get(name)) for name, record in records.items()]
    return found


def _subjects(provider: Provider, case: Case, inputs: Inputs) -> Iterator[tuple[str, Callable[[], _Eager]]]:
    """The provider's function, and its module if it has one."""
    given = inputs.arguments
    yield provider.name, lambda: _Eager(functools.partial(provider.build(case), *given), inputs.leaves, inputs.gradients)
    if provider.name in _MODULES:
        yield f"{provider.name}.nn", functools.partial(_module, _MODULES[provider.name], case, inputs)


def _module(namespace: ModuleType, case: Case, inputs: Inputs) -> _Eager:
    """The module of a namespace like torch.nn, with the parameters given."""
    op = OPS[case.op]
    module = op.norm.module(namespace, inputs.x, op.eps)
    if module is None:
        raise NotImplementedError(f"{namespace.__name__} has no module for {case.op}")
    names = [name for name, _ in module.named_parameters()]
    # A modulated norm's scale and shift are no parameters: they are given.
    for name, parameter in zip(names, inputs.parameters if names else (), strict=True):
        setattr(module, name, torch.nn.Parameter(parameter.detach()))
    tensors = inputs.leaves[: len(inputs.leaves) - len(names)]
    given = *tensors, *(inputs.angles or ())
    return _Eager(functools.partial(module, *given), (*tensors, *module.parameters()), inputs.gradients)


def _verify(eager: _Eager, case: Case, inputs: Inputs) -> list[Comparison]:
    """The results and every gradient compared with float64."""
    results = tuple(result.detach() for result in as_tuple(eager.forward()))
    found = compared(results, expect(replace(case, pass_="forward"), inputs.of_forward()))
    expected = expect(case, inputs)
    eager = eager._replace(gradients=inputs.for_a_peer().gradients)
    return found + compared(eager.forward_and_backward(), expected)
