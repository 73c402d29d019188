"""What a module of an unknown class computes: a norm that trinorm has, or none. Its forward is called on a sample, and what
comes out, and its gradients, are compared with the definition in float64.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..compare import compare
from ..held import parameter
from ..spec import CASTS, GATE_ACTIVATIONS, LAYER_NORM, ROW_NORMS
from .forms import ChannelForm, Dtypes, Form, GatedForm, Parameters
from .made import MARK, Made

# What is tried, of the input and of the parameters.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Epsilons that models have written into their forward.
_EPSILONS = (1e-5, 1e-6, 1e-8, 1e-12, torch.finfo(torch.float32).eps, 0.0)

# Of rows that no parameter tells the length of: what holds for both holds for any.
_LENGTHS = (64, 96)

# How much of a result in 16 bits has the bits of the composite that rounds where the module does. One that rounds elsewhere
# differs in a third of them.
_SAME_BITS = 0.99

# How far a row's gradient may be off in fp32, of itself: that of another function is off by far more.
_NEAR = 1e-3

# What every module has, and what may be set on one without its forward being another: modes, hooks, torch.compile's marks.
_OF_EVERY_MODULE = frozenset(vars(torch.nn.Module())) | {"_is_torch_compile", "_compiled_call_impl"}

# Where the form is kept.
FORM = "_trinorm_form"


class Recognized(Made):
    """What a module of a recognized class is besides: trinorm's where its form holds, else what it was (``recognized``)."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Whoever sets an attribute may have set its epsilon, so that its form may not hold any more."""
        super().__setattr__(name, value)
        # DataParallel's copies are given all attributes at once, and then the parameters as such.
        if name == "__dict__" or "_is_replica" in vars(self):
            return
        if name not in _OF_EVERY_MODULE and name not in (FORM, MARK) and name not in self._parameters:
            vars(self).pop(FORM, None)

    def extra_repr(self) -> str:
        form = vars(self).get(FORM)
        return ", ".join(filter(None, (super().extra_repr(), form and f"by {form}")))


_CLASSES: dict[type[torch.nn.Module], type[torch.nn.Module]] = {}


def recognized(of: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """The class of a recognized module that was of this one."""
    if of not in _CLASSES:
        was = of.forward

        @functools.wraps(was)
        def forward(self: torch.nn.Module, *tensors: Any, **named: Any) -> Any:
            form = vars(self).get(FORM)
            if form is None or named or of.forward is not was:
                return of.forward(self, *tensors, **named)
            y = form.served((parameter(self, form.weight), parameter(self, form.bias)), *tensors)
            return of.forward(self, *tensors) if y is None else y

        _CLASSES[of] = extended(of, recognized, forward)
    return _CLASSES[of]


def extended(
    of: type[torch.nn.Module], made_by: Callable[..., type[torch.nn.Module]], forward: Callable[..., Any]
) -> type[torch.nn.Module]:
    """A class like this one, with another forward as long as its own is what it is now."""
    named: dict[str, Any] = {"__module__": of.__module__, "__qualname__": of.__qualname__, "forward": forward}
    named.update(made_by=(made_by, (of,)), was=staticmethod(of.forward))
    return type(of.__name__, (Recognized, of), named)


def form_in_force(module: torch.nn.Module) -> Form | None:
    """The form that a call of a module may have; None of one that is not recognized, or that has got another forward."""
    if not isinstance(module, Recognized) or "forward" in vars(module):
        return None
    kind = type(module)
    if "was" not in vars(kind):  # another class was made of it since, by torch.nn.utils.parametrize, say
        return None
    return vars(module).get(FORM) if kind.__bases__[1].forward is kind.was else None  # type: ignore[attr-defined]


def recognize(module: torch.nn.Module) -> Form | str:
    """What norm a module computes; or, in words, why it is none."""
    if next(module.children(), None) is not None or next(module.buffers(recurse=False), None) is not None:
        return "it has modules or buffers of its own"
    own = (value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE)
    if any(isinstance(value, (Tensor, list, dict, set)) for value in own):
        return "it has tensors or containers of its own, which its forward may change"
    parameters = [name for name, p in module._parameters.items() if p is not None]
    shapes = {tuple(module._parameters[name].shape) for name in parameters}  # type: ignore[union-attr]
    if len(parameters) > 2 or len(shapes) > 1 or any(len(shape) != 1 for shape in shapes):
        return "its parameters are not a weight, or a weight and a bias, of one dim"
    with undisturbed():
        return _recognized(module, parameters, shapes.pop()[0] if shapes else None)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Away from what the caller has on: modes, autocast, inference mode, anomaly detection, which raises where a sample's
    gradient is NaN, a default device, the state of random numbers.
    """
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        _disable_current_modes(),
        torch._C.DisableTorchFunction(),
        torch.autocast("cpu", enabled=False),
        torch.autograd.set_detect_anomaly(False),
        torch.random.fork_rng(devices=()),
    ):
        yield


def _recognized(module: torch.nn.Module, parameters: list[str], n: int | None) -> Form | str:
    reason = "what its forward computes is no norm that trinorm has"
    # A parameter without a partner is a weight.
    orders = list(itertools.permutations(parameters)) if len(parameters) > 1 else [(*parameters, None, None)[:2]]
    lengths = _lengths(module) if n is None else [n]
    for length, kind, (weight, bias) in itertools.product(lengths, (GatedForm, Form, ChannelForm), orders):
        try:
            form = _Trial(module, kind, weight, bias, length).form()
            if form is not None and n is None and length == _LENGTHS[0]:
                other = _Trial(module, kind, weight, bias, _LENGTHS[1]).form()
                form = replace(form, length=None) if other == replace(form, length=_LENGTHS[1]) else None
        except Exception as error:  # whatever somebody else's forward may raise
            if kind is Form:
                reason = f"on a sample its forward raises {type(error).__name__}: {error}"
        else:
            if form is not None:
                return form
    return reason


def _lengths(module: torch.nn.Module) -> list[int]:
    """Of rows, of a module without parameters: any; or one that it holds, where it takes no others."""
    held = [v for value in vars(module).values() for v in (value if isinstance(value, tuple) else (value,))]
    return list(dict.fromkeys((_LENGTHS[0], *(v for v in held if type(v) is int and 1 < v < 1 << 16))))


class _Case(NamedTuple):
    """A call. other_mode: whether the module is in training where it is not, or the other way round. swapped: whether two
    dims lie in another order in memory.
    """

    dtypes: Dtypes
    rank: int
    other_mode: bool = False
    swapped: bool = False


class _Trial:
    """Calls of a module's forward, on rows of n elements, and what they are compared with."""

    def __init__(self, module: torch.nn.Module, kind: type[Form], weight: str | None, bias: str | None, n: int) -> None:
        self._module, self._kind, self._names, self._n = module, kind, (weight, bias), n
        self._found: dict[_Case, tuple[Tensor, tuple[Tensor | None, ...]] | None] = {}

    def form(self) -> Form | None:
        """The one that holds in most dtypes, of those that hold in fp32, which does not show where a norm rounds."""
        try:
            inspect.signature(type(self._module).forward).bind(self._module, *[None] * self._kind.tensors)
        except TypeError:
            return None
        single = torch.float32, None if self._names[0] is None else torch.float32
        first, *others = (_Case(single, rank) for rank in self._kind.tried)
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
        ordered = self._kind is Form and self._orders(first._replace(rank=4))
        known: dict[str, Any] = dict(ranks=ranks, length=self._n, ordered=ordered)
        of_each = (replace(form, dtypes=self._dtypes(form), **known) for form in found)
        return max(of_each, key=lambda form: len(form.dtypes))

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
                for activation, before, size in itertools.product(GATE_ACTIVATIONS, (True, False), (None, *sizes)):
                    yield GatedForm(*given, activation=activation, before_gate=before, group_size=size)

    def _dtypes(self, form: Form) -> frozenset[Dtypes]:
        every = itertools.product(_DTYPES, (None,) if form.weight is None else _DTYPES)
        return frozenset(dtypes for dtypes in every if self._holds(form, _Case(dtypes, form.tried[0])))

    def _holds(self, form: Form, case: _Case) -> bool:
        """Whether the module's result is no further from float64 than torch's operators are twice, and, in 16 bits, has
        their bits; and its gradients, where all is fp32, are theirs.
        """
        result = self._result(case)
        if result is None:
            return False
        found, gradients = result
        tensors, parameters = self._sample(case)
        leaves = [t.detach().requires_grad_() for t in (*tensors, *(p for p in parameters if p is not None))]
        given = iter(leaves[len(tensors) :])
        pair: Parameters = None if parameters[0] is None else next(given), None if parameters[1] is None else next(given)
        by_torch = form.by_torch(pair, *leaves[: len(tensors)])
        if not torch.allclose(found, by_torch, rtol=0.05, atol=0.05, equal_nan=True):
            return False  # by far the most, at once
        exact = form.exact(parameters, *tensors)
        if not compare("y", found, exact, by_torch.detach()).ok:
            return False
        if found.dtype != torch.float32:
            return ((found == by_torch) | found.isnan()).double().mean().item() >= _SAME_BITS
        if not gradients:
            return True
        wanted = torch.autograd.grad(by_torch, leaves, _cotangent(found))
        return all(g is not None and _is_near(g, want) for g, want in zip(gradients, wanted, strict=True))

    def _orders(self, case: _Case) -> bool:
        """Whether a result has its input's order of memory, and the bits that it has in another."""
        plain, swapped = self._result(case), self._result(case._replace(swapped=True))
        if plain is None or swapped is None:
            return False
        alike = plain[0].transpose(1, 2)
        return swapped[0].stride() == alike.stride() and bool(torch.equal(swapped[0].nan_to_num(), alike.nan_to_num()))

    def _result(self, case: _Case) -> tuple[Tensor, tuple[Tensor | None, ...]] | None:
        """What the forward makes of the sample, and, where all is fp32, its gradients; None where that is nothing that a
        norm returns, or where it does something besides.
        """
        if case not in self._found:
            try:
                self._found[case] = self._called(case)
            except Exception:
                if case.rank == self._kind.tried[0] and set(case.dtypes) <= {torch.float32, None} and not case.other_mode:
                    raise
                self._found[case] = None  # it may go on raising where it is called so
        return self._found[case]

    def _called(self, case: _Case) -> tuple[Tensor, tuple[Tensor | None, ...]] | None:
        tensors, parameters = self._sample(case)
        leaves = [t.clone().requires_grad_() for t in (*tensors, *(p for p in parameters if p is not None))]
        named = [name for name in self._names if name is not None]
        module = copy.copy(self._module)
        module.__dict__ = dict(self._module.__dict__)
        own = dict(zip(named, map(torch.nn.Parameter, leaves[len(tensors) :]), strict=True))
        module._parameters = {**module._parameters, **own}
        module.training ^= case.other_mode
        before, state = dict(vars(module)), torch.get_rng_state()
        inputs = [t + 0 for t in leaves[: len(tensors)]]  # no leaves, so that one may be written to
        found = type(module).forward(module, *inputs)
        alike = isinstance(found, Tensor) and found.shape == tensors[0].shape and found.dtype == case.dtypes[0]
        # What a forward leaves behind is more than a norm: numbers drawn, attributes, its input changed.
        touched = not torch.equal(state, torch.get_rng_state()) or vars(module).keys() != before.keys()
        touched = touched or any(vars(module)[name] is not value for name, value in before.items())
        touched = touched or any(t._version != 0 for t in inputs)
        if (
            not alike
            or touched
            or any(found.untyped_storage().data_ptr() == t.untyped_storage().data_ptr() for t in inputs)
        ):
            return None
        gradients: tuple[Tensor | None, ...] = ()
        if found.dtype == torch.float32 and set(case.dtypes) <= {torch.float32, None}:
            if not found.requires_grad:
                return None
            of = [*leaves[: len(tensors)], *own.values()]
            gradients = torch.autograd.grad(found, of, _cotangent(found), allow_unused=True)
        return found.detach(), gradients

    def _sample(self, case: _Case) -> tuple[list[Tensor], Parameters]:
        """(what the forward is given, its weight and bias)."""
        of_x, of_weight = case.dtypes
        *rows, weight, bias = _drawn(self._n, self._kind.tensors)
        first, second = self._names
        tensors = [self._kind.laid(t.to(of_x), case.rank) for t in rows]
        if case.swapped:
            tensors = [t.transpose(1, 2) for t in tensors]
        return tensors, (None if first is None else weight.to(of_weight), None if second is None else bias.to(of_weight))


def _cotangent(y: Tensor) -> Tensor:
    """Of no row that is not finite."""
    return torch.where(y.isfinite(), torch.linspace(-1, 1, y.numel()).view(y.shape), 0.0)


def _is_near(got: Tensor, want: Tensor) -> bool:
    """By rows, whose gradients differ in size by far; of a parameter, by all."""
    got, want = (t.flatten(0, -2) if t.dim() > 1 else t[None] for t in (got, want))
    finite = want.isfinite().all(-1)
    distance, size = (t[finite].double().norm(dim=-1) for t in (got - want, want))
    return bool((distance <= _NEAR * size + 1e-6).all())


# How a row is moved from 0, and how large it is: none, far, large, and so small that an epsilon shows; the last are zeros.
_MOVED = (0.0, 2.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
_SCALE = (1.0, 1.0, 100.0, 1e4, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-12, 3.0, 1.0, 1.0, 1.0, 1.0, 0.0)


@functools.lru_cache(maxsize=64)
def _drawn(n: int, of: int) -> tuple[Tensor, ...]:
    """(``of`` tensors of 16 rows, two parameters of both signs)."""
    generator = torch.Generator("cpu").manual_seed(0)
    how: dict[str, Any] = dict(generator=generator, dtype=torch.float32, device="cpu")
    x, *others = torch.randn(of, 16, n, **how)
    moved, scale = (torch.tensor(t, dtype=torch.float32, device="cpu")[:, None] for t in (_MOVED, _SCALE))
    x = (x + moved) * scale
    x[13] = 0
    x[13, n // 2] = 40.0  # one element alone, which is normalized to √n
    x[14, n // 3] = float("nan")
    parameters = torch.randn(2, n, **how) * 1.5
    parameters[:, n // 4] = 0
    return x, *others, *parameters
