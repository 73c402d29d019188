"""What conditioned norms refuse, and with which words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trinorm import functional


def _x(*shape: int, **how: Any) -> Tensor:
    return torch.randn(shape or (3, 2, 8), **how)


MODULATED = [
    ((None, (8,), _x(8)), {}, TypeError, "input must be a Tensor, not NoneType"),
    ((_x(), (8,), None), {}, TypeError, "scale must be a Tensor, not NoneType"),
    ((_x(), (8,), 3.0), {}, TypeError, "scale must be a Tensor, not float"),
    ((_x(), (8,), _x(8), 3.0), {}, TypeError, "shift must be a Tensor or None, not float"),
    ((_x(), 8, _x(8)), {}, TypeError, "normalized_shape must be a tuple"),
    ((_x(), (7,), _x(7)), {}, RuntimeError, r"normalized_shape is \(7,\), but input has shape"),
    ((_x(), (8,), _x(7)), {}, RuntimeError, r"scale has shape \(7,\), but input has \(3, 2, 8\)"),
    ((_x(), (8,), _x(2, 2, 8)), {}, RuntimeError, r"scale has shape \(2, 2, 8\), but"),
    ((_x(), (8,), _x(1, 3, 2, 8)), {}, RuntimeError, r"scale has shape \(1, 3, 2, 8\), but"),
    ((_x(), (8,), _x(8), _x(3, 1, 1)), {}, RuntimeError, r"shift has shape \(3, 1, 1\), but"),
    ((_x(), (2, 8), _x(8)), {}, RuntimeError, r"scale has shape \(8,\), but"),
    ((_x().int(), (8,), _x(8)), {}, NotImplementedError, "input has dtype torch.int32"),
    ((_x(), (8,), _x(8).int()), {}, NotImplementedError, "scale has dtype torch.int32"),
    ((_x(), (8,), _x(8), _x(8).int()), {}, NotImplementedError, "shift has dtype torch.int32"),
    ((_x(), (8,), _x(8, device="meta")), {}, RuntimeError, "scale is on meta, but input is on cpu"),
    ((_x(), (8,), _x(3, 2, 8).to_sparse()), {}, NotImplementedError, "scale has layout"),
    ((_x(), (8,), _x(8), None, _x(7)), {}, RuntimeError, r"weight has shape \(7,\)"),
    ((_x(), (8,), _x(8)), dict(eps=-1.0), ValueError, "eps is"),
    ((_x(), (8,), _x(8)), dict(eps="1"), TypeError, "eps must be"),
    ((_x(), (8,), _x(8)), dict(batch_invariant=1), TypeError, "batch_invariant must be"),
]
HEADS = [
    ((None, _x(2, 8)), {}, TypeError, "input must be a Tensor"),
    ((_x(), None), {}, TypeError, "weight must be a Tensor, not NoneType"),
    ((_x(8), _x(8)), {}, RuntimeError, r"input has shape \(8,\); it must be \(..., heads, D\)"),
    ((_x(), _x(8)), {}, RuntimeError, r"weight has shape \(8,\); it must be \(2, 8\)"),
    ((_x(), _x(3, 8)), {}, RuntimeError, r"weight has shape \(3, 8\); it must be \(2, 8\)"),
    ((_x(), _x(2, 8).int()), {}, NotImplementedError, "weight has dtype torch.int32"),
    ((_x(), _x(2, 8, device="meta")), {}, RuntimeError, "weight is on meta"),
    ((_x(), _x(2, 8)), dict(cast="wide"), ValueError, "cast is"),
    ((_x(), _x(2, 8)), dict(eps=float("nan")), ValueError, "eps is"),
    ((_x(), _x(2, 8)), dict(batch_invariant=1), TypeError, "batch_invariant must be"),
]
GATED = [
    ((None, _x()), {}, TypeError, "input must be a Tensor"),
    ((_x(), None), {}, TypeError, "gate must be a Tensor, not NoneType"),
    ((_x(), _x(), 3), {}, TypeError, "weight must be a Tensor or None"),
    ((_x(), _x(), None, [1.0]), {}, TypeError, "bias must be a Tensor or None"),
    ((torch.tensor(1.0), torch.tensor(1.0)), {}, RuntimeError, "input has no dims"),
    ((_x(), _x(2, 8)), {}, RuntimeError, r"gate has shape \(2, 8\); it must be the input's, \(3, 2, 8\)"),
    ((_x(), _x(), _x(7)), {}, RuntimeError, r"weight has shape \(7,\); it must be \(8,\)"),
    ((_x(), _x(), None, _x(2, 8)), {}, RuntimeError, r"bias has shape \(2, 8\); it must be \(8,\)"),
    ((_x().int(), _x()), {}, NotImplementedError, "input has dtype torch.int32"),
    ((_x(), _x().int()), {}, NotImplementedError, "gate has dtype torch.int32"),
    ((_x(), _x(device="meta")), {}, RuntimeError, "gate is on meta, but input is on cpu"),
    ((_x(), _x().to_sparse()), {}, NotImplementedError, "gate has layout"),
    ((_x(), _x()), dict(group_size=3), ValueError, "group_size is 3; it must divide the input's last dim, 8"),
    ((_x(), _x()), dict(group_size=0), ValueError, "group_size is 0"),
    ((_x(), _x()), dict(group_size=16), ValueError, "group_size is 16"),
    ((_x(), _x()), dict(group_size=True), TypeError, "group_size must be an int or None, not True"),
    ((_x(), _x()), dict(group_size=2.0), TypeError, "group_size must be an int or None"),
    ((_x(), _x()), dict(activation="gelu"), ValueError, "activation is 'gelu'; it must be one of 'silu', 'sigmoid'"),
    ((_x(), _x()), dict(activation=None), ValueError, "activation is None"),
    ((_x(), _x()), dict(norm_before_gate=1), TypeError, "norm_before_gate must be a bool"),
    ((_x(), _x()), dict(cast="wide"), ValueError, "cast is"),
    ((_x(), _x()), dict(eps=-1.0), ValueError, "eps is"),
    ((_x(), _x()), dict(batch_invariant=1), TypeError, "batch_invariant must be"),
]
CASES = [
    *((name, *case) for name in ("modulated_layer_norm", "modulated_rms_norm") for case in MODULATED),
    *((name, *case) for name in ("per_head_layer_norm", "per_head_rms_norm") for case in HEADS),
    ("per_head_layer_norm", (_x(), _x(2, 8), _x(8)), {}, RuntimeError, r"bias has shape \(8,\); it must be \(2, 8\)"),
    ("per_head_layer_norm", (_x(), _x(2, 8), 3), {}, TypeError, "bias must be a Tensor or None"),
    *((name, *case) for name in ("gated_layer_norm", "gated_rms_norm") for case in GATED),
]


@pytest.mark.parametrize(("name", "args", "how", "kind", "message"), CASES)
def test_bad_input(
    name: str, args: tuple[Any, ...], how: dict[str, Any], kind: type[Exception], message: str, launched: list[object]
) -> None:
    for _ in range(2):
        with pytest.raises(kind, match=rf"{name}\(\): .*{message}"):
            getattr(functional, name)(*args, **how)
    assert launched == []


@pytest.mark.parametrize("name", ["modulated_layer_norm", "per_head_rms_norm", "gated_rms_norm"])
def test_jagged_tensors_are_refused(name: str) -> None:
    jagged = torch.nested.nested_tensor([torch.ones(2, 2, 8), torch.ones(3, 2, 8)], layout=torch.jagged)
    others = ((8,), _x(8)) if name.startswith("modulated") else (_x(2, 8),)
    with pytest.raises(RuntimeError, match=rf"{name}\(\): input is a nested tensor"):
        getattr(functional, name)(jagged, *others)


def test_an_equal_number_is_not_the_same_argument() -> None:
    """What is recalled is what was good."""
    x, scale = _x(3, 1), _x(1)
    for _ in range(2):
        functional.modulated_rms_norm(x, (1,), scale)
        functional.gated_rms_norm(x, x, group_size=1)
        with pytest.raises(TypeError):
            functional.modulated_rms_norm(x, (True,), scale)
        with pytest.raises(TypeError):
            functional.gated_rms_norm(x, x, group_size=True)
        with pytest.raises(TypeError):
            functional.gated_rms_norm(x, x, norm_before_gate=1)


def test_a_function_mode_sees_one_call() -> None:
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    x = _x()
    with Mode():
        functional.modulated_layer_norm(x, (8,), _x(8))
    named = [f for f in seen if f is functional.modulated_layer_norm]
    assert len(named) == 1
    for function, args in (
        (functional.modulated_rms_norm, (x, (8,), x, x)),
        (functional.per_head_rms_norm, (x, x[0])),
        (functional.gated_layer_norm, (x, x, x[0, 0])),
        (functional.gated_rms_norm, (x, x, x[0, 0])),
    ):
        seen.clear()
        with Mode():
            y = function(*args)
        assert seen[0] is function
        assert torch.equal(y, function(*args))


def test_the_registered_ops_refuse_what_does_not_fit(device: torch.device) -> None:
    x, w = torch.randn(3, 2, 8, device=device), torch.randn(8, device=device)
    op, of, how = torch.ops.trinorm.conditioned_rms_norm, (False, False), (torch.float32, False, "output")
    for tensors, by, message in (
        ((x, None, w, None), (1, 3), "do not hold rows of 3 elements"),
        ((x, None, w, None), (2, 8), "do not hold rows of 8 elements"),
        ((x, None, w, None), (4, 8), "do not hold rows of"),
        ((x, None, w[:7], None), (1, 8), "weight or bias is not broadcast"),
        ((x, None, x[:2], None), (1, 8), "weight or bias is not broadcast"),
        ((x, x, w, None), (1, 8), "gate is not of the input's shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*tensors, *by, None, None, 1e-6, None, *of, *how)
    with pytest.raises(RuntimeError, match="gate is not of the input's shape"):
        op(x, x[:2], w, None, 1, 8, None, None, 1e-6, "silu", *of, *how)
    for activation, cast in (("gelu", "output"), (None, "wide")):
        with pytest.raises(RuntimeError, match="cast is"):
            op(x, None, w, None, 1, 8, None, None, 1e-6, activation, *of, torch.float32, False, cast)
    with pytest.raises(NotImplementedError, match="a dtype other than"):
        op(x, None, w.int(), None, 1, 8, None, None, 1e-6, None, *of, *how)
    for layer, count, divisor in ((False, 0, None), (False, 9, None), (False, 4, 0), (True, 4, None), (True, None, 1)):
        refusing = torch.ops.trinorm.conditioned_layer_norm if layer else op
        with pytest.raises(RuntimeError, match="there is no statistic of"):
            refusing(x, None, w, None, 1, 8, count, divisor, 1e-6, None, *of, *how)
    _, rstd = op(x, None, w, None, 1, 8, None, None, 1e-6, None, *of, *how)
    assert rstd.shape == (3, 2, 1)
    backward, by = torch.ops.trinorm.conditioned_rms_norm_backward, (1, 8, None, None, 1e-6, None, *of)
    for dy, of_rows, wanted, message in (
        (x[:2], rstd, (True, False, True, False), "is not of the input's shape"),
        (x, rstd[:2], (True, False, True, False), "is not of the input's shape"),
        (x.int(), rstd, (True, False, True, False), "a dtype other than"),
        (x, rstd.half(), (True, False, True, False), "not as the forward gives them"),
        (x, rstd, (True, True, True, False), "a gradient is asked for"),
    ):
        with pytest.raises(RuntimeError, match=message):
            backward(dy, x, None, w, None, None, of_rows, *by, *wanted, False, "output")
