"""The work of reading Python code: its tokens, and its functions' branches and tricks.

Unlike lines, none of them gets smaller if more is written on a line.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from typing import TypeGuard

_LAYOUT = {
    tokenize.COMMENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
    tokenize.INDENT,
    tokenize.NEWLINE,
    tokenize.NL,
}
_BRANCHES = (
    ast.Assert,
    ast.AsyncFor,
    ast.ExceptHandler,
    ast.For,
    ast.If,
    ast.IfExp,
    ast.Lambda,
    ast.While,
    ast.comprehension,
    ast.match_case,
)


def complexity(function: ast.AST) -> int:
    """Return the cyclomatic complexity of a function: 1, and 1 for each branch."""
    points = 1
    for node in ast.walk(function):
        if isinstance(node, _BRANCHES):
            points += 1
        if isinstance(node, ast.comprehension):
            points += len(node.ifs)
        if isinstance(node, ast.BoolOp):
            points += len(node.values) - 1
    return points


def count_tokens(code: str) -> int:
    """Return the number of tokens without layout, comments and docstrings."""
    tree = ast.parse(code)
    docstrings = {node.lineno for node in ast.walk(tree) if _is_docstring(node)}
    count = 0
    # Python 3.11 has one token for an f-string; later versions have one for each of its
    # parts.
    nesting = 0
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        name = tokenize.tok_name[token.type]
        is_docstring = name == "STRING" and token.start[0] in docstrings
        if not nesting and token.type not in _LAYOUT and not is_docstring:
            count += 1
        if name == "FSTRING_START":
            nesting += 1
        elif name == "FSTRING_END":
            nesting -= 1
    return count


def _is_docstring(node: ast.AST) -> TypeGuard[ast.Expr]:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


_PREDICATES = {
    "all",
    "any",
    "bool",
    "callable",
    "endswith",
    "isinstance",
    "issubclass",
    "startswith",
}
_SELECTIONS = {"filter", "map", "next"}


def tricks(tree: ast.AST) -> int:
    """Return the number of expressions that are read twice.

    They are ternaries, `:=`, lambdas, calls of `next`, `map` and `filter`, tuples
    assigned to several names, products with a bool, and each `and` and `or` that is
    neither in a condition nor between bools.
    """
    conditions = set(_and_or_in_conditions(tree))
    return sum(_tricks_of(node, conditions) for node in ast.walk(tree))


def _tricks_of(node: ast.AST, conditions: set[ast.BoolOp]) -> int:
    match node:
        case ast.IfExp() | ast.NamedExpr() | ast.Lambda():
            return 1
        case ast.Call(func=ast.Name(id=name)):
            return name in _SELECTIONS
        case ast.Assign(value=ast.Tuple(), targets=targets):
            return any(isinstance(target, ast.Tuple) for target in targets)
        case ast.BinOp(op=ast.Mult(), left=left, right=right):
            return _is_bool(left) or _is_bool(right)
        case ast.BoolOp(values=values) if node not in conditions and not _is_bool(node):
            return len(values) - 1
    return 0


def _and_or_in_conditions(tree: ast.AST) -> Iterator[ast.BoolOp]:
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.While | ast.IfExp | ast.Assert):
            yield from _and_or(node.test)
        elif isinstance(node, ast.comprehension):
            for condition in node.ifs:
                yield from _and_or(condition)
        elif isinstance(node, ast.match_case) and node.guard is not None:
            yield from _and_or(node.guard)


def _and_or(condition: ast.expr) -> Iterator[ast.BoolOp]:
    if isinstance(condition, ast.BoolOp):
        yield condition
        for value in condition.values:
            yield from _and_or(value)
    elif isinstance(condition, ast.UnaryOp):
        yield from _and_or(condition.operand)


def _is_bool(node: ast.expr) -> bool:
    """Return True if an expression is evidently a bool."""
    match node:
        case ast.BoolOp(values=values):
            return all(_is_bool(value) for value in values)
        case (
            ast.Compare() | ast.UnaryOp(op=ast.Not()) | ast.Constant(value=True | False)
        ):
            return True
        case ast.Call(func=ast.Name(id=name)) | ast.Call(func=ast.Attribute(attr=name)):
            return name in _PREDICATES or name.startswith(("is", "has"))
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name.startswith(("is_", "has_"))
    return False
