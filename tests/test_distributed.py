"""ops/sharding.py, and torch.distributed over the modules: two ranks, beside one process that has it all.

Over gloo on a CPU, where the kernels run through the interpreter; over NCCL where there are two GPUs. Everything is
float64, and close as torch.testing says.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from machine import ON_GPU
from trinorm import functional, nn
from trinorm.ops import CALLS, rows
from trinorm.spec import LAYER_NORM, RMS_NORM, RowNorm

SHAPE = 4, 4, 8


@pytest.mark.skipif(ON_GPU and torch.cuda.device_count() < 2, reason="two ranks over NCCL need two GPUs")
def test_two_ranks(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(run, (tmp_path / "rendezvous",), nprocs=2)


def run(rank: int, rendezvous: Path) -> None:
    warnings.filterwarnings("error", "trinorm")  # which says that torch's operator runs, not a kernel
    device = "cuda" if ON_GPU else "cpu"
    if ON_GPU:
        torch.cuda.set_device(rank)
    options = dict(rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
    dist.init_process_group("nccl" if ON_GPU else "gloo", init_method=f"file://{rendezvous}", **options)
    mesh = init_device_mesh(device, (2,))
    rules_come_with_the_first_distributed_tensor(mesh)
    for check, spec in itertools.product(CHECKS, (LAYER_NORM, RMS_NORM)):
        torch.manual_seed(0)
        check(spec, mesh)
    dist.destroy_process_group()


def norm(spec: RowNorm, shape: tuple[int, ...] = (8,)) -> Callable[..., Tensor]:
    return lambda x, *parameters: getattr(functional, spec.name)(x, shape, *parameters, eps=1e-5)


def tensors(spec: RowNorm, mesh: DeviceMesh, shape: tuple[int, ...] = (8,)) -> tuple[Tensor, list[Tensor]]:
    """(dy, [x, weight, bias where there is one]), the same on each rank."""
    shapes = SHAPE, SHAPE, shape, *[shape] * spec.center
    dy, *inputs = (torch.randn(shape, dtype=torch.float64).to(mesh.device_type) for shape in shapes)
    return dy, inputs


def lay(t: Tensor, mesh: DeviceMesh, placement: Placement) -> Tensor:
    """t on the mesh. Partial: each rank has half of it."""
    if isinstance(placement, Partial):
        return DTensor.from_local(t / 2, mesh, [placement])
    return distribute_tensor(t, mesh, [placement])


def lay_all(inputs: list[Tensor], mesh: DeviceMesh, of_x: Placement, of_parameters: Placement) -> list[Tensor]:
    return [lay(t, mesh, of_parameters if i else of_x) for i, t in enumerate(inputs)]


def results(
    f: Callable[..., Tensor], dy: Tensor, inputs: list[Tensor], wanted: tuple[bool, ...] = (True,) * 3
) -> list[Any]:
    """f's value and the gradients that are wanted."""
    inputs = [t.detach().requires_grad_(is_wanted) for t, is_wanted in zip(inputs, wanted, strict=False)]
    y = f(*inputs)
    return [y.detach(), *torch.autograd.grad(y, [t for t in inputs if t.requires_grad], dy)]


def assert_same(found: list[Any], expected: list[Any]) -> None:
    whole = [t.full_tensor() if isinstance(t, DTensor) else t for t in found]
    torch.testing.assert_close(whole, expected)


@contextlib.contextmanager
def by_kernels() -> Iterator[None]:
    """That kernels of both directions are launched on this rank."""
    CALLS.clear()  # what other shards had recorded would be repeated, past who looks at launches here
    names: set[str] = set()
    actual = rows.launch
    rows.launch = lambda kernel, *args: (names.add(kernel.__name__), actual(kernel, *args))[1]
    try:
        yield
    finally:
        rows.launch = actual
    assert all(any(name.startswith(f"row_{direction}") for name in names) for direction in ("forward", "backward"))


# DTensors, and what else torch.distributed wraps.


def rules_come_with_the_first_distributed_tensor(mesh: DeviceMesh) -> None:
    x = DTensor.from_local(torch.ones(2, 8, device=mesh.device_type), mesh, [Shard(0)])
    assert "trinorm.ops.sharding" not in sys.modules
    # As rows stay where they are, the ranks need not do the same.
    if mesh.get_rank() == 0:
        torch.ops.trinorm.rms_norm(x, (8,), None, 1e-5, False, "output")
    else:
        with torch.inference_mode():
            functional.rms_norm(x, (8,))


LAYOUTS: list[tuple[tuple[int, ...], tuple[Placement, ...], tuple[Placement, ...]]] = [
    # normalized_shape; how x, the parameters and dy lie; how y, dx and the parameters' gradients do.
    ((8,), (Shard(0), Replicate(), Shard(0)), (Shard(0), Shard(0), Partial())),
    ((8,), (Shard(1), Replicate(), Shard(1)), (Shard(1), Shard(1), Partial())),
    ((4, 8), (Shard(0), Replicate(), Shard(0)), (Shard(0), Shard(0), Partial())),
    ((8,), (Replicate(), Replicate(), Replicate()), (Replicate(), Replicate(), Replicate())),
    # Parameters sharded as FSDP does are gathered.
    ((8,), (Shard(0), Shard(0), Shard(0)), (Shard(0), Shard(0), Partial())),
    # So is what is sharded by a normalized dim; a larger one would be sharded by rows.
    ((8,), (Shard(2), Replicate(), Shard(2)), (Replicate(), Replicate(), Replicate())),
    ((4, 8), (Shard(1), Replicate(), Shard(1)), (Replicate(), Replicate(), Replicate())),
    # Sums are taken first.
    ((8,), (Partial(), Replicate(), Shard(0)), (Shard(0), Shard(0), Partial())),
    ((8,), (Shard(0), Replicate(), Partial()), (Shard(0), Shard(0), Partial())),
    # dy need not lie as y did.
    ((8,), (Replicate(), Replicate(), Shard(1)), (Replicate(), Shard(1), Partial())),
]


def every_layout(spec: RowNorm, mesh: DeviceMesh) -> None:
    for shape, (of_x, of_parameters, of_dy), laid in LAYOUTS:
        dy, inputs = tensors(spec, mesh, shape)
        with by_kernels():
            found = results(norm(spec, shape), lay(dy, mesh, of_dy), lay_all(inputs, mesh, of_x, of_parameters))
        assert [t.placements for t in found] == [(p,) for p in (*laid, *laid[2:] * spec.center)], (
            of_x,
            of_parameters,
            of_dy,
        )
        assert_same(found, results(norm(spec, shape), dy, inputs))


def gradients_wanted_in_any_order(spec: RowNorm, mesh: DeviceMesh) -> None:
    """DTensor asks for a rule once, and these calls have the same layouts."""
    dy, inputs = tensors(spec, mesh)
    dy_there, there = lay(dy, mesh, Shard(0)), lay_all(inputs, mesh, Shard(0), Replicate())
    for wanted in itertools.product((False, True), repeat=len(inputs)):
        if any(wanted):
            assert_same(results(norm(spec), dy_there, there, wanted), results(norm(spec), dy, inputs, wanted))


def another_normalized_shape(spec: RowNorm, mesh: DeviceMesh) -> None:
    """The same."""
    x = tensors(spec, mesh)[1][0]
    for shape in ((8,), (4, 8), (8,)):
        assert_same([norm(spec, shape)(lay(x, mesh, Shard(1)))], [norm(spec, shape)(x)])


def second_derivatives(spec: RowNorm, mesh: DeviceMesh) -> None:
    def second(inputs: list[Tensor]) -> list[Any]:
        inputs = [t.detach().requires_grad_() for t in inputs]
        first = torch.autograd.grad(norm(spec)(*inputs).sin().sum(), inputs, create_graph=True)
        return [*first, *torch.autograd.grad(sum(t.cos().sum() for t in first[:2]), inputs[:2])]

    inputs = tensors(spec, mesh)[1]
    assert_same(second(lay_all(inputs, mesh, Shard(0), Replicate())), second(inputs))


def compiled(spec: RowNorm, mesh: DeviceMesh) -> None:
    def f(x: Tensor, *parameters: Tensor) -> Tensor:
        return norm(spec)(x * 2, *parameters)

    dy, inputs = tensors(spec, mesh)
    given = lay(dy, mesh, Shard(0)), lay_all(inputs, mesh, Shard(0), Replicate())
    graph, eager = results(torch.compile(f, fullgraph=True, backend="aot_eager"), *given), results(f, *given)
    assert [t.placements for t in graph] == [t.placements for t in eager]
    assert all(torch.equal(a.to_local(), b.to_local()) for a, b in zip(graph, eager, strict=True))


def results_on_their_way(spec: RowNorm, mesh: DeviceMesh) -> None:
    """What a tensor-parallel layer hands to the norm after it, where that is not parallel itself."""

    def after_a_sum(x: Tensor, *parameters: Tensor) -> Tensor:
        x = lay(x, mesh, Partial()).redistribute(mesh, [Replicate()], async_op=True).to_local()
        assert type(x) is AsyncCollectiveTensor
        return norm(spec)(x, *parameters)

    of_parameters = False, True, True
    dy, inputs = tensors(spec, mesh)
    with by_kernels():
        found = results(after_a_sum, dy, inputs, of_parameters)
    assert_same(found, results(norm(spec), dy, inputs, of_parameters))


def tensors_of_two_kinds_are_refused(spec: RowNorm, mesh: DeviceMesh) -> None:
    """As torch refuses them."""
    x, weight, *_ = tensors(spec, mesh)[1]
    for given in ((lay(x, mesh, Shard(0)), weight), (x, lay(weight, mesh, Replicate()))):
        with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
            norm(spec)(*given)


# Modules.


def module(spec: RowNorm, mesh: DeviceMesh) -> torch.nn.Module:
    return (nn.LayerNorm if spec.center else nn.RMSNorm)(8, device=mesh.device_type, dtype=torch.float64)


def mine(t: Tensor, dim: int = 0) -> Tensor:
    """This rank's half."""
    return t.chunk(2, dim)[dist.get_rank()]


def gradients(model: torch.nn.Module) -> list[Any]:
    return [p.grad for p in model.parameters()]


def sequence_parallel(spec: RowNorm, mesh: DeviceMesh) -> None:
    alone = module(spec, mesh)
    parallel = parallelize_module(copy.deepcopy(alone), mesh, SequenceParallel())
    dy, (x, *_) = tensors(spec, mesh)
    whole, part = x.clone().requires_grad_(), mine(x, 1).clone().requires_grad_()
    alone(whole).backward(dy)
    with by_kernels():
        y = parallel(part)
        y.to_local().backward(mine(dy, 1))
    assert y.placements == (Shard(1),)
    assert_same([part.grad, *gradients(parallel)], [mine(whole.grad, 1), *gradients(alone)])


def fully_sharded(spec: RowNorm, mesh: DeviceMesh) -> None:
    train_wrapped(lambda model: fully_shard(model, mesh=mesh), spec, mesh)


def data_parallel(spec: RowNorm, mesh: DeviceMesh) -> None:
    train_wrapped(DistributedDataParallel, spec, mesh)


def train_wrapped(wrap: Callable[[torch.nn.Module], torch.nn.Module], spec: RowNorm, mesh: DeviceMesh) -> None:
    """Two steps on batches that the ranks share."""
    linear = torch.nn.Linear(8, 8, device=mesh.device_type, dtype=torch.float64)
    alone = torch.nn.Sequential(linear, module(spec, mesh), copy.deepcopy(linear))
    shared = wrap(copy.deepcopy(alone))
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (alone, shared)]
    for _ in range(2):
        x = torch.randn(SHAPE, dtype=torch.float64).to(mesh.device_type)
        alone(x).sin().mean().backward()
        with by_kernels():
            shared(mine(x)).sin().mean().backward()
        assert_same(gradients(shared), gradients(alone))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_same(list(shared.parameters()), list(alone.parameters()))


CHECKS: list[Callable[[RowNorm, DeviceMesh], None]] = [
    every_layout,
    gradients_wanted_in_any_order,
    another_normalized_shape,
    second_derivatives,
    compiled,
    results_on_their_way,
    tensors_of_two_kinds_are_refused,
    sequence_parallel,
    fully_sharded,
    data_parallel,
]
