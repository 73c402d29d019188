"""What a module of an unknown class computes: a norm that trinorm has, or none. Its forward is called on a sample, and what
comes out is compared with the definition in float64; names say nothing.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .compare import compare
from .forms import ChannelForm, Dtypes, Form, GatedForm
from .spec import CASTS, GATE_ACTIVATIONS, LAYER_NORM, ROW_NORMS

# What is tried, of the input and of the parameters.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Epsilons that models have written into their forward.
_EPSILONS = (1e-5, 1e-6, 1e-8, 1e-12, torch.finfo(torch.float32).eps, 0.0)

# Of a row that no parameter tells the length of.
_LENGTH = 64

# How much of a result in 16 bits has the bits of the composite that rounds where the module does. One that rounds elsewhere
# differs in a third of them.
_SAME_BITS = 0.99


class Recognized(torch.nn.Module):
    """What a module of a recognized class is besides: trinorm's where its form holds, else what it was."""

    _trinorm_form: Form

    def forward(self, *tensors: Any, **named: Any) -> Any:
        form = self._trinorm_form
        weight = None if form.weight is None else getattr(self, form.weight)
        bias = None if form.bias is None else getattr(self, form.bias)
        served = not named and len(tensors) == form.tensors and all(isinstance(t, Tensor) for t in tensors)
        if served:
            x = tensors[0]
            served = x.dim() in form.ranks and (x.dtype, None if weight is None else weight.dtype) in form.dtypes
            # What is written out keeps its input's dtype under autocast, where torch's own norm does not.
            served = served and not reference.autocast_to_fp32(form.norm, x.device.type)
        return form((weight, bias), *tensors) if served else super().forward(*tensors, **named)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), f"by {self._trinorm_form}")))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Its class is made here, so that pickle finds it by the one it was made of."""
        return _empty, (original(type(self)),), self.__dict__


def _empty(of: type[torch.nn.Module]) -> torch.nn.Module:
    kind = recognized(of)
    return kind.__new__(kind)


_CLASSES: dict[type[torch.nn.Module], type[torch.nn.Module]] = {}


def recognized(of: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """The class of a recognized module that was of this one."""
    if of not in _CLASSES:
        named = {"__module__": of.__module__, "__qualname__": of.__qualname__}
        _CLASSES[of] = type(of.__name__, (Recognized, of), named)
    return _CLASSES[of]


def original(kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """The class that this one of recognized modules was made of."""
    return kind.__bases__[1]


def recognize(module: torch.nn.Module) -> Form | str:
    """What norm a module computes; or, in words, why it is none."""
    if next(module.children(), None) is not None or next(module.buffers(recurse=False), None) is not None:
        return "it has modules or buffers of its own"
    parameters = [name for name, p in module._parameters.items() if p is not None]
    shapes = {tuple(module._parameters[name].shape) for name in parameters}  # type: ignore[union-attr]
    if len(parameters) > 2 or len(shapes) > 1 or any(len(shape) != 1 for shape in shapes):
        return "its parameters are not a weight, or a weight and a bias, of one dim"
    lengths = [shapes.pop()[0]] if shapes else _lengths(module)
    reason = "what its forward computes is no norm that trinorm has"
    # A parameter without a partner is a weight.
    orders = list(itertools.permutations(parameters)) if len(parameters) > 1 else [(*parameters, None, None)[:2]]
    for n, kind, (weight, bias) in itertools.product(lengths, (GatedForm, Form, ChannelForm), orders):
        try:
            form = _Trial(module, kind, weight, bias, n).form()
        except Exception as error:  # whatever somebody else's forward may raise
            if kind is Form:
                reason = f"on a sample its forward raises {type(error).__name__}: {error}"
        else:
            if form is not None:
                return form
    return reason


def _lengths(module: torch.nn.Module) -> list[int]:
    """Of rows, of a module without parameters: any; or one that it holds, where it takes no others."""
    held = [v for value in vars(module).values() for v in (value if isinstance(value, (list, tuple)) else (value,))]
    return list(dict.fromkeys((_LENGTH, *(v for v in held if type(v) is int and 1 < v < 1 << 16))))


class _Case(NamedTuple):
    """A call. other_mode: whether the module is in training where it is not, or the other way round."""

    dtypes: Dtypes
    rank: int
    other_mode: bool = False


class _Trial:
    """Calls of a module's forward, on rows of n elements, and what they are compared with."""

    def __init__(self, module: torch.nn.Module, kind: type[Form], weight: str | None, bias: str | None, n: int) -> None:
        self._module, self._kind, self._names, self._n = module, kind, (weight, bias), n
        self._found: dict[_Case, Tensor | None] = {}

    def form(self) -> Form | None:
        """The one that holds in most dtypes, of those that hold in fp32, which does not show where a norm rounds."""
        try:
            inspect.signature(type(self._module).forward).bind(self._module, *[None] * self._kind.tensors)
        except TypeError:
            return None
        first, *others = (_Case(self._single, rank) for rank in self._kind.tried)
        found: list[Form] = []
        for form in self._candidates():
            # Of what has been found, only another place to round may be as good.
            same = not found or found[0] == replace(form, norm=form.norm.with_cast(found[0].norm.cast))
            if same and (not found or form.norm.offset == found[0].norm.offset) and self._holds(form, first):
                found.append(form)
        # What drops elements in training, say, is no norm, whatever it is in evaluation.
        if not found or not self._holds(found[0], first._replace(other_mode=True)):
            return None
        ranks = frozenset((first.rank, *(case.rank for case in others if self._holds(found[0], case))))
        return max((form.within(self._dtypes(form), ranks) for form in found), key=lambda form: len(form.dtypes))

    @property
    def _single(self) -> Dtypes:
        return torch.float32, None if self._names[0] is None else torch.float32

    def _candidates(self) -> Iterator[Form]:
        held, n = vars(self._module).values(), self._n
        epsilons = dict.fromkeys((*sorted(v for v in held if isinstance(v, float) and 0 <= v < 0.1), *_EPSILONS))
        if self._kind is ChannelForm:
            yield from (ChannelForm(LAYER_NORM, eps, *self._names) for eps in epsilons)
            return
        sizes = sorted({s for v in held if type(v) is int and 1 < v < n and n % v == 0 for s in (v, n // v)})
        for cast, norm, eps in itertools.product(CASTS, ROW_NORMS, epsilons):
            if cast == "gemma" and self._names[0] is None:
                continue
            given = norm.with_cast(cast), eps, *self._names
            if self._kind is Form and (norm.center or self._names[1] is None):  # rms_norm takes no bias
                yield Form(*given)
            elif self._kind is GatedForm:
                for how in itertools.product(GATE_ACTIVATIONS, (True, False), (None, *sizes)):
                    yield GatedForm(*given, frozenset(), frozenset(), *how)

    def _dtypes(self, form: Form) -> frozenset[Dtypes]:
        every = itertools.product(_DTYPES, (None,) if form.weight is None else _DTYPES)
        return frozenset(dtypes for dtypes in every if self._holds(form, _Case(dtypes, form.tried[0])))

    def _holds(self, form: Form, case: _Case) -> bool:
        """Whether the module's result is no further from float64 than torch's operators are twice; and, in 16 bits, has
        their bits.
        """
        found = self._result(case)
        if found is None:
            return False
        tensors, drawn = self._sample(case)
        weight, bias = self._names
        parameters = None if weight is None else drawn[weight], None if bias is None else drawn[bias]
        by_torch = form.by_torch(parameters, *tensors)
        right = compare("y", found, form.exact(parameters, *tensors), by_torch).ok
        return right and (found.dtype == torch.float32 or (found == by_torch).double().mean().item() >= _SAME_BITS)

    def _result(self, case: _Case) -> Tensor | None:
        """What the forward makes of the sample; None where that is nothing that a norm returns."""
        if case not in self._found:
            tensors, drawn = self._sample(case)
            module = _with(self._module, drawn)
            module.training ^= case.other_mode
            try:
                with torch.no_grad():
                    found = type(module).forward(module, *(t.clone() for t in tensors))
            except Exception:
                if case == _Case(self._single, self._kind.tried[0]):
                    raise
                found = None  # it may go on raising where it is called so
            alike = isinstance(found, Tensor) and found.shape == tensors[0].shape and found.dtype == case.dtypes[0]
            self._found[case] = found if alike else None
        return self._found[case]

    def _sample(self, case: _Case) -> tuple[list[Tensor], dict[str, Tensor]]:
        """(what the forward is given, the parameters by name)."""
        of_x, of_weight = case.dtypes
        *rows, weight, bias = _drawn(self._n, self._kind.tensors)
        parameters = zip(self._names, (weight, bias), strict=True)
        tensors = [self._kind.laid(t.to(of_x), case.rank) for t in rows]
        return tensors, {name: t.to(of_weight) for name, t in parameters if name is not None}


def _with(module: torch.nn.Module, parameters: dict[str, Tensor]) -> torch.nn.Module:
    """The same module with these parameters: a copy, which shares what it is not given."""
    other = copy.copy(module)
    other.__dict__ = dict(module.__dict__)
    other._parameters = {**module._parameters, **{name: torch.nn.Parameter(t) for name, t in parameters.items()}}
    return other


@functools.lru_cache(maxsize=64)
def _drawn(n: int, of: int) -> tuple[Tensor, ...]:
    """(``of`` tensors of rows, two parameters): rows off zero, large ones, of zeros, and so small that an epsilon shows."""
    generator = torch.Generator().manual_seed(0)
    moved = torch.tensor([[0.0], [2.0], [0.5], [0.5], [0.5], [0.5], [0.5], [0.0]])
    scale = torch.tensor([[1.0], [1.0], [100.0], [1e-2], [1e-3], [1e-4], [1e-5], [0.0]])
    x, *others = torch.randn(of, 8, n, generator=generator)
    return (x + moved) * scale, *others, *(torch.rand(2, n, generator=generator) * 2 + 0.5)
