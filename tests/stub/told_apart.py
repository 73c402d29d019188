"""Which calls are done like one seen before, and which are looked at anew; on the recording driver, as launched.py."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from norms import assert_same, call, draw
from stub_driver import Launch, Stub
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from trinorm import functional, reference
from trinorm.spec import LAYER_NORM, RMS_NORM, RowNorm


def variants() -> dict[str, tuple[RowNorm, list[Tensor | None]]]:
    """Calls of one shape that differ in one thing each."""
    x, w, b = torch.randn(8, 64), torch.randn(64), torch.randn(64)
    wide = torch.randn(8, 128)
    return {
        "both": (LAYER_NORM, [x, w, b]),
        "no bias": (LAYER_NORM, [x, w, None]),
        "no weight": (LAYER_NORM, [x, None, b]),
        "neither": (LAYER_NORM, [x, None, None]),
        "rms": (RMS_NORM, [x, w]),
        "x bf16": (LAYER_NORM, [x.bfloat16(), w, b]),
        "weight bf16": (LAYER_NORM, [x, w.bfloat16(), b]),
        "bias fp16": (LAYER_NORM, [x, w, b.half()]),
        "strided": (LAYER_NORM, [wide[:, :64], w, b]),
        "one row for all": (LAYER_NORM, [x[:1].expand(8, 64), w, b]),
        "a gradient": (LAYER_NORM, [x, w.clone().requires_grad_(), b]),
        "a parameter": (LAYER_NORM, [x, torch.nn.Parameter(w.clone(), requires_grad=False), b]),
    }


def test_what_differs_is_kept_apart(stub: Stub, ordinary: list[str]) -> None:
    """Every variant is new the first time, and repeated the second, with what its own first time passed."""
    calls = variants()
    expected: dict[str, Launch] = {}
    for name, (spec, tensors) in calls.items():
        ordinary.clear()
        call(spec, *tensors)  # type: ignore[arg-type]
        assert len(ordinary) == 1, name
        (expected[name],) = stub.launches()
    for name, (spec, tensors) in calls.items():
        ordinary.clear()
        call(spec, *tensors)  # type: ignore[arg-type]
        (found,) = stub.launches()
        present = {t.data_ptr(): str(i) for i, t in enumerate(tensors) if t is not None}
        assert_same([expected[name]], [found], present, present)
        assert ordinary == [], name


def test_eps_is_passed_and_told_apart(stub: Stub) -> None:
    x = torch.randn(8, 64)
    for _ in range(2):
        for eps in (1e-5, 1e-6, 0, None, 0.25):
            functional.rms_norm(x, (64,), None, eps)
            used = 1.1920928955078125e-07 if eps is None else float(eps)
            (bits,) = torch.tensor([used], dtype=torch.float64).view(torch.int64).tolist()
            assert bits in stub.launches()[0].parameters


def test_a_tensors_eps_is_read_each_time(stub: Stub) -> None:
    x, eps = torch.randn(8, 64), torch.tensor(0.5, dtype=torch.float64)
    for value in (0.5, 0.25):
        eps.fill_(value)
        functional.rms_norm(x, (64,), None, eps)  # type: ignore[arg-type]
        assert eps.view(torch.int64).item() in stub.launches()[0].parameters


def test_bad_arguments_are_refused_after_good_ones(stub: Stub) -> None:
    x = torch.randn(8, 64)
    shape = [64]
    functional.rms_norm(x, shape)
    functional.rms_norm(x, (64,), None, 1.0)
    stub.launches()
    shape[0] = 32
    with pytest.raises(RuntimeError, match=r"normalized_shape is \(32,\)"):
        functional.rms_norm(x, shape)
    with pytest.raises(TypeError, match="ints"):
        functional.rms_norm(x, (64.0,))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="write"):
        functional.rms_norm(x, 64)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="eps"):
        functional.rms_norm(x, (64,), None, 1.0 + 0j)  # type: ignore[arg-type]
    assert stub.launches() == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_tracers_and_modes_see_the_composite(stub: Stub) -> None:
    """Though the same call was seen before, outside of them."""
    x, weight = draw(RMS_NORM, 8, 64, torch.float32, grad=False)
    for _ in range(2):
        call(RMS_NORM, x, weight)
    assert len(stub.launches()) == 2
    expected = torch.nn.functional.rms_norm(x, (64,), weight, 1e-5)
    traced = torch.jit.trace(lambda x: functional.rms_norm(x, (64,), weight, 1e-5), x, check_trace=False)
    with FlopCounterMode(display=False):
        counted = call(RMS_NORM, x, weight)
    with torch.autograd.forward_ad.dual_level():
        dual = call(RMS_NORM, x, weight)
    mapped = torch.func.vmap(lambda _: call(RMS_NORM, x, weight), out_dims=None)(torch.ones(2))
    for found in (traced(x), counted, dual, mapped):
        torch.testing.assert_close(found, expected)
    assert stub.launches() == []
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    for _ in range(2):
        compiled(RMS_NORM, x, weight)
        assert len(stub.launches()) == 1, "by the registered op"
    call(RMS_NORM, x, weight)
    assert len(stub.launches()) == 1


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_mapped_nested_tensor_is_refused(stub: Stub) -> None:
    """After good calls too. It does not say that it is nested, and torch's guard would ask its strides."""
    x, residual, weight = torch.randn(8, 64), torch.randn(8, 64), torch.randn(64)
    nested = torch.nested.nested_tensor([torch.randn(3, 64), torch.randn(2, 64)])
    for norm in (lambda x: functional.rms_norm(x, (64,), weight), lambda x: functional.add_rms_norm(x, residual)[0]):
        for _ in range(2):
            norm(x)
        with pytest.raises(RuntimeError, match="nested"):
            torch.func.vmap(norm)(nested)


def test_autocast_is_told_apart(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its policy is fp32, a call under it is cast though its like was seen outside, and the next outside is not."""
    monkeypatch.setattr(reference, "autocast_to_fp32", lambda spec, device: torch.is_autocast_enabled(device))
    x, weight = draw(RMS_NORM, 8, 64, torch.bfloat16, grad=False)
    for _ in range(2):
        for autocast in (False, True):
            with torch.autocast("cpu", enabled=autocast):
                assert call(RMS_NORM, x, weight).dtype == (torch.float32 if autocast else torch.bfloat16)
    assert len({launch.function for launch in stub.launches()}) == 2


def test_no_tensor_is_held(stub: Stub) -> None:
    x, weight = draw(RMS_NORM, 8, 64, torch.float32, grad=True)
    y = call(RMS_NORM, x, weight)
    y.sum().backward()
    held = [weakref.ref(t) for t in (x, weight, y, x.grad, weight.grad)]
    storages = [weakref.ref(t.untyped_storage()) for t in (x, weight)]
    del x, weight, y
    gc.collect()
    assert [ref() for ref in (*held, *storages)] == [None] * 7


def test_a_gradient_that_is_the_input_itself(stub: Stub) -> None:
    """A tensor passed twice at first does not tie its two places together."""
    x, weight = draw(RMS_NORM, 8, 64, torch.float32, grad=False)
    weight.requires_grad_()
    call(RMS_NORM, x, weight).backward(x)
    dy = torch.randn(8, 64)
    y = call(RMS_NORM, x, weight)
    stub.launches()
    y.backward(dy)
    (backward,) = stub.launches()
    assert backward.parameters.count(dy.data_ptr()) == 1
    assert backward.parameters.count(x.data_ptr()) == 1


def test_gradients_of_other_layouts_and_dtypes_are_told_apart(stub: Stub, ordinary: list[str]) -> None:
    x, weight = draw(RMS_NORM, 8, 64, torch.float32, grad=True)
    given = [torch.randn(8, 64), torch.randn(8, 192)[:, :64], torch.randn(64).expand(8, 64), torch.randn(8, 64).double()]
    expected = []
    for first in (True, False):
        for i, dy in enumerate(given):
            y = call(RMS_NORM, x, weight)
            stub.launches()
            ordinary.clear()
            with torch.no_grad():
                y.grad_fn.apply(dy)  # type: ignore[union-attr]  # as autograd does, but that it would cast the last one
            assert bool(ordinary) == first
            (backward,) = stub.launches()
            assert dy.data_ptr() in backward.parameters
            numbers = (backward.function, [p for p in backward.parameters if p < 1 << 32])
            if first:
                expected.append(numbers)
            assert numbers == expected[i]
    assert {192, 64} <= set(expected[1][1])
    assert len({function for function, _ in expected}) == 2


def test_a_strided_gradient_of_other_rows(stub: Stub, ordinary: list[str]) -> None:
    """Its strides do not follow from the number of rows as a contiguous one's do: it is repeated for its own shape."""
    weight = torch.randn(64)
    for turn in range(3):
        for m in (8, 5):
            x = torch.randn(m, 64, requires_grad=True)
            y = call(RMS_NORM, x, weight)
            stub.launches()
            ordinary.clear()
            dy = torch.randn(m, 128)[:, :64]
            (dx,) = torch.autograd.grad(y, x, dy)
            assert dx.shape == (m, 64)
            assert bool(ordinary) == (turn == 0)
            assert dy.data_ptr() in stub.launches()[0].parameters


def test_without_torchs_guard_nothing_is_kept(stub: Stub, ordinary: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = draw(RMS_NORM, 8, 64, torch.float32, grad=False)
    for guard in (None, lambda *tensors: None):  # one that cannot be called so, and another signature
        monkeypatch.setattr(torch._C._dynamo.guards, "TensorGuards", guard)
        for _ in range(3):
            call(RMS_NORM, x, weight)
    monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    call(RMS_NORM, x, weight)
    assert len(ordinary) == len(stub.launches()) == 7
