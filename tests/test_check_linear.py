"""``trinorm check`` of a norm into a linear layer: what it draws, what it reports, and that it can fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trinorm.cases import NASTY, NORMAL, Case, Inputs, Values
from trinorm.cli import check
from trinorm.norms import Arguments, OfLinear, as_tuple
from trinorm.norms.norm import Gradients
from trinorm.ops import CALLS, linear
from trinorm.ops.hosts import rows

OPS = [op for op in check.OPS if isinstance(check.OPS[op], OfLinear)]
EVERYTHING = {
    "layer_norm_linear": {"z", "mean", "rstd", "dx", "dA", "dw", "db"},
    "rms_norm_linear": {"z", "rstd", "dx", "dA", "dw"},
}
CASE = Case((9, 33))
OF_OP = pytest.mark.parametrize("op", OPS)


def drawn(op: str, values: Values = NORMAL, dtype: torch.dtype = torch.float32, weight: str = "same") -> Inputs:
    return Case(CASE.shape, values, weight).inputs(check.OPS[op], dtype, torch.device("cpu"))


def nasty(name: str) -> Values:
    return next(values for values in NASTY if values.name == name)


def by_torch(op: str, x: Tensor, a: Tensor, eps: float, *parameters: Tensor | None) -> Tensor:
    norm = getattr(F, op.removesuffix("_linear"))
    return F.linear(norm(x, x.shape[1:], *parameters, eps=eps), a)


def test_the_linear_layer_has_x_dtype_and_few_features() -> None:
    assert {*EVERYTHING} == {*OPS}
    for op in OPS:
        inputs = drawn(op, dtype=torch.bfloat16, weight="float32")
        of, (dz,) = inputs.of, inputs.gradients
        assert of.residual is not None and of.weight is not None
        assert (of.residual.shape, of.residual.dtype, of.weight.dtype) == ((24, 33), torch.bfloat16, torch.float32)
        assert (dz.shape, dz.dtype) == ((9, 24), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@OF_OP
def test_the_definition_is_that_of_torch(op: str, dtype: torch.dtype) -> None:
    norm, (of, dz) = check.OPS[op], drawn(op, dtype=dtype)[:2]
    leaves = [t.double().requires_grad_() for t in of.differentiable.values()]
    x, a, *parameters = leaves
    z = by_torch(op, x, a, of.eps, *parameters)
    torch.testing.assert_close(norm.oracle(of).y, z.detach())
    found = norm.oracle_gradients(of, dz)._asdict()
    exact = torch.autograd.grad(z, leaves, dz.double())
    assert {what for what, t in found.items() if t is not None} == {*of.differentiable}
    for what, t in zip(of.differentiable, exact, strict=True):
        torch.testing.assert_close(found[what], t)


@OF_OP
def test_torch_is_called_as_its_users_call_it(op: str) -> None:
    of = drawn(op, dtype=torch.bfloat16).of
    assert of.residual is not None
    expected = by_torch(op, of.x, of.residual, of.eps, *[of.weight, of.bias][: 1 + check.OPS[op].biased])
    assert torch.equal(check.OPS[op].call(F, of)[0], expected)
    assert torch.equal(as_tuple(check.OPS[op].composite(of))[0], expected)


@OF_OP
def test_powers_of_two_leave_every_result_but_dx(op: str) -> None:
    norm, inputs = check.OPS[op], drawn(op, NASTY[-1], torch.float64)
    plain = inputs.unscaled()
    torch.testing.assert_close(norm.oracle(inputs.of).y, norm.oracle(plain.of).y)
    (dx, *found), (of_plain, *expected) = (norm.oracle_gradients(of.of, of.dy) for of in (inputs, plain))
    assert dx is not None
    torch.testing.assert_close(dx * inputs.scale, of_plain)
    torch.testing.assert_close(found, expected)


@OF_OP
def test_what_is_no_number_reaches_one_row_of_z_and_every_row_of_its_gradient(op: str) -> None:
    norm, (of, dz) = check.OPS[op], drawn(op, nasty("one NaN"))[:2]
    of_row = norm.oracle(of).y.isnan()
    assert of_row[of.x.isnan().any(1)].all() and of_row.sum() == 24
    dr = norm.oracle_gradients(of, dz).dr
    assert dr is not None and dr.isnan().all()


@OF_OP
def test_as_many_rows_as_features_spoil_no_yardstick(
    op: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A has x's shape then, but is of no row: that of what is no number stays in it. Of Inf torch's RMSNorm on a GPU
    makes a whole row of NaN, and so all of dA.
    """
    norm, by_torch = OfLinear, OfLinear.torch_gradients

    def as_on_a_gpu(self: OfLinear, of: Arguments, *gradients: Tensor) -> Gradients:
        found = by_torch(self, of, *gradients)
        assert found.dr is not None
        return found if of.x.isfinite().all() else found._replace(dr=torch.full_like(found.dr, torch.nan))

    monkeypatch.setattr(norm, "torch_gradients", as_on_a_gpu)
    results = check.check_op(op, torch.float64, device, [Case((24, 17), nasty("one Inf"))])
    found = {result.comparison.what: result.comparison for result in results}
    assert all(comparison.ok for comparison in found.values())
    assert found["dw"].torch_error < 1e-12


def wrong(op: str, device: torch.device) -> set[str]:
    """What check_op finds wrong."""
    CALLS.clear()
    results = check.check_op(op, torch.float32, device, [CASE])
    assert {result.comparison.what for result in results} == EVERYTHING[op]
    return {result.comparison.what for result in results if not result.comparison.ok}


@pytest.mark.parametrize(
    ("function", "index", "found"),
    [
        ("forward", 0, {"z", "dA"}),
        ("forward", 2, {"rstd", "dx", "dw"}),
        ("backward", 0, {"dx"}),
        ("backward", 1, {"dw"}),
        ("backward", 2, {"db"}),
    ],
)
@OF_OP
def test_a_wrong_result_of_the_norm_is_found(
    op: str, function: str, index: int, found: set[str], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert wrong(op, device) == set()
    honest = getattr(rows, function)

    def spoiled(*args: Any, **how: Any) -> Any:
        results = honest(*args, **how)
        if results[index] is not None:
            results[index].mul_(1 + 1e-4)
        return results

    monkeypatch.setattr(rows, function, spoiled)
    assert wrong(op, device) == found & EVERYTHING[op]


@OF_OP
def test_another_y_made_again_is_found(op: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = linear._again
    monkeypatch.setattr(linear, "_again", lambda *args: honest(*args) * (1 + 1e-4))
    assert wrong(op, device) == {"dA"}


@OF_OP
def test_a_wrong_gradient_is_found_numerically(op: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    (result,) = check.check_numerically(op, device)
    assert result.comparison.ok, result.comparison.worst
    honest = linear._again
    monkeypatch.setattr(linear, "_again", lambda *args: honest(*args) * 1.01)
    (result,) = check.check_numerically(op, device)
    assert "Jacobian mismatch" in result.comparison.worst
