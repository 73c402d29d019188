"""ops/library/inductor.py: what Inductor's code calls for a registered op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._functorch import config as functorch
from torch._inductor import config
from torch._inductor.utils import run_and_get_code
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

import trinorm
from machine import ON_GPU
from trinorm import functional
from trinorm.ops.library import inductor, registering

DEVICE = "cuda" if ON_GPU else "cpu"

CALLED = "torch_ops_trinorm_layer_norm"


@pytest.fixture(autouse=True)
def _code_is_written_anew() -> Any:
    torch._dynamo.reset()
    with config.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False):
        yield
    torch._dynamo.reset()


def norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return functional.layer_norm(x * 2, (64,), w, b)


region = torch.compiler.nested_compile_region(norm)


def within(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """In a graph within the graph."""
    return region(region(x, w, b), w, b)


def drawn() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(size, device=DEVICE, requires_grad=True) for size in ((6, 64), (64,), (64,))]


def gradients(f: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    y = f(*inputs)
    return [y, *torch.autograd.grad(y, inputs, torch.ones_like(y))]


def code_of(f: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], str]:
    compiled = torch.compile(f, fullgraph=True)
    _, code = run_and_get_code(gradients, compiled, drawn())
    return compiled, "\n".join(code)


@pytest.mark.parametrize("f", [norm, within])
def test_the_dispatcher_is_not_asked_again(f: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registering._Levels, "met", False)  # as where nobody has taken tangents
    compiled, code = code_of(f)
    assert f"{CALLED}_default_1(" in code
    assert f"{CALLED}_backward_default_1(" in code
    inputs = drawn()
    expected = gradients(f, inputs)
    for _ in range(8):  # until all of this shape is recorded
        gradients(compiled, inputs)

    dispatched: list[str] = []
    of = registering.Op.overload.fget
    monkeypatch.setattr(registering.Op, "overload", property(lambda op: (dispatched.append(op.name), of(op))[1]))
    assert all(map(torch.equal, gradients(compiled, inputs), expected))
    # Interpreted launches are not recorded, nor then what a backward of rows came to.
    assert {*dispatched} <= (set() if ON_GPU else {"layer_norm_backward"})


def test_each_place_has_a_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two calls that differ in their sizes alone; and what was kept is forgotten with all else."""
    monkeypatch.setattr(registering._Levels, "met", False)

    def both(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return norm(x, w, b).sum() * functional.layer_norm(x[:4, :32], (32,), w[:32], b[:32])

    compiled, code = code_of(both)
    assert f"{CALLED}_default_1(" in code and f"{CALLED}_default_2(" in code
    expected = gradients(both, drawn())
    for _ in range(8):
        torch.testing.assert_close(gradients(compiled, drawn()), expected, rtol=1e-4, atol=1e-4)

    asked: list[str] = []
    for kind in (registering.Op, type(torch.ops.trinorm.layer_norm.default.site.__self__)):
        actual = kind.again
        monkeypatch.setattr(kind, "again", lambda op, *args, _a=actual: (asked.append(op.name), _a(op, *args))[1])
    torch.testing.assert_close(gradients(compiled, drawn()), expected, rtol=1e-4, atol=1e-4)
    assert "layer_norm" not in asked
    with trinorm.options(autocast_keeps_dtype=True):
        pass
    torch.testing.assert_close(gradients(compiled, drawn()), expected, rtol=1e-4, atol=1e-4)
    assert asked.count("layer_norm") >= 2


def test_sizes_that_change_are_asked_for_each_time() -> None:
    compiled = torch.compile(norm, fullgraph=True, dynamic=True)
    _, code = run_and_get_code(gradients, compiled, drawn())
    assert f"{CALLED}_default(" in "\n".join(code)
    for rows in (5, 6, 7, 5, 6, 7, 9):
        inputs = [torch.randn(rows, 64, device=DEVICE, requires_grad=True), *drawn()[1:]]
        assert all(map(torch.equal, gradients(compiled, inputs), gradients(norm, inputs)))


def test_a_mode_sees_the_op() -> None:
    x, w, b = (t.detach() for t in drawn())
    args = x, (64,), w, b, 1e-5, False, "output"
    site, seen = torch.ops.trinorm.layer_norm.default.site(), []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    for _ in range(8):
        expected = site(*args)
    with Mode():
        found = site(*args)
    assert torch.ops.trinorm.layer_norm.default in seen
    assert all(map(torch.equal, found, expected))


def test_a_profiler_sees_the_op() -> None:
    compiled, _ = code_of(norm)
    for _ in range(8):
        gradients(compiled, drawn())
    with profile(acc_events=True) as seen:
        gradients(compiled, drawn())
    assert {"trinorm::layer_norm", "trinorm::layer_norm_backward"} <= {event.name for event in seen.events()}


def test_other_arguments_are_dispatched() -> None:
    """A shape that has not come before, and tensors that a graph of another dtype was made for."""
    compiled, _ = code_of(norm)
    for rows in (6, 7, 6, 8):
        x, w, b = drawn()
        x = torch.randn(rows, 64, device=DEVICE, requires_grad=True)
        for dtype in (torch.float32, torch.bfloat16):
            inputs = [t.detach().to(dtype).requires_grad_() for t in (x, w, b)]
            assert all(map(torch.equal, gradients(compiled, inputs), gradients(norm, inputs)))


def test_a_torch_that_has_no_such_place(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.codegen.custom_extern_kernel_codegen as writers

    for name in ("layer_norm", "layer_norm_backward"):
        monkeypatch.delitem(writers.CUSTOM_EXTERN_KERNEL_CODEGEN, f"torch.ops.trinorm.{name}.default", raising=False)
    monkeypatch.setattr(inductor, "_WRITERS", "torch._inductor.nowhere")
    _, code = code_of(norm)
    assert "torch.ops.trinorm.layer_norm.default(" in code
    assert CALLED not in code


def test_code_from_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may stand on the disk: the overload itself is called where it has nothing better."""
    monkeypatch.delattr(torch.ops.trinorm.layer_norm.default, "called")
    monkeypatch.delattr(torch.ops.trinorm.layer_norm.default, "site")
    compiled, code = code_of(norm)
    assert f"{CALLED}_default_1(" in code
    assert all(map(torch.equal, gradients(compiled, drawn()), gradients(norm, drawn())))
