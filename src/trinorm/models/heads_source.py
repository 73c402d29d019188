"""QK-norm in a forward's source: the norms of queries and keys, and the rotary embedding that their results go into."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from .sources import is_of_shape, names_loaded, names_stored

# Two dims that are exchanged.
Exchanged = tuple[int, int]


@dataclass
class Side:
    """The queries, or the keys.

    norm: the name of their norm, called in ``call``, within the i-th statement; exchanged: what is transposed between that
    and the rotary embedding, in this order; names: what they are called on the way; loads: where.
    """

    norm: str
    call: ast.Call
    i: int
    exchanged: tuple[Exchanged, ...]
    names: set[str]
    loads: list[ast.AST]


@dataclass
class Heads:
    """``q, k = rotary(q, k, cos, sin, ...)`` of two norms' results, which have nothing else of them. first: the statement
    that either norm is in first.
    """

    sides: tuple[Side, Side]
    call: ast.Call
    first: ast.stmt
    norms: tuple[str, str]

    def __str__(self) -> str:
        return f"{ast.unparse(self.call)}, line {self.call.lineno}"

    @property
    def function(self) -> str:
        """Its name."""
        assert isinstance(self.call.func, ast.Name)
        return self.call.func.id

    @property
    def more(self) -> tuple[tuple[object, ...], tuple[tuple[str, object], ...]]:
        """What it is called with besides the four tensors: numbers and such, by place and by name."""
        named = ((k.arg, _constant(k.value)) for k in self.call.keywords if k.arg is not None)
        return tuple(map(_constant, self.call.args[4:])), tuple(named)


@dataclass
class _Search:
    """Of a forward's own statements. norm_of: the name of the norm that a node is a call of; shared: names that other
    functions have too. apart: by a norm's name, why it stays what it is.
    """

    body: list[ast.stmt]
    norm_of: Callable[[ast.AST], str | None]
    shared: set[str]
    apart: dict[str, str] = field(default_factory=dict)

    def found(self) -> Heads | None:
        for i, statement in enumerate(self.body):
            call = _rotary(statement)
            if call is None:
                for nested in ast.walk(statement) if isinstance(statement, ast.If) else ():
                    if (call := _rotary(nested)) is not None:
                        self._sides(i, call, f"line {call.lineno}, where its result would be turned, is not always run")
                continue
            query, key = self._sides(i, call)
            if query is not None and key is not None and query.i <= i and key.i <= i and not query.names & key.names:
                return Heads((query, key), call, self.body[min(query.i, key.i)], (query.norm, key.norm))
            self._note_norms_behind(i, statement)
        return None

    def _sides(self, i: int, call: ast.Call, but: str = "") -> tuple[Side | None, Side | None]:
        """Both, where each goes from its norm to the rotary embedding and nowhere else. but: why they stay apart anyway."""
        found: list[Side | None] = []
        for name in call.args[:2]:
            assert isinstance(name, ast.Name)
            side, trouble = self._followed(i, name.id)
            if side is not None:
                trouble = but or trouble or self._other_use(side, i, call)
                if trouble:
                    self.apart.setdefault(side.norm, trouble)
            found.append(None if trouble else side)
        query, key = found
        for side, other in ((query, key), (key, query)):
            if side is not None and other is None:
                self.apart.setdefault(
                    side.norm, f"only one of the two that line {call.lineno} turns comes from such a norm"
                )
        return query, key

    def _followed(self, i: int, name: str) -> tuple[Side | None, str]:
        """Back from the i-th statement to the norm that a tensor comes of: (that, what was made of its result since)."""
        names, trouble = {name}, ""
        loads: list[ast.AST] = []
        exchanged: list[Exchanged] = []
        for at in reversed(range(i)):
            for statement, always in _steps(self.body[at]):
                if name not in names_stored(statement):
                    continue
                value = _assigned(statement, name)
                steps: list[Exchanged] = []
                while not isinstance(value, ast.Name):
                    if value is None:
                        return None, ""
                    if (norm := self.norm_of(value)) is not None:
                        assert isinstance(value, ast.Call)
                        return Side(norm, value, at, (*reversed(steps), *exchanged), names, loads), trouble
                    if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Attribute):
                        return None, ""
                    step = _exchanged(value)
                    if step is not None:
                        steps.append(step)
                    elif value.func.attr in ("view", "reshape", "unflatten"):
                        trouble = f"line {statement.lineno} divides its result into heads: it is of all of them at once"
                    else:
                        trouble = f"line {statement.lineno} makes something else of its result"
                    value = value.func.value
                if not always:
                    return None, ""
                exchanged[:0] = reversed(steps)
                name = value.id
                names.add(name)
                loads.append(value)
        return None, ""

    def _other_use(self, side: Side, i: int, call: ast.Call) -> str:
        """What has the norm's result besides, or may write to what the norm is of, before the i-th statement turns it."""
        if side.names & self.shared:
            return "another function has its result"
        known = {id(node) for node in (*ast.walk(side.call), *side.loads, *call.args[:2])}
        turned = names_stored(self.body[i])
        for at, statement in enumerate(self.body[side.i :], side.i):
            if at <= i and (line := _written(statement)) is not None:
                return f"line {line} writes to a tensor, before line {call.lineno} turns its result"
            for load, parent in names_loaded(statement):
                again = at > i and load.id in turned  # that name stands for what was turned
                if load.id in side.names and id(load) not in known and not again and not _is_of_shape(parent):
                    return f"line {statement.lineno} has its result too"
        return self._taken(side, i)

    def _taken(self, side: Side, i: int) -> str:
        """What else is called with the tensor that the norm is of, and so may write to it, up to the i-th statement."""
        name = _viewed(side.call.args[0])
        if name in self.shared or name in names_stored(self.body[side.i]):
            return ""
        for statement in self.body[side.i : i + 1]:
            for load, parent in names_loaded(statement):
                argument = isinstance(parent, ast.keyword) or (isinstance(parent, ast.Call) and parent.func is not load)
                if load.id == name and argument and self.norm_of(parent) is None:
                    return f"line {statement.lineno} may write to what it is of"
            if name in names_stored(statement):
                break
        return ""

    def _note_norms_behind(self, i: int, rotary: ast.stmt) -> None:
        turned = names_stored(rotary)
        for statement in self.body[i + 1 :]:
            for node in ast.walk(statement):
                if (norm := self.norm_of(node)) is not None and turned & {
                    n.id for n in ast.walk(node) if isinstance(n, ast.Name)
                }:
                    self.apart.setdefault(norm, f"it is of what line {rotary.lineno} has turned, and not before it")


def heads(
    body: list[ast.stmt], norm_of: Callable[[ast.AST], str | None], shared: set[str]
) -> tuple[Heads | None, dict[str, str]]:
    """(the QK-norm of a forward's statements, by a norm's name why it is none). norm_of: the name of the norm that a node
    is a call of; shared: names that other functions have too.
    """
    search = _Search(body, norm_of, shared)
    return search.found(), search.apart


def _rotary(statement: ast.AST) -> ast.Call | None:
    """The call in ``q, k = rotary(q, k, cos, sin)``; what stands behind the four is constant."""
    if not isinstance(statement, ast.Assign) or len(statement.targets) > 1:
        return None
    target, call = statement.targets[0], statement.value
    if not isinstance(target, ast.Tuple) or len(target.elts) != 2 or not all(isinstance(t, ast.Name) for t in target.elts):
        return None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or len(call.args) < 4:
        return None
    if not all(isinstance(arg, ast.Name) for arg in call.args[:2]) or any(isinstance(a, ast.Starred) for a in call.args):
        return None
    more = [*call.args[4:], *(k.value for k in call.keywords)]
    return call if all(map(_is_constant, more)) and all(k.arg is not None for k in call.keywords) else None


def _steps(statement: ast.stmt) -> Iterator[tuple[ast.stmt, bool]]:
    """A statement, or those that an ``if`` without an else has, the last first; each with whether it is always run."""
    if isinstance(statement, ast.If) and not statement.orelse and all(isinstance(s, ast.Assign) for s in statement.body):
        yield from ((nested, False) for nested in reversed(statement.body))
    else:
        yield statement, True


def _assigned(statement: ast.stmt, name: str) -> ast.expr | None:
    """What is assigned to a name alone."""
    if not isinstance(statement, ast.Assign) or len(statement.targets) > 1:
        return None
    target = statement.targets[0]
    return statement.value if isinstance(target, ast.Name) and target.id == name else None


def _exchanged(node: ast.AST) -> Exchanged | None:
    """The dims that a call of ``.transpose`` exchanges."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr != "transpose":
        return None
    if len(node.args) != 2 or node.keywords or not all(map(_is_constant, node.args)):
        return None
    first, second = map(_constant, node.args)
    return (first, second) if isinstance(first, int) and isinstance(second, int) else None


def _is_of_shape(parent: ast.AST) -> bool:
    """What the norm's result shares with what it is of; its dtype need not be that, beside a weight in fp32, say."""
    return is_of_shape(parent) and isinstance(parent, ast.Attribute) and parent.attr != "dtype"


def _viewed(node: ast.AST) -> str:
    """The name of the tensor that a part or a view is taken of; or of what has the method or function that makes it."""
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Call):
            node = node.func
        elif isinstance(node, (ast.Attribute, ast.Subscript)):
            node = node.value
        else:
            return ""
    return node.id


def _written(statement: ast.stmt) -> int | None:
    """A line that may write to a tensor where it lies."""
    for node in ast.walk(statement):
        if isinstance(node, ast.AugAssign) or (
            isinstance(node, (ast.Subscript, ast.Attribute)) and not isinstance(node.ctx, ast.Load)
        ):
            return node.lineno
        if isinstance(node, ast.keyword) and node.arg in ("out", "inplace"):
            return node.value.lineno
        method = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""
        if method.endswith("_") and not method.endswith("__"):
            return node.lineno  # type: ignore[attr-defined]
    return None


def _is_constant(node: ast.expr) -> bool:
    try:
        hash(_constant(node))
    except (ValueError, TypeError):
        return False
    return True


def _constant(node: ast.expr) -> object:
    value: object = ast.literal_eval(node)
    return value
