"""PyTorch's own samples, OpInfo's and ModuleInfo's, by both roads: what its test suite calls its norms with, and how.

The databases are internals of torch's, which may change between releases: that they still hold samples is asserted.
"""

from __future__ import annotations

import functools
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from machine import ON_GPU
from paths import SPECS
from trinorm import functional, nn, reference
from trinorm.compare import assert_no_worse
from trinorm.ops import road
from trinorm.spec import RowNorm

# Forward mode runs a script of torch's own.
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]

# To compare with torch's errors: of the 23 of one draw of rms_norm's samples one in 50 found those small by chance.
ENOUGH = 256

# In how many of the draws ours run and not only torch's: the interpreter takes long.
OURS = ENOUGH if ON_GPU else 2

# Those whose arguments are F's. native_layer_norm adds absent weights and biases, and errors.
OPINFOS = {"layer_norm": {"nn.functional.layer_norm", "native_layer_norm"}, "rms_norm": {"nn.functional.rms_norm"}}
MODULES = {"layer_norm": (nn.LayerNorm, torch.nn.LayerNorm), "rms_norm": (nn.RMSNorm, torch.nn.RMSNorm)}


class Problem(NamedTuple):
    """The arguments of a norm, which has no bias where the problem has none."""

    x: Tensor
    shape: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None
    eps: float | None

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.x, self.weight, self.bias) if t is not None and t.requires_grad]


class Road(NamedTuple):
    device: torch.device
    launches: bool


@pytest.fixture(params=SPECS)
def spec(request: pytest.FixtureRequest) -> RowNorm:
    return request.param


@pytest.fixture(params=["kernels", "composite"])
def by(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Road:
    if request.param == "kernels":
        return Road(device, launches=True)
    monkeypatch.setattr(road, "INTERPRETED", False)
    return Road(torch.device("cpu"), launches=False)


@functools.cache
def opinfos(spec: RowNorm) -> list[Any]:
    # Not when the tests are collected: it takes seconds.
    from torch.testing._internal.common_methods_invocations import op_db

    found = [info for info in op_db if info.name in OPINFOS[spec.name]]
    assert {info.name for info in found} == OPINFOS[spec.name]
    return found


@functools.cache
def moduleinfo(spec: RowNorm) -> Any:
    from torch.testing._internal.common_modules import module_db

    (found,) = (info for info in module_db if info.module_cls is MODULES[spec.name][1])
    return found


def bound(spec: RowNorm, sample: Any) -> Problem:
    """A sample's arguments, as F takes them."""
    arguments = inspect.signature(getattr(F, spec.name)).bind(sample.input, *sample.args, **sample.kwargs)
    arguments.apply_defaults()
    given = arguments.arguments
    return Problem(given["input"], given["normalized_shape"], given["weight"], given.get("bias"), given["eps"])


def problems(
    spec: RowNorm, device: torch.device, dtype: torch.dtype, requires_grad: bool, elements: int = 1
) -> list[list[Problem]]:
    """Of each OpInfo the reference inputs, which are its samples where it has no others; drawn until x's are so many."""
    draws: list[list[Problem]] = []
    while sum(problem.x.numel() for draw in draws for problem in draw) < elements:
        draws.append([])
        for info in opinfos(spec):
            if dtype in info.supported_dtypes(device.type):
                samples = list(info.reference_inputs(device, dtype, requires_grad=requires_grad, set_seed=False))
                assert samples
                draws[-1] += (bound(spec, sample) for sample in samples)
        assert draws[-1]
    return draws


def call(module: Any, spec: RowNorm, problem: Problem) -> Tensor:
    x, shape, weight, bias, eps = problem
    return getattr(module, spec.name)(x, shape, weight, *([bias] if spec.center else []), eps=eps)


def with_usable_eps(spec: RowNorm, problem: Problem) -> Problem:
    """torch takes a negative eps, and returns NaN where the root's argument is negative too. Ours refuses it."""
    if problem.eps is None or problem.eps >= 0:
        return problem
    call(F, spec, problem)
    with pytest.raises(ValueError, match="eps"):
        call(functional, spec, problem)
    return problem._replace(eps=-problem.eps)


def results(
    spec: RowNorm, problem: Problem, ours: Callable[[], Tensor] | None, theirs: Callable[[], Tensor]
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """(name, ours, float64's, torch's) of y and every gradient, in units of what each is a sum of.

    Without ours, it is float64's, rounded.
    """
    x, shape, weight, bias, eps = problem
    eps = torch.finfo(road.accumulator_dtype(x)).eps if eps is None else eps
    by_torch = theirs()
    exact_y = reference.oracle(spec, x, shape, weight, bias, eps).y
    y = ours() if ours else exact_y.to(by_torch.dtype)
    if ours:
        assert (y.shape, y.dtype, y.requires_grad) == (by_torch.shape, by_torch.dtype, by_torch.requires_grad)
        assert y.is_contiguous()
    xhat, _, rstd = reference.oracle(spec, x, shape, None, None, eps)
    w, b = (torch.zeros(shape, device=x.device) if t is None else t.detach().double() for t in (weight, bias))
    w = w + 1 if weight is None else w
    yield "y", *in_units_of((xhat * w).abs() + b.abs(), y, exact_y, by_torch)
    leaves = problem.leaves
    if not leaves:
        return
    dy = torch.randn_like(y)
    exact = [g for g in reference.oracle_gradients(spec, x, shape, weight, bias, eps, dy) if g is not None]
    by_torchs = torch.autograd.grad(by_torch, leaves, dy)
    found = torch.autograd.grad(y, leaves, dy) if ours else [g.to(t.dtype) for g, t in zip(exact, by_torchs, strict=True)]
    terms = {"dx": rstd.view(*x.shape[: -len(shape)], *[1] * len(shape)) * w * dy, "dw": dy * xhat, "db": dy}
    given = [name for name, t in zip(terms, (x, weight, bias), strict=True) if t is not None]
    for name, want, got, by_torch in zip(given, exact, found, by_torchs, strict=True):
        assert got.dtype == by_torch.dtype
        yield name, *in_units_of(terms[name], got, want, by_torch)


def in_units_of(terms: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The tensors times the power of two, which rounds nothing, that brings the largest term to 2^13..2^14."""
    _, exponent = torch.frexp(terms.detach().double().abs().max() if terms.numel() else torch.zeros(()))
    unit = 2.0 ** (14 - int(exponent))
    return [(t.detach().double() * unit).to(t.dtype) for t in tensors]


def assert_no_worse_together(found: Iterable[tuple[str, Tensor, Tensor, Tensor]]) -> None:
    """Compare the results of one name as one: of a sample's handful of sums torch's own error is chance."""
    named: defaultdict[str, list[list[Tensor]]] = defaultdict(list)
    for name, *tensors in found:
        named[name].append([t.flatten() for t in tensors])
    for name, each in named.items():
        assert_no_worse(name, *(torch.cat(tensors) for tensors in zip(*each, strict=True)))


@pytest.mark.parametrize("requires_grad", [True, False], ids=["with gradients", "without"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_function(spec: RowNorm, dtype: torch.dtype, requires_grad: bool, by: Road, launched: list[Any]) -> None:
    found: list[tuple[str, Tensor, Tensor, Tensor]] = []
    for i, draw in enumerate(problems(spec, by.device, dtype, requires_grad, elements=ENOUGH)):
        for problem in draw:
            problem = with_usable_eps(spec, problem)
            ours, theirs = (functools.partial(call, module, spec, problem) for module in (functional, F))
            found += results(spec, problem, ours if i < OURS else None, theirs)
    assert_no_worse_together(found)
    assert bool(launched) == by.launches


@pytest.mark.filterwarnings("ignore:trinorm:UserWarning")
def test_derivatives(spec: RowNorm, by: Road, launched: list[Any]) -> None:
    (drawn,) = problems(spec, by.device, torch.float64, requires_grad=True)
    if by.launches and not ON_GPU:  # native_layer_norm's samples with a weight and a bias are layer_norm's
        drawn = list({(*problem.x.shape, *map(type, problem)): problem for problem in drawn}.values())
    for problem in drawn:
        usable = with_usable_eps(spec, problem)

        def norm(*leaves: Tensor, usable=usable) -> Tensor:
            given = iter(leaves)
            x, weight, bias = (None if t is None else next(given) for t in (usable.x, usable.weight, usable.bias))
            return call(functional, spec, usable._replace(x=x, weight=weight, bias=bias))

        torch.autograd.gradcheck(norm, usable.leaves, fast_mode=True, check_forward_ad=True, check_batched_grad=True)
        torch.autograd.gradgradcheck(norm, usable.leaves, fast_mode=True, check_fwd_over_rev=True)
    assert bool(launched) == by.launches


def test_errors(spec: RowNorm, by: Road, launched: list[Any]) -> None:
    errors = [e for info in opinfos(spec) if info.error_inputs_func for e in info.error_inputs(by.device)]
    assert errors
    for error in errors:
        problem = bound(spec, error.sample_input)
        with pytest.raises(error.error_type, match=error.error_regex) as theirs:
            call(F, spec, problem)
        with pytest.raises(theirs.type, match=rf"^{spec.name}\(\): "):
            call(functional, spec, problem)
    assert not launched


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_module(spec: RowNorm, dtype: torch.dtype, by: Road, launched: list[Any]) -> None:
    info, (ours, theirs) = moduleinfo(spec), MODULES[spec.name]
    samples = info.module_inputs_func(info, device=by.device, dtype=dtype, requires_grad=True, training=True)
    assert samples
    found: list[tuple[str, Tensor, Tensor, Tensor]] = []
    for sample in samples:
        module = ours(*sample.constructor_input.args, **sample.constructor_input.kwargs, device=by.device, dtype=dtype)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
        (x,) = sample.forward_input.args
        problem = Problem(x, module.normalized_shape, module.weight, getattr(module, "bias", None), module.eps)
        found += results(spec, problem, functools.partial(module, x), functools.partial(theirs.forward, module, x))
    assert_no_worse_together(found)
    assert bool(launched) == by.launches


def test_modules_have_no_error_inputs(spec: RowNorm) -> None:
    """Else they belong here too."""
    assert moduleinfo(spec).module_error_inputs_func is None
