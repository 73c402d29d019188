"""save="output": y kept in place of x, wherever it can be undone."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from paths import PATHS, SPECS, SPLIT, WIDE
from trinorm import functional, nn, reference
from trinorm.cli.check import SAMPLES
from trinorm.compare import assert_no_worse, unit_in_last_place
from trinorm.ops import road, row
from trinorm.ops.hosts import rows
from trinorm.ops.undo import undoable
from trinorm.spec import LAYER_NORM, RowNorm

ON_GPU = torch.cuda.is_available()
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def draw(m: int, n: int, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and dy: weights of both signs from 1/2 to 2, biases not beyond them."""
    x, dy = (torch.randn(m, n, device=device).to(dtype) for _ in range(2))
    weight = (torch.rand(n, device=device) * 1.5 + 0.5) * torch.randn(n, device=device).sign()
    bias = weight * (torch.rand(n, device=device) * 1.9 - 0.95)
    return x, weight.to(dtype), bias.to(dtype), dy


def check(spec: RowNorm, m: int, n: int, device: str, dtype: torch.dtype = torch.float32) -> None:
    """The kernels' gradients of a y beside the closed form's of the same y, in float64.

    As far off as torch's are on the problem that y came from, and as undoing makes them: it rounds x̂ where the bias is
    subtracted and in the product with 1/w, by half a last place each, and 1/w by two, as a GPU approximates it.
    """
    x, weight, bias, dy = draw(m, n, device, dtype)
    bias_or_none = bias if spec.center else None
    y, _, rstd = rows.forward(spec, x, 1, weight, bias_or_none, 1e-5, save=True)
    assert rstd is not None
    db = dtype if spec.center else None
    found = rows.backward(spec, dy, y, 1, weight, None, rstd, dx=True, dw=dtype, db=db, from_output=True, bias=bias_or_none)
    b = None if bias_or_none is None else bias_or_none.double()
    of_y = reference.gradients_of_output(
        spec, y.double(), 1, weight.double(), b, torch.float64 if spec.center else None, rstd, dy
    )
    distances = torchs_distances(spec, (x, weight, bias, dy))
    for _ in range(SAMPLES // min(m, n)):  # of a handful of numbers torch's largest error is chance
        others = torchs_distances(spec, draw(m, n, device, dtype))
        distances = [torch.maximum(so_far, again) for so_far, again in zip(distances, others, strict=True)]
    xhat = (y.double() - (0 if b is None else b)) / weight.double()
    rounded = lost(spec, 3 * torch.finfo(rstd.dtype).eps * xhat.abs(), xhat, rstd, weight, dy)
    for what, got, want, distance, more in zip(("dx", "dw", "db"), found, of_y, distances, rounded, strict=False):
        assert got is not None
        assert want is not None
        assert_no_worse(what, got, want, want + distance + more / 2)


def torchs_distances(spec: RowNorm, drawn: tuple[Tensor, Tensor, Tensor, Tensor]) -> list[Tensor]:
    """How far torch's dx, dw and, where there is one, db are from float64's, element by element."""
    x, weight, bias, dy = drawn
    problem = spec, x, weight.shape, weight, bias if spec.center else None, 1e-5
    exact, by_torch = reference.oracle_gradients(*problem, dy), reference.torch_gradients(*problem, dy)
    return [
        (torchs.double() - want).abs()
        for torchs, want in zip(by_torch, exact, strict=True)
        if torchs is not None and want is not None
    ]


def lost(
    spec: RowNorm, off: Tensor, xhat: Tensor, rstd: Tensor, weight: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """How far dx, dw and db are off, to first order, where x̂ is off by ``off``: at the most."""
    g, rstd = dy.double() * weight.double(), rstd.double()[:, None]
    dx = rstd * (off * (g * xhat).mean(1, keepdim=True).abs() + xhat.abs() * (g.abs() * off).mean(1, keepdim=True))
    return dx, (dy.double().abs() * off).sum(0), torch.zeros_like(weight, dtype=torch.float64)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("n", [1, 17, 768, 1000, 4097])
@pytest.mark.parametrize("path", PATHS)
def test_held(spec: RowNorm, n: int, path: str, device: str, force: Callable[[object, object], None]) -> None:
    force(*PATHS[path])
    check(spec, 7, n, device)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("n", [5, 4097])
def test_wide(spec: RowNorm, n: int, device: str, force: Callable[[object, object], None]) -> None:
    force(*WIDE)
    check(spec, 7, n, device)


@pytest.mark.skipif(not ON_GPU, reason="programs wait for each other, which the interpreter runs one after the other")
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("n", [2048, 12288, 98304])
def test_split(spec: RowNorm, n: int, device: str, force: Callable[[object, object], None]) -> None:
    force(*SPLIT)
    check(spec, 90, n, device)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [129, *([64, 4096, 8192, 12288, 16384, 65536] if ON_GPU else [])])
@pytest.mark.parametrize("m", [9, *([1030] if ON_GPU else [])])
def test_as_tuned(spec: RowNorm, dtype: torch.dtype, m: int, n: int, device: str) -> None:
    check(spec, m, n, device, dtype)


def norm(spec: RowNorm, x: Tensor, weight: Tensor | None, bias: Tensor | None, save: functional.Save) -> Tensor:
    if spec.center:
        return functional.layer_norm(x, x.shape[-1:], weight, bias, save=save)
    return functional.rms_norm(x, x.shape[-1:], weight, 1e-5, save=save)


def gradients(spec: RowNorm, x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, save: functional.Save) -> list[Tensor]:
    inputs = [x, weight, bias] if spec.center else [x, weight]
    for t in inputs:
        t.requires_grad_()
    return list(torch.autograd.grad(norm(spec, x, weight, bias if spec.center else None, save), inputs, dy))


def saved(spec: RowNorm, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, list[Tensor]]:
    """y, and all that is kept for the backward."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = norm(spec, x.requires_grad_(), weight, bias, "output")
    return y, kept


def shares(a: Tensor, others: list[Tensor]) -> bool:
    return a.untyped_storage().data_ptr() in {t.untyped_storage().data_ptr() for t in others}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_lose_what_y_was_rounded_by(spec: RowNorm, dtype: torch.dtype, device: str) -> None:
    """To first order: x̂ is off by u·|y/w|, and dx and dw by what that makes of them."""
    x, weight, bias, dy = draw(40, 96, device, dtype)
    for _ in range(3):  # the second is recorded, the third repeats it
        found = gradients(spec, x, weight, bias, dy, "output")
    problem = spec, x, (96,), weight, bias if spec.center else None, 1e-5
    exact, by_torch = reference.oracle_gradients(*problem, dy), reference.torch_gradients(*problem, dy)
    y, mean, rstd = reference.oracle(*problem)
    xhat = (x.detach().double() - mean[:, None]) * rstd[:, None]
    off = torch.finfo(dtype).eps / 2 * (y / weight.double()).abs()
    allowed = lost(spec, off, xhat, rstd, weight, dy)
    for got, want, torchs, more in zip(found, exact, by_torch, allowed, strict=False):
        assert want is not None
        assert torchs is not None
        limit = more + unit_in_last_place(want, dtype) + 2 * (torchs.double() - want).abs().max()
        assert ((got.double() - want).abs() <= limit).all()


@pytest.mark.parametrize("spec", SPECS)
def test_x_is_not_kept(spec: RowNorm, device: str) -> None:
    x, weight, bias, _ = draw(6, 64, device)
    y, kept = saved(spec, x, weight, bias if spec.center else None)  # type: ignore[arg-type]
    assert shares(y, kept)
    assert not shares(x, kept)
    others = [t for t in kept if not shares(t, [y, weight, bias])]
    assert sum(t.numel() for t in others) == 6, "rstd, and nothing else"


def said() -> None:
    """That x is saved instead: not again in this test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row._warn_once("layer_norm")


BAD = {
    "zero": lambda w, b: w[3].zero_(),
    "subnormal": lambda w, b: w[3].fill_(torch.finfo(w.dtype).tiny / 2),
    "infinite": lambda w, b: w[3].fill_(float("inf")),
    "NaN": lambda w, b: w[3].fill_(float("nan")),
    "less than the bias": lambda w, b: b[3].copy_(-1.01 * w[3]),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_undone_keeps_x_and_says_so_once(what: str, device: str) -> None:
    x, weight, bias, dy = draw(6, 64, device)
    BAD[what](weight, bias)
    row._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"layer_norm: save is 'output', but y cannot be undone .* the input is saved"):
        found = gradients(LAYER_NORM, x, weight, bias, dy, "output")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = gradients(LAYER_NORM, x, weight, bias, dy, "output")
    for got, more, want in zip(found, again, gradients(LAYER_NORM, x, weight, bias, dy, "input"), strict=True):
        assert got.equal(want) or what in ("infinite", "NaN")
        assert more.equal(want) or what in ("infinite", "NaN")


@pytest.mark.parametrize("change", ["in place", "data", "half", "fused"])
def test_weights_are_looked_at_each_time(change: str, device: str) -> None:
    """However they come to change: not all who write them count up their versions."""
    said()
    x, weight, bias, dy = draw(6, 64, device)
    module = nn.LayerNorm(64, device=device)
    module.save = "output"
    with torch.no_grad():
        module.weight.copy_(weight)
        module.bias.copy_(bias)
    before, kept = saved_by(module, x)
    assert shares(before, kept)
    if change == "in place":
        with torch.no_grad():
            module.weight[5] = 0.0
    elif change == "data":
        module.weight.data[5] = 0.0
    elif change == "half":
        with torch.no_grad():
            module.weight[5] = 1e-10
            module.bias[5] = 1e-11
        assert shares(*saved_by(module, x)), "fp32 has room for it"
        module.half()
        x, dy = x.detach().half(), dy.half()
    else:
        module.weight.grad, module.bias.grad = weight.sign(), torch.zeros_like(bias)
        weight.abs_().fill_(0.25)
        with torch.no_grad():
            module.weight.copy_(weight * module.weight.grad)
            module.bias.copy_(module.weight / 2)
        torch.optim.SGD(module.parameters(), lr=0.2, fused=True).step()
    y, kept = saved_by(module, x)
    assert shares(x, kept)
    assert not shares(y, kept)


def saved_by(module: torch.nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A module's y, and all that is kept for its backward."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = module(x.requires_grad_())
    return y, kept


LIMITS = [
    # x's dtype, the weight's, its values, the bias's, whether y of 64 columns can be undone
    (torch.float32, torch.float32, 1e-9, 1e-9, True),
    (torch.float16, torch.float32, 1e-9, 0.0, False),  # subnormal in y's dtype
    (torch.float16, torch.float32, 1e-3, 0.0, True),
    (torch.float32, torch.float64, 1e-50, 0.0, False),
    (torch.float16, torch.float16, 7000.0, 0.0, True),
    (torch.float16, torch.float16, 8000.0, 0.0, False),  # eight times that overflows, for |xhat| is up to the root of 64
    (torch.bfloat16, torch.float32, 1.0, -1.0, True),
    (torch.bfloat16, torch.float32, 1.0, -1.001, False),
]


@pytest.mark.parametrize(("dtype", "weight_dtype", "w", "b", "yes"), LIMITS)
def test_where_y_can_be_undone(
    dtype: torch.dtype, weight_dtype: torch.dtype, w: float, b: float, yes: bool, device: str
) -> None:
    weight, bias = (torch.full((64,), value, dtype=weight_dtype, device=device) for value in (w, b))
    assert undoable(weight, bias, 64, dtype) is yes
    assert undoable(-weight, -bias, 64, dtype) is yes
    if not b:
        assert undoable(weight, None, 64, dtype) is yes


@pytest.mark.parametrize("shape", [(2, 0), (0, 3), (0, 0)], ids=str)
def test_no_elements(shape: tuple[int, int], device: str) -> None:
    x = torch.ones(shape, device=device, requires_grad=True)
    w, b = (torch.ones(shape[1:], device=device, requires_grad=True) for _ in range(2))
    for y, leaves in (
        (functional.layer_norm(x, shape[1:], w, b, save="output"), (x, w, b)),
        (functional.rms_norm(x, shape[1:], w, save="output"), (x, w)),
    ):
        assert y.shape == shape
        for gradient, leaf in zip(torch.autograd.grad(y.sum(), leaves), leaves, strict=True):
            torch.testing.assert_close(gradient, torch.zeros_like(leaf))


def test_absent_parameters(device: str) -> None:
    assert undoable(None, None, 64, torch.bfloat16)
    assert undoable(None, torch.ones(4, device=device), 4, torch.bfloat16), "an absent weight is 1"
    assert not undoable(None, torch.full((4,), -1.5, device=device), 4, torch.bfloat16)


@pytest.mark.parametrize("spec", SPECS)
def test_second_derivatives_raise(spec: RowNorm, device: str) -> None:
    x, weight, bias, dy = draw(6, 64, device)
    y = norm(spec, x.requires_grad_(), weight, bias if spec.center else None, "output")
    with pytest.raises(RuntimeError, match="save is 'output', which keeps no input"):
        torch.autograd.grad(y, x, dy, create_graph=True)


@pytest.mark.parametrize("spec", SPECS)
def test_batched_gradients(spec: RowNorm, device: str) -> None:
    x, weight, bias, _ = draw(6, 64, device)
    dys = torch.randn(3, 6, 64, device=device)
    inputs = [x.requires_grad_(), weight.requires_grad_()]
    y = norm(spec, x, weight, bias if spec.center else None, "output")
    batched = torch.autograd.grad(y, inputs, dys, is_grads_batched=True, retain_graph=True)
    singly = [torch.autograd.grad(y, inputs, dy, retain_graph=True) for dy in dys]
    for got, want in zip(batched, zip(*singly, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(want))


def test_a_y_that_was_changed_is_refused(device: str) -> None:
    x, weight, bias, dy = draw(6, 64, device)
    y = norm(LAYER_NORM, x.requires_grad_(), weight, bias, "output")
    z = y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.backward(dy)


def test_an_unknown_save_is_refused(device: str) -> None:
    for call in (functional.layer_norm, functional.rms_norm):
        for save in ("y", None, 1, [1]):
            with pytest.raises(ValueError, match=f"save is {re.escape(repr(save))}; it must be 'input' or 'output'"):
                call(torch.ones(2, 4, device=device), (4,), save=save)  # type: ignore[operator]


@pytest.mark.parametrize("module", [nn.LayerNorm, nn.RMSNorm])
def test_modules(module: type[nn.LayerNorm] | type[nn.RMSNorm], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = module(8, device=device)
    made.save = "output"
    assert repr(made).endswith(", save='output')")
    for same in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert same.save == "output"
        assert repr(same) == repr(made)
    assert made.state_dict().keys() == module(8).state_dict().keys()
    x = torch.randn(3, 8, device=device)
    y, kept = saved_by(made, x)
    assert shares(y, kept)
    assert not shares(x, kept)


def test_where_the_kernels_do_not_run_it_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(road, "INTERPRETED", False)
    x, weight, bias, dy = draw(6, 64, "cpu")
    weight[3] = 0.0  # what the kernels would warn of
    row._warn_once.cache_clear()
    found, want = (gradients(LAYER_NORM, x, weight, bias, dy, save) for save in ("output", "input"))
    assert all(map(torch.equal, found, want))


@pytest.mark.skipif(not ON_GPU, reason="CUDA graphs")
def test_a_capture_keeps_x(device: str) -> None:
    x, weight, bias, dy = draw(6, 64, device)
    for _ in range(3):
        want = gradients(LAYER_NORM, x, weight, bias, dy, "input")
        gradients(LAYER_NORM, x, weight, bias, dy, "output")
    said()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients(LAYER_NORM, x, weight, bias, dy, "output")
    graph.replay()
    for got, exact in zip(found, want, strict=True):
        assert got.equal(exact)
