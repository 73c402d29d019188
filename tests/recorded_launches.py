"""What reaches the CUDA driver, by the ordinary road and by a repeated call (replay.py), with no GPU.

test_launch.py runs this file in a process of its own, once for each Triton: kernels are compiled here, and CPU tensors stand
for a GPU's (stub_driver.py).
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
import triton
import triton.language as tl
from stub_driver import Launch, Stub
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from triton import knobs
from triton.runtime.jit import JITFunction

from trinorm import functional, replay
from trinorm.launch import launch
from trinorm.ops import CALLS, road, rows
from trinorm.spec import LAYER_NORM, RMS_NORM, RowNorm
from trinorm.tuning import RowBackwardWide, Tile

SPECS = [pytest.param(LAYER_NORM, id="layer_norm"), pytest.param(RMS_NORM, id="rms_norm")]
PROGRAMMATIC_STREAM_SERIALIZATION = 6


@pytest.fixture(scope="session")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Stub:
    road.INTERPRETED = True  # the kernels serve CPU tensors
    return Stub(tmp_path_factory.mktemp("driver"))


@pytest.fixture(autouse=True)
def _as_new(stub: Stub) -> Iterator[None]:
    CALLS.clear()
    torch.manual_seed(0)
    stub.launches()
    yield
    stub.device = stub.stream = 0


@pytest.fixture
def ordinary(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels started by Triton's own way. A repeated call does not show here."""
    started: list[str] = []
    run = JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda self, *a, **k: (started.append(self.fn.__name__), run(self, *a, **k))[1])
    return started


Roles = dict[int, str]


def call(spec: RowNorm, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    shape = x.shape[-1:]
    if spec.center:
        return functional.layer_norm(x, shape, weight, bias, eps)
    return functional.rms_norm(x, shape, weight, eps)


def draw(spec: RowNorm, m: int, n: int, dtype: torch.dtype, grad: bool) -> list[Tensor]:
    """x, weight and (for LayerNorm) bias."""
    tensors = [torch.randn(m, n), torch.randn(n), torch.randn(n)][: 3 if spec.center else 2]
    return [t.to(dtype).requires_grad_(grad) for t in tensors]


def assert_same(first: list[Launch], second: list[Launch], of_first: Roles, of_second: Roles) -> None:
    """The same binaries, grids, streams and numbers, and pointers to the same things. What is neither a tensor of the call
    nor equal is scratch: whatever its address, the same one of the call.
    """
    assert len(first) == len(second) > 0
    scratch: dict[int, int] = {}
    for a, b in zip(first, second, strict=True):
        for field in ("kernel", "function", "stream", "grid", "block", "shared", "attributes"):
            assert getattr(a, field) == getattr(b, field)
        for p, q in zip(a.parameters, b.parameters, strict=True):
            if p in of_first or q in of_second:
                assert of_first[p] == of_second[q]
            elif p != q:
                assert p % 16 == q % 16 == 0
                assert scratch.setdefault(p, q) == q
    assert len(set(scratch.values())) == len(scratch)


# (m, n): every kernel of the library is among what these launch, forward and backward.
PROBLEMS = {"few rows": (5, 96), "more rows": (100, 640), "many rows": (3000, 64), "wide": (3, 40000)}
LAUNCHED: set[str] = set()


def forward_and_backward(
    spec: RowNorm, m: int, n: int, dtype: torch.dtype, stub: Stub
) -> tuple[list[Launch], Roles, list[Tensor]]:
    """What new tensors' call and its gradients launch, what is where, and the tensors, to keep their addresses taken."""
    tensors = draw(spec, m, n, dtype, grad=True)
    y, dy = call(spec, *tensors), torch.randn(m, n).to(dtype)
    everything = [y, dy, *tensors, *torch.autograd.grad(y, tensors, dy)]
    return stub.launches(), {t.data_ptr(): f"tensor {i}" for i, t in enumerate(everything)}, everything


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("known", [True, False], ids=["below run", "by run"])
def test_a_repeated_call_passes_what_the_ordinary_road_passes(
    spec: RowNorm,
    problem: str,
    dtype: torch.dtype,
    known: bool,
    stub: Stub,
    ordinary: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By either form of the launch: the one that is known of this Triton, and the one for a Triton that is not known."""
    if not known:
        monkeypatch.setattr(replay, "_TRITON", (99, 0))
    stub.stream = 0x1000
    m, n = PROBLEMS[problem]
    first, of_first, first_held = forward_and_backward(spec, m, n, dtype, stub)
    assert ordinary == [launch.kernel for launch in first]
    ordinary.clear()
    second, of_second, second_held = forward_and_backward(spec, m, n, dtype, stub)
    assert ordinary == []
    assert len(of_first) == len(of_second) == len(first_held) == len(second_held)
    assert {launch.stream for launch in (*first, *second)} == {0x1000}
    assert_same(first, second, of_first, of_second)
    LAUNCHED.update(launch.kernel for launch in first)


def test_every_kernel_was_launched() -> None:
    """By the test above, so it needs it to have run."""
    from trinorm.kernels import row, row_backward

    kernels = {
        name
        for module in (row, row_backward)
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and value.fn.__module__ == module.__name__ and name in vars(rows)
    }
    assert kernels == LAUNCHED


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
@pytest.mark.parametrize("way", ["added", "put in its place"])
def test_a_hook_hears_every_launch(hook: str, way: str, stub: Stub, ordinary: list[str]) -> None:
    x, weight = draw(RMS_NORM, 8, 64, torch.float32, grad=False)
    call(RMS_NORM, x, weight)
    heard: list[str] = []
    ordinary.clear()
    with knobs.runtime.scope():
        if way == "added":
            getattr(knobs.runtime, hook).add(heard.append)
        else:
            setattr(knobs.runtime, hook, heard.append)
        try:
            call(RMS_NORM, x, weight)
            call(RMS_NORM, x, weight, eps=0.5)  # not seen before
            call(RMS_NORM, x, weight, eps=0.5)
        finally:
            if way == "added":
                getattr(knobs.runtime, hook).remove(heard.append)
    assert len(heard) == len(ordinary) == 3
    call(RMS_NORM, x, weight)
    assert len(heard) == len(ordinary) == 3, "nobody listens any more"
    assert len(stub.launches()) == 5


def test_less_alignment_goes_the_ordinary_way(stub: Stub, ordinary: list[str]) -> None:
    x, weight = draw(RMS_NORM, 8, 64, torch.float32, grad=False)
    odd_x, odd_weight = torch.randn(8 * 64 + 1)[1:].view(8, 64), torch.randn(65)[1:]
    call(RMS_NORM, x, weight)
    (aligned,) = stub.launches()
    for inputs in ((odd_x, weight), (x, odd_weight)):
        ordinary.clear()
        call(RMS_NORM, *inputs)
        (odd,) = stub.launches()
        assert ordinary == ["row_forward"]
        assert odd.function != aligned.function
        assert {t.data_ptr() for t in inputs} < set(odd.parameters)
    ordinary.clear()
    call(RMS_NORM, x, weight)
    assert ordinary == []
    assert stub.launches()[0].function == aligned.function


def test_an_odd_first_call_does_not_decide_for_the_aligned_ones(stub: Stub, ordinary: list[str]) -> None:
    x, odd = torch.randn(8, 64), torch.randn(8 * 64 + 1)[1:].view(8, 64)
    for tensor, expected in ((odd, 1), (x, 1), (x, 0), (odd, 1)):
        ordinary.clear()
        call(RMS_NORM, tensor)
        assert len(ordinary) == expected
    functions = [launch.function for launch in stub.launches()]
    assert functions[0] == functions[3] != functions[1] == functions[2]


def variants() -> dict[str, tuple[RowNorm, list[Tensor | None]]]:
    """Calls of one shape that differ in one thing each."""
    x, w, b = torch.randn(8, 64), torch.randn(64), torch.randn(64)
    wide = torch.randn(8, 128)
    return {
        "both": (LAYER_NORM, [x, w, b]),
        "no bias": (LAYER_NORM, [x, w, None]),
        "no weight": (LAYER_NORM, [x, None, b]),
        "neither": (LAYER_NORM, [x, None, None]),
        "rms": (RMS_NORM, [x, w]),
        "x bf16": (LAYER_NORM, [x.bfloat16(), w, b]),
        "weight bf16": (LAYER_NORM, [x, w.bfloat16(), b]),
        "bias fp16": (LAYER_NORM, [x, w, b.half()]),
        "strided": (LAYER_NORM, [wide[:, :64], w, b]),
        "one row for all": (LAYER_NORM, [x[:1].expand(8, 64), w, b]),
        "a gradient": (LAYER_NORM, [x, w.clone().requires_grad_(), b]),
        "a parameter": (LAYER_NORM, [x, torch.nn.Parameter(w.clone(), requires_grad=False), b]),
    }


def test_what_differs_is_kept_apart(stub: Stub, ordinary: list[str]) -> None:
    """Every variant is new the first time, and repeated the second, with what its own first time passed."""
    calls = variants()
    expected: dict[str, Launch] = {}
    for name, (spec, tensors) in calls.items():
        ordinary.clear()
        call(spec, *tensors)  # type: ignore[arg-type]
        assert len(ordinary) == 1, name
        (expected[name],) = stub.launches()
    for name, (spec, tensors) in calls.items():
        ordinary.clear()
        call(spec, *tensors)  # type: ignore[arg-type]
        (found,) = stub.launches()
        present = {t.data_ptr(): str(i) for i, t in enumerate(tensors) if t is not None}
        if len(CALLS._seen) and name not in ("no weight",):
            assert_same([expected[name]], [found], present, present)
        assert ordinary == [], name


def test_eps_is_passed_and_told_apart(stub: Stub) -> None:
    x = torch.randn(8, 64)
    for _ in range(2):
        for eps in (1e-5, 1e-6, 0, None, 0.25):
            functional.rms_norm(x, (64,), None, eps)
            used = 1.1920928955078125e-07 if eps is None else float(eps)
            (bits,) = torch.tensor([used], dtype=torch.float64).view(torch.int64).tolist()
            assert bits in stub.launches()[0].parameters


def test_a_tensors_eps_is_read_each_time(stub: Stub) -> None:
    x, eps = torch.randn(8, 64), torch.tensor(0.5, dtype=torch.float64)
    for value in (0.5, 0.25):
        eps.fill_(value)
        functional.rms_norm(x, (64,), None, eps)  # type: ignore[arg-type]
        assert eps.view(torch.int64).item() in stub.launches()[0].parameters


def test_bad_arguments_are_refused_after_good_ones(stub: Stub) -> None:
    x = torch.randn(8, 64)
    shape = [64]
    functional.rms_norm(x, shape)
    functional.rms_norm(x, (64,), None, 1.0)
    stub.launches()
    shape[0] = 32
    with pytest.raises(RuntimeError, match=r"normalized_shape is \(32,\)"):
        functional.rms_norm(x, shape)
    with pytest.raises(TypeError, match="ints"):
        functional.rms_norm(x, (64.0,))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="write"):
        functional.rms_norm(x, 64)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="eps"):
        functional.rms_norm(x, (64,), None, 1.0 + 0j)  # type: ignore[arg-type]
    assert stub.launches() == []
