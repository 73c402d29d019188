"""How many programs fit on a multiprocessor."""

import pytest

from trinorm.targets import TARGETS, occupancy

MANY = 10**6


@pytest.mark.parametrize(
    ("warps", "registers", "programs"),
    [(8, 40, 6), (4, 167, 3), (4, 48, 10), (4, 255, 2), (4, 128, 4), (1, 80, 24), (8, 195, 1)],
)
def test_registers_allow_what_nsight_compute_says(warps: int, registers: int, programs: int) -> None:
    """Its "Block Limit Registers" of seven launches on an H200."""
    found = occupancy(TARGETS["sm_90"], warps, registers, shared=0, grid=MANY)
    assert (found.programs, found.warps, found.limit) == (programs, programs * warps, "registers")


@pytest.mark.parametrize(
    ("target", "warps", "shared", "grid", "programs", "limit"),
    [
        ("sm_90", 1, 0, MANY, 32, "programs"),
        ("sm_90", 4, 0, MANY, 16, "warps"),
        ("sm_90", 32, 0, MANY, 2, "warps"),
        # 228 KiB, of which each program takes one more than it asks for.
        ("sm_90", 4, 113 << 10, MANY, 2, "shared memory"),
        ("sm_90", 4, (113 << 10) + 1, MANY, 1, "shared memory"),
        ("sm_90", 4, 227 << 10, MANY, 1, "shared memory"),
        ("gfx942", 4, 0, MANY, 8, "warps"),
        ("gfx942", 4, 32 << 10, MANY, 2, "shared memory"),
        # No more than there are.
        ("sm_90", 4, 0, 132, 1, "grid"),
        ("sm_90", 4, 0, 133, 2, "grid"),
    ],
)
def test_the_scarcest_resource_limits(target: str, warps: int, shared: int, grid: int, programs: int, limit: str) -> None:
    found = occupancy(TARGETS[target], warps, registers=16, shared=shared, grid=grid)
    assert (found.programs, found.limit) == (programs, limit)


def test_a_program_may_have_all_that_a_launch_is_sized_by() -> None:
    for target in TARGETS.values():
        assert occupancy(target, 4, 32, target.device.shared_of_program, MANY).programs == 1
