"""Whether what ``fuse`` made computes what it did before.

On a CPU that is a matter of bits: a sum with a norm and a norm alone are the same composite, or interpreted alike; but for
QK-norm, which has a kernel of its own, and weights' gradients that are summed in another order (``by_bits=False``). A GPU
may launch the two otherwise (tiles, partial sums of weights' gradients, a LayerNorm's moments of few rows), and adds in
another order: there the fused is no further from float64 than the original, by trinorm.compare.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import trinorm
from trinorm.compare import assert_no_worse

# What a model returned, by kinds of it. Of one kind many may be, with one yardstick.
Results = dict[str, list[Tensor]]


def assert_as_unfused(
    run: Callable[[Any], Results],
    fused: Any,
    before: torch.nn.Module,
    alone: torch.nn.Module | None = None,
    *,
    by_bits: bool = True,
) -> None:
    """Compare what ``run`` makes of two models, with the same random numbers.

    alone: in place of ``before`` what is run in float64 and by torch, where ``before`` has something around it. by_bits:
    whether on a CPU it is a matter of bits; else it is one of float64 there too.
    """
    original = original_copy(before if alone is None else alone)
    exact = copy.deepcopy(original).double()
    torch.manual_seed(1)
    unfused = run(before)
    torch.manual_seed(1)
    actual = run(fused)
    assert actual.keys() == unfused.keys()

    by_bits = by_bits and all(are_bits_alike(t) for found in actual.values() for t in found)
    if by_bits:
        yard = exactly = unfused
    else:
        torch.manual_seed(1)
        yard = run(original)
        torch.manual_seed(1)
        with Float64():
            exactly = run(exact)
    for what, found in actual.items():
        assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in unfused[what]], what
        together = flat(found), flat(unfused[what]), flat(exactly[what]), flat(yard[what])
        assert_alike(what, *together, by_bits=by_bits)


def assert_alike(
    what: str, actual: Tensor, unfused: Tensor, exact: Tensor, by_torch: Tensor | None = None, *, by_bits: bool = True
) -> None:
    """Compare what a fused sum and what the unfused one made, and float64; by_torch: None is the unfused one."""
    assert actual.dtype == unfused.dtype and actual.shape == unfused.shape
    if by_bits and are_bits_alike(actual):
        assert torch.equal(actual, unfused), what
    else:
        assert_no_worse(what, actual.detach(), exact.detach(), (unfused if by_torch is None else by_torch).detach())


def are_bits_alike(t: Tensor) -> bool:
    return t.is_cpu


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def exactly(module: torch.nn.Module, *inputs: Tensor) -> Tensor:
    """What a module, as it was before ``replace``, returns in float64."""
    exact, wide = exact_copy(module), [x.detach().double() for x in inputs]
    with Float64():
        found: Tensor = exact(*wide)
    return found


def original_copy(module: torch.nn.Module) -> torch.nn.Module:
    original = copy.deepcopy(module)
    trinorm.restore(original)
    return original


def exact_copy(module: torch.nn.Module) -> torch.nn.Module:
    return original_copy(module).double()


class Float64(TorchFunctionMode):
    """In which what asks for float32 gets float64, as models' norms do; and drops what would be dropped in float32."""

    def __torch_function__(self, of: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(x: Any) -> Any:
            return torch.float64 if x is torch.float32 else x

        kwargs = kwargs or {}
        if of is torch.nn.functional.dropout:
            x, *how = args
            return x * of(torch.ones_like(x, dtype=torch.float32), *how, **kwargs).double()
        of = torch.Tensor.double if of is torch.Tensor.float else of
        return of(*map(wide, args), **{name: wide(value) for name, value in kwargs.items()})
