"""What is predicted of a kernel from what it compiles to, with made-up kernels."""

from dataclasses import replace

import pytest
import torch

from trinorm.bench.cases import Case
from trinorm.bench.predict import Kernel, Prediction
from trinorm.inspection import Call, Compiled
from trinorm.targets import TARGETS

CODE = Compiled(
    kernel="made_up",
    target="sm_90",
    warps=4,
    registers=32,
    spills=0,
    shared=0,
    loads={128: 1},
    stores={128: 1},
    instructions={"global load": 10, "fma": 90},
    loop={},
    loop_bytes=0,
)


def kernel(programs: int, nbytes: int, code: Compiled = CODE) -> Kernel:
    tensor = torch.empty(nbytes, dtype=torch.uint8, device="meta")
    return Kernel(Call(None, (programs, 1), (None, tensor, (3, 4), 1e-6), {}), code, code)


def prediction(*kernels: Kernel, pass_: str = "forward", m: int = 1024, n: int = 1024) -> Prediction:
    return Prediction(Case("rms_norm", pass_, (m, n), torch.bfloat16, torch.bfloat16), "sm_90", kernels)


def test_straight_code_runs_once_in_every_warp() -> None:
    assert kernel(programs=6, nbytes=1 << 20).instructions == 6 * 4 * 100


def test_a_loop_runs_until_all_bytes_are_moved() -> None:
    # 2 programs × 4 warps × 32 threads × 64 bytes are 16 KiB a turn.
    code = replace(CODE, loop={"fma": 30}, loop_bytes=64)
    assert kernel(programs=2, nbytes=10 * (16 << 10), code=code).instructions == 2 * 4 * (70 + 10 * 30)
    # And once where there is less than one turn's.
    assert kernel(programs=2, nbytes=1, code=code).instructions == 2 * 4 * 100


def test_what_runs_is_the_ordinary_code_and_what_fits_is_the_whole() -> None:
    whole = replace(CODE, registers=128, instructions={"fma": 5000})
    mixed = replace(kernel(programs=10**6, nbytes=1), compiled=whole)
    assert mixed.instructions == 10**6 * 4 * 100
    assert (mixed.occupancy.programs, mixed.occupancy.limit) == (4, "registers")


def test_time_is_a_launch_and_the_larger_bound_of_each_kernel() -> None:
    speed = TARGETS["sm_90"].speed
    assert speed is not None
    moving, computing = kernel(programs=132, nbytes=43 << 20), kernel(programs=132 * 4 * 1000, nbytes=1)
    assert moving.memory_us == pytest.approx((43 << 20) / 4.3e6)
    assert computing.issue_us == pytest.approx(1000 * 4 * 100 / speed.clock * 1e6)
    found = prediction(moving, computing).microseconds
    assert found == pytest.approx(moving.memory_us + computing.issue_us + 2e6 * speed.launch)


@pytest.mark.parametrize(("pass_", "tensors"), [("forward", 2), ("backward", 3)])
def test_what_does_as_the_ceiling_does_takes_its_time(pass_: str, tensors: int) -> None:
    moved = tensors * 1024 * 1024 * 2
    assert prediction(kernel(1, moved), pass_=pass_).ceiling_ratio == pytest.approx(1)
    assert prediction(kernel(1, 2 * moved), pass_=pass_, m=10**6).ceiling_ratio != pytest.approx(1)


def test_a_target_nobody_measured_has_no_times() -> None:
    code = replace(CODE, target="sm_80")
    of = kernel(programs=6, nbytes=1 << 20, code=code)
    assert (of.memory_us, of.issue_us) == (None, None)
    found = replace(prediction(of), target="sm_80")
    assert (found.microseconds, found.ceiling_ratio) == (None, None)
