"""What a model's function of queries, keys, cosines and sines computes: a rotary embedding that qk_norm has, or none. It is
called on a sample behind the norm, and what comes out, and its gradients, are compared with trinorm's.
"""

from __future__ import annotations

import functools
import itertools
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..compare import compare
from ..ops.qk import QKProblem, composite
from ..reference import qk as qk_reference
from ..spec import RowNorm
from .recognize import undisturbed

# What is tried, of queries and keys, of the norms' weights, and of cosines and sines.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# How many elements a head has whose norm has no weight that would tell: what holds for both holds for any.
_LENGTHS = (64, 96)

# What the function is called with besides the four tensors.
More = tuple[tuple[object, ...], tuple[tuple[str, object], ...]]

# The dtypes of queries and keys, of the norms' weights, and of cosines and sines.
Dtypes = tuple[torch.dtype, torch.dtype | None, torch.dtype]


@dataclass(frozen=True)
class Rotary:
    """The rotary embedding of queries and keys, ``(*, T, heads, D)``, or ``(*, heads, T, D)``, by ``(*, T, R)``.

    of: the function that computes it; heads: which dim has these, -2 or -3; interleaved: whether pairs are neighbours;
    dtypes, ranks: of which, of how many dims, its results, behind the norm, are trinorm's; partial: whether R may be less
    than D; contiguous: whether, where R is less (True) or D (False), it returns one run of memory, where products return
    the order of what they are of; length: D, None is any.
    """

    of: Callable[..., Any]
    heads: int
    interleaved: bool
    dtypes: frozenset[Dtypes] = frozenset()
    ranks: frozenset[int] = frozenset()
    partial: bool = False
    contiguous: frozenset[bool] = frozenset()
    length: int | None = None

    def laid(self, x: Tensor) -> Tensor:
        """``(*, T, heads, D)`` as the function takes it; and back."""
        return x if self.heads == -2 else x.transpose(-3, -2)

    def serves(self, queries: Tensor, keys: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor) -> bool:
        """Whether a call, of queries and keys ``(*, T, heads, D)``, is like one of those that were compared."""
        if queries.dim() not in self.ranks or not queries.dim() == keys.dim() == cos.dim() + 1:
            return False
        (*batch, t, _, d), (*of_angles, turned_t, r) = queries.shape, cos.shape
        dtypes = queries.dtype, None if weight is None else weight.dtype, cos.dtype
        return (
            dtypes in self.dtypes
            and (keys.dtype, sin.dtype, sin.shape) == (queries.dtype, cos.dtype, cos.shape)
            and (*keys.shape[:-2], keys.shape[-1]) == (*batch, t, d)
            and self.length in (None, d)
            and turned_t == t
            and all(a in (1, b) for a, b in zip(of_angles, batch, strict=True))
            and (r == d or (self.partial and r % 2 == 0 and 0 < r < d))
        )

    def __deepcopy__(self, memo: Any) -> Rotary:
        """Nothing of it changes, and a scripted function has no copy."""
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """None, of a function that pickle finds by no name: a lambda's, a scripted one."""
        try:
            pickle.dumps(self.of)
        except Exception:
            return type(None), ()
        return super().__reduce_ex__(protocol)

    def __str__(self) -> str:
        kinds = dict.fromkeys(
            str(dtype).removeprefix("torch.") for dtype in _DTYPES for of in self.dtypes if of[0] == dtype
        )
        interleaved = ", interleaved=True" if self.interleaved else ""
        return f"trinorm.functional.qk_norm{interleaved}, of {', '.join(kinds)}"


class _Case(NamedTuple):
    """Of which dtypes, how many elements of a head are turned, and how many dims queries and keys have."""

    dtypes: Dtypes
    r: int
    rank: int = 4


class _Tried(NamedTuple):
    """A function, behind the norm of heads of n elements."""

    function: Callable[..., Any]
    more: More
    spec: RowNorm
    eps: float
    weighted: bool
    n: int

    def rotary(self) -> Rotary | None:
        if self.n % 2:
            return None
        first = _Case((torch.float32, torch.float32 if self.weighted else None, torch.float32), self.n)
        for heads, interleaved in itertools.product((-3, -2), (False, True)):
            found = Rotary(self.function, heads, interleaved)
            if self.holds(found, first):
                of_weight = _DTYPES if self.weighted else (None,)
                every = itertools.product(_DTYPES, of_weight, _DTYPES)
                likely = (d for d in every if d[2] in (d[0], torch.float32))
                dtypes = frozenset(d for d in likely if self.holds(found, _Case(d, self.n)))
                half = first._replace(r=self.n // 2)
                partial = self.n % 4 == 0 and self.holds(found, half)
                ranks = frozenset(rank for rank in (4, 3) if self.holds(found, first._replace(rank=rank)))
                contiguous = frozenset(
                    part
                    for part, case in ((False, first), *([(True, half)] * partial))
                    if self.holds(replace(found, contiguous=frozenset((part,))), case)
                )
                return replace(found, dtypes=dtypes, ranks=ranks, partial=partial, contiguous=contiguous)
        return None

    def holds(self, rotary: Rotary, case: _Case) -> bool:
        """Whether the function's results have the bits of torch's operators; whether trinorm's have these bits too, where
        they round as the model does, and are else no further from float64 than the model's twice; and whether, where all is
        fp32, the function's gradients are no further from it than the composite's twice.
        """
        query, key, query_weight, key_weight, cos, sin = given = _drawn(self.n, case)
        sides = (query, query_weight), (key, key_weight)
        try:
            normed = [reference.composite(self.spec, x, x.shape[-1:], w, None, self.eps) for x, w in sides]
            laid, in_one_run = [rotary.laid(x) for x in normed], (case.r < self.n) in rotary.contiguous
            if in_one_run and rotary.heads == -2:  # what is so as it is tells nothing
                laid = [x.transpose(-3, -2).contiguous().transpose(-3, -2) for x in laid]
            found = self.function(*laid, cos, sin, *self.more[0], **dict(self.more[1]))
            by_model = [rotary.laid(t) for t in found]
        except Exception:
            return False
        if in_one_run and not all(t.is_contiguous() for t in found):
            return False
        turned = [qk_reference.rotated(n, cos, sin, rotary.interleaved).to(query.dtype) for n in normed]
        if [t.dtype for t in by_model] != [query.dtype] * 2 or not all(map(torch.equal, by_model, turned)):
            return False
        ours = composite(QKProblem(self.spec, self.eps, rotary.interleaved), *given)
        if query.dtype == torch.float32 or self.spec.rounded:
            if not all(map(torch.equal, by_model, ours)):
                return False
        else:
            exact = [qk_reference.oracle(self.spec, *side, self.eps, cos, sin, rotary.interleaved) for side in sides]
            if not all(compare("", *three).ok for three in zip(ours, exact, by_model, strict=True)):
                return False
        if set(case.dtypes) - {None} != {torch.float32}:
            return True
        leaves = [t for t in given[:4] if t is not None]
        dys = [torch.linspace(-1, 1, y.numel()).view(y.shape) for y in ours]
        try:
            gradients = torch.autograd.grad(by_model, leaves, dys)
        except RuntimeError:
            return False
        by_ours = torch.autograd.grad(ours, leaves, dys)
        pairs = [
            qk_reference.oracle_gradients(self.spec, *side, self.eps, cos, sin, rotary.interleaved, dy)
            for side, dy in zip(sides, dys, strict=True)
        ]
        exactly = [t for of in zip(*pairs, strict=True) for t in of if t is not None]
        return all(compare("", *three).ok for three in zip(gradients, exactly, by_ours, strict=True))


def rotary(
    function: Callable[..., Any], more: More, spec: RowNorm, eps: float | None, weighted: bool, length: int | None
) -> Rotary | str:
    """The rotary embedding that a function computes behind a norm; or, in words, why that is none.

    more: what it is called with besides; weighted: whether the norm has a weight; length: of a head, if known.
    """
    try:
        return _rotary(function, more, spec, torch.finfo(torch.float32).eps if eps is None else eps, weighted, length)
    except TypeError:  # it has no hash
        return _LEFT


_LEFT = "what turns its result is no rotary embedding that qk_norm has"


@functools.lru_cache(maxsize=64)
def _rotary(
    function: Callable[..., Any], more: More, spec: RowNorm, eps: float, weighted: bool, length: int | None
) -> Rotary | str:
    with undisturbed():
        tried = [
            _Tried(function, more, spec, eps, weighted, n).rotary() for n in ([length] if length is not None else _LENGTHS)
        ]
    first = tried[0]
    if first is None or any(found != first for found in tried):
        return _LEFT
    return replace(first, length=length)


def _drawn(n: int, case: _Case) -> tuple[Any, ...]:
    """(query, key, their weights, cos, sin) of two samples, or one, five tokens, three heads and two."""
    generator = torch.Generator("cpu").manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")

    tokens = (2, 5)[4 - case.rank :]
    size = torch.tensor([1.0, 100.0, 1e-2, 3.0, 0.3], device="cpu").view(5, 1, 1)
    of_x, of_weight, of_angle = case.dtypes
    query, key = ((drawn(*tokens, heads, n) * size).to(of_x).requires_grad_() for heads in (3, 2))
    weights = [None if of_weight is None else (drawn(n) * 0.5).to(of_weight).requires_grad_() for _ in range(2)]
    angles = drawn(*tokens, case.r) * 3  # each of a pair has its own, which tells where it is read
    return query, key, *weights, angles.cos().to(of_angle), angles.sin().to(of_angle)
