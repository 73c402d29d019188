"""What reaches the CUDA driver, by the ordinary road and by a repeated call (replay.py), with no GPU.

test_launch.py runs this file in a process of its own, once for each Triton: kernels are compiled here, and CPU tensors
stand for a GPU's (stub_driver.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from norms import SPECS, Roles, assert_same, call, draw
from stub_driver import Launch, Stub
from torch import Tensor
from triton import knobs
from triton.runtime.jit import JITFunction

from trinorm import replay
from trinorm.kernels import row
from trinorm.launch import empty
from trinorm.launch import launch as start
from trinorm.ops import CALLS, calls
from trinorm.ops.hosts import rows
from trinorm.ops.hosts import start as started
from trinorm.spec import RMS_NORM, RowNorm

PROGRAMMATIC_STREAM_SERIALIZATION = 6

# (m, n): every kernel of the library is among what these launch, forward and backward.
PROBLEMS = {
    "few rows": (5, 96),
    "more rows": (100, 640),
    "many rows": (3000, 64),
    "wide": (3, 40000),
    "wide, a power of two": (3, 65536),
}
LAUNCHED: set[str] = set()


def forward_and_backward(
    spec: RowNorm, m: int, n: int, dtype: torch.dtype, stub: Stub
) -> tuple[list[list[Launch]], Roles, list[Tensor]]:
    """What new tensors' call and its gradients launch, what is where, and the tensors, to keep their addresses taken. (The
    scratch of the call is free by the time of the gradients, which may have it for theirs.)
    """
    tensors = draw(spec, m, n, dtype, grad=True)
    y, dy = call(spec, *tensors), torch.randn(m, n).to(dtype)
    forward = stub.launches()
    everything = [y, dy, *tensors, *torch.autograd.grad(y, tensors, dy)]
    return [forward, stub.launches()], {t.data_ptr(): f"tensor {i}" for i, t in enumerate(everything)}, everything


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
    stub.current.stream = 0x1000
    m, n = PROBLEMS[problem]
    first, of_first, first_held = forward_and_backward(spec, m, n, dtype, stub)
    assert ordinary == [launch.kernel for launches in first for launch in launches]
    ordinary.clear()
    second, of_second, second_held = forward_and_backward(spec, m, n, dtype, stub)
    assert ordinary == []
    assert len(of_first) == len(of_second) == len(first_held) == len(second_held)
    assert {launch.stream for part in (*first, *second) for launch in part} == {0x1000}
    for launches in zip(first, second, strict=True):
        assert_same(*launches, of_first, of_second)
    LAUNCHED.update(launch.kernel for launches in first for launch in launches)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    ("n", "dtype"), [(96, torch.float64), *((n, torch.bfloat16) for n in (1, 640, 12288, 40000, 65536))], ids=str
)
def test_other_rows_pass_what_the_ordinary_road_passes(
    spec: RowNorm, n: int, dtype: torch.dtype, stub: Stub, ordinary: list[str], own_from: int
) -> None:
    """Once a number of rows has come, the others of which the launches are the same go the short way, to the same."""
    if own_from == 1:
        pytest.skip("of no other rows")
    short = 0
    for m in (1, 2, 3, 17, 64, 65, 66, 200, 512, 513, 600, 2000):
        if m * n > 1 << 22:
            break
        CALLS.clear()
        expected, of_expected, expected_held = forward_and_backward(spec, m, n, dtype, stub)
        CALLS.clear()
        for other in (1, m + 1, max(1, m - 1)):
            forward_and_backward(spec, other, n, dtype, stub)
        ordinary.clear()
        found, of_found, found_held = forward_and_backward(spec, m, n, dtype, stub)
        short += ordinary == []
        assert len(expected_held) == len(found_held)
        for launches in zip(expected, found, strict=True):
            assert_same(*launches, of_expected, of_found)
    assert short >= 3


def test_any_number_of_rows_in_as_many_dims(stub: Stub, ordinary: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes and strides of results are those of the input; a row count that has come often is recorded for itself."""
    monkeypatch.setattr(calls, "OWN_FROM", 4)
    weight = torch.randn(64)
    for i, leading in enumerate([(2, 5), (3, 7), (1, 1), (4, 1), (7, 2, 3), (2, 7, 3), (), (0, 5), (5, 0)]):
        x = torch.randn(*leading, 64)
        ordinary.clear()
        y = call(RMS_NORM, x, weight)
        assert (y.shape, y.stride()) == (x.shape, torch.empty(x.shape).stride())
        assert bool(ordinary) == (i in (0, 4, 6)), leading
    new = torch.randn(9, 9, 64)
    for times in range(1, 8):
        ordinary.clear()
        call(RMS_NORM, new, weight)
        assert bool(ordinary) == (times == 3), times


def test_rows_beyond_a_turn_are_launched_as_they_should_be(stub: Stub, ordinary: list[str]) -> None:
    """The kernels that one number of rows takes are not those of another."""
    x, many = torch.randn(8, 64), torch.randn(4000, 64)
    for _ in range(2):
        for t, first in ((x, "row_backward_few"), (many, "row_backward")):
            t = t.detach().requires_grad_()
            call(RMS_NORM, t).backward(t.detach())
            assert stub.launches()[-1].kernel == first


def test_every_kernel_was_launched() -> None:
    """By the test above, so it needs it to have run."""
    named = vars(rows) | vars(started)
    kernels = {name for name, value in named.items() if isinstance(value, JITFunction)}
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
    call(RMS_NORM, x, weight, eps=0.5)
    assert len(ordinary) == 4, "what a listener may have had compiled in its own way was not kept"
    call(RMS_NORM, x, weight, eps=0.5)
    assert len(ordinary) == 4
    assert len(stub.launches()) == 7


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


def test_what_comes_back_from_hooks_is_read_as_it_is(stub: Stub) -> None:
    """A saved x of another layout than the calls before it had, by its own strides; of another dtype, as what it was."""
    wide, dy = torch.randn(8, 128), torch.randn(8, 64)

    def contiguous(t: Tensor) -> Tensor:
        return t.clone(memory_format=torch.contiguous_format)

    def backward(unpack: Callable[[Tensor], Tensor] | None) -> Launch:
        x = wide[:, :64].detach().requires_grad_()
        hooks = (
            torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), unpack) if unpack else contextlib.nullcontext()
        )
        with hooks:
            y = call(RMS_NORM, x)
        stub.launches()
        y.backward(dy)
        (launch,) = stub.launches()
        return launch

    strided, again, dense, wider = (backward(unpack) for unpack in (None, None, contiguous, torch.Tensor.double))
    assert 128 in strided.parameters
    assert strided.function == again.function
    assert 128 in again.parameters
    assert 128 not in dense.parameters
    assert (wider.function, wider.parameters[-4:]) == (dense.function, dense.parameters[-4:])
    assert 128 not in wider.parameters


def test_what_a_hook_left_elsewhere_is_not_read(stub: Stub) -> None:
    """By a recalled backward either, whose launch would take whatever address it has."""
    x, weight = (torch.randn(*shape, requires_grad=True) for shape in ((8, 64), (64,)))
    for _ in range(4):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), lambda t: t):
            call(RMS_NORM, x, weight).backward(torch.ones_like(x))
    assert stub.launches()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), lambda t: t.to("meta")):
        y = call(RMS_NORM, x, weight)
    stub.launches()
    with pytest.raises(RuntimeError, match="device"):
        y.backward(torch.ones_like(x))
    assert stub.launches() == []


def test_a_kernels_own_hook_hears_every_launch(stub: Stub, ordinary: list[str]) -> None:
    x, heard = torch.randn(8, 64), []
    call(RMS_NORM, x)
    row.row_forward.add_pre_run_hook(lambda *args, **kwargs: heard.append(1))
    try:
        call(RMS_NORM, x)
        call(RMS_NORM, x)
    finally:
        row.row_forward.pre_run_hooks.clear()
    assert len(heard) == 2
    ordinary.clear()
    call(RMS_NORM, x)
    assert ordinary == []


def test_a_call_is_recorded_when_it_comes_again(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # what the other tests need
    run, recorded = replay.record, []
    monkeypatch.setattr(replay, "record", lambda *args, **how: (recorded.append(1), run(*args, **how))[1])
    x, dy = torch.randn(8, 64, requires_grad=True), torch.randn(8, 64)
    for expected in (0, 2, 2, 2):  # of a forward and a backward
        call(RMS_NORM, x).backward(dy)
        assert len(recorded) == expected
    functions = [launch.function for launch in stub.launches()]
    assert functions[:2] * 4 == functions


def test_a_copy_is_as_good_as_what_the_next_call_copies(stub: Stub, ordinary: list[str]) -> None:
    """What has to be copied for the kernels is copied again, and the launches of the copies are repeated."""
    for times in range(3):
        ordinary.clear()
        x, weight = torch.randn(64, 8).T.requires_grad_(), torch.randn(128)[::2].requires_grad_()
        call(RMS_NORM, x, weight).backward(torch.randn(8, 64))
        assert bool(ordinary) == (times == 0)
        forward, backward, *_ = stub.launches()
        given = {x.data_ptr(), weight.data_ptr()}
        assert not given & {*forward.parameters, *backward.parameters}
        assert x.grad is not None and x.grad.shape == x.shape


def test_another_device_goes_the_ordinary_way(stub: Stub, ordinary: list[str]) -> None:
    x = torch.randn(8, 64, requires_grad=True)
    for device, expected in ((0, 1), (0, 0), (1, 1), (0, 0)):
        stub.current.device = device
        ordinary.clear()
        y = call(RMS_NORM, x)
        assert len(ordinary) == expected
        (forward,) = stub.launches()
        y.sum().backward()
        assert len(ordinary) == 2 * expected
        (backward,) = stub.launches()
        assert (forward.kernel, backward.kernel) == ("row_forward", "row_backward_few")


def test_each_call_takes_the_stream_of_its_time(stub: Stub) -> None:
    x = torch.randn(8, 64, requires_grad=True)
    for stream in (0, 0x10, 0x20, 0):
        stub.current.stream = stream
        y = call(RMS_NORM, x)
        stub.current.stream = 0x30
        y.sum().backward()
        assert [launch.stream for launch in stub.launches()] == [stream, 0x30]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("n", [96, 640, 4096])
def test_few_binaries_serve_every_call_of_a_width(spec: RowNorm, n: int, stub: Stub) -> None:
    """However many rows come, in whatever leading shape, aligned strides and eps. 4096 columns have all launches that there
    are: forward three, backward two for few rows, two for many, and one that sums their partials.
    """
    weight = torch.randn(n, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(n, dtype=torch.bfloat16, requires_grad=True) if spec.center else None
    packed = torch.empty(40000, 2 * n, dtype=torch.bfloat16)
    for i, m in enumerate((1, 2, 5, 31, 64, 65, 100, 300, 512, 513, 2000, 9999, 40000)):
        for x in (packed[:m, :n], torch.empty(m, n, dtype=torch.bfloat16), torch.empty(1, m, 1, n, dtype=torch.bfloat16)):
            x = x.detach().requires_grad_()
            call(spec, x, weight, bias, eps=1e-6 * (1 + i)).backward(
                torch.empty_like(x, memory_format=torch.contiguous_format)
            )
    binaries: dict[str, set[int]] = {}
    for launch in stub.launches():
        binaries.setdefault(launch.kernel, set()).add(launch.function)
    assert {"row_forward", "row_backward"} <= set(binaries)
    at_most = dict(row_forward=3, row_backward_few=2, row_backward=2, sum_partials=1)
    assert {kernel: len(of) for kernel, of in binaries.items() if len(of) > at_most[kernel]} == {}


@triton.jit
def copy(Y, X, N: tl.constexpr):
    columns = tl.arange(0, N)
    tl.store(Y + columns, tl.load(X + columns))


def copied(x: Tensor, **options: object) -> tuple[Tensor, None]:
    y = empty(x, x.dtype, x.device)
    start(copy, (1,), x.device, (y, x), dict(N=64, enable_fp_fusion=True, **options))
    return y, None


def test_launch_options_are_repeated(stub: Stub) -> None:
    x = torch.randn(64)
    _, again = replay.record(lambda x: copied(x, launch_pdl=True, num_warps=2), x)
    assert again is not None
    again(x)
    first, second = stub.launches()
    assert first.attributes == second.attributes == (PROGRAMMATIC_STREAM_SERIALIZATION,)
    assert first.block == second.block == 64


def test_only_launched_results_are_repeated(stub: Stub) -> None:
    """What torch's own ops compute is not seen by the one who repeats."""
    x = torch.randn(64)
    for function in (lambda x: (copied(x)[0] * 2, None), lambda x: (x * 2, None)):
        assert replay.record(function, x)[1] is None
    assert replay.record(copied, x)[1] is not None
