"""What a norm of a sum may make of x first: a dropout, and rows scaled."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from machine import JACOBIAN, ON_GPU
from paths import SPECS
from test_added import EPS, LAUNCHES, STREAMS, assert_right, draw, public
from trinorm import functional, nn
from trinorm.forced import forced
from trinorm.ops import added
from trinorm.reference import added as added_reference
from trinorm.spec import RowNorm


@pytest.fixture(autouse=True)
def _nothing_remembered() -> None:
    added.CALLS.clear()


@pytest.fixture(params=SPECS)
def spec(request: pytest.FixtureRequest) -> RowNorm:
    return request.param


def test_words_are_philoxs() -> None:
    """Those that its authors publish (kat_vectors of Random123), and numpy's of the same counters and keys."""
    assert added_reference.words(torch.zeros(1, dtype=torch.int64), 1, 4).tolist() == [
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ]
    seed = -(1 << 62) + 12345
    found = added_reference.words(torch.tensor([seed]), 3, 9)
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32 & 0xFFFFFFFF)]
    for row, group in itertools.product(range(3), range(3)):
        counter, keys = [np.uint64(n) for n in (group, row, 0, 0)], key
        for _ in range(10):
            first, third = counter[0] * np.uint64(0xD2511F53), counter[2] * np.uint64(0xCD9E8D57)
            low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
            counter = [
                third >> shift ^ counter[1] ^ keys[0],
                third & low,
                first >> shift ^ counter[3] ^ keys[1],
                first & low,
            ]
            keys = [(k + np.uint64(step)) & low for k, step in zip(keys, (0x9E3779B9, 0xBB67AE85), strict=True)]
        assert found[row, 4 * group : 4 * group + 4].tolist() == [int(word) for word in counter][: 9 - 4 * group]


@pytest.mark.parametrize("path", LAUNCHES)
@pytest.mark.parametrize(("p", "scales"), [(0.1, True), (0.5, False), (1.0, True)])
@pytest.mark.parametrize("stream", STREAMS[: 3 if ON_GPU else 2], ids=str)
def test_forward_and_backward_drop_the_same(
    spec: RowNorm, path: str, p: float, scales: bool, stream: tuple[torch.dtype, torch.dtype], device: torch.device
) -> None:
    """Each launch has the mask that ATen's ops have of the seed, forward and backward."""
    forward, backward = LAUNCHES[path]
    m, n = 7, 4096 if path == "team" else 1102
    *tensors, dy, dsum = draw(m, n, stream, device)
    c = torch.rand(m, device=device).mul(2).round() if scales else None
    torch.manual_seed(7)
    seed = torch.randint(-(1 << 63), (1 << 63) - 1, (1,), dtype=torch.int64, device=device)
    mask = added_reference.words(seed, m, n) >= int(p * 2**32)
    assert abs(mask.double().mean().item() - (1 - p)) < 0.02
    factor = mask.double() * (0.0 if p == 1 else 1 / (1 - p)) * (1.0 if c is None else c[:, None].double())
    torch.manual_seed(7)
    with forced(forward=forward, backward=backward):
        assert_right(spec, [*tensors, dy, dsum], 0.5, spec.center, factor, dropout_p=p, row_scale=c)


def test_every_call_draws_anew_and_a_generator_is_honoured(spec: RowNorm, device: torch.device) -> None:
    rows = 64 if ON_GPU else 16
    x, residual = torch.ones(rows, 96, device=device), torch.zeros(rows, 96, device=device)
    drawn = [public(spec, x, residual, dropout_p=0.5)[1] for _ in range(4)]
    for one, other in itertools.combinations(drawn, 2):
        assert 0.4 < (one == other).double().mean() < 0.6
    torch.manual_seed(3)
    again = [public(spec, x, residual, dropout_p=0.5)[1] for _ in range(3)]
    torch.manual_seed(3)
    assert all(torch.equal(public(spec, x, residual, dropout_p=0.5)[1], want) for want in again)
    own = torch.Generator(device)
    results = []
    for _ in range(2):
        own.manual_seed(5)
        torch.manual_seed(_)
        before = torch.get_rng_state()
        results.append(public(spec, x, residual, dropout_p=0.5, generator=own)[1])
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*results)
    assert torch.equal(public(spec, x, residual, dropout_p=0.0)[1], x)


def test_a_row_does_not_depend_on_its_tile(spec: RowNorm, device: torch.device) -> None:
    """Nor on how many columns a chunk has: few columns have chunks of less than four."""
    for n in (1, 2, 3, 4, 5, 130):
        x, residual = torch.ones(9, n, device=device), torch.zeros(9, n, device=device)
        torch.manual_seed(1)
        _, total = public(spec, x, residual, dropout_p=0.5)
        torch.manual_seed(1)
        seed = torch.randint(-(1 << 63), (1 << 63) - 1, (1,), dtype=torch.int64, device=device)
        assert torch.equal(total, (added_reference.words(seed, 9, n) >= 1 << 31) * 2.0)


@pytest.mark.filterwarnings("ignore:.*runs torch's own operator")
def test_derivatives(spec: RowNorm, device: torch.device) -> None:
    given = [torch.randn(s, dtype=torch.float64, device=device, requires_grad=True) for s in ((3, 6), (3, 6), (6,), (6,))]
    c = torch.tensor([0.0, 1.0, 2.0], device=device)

    def eager(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        return public(spec, *tensors, alpha=0.7, dropout_p=0.3, row_scale=c)

    def registered(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        x, residual, w, b = tensors
        seed = torch.tensor([11], device=device)
        op = getattr(torch.ops.trinorm, f"add_{spec.name}")
        return op(x, residual, (6,), w, b, seed, c, EPS, 0.7, 0.3, torch.float64, False, "output")[:2]

    for norm in (eager, registered):
        torch.autograd.gradcheck(norm, given, **JACOBIAN)
        torch.autograd.gradgradcheck(norm, given, **JACOBIAN)
    torch.autograd.gradcheck(eager, given, check_forward_ad=True, check_backward_ad=False, **JACOBIAN)


@pytest.mark.filterwarnings("ignore:.*runs torch's own operator")
def test_torch_func_differentiates_row_scale(spec: RowNorm, device: torch.device) -> None:
    """Autograd's gradient is refused; a transform's tensors do not tell whether one is asked for, so there is one."""
    x, residual, c = (torch.randn(s, dtype=torch.float64, device=device) for s in ((3, 6), (3, 6), (3,)))

    def norm(c: Tensor) -> Tensor:
        y, total = public(spec, x, residual, None, None, row_scale=c)
        return y.sin() + total

    step = 1e-6 * torch.eye(3, dtype=torch.float64, device=device)
    want = torch.stack([(norm(c + s) - norm(c - s)) / 2e-6 for s in step], -1)
    grad = torch.func.grad(lambda c: norm(c).sum())
    mapped = torch.func.grad(lambda c: torch.func.vmap(norm)(c[None]).sum())
    for of in (grad, torch.compile(lambda c: grad(c), backend="aot_eager", fullgraph=True), mapped):
        torch.testing.assert_close(of(c), want.sum((0, 1)))
    torch.testing.assert_close(torch.func.jacrev(norm)(c), want)
    torch.testing.assert_close(torch.func.jacfwd(norm)(c), want)


def test_registered(spec: RowNorm, device: torch.device) -> None:
    x, residual, w, b, *_ = draw(4, 16, STREAMS[2], device)
    for t in (x, residual, w, b):
        t.requires_grad_()
    op = getattr(torch.ops.trinorm, f"add_{spec.name}").default
    seed, c = torch.tensor([5], device=device), torch.ones(4, device=device)
    torch.library.opcheck(op, (x, residual, (16,), w, b, seed, c, EPS, 0.5, 0.25, x.dtype, False, "output"))
    with pytest.raises(RuntimeError, match="seed is no int64 number"):
        op(x, residual, (16,), w, b, seed.int(), c, EPS, 0.5, 0.25, x.dtype, False, "output")
    with pytest.raises(RuntimeError, match="row_scale is not of the input's leading dims"):
        op(x, residual, (16,), w, b, seed, c[:2], EPS, 0.5, 0.25, x.dtype, False, "output")


def test_compiled_and_checkpointed(spec: RowNorm, device: torch.device) -> None:
    """A checkpoint's second forward drops what the first did; a compiled call draws of torch's generator too."""
    torch._dynamo.reset()
    x, residual = torch.randn(5, 32, device=device, requires_grad=True), torch.randn(5, 32, device=device)

    def step(x: Tensor, residual: Tensor) -> Tensor:
        y, total = public(spec, x, residual, dropout_p=0.5)
        return (y * total).sin()

    gradients = []
    for f in (step, lambda *tensors: checkpoint(step, *tensors, use_reentrant=False)):
        torch.manual_seed(2)
        gradients.append(torch.autograd.grad(f(x, residual).sum(), x)[0])
    assert torch.equal(*gradients)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    drawn = [compiled(x, residual) for _ in range(3)]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(drawn, 2))
    torch._dynamo.reset()


def test_row_scales_are_broadcast(spec: RowNorm, device: torch.device) -> None:
    """Stochastic depth: a factor of each sample."""
    x, residual = (torch.randn(2, 3, 16, device=device) for _ in range(2))
    c = torch.tensor([[0.0], [2.0]], device=device)
    for _ in range(3):
        _, total = public(spec, x, residual, row_scale=c)
        assert torch.equal(total, x * c[..., None] + residual)
        _, total = public(spec, x, residual, row_scale=c.expand(2, 3).contiguous().bfloat16())
        assert torch.equal(total, x * c[..., None] + residual)


def test_modules_drop_in_training_alone(device: torch.device) -> None:
    x, residual = torch.ones(64, 32, device=device), torch.zeros(64, 32, device=device)
    for module in (nn.AddLayerNorm, nn.AddRMSNorm):
        norm: Any = module(32, device=device)
        norm.dropout_p = 0.5
        assert (norm(x, residual)[1] == 0).any()
        assert torch.equal(norm.eval()(x, residual)[1], x)
        assert torch.equal(norm(x, residual, row_scale=2 * x[:, 0])[1], 2 * x)
        assert "dropout_p=0.5" in repr(norm)


@pytest.mark.skipif(not ON_GPU, reason="graphs are a GPU's")
def test_a_captured_graph_draws_anew(device: torch.device) -> None:
    x, residual = torch.ones(64, 96, device=device), torch.zeros(64, 96, device=device)
    with torch.no_grad():
        for _ in range(3):
            functional.add_rms_norm(x, residual, dropout_p=0.5)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _, total = functional.add_rms_norm(x, residual, dropout_p=0.5)
    drawn = []
    for _ in range(3):
        graph.replay()
        drawn.append(total.clone())
    for one, other in itertools.combinations(drawn, 2):
        assert 0.4 < (one == other).double().mean() < 0.6


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        (dict(dropout_p=1.5), ValueError, "dropout_p is 1.5"),
        (dict(dropout_p=float("nan")), ValueError, "dropout_p is nan"),
        (dict(dropout_p=True), TypeError, "dropout_p must be"),
        (dict(row_scale=2.0), TypeError, "row_scale must be"),
        (dict(row_scale=torch.ones(4)), RuntimeError, "row_scale has shape"),
        (dict(row_scale=torch.ones(3, requires_grad=True)), RuntimeError, "row_scale requires a gradient"),
        (dict(row_scale=torch.ones(3, device="meta")), RuntimeError, "row_scale is on meta"),
        (dict(row_scale=torch.ones(3).int()), NotImplementedError, "row_scale has dtype"),
    ],
)
def test_bad_input(how: dict[str, Any], kind: type[Exception], message: str, spec: RowNorm) -> None:
    x = torch.randn(3, 8)
    for _ in range(2):
        with pytest.raises(kind, match=rf"add_{spec.name}\(\): {message}"):
            public(spec, x, x.clone(), **how)
