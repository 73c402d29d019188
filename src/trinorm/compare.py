"""The one comparator: a result is right when it is no further from float64 than twice torch's own result is.

The floor is one unit in the last place of the result's dtype, at the exact value. Nothing here has a tolerance of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Comparison:
    """One result against the oracle.

    error and torch_error: the largest absolute distance from float64, ours and torch's (over the elements where torch's is
    finite). ok: every element is within ``2 * torch_error`` and one unit in the last place, and NaN and the infinities are
    exactly where float64 has them. worst: where the largest excess lies, for the message.
    """

    what: str
    error: float
    torch_error: float
    ok: bool
    worst: str

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "WRONG"
        return f"{self.what}: error {self.error:.3g}, torch's own {self.torch_error:.3g}: {verdict}; {self.worst}"


def compare(what: str, actual: Tensor, exact: Tensor, by_torch: Tensor, terms: Tensor | None = None) -> Comparison:
    """Compare ``actual`` and torch's own result, both of one dtype, with the float64 oracle's ``exact``.

    terms: the size of the terms that each element is a sum of, where those are larger than what they sum to (a mean near
    0); the unit in the last place is then theirs.
    """
    if actual.shape != exact.shape:
        return Comparison(what, float("inf"), 0.0, False, f"shape {tuple(actual.shape)} is not {tuple(exact.shape)}")
    if actual.numel() == 0:
        return Comparison(what, 0.0, 0.0, True, "empty")
    # What the dtype can hold of the exact value decides where it is finite.
    expected = exact.to(actual.dtype)
    finite = expected.isfinite()
    same_special = torch.where(finite, actual.isfinite(), (actual == expected) | (actual.isnan() & expected.isnan()))
    distance = torch.where(finite, (actual.double() - exact.double()).abs(), 0.0).nan_to_num(nan=float("inf"))
    torch_finite = finite & by_torch.isfinite()
    torch_distance = torch.where(torch_finite, (by_torch.double() - exact.double()).abs(), 0.0)
    torch_error = torch_distance.max().item()
    size = exact if terms is None else torch.maximum(terms.double(), exact.double().abs())
    excess = torch.where(finite, distance - unit_in_last_place(size, actual.dtype) - 2 * torch_error, -1.0)
    ok = bool(same_special.all()) and bool((excess <= 0).all())
    at = int(torch.where(same_special, excess, float("inf")).argmax())
    worst = f"at {at}: got {actual.flatten()[at].item()!r}, float64 {exact.flatten()[at].item()!r}"
    return Comparison(what, distance.max().item(), torch_error, ok, worst)


def assert_no_worse(what: str, actual: Tensor, exact: Tensor, by_torch: Tensor, terms: Tensor | None = None) -> None:
    """Raise AssertionError unless ``compare`` finds ``actual`` right."""
    comparison = compare(what, actual, exact, by_torch, terms)
    if not comparison.ok:
        raise AssertionError(str(comparison))


def unit_in_last_place(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of ``dtype``'s numbers at ``exact``, in float64."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(exact.double().abs().clamp(min=info.tiny, max=info.max))
    return torch.ldexp(torch.full_like(exact, info.eps, dtype=torch.float64), exponent - 1)
