"""launch.py and replay.py: kernels start on their tensors' device and stream, the first time and when repeated."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trinorm import functional, inspection, replay
from trinorm.launch import _prepare_triton, describe, launch
from trinorm.ops import CALLS, channel
from trinorm.ops.calls import Bounded
from trinorm.ops.hosts import rows
from trinorm.spec import LAYER_NORM, RMS_NORM, RowNorm
from trinorm.targets import TARGETS


class _Kernel:
    """Stands for a kernel: remembers what it was started with, and on which device."""

    def __init__(self) -> None:
        self.started: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def start(*args: Any, **options: Any) -> None:
            device = torch.cuda.current_device() if torch.cuda.is_available() else None
            self.started.append((grid, args, options, device))

        return start


def test_arguments_arrive_as_given() -> None:
    kernel = _Kernel()
    launch(kernel, (3, 2), torch.device("cpu"), (1, None), {"N": 8})
    assert kernel.started[0][:3] == ((3, 2), (1, None), {"N": 8})


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_a_second_device_is_made_current_for_the_launch_and_no_longer() -> None:
    kernel = _Kernel()
    launch(kernel, (1,), torch.device("cuda:1"), (), {})
    assert kernel.started[0][3] == 1
    assert torch.cuda.current_device() == 0
    x = torch.randn(4, 64, device="cuda:1")
    assert functional.rms_norm(x, (64,)).device == x.device


def test_a_full_memory_starts_anew() -> None:
    seen: Bounded[int] = Bounded(3)
    for i in (0, 1, 2, 2, 1, 0):
        seen[i] = 10 * i
    assert seen == {0: 0, 1: 10, 2: 20}
    seen[3] = 30
    assert seen == {3: 30}


def test_the_memory_of_calls_is_bounded(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    for kept in ("_own", "_of_any_rows", "_met"):
        monkeypatch.setattr(CALLS, kept, Bounded(4))
    for m in range(1, 8):
        functional.rms_norm(torch.randn(m, 8, device=device), (8,))
        functional.rms_norm(torch.randn(m, 9, device=device)[:, :8], (8,))
        functional.rms_norm(torch.randn(8, m, device=device), (m,))
        assert all(len(kept) <= 4 for kept in (CALLS._own, CALLS._of_any_rows, CALLS._met))
    assert CALLS._own
    assert CALLS._of_any_rows
    x = torch.randn(1, 8, device=device)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for grad in (False, True):
            for parameters in (torch.float32, torch.float64):
                functional.rms_norm(
                    x.to(dtype, copy=True).requires_grad_(grad), (8,), torch.ones(8, dtype=parameters, device=device)
                )
    assert max(map(len, CALLS._of_any_rows.values())) == 8


def test_the_interpreter_is_not_repeated() -> None:
    """It hands back no compiled kernel."""
    kernel = _Kernel()

    def function(x: torch.Tensor) -> tuple[torch.Tensor, None]:
        y = torch.empty_like(x)
        launch(kernel, (1,), x.device, (y, x), {})
        return y, None

    x = torch.randn(4)
    (y, _), again = replay.record(function, x)
    assert y is kernel.started[0][1][0]
    assert again is None


class _Operators(TorchDispatchMode):
    """The names of ATen's operators that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("spec", [LAYER_NORM, RMS_NORM], ids=lambda spec: spec.name)
@pytest.mark.parametrize("size", [(5, 96), (100, 640), (3000, 64), (3, 40000)], ids=str)
def test_between_inputs_and_launches_memory_is_only_allocated(spec: RowNorm, size: tuple[int, int]) -> None:
    """What else torch's own operators did would be missing from a repeated call."""
    x, dy, weight = (torch.empty(shape, device="meta") for shape in (size, size, size[1:]))
    with inspection.recorded() as calls, _Operators() as operators:
        _, mean, rstd = rows.forward(spec, x, 1, weight, weight, 1e-5, save=True)
        assert rstd is not None
        rows.backward(spec, dy, x, 1, weight, mean, rstd, dx=True, dw=weight.dtype, db=weight.dtype)
    assert len(calls) >= 2
    assert operators.called <= {"aten::empty.memory_format", "aten::empty_like"}


# Other Tritons to try the launch path with, as folders to import them from, beside the one that is installed.
TRITONS = ["", *filter(None, os.environ.get("TRINORM_TRITONS", "").split(os.pathsep))]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU its own driver is there, and the tests below run on it")
@pytest.mark.parametrize("triton", TRITONS)
def test_what_reaches_the_driver(triton: str) -> None:
    """stub/, in a process in which the kernels are compiled, and a stub of the CUDA driver writes down what it is given."""
    stub = Path(__file__).parent / "stub"
    environment = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    environment["PYTHONPATH"] = os.pathsep.join([*filter(None, [triton]), *sys.path])
    environment["CUDA_VISIBLE_DEVICES"] = ""
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", f"--confcutdir={stub}"]
    files = "launched", "told_apart", "registered", "images", "heads", "conditioned", "threads"
    command = [
        sys.executable,
        "-m",
        "pytest",
        *options,
        *(str(stub / f"{file}.py") for file in files),
    ]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_devices_are_described() -> None:
    h200 = TARGETS["sm_90"].device
    assert describe(torch.device("meta")) == h200
    assert describe(torch.device("cpu")) == replace(h200, dependent_launch=False, programs_wait=False)
    if torch.cuda.is_available():
        here, properties = describe(torch.device("cuda", 0)), torch.cuda.get_device_properties(0)
        assert here.multiprocessors == properties.multi_processor_count
        assert 48 << 10 <= here.shared_of_program <= here.shared
        if "H200" in properties.name:
            assert replace(here, memory=h200.memory) == h200
            assert here.memory == pytest.approx(h200.memory, rel=0.02)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="only compiled kernels are repeated")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")


@pytest.fixture
def ordinary(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels started by Triton's own way. A repeated call does not show here."""
    from triton.runtime.jit import JITFunction

    started: list[str] = []
    run = JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda self, *a, **k: (started.append(self.fn.__name__), run(self, *a, **k))[1])
    return started


def _norm_and_gradients(op: str, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    n = x.shape[-1]
    ramp = torch.linspace(0.5, 1.5, n, device=x.device).to(x.dtype)
    inputs = [t.detach().requires_grad_() for t in ((x, ramp, -ramp) if op == "layer_norm" else (x, ramp))]
    y = getattr(functional, op)(inputs[0], (n,), *inputs[1:])
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


@needs_gpu
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("size", [(128, 768), (5, 96), (3000, 64), (4, 3, 4096), (3, 40000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_repeated_call_gives_the_same_bits(
    op: str, size: tuple[int, ...], dtype: torch.dtype, ordinary: list[str]
) -> None:
    x, dy, other = (torch.randn(size, device="cuda").to(dtype) for _ in range(3))
    first = _norm_and_gradients(op, x, dy)
    assert ordinary
    ordinary.clear()
    _norm_and_gradients(op, other, other)  # leaves other values in the memory that is used again
    second = _norm_and_gradients(op, x, dy)
    assert ordinary == []
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@needs_gpu
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_a_side_stream_is_used(op: str, ordinary: list[str]) -> None:
    """By the first call there and by a repeated one: x is ready on that stream alone."""
    x, dy = torch.randn(4096, 4096, device="cuda"), torch.randn(4096, 4096, device="cuda")
    expected = _norm_and_gradients(op, x, dy)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    for repeated in (False, True):
        if not repeated:
            CALLS.clear()
        ordinary.clear()
        with torch.cuda.stream(stream):
            z = x * 0.0
            for _ in range(20):
                z = z * 1.0
            z = z + x
            found = _norm_and_gradients(op, z, dy)
        stream.synchronize()
        assert bool(ordinary) != repeated
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


@needs_gpu
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm", "group_norm", "channel_layer_norm"])
def test_many_threads_at_once(op: str) -> None:
    """Each with its own stream, values and eps, and sizes that others have too, from the first call on; and gradients.
    stub/threads.py does so without a GPU.
    """
    of_rows = op in ("layer_norm", "rms_norm")
    told = {"layer_norm": ((768,),), "rms_norm": ((768,),), "group_norm": (4,), "channel_layer_norm": ()}[op]
    sample = (768,) if of_rows else (12, 8, 8)
    drawn = [[torch.randn(m, *sample, device="cuda", requires_grad=True) for m in (8, 16 + i % 2, 128)] for i in range(8)]
    weights = [torch.randn(sample[0], device="cuda", requires_grad=True) for _ in range(8)]
    eps = [0.1 * (1 + i % 3) for i in range(8)]

    def results(i: int, j: int) -> list[torch.Tensor]:
        x, weight = drawn[i][j % 3], weights[i]
        y = getattr(functional, op)(x, *told, weight, eps=eps[i])
        return [y.detach(), *torch.autograd.grad(y, (x, weight), x.detach())]

    expected = [[results(i, j) for j in range(3)] for i in range(8)]
    for calls in (CALLS, channel.CALLS):
        calls.clear()
    start_line, wrong = threading.Barrier(8), []

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            start_line.wait()
            for j in range(300):
                found = results(i, j)
                if j % 50 < 3 and not all(torch.equal(a, b) for a, b in zip(found, expected[i][j % 3], strict=True)):
                    wrong.append((i, j))

    torch.cuda.synchronize()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert wrong == []


@needs_gpu
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("repeated", [False, True])
def test_captured_in_a_graph(op: str, repeated: bool, ordinary: list[str]) -> None:
    x, dy = torch.randn(128, 768, device="cuda"), torch.randn(128, 768, device="cuda")
    for _ in range(2):
        _norm_and_gradients(op, x, dy)
    if not repeated:
        CALLS.clear()
    torch.cuda.synchronize()
    ordinary.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _norm_and_gradients(op, x, dy)
    assert bool(ordinary) != repeated
    for values in (torch.randn_like(x), torch.randn_like(x)):
        x.copy_(values)
        graph.replay()
        for a, b in zip(captured, _norm_and_gradients(op, values, dy), strict=True):
            assert torch.equal(a, b)


@needs_two_gpus
def test_calls_on_two_devices_are_kept_apart(ordinary: list[str]) -> None:
    """Whichever is current; a tensor of the other device goes the ordinary way."""
    tensors = {i: torch.randn(128, 768, device=f"cuda:{i}") for i in (0, 1)}
    expected = {i: _norm_and_gradients("rms_norm", x.to("cuda:0"), x.to("cuda:0")) for i, x in tensors.items()}
    for current in (0, 1, 0, 1):
        with torch.cuda.device(current):
            for i, x in tensors.items():
                found = _norm_and_gradients("rms_norm", x, x)
                for a, b in zip(found, expected[i], strict=True):
                    assert a.device == x.device
                    assert torch.equal(a.cpu(), b.cpu())
    ordinary.clear()
    functional.rms_norm(tensors[0], (768,))
    functional.rms_norm(tensors[0], (768,))
    assert len(ordinary) == 1
    functional.rms_norm(tensors[1], (768,))
    functional.rms_norm(tensors[1], (768,))
    assert len(ordinary) == 3, "recorded under its own device, never repeated while the other is current"


@needs_gpu
def test_a_profiler_that_comes_later_hears_every_launch() -> None:
    from triton import knobs

    x = torch.randn(8, 768, device="cuda")
    functional.rms_norm(x, (768,))
    functional.rms_norm(x, (768,))
    heard: list[object] = []
    knobs.runtime.launch_enter_hook.add(heard.append)
    try:
        functional.rms_norm(x, (768,))
    finally:
        knobs.runtime.launch_enter_hook.remove(heard.append)
    functional.rms_norm(x, (768,))
    assert len(heard) == 1


def test_triton_is_prepared_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its key and its driver: each waits here for the other. Where Triton has no such key, nothing is done."""
    from triton.runtime import cache, driver

    met = threading.Barrier(2, timeout=60)
    monkeypatch.setattr(driver, "_active", SimpleNamespace(get_current_device=met.wait))
    monkeypatch.setattr(cache, "triton_key", met.wait)
    _prepare_triton()
    monkeypatch.delattr(cache, "triton_key")
    met.abort()
    _prepare_triton()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU compiles before its first call")
def test_a_first_call_takes_under_two_seconds(tmp_path: Path) -> None:
    """In a fresh process with an empty cache: importing Triton, compiling and running one forward. The second of two such
    processes is timed, as the first may wait for a disk to bring Triton's files.
    """
    if os.getloadavg()[0] > (os.cpu_count() or 1) / 4:
        pytest.skip("the machine has more to do, which the clock would count; to be run alone")
    script = (
        "import time, torch; from trinorm import functional; x = torch.randn(64, 4096, device='cuda')\n"
        "start = time.perf_counter(); functional.layer_norm(x, (4096,)); torch.cuda.synchronize()\n"
        "print(time.perf_counter() - start)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for cache in ("read", "timed"):
        environment["TRITON_CACHE_DIR"] = str(tmp_path / cache)
        run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert float(run.stdout) < 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only compiled kernels are counted")
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_a_new_row_count_compiles_nothing(op: str) -> None:
    """Within one launch of the tables, any number of rows and any leading shape run the same binaries."""
    from trinorm.kernels import partials, row, row_backward

    kernels = [row.row_forward, row_backward.row_backward, row_backward.row_backward_few, partials.sum_partials]

    def binaries() -> int:
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    def run(*leading: int) -> None:
        x = torch.randn(*leading, 640, device="cuda", requires_grad=True)
        weight = torch.randn(640, device="cuda", requires_grad=True)
        getattr(functional, op)(x, (640,), weight).sum().backward()
        getattr(functional, op)(x.detach().transpose(0, 1), (640,), weight)

    # One for each launch of the tables (few rows, very few, many, more than L2 holds), and for one to three levels of dims.
    for leading in ((2, 3), (2, 100), (2, 300), (5, 3000), (1, 1), (2, 2, 2)):
        run(*leading)
    before = binaries()
    for leading in ((3, 5), (4, 7), (16, 16), (7, 201), (5, 2003), (1, 9), (4, 3, 7)):
        run(*leading)
    assert binaries() == before
