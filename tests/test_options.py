"""trinorm.options, and the argument of its name: batch_invariant, autocast_keeps_dtype, inductor_fuses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import trinorm
from machine import ON_GPU
from paths import SPECS
from trinorm import functional, nn, reference
from trinorm.ops import CALLS, road
from trinorm.ops.hosts import rows
from trinorm.spec import RowNorm

# From one row to more than the launches of few rows take. On a GPU also past L2, where x and y are streamed.
COUNTS = (1, 2, 3, 33, 130, *((600, 20000) if ON_GPU else ()))
MOST_ELEMENTS = 1 << (26 if ON_GPU else 17)


@pytest.fixture(params=SPECS)
def spec(request: pytest.FixtureRequest) -> RowNorm:
    return request.param


@pytest.fixture(autouse=True)
def _defaults_again() -> Iterator[None]:
    yield
    for name in ("batch_invariant", "autocast_keeps_dtype", "inductor_fuses"):
        setattr(trinorm.options, name, False)


def counts(n: int) -> list[int]:
    """Those of COUNTS that there is time and memory for."""
    return [m for m in COUNTS if m * n <= MOST_ELEMENTS]


def problem(spec: RowNorm, m: int, n: int, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """x, weight and a bias for a norm that has one; dy. More rows begin with the same ones."""
    torch.manual_seed(n)
    weight, bias = (torch.randn(n).to(device, dtype).requires_grad_() for _ in range(2))
    x, dy = (torch.randn(max(counts(n)), n)[:m].to(device, dtype) for _ in range(2))
    return [x.requires_grad_(), weight, *([bias] if spec.center else [])], dy


def by_argument(spec: RowNorm, x: Tensor, *parameters: Tensor) -> Tensor:
    return getattr(functional, spec.name)(x, x.shape[-1:], *parameters, batch_invariant=True)


def by_option(spec: RowNorm, x: Tensor, *parameters: Tensor) -> Tensor:
    with trinorm.options(batch_invariant=True):
        return getattr(functional, spec.name)(x, x.shape[-1:], *parameters)


def by_module(spec: RowNorm, x: Tensor, *parameters: Tensor) -> Tensor:
    module: Any = (nn.LayerNorm if spec.center else nn.RMSNorm)(x.shape[-1], device=x.device, dtype=x.dtype)
    module.batch_invariant = True
    assert repr(module).endswith(", batch_invariant=True)")
    return torch.func.functional_call(module, dict(zip(("weight", "bias"), parameters, strict=False)), (x,))


def by_op(spec: RowNorm, x: Tensor, *parameters: Tensor) -> Tensor:
    return getattr(torch.ops.trinorm, spec.name)(x, x.shape[-1:], *parameters, 1e-5, True, "output")[0]


def compiled(spec: RowNorm, x: Tensor, *parameters: Tensor) -> Tensor:
    return torch.compile(by_argument, backend="aot_eager", fullgraph=True)(spec, x, *parameters)


def not_asked(spec: RowNorm, x: Tensor, *parameters: Tensor) -> Tensor:
    return getattr(functional, spec.name)(x, x.shape[-1:], *parameters)


def launches(f: Callable[..., Tensor], spec: RowNorm, n: int, device: torch.device) -> list[Any]:
    """For each number of rows, the kernels of a forward and of dx, with all that they are compiled for.

    The interpreter would take long, and what they compute is not looked at: there they are not run.
    """
    found = []
    for m in COUNTS:
        (x, *parameters), dy = problem(spec, m, n, torch.bfloat16, device)
        launched: list[Any] = []
        actual = rows.launch if ON_GPU else lambda *_: None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                rows, "launch", lambda k, *a, to=launched, run=actual: (to.append((k.__name__, a[-1])), run(k, *a))[1]
            )
            torch.autograd.grad(f(spec, x, *parameters), x, dy)
        found.append(launched)
    return found


@pytest.mark.parametrize("f", [by_argument, by_option, by_module, by_op, compiled])
@pytest.mark.parametrize("n", [48, 768])
def test_one_launch_for_any_number_of_rows(f: Callable[..., Tensor], n: int, spec: RowNorm, device: torch.device) -> None:
    torch._dynamo.reset()
    first, *others = launches(f, spec, n, device)
    assert first
    assert all(other == first for other in others)


@pytest.mark.parametrize("n", [48, 768])
def test_without_it_launches_differ(n: int, spec: RowNorm, device: torch.device) -> None:
    first, *others = launches(not_asked, spec, n, device)
    assert any(other != first for other in others)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("n", [48, 100, 768, 1001, 4096, *((12288, 16384, 65536) if ON_GPU else ())])
def test_a_rows_bits_do_not_depend_on_those_beside_it(
    n: int, dtype: torch.dtype, spec: RowNorm, device: torch.device
) -> None:
    found = []
    for m in counts(n):
        (x, *parameters), dy = problem(spec, m, n, dtype, device)
        y = by_argument(spec, x, *parameters)
        found.append((y.detach(), *torch.autograd.grad(y, x, dy)))
    most = found[-1]
    for few in found[:-1]:
        for got, want in zip(few, most, strict=True):
            assert torch.equal(got, want[: len(got)])


def test_it_is_what_it_is_without(spec: RowNorm, device: torch.device) -> None:
    """To rounding: another launch sums in another order."""
    (x, *parameters), _ = problem(spec, 5, 768, torch.float32, device)
    torch.testing.assert_close(by_argument(spec, x, *parameters), not_asked(spec, x, *parameters))


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
def test_autocast_keeps_the_dtype(
    kernels: bool, compiles: bool, spec: RowNorm, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, where autocast leaves torch's norms alone, as if it did not."""
    monkeypatch.setattr(reference, "_policy_is_fp32", lambda *_: True)
    if not kernels:
        if device.type == "cuda":
            pytest.skip("kernels serve a GPU")
        monkeypatch.setattr(road, "INTERPRETED", False)
    torch._dynamo.reset()
    (x, *parameters), dy = problem(spec, 3, 8, torch.bfloat16, device)
    run = torch.compile(not_asked, backend="aot_eager", fullgraph=True) if compiles else not_asked
    for f in (run, by_op) if kernels else (run,):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            # Without kernels it is torch's own policy that decides, which is not the one above.
            assert not kernels or f(spec, x, *parameters).dtype == torch.float32
            with trinorm.options(autocast_keeps_dtype=True):
                y = f(spec, x, *parameters)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, not_asked(spec, x, *parameters))
        assert torch.autograd.grad(y, x, dy)[0].dtype == torch.bfloat16


def test_a_remembered_call_is_not_what_the_options_say_no_more(spec: RowNorm, device: torch.device) -> None:
    (x, *parameters), _ = problem(spec, 1, 768, torch.bfloat16, device)
    with torch.no_grad():
        for _ in range(3):
            not_asked(spec, x, *parameters)
    assert launches(by_option, spec, 768, device) == launches(by_argument, spec, 768, device)


def test_calls_of_one_shape_are_told_apart(spec: RowNorm, device: torch.device) -> None:
    """Each kind of call thrice in turn, so that each is recalled among the others."""
    (x, *parameters), dy = problem(spec, 1, 768, torch.bfloat16, device)
    x, parameters = x.detach(), [p.detach() for p in parameters]
    op, backward = (getattr(torch.ops.trinorm, name) for name in (spec.name, f"{spec.name}_backward"))
    _, *mean, rstd = op(x, (768,), *parameters, 1e-5, False, "output")
    saved = [mean[0] if mean else None, rstd]
    CALLS.clear()  # on a GPU the call above would be repeated, past what looks at launches below
    calls: dict[str, Callable[[bool], object]] = {
        "eager": lambda invariant: getattr(functional, spec.name)(x, (768,), *parameters, batch_invariant=invariant),
        "op": lambda invariant: op(x, (768,), *parameters, 1e-5, invariant, "output"),
        "backward": lambda invariant: backward(
            dy, x, (768,), parameters[0], *saved, 1e-5, True, False, None, invariant, "output"
        ),
    }
    launched: list[Any] = []
    actual = rows.launch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            rows, "launch", lambda kernel, *a: (launched.append((kernel.__name__, a[-1]["ROWS"])), actual(kernel, *a))[1]
        )
        found: dict[tuple[str, bool], list[Any]] = {}
        for _ in range(3):
            for name, call in calls.items():
                for invariant in (False, True):
                    launched.clear()
                    call(invariant)
                    found.setdefault((name, invariant), []).append(launched[0])
    assert all(len(set(tiles)) == 1 for tiles in found.values())
    assert all(found[name, False] != found[name, True] for name in calls)
    if spec.center:
        for _ in range(3):
            for db in (torch.bfloat16, torch.float32, None):
                *_, sums = backward(dy, x, (768,), parameters[0], *saved, 1e-5, True, True, db, False, "output")
                assert (None if sums is None else sums.dtype) == db


def test_inductor_fuses(spec: RowNorm, device: torch.device, launched: list[object]) -> None:
    """What is recorded is torch's own operator, and the kernels' again once the option is off."""
    torch._dynamo.reset()
    (x, *parameters), dy = problem(spec, 3, 8, torch.float32, device)
    expected = not_asked(spec, x, *parameters)
    (expected_dx,) = torch.autograd.grad(expected, x, dy)
    run = torch.compile(not_asked, backend="aot_eager", fullgraph=True)
    for fuses in (True, False, True):
        launched.clear()
        with trinorm.options(inductor_fuses=fuses):
            y = run(spec, x, *parameters)
            (dx,) = torch.autograd.grad(y, x, dy)
        assert bool(launched) != fuses
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(dx, expected_dx)


def test_a_block_sets_and_gives_back() -> None:
    with trinorm.options(batch_invariant=True):
        assert trinorm.options.batch_invariant
        with contextlib.suppress(ZeroDivisionError), trinorm.options(batch_invariant=False, autocast_keeps_dtype=True):
            assert (trinorm.options.batch_invariant, trinorm.options.autocast_keeps_dtype) == (False, True)
            raise ZeroDivisionError
        assert (trinorm.options.batch_invariant, trinorm.options.autocast_keeps_dtype) == (True, False)
    assert not trinorm.options.batch_invariant


def test_what_is_no_switch_is_refused(device: torch.device) -> None:
    with pytest.raises(AttributeError, match="no 'batch'; it has batch_invariant, autocast_keeps_dtype, inductor_fuses"):
        trinorm.options.batch = True
    with pytest.raises(AttributeError, match="no 'batch'"), trinorm.options(batch_invariant=True, batch=True):
        pass
    with pytest.raises(TypeError, match=r"batch_invariant must be True or False, not 1"):
        trinorm.options.batch_invariant = 1
    assert not trinorm.options.batch_invariant
    with pytest.raises(TypeError, match="batch_invariant must be True, False or None, not 1"):
        functional.rms_norm(torch.ones(2, 3, device=device), (3,), batch_invariant=1)
