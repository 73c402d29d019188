"""A module's forward with its norms, and the sums and activations beside them, taken together: found in its source, and
compiled anew.
"""

from __future__ import annotations

import ast
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..channel_calls import activation_of
from .activations_source import Activations, Called
from .heads_source import Heads, heads
from .sources import (
    Replacing,
    UnfitError,
    attributes_set,
    call_of,
    code_of,
    flags,
    functions_within,
    is_alike,
    is_compound,
    is_of_shape,
    load_of,
    names_loaded,
    names_shared,
    names_stored,
    pair_of,
    parsed,
)

# What the new forward calls in place of a sum, of a norm of a sum, of a sum that is returned, of the norm of the forward's
# argument, of the norm of queries or of keys, and of their rotary embedding. They are its free variables: no name of the
# model's own module is touched.
SUM, NORM_OF_SUM = "_trinorm_sum", "_trinorm_norm_of_sum"
RETURNED, OF_ARGUMENT = "_trinorm_returned", "_trinorm_of_argument"
DEFERRED, TURNED = "_trinorm_deferred", "_trinorm_turned"


@dataclass
class Found:
    """What a forward has of what is looked for.

    sums: by the name of a norm those that go into it, with their lines; returned: the sum that is returned; of_argument:
    the norm of the forward's argument; stream: that argument, if sums have it too; apart: by a norm's name, why a sum that
    goes into it stays apart, or a rotary embedding that it goes into; heads: the norms of queries and keys, and that;
    activations: by the name of a channel norm those that it goes into.
    """

    sums: dict[str, list[str]] = field(default_factory=dict)
    returned: str | None = None
    of_argument: str | None = None
    stream: str | None = None
    apart: dict[str, str] = field(default_factory=dict)
    heads: Heads | None = None
    activations: dict[str, list[str]] = field(default_factory=dict)


class Names(NamedTuple):
    """What a module has, by its attributes' names: norms of rows, norms of channels, activations that these have, modules
    that do nothing, and convolutions.
    """

    norms: frozenset[str] = frozenset()
    channel_norms: frozenset[str] = frozenset()
    activations: frozenset[str] = frozenset()
    identities: frozenset[str] = frozenset()
    convolutions: frozenset[str] = frozenset()


class Forward:
    """The forward of a class of modules with ``names``. Raises UnfitError where its source is not what runs.

    What is rewritten has the statements of the source, at their lines, but for these::

        h = a + b        h, y = sum(self.norm, a, b)
        z = self.norm(h)      z = y.pop() if y else self.norm(h)

        self.norm(a + b)      norm_of_sum(self.norm, a, b)

        h = a + b        h = returned(self, a, b)
        return h              return h

                              x, y = of_argument(self, self.norm, x)
        z = self.norm(x)      z = y.pop() if y else self.norm(x)

                              y = [None, None]
        q = self.q_norm(q)    q = deferred(self, y, 0, self.q_norm, q)
        k = self.k_norm(k)    k = deferred(self, y, 1, self.k_norm, k)
        q, k = f(q, k, c, s)  q, k = turned(self, y, (dims, dims), f, q, k, c, s)

    where h is such a sum, and x the forward's argument; but for what is returned, where nobody but other sums has them
    besides, and so nobody can tell how their gradients came about; and for activations (``Activations``).
    """

    def __init__(self, kind: type[torch.nn.Module], names: Names) -> None:
        self._kind, self.found = kind, Found()
        self._chain = list(functions_within(kind.forward))
        raw = self._chain[-1]
        if not isinstance(raw, types.FunctionType):
            raise UnfitError("its module's forward is no Python function")
        self._raw, (self._definition, self._imported) = raw, parsed(raw)
        if not is_alike(self._code(()), raw.__code__):
            raise UnfitError("its module's forward is not what its source says")
        self._names = Names(*(of - attributes_set(self._definition) for of in names))
        arguments = [*self._definition.args.posonlyargs, *self._definition.args.args]
        self._self = arguments[0].arg if arguments else ""
        # By the id of a node what stands for it, and what is done before it.
        self._new: dict[int, ast.AST] = {}
        self._before: dict[int, list[ast.stmt]] = {}
        self.shared = {self._self}.union(*map(names_shared, self._definition.body))
        if any(self._self in names_stored(statement) for statement in self._definition.body):
            return
        if self._names.channel_norms:
            self._find_activations()
        if self._names.norms:
            self._find_norms_of_sums()
            for i in range(len(self._definition.body)):
                self._find_sum(i)
            if len(arguments) > 1:
                self._find_of_argument(arguments[1].arg)
            self._find_heads()

    def rewritten(self, helpers: dict[str, Callable[..., Any]]) -> Iterator[Callable[..., Any]]:
        """The new forward, with ``helpers`` for what it calls: as it is, and with the decorators that the source has."""
        raw = self._raw
        changed = Replacing(self._new, self._before).visit(self._definition)
        code = self._code(tuple(helpers), changed)
        cells = dict(zip(raw.__code__.co_freevars, raw.__closure__ or (), strict=True))
        cells.update({name: types.CellType(helper) for name, helper in helpers.items()})
        closure = tuple(cells[name] for name in code.co_freevars)
        new = types.FunctionType(code, raw.__globals__, raw.__name__, raw.__defaults__, closure)
        new.__kwdefaults__, new.__qualname__, new.__module__ = raw.__kwdefaults__, raw.__qualname__, raw.__module__
        new.__doc__, new.__annotations__ = raw.__doc__, raw.__annotations__
        vars(new).update(vars(raw))
        yield new
        forward: Any = new
        for decorator in reversed(self._definition.decorator_list):
            try:
                how = compile(ast.Expression(decorator), raw.__code__.co_filename, "eval", flags(raw), dont_inherit=True)
                forward = eval(how, raw.__globals__)(forward)
            except Exception as error:
                raise UnfitError(
                    f"its module's forward has a decorator that raises {type(error).__name__}: {error}"
                ) from None
        yield forward

    def is_wrapped_as(self, forward: Callable[..., Any]) -> bool:
        """Whether a new forward has around it what the old one has, decorators and what a base puts there, and one more."""
        around = [code_of(f) for f in list(functions_within(forward))[:-1]]
        wrappers = [code_of(f) for f in self._chain[:-1]]
        return any(around[:i] + around[i + 1 :] == wrappers for i in range(len(around)))

    # --- what there is ---

    def _find_norms_of_sums(self) -> None:
        for call in ast.walk(self._definition):
            if (name := self._norm_of(call)) is None:
                continue
            assert isinstance(call, ast.Call)
            total = call.args[0]
            if isinstance(total, ast.BinOp) and _is_sum(total):
                self._new[id(call)] = call_of(NORM_OF_SUM, call.func, total.left, total.right)
                self._note(name, total)

    def _find_sum(self, i: int) -> None:
        """Of one of the forward's own statements, ``h = a + b``."""
        statement = self._definition.body[i]
        total = statement.value if isinstance(statement, (ast.Assign, ast.Return)) else None
        if not isinstance(total, ast.BinOp) or not _is_sum(total):
            return
        if isinstance(statement, ast.Return):
            self._find_returned(total)
            return
        assert isinstance(statement, ast.Assign)
        target = statement.targets[0]
        if len(statement.targets) > 1 or not isinstance(target, ast.Name):
            return
        uses = _Uses(self, i + 1, target.id)
        if uses.norm is not None and uses.other is not None:
            self.found.apart[uses.name] = f"line {uses.other} has the sum that goes into it too"
        elif uses.norm is not None:
            norm = uses.norm.func if uses.unless is None else ast.IfExp(uses.unless, ast.Constant(None), uses.norm.func)
            self._new[id(target)] = pair_of(target.id, kept := f"_trinorm_{i}")
            self._new[id(total)] = call_of(SUM, norm, total.left, total.right)
            self._take(kept, uses.norm)
            self._note(uses.name, total)
        elif uses.returned and uses.unless is None and uses.other is None:
            self._find_returned(total)

    def _find_returned(self, total: ast.BinOp) -> None:
        self._new[id(total)] = call_of(RETURNED, load_of(self._self), total.left, total.right)
        self.found.returned = ast.unparse(total)

    def _find_of_argument(self, argument: str) -> None:
        uses = _Uses(self, 0, argument)
        if uses.norm is None or uses.unless is not None or uses.other is not None:
            return
        name, *others = sorted(uses.called)
        call = call_of(OF_ARGUMENT, load_of(self._self), uses.norm.func, load_of(name))
        both = ast.Assign([pair_of(name, kept := "_trinorm_of_argument_y")], call)
        copies = [ast.Assign([ast.Name(other, ast.Store())], load_of(name)) for other in others]
        self._before.setdefault(id(uses.statement), []).extend((both, *copies))
        self._take(kept, uses.norm)
        self.found.of_argument, self.found.stream = uses.name, argument if uses.added else None

    def _find_heads(self) -> None:
        found, apart = heads(self._definition.body, self._norm_of, self.shared)
        for name, reason in apart.items():
            self.found.apart.setdefault(name, reason)
        if found is None or any(id(side.call) in self._new for side in found.sides):
            return
        self.found.heads, (query, key) = found, found.sides
        none = ast.Assign([ast.Name(kept := "_trinorm_heads", ast.Store())], ast.List([ast.Constant(None)] * 2, ast.Load()))
        self._before.setdefault(id(found.first), []).append(none)
        own, by = load_of(self._self), load_of(kept)
        for place, call in enumerate((query.call, key.call)):
            self._new[id(call)] = call_of(DEFERRED, own, by, ast.Constant(place), call.func, call.args[0])
        exchanged = ast.parse(repr((query.exchanged, key.exchanged)), mode="eval").body
        turned = call_of(TURNED, own, by, exchanged, found.call.func, *found.call.args)
        turned.keywords = found.call.keywords
        self._new[id(found.call)] = turned

    def _find_activations(self) -> None:
        def of(names: frozenset[str]) -> Callable[[ast.AST], str]:
            return lambda node: self._called(node, names) or ""

        names = self._names
        called = Called(of(names.channel_norms), of(names.identities), of(names.convolutions), self._is_activation)
        there = Activations(called, self.shared)
        there.find(self._definition)
        self.found.activations = there.found
        self._new.update(there.new)
        self._before.update(there.before)

    def _is_activation(self, node: ast.AST) -> bool:
        """Whether it is a call of an activation that channel norms have, by an attribute or a function."""
        if not isinstance(node, ast.Call) or len(node.args) != 1 or isinstance(node.args[0], ast.Starred):
            return False
        for given in node.keywords:
            value = given.value.value if isinstance(given.value, ast.Constant) else None
            if (given.arg, value) not in (("inplace", True), ("inplace", False), ("approximate", "none")):
                return False
        return bool(self._called(node, self._names.activations)) or activation_of(self._function(node.func)) is not None

    def _function(self, node: ast.expr) -> Any:
        """What a name that the forward does not assign stands for, or an attribute of one of torch's modules."""
        if isinstance(node, ast.Attribute):
            of = self._function(node.value)
            is_torch = isinstance(of, types.ModuleType) and of.__name__.partition(".")[0] == "torch"
            return getattr(of, node.attr, None) if is_torch else None
        code, name = self._raw.__code__, node.id if isinstance(node, ast.Name) else ""
        return None if name in (*code.co_varnames, *code.co_cellvars) else self._raw.__globals__.get(name)

    def _take(self, kept: str, norm: ast.Call) -> None:
        """In place of a norm's call what is kept, if there is any."""
        popped = ast.Call(ast.Attribute(load_of(kept), "pop", ast.Load()), [], [])
        self._new[id(norm)] = ast.IfExp(load_of(kept), popped, norm)

    def _note(self, norm: str, total: ast.BinOp) -> None:
        self.found.sums.setdefault(norm, []).append(f"{ast.unparse(total)}, line {total.lineno}")

    def _norm_of(self, node: ast.AST) -> str | None:
        """The name of the norm that a node is a call of, with one argument."""
        return self._called(node, self._names.norms) if isinstance(node, ast.Call) and not node.keywords else None

    def _called(self, node: ast.AST, names: frozenset[str]) -> str | None:
        """The name of the module's attribute, one of these, that a node is a call of, with one argument by place."""
        if not isinstance(node, ast.Call) or len(node.args) != 1 or isinstance(node.args[0], ast.Starred):
            return None
        of = node.func
        known = isinstance(of, ast.Attribute) and isinstance(of.value, ast.Name) and of.value.id == self._self
        return of.attr if known and isinstance(of, ast.Attribute) and of.attr in names else None

    def _code(self, helpers: tuple[str, ...], definition: ast.FunctionDef | None = None) -> types.CodeType:
        """What Python makes of a definition: taken out of a function whose arguments are its free variables."""
        definition, raw = definition or self._definition, self._raw
        free = [ast.arg(name) for name in (*raw.__code__.co_freevars, *helpers)]
        none: dict[str, Any] = dict(posonlyargs=[], kwonlyargs=[], kw_defaults=[], defaults=[])
        around = ast.FunctionDef("around", ast.arguments(args=free, **none), [definition], [])
        if sys.version_info >= (3, 12):
            around.type_params = []
        imports = [ast.Import([ast.alias(name)]) for name in self._imported]
        tree = ast.fix_missing_locations(ast.Module([*imports, around], []))
        code = compile(tree, raw.__code__.co_filename, "exec", flags(raw), dont_inherit=True)
        outer = next(c for c in code.co_consts if isinstance(c, types.CodeType))
        inner: types.CodeType = next(c for c in outer.co_consts if getattr(c, "co_name", None) == raw.__code__.co_name)
        return inner.replace(co_qualname=raw.__code__.co_qualname) if sys.version_info >= (3, 11) else inner


class _Uses:
    """What a forward does with a tensor that it has as ``name``, from its i-th statement on.

    norm: the first norm's call of it, in ``statement``, before which ``called`` are its names. Every way leads there but
    the one of ``unless``, a test of some name's being None. other: a line that may change it before, or hand it to anything
    but a sum or a norm; added: whether a sum has it; returned: whether it is what is returned.
    """

    def __init__(self, forward: Forward, i: int, name: str) -> None:
        self.norm: ast.Call | None = None
        self.unless: ast.expr | None = None
        self.other: int | None = None
        self.name, self.added, self.returned = "", False, False
        self.statement: ast.stmt | None = None
        self.called: set[str] = set()
        called = {name}  # the tensor's names
        assigned: set[str] = set()  # what was assigned since
        for statement in forward._definition.body[i:]:
            if called & forward.shared:
                return
            stored, loads = names_stored(statement), [use for use in names_loaded(statement) if use[0].id in called]
            if isinstance(statement, ast.Return):
                self.returned = isinstance(statement.value, ast.Name) and bool(loads) and self.norm is None
                loads = [] if self.returned else loads
            in_place = isinstance(statement, ast.AugAssign) and bool(stored & called)
            whole = not in_place and not is_compound(statement)
            if in_place and self.norm is not None:
                self.other = self.other or statement.lineno
            if (loads or stored & called) and not whole and self.norm is None:
                test = getattr(statement, "test", None) if isinstance(statement, ast.If) and not statement.orelse else None
                if self.unless is not None or not _is_of_none(test, called | assigned):
                    return  # not the norm alone
                self.unless = test
                continue
            for load, parent in loads:
                norm = forward._norm_of(parent)
                if norm is not None and self.norm is None and whole:
                    assert isinstance(parent, ast.Call)
                    self.norm, self.name, self.statement, self.called = parent, norm, statement, set(called)
                elif isinstance(parent, ast.BinOp):
                    self.added = True
                elif norm is None and not is_of_shape(parent) and not (whole and _is_copy(parent, load)):
                    self.other = self.other or statement.lineno
            assigned |= stored
            if whole:
                copy = isinstance(statement, ast.Assign) and isinstance(v := statement.value, ast.Name) and v.id in called
                called = called | stored if copy else called - stored
            if isinstance(statement, ast.Return):
                return


def _is_of_none(test: ast.expr | None, names: set[str]) -> bool:
    """Whether a test is of a name's being None, or not, and none of these names'."""
    if not isinstance(test, ast.Compare) or not isinstance(test.left, ast.Name) or test.left.id in names:
        return False
    (of, *more), (what, *_) = test.ops, test.comparators
    return not more and isinstance(of, (ast.Is, ast.IsNot)) and isinstance(what, ast.Constant) and what.value is None


def _is_copy(parent: ast.AST, load: ast.Name) -> bool:
    return isinstance(parent, ast.Assign) and parent.value is load and all(isinstance(t, ast.Name) for t in parent.targets)


def _is_sum(node: ast.expr) -> bool:
    plain = ast.Constant, ast.Tuple, ast.List, ast.JoinedStr
    return (
        isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Add)
        and not any(isinstance(side, plain) for side in (node.left, node.right))
    )
