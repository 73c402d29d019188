"""QK-norm as torch's citizen: derivatives, the registered op, compiled, remembered, in a model, as a module, bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from machine import JACOBIAN, ON_GPU
from test_qk import DTYPES, EPS, draw
from trinorm import functional, nn, options
from trinorm.compare import assert_no_worse
from trinorm.ops import qk, road
from trinorm.reference import qk as qk_reference
from trinorm.spec import CASTS, RMS_NORM, Cast


def registered(*tensors: Tensor | None, interleaved: bool = False, cast: Cast = "output") -> tuple[Tensor, Tensor]:
    of_query, of_key, *_ = torch.ops.trinorm.qk_norm(*tensors, EPS, interleaved, False, cast)
    return of_query, of_key


def eager(*tensors: Tensor, interleaved: bool = False, cast: Cast = "output") -> tuple[Tensor, Tensor]:
    *given, cos, sin = tensors
    return functional.qk_norm(*given, EPS, cos=cos, sin=sin, interleaved=interleaved, cast=cast)


def doubles(device: torch.device) -> list[Tensor]:
    """Queries, keys, weights, cos and sin, of which the first four require gradients."""
    given, angles, _ = draw((2, 2), (2, 1), 6, 4, torch.float64, device, angle=torch.float64)
    return [*(t.detach().contiguous().requires_grad_() for t in given), *(t for t in angles if t is not None)]


@pytest.mark.filterwarnings("ignore:.*runs torch's own operator")  # a GPU says so of torch.func and forward mode
@pytest.mark.parametrize("norm", [eager, registered])
@pytest.mark.parametrize("interleaved", [False, True])
def test_derivatives(norm: Callable[..., Any], interleaved: bool, device: torch.device) -> None:
    """Numerically, and twice; batched; by torch.func; and, by torch's operators, in forward mode."""
    *given, cos, sin = doubles(device)

    def of_given(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return norm(*tensors, cos, sin, interleaved=interleaved)

    torch.autograd.gradcheck(of_given, given, check_batched_grad=True, **JACOBIAN)
    torch.autograd.gradgradcheck(of_given, given, **JACOBIAN)
    if norm is eager:
        torch.autograd.gradcheck(of_given, given, check_forward_ad=True, check_backward_ad=False, **JACOBIAN)
    plain = [t.detach() for t in given]

    def expected(x: Tensor) -> Tensor:
        return qk_reference.composite(RMS_NORM, x, plain[2], EPS, cos, sin, interleaved)

    found, wanted = (torch.func.jacrev(f)(plain[0]) for f in (lambda x: of_given(x, *plain[1:])[0], expected))
    torch.testing.assert_close(found, wanted)
    batch = [torch.stack([t, 2 * t]) for t in plain[:2]]
    found = torch.func.vmap(lambda q, k: of_given(q, k, *plain[2:]))(*batch)
    for i in range(2):
        torch.testing.assert_close([t[i] for t in found], list(of_given(batch[0][i], batch[1][i], *plain[2:])))


@pytest.mark.filterwarnings("ignore:.*cos or sin requires a gradient")
@pytest.mark.parametrize("norm", [eager, registered])
def test_angles_may_require_gradients(norm: Callable[..., Any], device: torch.device) -> None:
    """Which the kernels have not, and torch's operators do; nothing is dropped silently."""
    given = [t.detach().requires_grad_() for t in doubles(device)]
    torch.autograd.gradcheck(norm, given, **JACOBIAN)
    torch.autograd.gradgradcheck(norm, given, **JACOBIAN)
    with torch.no_grad():
        norm(*given)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize(
    ("turned", "interleaved", "cast"), [(8, False, "output"), (16, True, "llama"), (0, False, "gemma")]
)
def test_registered(dtype: torch.dtype, turned: int, interleaved: bool, cast: Cast, device: torch.device) -> None:
    (query, key, *weights), angles, _ = draw((2, 3), (2, 1), 16, turned, dtype, device)
    for t in (query, key, *weights):
        t.requires_grad_()
    for given in ((query, key, *weights, *angles), (query, key, None, weights[1], *angles)):
        opcheck(torch.ops.trinorm.qk_norm.default, (*given, EPS, interleaved, False, cast))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_compiled(dynamic: bool, interleaved: bool, device: torch.device) -> None:
    """One graph for any number of tokens, with an eager call's bits."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    def step(packed: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        heads = packed.unflatten(-1, (-1, 16))
        return eager(heads[..., :4, :], heads[..., 4:6, :], *others, interleaved=interleaved)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    if dynamic:
        compiled_once = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (3, 5, 9):
        weights = [torch.randn(16, device=device) for _ in range(2)]
        given = [torch.randn(2, tokens, 8 * 16, device=device).bfloat16(), *weights]
        angles = [torch.randn(tokens, 16, device=device) for _ in range(2)]
        found, expected = [], []
        for f, results in ((compiled, found), (step, expected)):
            leaves = [t.detach().requires_grad_() for t in given]
            ys = f(*leaves, *angles)
            results += [*ys, *torch.autograd.grad(sum((y * y).float().sum() for y in ys), leaves)]
        for got, want in zip(found, expected, strict=True):
            assert torch.equal(got, want)
        if dynamic:
            compiled_once(*given, *angles)
            assert len(graphs) == 1
            assert any("qk_norm" in str(node.target) for node in graphs[0].graph.nodes)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.*cos or sin requires a gradient")
def test_compiled_with_angles_that_require_gradients(device: torch.device) -> None:
    torch._dynamo.reset()
    given = [t.detach().requires_grad_() for t in doubles(device)]
    found, expected = (
        torch.autograd.grad(sum(y.square().sum() for y in norm(*given)), given)
        for norm in (torch.compile(eager, fullgraph=True, backend="aot_eager"), eager)
    )
    torch.testing.assert_close(found, expected)
    torch._dynamo.reset()


def test_exported(device: torch.device) -> None:
    class Norm(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
            return eager(*tensors)

    given = tuple(t.detach() for t in doubles(device))
    program = torch.export.export(Norm(), given)
    torch.testing.assert_close(program.module()(*given), eager(*given))


def test_what_was_saved_may_come_back_otherwise(device: torch.device) -> None:
    """In another layout or dtype, from a hook; and a gradient may have no storage."""
    given, angles, dys = draw((2, 3), (2, 1), 16, 8, torch.float32, device)
    leaves = [t.detach().requires_grad_() for t in given]

    def gradients(unpack: Callable[[Tensor], Tensor], *dys: Tensor) -> tuple[Tensor, ...]:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), unpack):
            ys = functional.qk_norm(*leaves, EPS, cos=angles[0], sin=angles[1])
            return torch.autograd.grad(ys, leaves, dys)

    for second in (dys[1], torch._efficientzerotensor(dys[1].shape, device=device)):
        expected = gradients(lambda t: t, dys[0], second + 0 if second is dys[1] else torch.zeros_like(dys[1]))
        for unpack in (lambda t: torch.stack((t, t), -1)[..., 0], lambda t: torch._neg_view(-t), lambda t: t.double()):
            for _ in range(2):
                for got, want in zip(gradients(unpack, dys[0], second), expected, strict=True):
                    torch.testing.assert_close(got, want)


def test_a_call_is_remembered(device: torch.device) -> None:
    """And found again, of views too; another shape, dtype, layout or manner is another call."""
    for i in range(3):
        for tokens, dtype in ((3, torch.float32), (5, torch.float32), (3, torch.bfloat16)):
            given, angles, _ = draw((2, tokens), (4, 2), 16, 8, dtype, device)
            for interleaved in (False, True):
                ys = functional.qk_norm(*given, EPS, cos=angles[0], sin=angles[1], interleaved=interleaved)
                for x, w, y in zip(given[:2], given[2:], ys, strict=True):
                    problem = (RMS_NORM, x, w, EPS, *angles, interleaved)
                    assert_no_worse("y", y, qk_reference.oracle(*problem), qk_reference.composite(*problem))
        assert sum(map(len, qk.CALLS._kept.values())) == 6, i
    with options(batch_invariant=True):
        assert not qk.CALLS._kept


def test_under_autocast_results_keep_their_dtype(device: torch.device) -> None:
    given, angles, _ = draw((2, 3), (2, 1), 16, 8, torch.bfloat16, device, weight=torch.float32)
    expected = functional.qk_norm(*given, EPS, cos=angles[0], sin=angles[1])
    for norm in (functional.qk_norm, lambda *a, cos, sin: registered(*a[:4], cos, sin)):
        with torch.autocast(device.type, torch.bfloat16):
            for got, want in zip(norm(*given, EPS, cos=angles[0], sin=angles[1]), expected, strict=True):
                assert torch.equal(got, want)


@pytest.mark.parametrize("cast", CASTS)
def test_the_composite_is_as_good(cast: Cast, device: torch.device) -> None:
    """What runs without kernels, under autocast too, where matrices are in 16 bits."""
    (query, _, weight, _), angles, _ = draw((2, 3), (2, 1), 16, 8, torch.bfloat16, device, weight=torch.float32)
    problem = (RMS_NORM.with_cast(cast), query, weight, EPS, *angles, True)
    y = qk_reference.composite(*problem)
    by_torch = y if cast == "llama" else qk_reference.oracle(*problem).bfloat16()
    assert_no_worse("y", y, qk_reference.oracle(*problem), by_torch)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(qk_reference.composite(*problem), y)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_in_transformers(dtype: torch.dtype, device: torch.device) -> None:
    """Qwen3's norms and rotary embedding, in the casting mode "llama": the same, but where rstd differs in its last bit."""
    modeling = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    (query, key, *weights), (cos, sin), _ = draw((2, 9), (4, 2), 64, 64, dtype, device, angle=dtype)
    expected = []
    for x, weight in zip((query, key), weights, strict=True):
        norm = modeling.Qwen3RMSNorm(64, EPS).to(device, dtype)
        norm.weight.data = weight
        expected.append(norm(x).transpose(1, 2))
    ys = functional.qk_norm(query, key, *weights, EPS, cos=cos, sin=sin, cast="llama")
    for y, want in zip(ys, modeling.apply_rotary_pos_emb(*expected, cos[None], sin[None]), strict=True):
        want = want.transpose(1, 2)
        if dtype == torch.float32:
            torch.testing.assert_close(y, want)
        else:  # one unit of x̂ is one of each product, whose sum may be small
            assert (y != want).float().mean() < 0.01
            assert (y - want).abs().max() <= 4 * torch.finfo(dtype).eps * want.abs().max()


def test_in_transformers_by_neighbours(device: torch.device) -> None:
    modeling = pytest.importorskip("transformers.models.cohere.modeling_cohere")
    (query, key, *_), (cos, sin), _ = draw((2, 9), (4, 2), 64, 64, torch.float32, device)
    normalized = [functional.rms_norm(x, (64,)).transpose(1, 2) for x in (query, key)]
    ys = functional.qk_norm(query, key, cos=cos, sin=sin, interleaved=True)
    for y, want in zip(ys, modeling.apply_rotary_pos_emb(*normalized, cos[None], sin[None]), strict=True):
        torch.testing.assert_close(y, want.transpose(1, 2))


def test_module(device: torch.device) -> None:
    norm = nn.QKNorm(16, eps=1e-3, device=device)
    assert [*norm.state_dict()] == ["query_weight", "key_weight"]
    assert all(torch.equal(t, torch.ones(16, device=device)) for t in norm.parameters())
    (query, key, *weights), (cos, sin), _ = draw((2, 3), (2, 1), 16, 8, torch.float32, device)
    norm.load_state_dict(dict(zip(norm.state_dict(), weights, strict=True)))
    for attributes in ({}, {"interleaved": True}, {"cast": "gemma", "batch_invariant": True}):
        for name, value in attributes.items():
            setattr(norm, name, value)
        how: dict[str, Any] = dict(interleaved=norm.interleaved, cast=norm.cast, batch_invariant=norm.batch_invariant)
        for got, want in zip(
            (*norm(query, key, cos, sin), *norm(query, key)),
            (
                *functional.qk_norm(query, key, *weights, 1e-3, cos=cos, sin=sin, **how),
                *functional.qk_norm(query, key, *weights, 1e-3, **how),
            ),
            strict=True,
        ):
            assert torch.equal(got, want)
    assert repr(norm) == (
        "QKNorm(16, eps=0.001, elementwise_affine=True, interleaved=True, cast='gemma', batch_invariant=True)"
    )
    assert not nn.QKNorm(16, elementwise_affine=False).state_dict()


def _x(*shape: int, **how: Any) -> Tensor:
    return torch.randn(shape or (3, 2, 8), **how)


@pytest.mark.parametrize(
    ("args", "how", "kind", "message"),
    [
        ((None, _x()), {}, TypeError, "query must be a Tensor, not NoneType"),
        ((_x(), 3), {}, TypeError, "key must be a Tensor, not int"),
        ((_x(), _x(), 3), {}, TypeError, "query_weight must be a Tensor or None"),
        ((_x(), _x(), None, [1.0]), {}, TypeError, "key_weight must be a Tensor or None"),
        ((_x(), _x()), dict(cos=3, sin=_x(3, 8)), TypeError, "cos must be a Tensor or None"),
        ((_x(8), _x(8)), {}, RuntimeError, r"query has shape \(8,\); it must be \(..., heads, D\)"),
        ((_x(), _x(4, 2, 8)), {}, RuntimeError, r"key has shape \(4, 2, 8\); of the query's"),
        ((_x(), _x(3, 2, 7)), {}, RuntimeError, r"key has shape \(3, 2, 7\); of the query's"),
        ((_x(), _x(2, 8)), {}, RuntimeError, r"key has shape \(2, 8\); of the query's"),
        ((_x(), _x().half()), {}, RuntimeError, "key has dtype torch.float16; it must be the query's"),
        ((_x().int(), _x().int()), {}, NotImplementedError, "query has dtype torch.int32"),
        ((_x(), _x(), _x(8).int()), {}, NotImplementedError, "query_weight has dtype torch.int32"),
        ((_x(), _x(), _x(7)), {}, RuntimeError, r"query_weight has shape \(7,\); it must be \(8,\)"),
        ((_x(), _x(), None, _x(1, 8)), {}, RuntimeError, r"key_weight has shape \(1, 8\); it must be \(8,\)"),
        ((_x(), _x(device="meta")), {}, RuntimeError, "key is on meta, but query is on cpu"),
        ((_x(), _x(), _x(8, device="meta")), {}, RuntimeError, "query_weight is on meta, but query is on cpu"),
        ((_x(), _x().to_sparse()), {}, NotImplementedError, "key has layout"),
        ((_x(), _x()), dict(cos=_x(3, 8)), RuntimeError, "cos is given and sin is not"),
        ((_x(), _x()), dict(sin=_x(3, 8)), RuntimeError, "sin is given and cos is not"),
        ((_x(), _x()), dict(cos=_x(3, 8), sin=_x(3, 6)), RuntimeError, r"sin is torch.float32 of shape \(3, 6\)"),
        ((_x(), _x()), dict(cos=_x(3, 8), sin=_x(3, 8).half()), RuntimeError, "sin is torch.float16 of shape"),
        ((_x(), _x()), dict(cos=_x(3, 7), sin=_x(3, 7)), RuntimeError, "even, from 2 to 8"),
        ((_x(), _x()), dict(cos=_x(3, 0), sin=_x(3, 0)), RuntimeError, "even, from 2 to 8"),
        ((_x(), _x()), dict(cos=_x(3, 10), sin=_x(3, 10)), RuntimeError, "even, from 2 to 8"),
        ((_x(), _x()), dict(cos=torch.tensor(1.0), sin=torch.tensor(0.0)), RuntimeError, "even, from 2 to 8"),
        ((_x(), _x()), dict(cos=_x(4, 8), sin=_x(4, 8)), RuntimeError, r"query has tokens of \(3,\)"),
        ((_x(), _x()), dict(cos=_x(3, 2, 8), sin=_x(3, 2, 8)), RuntimeError, "without a dim for the heads"),
        ((_x(), _x(), None, None, -1.0), {}, ValueError, "eps is"),
        ((_x(), _x(), None, None, "1"), {}, TypeError, "eps must be"),
        ((_x(), _x()), dict(cast="wide"), ValueError, "cast is"),
        ((_x(), _x()), dict(interleaved=1), TypeError, "interleaved must be"),
        ((_x(), _x()), dict(batch_invariant=1), TypeError, "batch_invariant must be"),
    ],
)
def test_bad_input(
    args: tuple[Any, ...], how: dict[str, Any], kind: type[Exception], message: str, launched: list[object]
) -> None:
    for _ in range(2):
        with pytest.raises(kind, match=rf"qk_norm\(\): .*{message}"):
            functional.qk_norm(*args, **how)
    assert launched == []


def test_jagged_tensors_are_refused() -> None:
    jagged = torch.nested.nested_tensor([torch.ones(2, 2, 8), torch.ones(3, 2, 8)], layout=torch.jagged)
    with pytest.raises(RuntimeError, match=r"qk_norm\(\): query is a nested tensor"):
        functional.qk_norm(jagged, jagged)
    with pytest.raises(RuntimeError, match=r"qk_norm\(\): key is a nested tensor"):
        functional.qk_norm(_x(), jagged)


def test_the_registered_op_refuses_what_does_not_fit(device: torch.device) -> None:
    x, w, turn = torch.randn(3, 2, 8, device=device), torch.randn(8, device=device), torch.randn(3, 8, device=device)
    op, how = torch.ops.trinorm.qk_norm, (EPS, False, False, "output")
    for given, message in (
        ((x, x[:2], None, None, None, None), "key is not of the query's"),
        ((x, x.half(), None, None, None, None), "key is not of the query's"),
        ((x, x, w[:7], None, None, None), "a weight is not"),
        ((x, x, None, None, turn, None), "cos and sin"),
        ((x, x, None, None, turn, turn[:2]), "cos and sin"),
        ((x, x, None, None, turn[:2], turn[:2]), "cos and sin"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*given, *how)
    with pytest.raises(RuntimeError, match="cast is"):
        op(x, x, None, None, None, None, EPS, False, False, "wide")
    with pytest.raises(NotImplementedError, match="a dtype other than"):
        op(x, x, w.int(), None, None, None, *how)
    _, _, *rstds = op(x, x, w, w, turn, turn, *how)
    backward, given = torch.ops.trinorm.qk_norm_backward, (x, x, w, w, turn, turn)
    for dy, wanted, message in (
        (x[:2], (True, True, True, True), "dy or rstd is not of its input's shape"),
        (x.int(), (True, True, True, True), "dy or rstd is not as the forward gives them"),
        (None, (True, True, False, False), "a gradient is asked for"),
    ):
        with pytest.raises(RuntimeError, match=message):
            backward(*given, *rstds, dy, x, EPS, False, *wanted, False, "output")
    with pytest.raises(RuntimeError, match="a gradient is asked for"):
        backward(x, x, None, w, turn, turn, *rstds, x, x, EPS, False, True, True, True, True, False, "output")


@pytest.mark.skipif(not ON_GPU, reason="a CPU without the interpreter has no kernels to fall back from")
def test_a_gpu_says_once_what_has_no_kernel(device: torch.device) -> None:
    x = torch.randn(2, 2, 2048, device=device)
    road._warn_once.cache_clear()  # a test before this one may have been told
    with pytest.warns(UserWarning, match="over 1024 elements"):
        functional.qk_norm(x, x)
