"""A function's own source, as Python's syntax has it, and what is put into it."""

from __future__ import annotations

import ast
import copy
import functools
import linecache
import types
from collections.abc import Iterator, Mapping
from typing import Any


class UnfitError(Exception):
    """Why a forward is left as it is."""


def functions_within(function: Any) -> Iterator[Any]:
    """A function, what it wraps, what that wraps, and so on."""
    seen = 0
    while function is not None and seen < 100:
        yield function
        function, seen = getattr(function, "__wrapped__", None), seen + 1


def code_of(function: Any) -> Any:
    return getattr(function, "__code__", function)


def parsed(raw: types.FunctionType) -> tuple[ast.FunctionDef, list[str]]:
    """(its definition, with the lines and columns of its file; the names that the file imports)."""
    try:
        module = _module("".join(linecache.getlines(raw.__code__.co_filename, raw.__globals__)))
    except SyntaxError:
        raise UnfitError("its module's forward has no source") from None
    line = raw.__code__.co_firstlineno
    for node in ast.walk(module):
        if not isinstance(node, ast.FunctionDef) or node.name != raw.__code__.co_name:
            continue
        if line == min(node.lineno, *(decorator.lineno for decorator in node.decorator_list), node.lineno):
            # The compiler wants to know, as it calls a method of theirs otherwise than another.
            imported = [a.asname or a.name.partition(".")[0] for i in _imports(module) for a in i.names if a.name != "*"]
            return copy.deepcopy(node), imported
    raise UnfitError("its module's forward has no source of its own")


@functools.lru_cache(maxsize=8)
def _module(source: str) -> ast.Module:
    return ast.parse(source)


def _imports(scope: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Those of a module's own scope."""
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield from _imports(node)


def flags(raw: types.FunctionType) -> int:
    """What the file imports from __future__."""
    return raw.__code__.co_flags & annotations.compiler_flag


def is_alike(one: types.CodeType, other: types.CodeType) -> bool:
    """Whether two are compiled of one text."""
    names = "co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_argcount", "co_kwonlyargcount"
    if any(getattr(one, name) != getattr(other, name) for name in names) or len(one.co_consts) != len(other.co_consts):
        return False
    pairs = zip(one.co_consts, other.co_consts, strict=True)
    return all(is_alike(a, b) if isinstance(a, types.CodeType) else (type(a), a) == (type(b), b) for a, b in pairs)


# --- what is in it, and what is put there ---


def is_of_shape(parent: ast.AST) -> bool:
    return isinstance(parent, ast.Attribute) and parent.attr in ("shape", "dtype", "device")


def is_compound(statement: ast.stmt) -> bool:
    """Whether what it has in it is run in some order of its own, or not at all."""
    return hasattr(statement, "body") or any(isinstance(node, _COMPOUND) for node in ast.walk(statement))


_COMPOUND = ast.Match, ast.NamedExpr, ast.BoolOp, ast.IfExp, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp


def names_stored(statement: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}


def attributes_set(definition: ast.AST) -> set[str]:
    """The attributes, and what is in them, that it assigns."""
    stored = (n for n in ast.walk(definition) if isinstance(n, ast.Attribute) and not isinstance(n.ctx, ast.Load))
    return {n.attr for of in stored for n in ast.walk(of) if isinstance(n, ast.Attribute)}


def names_shared(statement: ast.AST) -> set[str]:
    """The names in it that other functions have too."""
    found: set[str] = set()
    for node in ast.walk(statement):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            found |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            found |= set(node.names)
    return found


def names_loaded(statement: ast.AST) -> Iterator[tuple[ast.Name, ast.AST]]:
    """The names that a statement reads, each with the node that it is in."""
    for parent in ast.walk(statement):
        for child in ast.iter_child_nodes(parent):
            if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Load):
                yield child, parent


def load_of(name: str) -> ast.Name:
    return ast.Name(name, ast.Load())


def call_of(helper: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(load_of(helper), list(arguments), [])


def pair_of(first: str, second: str) -> ast.Tuple:
    return ast.Tuple([ast.Name(first, ast.Store()), ast.Name(second, ast.Store())], ast.Store())


class Replacing(ast.NodeTransformer):
    """Puts new nodes where others are, or before them, at their place in the file."""

    def __init__(self, new: Mapping[int, ast.AST], before: dict[int, list[ast.stmt]]) -> None:
        self._new, self._before = dict(new), before

    def visit(self, node: ast.AST) -> Any:
        before = [ast.fix_missing_locations(ast.copy_location(new, node)) for new in self._before.get(id(node), ())]
        new = self._new.pop(id(node), None)
        if new is not None:
            node = ast.fix_missing_locations(ast.copy_location(new, node))
        node = self.generic_visit(node)
        return [*before, node] if before else node
