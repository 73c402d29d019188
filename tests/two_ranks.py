"""What the tests on two ranks (test_distributed.py) share: ranks, norms, modules, tensors on a mesh, who has computed."""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, distribute_tensor

from machine import ON_GPU
from test_channels import groups_of
from test_channels import norm as channel_norm
from test_modules_in_torch import ChannelLayerNorm
from trinorm import functional, nn
from trinorm.norms import Results, as_tuple
from trinorm.ops import CALLS, added, channel, conditioned, gated_sum, inputs_only, qk, road
from trinorm.ops.hosts import (
    channel_layers,
    channels,
    conditioned_rows,
    dynamic_rows,
    gated_sum_rows,
    heads,
    poly_rows,
    rows,
    weight_rows,
)
from trinorm.spec import (
    BATCH_NORM,
    CHANNEL_LAYER_NORM,
    GROUP_NORM,
    INSTANCE_NORM,
    LAYER_NORM,
    RMS_NORM,
    ChannelNorm,
    RowNorm,
)

Spec = RowNorm | ChannelNorm


def on_two_ranks(run: Callable[[DeviceMesh], None], folder: Path) -> None:
    """``run`` in two processes, over NCCL on two GPUs, over gloo on a CPU. It has to be a module's."""
    try:
        torch.multiprocessing.spawn(_as_a_rank, (run, folder / "rendezvous"), nprocs=2)
    except torch.multiprocessing.ProcessExitedException as died:
        # gloo's threads drop the tensors of a collective when it is done, and with the last hold on one its Python object
        # (torch 2.13): a race that ended a rank once in some hundred runs, in which there is no machine code of trinorm's.
        if ON_GPU or died.signal_name not in ("SIGSEGV", "SIGABRT"):
            raise
        torch.multiprocessing.spawn(_as_a_rank, (run, folder / "again"), nprocs=2)


def _as_a_rank(rank: int, run: Callable[[DeviceMesh], None], rendezvous: Path) -> None:
    faulthandler.enable()
    if ON_GPU:
        torch.cuda.set_device(rank)
    options = dict(rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
    dist.init_process_group("nccl" if ON_GPU else "gloo", init_method=f"file://{rendezvous}", **options)
    run(init_device_mesh("cuda" if ON_GPU else "cpu", (2,)))
    dist.destroy_process_group()
    sys.stdout.flush()
    # Not by Python's own end, which those threads, if they come for its lock then, do not survive.
    os._exit(0)


SHAPE = 4, 4, 8


def norm(spec: Spec, shape: tuple[int, ...] = (8,), groups: int = 2) -> Callable[..., Tensor]:
    if isinstance(spec, ChannelNorm):
        return lambda x, *parameters: channel_norm(
            spec, x, groups_of(spec, x.shape, groups), *(*parameters, None, None)[:2]
        )
    return lambda x, *parameters: getattr(functional, spec.name)(x, shape, *parameters, eps=1e-5)


# What is built of ours and of torch's, to normalize SHAPE.
MODULES: dict[Spec, tuple[str, tuple[Any, ...]]] = {
    LAYER_NORM: ("LayerNorm", (8,)),
    RMS_NORM: ("RMSNorm", (8,)),
    GROUP_NORM: ("GroupNorm", (2, 4)),
    INSTANCE_NORM: ("InstanceNorm1d", (4, 1e-5, 0.1, True, True)),
    BATCH_NORM: ("BatchNorm1d", (4,)),
    CHANNEL_LAYER_NORM: ("ChannelLayerNorm", (4,)),
}


def module(spec: Spec, mesh: DeviceMesh, library: Any = nn) -> torch.nn.Module:
    name, arguments = MODULES[spec]
    kind = getattr(library, name, ChannelLayerNorm)
    return kind(*arguments, device=mesh.device_type, dtype=torch.float64)


def tensors(
    spec: Spec, mesh: DeviceMesh, shape: tuple[int, ...] = (8,), of_x: tuple[int, ...] = SHAPE
) -> tuple[Tensor, list[Tensor]]:
    """(dy, [x, weight, bias where there is one]), the same on each rank."""
    of_parameters = [of_x[1:2]] * 2 if isinstance(spec, ChannelNorm) else [shape] * (1 + spec.center)
    shapes = of_x, of_x, *of_parameters
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
    f: Callable[..., Results], dy: Results, inputs: list[Tensor], wanted: tuple[bool, ...] = (True,) * 4
) -> list[Any]:
    """f's values and the gradients that are wanted, of the first values' gradients."""
    inputs = [t.detach().requires_grad_(is_wanted) for t, is_wanted in zip(inputs, wanted, strict=False)]
    found, gradients = as_tuple(f(*inputs)), as_tuple(dy)
    leaves = [t for t in inputs if t.requires_grad]
    return [*(t.detach() for t in found), *torch.autograd.grad(found[: len(gradients)], leaves, gradients)]


def whole(t: Any) -> Any:
    return t.full_tensor() if isinstance(t, DTensor) else t


def lay_each(tensors: Any, mesh: DeviceMesh, *placements: Placement) -> list[Tensor]:
    return [lay(t, mesh, placement) for t, placement in zip(tensors, placements, strict=True)]


def assert_same(found: list[Any], expected: list[Any]) -> None:
    torch.testing.assert_close([whole(t) for t in found], [whole(t) for t in expected])


@contextlib.contextmanager
def by_kernels() -> Iterator[None]:
    """That kernels of both directions are launched on this rank; or, where there are none, nothing."""
    CALLS.clear()
    for family in (added, channel, qk, conditioned, gated_sum, inputs_only):
        family.CALLS.clear()  # what other shards had recorded would be repeated, past who looks at launches here
    names: set[str] = set()
    hosts = rows, channels, channel_layers, heads, conditioned_rows, gated_sum_rows, dynamic_rows, poly_rows, weight_rows
    actual = rows.launch
    for host in hosts:
        host.launch = lambda kernel, *args: (names.add(kernel.__name__), actual(kernel, *args))[1]
    try:
        yield
    finally:
        for host in hosts:
            host.launch = actual
    launched = {"backward" in name for name in names}
    assert launched == ({False, True} if ON_GPU or road.INTERPRETED else set()), names
