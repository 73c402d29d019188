"""Classes that trinorm makes of a model's own: a module gets one in place of its class, and its class back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch

# The mark of what was given another class; where a block keeps the norm that the next one begins with, in a tuple, as it is
# no module of its own; and what rotary embedding follows its norms of queries and keys.
MARK, NEXT, ROTARY = "_trinorm_replaced", "_trinorm_next", "_trinorm_rotary"


class Made(torch.nn.Module):
    """What is made of a class is besides: pickle, which would not find it, makes it again.

    made_by: (the function that makes it, its arguments), of which the first is the class that it is made of.
    """

    made_by: ClassVar[tuple[Callable[..., type[torch.nn.Module]], tuple[Any, ...]]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        _, (_, *given), *state = reduced
        return _anew, (*self.made_by, *given), *state


def _anew(make: Callable[..., type[torch.nn.Module]], of: tuple[Any, ...], *given: Any) -> torch.nn.Module:
    kind = make(*of)
    return kind.__new__(kind, *given)


def original(kind: type[torch.nn.Module]) -> type[torch.nn.Module] | None:
    """The class that this one was made of; None of one that was not made here, or of which another was made since."""
    made_by = vars(kind).get("made_by")
    return None if made_by is None else made_by[1][0]


def each(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Every module once, by identity: a class may say that two are equal."""
    seen = set()
    for _, module in model.named_modules(remove_duplicate=False):
        if id(module) not in seen:
            seen.add(id(module))
            yield module


def swap(changes: list[tuple[torch.nn.Module, type[torch.nn.Module], dict[str, Any]]]) -> None:
    """Give each module its new class, the mark and attributes; or, where one raises, none.

    Attributes are written past what a class makes of that.
    """
    before = [(module, type(module), dict(vars(module))) for module, _, _ in changes]
    try:
        for module, kind, attributes in changes:
            module.__class__ = kind
            vars(module).update({MARK: True, **attributes})
    except BaseException:
        for module, kind, attributes in before:
            module.__class__ = kind
            module.__dict__ = attributes
        raise
