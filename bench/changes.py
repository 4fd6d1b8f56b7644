"""The small code changes with which `bench.mutants` tests the tests."""

from __future__ import annotations

import ast
import contextlib
import copy
import random
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

_SWAPS: dict[type, type] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div},
    **{ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd},
}
_SAID = {"print", "warn", "warning", "warning_once", "info", "debug", "error", "log"}
_REMOVABLE = (ast.Raise, ast.Continue, ast.Break, ast.Delete, ast.AugAssign)


class Mutant(NamedTuple):
    """A change of a file at one place."""

    file: str
    line: int
    column: int
    lines: tuple[int, int]  # a test reaches the place if it runs one of these
    start: int  # in bytes
    end: int
    text: str  # the replacement
    change: str  # a description to print

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.change}"


def mutants(file: str, source: bytes) -> list[Mutant]:
    """All changes of a file that still compile."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for node, new, statement in _places(ast.parse(source)):
        start, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        text, rest = ast.unparse(new), "\n" * (node.end_lineno - node.lineno)  # lines keep their numbers
        text = f"({text}{rest})" if isinstance(node, ast.expr) else text
        old = " ".join(source[start:end].decode().split())
        change = f"{old} -> {'pass' if isinstance(new, ast.Pass) else ast.unparse(new)}"
        mutant = Mutant(file, node.lineno, node.col_offset, _reach(statement), start, end, text, change)
        with contextlib.suppress(SyntaxError):
            compile(changed(mutant, source), file, "exec")
            found.append(mutant)
    return found


def sample(file: str, source: bytes, most: int, seed: int) -> list[Mutant]:
    """One change at each of some randomly drawn places."""
    places: dict[tuple[int, int], list[Mutant]] = defaultdict(list)
    for mutant in mutants(file, source):
        places[mutant.start, mutant.end].append(mutant)
    rng, drawn = random.Random(f"{seed} {file}"), list(places.values())
    rng.shuffle(drawn)  # a larger sample contains the smaller one
    return sorted(rng.choice(variants) for variants in drawn[:most])


def changed(mutant: Mutant, source: bytes) -> bytes:
    """The source of a file after a change."""
    return source[: mutant.start] + mutant.text.encode() + source[mutant.end :]


def _reach(statement: ast.stmt | None) -> tuple[int, int]:
    """The lines of the statement at a place, without its body: a test that runs one reaches it. (0, 0) = any line."""
    if statement is None:
        return 0, 0
    body = getattr(statement, "body", None)
    if body and not isinstance(statement, ast.FunctionDef):
        return statement.lineno, max(statement.lineno, body[0].lineno - 1)
    return statement.lineno, statement.end_lineno or statement.lineno


def _places(node: ast.AST, statement: ast.stmt | None = None) -> Iterator[tuple[Any, ast.AST, ast.stmt | None]]:
    """Every place within a node that may change: the node, its replacement, and its statement in a function."""
    if _kept(node):
        return
    if isinstance(node, ast.FunctionDef) or (statement and isinstance(node, ast.stmt)):
        statement = node
    for new in _variants(node, statement is not None):
        yield node, new, statement
    if isinstance(node, ast.Raise):
        return
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.expr) and field in ("test", "ifs") and not isinstance(child, ast.UnaryOp):
                yield child, ast.UnaryOp(ast.Not(), child), statement
            if isinstance(child, ast.AST):
                yield from _places(child, statement)


def _kept(node: ast.AST) -> bool:
    """Whether a node stays as it is: a text for people, a type, or something that only tools read."""
    if isinstance(node, ast.Expr):
        called = node.value.func if isinstance(node.value, ast.Call) else None
        return isinstance(node.value, ast.Constant) or getattr(called, "id", getattr(called, "attr", "")) in _SAID
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING" or "__name__" in ast.unparse(node.test)
    if isinstance(node, ast.keyword):
        return node.arg == "help"
    return isinstance(node, ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom)


def _variants(node: ast.AST, in_function: bool) -> Iterator[ast.AST]:
    """The possible replacements of a node; its children stay as they are."""
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            new = copy.copy(node)
            new.ops = [_SWAPS[type(op)]() if k == i else o for k, o in enumerate(node.ops)]
            yield new
    elif isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in _SWAPS:
        new = copy.copy(node)
        new.op = _SWAPS[type(node.op)]()
        yield new
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        for value in {node.value + 1, node.value - 1, 0} - {node.value}:
            yield ast.parse(repr(value), mode="eval").body
    elif isinstance(node, ast.Return) and node.value and ast.unparse(node.value) != "None":
        yield ast.Return(ast.Constant(None))
    if in_function and (
        isinstance(node, _REMOVABLE)
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))
        or (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute | ast.Subscript))
    ):
        yield ast.Pass()
