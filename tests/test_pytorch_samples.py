"""PyTorch's own samples, OpInfo's and ModuleInfo's, by both roads: what its test suite calls its norms with, and how.

The databases are internals of torch's, which may change between releases: that they still hold samples is asserted.
"""

from __future__ import annotations

import functools
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from machine import ON_GPU
from trinorm import functional, nn, reference
from trinorm.compare import assert_no_worse
from trinorm.norms import OfChannels
from trinorm.ops import road
from trinorm.reference import channel as channel_reference
from trinorm.spec import (
    BATCH_NORM,
    CHANNEL_NORMS,
    GROUP_NORM,
    INSTANCE_NORM,
    LAYER_NORM,
    RMS_NORM,
    ROW_NORMS,
    ChannelNorm,
    RowNorm,
)

# Forward mode runs a script of torch's own.
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]

# To compare with torch's errors: of the 23 elements of rms_norm's samples one draw in 50 found those small by chance.
DRAWS = 12

# Of x, as far as samples are drawn again, differentiated numerically, or normalized by many programs of the interpreter.
SMALL = 800

Spec = RowNorm | ChannelNorm

# Those whose arguments are F's. native_layer_norm adds absent weights and biases, and errors.
OPINFOS = {spec.name: {f"nn.functional.{spec.name}"} for spec in (*ROW_NORMS, *CHANNEL_NORMS)}
OPINFOS["layer_norm"].add("native_layer_norm")

MODULES: dict[str, Spec] = {"LayerNorm": LAYER_NORM, "RMSNorm": RMS_NORM, "GroupNorm": GROUP_NORM}
for _dims in (1, 2, 3):
    MODULES |= {f"InstanceNorm{_dims}d": INSTANCE_NORM, f"BatchNorm{_dims}d": BATCH_NORM}


class Problem(NamedTuple):
    """What F's function of the spec's name is given, by name."""

    spec: Spec
    given: dict[str, Any]

    @property
    def x(self) -> Tensor:
        return self.given["input"]

    @property
    def affine(self) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias."""
        return self.given["weight"], self.given.get("bias")

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.x, *self.affine) if t is not None and t.requires_grad]

    @property
    def running(self) -> tuple[Tensor, ...]:
        return tuple(t for name in ("running_mean", "running_var") if (t := self.given.get(name)) is not None)

    @property
    def eps(self) -> float:
        eps = self.given["eps"]
        return torch.finfo(road.accumulator_dtype(self.x)).eps if eps is None else eps

    @property
    def takes_given(self) -> bool:
        """Whether it normalizes by the running statistics."""
        return not self.given.get("training", self.given.get("use_input_stats", True))

    def but(self, **given: Any) -> Problem:
        return self._replace(given=self.given | given)

    def by(self, module: ModuleType) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(y, the running statistics after it), these of their own."""
        own = self.but(**{name: t.clone() for name, t in zip(("running_mean", "running_var"), self.running, strict=False)})
        return getattr(module, self.spec.name)(**own.given), own.running

    def __str__(self) -> str:
        shown = {name: tuple(t.shape) if isinstance(t, Tensor) else t for name, t in self.given.items()}
        return f"{self.spec.name} {shown}"


class Definition:
    """A problem's results in float64, and of y and each gradient the terms that it is a sum of."""

    def __init__(self, problem: Problem) -> None:
        self._problem, spec, x = problem, problem.spec, problem.x
        if isinstance(spec, RowNorm):
            shape, self._family, self._how = problem.given["normalized_shape"], reference, ()
            self._of = spec, x, shape
        else:
            shape, self._family = x.shape[1:2], channel_reference
            self._of = spec, x, problem.given.get("num_groups", x.shape[1])
            self._how = (channel_reference.Given(*problem.running) if problem.takes_given else None,)
        self.y = self._family.oracle(*self._of, *problem.affine, problem.eps, *self._how).y
        xhat, _, rstd = self._family.oracle(*self._of, None, None, problem.eps, *self._how)
        weight, bias = (torch.zeros(shape, device=x.device) if t is None else t.detach().double() for t in problem.affine)
        weight = weight + 1 if problem.affine[0] is None else weight
        if isinstance(spec, RowNorm):
            self._weight, self._bias, self._rstd = weight, bias, rstd.view(*x.shape[: -len(shape)], *[1] * len(shape))
        else:
            if not (spec.over_samples or problem.takes_given):
                rstd = rstd.view(len(x), -1).repeat_interleave(x.shape[1] * len(x) // len(rstd), 1)
            self._weight, self._bias, self._rstd = (t.view(*t.shape, *[1] * (x.dim() - 2)) for t in (weight, bias, rstd))
        # Of two elements close to each other x̂ is 1 and -1, and what it is the difference of is far larger.
        self._xhat = xhat.abs() + x.detach().double().abs() * self._rstd

    def terms_of_y(self) -> Tensor:
        return (self._xhat * self._weight).abs() + self._bias.abs()

    def gradients(self, dy: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """(terms, gradient) by name, of the inputs that there are."""
        problem = self._problem
        exact = self._family.oracle_gradients(*self._of, *problem.affine, problem.eps, dy, *self._how)
        terms = self._rstd * self._weight * dy * (1 + self._xhat), dy * self._xhat, dy
        return {name: (of, g) for name, of, g in zip(("dx", "dw", "db"), terms, exact, strict=False) if g is not None}


class Road(NamedTuple):
    device: torch.device
    launches: bool

    def takes(self, problem: Problem, number: int, dtype: torch.dtype) -> bool:
        """Whether ours runs. In the interpreter the dtypes share the channel norms' samples, the small of them."""
        if not self.launches or ON_GPU or isinstance(problem.spec, RowNorm):
            return True
        return DTYPES[number % len(DTYPES)] == dtype and problem.x.numel() < SMALL


@pytest.fixture(params=(*ROW_NORMS, *CHANNEL_NORMS), ids=lambda spec: spec.name)
def spec(request: pytest.FixtureRequest) -> Spec:
    return request.param


@pytest.fixture(params=["kernels", "composite"])
def by(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Road:
    if request.param == "kernels":
        return Road(device, launches=True)
    monkeypatch.setattr(road, "INTERPRETED", False)
    return Road(torch.device("cpu"), launches=False)


@functools.cache
def opinfos(spec: Spec) -> list[Any]:
    # Not when the tests are collected: it takes seconds.
    from torch.testing._internal.common_methods_invocations import op_db

    found = [info for info in op_db if info.name in OPINFOS[spec.name] and not info.variant_test_name]
    assert {info.name for info in found} == OPINFOS[spec.name]
    return found


@functools.cache
def moduleinfo(name: str) -> Any:
    from torch.testing._internal.common_modules import module_db

    (found,) = (info for info in module_db if info.module_cls is getattr(torch.nn, name))
    return found


def bound(spec: Spec, sample: Any) -> Problem:
    """A sample's arguments, as F takes them."""
    arguments = inspect.signature(getattr(F, spec.name)).bind(sample.input, *sample.args, **sample.kwargs)
    arguments.apply_defaults()
    return Problem(spec, dict(arguments.arguments))


def problems(spec: Spec, device: torch.device, dtype: torch.dtype, requires_grad: bool) -> list[Problem]:
    """Of each OpInfo the reference inputs, which are its samples where it has no others."""
    drawn: list[Problem] = []
    for info in opinfos(spec):
        if dtype in info.supported_dtypes(device.type):
            samples = list(info.reference_inputs(device, dtype, requires_grad=requires_grad, set_seed=False))
            assert samples
            drawn += (problem for sample in samples if (problem := usable(bound(spec, sample))))
    assert drawn
    return drawn


def distinct(problems: Iterable[Problem]) -> list[Problem]:
    """One of those that differ in values alone, the smallest first."""
    return sorted({str(problem): problem for problem in problems}.values(), key=lambda problem: problem.x.numel())


def usable(problem: Problem) -> Problem | None:
    """torch takes a negative eps, and returns NaN where the root's argument is negative too; batch_norm an empty input of
    one dim. Ours refuses both.
    """
    if isinstance(problem.spec, ChannelNorm) and problem.x.dim() < 2:
        refused: Problem | None = None
        match = "dims"
    elif problem.eps < 0:
        refused, match = problem.but(eps=-problem.eps), "eps"
    else:
        return problem
    problem.by(F)
    with pytest.raises((ValueError, RuntimeError), match=match):
        problem.by(functional)
    return refused


# (y, the running statistics after it).
Outcome = tuple[Tensor, tuple[Tensor, ...]]

# (name; ours, float64's, torch's, and what the unit in the last place is one of).
Found = tuple[str, Tensor, Tensor, Tensor, Tensor]


def results(problem: Problem, ours: Callable[[], Outcome] | None, theirs: Callable[[], Outcome]) -> Iterator[Found]:
    """Of y, every gradient and running statistics, in units of what each is a sum of.

    Without ours, it is float64's, rounded.
    """
    by_torch, running_by_torch = theirs()
    if not problem.x.numel():
        if ours:
            y, _ = ours()
            assert (y.shape, y.dtype, y.requires_grad) == (by_torch.shape, by_torch.dtype, by_torch.requires_grad)
        return
    exact = Definition(problem)
    y, running = ours() if ours else (exact.y.to(by_torch.dtype), ())
    if ours:
        assert (y.shape, y.dtype, y.requires_grad) == (by_torch.shape, by_torch.dtype, by_torch.requires_grad)
        assert y.is_contiguous()
        yield from running_results(problem, running, running_by_torch)
    yield "y", *in_units_of(exact.terms_of_y(), y, exact.y, by_torch, exact.y)
    leaves = problem.leaves
    if not leaves:
        return
    dy = torch.randn_like(y)
    gradients = exact.gradients(dy)
    by_torchs = torch.autograd.grad(by_torch, leaves, dy)
    wanted = [g for _, g in gradients.values()]
    found = torch.autograd.grad(y, leaves, dy) if ours else [g.to(t.dtype) for g, t in zip(wanted, by_torchs, strict=True)]
    for (name, (terms, want)), got, by_torch in zip(gradients.items(), found, by_torchs, strict=True):
        assert got.dtype == by_torch.dtype
        yield name, *in_units_of(terms, got, want, by_torch, want)


def running_results(problem: Problem, ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> Iterator[Found]:
    """Of the running statistics after a call, in units of what they are means of."""
    if not ours:
        return
    before, momentum, exact = channel_reference.Given(*problem.running), problem.given["momentum"], None
    if not problem.takes_given:
        exact = OfChannels(problem.spec, statistics="kept").running_after(problem.x, before, momentum)  # type: ignore[arg-type]
    square = problem.x.detach().double().square().mean()
    for name, kept, got, want, by_torch, size in zip(
        channel_reference.Given._fields, before, ours, exact or before, theirs, (square.sqrt(), square), strict=True
    ):
        terms = kept.double().abs() + abs(momentum) * size
        yield f"running {name}", *in_units_of(terms, got, want.double(), by_torch, terms)


def in_units_of(terms: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The tensors times the power of two, which rounds nothing, that brings the largest term to 2^13..2^14."""
    _, exponent = torch.frexp(terms.detach().double().abs().max() if terms.numel() else torch.zeros(()))
    unit = 2.0 ** (14 - int(exponent))
    return [(t.detach().double() * unit).to(t.dtype) for t in tensors]


def assert_no_worse_together(found: Iterable[Found]) -> None:
    """Compare the results of one name as one: of a sample's handful of sums torch's own error is chance."""
    named: defaultdict[str, list[list[Tensor]]] = defaultdict(list)
    for name, *tensors in found:
        named[name].append([t.flatten() for t in tensors])
    for name, each in named.items():
        assert_no_worse(name, *(torch.cat(tensors) for tensors in zip(*each, strict=True)))


@pytest.mark.parametrize("requires_grad", [True, False], ids=["with gradients", "without"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_function(spec: Spec, dtype: torch.dtype, requires_grad: bool, by: Road, launched: list[Any]) -> None:
    if not (ON_GPU or requires_grad or dtype in (torch.float32, torch.bfloat16)):
        pytest.skip("y is what it is with gradients: two dtypes show that on a CPU")
    found: list[Found] = []
    for i in range(DRAWS):
        drawn = problems(spec, by.device, dtype, requires_grad)
        for number, problem in enumerate(drawn if ON_GPU else distinct(drawn)):
            if i == 0 or problem.x.numel() < SMALL:
                ours, theirs = (functools.partial(problem.by, module) for module in (functional, F))
                runs = (i == 0 or ON_GPU) and by.takes(problem, number, dtype)
                found += results(problem, ours if runs else None, theirs)
    assert_no_worse_together(found)
    assert bool(launched) == by.launches


@pytest.mark.filterwarnings("ignore:trinorm:UserWarning")
def test_derivatives(spec: Spec, by: Road, launched: list[Any]) -> None:
    drawn = [problem for problem in problems(spec, by.device, torch.float64, True) if problem.x.numel() < SMALL]
    if not ON_GPU:  # the interpreter takes long; and native_layer_norm's samples with weight and bias are layer_norm's
        drawn = distinct(drawn)[-1 if by.launches and isinstance(spec, ChannelNorm) else 0 :]
    for problem in drawn:

        def norm(*leaves: Tensor, problem=problem) -> Tensor:
            given = iter(leaves)
            named = zip(("input", "weight", "bias"), (problem.x, *problem.affine), strict=True)
            return problem.but(**{name: next(given) for name, t in named if t is not None}).by(functional)[0]

        torch.autograd.gradcheck(norm, problem.leaves, fast_mode=True, check_forward_ad=True, check_batched_grad=True)
        torch.autograd.gradgradcheck(norm, problem.leaves, fast_mode=True, check_fwd_over_rev=True)
    assert bool(launched) == by.launches


def test_errors(spec: Spec, by: Road, launched: list[Any]) -> None:
    errors = [e for info in opinfos(spec) if info.error_inputs_func for e in info.error_inputs(by.device)]
    assert errors or spec in (INSTANCE_NORM, BATCH_NORM)
    for error in errors:
        problem = bound(spec, error.sample_input)
        with pytest.raises(error.error_type, match=error.error_regex) as theirs:
            problem.by(F)
        with pytest.raises(theirs.type, match=rf"^{spec.name}\(\): "):
            problem.by(functional)
    assert not launched


def of_module(spec: Spec, module: Any, x: Tensor) -> Problem:
    """What a new module asks of its function."""
    names = ("normalized_shape", "num_groups", "weight", "bias", "eps", "running_mean", "running_var")
    given = {name: getattr(module, name) for name in names if hasattr(module, name)}
    if spec in (INSTANCE_NORM, BATCH_NORM):
        flag = "training" if spec is BATCH_NORM else "use_input_stats"
        given[flag] = module.training or not module.track_running_stats
        given["momentum"] = 1.0 if module.momentum is None else module.momentum  # None is the mean of all batches so far
    problem = Problem(spec, {"input": x, **given})
    return problem.but(**dict(zip(("running_mean", "running_var"), (t.clone() for t in problem.running), strict=False)))


def by_module(module: Any, x: Tensor, batched: bool) -> Outcome:
    y = module(x) if batched else module(x[0])[None]
    running = (getattr(module, name, None) for name in ("running_mean", "running_var"))
    return y, tuple(t for t in running if t is not None)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_module(name: str, dtype: torch.dtype, training: bool, by: Road, launched: list[Any]) -> None:
    spec, info = MODULES[name], moduleinfo(name)
    if not (training or info.train_and_eval_differ):
        pytest.skip("as in training")
    samples = info.module_inputs_func(info, device=by.device, dtype=dtype, requires_grad=True, training=training)
    found: list[Found] = []
    for number, sample in enumerate(samples):
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        ours, theirs = (getattr(of, name)(*args, **kwargs, device=by.device, dtype=dtype) for of in (nn, torch.nn))
        for module in (ours, theirs):
            module.train(training)
        for key, parameter in ours.named_parameters():
            setattr(theirs, key, torch.nn.init.normal_(parameter))
        (x,) = sample.forward_input.args
        batched = spec is not INSTANCE_NORM or x.dim() == 2 + int(name[-2])
        problem = of_module(spec, ours, x if batched else x.detach()[None].requires_grad_())
        takes = by.takes(problem, number, dtype)
        how = problem.x, batched
        found += results(
            problem, functools.partial(by_module, ours, *how) if takes else None, functools.partial(by_module, theirs, *how)
        )
    assert_no_worse_together(found)
    assert bool(launched) == by.launches


@pytest.mark.parametrize("name", MODULES)
def test_module_errors(name: str, by: Road) -> None:
    info = moduleinfo(name)
    asked = dict(device=by.device, dtype=torch.float32, requires_grad=False, training=True)
    for error in info.module_error_inputs_func(info, **asked) if info.module_error_inputs_func else ():
        made, called = error.module_error_input.constructor_input, error.module_error_input.forward_input
        if MODULES[name] is BATCH_NORM and made.kwargs.get("eps") == 0:
            continue  # torch refuses it of late (2.13); ours divides by a deviation that is not 0

        def call(namespace: ModuleType, made: Any = made, called: Any = called) -> None:
            module = getattr(namespace, name)(*made.args, **made.kwargs).to(by.device)
            module(*called.args, **called.kwargs)

        with pytest.raises(error.error_type, match=error.error_regex) as theirs:
            call(torch.nn)
        with pytest.raises(theirs.type):
            call(nn)
