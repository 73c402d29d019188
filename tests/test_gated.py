"""Gated norms: functional/conditioned.py, ops/conditioned.py and kernels/conditioned.py. What they share with modulated
norms is test_modulated.py's.
"""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from conditioned_norms import DTYPES, EPS, NORMS, assert_right, gated, relative
from machine import ON_GPU
from trinorm import functional
from trinorm.compare import assert_no_worse
from trinorm.ops.hosts import conditioned_rows
from trinorm.reference import conditioned as conditioned_reference
from trinorm.spec import CASTS, GATE_ACTIVATIONS, LAYER_NORM, RMS_NORM, Cast, GateActivation, RowNorm
from trinorm.tuning import RowBackward, RowForward, Tile

# At the edges of tiles, and within them.
SIZES = (1, 2, 64, 65, 128, 200, 1000, 1025, 3073)
EVERY_SIZE = [(n, dtype) for n in SIZES for dtype in (DTYPES if n in (2, 65, 1000) else DTYPES[::2])]
ORDERS = pytest.mark.parametrize("first", [False, True], ids=["norm first", "gate first"])


def draw(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device) -> list[Tensor]:
    """x, its gate, and a weight and a bias."""
    return [torch.randn(s, device=device).to(dtype) for s in (shape, shape, shape[-1:], shape[-1:])]


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.name)
@pytest.mark.parametrize(("n", "dtype"), EVERY_SIZE, ids=str)
@ORDERS
def test_every_size(norm: RowNorm, dtype: torch.dtype, n: int, first: bool, device: torch.device) -> None:
    x, gate, weight, bias = draw(5, n, dtype=dtype, device=device)
    assert_right(gated(norm, x, gate, weight, bias if norm.center else None, first=first))


@pytest.mark.parametrize("activation", GATE_ACTIVATIONS)
@pytest.mark.parametrize("given", list(itertools.product((False, True), repeat=2)), ids=str)
@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.name)
@ORDERS
def test_with_and_without_parameters(
    activation: GateActivation, given: tuple[bool, bool], norm: RowNorm, first: bool, device: torch.device
) -> None:
    x, gate, *parameters = draw(3, 4, 40, dtype=torch.bfloat16, device=device)
    weight, bias = (t if there else None for t, there in zip(parameters, given, strict=True))
    assert_right(gated(norm, x, gate, weight, bias, activation=activation, first=first))


@pytest.mark.parametrize("of", [(1, 8), (8, 4), (96, 1), (32, 3), (5, 7)], ids=str)
@pytest.mark.parametrize("lead", [(), (1,), (2, 5), (40,)], ids=str)
@ORDERS
def test_groups(of: tuple[int, int], lead: tuple[int, ...], first: bool, device: torch.device) -> None:
    """Each with its part of the weight."""
    size, groups = of
    x, gate, weight, bias = draw(*lead, size * groups, dtype=torch.bfloat16, device=device)
    assert_right(gated(RMS_NORM, x, gate, weight, size=size, first=first))
    assert_right(gated(LAYER_NORM, x, gate, weight, bias, size=size, first=first))


@pytest.mark.parametrize("dtypes", [d for d in itertools.product(DTYPES[::-1][:3], repeat=3) if len(set(d)) > 1], ids=str)
@ORDERS
def test_gates_and_weights_of_other_dtypes(dtypes: tuple[torch.dtype, ...], first: bool, device: torch.device) -> None:
    x, gate, weight, _ = (t.to(dtype) for t, dtype in zip(draw(24, 24, device=device), (*dtypes, dtypes[2]), strict=True))
    assert_right(gated(RMS_NORM, x, gate, weight, first=first))


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
@pytest.mark.parametrize("weight_dtype", [None, torch.float32], ids=str)
@ORDERS
def test_casting_modes(
    cast: Cast, dtype: torch.dtype, weight_dtype: torch.dtype | None, first: bool, device: torch.device
) -> None:
    x, gate, weight, bias = draw(2, 5, 48, dtype=dtype, device=device)
    assert_right(gated(RMS_NORM, x, gate, weight.to(weight_dtype or dtype), cast=cast, first=first, size=24))
    assert_right(gated(LAYER_NORM, x, gate, weight.to(weight_dtype or dtype), bias, cast=cast, first=first))


@ORDERS
def test_gates_where_they_lie(first: bool, device: torch.device) -> None:
    """Beside x in one projection, aligned or not; and in layouts that are copied."""
    for n, offset in ((64, 0), (64, 1), (50, 3)):
        gate, x = torch.randn(2, 7, 3 * n + offset, device=device).bfloat16()[..., offset:].split((n, 2 * n), -1)
        weight = torch.randn(n, device=device)
        assert_right(gated(RMS_NORM, x[..., :n], gate, weight, first=first))
    x, gate, weight, _ = draw(3, 4, 32, device=device)
    for view in (
        lambda t: t.movedim(0, -2).contiguous().movedim(-2, 0) if t.dim() > 1 else t,
        lambda t: torch.stack((t, t), -1)[..., 0],
        lambda t: torch._neg_view(-t),
        lambda t: torch.cat((t, t), -1)[..., 16:48],
    ):
        assert_right(gated(RMS_NORM, x, view(gate), weight, size=16, first=first))
        assert_right(gated(RMS_NORM, view(x), gate, view(weight), size=16, first=first), view(torch.randn_like(x)))
    assert_right(gated(RMS_NORM, x, gate[:1].expand(3, 4, 32), weight, first=first))


@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("tile", [Tile(2, 32, 1), Tile(4, 16, 4)], ids=str)
@pytest.mark.parametrize("size", [40, 20])
@ORDERS
def test_programs_that_walk(
    programs: int, tile: Tile, size: int, first: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each group's rows by one program and by several, of more than one turn each; in chunks, with lanes to spare."""
    forward, backward = RowForward(tile, 1, True, True, True), RowBackward(tile, 1, 3, 1, True)
    monkeypatch.setattr(conditioned_rows, "choose_conditioned_forward", lambda *_: forward)
    monkeypatch.setattr(conditioned_rows, "choose_conditioned_backward", lambda *_: backward)
    monkeypatch.setattr(conditioned_rows, "programs_of_a_set", lambda *_: programs)
    assert_right(gated(LAYER_NORM, *draw(13, 40, device=device), size=size, first=first))


@pytest.mark.parametrize("scale", [2.0**70, 2.0**-70])
@ORDERS
def test_rows_beyond_the_squares_of_fp32(scale: float, first: bool, device: torch.device) -> None:
    """As the same rows within them; beside rows that are."""
    x, gate, weight, _ = draw(4, 100, device=device)
    factors = torch.tensor([1.0, scale, scale, 1.0], device=device)[:, None]
    call = gated(RMS_NORM, x, gate, weight, first=first, eps=0.0)
    expected = call()
    torch.testing.assert_close(call._replace(x=x * factors)(), expected, rtol=1e-6, atol=1e-6)
    dy, gradients = torch.randn_like(expected), []
    for scaled in (x, x * factors):
        leaves = [t.detach().requires_grad_() for t in (scaled, gate, weight)]
        gradients.append(torch.autograd.grad(call.of([*leaves, None])(), leaves, dy))
    torch.testing.assert_close(gradients[1][0] * factors, gradients[0][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[1][1:], gradients[0][1:], rtol=1e-5, atol=1e-6)


def test_a_gate_that_leaves_little(device: torch.device) -> None:
    """Of σ(-60), whose squares fp32 has not, a row with its usual size."""
    x, gate, weight, _ = draw(4, 100, device=device)
    call = gated(RMS_NORM, x, gate - 60, weight, activation="sigmoid", first=True, eps=0.0)
    by_torch = conditioned_reference.oracle(*call).y.float()
    assert_no_worse("y", call(), conditioned_reference.oracle(*call).y, by_torch * (1 + 2.0**-16))


@ORDERS
@pytest.mark.parametrize("activation", GATE_ACTIVATIONS)
def test_what_is_no_number_stays_where_it_is(first: bool, activation: GateActivation, device: torch.device) -> None:
    x, gate, weight, _ = draw(8, 33, device=device)
    x[0, 3], x[1, 20], x[2, 31], x[3] = torch.nan, torch.inf, -torch.inf, 0.0
    gate[4, 3], gate[5, 20], gate[6, 31], gate[7] = torch.nan, torch.inf, -200.0, 0.0
    call = gated(RMS_NORM, x, gate, weight, activation=activation, first=first)
    exact, by_torch = conditioned_reference.oracle(*call).y, conditioned_reference.composite(*call, torch.float32)
    assert_no_worse("y", call(), exact, by_torch)


@ORDERS
def test_the_same_bits_on_every_run_and_beside_any_rows(first: bool, device: torch.device) -> None:
    x, gate, weight, _ = draw(60, 96, dtype=torch.bfloat16, device=device)
    dy = torch.randn_like(x)

    def everything(rows: slice) -> list[Tensor]:
        leaves = [*(t.detach()[rows].requires_grad_() for t in (x, gate)), weight.detach().requires_grad_()]
        y = functional.gated_rms_norm(*leaves, group_size=32, norm_before_gate=not first, batch_invariant=True)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy[rows])]

    whole = everything(slice(None))
    for got, want in zip(everything(slice(None)), whole, strict=True):
        assert torch.equal(got, want)
    for rows in (slice(7, 8), slice(0, 33)):
        for got, want in zip(everything(rows)[:3], whole[:3], strict=True):
            assert torch.equal(got, want[rows])


@pytest.mark.parametrize("wanted", [w for w in itertools.product((False, True), repeat=4) if any(w)], ids=str)
@ORDERS
def test_only_what_is_asked_for(wanted: tuple[bool, ...], first: bool, device: torch.device, launched: list[Any]) -> None:
    given = draw(300, 24, device=device)
    dy = torch.randn_like(given[0])
    for _ in range(3):  # the third is a repetition of the second
        launched.clear()
        found = []
        for norm in ("kernels", "torch"):
            leaves = [t.detach().requires_grad_(want) for t, want in zip(given, wanted, strict=True)]
            call = gated(LAYER_NORM, *leaves, first=first)
            y = call() if norm == "kernels" else conditioned_reference.composite(*call, torch.float32)
            found.append(torch.autograd.grad(y, [t for t in leaves if t.requires_grad], dy))
        names = ["conditioned_forward", "conditioned_backward", *(["sum_partials"] if any(wanted[2:]) else [])]
        assert [kernel.fn.__name__ for kernel in launched] == names
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0)], ids=str)
def test_nothing_to_normalize(shape: tuple[int, ...], device: torch.device, launched: list[object]) -> None:
    leaves = [t.requires_grad_() for t in draw(*shape, device=device)]
    y = functional.gated_layer_norm(*leaves)
    assert y.shape == shape
    for leaf, gradient in zip(leaves, torch.autograd.grad(y, leaves, torch.randn_like(y)), strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))
    assert launched == []


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES[:3], ids=str)
def test_in_transformers(dtype: torch.dtype, weight_dtype: torch.dtype, device: torch.device) -> None:
    """Qwen3-Next's and Mamba2's, in the casting mode "llama": by torch's operators the same bits, and by the kernels but
    where fp32's last place of rstd or of the gate shows.
    """
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    mamba = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    zamba = pytest.importorskip("transformers.models.zamba2.modeling_zamba2")
    x, gate, weight, _ = draw(2, 9, 96, dtype=dtype, device=device)
    weight = weight.to(weight_dtype)
    grouped = "group_size" in inspect.signature(mamba.MambaRMSNormGated).parameters  # not in transformers 5.17
    for module, first, size in (
        (qwen.Qwen3NextRMSNormGated(96, EPS), False, 96),
        (mamba.MambaRMSNormGated(96, *[96] * grouped, EPS), True, 96),
        *[(mamba.MambaRMSNormGated(96, 24, EPS), True, 24) for _ in range(grouped)],
        (zamba.Zamba2RMSNormGated(96, 32, EPS), True, 32),
    ):
        module.to(device)
        module.weight.data = weight
        want = module(x, gate)
        call = gated(RMS_NORM, x, gate, weight, size=size, first=first, cast="llama")
        by_torch, y = conditioned_reference.composite(*call, dtype), call()
        if want.dtype == dtype:
            assert ON_GPU or torch.equal(by_torch, want)
        else:  # Mamba2's result has its weight's dtype, where that is wider
            assert torch.equal(by_torch, want.to(dtype))
        if dtype == torch.float32:
            torch.testing.assert_close(y, by_torch)
        else:
            assert (y != by_torch).float().mean() < 0.01
            assert (y - by_torch).abs().max() <= 4 * torch.finfo(dtype).eps * by_torch.abs().max()


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_the_l2_norm_in_transformers(dtype: torch.dtype, device: torch.device) -> None:
    """Qwen3-Next's of queries and keys, in fp32: torch's operators give its bits, and the kernels are no worse. It is no
    gated norm, but to import transformers takes seconds.
    """
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    x = torch.randn(2, 5, 4, 64, device=device).to(dtype).requires_grad_()
    want = qwen.l2norm(x.float(), dim=-1, eps=1e-6).to(dtype)
    call = relative(x.detach(), divisor=1, eps=1e-6)
    assert torch.equal(conditioned_reference.composite(*call, dtype), want)
    y, dy = functional.l2_norm(x), torch.randn_like(want)
    assert_no_worse("y", y.detach(), conditioned_reference.oracle(*call).y, want.detach())
    (found,), (theirs,) = (torch.autograd.grad(t, x, dy) for t in (y, want))
    exact = conditioned_reference.oracle_gradients(*call, dy)[0]
    assert exact is not None
    assert_no_worse("dx", found, exact, theirs)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_in_transformers_rounded_once(dtype: torch.dtype, device: torch.device) -> None:
    """Kimi Linear's, whose gate is a sigmoid, and Falcon-H1's, of groups and in both orders."""
    kimi = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    falcon = pytest.importorskip("transformers.models.falcon_h1.modeling_falcon_h1")
    x, gate, weight, _ = draw(2, 9, 96, dtype=dtype, device=device)
    for module, how in (
        (kimi.KimiLinearRMSNormGated(96, EPS), dict(activation="sigmoid")),
        (falcon.FalconH1RMSNormGated(96, EPS, 4), dict(size=24)),
        (falcon.FalconH1RMSNormGated(96, EPS, 3, norm_before_gate=False), dict(size=32, first=True)),
    ):
        module.to(device)
        module.weight.data = weight
        want = module(x, gate)
        call = gated(RMS_NORM, x, gate, weight, **how)
        by_torch = conditioned_reference.composite(*call, dtype)
        assert ON_GPU or torch.equal(by_torch, want)
        assert_no_worse("y", call(), conditioned_reference.oracle(*call).y, want)


@pytest.mark.parametrize("cast", ["output", "llama"])
def test_gradients_are_of_what_was_met(cast: Cast, device: torch.device) -> None:
    """Of one row, whose dw is no sum: x̂, and what the gate multiplies, as they were rounded, or were not."""
    x, gate, weight, _ = draw(1, 256, dtype=torch.bfloat16, device=device)
    gate, dy = gate.float(), torch.randn_like(x)
    leaves = [t.detach().requires_grad_() for t in (gate, weight.float(), weight)]
    xhat = x.float() * (x.float().square().mean(-1, keepdim=True) + EPS).rsqrt()
    xhat = xhat.bfloat16().float() if cast == "llama" else xhat
    s = gate.sigmoid()
    for w, rounds in ((leaves[1], False), (leaves[2], cast == "llama")):
        y = functional.gated_rms_norm(x, leaves[0], w, eps=EPS, cast=cast)
        dgate, dw = torch.autograd.grad(y, (leaves[0], w), dy)
        n = xhat * w.detach().float()
        n = n.bfloat16().float() if rounds else n
        expected = dy.float() * n * (s + gate * s * (1 - s)), (dy.float() * gate * s * xhat).view(-1).to(w.dtype)
        for got, want in zip((dgate, dw), expected, strict=True):
            assert torch.isclose(got, want, rtol=1e-5, atol=1e-7).float().mean() > 0.98


@pytest.mark.skipif(not ON_GPU, reason="the interpreter takes minutes")
@pytest.mark.parametrize(("n", "size"), [(2048, 128), (4096, 4096), (8192, 1024), (8192, 8192)], ids=str)
@ORDERS
def test_the_launches_of_real_sizes(n: int, size: int, first: bool, device: torch.device) -> None:
    x, gate, weight, _ = draw(4, 1024, n, dtype=torch.bfloat16, device=device)
    assert_right(gated(RMS_NORM, x, gate, weight, size=size, first=first))
