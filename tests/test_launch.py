"""launch.py: kernels start on their tensors' device, and what a device is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from trinorm import functional
from trinorm.launch import Device, describe, launch


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


def test_devices_are_described() -> None:
    assert describe(torch.device("cpu")) == Device(132, 227 << 10, dependent_launch=False, programs_wait=False)
    if torch.cuda.is_available():
        here = describe(torch.device("cuda", 0))
        assert here.multiprocessors == torch.cuda.get_device_properties(0).multi_processor_count
        assert here.shared_memory >= 48 << 10


@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams and compiled kernels need a GPU")
def test_a_side_stream_is_used() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    expected = functional.rms_norm(x, (4096,))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        z = x * 1.0
        for _ in range(20):
            z = z * 1.0
        y = functional.rms_norm(z, (4096,))
    stream.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU compiles before its first call")
def test_a_first_call_takes_under_two_seconds(tmp_path: Path) -> None:
    """In a fresh process with an empty cache: importing Triton, compiling and running one forward."""
    script = (
        "import time, torch; from trinorm import functional; x = torch.randn(64, 4096, device='cuda')\n"
        "start = time.perf_counter(); functional.layer_norm(x, (4096,)); torch.cuda.synchronize()\n"
        "print(time.perf_counter() - start)"
    )
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert float(run.stdout) < 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only compiled kernels are counted")
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_a_new_row_count_compiles_nothing(op: str) -> None:
    """Within one launch of the tables, any number of rows and any leading shape run the same binaries."""
    from trinorm.kernels import row, row_backward

    kernels = [row.row_forward, row_backward.row_backward, row_backward.row_backward_few, row_backward.sum_partials]

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
