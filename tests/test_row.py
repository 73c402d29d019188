"""ops/row.py: what autograd hands to a norm's backward, and tensors that are not what their memory says."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from trinorm import functional, reference
from trinorm.compare import assert_no_worse
from trinorm.ops import CALLS
from trinorm.spec import LAYER_NORM, RMS_NORM

SPECS = {"layer_norm": LAYER_NORM, "rms_norm": RMS_NORM}


@pytest.fixture(params=SPECS)
def op(request: pytest.FixtureRequest) -> str:
    return request.param


def _call(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None:
        return functional.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)
    return functional.rms_norm(x, x.shape[-1:], weight, 1e-5)


def _parameters(op: str, n: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    weight = torch.randn(n, device=device)
    return weight, torch.randn(n, device=device) if op == "layer_norm" else None


def _gradients(op: str, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """By autograd, of one call with fixed parameters."""
    n = x.shape[-1]
    torch.manual_seed(1)
    weight, bias = _parameters(op, n, x.device)
    inputs = [x, weight] if bias is None else [x, weight, bias]
    for t in inputs:
        t.requires_grad_()
    return torch.autograd.grad(_call(op, x, weight, bias), inputs, dy)


def _to_contiguous(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)


def _to_columns(t: Tensor) -> Tensor:
    return torch.stack((t, t), -1)[:, 0] if t.dim() < 2 else t.mT.contiguous().mT


def _to_part_of_wide(t: Tensor) -> Tensor:
    # x's rows as far apart as they were: a GPU reads others by other widths, which is another order of sums.
    return torch.cat((t, t[..., :16]), -1)[..., : t.shape[-1]]


def _to_negative(t: Tensor) -> Tensor:
    return torch._neg_view(-t)


def _to_double(t: Tensor) -> Tensor:
    return t.double()


@pytest.mark.parametrize("unpack", [_to_contiguous, _to_columns, _to_part_of_wide, _to_negative, _to_double])
@pytest.mark.parametrize("first", ["as saved", "as unpacked"])
@pytest.mark.parametrize("leading", [(3,), (2, 3)], ids=str)
def test_saved_tensors_may_come_back_in_another_layout(
    op: str, unpack: Callable[[Tensor], Tensor], first: str, leading: tuple[int, ...], device: torch.device
) -> None:
    """From saved_tensors_hooks (save_on_cpu, checkpoints), whether such a call comes first or is one of many."""
    wide, dy = torch.randn(*leading, 40, device=device), torch.randn(*leading, 24, device=device)
    x = wide[..., :24]
    expected = _gradients(op, x.clone(), dy)

    def hooked() -> tuple[Tensor, ...]:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), unpack):
            return _gradients(op, x.detach(), dy)

    def plain() -> tuple[Tensor, ...]:
        return _gradients(op, x.detach(), dy)

    for run in (plain, hooked, plain) if first == "as saved" else (hooked, plain, hooked):
        for got, want in zip(run(), expected, strict=True):
            assert torch.equal(got, want)


class _Seen(TorchDispatchMode):
    """Lets every op through."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_a_backward_that_is_looked_into_agrees_with_its_forward(op: str, device: torch.device) -> None:
    """Rows whose squares leave fp32, which the forward's kernel rescued."""
    x, dy = torch.randn(3, 24, device=device) * 1e25, torch.randn(3, 24, device=device)
    weight, bias = _parameters(op, 24, device)
    x.requires_grad_()
    y = _call(op, x, weight, bias)
    with _Seen():
        (dx,) = torch.autograd.grad(y, x, dy)
    arguments = SPECS[op], x, (24,), weight, bias, 1e-5, dy
    exact = reference.oracle_gradients(*arguments).dx
    assert exact is not None
    assert_no_worse("dx", dx, exact, exact.float())


def test_a_gradient_of_zeros_without_storage(op: str, device: torch.device) -> None:
    x = torch.randn(3, 24, device=device)
    zeros = torch._efficientzerotensor((3, 24), device=device)
    for gradient in _gradients(op, x, zeros):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_the_tangent_of_a_gradient_is_not_dropped(op: str, device: torch.device) -> None:
    """Forward-mode AD over a backward whose forward was outside of it."""
    x, dy, tangent = (torch.randn(3, 24, device=device) for _ in range(3))
    weight, bias = _parameters(op, 24, device)
    x.requires_grad_()
    y = _call(op, x, weight, bias)
    arguments = SPECS[op], x, (24,), weight, bias, 1e-5, tangent  # a backward is linear in dy
    exact, by_torch = reference.oracle_gradients(*arguments).dx, reference.torch_gradients(*arguments).dx
    with forward_ad.dual_level():
        (dx,) = torch.autograd.grad(y, x, forward_ad.make_dual(dy, tangent))
        found = forward_ad.unpack_dual(dx).tangent
    assert found is not None
    assert exact is not None
    assert by_torch is not None
    assert_no_worse("tangent", found, exact, by_torch.detach())


def test_tensors_that_hold_their_negative(op: str, device: torch.device) -> None:
    x = torch.randn(6, 24, device=device)
    weight, bias = _parameters(op, 24, device)
    expected = _call(op, -x, -weight, bias)
    assert torch.equal(_call(op, torch._neg_view(x), torch._neg_view(weight), bias), expected)


def test_a_remembered_call_under_autocast_is_cast_as_the_first_was(
    op: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where autocast takes the norm to fp32 (torch's rule is of the device's, so it is set here)."""
    monkeypatch.setattr(reference, "autocast_to_fp32", lambda spec, device_type: True)
    weight, bias = _parameters(op, 24, device)
    for _ in range(3):
        x, dy = torch.randn(3, 24, device=device).bfloat16(), torch.randn(3, 24, device=device)
        expected = _call(op, x.float(), weight, bias)
        x.requires_grad_()
        with torch.autocast(device.type, torch.bfloat16):
            y = _call(op, x, weight, bias)
        assert torch.equal(y, expected)
        (dx,) = torch.autograd.grad(y, x, dy)
        assert dx.dtype == torch.bfloat16
        assert _call(op, x, weight, bias).dtype == torch.bfloat16, "outside of autocast nothing is cast"
    assert len(CALLS._of_any_rows) == 1, "one shape, remembered with autocast and without"


@pytest.mark.parametrize("first", [False, True], ids=["no_grad first", "grad first"])
def test_calls_with_grad_and_under_no_grad_are_kept_apart(op: str, first: bool, device: torch.device) -> None:
    """Each is recalled among the others, and what no gradient was asked of is not given to who asks for one."""
    x, dy = torch.randn(3, 24, device=device), torch.randn(3, 24, device=device)
    weight, bias = _parameters(op, 24, device)
    exact = reference.oracle_gradients(SPECS[op], x, (24,), weight, bias, 1e-5, dy).dx
    assert exact is not None
    x.requires_grad_()
    for turn, grad in enumerate((first, not first) * 3, 1):
        with torch.set_grad_enabled(grad):
            y = _call(op, x, weight, bias)
        assert y.requires_grad == grad
        if grad:
            (dx,) = torch.autograd.grad(y, x, dy)
            torch.testing.assert_close(dx, exact.float())
        assert len(CALLS._of_any_rows) == min(turn, 2)


def test_selective_checkpointing_sees_a_call_seen_before(op: str, device: torch.device) -> None:
    """Its modes are told of torch's operators: none of a kernel, which another run of the same function would launch."""
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    told: list[str] = []

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        told.append(str(operator))
        return CheckpointPolicy.PREFER_RECOMPUTE

    x = torch.randn(4, 8, device=device, requires_grad=True)
    weight, bias = _parameters(op, 8, device)
    for _ in range(3):
        _call(op, x, weight, bias)
    with pytest.warns(UserWarning, match="TorchDispatchMode") if x.is_cuda else contextlib.nullcontext():
        y = checkpoint(
            lambda x: _call(op, x, weight, bias),
            x,
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(policy),
        )
    assert any(name in operator for operator in told for name in (op, "rsqrt"))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(_call(op, x, weight, bias).sum(), x))
