"""The channel norms as registered ops: what torch.compile and torch.export record, and their derivatives."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.library import opcheck

from machine import ON_GPU
from test_channels import draw, groups_of, norm
from trinorm import nn, options
from trinorm.spec import CHANNEL_LAYER_NORM, CHANNEL_NORMS, GROUP_NORM, INSTANCE_NORM, ChannelNorm

SHAPE = (2, 12, 5, 6)


@pytest.fixture(params=(*CHANNEL_NORMS, CHANNEL_LAYER_NORM), ids=lambda spec: spec.name)
def spec(request: pytest.FixtureRequest) -> ChannelNorm:
    return request.param


@pytest.fixture(params=[False, True], ids=["first", "last"])
def last(request: pytest.FixtureRequest) -> bool:
    return request.param


def call(spec: ChannelNorm, added: bool = False, **how: Any) -> Callable[..., Tensor]:
    """added: a residual, made of x."""

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        residual = dict(residual=x.sin()) if added else {}
        return norm(spec, x, groups_of(spec, x.shape, 4), *(parameters or (None, None)), **how, **residual)

    return run


# An op, and those of its arguments that others do not have: num_groups, whether there is a residual, activation,
# batch_invariant.
OPS: list[tuple[str, tuple[int, ...], tuple[bool, ...], tuple[str | None, ...], tuple[bool, ...]]] = [
    ("group_norm", (4,), (False,), (None,), (False,)),
    ("group_norm", (4,), (True,), ("silu",), (True,)),
    ("batch_norm", (), (True,), (None,), ()),
    ("batch_norm", (), (False,), ("silu",), ()),
    ("channel_layer_norm", (), (), (), (True,)),
]


@pytest.mark.parametrize(("op", "groups", "residual", "activation", "invariant"), OPS)
def test_opcheck(
    op: str,
    groups: tuple[int, ...],
    residual: tuple[bool, ...],
    activation: tuple[str | None, ...],
    invariant: tuple[bool, ...],
    last: bool,
    device: torch.device,
) -> None:
    (x, weight, bias), _ = draw(SHAPE, torch.float32, torch.float32, last, device)
    added = [torch.randn_like(x).requires_grad_() if given else None for given in residual]
    forward, backward = (getattr(torch.ops.trinorm, name).default for name in (op, f"{op}_backward"))
    how = 1e-5, *activation, *invariant
    opcheck(forward, (x, *groups, weight, bias if groups else None, *added, *how))
    if groups:
        of_samples = [torch.randn(SHAPE[:2], device=device, requires_grad=True) for _ in range(2)]
        opcheck(forward, (x, 12, *of_samples, *added, *how))
    with torch.no_grad():
        y, mean, rstd, *_ = forward(x, *groups, weight, bias, *added, *how)
        parameters = weight, *[bias] * len(activation), *added
        args = y, x, *groups, *parameters, mean, rstd, *how, True, True, torch.float32
        dr = [given and activation != (None,) for given in residual]
        opcheck(backward, [a.detach() if isinstance(a, Tensor) else a for a in (*args, *dr)])


@pytest.mark.parametrize("how", [{}, *[dict(activation="gelu")] * ON_GPU, dict(activation="relu", added=True)], ids=str)
def test_compiled_once_for_any_number_of_samples(
    spec: ChannelNorm, last: bool, how: dict[str, Any], device: torch.device
) -> None:
    """With an eager call's bits and order of memory, forward and backward, and one node each."""
    if spec.of_positions and (last or how):
        pytest.skip("of channels that are last this is layer_norm; there is no activation")
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def compiler(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., Any]:
        graphs.append(graph)
        return make_boxed_func(graph)

    run = torch.compile(call(spec, **how), fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=compiler))
    for samples in (2, 3, 7):
        drawn, dy = draw((samples, *SHAPE[1:]), torch.float32, torch.float32, last, device)
        found, expected = ([y, *torch.autograd.grad(y, drawn, dy)] for y in (f(*drawn) for f in (run, call(spec, **how))))
        assert found[0].stride() == expected[0].stride()
        assert all(torch.equal(got, want) for got, want in zip(found, expected, strict=True))
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    name = GROUP_NORM.name if spec is INSTANCE_NORM else spec.name
    assert targets.count(f"trinorm.{name}.default") == targets.count(f"trinorm.{name}_backward.default") == 1


def test_left_to_inductor(device: torch.device) -> None:
    torch._dynamo.reset()
    (x, weight, bias), _ = draw(SHAPE, torch.float32, torch.float32, False, device)
    with options(inductor_fuses=True):
        run = torch.compile(call(GROUP_NORM), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(run(x, weight, bias), call(GROUP_NORM)(x, weight, bias), rtol=1e-4, atol=1e-5)


def test_each_samples_scale_compiled(device: torch.device) -> None:
    torch._dynamo.reset()
    (x, weight, bias), dy = draw(SHAPE, torch.float32, torch.float32, False, device)
    scale, shift = (torch.randn(SHAPE[:2], device=device, requires_grad=True) for _ in range(2))

    def run(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return norm(GROUP_NORM, x, 4, weight, bias, activation="silu", scale=scale, shift=shift)

    drawn = x, weight, bias, scale, shift
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    found, expected = ([y, *torch.autograd.grad(y, drawn, dy)] for y in (compiled(*drawn), run(*drawn)))
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_compiled(momentum: float | None, device: torch.device) -> None:
    torch._dynamo.reset()
    ours, theirs = (kind(12, momentum=momentum).to(device) for kind in (nn.BatchNorm2d, torch.nn.BatchNorm2d))
    compiled = torch.compile(ours, fullgraph=momentum is not None, backend="aot_eager")
    for step in range(4):
        if step == 3:
            ours.eval(), theirs.eval()
        x = torch.randn(SHAPE, device=device) + 3
        torch.testing.assert_close(compiled(x), theirs(x), rtol=1e-5, atol=1e-5)
    for (name, got), want in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, msg=name)


def keep_up(kind: str, x: Tensor, eps: float, momentum: float, compiled: bool) -> list[Tensor]:
    """Running statistics after a call of a new module."""
    module = getattr(nn, f"{kind}1d")(x.shape[1], eps, momentum, track_running_stats=True).to(x.device)
    (torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module)(x)
    return [module.running_mean, module.running_var]


@pytest.mark.parametrize("kind", ["BatchNorm", "InstanceNorm"])
def test_running_statistics_as_eager_calls_have_them(kind: str, device: torch.device) -> None:
    """Also of a variance that is nothing beside eps, of infinite values, and of an empty input, which leaves them alone."""
    x = torch.randn(4, 3, 16, device=device)
    infinite = x.clone()
    infinite[0, 0, 0] = float("inf")
    for case, eps in (
        (x, 1e-5),
        (x * 1e-6, 1e-5),
        (x * 5e-5, 1e-3),
        (torch.ones_like(x), 1e-5),
        (infinite, 1e-5),
        (x[:0], 1e-5),
    ):
        torch._dynamo.reset()
        found, expected = (keep_up(kind, case, eps, 1.0, compiled) for compiled in (True, False))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(3, 4, 0), (0, 4, 3)], ids=str)
@pytest.mark.parametrize(("op", "groups"), [("group_norm", (2,)), ("batch_norm", ()), ("channel_layer_norm", ())])
def test_opcheck_of_no_elements(op: str, groups: tuple[int, ...], shape: tuple[int, ...], device: torch.device) -> None:
    x, weight = torch.ones(shape, device=device, requires_grad=True), torch.ones(4, device=device, requires_grad=True)
    rest = {"channel_layer_norm": (1e-5, False), "group_norm": (None, 1e-5, None, False)}.get(op, (None, 1e-5, None))
    opcheck(getattr(torch.ops.trinorm, op).default, (x, *groups, weight, None, *rest))


def test_mapped_over_nothing(device: torch.device) -> None:
    x = torch.ones(0, 3, 4, 5, device=device)
    run = torch.func.vmap(lambda x: torch.ops.trinorm.group_norm(x, 2, None, None, None, 1e-5, None, False)[0])
    assert run(x).shape == x.shape


def test_exported_and_loaded(spec: ChannelNorm, device: torch.device) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return call(spec, **({} if spec.of_positions else dict(activation="silu")))(x)

    x = torch.randn(SHAPE, device=device)
    samples = torch.export.Dim("samples", min=2, max=64)
    saved = io.BytesIO()
    torch.export.save(torch.export.export(Model(), (x,), dynamic_shapes=({0: samples},)), saved)
    saved.seek(0)
    loaded = torch.export.load(saved).module()
    x = torch.randn(5, *SHAPE[1:], device=device)
    assert torch.equal(loaded(x), Model()(x))


@pytest.mark.parametrize(
    ("op", "groups", "activation", "invariant"),
    [("group_norm", (2,), ("silu",), (False,)), ("batch_norm", (), ("silu",), ()), ("channel_layer_norm", (), (), (True,))],
)
def test_derivatives(
    op: str,
    groups: tuple[int, ...],
    activation: tuple[str | None, ...],
    invariant: tuple[bool, ...],
    device: torch.device,
) -> None:
    drawn, _ = draw((2, 4, 2), torch.float64, torch.float64, False, device)

    def run(x: Tensor, weight: Tensor, bias: Tensor, *residual: Tensor) -> Tensor:
        added = residual or [None] * len(activation)
        return getattr(torch.ops.trinorm, op)(x, *groups, weight, bias, *added, 1e-5, *activation, *invariant)[0]

    residual = [torch.randn_like(drawn[0]).requires_grad_() for _ in activation]
    torch.autograd.gradcheck(run, [*drawn, *residual], fast_mode=not ON_GPU)
    torch.autograd.gradgradcheck(run, [*drawn, *residual], fast_mode=not ON_GPU)
    x, *parameters = (t.detach() for t in drawn)
    got = torch.func.grad(lambda x: run(x, *parameters).sin().sum())(x)
    (want,) = torch.autograd.grad(run(drawn[0], *parameters).sin().sum(), drawn[0])
    torch.testing.assert_close(got, want)
    many = torch.stack([x, 2 * x])
    one_by_one = torch.stack([run(t, *parameters) for t in many])
    torch.testing.assert_close(torch.func.vmap(lambda x: run(x, *parameters))(many), one_by_one)
    direction = torch.randn_like(x)
    _, tangent = torch.func.jvp(lambda x: run(x, *parameters), (x,), (direction,))
    rows = torch.func.jacrev(lambda x: run(x, *parameters))(x)
    torch.testing.assert_close(tangent, torch.tensordot(rows, direction, 3))


def test_bad_input(device: torch.device) -> None:
    x, w = torch.ones(2, 6, 4, device=device), torch.ones(6, device=device)
    bad = (x, 4, w, w, None), (x, 2, w[:3], None, None), (x, 2, w, None, x[:1])
    for args in (*((*tensors, 1e-5, None, False) for tensors in bad), (x, 2, w, None, None, 1e-5, "tanh", False)):
        with pytest.raises(RuntimeError, match=r"trinorm::group_norm"):
            torch.ops.trinorm.group_norm(*args)
    with pytest.raises(NotImplementedError, match=r"trinorm::group_norm: a dtype"):
        torch.ops.trinorm.group_norm(x.long(), 2, None, None, None, 1e-5, None, False)
    with pytest.raises(RuntimeError, match=r"trinorm::channel_layer_norm"):
        torch.ops.trinorm.channel_layer_norm(x, w[:3], None, 1e-5, False)
    stats = torch.ones(2, 2, device=device)
    saved = x, 2, w, w, None, stats, stats, 1e-5
    with pytest.raises(RuntimeError, match="dy, mean or rstd"):
        torch.ops.trinorm.group_norm_backward(x[:1], *saved, None, False, True, True, None, False)
    with pytest.raises(RuntimeError, match="dy, mean or rstd"):  # the gradient of no residual
        torch.ops.trinorm.group_norm_backward(x, *saved, "silu", False, True, True, None, True)
