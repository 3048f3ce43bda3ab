"""The size of Python code for its readers: its tokens, and the complexity of its functions.

Unlike lines, neither gets smaller if more is written on a line.
"""

from __future__ import annotations

import ast
import io
import tokenize
from typing import NamedTuple, TypeGuard

MAX_COMPLEXITY = 10
"""The highest complexity of a function that is read at once."""

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


class Size(NamedTuple):
    """The size of a piece of code."""

    tokens: int
    complex_functions: int
    """The number of functions with a complexity above 10."""


def size(code: str) -> Size:
    """Return the size of a module."""
    tree = ast.parse(code)
    functions = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    above = [function for function in functions if complexity(function) > MAX_COMPLEXITY]
    return Size(_count_tokens(code, tree), len(above))


def complexity(function: ast.AST) -> int:
    """Return the cyclomatic complexity of a function: 1, and 1 for each branch in it."""
    points = 1
    for node in ast.walk(function):
        if isinstance(node, _BRANCHES):
            points += 1
        if isinstance(node, ast.comprehension):
            points += len(node.ifs)
        if isinstance(node, ast.BoolOp):
            points += len(node.values) - 1
    return points


def _count_tokens(code: str, tree: ast.Module) -> int:
    """Return the number of tokens that are neither layout, nor comment, nor docstring."""
    docstrings = {node.lineno for node in ast.walk(tree) if _is_docstring(node)}
    count = 0
    # Python 3.11 has one token for an f-string; later versions have one for each of its parts.
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
