"""ops/library/sharding.py, and torch.distributed over the modules: two ranks, beside one process that has it all.

Over gloo on a CPU, where the kernels run through the interpreter, and once more as if there were none; over NCCL where
there are two GPUs. Everything is float64, and close as torch.testing says.
"""

from __future__ import annotations

import copy
import itertools
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from conditioned_on_two_ranks import CHECKS as OF_CONDITIONS
from elements_on_two_ranks import CHECKS as OF_ELEMENTS
from heads_on_two_ranks import CHECKS as OF_HEADS
from machine import ON_GPU
from quantized_on_two_ranks import CHECKS as OF_FORMATS
from sums_on_two_ranks import CHECKS as OF_SUMS
from test_channels import groups_of
from test_channels import norm as channel_norm
from trinorm import functional, nn
from trinorm.ops import road
from trinorm.spec import (
    BATCH_NORM,
    CHANNEL_LAYER_NORM,
    CHANNEL_NORMS,
    GROUP_NORM,
    INSTANCE_NORM,
    LAYER_NORM,
    ROW_NORMS,
    ChannelNorm,
    RowNorm,
)
from two_ranks import SHAPE, Spec, assert_same, by_kernels, lay, lay_all, module, norm, on_two_ranks, results, tensors


@pytest.mark.skipif(ON_GPU and torch.cuda.device_count() < 2, reason="two ranks over NCCL need two GPUs")
def test_two_ranks(tmp_path: Path) -> None:
    on_two_ranks(run, tmp_path)


def run(mesh: DeviceMesh) -> None:
    warnings.filterwarnings("error", "trinorm")  # which says that torch's operator runs, not a kernel
    rules_come_with_the_first_distributed_tensor(mesh)
    for kernels in (True,) if ON_GPU else (True, False):
        road.INTERPRETED = road.INTERPRETED and kernels
        for check, (specs, interpreted) in CHECKS.items():
            # What has no kernels has the same rules, and is torch's to compute.
            for spec in specs if ON_GPU else interpreted if kernels else specs[:1]:
                torch.manual_seed(0)
                check(spec, mesh)


# DTensors, and what else torch.distributed wraps.


def rules_come_with_the_first_distributed_tensor(mesh: DeviceMesh) -> None:
    x = DTensor.from_local(torch.ones(2, 8, device=mesh.device_type), mesh, [Shard(0)])
    assert "trinorm.ops.library.sharding" not in sys.modules
    # As rows stay where they are, the ranks need not do the same.
    if mesh.get_rank() == 0:
        torch.ops.trinorm.rms_norm(x, (8,), None, 1e-5, False, "output")
    else:
        with torch.inference_mode():
            functional.rms_norm(x, (8,))


Layouts = list[tuple[tuple[int, ...], tuple[Placement, ...], tuple[Placement, ...] | None]]

# normalized_shape, of the row norms; how x, the parameters and dy lie; how y, dx and the parameters' gradients do: None
# where DTensor is free to choose.
OF_ROWS: Layouts = [
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


OF_ANY_CHANNELS: Layouts = [
    ((), (Replicate(), Replicate(), Replicate()), (Replicate(), Replicate(), Replicate())),
    ((), (Partial(), Replicate(), Shard(0)), None),
    ((), (Shard(0), Replicate(), Partial()), None),
    ((), (Shard(1), Replicate(), Replicate()), None),
    ((), (Shard(2), Shard(0), Shard(0)), None),
]
OF_SAMPLES: Layouts = [
    ((), (Shard(0), Replicate(), Shard(0)), (Shard(0), Shard(0), Partial())),
    ((), (Shard(0), Shard(0), Shard(0)), (Shard(0), Shard(0), Partial())),
]
LAYOUTS: dict[Spec, Layouts] = {
    **dict.fromkeys(ROW_NORMS, OF_ROWS),
    **dict.fromkeys((GROUP_NORM, INSTANCE_NORM), OF_ANY_CHANNELS + OF_SAMPLES),
    BATCH_NORM: [
        *OF_ANY_CHANNELS,
        ((), (Shard(0), Replicate(), Shard(0)), (Replicate(), Replicate(), Replicate())),
        ((), (Shard(1), Replicate(), Shard(1)), (Shard(1), Shard(1), Shard(0))),
        ((), (Shard(1), Shard(0), Shard(1)), (Shard(1), Shard(1), Shard(0))),
    ],
    CHANNEL_LAYER_NORM: [
        *OF_ANY_CHANNELS,
        *OF_SAMPLES,
        ((), (Shard(2), Replicate(), Shard(2)), (Shard(2), Shard(2), Partial())),
    ],
}


def every_layout(spec: Spec, mesh: DeviceMesh) -> None:
    for shape, (of_x, of_parameters, of_dy), laid in LAYOUTS[spec][:: -4 if road.INTERPRETED else 1]:
        dy, inputs = tensors(spec, mesh, shape)
        with by_kernels():
            found = results(norm(spec, shape), lay(dy, mesh, of_dy), lay_all(inputs, mesh, of_x, of_parameters))
        if laid is not None:
            expected = [(p,) for p in (*laid, *laid[2:] * (len(inputs) - 2))]
            assert [t.placements for t in found] == expected, (spec, of_x, of_parameters, of_dy)
        assert_same(found, results(norm(spec, shape), dy, inputs))


def ranks_with_more_and_with_none(spec: Spec, mesh: DeviceMesh) -> None:
    """Samples, or channels, that two ranks cannot share evenly, and statistics that do not stay where they were made."""
    dim = 1 if spec is BATCH_NORM else 0
    for size in (3, 1):
        of_x = (size, 4, 8) if dim == 0 else (4, size, 8)
        dy, inputs = tensors(spec, mesh, of_x=of_x)
        for of_dy in (Shard(dim), Replicate()):
            found = results(norm(spec), lay(dy, mesh, of_dy), lay_all(inputs, mesh, Shard(dim), Replicate()))
            assert_same(found, results(norm(spec), dy, inputs))


def another_number_of_groups(spec: Spec, mesh: DeviceMesh) -> None:
    """As another normalized_shape."""
    x, *parameters = tensors(spec, mesh)[1]
    for groups in (2, 4, 2):
        found = norm(spec, groups=groups)(lay(x, mesh, Shard(0)), *(lay(t, mesh, Replicate()) for t in parameters))
        assert_same([found], [norm(spec, groups=groups)(x, *parameters)])


def each_samples_scale(spec: Spec, mesh: DeviceMesh) -> None:
    def scaled(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return channel_norm(spec, x, 2, None, None, scale=scale, shift=shift, activation="silu")

    dy, (x, *_) = tensors(spec, mesh)
    inputs = [x, *(torch.randn(SHAPE[:2], dtype=x.dtype).to(x.device) for _ in range(2))]
    expected = results(scaled, dy, inputs)
    for placement in (Shard(0), Shard(1), Replicate()):
        found = results(scaled, lay(dy, mesh, placement), lay_all(inputs, mesh, placement, placement))
        assert_same(found, expected)
        if placement == Shard(0):
            assert all(t.placements == (placement,) for t in found)


def with_a_residual(spec: Spec, mesh: DeviceMesh) -> None:
    dim = 1 if spec is BATCH_NORM else 0
    dy, (x, weight, _) = tensors(spec, mesh)
    inputs = [x, weight, torch.randn_like(x)]
    for activation in (None, "relu"):

        def added(x: Tensor, weight: Tensor, residual: Tensor, f: Any = activation) -> Tensor:
            return channel_norm(spec, x, groups_of(spec, SHAPE, 2), weight, None, residual=residual, activation=f)

        for of_residual in (Shard(dim), Replicate(), Partial()):
            placements = Shard(dim), Replicate(), of_residual
            there = [lay(t, mesh, placement) for t, placement in zip(inputs, placements, strict=True)]
            found = results(added, lay(dy, mesh, Shard(dim)), there)
            assert [t.placements for t in found[:2]] == [(Shard(dim),)] * 2
            assert_same(found, results(added, dy, inputs))


def running_statistics_compiled(spec: Spec, mesh: DeviceMesh) -> None:
    torch._dynamo.reset()
    layouts = (Shard(0), Shard(0)), (Shard(1), Replicate())
    keep_up_and_use(spec, mesh, layouts, torch.compile(fullgraph=True, backend="aot_eager"))


def running_statistics(spec: Spec, mesh: DeviceMesh) -> None:
    """However they lie; torch's own, whole ones beside channels that are sharded, are silently wrong."""
    of_x, of_running = (Shard(0), Shard(1), Shard(2), Replicate()), (Shard(0), Replicate())
    alone, shared = keep_up_and_use(spec, mesh, itertools.product(of_x, of_running))
    x = tensors(spec, mesh)[1][0]
    for given in ((lay(x, mesh, Shard(0)), *alone), (x, *shared)):
        with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
            kept_up(spec, *given)
    assert_same(shared, alone)


def keep_up_and_use(
    spec: Spec,
    mesh: DeviceMesh,
    layouts: Iterable[tuple[Placement, Placement]],
    of_shared: Callable[..., Any] = lambda f: f,
) -> tuple[list[Tensor], list[Tensor]]:
    """Statistics of one process and of the ranks, after that."""
    assert isinstance(spec, ChannelNorm)
    keep_up, use = of_shared(kept_up), of_shared(used)
    x = tensors(spec, mesh)[1][0]
    for of_x, of_running in layouts:
        alone = [torch.zeros(4).to(x), torch.ones(4).to(x)]
        shared = [lay(t.clone(), mesh, of_running) for t in alone]
        for step in range(2):
            found, expected = keep_up(spec, lay(x + step, mesh, of_x), *shared), kept_up(spec, x + step, *alone)
            assert_same([found, *shared], [expected, *alone])
        with warnings.catch_warnings():  # an evaluation of DTensors is torch's operator, which a GPU's first one says
            warnings.filterwarnings("ignore", ".*an argument is a tensor subclass", UserWarning)
            assert_same([use(spec, lay(x, mesh, of_x), *shared)], [used(spec, x, *alone)])
    return alone, shared


def kept_up(spec: ChannelNorm, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return getattr(functional, spec.name)(x, mean, var, None, None, True)


def used(spec: ChannelNorm, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return getattr(functional, spec.name)(x, mean, var, None, None, False)


def gradients_wanted_in_any_order(spec: Spec, mesh: DeviceMesh) -> None:
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


def second_derivatives(spec: Spec, mesh: DeviceMesh) -> None:
    def second(inputs: list[Tensor]) -> list[Any]:
        inputs = [t.detach().requires_grad_() for t in inputs]
        first = torch.autograd.grad(norm(spec)(*inputs).sin().sum(), inputs, create_graph=True)
        return [*first, *torch.autograd.grad(sum(t.cos().sum() for t in first[:2]), inputs[:2])]

    inputs = tensors(spec, mesh)[1]
    assert_same(second(lay_all(inputs, mesh, Shard(0), Replicate())), second(inputs))


def compiled(spec: Spec, mesh: DeviceMesh) -> None:
    torch._dynamo.reset()

    def f(x: Tensor, *parameters: Tensor) -> Tensor:
        return norm(spec)(x * 2, *parameters)

    dy, inputs = tensors(spec, mesh)
    given = lay(dy, mesh, Shard(0)), lay_all(inputs, mesh, Shard(0), Replicate())
    graph, eager = results(torch.compile(f, fullgraph=True, backend="aot_eager"), *given), results(f, *given)
    assert [t.placements for t in graph] == [t.placements for t in eager]
    assert all(torch.equal(a.to_local(), b.to_local()) for a, b in zip(graph, eager, strict=True))


def results_on_their_way(spec: Spec, mesh: DeviceMesh) -> None:
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


def tensors_of_two_kinds_are_refused(spec: Spec, mesh: DeviceMesh) -> None:
    """As torch refuses them."""
    x, weight, *_ = tensors(spec, mesh)[1]
    for given in ((lay(x, mesh, Shard(0)), weight), (x, lay(weight, mesh, Replicate()))):
        with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
            norm(spec)(*given)


# Modules.


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


def fully_sharded(spec: Spec, mesh: DeviceMesh) -> None:
    train_wrapped(lambda model: fully_shard(model, mesh=mesh), spec, mesh)


def data_parallel(spec: Spec, mesh: DeviceMesh) -> None:
    train_wrapped(DistributedDataParallel, spec, mesh)


def train_wrapped(wrap: Callable[[torch.nn.Module], torch.nn.Module], spec: Spec, mesh: DeviceMesh) -> None:
    """Two steps on batches that the ranks share: as in one process that has them whole, but for BatchNorm, whose statistics
    are of a rank's part; and as torch's module in the same wrapper, whose running statistics ours has too.
    """
    linear = torch.nn.Linear(8, 8, device=mesh.device_type, dtype=torch.float64)
    ours, theirs = (
        torch.nn.Sequential(copy.deepcopy(linear), module(spec, mesh, library), copy.deepcopy(linear))
        for library in (nn, torch.nn)
    )
    alone, shared, theirs = copy.deepcopy(ours), wrap(ours), wrap(theirs)
    models = [shared, theirs, *([alone] if spec is not BATCH_NORM else [])]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    for _ in range(2):
        x = torch.randn(SHAPE, dtype=torch.float64).to(mesh.device_type)
        alone(x).sin().mean().backward()
        theirs(mine(x)).sin().mean().backward()
        with by_kernels():
            shared(mine(x)).sin().mean().backward()
        for model in models[1:]:
            assert_same(gradients(shared), gradients(model))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_same(list(shared.state_dict().values()), list(theirs.state_dict().values()))
    for model in models[1:]:
        assert_same(list(shared.parameters()), list(model.parameters()))


CHANNELS: tuple[Spec, ...] = *CHANNEL_NORMS, CHANNEL_LAYER_NORM
ALL: tuple[Spec, ...] = *ROW_NORMS, *CHANNELS
# The specs that each is for, and those of which the interpreter, which is slow, runs it too.
CHECKS: dict[Callable[[Any, DeviceMesh], None], tuple[tuple[Spec, ...], tuple[Spec, ...]]] = {
    every_layout: (ALL, ALL),
    ranks_with_more_and_with_none: (ALL, ()),
    gradients_wanted_in_any_order: (ALL, ROW_NORMS),
    another_normalized_shape: (ROW_NORMS, ROW_NORMS),
    another_number_of_groups: ((GROUP_NORM,), ()),
    each_samples_scale: ((GROUP_NORM,), ()),
    with_a_residual: ((GROUP_NORM, BATCH_NORM), ()),
    running_statistics: ((INSTANCE_NORM, BATCH_NORM), ()),
    running_statistics_compiled: ((INSTANCE_NORM, BATCH_NORM), ()),
    second_derivatives: (ALL, ROW_NORMS),
    compiled: (ALL, (LAYER_NORM, GROUP_NORM)),
    results_on_their_way: (ALL, ALL),
    tensors_of_two_kinds_are_refused: (ALL, ALL),
    sequence_parallel: (ROW_NORMS, ROW_NORMS),
    fully_sharded: (ALL, ALL),
    data_parallel: (ALL, ALL),
    **OF_SUMS,
    **OF_HEADS,
    **OF_CONDITIONS,
    **OF_FORMATS,
    **OF_ELEMENTS,
}
