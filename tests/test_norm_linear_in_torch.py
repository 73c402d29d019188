"""A norm into a linear layer as torch's citizen: derivatives, autocast, compiled, checkpointed, hooks, torch.func."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from paths import SPECS
from test_norm_linear import EPS, apart, assert_same, bytes_of, draw, gradients, kept_by, leaves_of, together
from trinorm import functional, options, reference
from trinorm.ops import linear
from trinorm.spec import LAYER_NORM, RMS_NORM, RowNorm

COMPILER = pytest.mark.skipif(
    not torch.cuda.is_available() and shutil.which("g++") is None, reason="Inductor needs a C++ compiler on a CPU"
)


@pytest.fixture(params=SPECS)
def spec(request: pytest.FixtureRequest) -> RowNorm:
    return request.param


@pytest.mark.parametrize("shape", [(2, 3), (1, 2, 2)], ids=str)
def test_derivatives(spec: RowNorm, shape: tuple[int, ...], device: torch.device) -> None:
    """Numerically, and twice."""
    given = leaves_of(draw(spec, shape, 2, device, torch.float64))
    present = [t for t in given if t is not None]

    def function(*tensors: Tensor) -> Tensor:
        of = iter(tensors)
        return together(spec, *(None if t is None else next(of) for t in given))  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(function, present)
    assert torch.autograd.gradgradcheck(function, present, fast_mode=True)


def test_second_and_third_derivatives_are_the_two_functions(spec: RowNorm, device: torch.device) -> None:
    results = []
    given, dz = draw(spec, (5, 40), 8, device, torch.float64), torch.randn(5, 8, device=device, dtype=torch.float64)
    for function in (together, apart):
        leaves = leaves_of(given)
        asked = [t for t in leaves if t is not None]
        found = [function(spec, *leaves)]
        for _ in range(3):
            loss = sum((t * t).sum() for t in found) if len(found) > 1 else (found[0] * dz).sum()
            found = list(torch.autograd.grad(loss, asked, create_graph=True, materialize_grads=True))
        results.append(found)
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_batched_gradients(spec: RowNorm, device: torch.device) -> None:
    leaves = leaves_of(draw(spec, (6, 40), 8, device))
    asked = [t for t in leaves if t is not None]
    dzs = torch.randn(3, 6, 8, device=device)
    z = together(spec, *leaves)
    batched = torch.autograd.grad(z, asked, dzs, is_grads_batched=True, retain_graph=True)
    singly = [torch.autograd.grad(z, asked, dz, retain_graph=True) for dz in dzs]
    for got, want in zip(batched, zip(*singly, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(want))


@pytest.mark.parametrize("lead", [(6,), (2, 3), ()], ids=str)
def test_a_result_may_be_changed_in_place(lead: tuple[int, ...], spec: RowNorm, device: torch.device) -> None:
    leaves = leaves_of(draw(spec, (*lead, 40), 8, device))
    asked = [t for t in leaves if t is not None]
    found = [function(spec, *leaves) for function in (together, apart)]
    grads = []
    for z in found:
        z.mul_(2).relu_()
        grads.append(torch.autograd.grad(z.square().sum(), asked))
    for got, want in zip((found[0], *grads[0]), (found[1], *grads[1]), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("ignore:.*runs torch's own operator")  # a GPU says so of torch.func and forward mode
def test_transforms(spec: RowNorm, device: torch.device) -> None:
    given = draw(spec, (6, 16), 4, device)
    present = [t for t in given if t is not None]

    def of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def scalar(*tensors: Tensor) -> Tensor:
            left = iter(tensors)
            return (function(spec, *(None if t is None else next(left) for t in given)) ** 2).sum()

        return scalar

    everything = tuple(range(len(present)))
    for transform in (
        lambda f: torch.func.grad(f, everything)(*present),
        lambda f: torch.func.jvp(f, tuple(present), tuple(torch.ones_like(t) for t in present)),
        lambda f: torch.func.vmap(f, (0, *[None] * (len(present) - 1)))(*present),
        lambda f: torch.func.hessian(f)(*present),
    ):
        for got, want in zip(transform(of(together)), transform(of(apart)), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("in_fp32", [True, False])
def test_autocast(
    spec: RowNorm, dtype: torch.dtype, in_fp32: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits of the two functions under autocast, which has the norm in fp32 or has not; of weights in fp32."""
    monkeypatch.setattr(reference, "_policy_is_fp32", lambda *_: in_fp32)
    of = torch.float64 if dtype == torch.float64 else torch.float32
    given = [None if t is None else t.to(dtype if i == 0 else of) for i, t in enumerate(draw(spec, (7, 96), 24, device))]
    dz = torch.randn(7, 24, device=device)
    results = []
    for _ in range(2):
        for function in (together, apart):
            leaves = leaves_of(given)
            with torch.autocast(device.type, torch.bfloat16):
                z, kept = kept_by(lambda *t, function=function: function(spec, *t), *leaves)
            assert z.dtype == (of if dtype == torch.float64 else torch.bfloat16)
            asked = [t for t in leaves if t is not None]
            results.append([z.detach(), *torch.autograd.grad(z, asked, dz.to(z.dtype))])
            if function is together:
                assert bytes_of(kept, leaves) == 7 * (2 if spec.center else 1) * (8 if dtype == torch.float64 else 4)
    for found in results[1:]:
        assert_same(found, results[0])


def test_autocast_hands_no_weight_on_that_has_no_gradient(spec: RowNorm, device: torch.device) -> None:
    """It remembers what it casts, for all uses of a weight."""
    x, w, b, a, c = leaves_of(draw(spec, (7, 96), 96, device))
    with torch.autocast(device.type, torch.bfloat16):
        first = together(spec, x, w, b, a, c)
        second = F.linear(x, a, c)  # type: ignore[arg-type]
    assert second.grad_fn is not None
    (alone,) = torch.autograd.grad(second, a, torch.ones_like(second), retain_graph=True)
    (of_first,) = torch.autograd.grad(first, a, torch.ones_like(first), retain_graph=True)
    (both,) = torch.autograd.grad([first, second], a, [torch.ones_like(first)] * 2)
    assert alone.any()
    assert torch.equal(both, of_first + alone)


def test_a_backward_under_autocast_is_its_forwards(spec: RowNorm, device: torch.device) -> None:
    leaves = leaves_of(draw(spec, (7, 96), 24, device))
    asked = [t for t in leaves if t is not None]
    z = together(spec, *leaves)
    expected = torch.autograd.grad(z, asked, torch.ones_like(z), retain_graph=True)
    with torch.autocast(device.type, torch.bfloat16):
        assert_same(list(torch.autograd.grad(z, asked, torch.ones_like(z))), list(expected))


# Inductor's partitioner without its code, and in one case with it.
@pytest.mark.parametrize(
    ("spec", "backend", "by_torch"),
    [
        (LAYER_NORM, "aot_eager_decomp_partition", False),
        (RMS_NORM, "aot_eager_decomp_partition", True),
        pytest.param(RMS_NORM, "inductor", True, marks=COMPILER),
    ],
)
# Inductor's advice of each product in fp32, given once to a process, on a GPU that has TF32.
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
def test_compiled_keeps_as_little(spec: RowNorm, backend: str, by_torch: bool, device: torch.device) -> None:
    """One graph, with an eager call's numbers; and of the two functions the partitioner would keep y."""
    given, dz = draw(spec, (16, 64), 24, device), torch.randn(16, 24, device=device)
    expected = gradients(lambda *t: together(spec, *t), given, dz)
    of_y, kept_bytes = 16 * 64 * 4, {}
    before, options.inductor_fuses = options.inductor_fuses, by_torch
    try:
        for function in (together, apart):
            torch._dynamo.reset()
            compiled = torch.compile(lambda *t, function=function: function(spec, *t), backend=backend, fullgraph=True)
            leaves = leaves_of(given)
            z, kept = kept_by(compiled, *leaves)
            kept_bytes[function] = bytes_of(kept, leaves)
            found = [z.detach(), *torch.autograd.grad(z, [t for t in leaves if t is not None], dz)]
            for got, want in zip(found, expected, strict=True):
                torch.testing.assert_close(got, want)
    finally:
        options.inductor_fuses = before
    assert kept_bytes[together] < of_y <= kept_bytes[apart]


def test_compiled_under_autocast_and_without_gradients(spec: RowNorm, device: torch.device) -> None:
    given = draw(spec, (16, 64), 24, device)

    def under_autocast(*t: Tensor | None) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return together(spec, *t)

    compiled = torch.compile(under_autocast, backend="aot_eager", fullgraph=True)
    dz = torch.randn(16, 24, device=device).bfloat16()
    assert_same(gradients(compiled, given, dz), gradients(under_autocast, given, dz))
    with torch.no_grad():
        assert torch.equal(compiled(*given), under_autocast(*given))


def test_exported(spec: RowNorm, device: torch.device) -> None:
    given = draw(spec, (16, 64), 24, device)

    class Model(torch.nn.Module):
        def forward(self, x: Tensor, w: Tensor, b: Tensor | None, a: Tensor, c: Tensor) -> Tensor:
            return together(spec, x, w, b, a, c)

    leaves = leaves_of(given)
    for strict in (True, False):
        exported = torch.export.export(Model(), tuple(leaves), strict=strict)
        assert torch.equal(exported.module()(*leaves), together(spec, *leaves))
        assert "checkpoint" not in str(exported.graph)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed(spec: RowNorm, use_reentrant: bool, device: torch.device) -> None:
    given, dz = draw(spec, (7, 96), 24, device), torch.randn(7, 24, device=device)
    found = []
    for wrapped in (True, False):
        leaves = leaves_of(given)
        if wrapped:
            z = checkpoint(lambda *t: together(spec, *t).tanh(), *leaves, use_reentrant=use_reentrant)
        else:
            z = together(spec, *leaves).tanh()
        z.backward(dz)
        found.append([t.grad for t in leaves if t is not None])
    assert_same(*found)


def test_saved_tensors_come_back_otherwise(spec: RowNorm, device: torch.device) -> None:
    """From hooks, in another layout and dtype."""
    given, dz = draw(spec, (7, 40), 24, device), torch.randn(7, 24, device=device)
    expected = gradients(lambda *t: together(spec, *t), given, dz)

    def turned(t: Tensor) -> Tensor:
        return t.t().contiguous().t().double() if t.dim() == 2 else t.double()

    def through_hooks(*t: Tensor | None) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(turned, lambda t: t.float()):
            return together(spec, *t)

    for _ in range(3):
        for got, want in zip(gradients(through_hooks, given, dz), expected, strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("which", ["x", "norm's weight", "norm's bias", "linear weight"])
def test_what_was_changed_in_place_is_refused(which: str, spec: RowNorm, device: torch.device) -> None:
    leaves = leaves_of(draw(spec, (5, 40), 8, device))
    t = leaves[["x", "norm's weight", "norm's bias", "linear weight"].index(which)]
    if t is None:
        pytest.skip("it has none")
    z = together(spec, *leaves)
    with torch.no_grad():
        t.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_options_that_change_before_the_backward(spec: RowNorm, device: torch.device) -> None:
    """y is made again as it was made."""
    leaves, seen = leaves_of(draw(spec, (5, 40), 8, device)), []
    z = together(spec, *leaves)
    original = linear._normalized
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "_normalized", lambda norm, *t: (seen.append(norm), original(norm, *t))[1])
        options.batch_invariant = True
        try:
            z.sum().backward()
        finally:
            options.batch_invariant = False
    assert [norm.batch_invariant for norm in seen] == [False]


class _Sub(Tensor):
    pass


@pytest.mark.filterwarnings("ignore:.*runs torch's own operator")
def test_what_has_a_way_of_its_own_sees_one_call(spec: RowNorm, device: torch.device) -> None:
    given, name = draw(spec, (5, 40), 8, device), f"{spec.name}_linear"

    class Seeing(TorchFunctionMode):
        seen: list[str] = []  # noqa: RUF012

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(function.__name__)
            return function(*args, **(kwargs or {}))

    with Seeing():
        z = together(spec, *given)
    assert Seeing.seen.count(name) == 1
    assert "linear" not in Seeing.seen
    assert torch.equal(z, apart(spec, *given))
    sub = [None if t is None else t.as_subclass(_Sub) for t in given]
    assert type(together(spec, *sub)) is _Sub


def test_jagged(spec: RowNorm, device: torch.device) -> None:
    _, w, b, a, c = leaves_of(draw(spec, (5, 40), 8, device))
    x = torch.nested.nested_tensor(
        [torch.randn(3, 40), torch.randn(5, 40)], layout=torch.jagged, device=device, requires_grad=True
    )
    norm = (w, b) if spec.center else (w,)
    z = getattr(functional, f"{spec.name}_linear")(x, (40,), *norm, a, c, eps=EPS)
    assert z.is_nested
    assert torch.equal(z.values(), apart(spec, x.values(), w, b, a, c))
    z.values().sum().backward()
    assert x.grad is not None
    assert a is not None
    assert a.grad is not None


@pytest.mark.filterwarnings("ignore:.*runs torch's own operator")
def test_a_mode_sees_atens_operators(spec: RowNorm, device: torch.device) -> None:
    """A FLOP counter, for one: of the backward too, in which the linear layer's two products are."""
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for function in (together, apart):
        leaves = leaves_of(draw(spec, (16, 64), 24, device))
        with FlopCounterMode(display=False) as counter:
            function(spec, *leaves).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 3 * 2 * 16 * 64 * 24
