"""functional.py: torch.nn.functional's meaning, on any input, and its errors."""

from __future__ import annotations

import inspect
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from trinorm import functional, nn, reference
from trinorm.compare import assert_no_worse
from trinorm.ops.hosts import rows
from trinorm.spec import LAYER_NORM, RMS_NORM, RowNorm

SPECS = {"layer_norm": LAYER_NORM, "rms_norm": RMS_NORM}
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(params=SPECS)
def op(request: pytest.FixtureRequest) -> str:
    return request.param


def _call(
    op: str, x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> Tensor:
    if op == "layer_norm":
        return functional.layer_norm(x, shape, weight, bias, eps)
    return functional.rms_norm(x, shape, weight, eps)


def _parameters(op: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor | None]:
    weight = torch.randn(shape, device=device).to(dtype)
    return weight, torch.randn(shape, device=device).to(dtype) if op == "layer_norm" else None


def _check(
    op: str, x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, dy: Tensor | None = None
) -> None:
    """Value and gradients against the oracle, torch's own composite in the same dtypes as the yardstick."""
    spec = SPECS[op]
    dy = torch.randn(x.shape, device=x.device).to(x.dtype) if dy is None else dy

    def run(f: Callable[[Tensor, Tensor | None, Tensor | None], Tensor]) -> tuple[Tensor, list[Tensor]]:
        inputs = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
        y = f(*inputs)
        return y.detach(), list(torch.autograd.grad(y, [t for t in inputs if t is not None], dy))

    y, gradients = run(lambda x, w, b: _call(op, x, shape, w, b))
    by_torch, gradients_by_torch = run(lambda x, w, b: reference.composite(spec, x, shape, w, b, 1e-5))
    assert y.is_contiguous()
    assert y.dtype == x.dtype
    assert_no_worse("y", y, reference.oracle(spec, x, shape, weight, bias, 1e-5).y, by_torch)
    exact = [g for g in reference.oracle_gradients(spec, x, shape, weight, bias, 1e-5, dy) if g is not None]
    for what, got, want, theirs in zip(("dx", "dw", "db"), gradients, exact, gradients_by_torch, strict=False):
        assert_no_worse(what, got, want, theirs)


def test_signatures_are_torchs(op: str) -> None:
    ours, theirs = (inspect.signature(getattr(module, op)).parameters for module in (functional, F))
    assert [*theirs, "save", "cast", "batch_invariant"] == list(ours)
    assert [*(p.default for p in theirs.values()), "input", "output", None] == [p.default for p in ours.values()]
    assert {ours[name].kind for name in ("save", "cast", "batch_invariant")} == {inspect.Parameter.KEYWORD_ONLY}


def test_eps_none_is_torchs(device: torch.device) -> None:
    """Tiny x, so that eps decides: the epsilon of the dtype computed in, not of x's own, whatever torch's manual says."""
    for dtype in FLOATS:
        x = torch.full((2, 64), 2e-4, device=device).to(dtype)
        torch.testing.assert_close(functional.rms_norm(x, (64,)), F.rms_norm(x, (64,)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("parameters", [None, *FLOATS], ids=str)
def test_weight_of_any_floating_dtype(
    op: str, dtype: torch.dtype, parameters: torch.dtype | None, device: torch.device
) -> None:
    x = torch.randn(24, 48, device=device).to(dtype)
    weight, bias = (None, None) if parameters is None else _parameters(op, (48,), parameters, device)
    _check(op, x, (48,), weight, bias)


def test_parameters_of_any_strides(op: str, device: torch.device) -> None:
    x = torch.randn(24, 48, device=device)
    weight, bias = _parameters(op, (96,), torch.float32, device)
    _check(op, x, (48,), weight[::2], None if bias is None else bias[:1].expand(48))
    _check(op, x.view(24, 6, 8), (6, 8), weight[:48].view(8, 6).T, None if bias is None else bias[::2].view(6, 8))


def test_weight_without_bias_and_bias_without_weight(device: torch.device) -> None:
    x = torch.randn(24, 48, device=device)
    weight, bias = _parameters("layer_norm", (48,), torch.float32, device)
    _check("layer_norm", x, (48,), weight, None)
    _check("layer_norm", x, (48,), None, bias)


@pytest.mark.parametrize("shape", [(8,), (4, 8), (3, 4, 8), (2, 3, 4, 8)], ids=str)
def test_normalized_shape_of_several_dims(op: str, shape: tuple[int, ...], device: torch.device) -> None:
    _check(op, torch.randn(2, 3, 4, 8, device=device), shape, *_parameters(op, shape, torch.float32, device))


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "sliced rows": lambda x: x[::2],
    "a slice of a packed last dim": lambda x: x[..., 16:48],
    "transposed leading dims": lambda x: x.transpose(0, 1),
    "heads out of packed qkv": lambda x: x.unflatten(-1, (3, 2, 16))[:, :, 1].transpose(1, 2),
    "expanded": lambda x: x[:1].expand(4, *x.shape[1:]),
    "flipped order of three dims": lambda x: x.unflatten(1, (2, 3)).permute(2, 1, 0, 3),
    "strided last dim": lambda x: x[..., ::2],
    "transposed last dim": lambda x: x.transpose(1, 2),
    "misaligned storage": lambda x: x.flatten()[1 : 1 + 5 * 96].view(5, 96),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_strided_input_and_gradient(op: str, view: str, dtype: torch.dtype, device: torch.device) -> None:
    x = VIEWS[view](torch.randn(4, 6, 96, device=device).to(dtype))
    dy = VIEWS[view](torch.randn(4, 6, 96, device=device).to(dtype))
    n = x.shape[-1]
    weight, bias = _parameters(op, (n,), dtype, device)
    _check(op, x, (n,), weight, bias, dy)
    _check(op, x, (n,), weight, bias, torch.ones((), device=device).to(dtype).expand(x.shape))


def test_strided_rows_are_read_without_a_copy(op: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    actual = rows.launch
    monkeypatch.setattr(
        rows, "launch", lambda k, g, d, args, o: (read.append(args[4].data_ptr()), actual(k, g, d, args, o))
    )
    x = torch.randn(4, 6, 96, device=device)
    for name in ("sliced rows", "a slice of a packed last dim", "transposed leading dims", "heads out of packed qkv"):
        view = VIEWS[name](x)
        _call(op, view, (view.shape[-1],), None, None)
        assert read.pop() == view.data_ptr(), name
    assert not read


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (4, 0), (0, 0)], ids=str)
def test_no_rows_or_no_columns(op: str, shape: tuple[int, ...], device: torch.device) -> None:
    x = torch.randn(shape, device=device, requires_grad=True)
    weight = torch.ones(shape[-1:], device=device, requires_grad=True)
    y = _call(op, x, shape[-1:], weight, None)
    assert y.shape == x.shape
    dx, dw = torch.autograd.grad(y.sum(), (x, weight))
    assert dx.shape == x.shape
    assert torch.equal(dw, torch.zeros_like(weight))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("n", [24, 300])
def test_nan_or_inf_in_one_row_leaves_the_others_untouched(op: str, value: float, n: int, device: torch.device) -> None:
    x = torch.randn(9, n, device=device)
    weight, bias = _parameters(op, (n,), torch.float32, device)
    bad = x.clone()
    bad[4, 7] = value

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        y = _call(op, x, (n,), weight, bias)
        return y.detach(), torch.autograd.grad(y, x, torch.ones_like(y))[0]

    others = [i for i in range(9) if i != 4]
    for good_result, bad_result in zip(run(x), run(bad), strict=True):
        assert torch.equal(good_result[others], bad_result[others])
    exact = reference.oracle(SPECS[op], bad, (n,), weight, bias, 1e-5).y[4]
    assert torch.equal(run(bad)[0][4].isnan(), exact.isnan())


def test_only_the_gradients_asked_for(op: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    actual = rows.backward
    monkeypatch.setattr(rows, "backward", lambda *a, **k: (asked.append({n for n in k if k[n]}), actual(*a, **k))[1])
    x = torch.randn(4, 8, device=device)
    for wants_x, wants_w in ((True, False), (False, True), (True, True)):
        inputs = [x.clone().requires_grad_(wants_x), torch.ones(8, device=device).requires_grad_(wants_w)]
        _call(op, inputs[0], (8,), inputs[1], None).sum().backward()
        assert asked.pop() == {name for name, wanted in (("dx", wants_x), ("dw", wants_w)) if wanted}
        assert [t.grad is not None for t in inputs] == [wants_x, wants_w]


def test_saved_statistics_are_fp32(op: str, device: torch.device) -> None:
    for dtype in FLOATS:
        _, mean, rstd = rows.forward(SPECS[op], torch.randn(3, 8, device=device).to(dtype), 1, None, None, 1e-5, save=True)
        expected = torch.float64 if dtype == torch.float64 else torch.float32
        assert rstd is not None
        assert rstd.dtype == expected
        assert (mean is not None) == (op == "layer_norm")


def test_gradcheck(op: str, device: torch.device) -> None:
    shape = (5,)
    x = torch.randn(3, *shape, device=device, dtype=torch.float64, requires_grad=True)
    inputs = [x, *(t.requires_grad_() for t in _parameters(op, shape, torch.float64, device) if t is not None)]
    assert torch.autograd.gradcheck(lambda x, w, b=None: _call(op, x, shape, w, b), inputs)


def test_second_derivatives(op: str, device: torch.device) -> None:
    """Exact, where a kernel alone would drop them in silence."""
    shape = (4,)
    x = torch.randn(2, *shape, device=device, dtype=torch.float64, requires_grad=True)
    inputs = [x, *(t.requires_grad_() for t in _parameters(op, shape, torch.float64, device) if t is not None)]
    assert torch.autograd.gradgradcheck(lambda x, w, b=None: _call(op, x, shape, w, b), inputs)


def test_transforms_take_the_composite(op: str, device: torch.device) -> None:
    x, tangent = torch.randn(4, 8, device=device), torch.randn(4, 8, device=device)
    with warnings.catch_warnings():
        # On a GPU falling back says so once; here it is meant.
        warnings.filterwarnings("ignore", "trinorm")
        f, theirs = (lambda x: getattr(functional, op)(x, (8,))), (lambda x: getattr(F, op)(x, (8,)))
        for ours, torchs in zip(torch.func.jvp(f, (x,), (tangent,)), torch.func.jvp(theirs, (x,), (tangent,)), strict=True):
            torch.testing.assert_close(ours, torchs)
        torch.testing.assert_close(torch.func.vmap(f)(x), torch.func.vmap(theirs)(x))
        torch.testing.assert_close(torch.func.jacrev(f)(x), torch.func.jacrev(theirs)(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU call has a fast road to fall from")
def test_falling_back_on_a_gpu_says_so_once(op: str) -> None:
    from trinorm.ops import road

    road._warn_once.cache_clear()
    x = torch.randn(4, 8, device="cuda")
    with pytest.warns(UserWarning, match=r"torch\.func"):
        torch.func.vmap(lambda x: getattr(functional, op)(x, (8,)))(x)
    torch.func.vmap(lambda x: getattr(functional, op)(x, (8,)))(x)


def test_autocast_returns_what_torch_returns(op: str, device: torch.device) -> None:
    x, weight = (torch.randn(size, device=device).bfloat16() for size in ((4, 8), (8,)))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ours, theirs = _call(op, x, (8,), weight, None), getattr(F, op)(x, (8,), weight, eps=1e-5)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=2**-7, atol=2**-7)


@pytest.mark.filterwarnings("ignore:trinorm:UserWarning")
def test_autocast_returns_the_same_dtype_by_every_road(op: str, device: torch.device) -> None:
    x = torch.randn(4, 8, device=device).bfloat16()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        for weight in (None, torch.randn(8, device=device).bfloat16(), torch.randn(8, device=device)):
            by_kernel = _call(op, x, (8,), weight, None)
            by_composite = torch.func.vmap(lambda x, w=weight: _call(op, x, (8,), w, None))(x)
            assert by_kernel.dtype == by_composite.dtype


def test_batched_gradients(op: str, device: torch.device) -> None:
    """is_grads_batched maps over the backward alone, with tensors that have no storage."""
    x = torch.randn(3, 8, device=device, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(5, 3, 8, device=device, dtype=torch.float64)
    y = _call(op, x, (8,), None, None)
    (batched,) = torch.autograd.grad(y, x, dy, is_grads_batched=True, retain_graph=True)
    one_by_one = torch.stack([torch.autograd.grad(y, x, row, retain_graph=True)[0] for row in dy])
    torch.testing.assert_close(batched, one_by_one)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced_for_any_number_of_rows(op: str, device: torch.device) -> None:
    traced = torch.jit.trace(lambda x: getattr(functional, op)(x, (8,)), torch.randn(2, 8, device=device))
    x = torch.randn(5, 8, device=device)
    torch.testing.assert_close(traced(x), getattr(F, op)(x, (8,)))


def test_tracers_see_one_call(op: str) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return getattr(functional, op)(x, (8,))

    graph = torch.fx.symbolic_trace(Model())
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [getattr(functional, op)]
    x = torch.randn(2, 8)
    torch.testing.assert_close(graph(x), getattr(F, op)(x, (8,)))


@pytest.mark.parametrize("module", [nn.LayerNorm(8), nn.RMSNorm(8), nn.GatedRMSNorm(8)], ids=str)
def test_a_module_traced_by_fx_is_pickled(module: torch.nn.Module) -> None:
    """Whose graph writes down what its arguments are annotated as, which are types."""
    traced = pickle.loads(pickle.dumps(torch.fx.symbolic_trace(module)))
    tensors = [torch.randn(3, 8) for _ in inspect.signature(module.forward).parameters]
    assert torch.equal(traced(*tensors), module(*tensors))


def test_a_function_mode_sees_one_call(op: str, device: torch.device) -> None:
    """Also of a call seen before: nothing is asked of a tensor where the mode sees it, as set_default_device's would."""
    seen: list[object] = []

    class See(TorchFunctionMode):
        def __torch_function__(
            self, function: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: object = None
        ) -> object:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    norm = getattr(functional, op)
    x = torch.randn(2, 8, device=device)
    expected = norm(x, (8,))
    for _ in range(2):
        seen.clear()
        with See():
            y = norm(x, (8,))
        assert seen == [norm]
        assert torch.equal(y, expected)


def test_eps_as_a_tensor_is_a_number(op: str, device: torch.device) -> None:
    x = torch.randn(2, 8, device=device)
    assert torch.equal(getattr(functional, op)(x, (8,), eps=torch.tensor(1e-3)), getattr(functional, op)(x, (8,), eps=1e-3))


@pytest.mark.parametrize("value", [1 / 3, 1e30 / 3, 1e-30 / 3], ids=str)
@pytest.mark.parametrize("n", [65, 1000])
def test_rows_of_one_value_have_no_deviation(value: float, n: int, device: torch.device) -> None:
    y = functional.layer_norm(torch.full((2, n), value, device=device), (n,))
    assert torch.equal(y, torch.zeros_like(y))


def _nothing_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a kernel was launched on bad input")

    monkeypatch.setattr(rows, "launch", refuse)


X = torch.randn(2, 3)
BAD: dict[str, tuple[tuple[object, ...], dict[str, object], type[Exception], str]] = {
    "shape does not fit": ((X, (4,)), {}, RuntimeError, r"normalized_shape is \(4,\), but input has shape \(2, 3\)"),
    "too many dims": ((X, (1, 2, 3)), {}, RuntimeError, "normalized_shape"),
    "empty shape": ((X, ()), {}, RuntimeError, "at least one dim"),
    "scalar input": ((torch.tensor(1.0), (1,)), {}, RuntimeError, "normalized_shape"),
    "an int for a shape": ((X, 3), {}, TypeError, r"write \(3,\)"),
    "an iterator for a shape": ((X, iter((3,))), {}, TypeError, "tuple or a list"),
    "a set for a shape": ((X, {3}), {}, TypeError, "tuple or a list"),
    "bytes for a shape": ((X, b"\x03"), {}, TypeError, "tuple or a list"),
    "True in the shape": ((X[:, :1], (True,)), {}, TypeError, "ints"),
    "a float in the shape": ((X, (3.0,)), {}, TypeError, "ints"),
    "a list for input": (([1.0], (1,)), {}, TypeError, "input must be a Tensor"),
    "weight of another shape": ((X, (3,), torch.ones(4)), {}, RuntimeError, r"weight has shape \(4,\)"),
    "weight on another device": ((X, (3,), torch.ones(3, device="meta")), {}, RuntimeError, "weight is on meta"),
    "sparse": ((X.to_sparse(), (3,)), {}, NotImplementedError, "input has layout torch.sparse_coo"),
    "a sparse weight": ((X, (3,), torch.ones(3).to_sparse()), {}, NotImplementedError, "weight has layout"),
    "integers": ((X.int(), (3,)), {}, NotImplementedError, "input has dtype torch.int32"),
    "integer weight": ((X, (3,), torch.ones(3).int()), {}, NotImplementedError, "weight has dtype torch.int32"),
    "complex": ((X.to(torch.complex64), (3,)), {}, NotImplementedError, "complex64"),
    "fp8": ((X.to(torch.float8_e4m3fn), (3,)), {}, NotImplementedError, "float8"),
    "negative eps": ((X, (3,)), {"eps": -1e-5}, ValueError, "eps is -1e-05"),
    "eps NaN": ((X, (3,)), {"eps": float("nan")}, ValueError, "eps is nan"),
    "eps a string": ((X, (3,)), {"eps": "1e-5"}, TypeError, "eps"),
    "eps of many values": ((X, (3,)), {"eps": torch.ones(2)}, TypeError, "eps"),
    "a list for weight": ((X, (3,), [1.0, 1.0, 1.0]), {}, TypeError, "weight must be a Tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(op: str, case: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, options, error, message = BAD[case]
    if op == "rms_norm" and case in ("too many dims", "scalar input"):  # as torch's
        error = ValueError
    _nothing_launches(monkeypatch)
    moved = [t.to(device) if isinstance(t, Tensor) and t.device.type == "cpu" else t for t in arguments]
    with pytest.raises(error, match=message):
        getattr(functional, op)(*moved, **options)


def test_bad_bias(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    _nothing_launches(monkeypatch)
    with pytest.raises(RuntimeError, match=r"bias has shape \(2,\)"):
        functional.layer_norm(X.to(device), (3,), None, torch.ones(2, device=device))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_kernels_really_run(spec: RowNorm, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards every test above: nothing here passes by way of torch's own op."""
    launched = []
    actual = rows.launch
    monkeypatch.setattr(rows, "launch", lambda *a: (launched.append(a[0]), actual(*a)))
    x = torch.randn(2, 8, device=device, requires_grad=True)
    getattr(functional, spec.name)(x, (8,)).sum().backward()
    assert len(launched) == 2
