"""Channel norms and the activations behind them in a forward's source, with the residual that is added in between."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from .sources import call_of, is_compound, load_of, names_loaded, names_stored, pair_of

# What the new forward calls in place of an activation of a norm; of a norm whose result goes into one; of a norm to whose
# result something is added first; and of that sum.
ACTIVATED, AHEAD = "_trinorm_activated", "_trinorm_ahead"
WAITING, RESIDUAL = "_trinorm_waiting", "_trinorm_residual"


class Called(NamedTuple):
    """What a node is a call of, with one argument: by the name of a module's attribute, what that is; "" of anything else.

    is_activation: of a function too.
    """

    norm: Callable[[ast.AST], str]
    identity: Callable[[ast.AST], str]
    convolution: Callable[[ast.AST], str]
    is_activation: Callable[[ast.AST], bool]


@dataclass
class Activations:
    """Of a forward. found: by the name of a norm the activations that it goes into, with their lines; new, before: by the
    id of a node what stands for it, and what is done before it::

        act(self.norm(x))          activated(act, self.norm, x)

        h = self.norm(x)           h, done = ahead(act, self.norm, x)
        h = act(h)                 h = h if done else act(h)

        h = self.conv(h)           h = self.conv(h)
        h = self.norm(h)           h, y = waiting(act, self.norm, self.conv, h, self.se)
        if self.se is not None:    if self.se is not None:
            h = self.se(h)             h = self.se(h)
        h += residual              h, done = residual(y, act, "+=", h, residual)
        h = act(h)                 h = h if done else act(h)

    where nobody has the h before the last.
    """

    called: Called
    shared: set[str]
    found: dict[str, list[str]] = field(default_factory=dict)
    new: dict[int, ast.AST] = field(default_factory=dict)
    before: dict[int, list[ast.stmt]] = field(default_factory=dict)

    def find(self, definition: ast.FunctionDef) -> None:
        nodes = list(ast.walk(definition))
        self._loads = Counter(load.id for load, _ in names_loaded(definition))
        self._is_tried = any(type(node).__name__ in ("Try", "TryStar") for node in nodes)
        for node in nodes:
            if self.called.is_activation(node):
                assert isinstance(node, ast.Call)
                if name := self.called.norm(node.args[0]):
                    self.new[id(node)] = _norm_with(ACTIVATED, node, node.args[0])
                    self._note(name, node)
        for node in nodes:
            for name in ("body", "orelse", "finalbody"):
                if isinstance(block := getattr(node, name, None), list):
                    for i in range(1, len(block)):
                        self._find_behind(block, i)

    def _find_behind(self, block: list[ast.stmt], i: int) -> None:
        """Of a block's i-th statement, if an activation is in it, the norms before it."""
        for name, activation in self._used_up(block[i]):
            at = i - 1
            between: list[ast.expr] = []
            while at > 0 and self.called.identity(value := _assigned(block[at], name)) and _is_of(value, name):
                assert isinstance(value, ast.Call)
                between.append(value.func)
                at -= 1
            done = f"_trinorm_activated_{len(self.new)}"
            if norms := [tail for tail in _tails(block[at]) if self.called.norm(_assigned(tail, name))]:
                if isinstance(block[at], ast.If):
                    none = ast.Assign([ast.Name(done, ast.Store())], ast.Constant(False))
                    self.before.setdefault(id(block[at]), []).append(none)
                for tail in norms:
                    assert isinstance(tail, ast.Assign)
                    self.new[id(tail.targets[0])] = pair_of(name, done)
                    self.new[id(tail.value)] = _norm_with(AHEAD, activation, tail.value, *between)
                    self._note(self.called.norm(tail.value), activation)
            elif between or not self._find_sum(block, at, name, activation, done):
                continue
            self.new[id(activation)] = ast.IfExp(load_of(done), load_of(name), activation)

    def _used_up(self, statement: ast.stmt) -> Iterator[tuple[str, ast.Call]]:
        """A name and the activation of it, where nobody else will have what it stands for."""
        if not isinstance(statement, (ast.Assign, ast.Return)) or is_compound(statement):
            return
        for load, parent in names_loaded(statement):
            name = load.id
            if name in self.shared or not self.called.is_activation(parent) or load is getattr(parent, "func", None):
                continue
            assert isinstance(parent, ast.Call)
            once = sum(other.id == name for other, _ in names_loaded(statement)) == 1
            again = isinstance(statement, ast.Return) and not self._is_tried
            if once and (again or name in names_stored(statement) or self._loads[name] == 1):
                yield name, parent
                return

    def _find_sum(self, block: list[ast.stmt], at: int, name: str, activation: ast.Call, done: str) -> bool:
        """Whether a residual is added, in a block's statement, to what a norm before it has made of a convolution's result.

        That is new and has no other name, and so nothing in between can write to it.
        """
        total = block[at]
        sides: tuple[ast.expr, ast.expr]
        if isinstance(total, ast.AugAssign) and isinstance(total.op, ast.Add):
            how, sides = "+=", (total.target, total.value)
        elif isinstance(value := _assigned(total, name), ast.BinOp) and isinstance(value.op, ast.Add):
            how, sides = "+", (value.left, value.right)
        else:
            return False
        places = [place for place, side in enumerate(sides) if isinstance(side, ast.Name) and side.id == name]
        if len(places) != 1 or name in _names(sides[1 - places[0]]):
            return False
        absent: list[ast.expr] = []  # what would have the norm's result before the sum, if there were any
        first = at - 1
        while first > 0 and (name not in _names(block[first]) or _unless_none(block[first])):
            absent += _unless_none(block[first]) if name in _names(block[first]) else []
            first -= 1
        norm, convolution = _assigned(block[first], name), _assigned(block[first - 1], name)
        between = [node for statement in block[first + 1 : at] for node in ast.walk(statement)]
        # All of it is run, and then the norm.
        whole = all(isinstance(node, (ast.Assign, ast.If)) for node in between if isinstance(node, ast.stmt))
        if first <= 0 or not whole or not self.called.norm(norm) or not _is_of(norm, name):
            return False
        if not self.called.convolution(convolution):
            return False
        assignment, kept = block[first], f"{done}_y"
        assert isinstance(assignment, ast.Assign) and isinstance(norm, ast.Call) and isinstance(convolution, ast.Call)
        self.new[id(assignment.targets[0])] = pair_of(name, kept)
        self.new[id(norm)] = call_of(WAITING, activation.func, norm.func, convolution.func, load_of(name), *absent)
        loaded = [load_of(name) if place == places[0] else side for place, side in enumerate(sides)]
        summed = call_of(RESIDUAL, load_of(kept), activation.func, ast.Constant(how), ast.Constant(places[0]), *loaded)
        self.new[id(total)] = ast.Assign([pair_of(name, done)], summed)
        self._note(self.called.norm(norm), activation, f"{ast.unparse(total)}, line {total.lineno}, and ")
        return True

    def _note(self, norm: str, activation: ast.Call, ahead: str = "") -> None:
        shown, found = f"{ahead}{ast.unparse(activation)}, line {activation.lineno}", self.found.setdefault(norm, [])
        if shown not in found:  # it may be behind two branches
            found.append(shown)


def _norm_with(helper: str, activation: ast.Call, norm: ast.AST, *more: ast.expr) -> ast.Call:
    assert isinstance(norm, ast.Call)
    call = call_of(helper, activation.func, norm.func, *norm.args, *more)
    # Of the activation's own, which a call apart has as they were.
    call.keywords = activation.keywords if helper == ACTIVATED else []
    return call


def _tails(statement: ast.stmt) -> Iterator[ast.stmt]:
    """What is run last of a statement, which may be an ``if``."""
    if isinstance(statement, ast.If):
        for branch in filter(None, (statement.body, statement.orelse)):
            yield from _tails(branch[-1])
    else:
        yield statement


def _assigned(statement: ast.stmt, name: str) -> ast.expr:
    """What is assigned to a name alone; nothing that is called, of another statement."""
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    alone = len(targets) == 1 and isinstance(to := targets[0], ast.Name) and to.id == name
    return statement.value if isinstance(statement, ast.Assign) and alone else ast.Constant(None)


def _is_of(call: ast.expr, name: str) -> bool:
    return isinstance(call, ast.Call) and isinstance(of := call.args[0], ast.Name) and of.id == name


def _names(node: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(node) if isinstance(node, ast.Name)}


def _unless_none(statement: ast.stmt) -> list[ast.expr]:
    """The attribute of a name that an ``if`` without an else asks whether it is not None; none of another statement."""
    if not isinstance(statement, ast.If) or statement.orelse or not isinstance(test := statement.test, ast.Compare):
        return []
    of, (how, *more), what = test.left, test.ops, test.comparators[0]
    is_not_none = not more and isinstance(how, ast.IsNot) and isinstance(what, ast.Constant) and what.value is None
    return [of] if is_not_none and isinstance(of, ast.Attribute) and isinstance(of.value, ast.Name) else []
