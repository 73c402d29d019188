"""What the tests of DyT, Derf, PolyNorm and weight normalization share: a call, its result and every gradient beside
float64 and torch's own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from trinorm import functional
from trinorm.compare import assert_no_worse
from trinorm.norms import Arguments, Norm, OfDynamic, OfPoly, OfWeight
from trinorm.ops.dynamic import Dynamic
from trinorm.ops.inputs_only import InputsOnly, options_of
from trinorm.ops.poly import Poly
from trinorm.ops.weight import Weight
from trinorm.reference import dynamic as dynamic_reference
from trinorm.reference import poly as poly_reference
from trinorm.reference import weight as weight_reference
from trinorm.spec import DYNAMIC_ERF, DYNAMIC_TANH, DynamicNorm

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DRAWS = 8
ELEMENTS = (DYNAMIC_TANH.name, DYNAMIC_ERF.name, "poly_norm")
KINDS = (*ELEMENTS, "weight_norm")


class Call(NamedTuple):
    """What is computed, and of which tensors, each or not."""

    problem: InputsOnly
    tensors: tuple[Tensor | None, ...]

    @property
    def x(self) -> Tensor:
        assert self.tensors[0] is not None
        return self.tensors[0]

    @property
    def names(self) -> tuple[str, ...]:
        return "x", *self.problem.tensors

    @property
    def present(self) -> list[Tensor]:
        return [t for t in self.tensors if t is not None]

    def given(self, tensors: Any) -> Call:
        """With others in the places of those that there are."""
        there = iter(tensors)
        return self._replace(tensors=tuple(None if t is None else next(there) for t in self.tensors))

    def __call__(self) -> Tensor:
        """By the function."""
        if isinstance(self.problem, Poly):
            return functional.poly_norm(*self.tensors, self.problem.eps)  # type: ignore[arg-type]
        if isinstance(self.problem, Weight):
            return functional.weight_norm(*self.tensors, self.problem.dim)  # type: ignore[arg-type]
        assert isinstance(self.problem, Dynamic)
        x, alpha, shift, *parameters = self.tensors
        numbers = (alpha, shift) if self.problem.spec.shifted else (alpha,)
        norm = getattr(functional, self.problem.name)
        return norm(x, self.x.shape[self.x.dim() - self.problem.dims :], *numbers, *parameters)

    def registered(self) -> Tensor:
        """By the registered op."""
        return getattr(torch.ops.trinorm, self.problem.name)(*self.arguments)

    @property
    def arguments(self) -> tuple[Any, ...]:
        return *self.tensors, *options_of(self.problem)

    def composite(self) -> Tensor:
        return self.problem.composite(*self.tensors)

    def oracle(self) -> Tensor:
        if isinstance(self.problem, Poly):
            return poly_reference.oracle(self.problem.eps, *self.tensors)  # type: ignore[arg-type]
        if isinstance(self.problem, Weight):
            return weight_reference.oracle(self.problem.dim, *self.tensors)  # type: ignore[arg-type]
        assert isinstance(self.problem, Dynamic)
        return dynamic_reference.oracle(self.problem.spec, *self.tensors)  # type: ignore[arg-type]

    def oracle_gradients(self, dy: Tensor) -> tuple[Tensor | None, ...]:
        if isinstance(self.problem, Poly):
            return poly_reference.oracle_gradients(self.problem.eps, dy, *self.tensors)  # type: ignore[arg-type]
        if isinstance(self.problem, Weight):
            return weight_reference.oracle_gradients(self.problem.dim, dy, *self.tensors)  # type: ignore[arg-type]
        assert isinstance(self.problem, Dynamic)
        return dynamic_reference.oracle_gradients(self.problem.spec, dy, *self.tensors)  # type: ignore[arg-type]

    def terms(self, name: str, dy: Tensor) -> Tensor | None:
        """How large what a result, or the gradient of a tensor, is a sum of is: as ``trinorm check`` has it."""
        if isinstance(self.problem, Weight):
            return self._terms_of_weight(self.problem.dim, name, dy)
        _, *others, weight, bias = self.tensors
        dims = self.problem.dims if isinstance(self.problem, Dynamic) else 1
        n = self.x.shape[self.x.dim() - dims :].numel()
        norm: Norm = OfDynamic(self.problem.spec) if isinstance(self.problem, Dynamic) else OfPoly()
        numbers = [t.detach().double().reshape(1) for t in others if t is not None]
        eps = self.problem.eps if isinstance(self.problem, Poly) else 0.0
        flat = (None if t is None else t.detach().flatten() for t in (weight, bias))
        of = Arguments(self.x.detach().reshape(-1, n), *flat, eps, torch.cat(numbers) if numbers else None)
        what = {"y": "y", "x": "dx", "weight": "dw", "bias": "db"}.get(name, "dr")
        found = norm.terms(of, what, dy.reshape(-1, n))
        if found is None:
            return None
        like = self.x if name == "y" else self.tensors[self.names.index(name)]
        assert like is not None
        return (found if what != "dr" else found[("alpha", "shift").index(name)]).reshape(like.shape)

    def _terms_of_weight(self, dim: int | None, name: str, dy: Tensor) -> Tensor | None:
        """Of the rows that v's slices are."""

        def rows(t: Tensor) -> Tensor:
            return t.detach().reshape(1, -1) if dim is None else t.detach().movedim(dim, 0).reshape(t.shape[dim], -1)

        v, g = self.present
        of = Arguments(rows(v), rows(g), None, 0.0)
        found = OfWeight().terms(of, {"x": "dx", "g": "dw"}.get(name, name), rows(dy))
        if found is None or name == "g":
            return None if found is None else found.reshape(g.shape)
        return found.reshape(v.shape) if dim is None else found.reshape(v.movedim(dim, 0).shape).movedim(0, dim)


def dynamic(
    spec: DynamicNorm,
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    alpha: float = 0.7,
    shift: float = 0.2,
    dims: int = 1,
    dtype: torch.dtype | None = None,
) -> Call:
    """dtype: alpha's and the shift's, where it is not x's."""
    numbers = [torch.tensor([value], device=x.device).to(dtype or x.dtype) for value in (alpha, shift)]
    return Call(Dynamic(spec, dims), (x, numbers[0], numbers[1] if spec.shifted else None, weight, bias))


def poly(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-6) -> Call:
    return Call(Poly(eps), (x, weight, bias))


def weight(v: Tensor, g: Tensor, dim: int | None = 0) -> Call:
    return Call(Weight(dim), (v, g))


def example(kind: str, dtype: torch.dtype, device: torch.device, lead: tuple[int, ...] = (2, 3), n: int = 8) -> Call:
    """One of a kind, all of its tensors given."""

    def t(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    if kind == "poly_norm":
        return poly(t(*lead, n), t(3), t(1))
    if kind == "weight_norm":
        v = t(*lead, n)
        return weight(v, t(*weight_reference.g_shape(0, v.shape)))
    spec = DYNAMIC_ERF if kind == DYNAMIC_ERF.name else DYNAMIC_TANH
    return dynamic(spec, t(*lead, n), t(n), t(n))


def gradients(norm: Any, call: Call, dy: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """(y, that of each tensor that there is) by a Call's method."""
    leaves = [t.detach().requires_grad_() for t in call.present]
    y = norm(call.given(leaves))
    found = iter(torch.autograd.grad(y, leaves, dy))
    return y.detach(), [None if t is None else next(found) for t in call.tensors]


def assert_right(call: Call, dy: Tensor | None = None) -> None:
    """The result, and every gradient. Of one number torch's error is chance: the largest of several gradients dy."""
    dy = torch.randn_like(call.x, memory_format=torch.contiguous_format) if dy is None else dy
    y, found = gradients(Call.__call__, call, dy)
    assert y.dtype == call.x.dtype
    assert y.is_contiguous()
    by_torch, torchs = gradients(Call.composite, call, dy)
    assert_no_worse("y", y, call.oracle(), by_torch, call.terms("y", dy))
    exact = call.oracle_gradients(dy)
    farthest = _distances(exact, torchs)
    for _ in range(DRAWS - 1):
        other = torch.randn_like(dy)
        again = _distances(call.oracle_gradients(other), gradients(Call.composite, call, other)[1])
        farthest = [torch.maximum(a, b) for a, b in zip(farthest, again, strict=True)]
    for name, got, want, distance in zip(call.names, found, exact, farthest, strict=True):
        if want is not None:
            assert got is not None
            assert_no_worse(f"d{name}", got, want, want + distance, call.terms(name, dy))


def _distances(exact: tuple[Tensor | None, ...], torchs: list[Tensor | None]) -> list[Tensor]:
    """How far torch's gradients lie from float64; 0 where either is not finite, or there is none."""
    pairs = zip(exact, torchs, strict=True)
    return [
        torch.zeros(1) if want is None or t is None else (t.double() - want).abs().nan_to_num(0.0, posinf=0.0)
        for want, t in pairs
    ]
