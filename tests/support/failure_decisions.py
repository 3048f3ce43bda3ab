"""Where the core decides by the kind of a failure, and where it edits an error in place.

`python tests/support/failure_decisions.py [PACKAGE]`

A decision asks an error or a failure for its class, status, code or text; a look-up of the table of
kinds is counted apart. The extras, which have users' errors, are left out.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

_ERRORS = {"error", "failure", "conflict", "ended", "polled", "answer", "failed", "problem", "item"}
_is_class = re.compile(r"(?:errors\.)?_?Bctrl\w*Error|_CERTIFICATE_ERRORS").fullmatch
_QUESTIONS = {
    "is_unanswered",
    "is_transient",
    "is_untrusted",
    "throttles",
    "names_runtime",
    "already_stopped",
    "THROTTLED",
    "_MAY_RETRY",
    "invalid_input",
}
_FIELDS = {
    "accepted",
    "advice",
    "alias",
    "attempts",
    "body",
    "may_have_stopped",
    "may_have_worked",
    "operation",
    "request_id",
    "status",
    "summary",
    "workspace_id",
    "__cause__",
}
_EXTRAS = {"cli", "dask", "emulator", "fastapi", "otel", "redis", "testing"}


class Decisions(NamedTuple):
    """The number of places of each sort."""

    by_question: int
    by_table: int
    edits: int


def count(code: str) -> Decisions:
    """Count the places in a module."""
    tree = ast.parse(code)
    imports = {
        id(name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom | ast.Import)
        for name in ast.walk(node)
    }
    nodes = [node for node in ast.walk(tree) if id(node) not in imports]
    return Decisions(
        sum(map(_is_question, nodes)),
        sum(map(_is_look_up, nodes)),
        sum(map(_is_edit, nodes)),
    )


def _is_question(node: ast.AST) -> bool:  # noqa: PLR0911 - a table.
    match node:
        case ast.Call(func=ast.Name("isinstance"), args=[_, kinds]):
            return any(_is_class(ast.unparse(kind)) for kind in _alternatives(kinds))
        case ast.MatchClass(cls=kind):
            return _is_class(ast.unparse(kind)) is not None
        case ast.Compare(left=ast.Call(func=ast.Name("type")), comparators=[kind]):
            return _is_class(ast.unparse(kind)) is not None
        case ast.Call(func=ast.Name(name) | ast.Attribute(attr=name)):
            return name in _QUESTIONS
        case ast.Compare(left=left, comparators=[right]):
            words = {ast.unparse(left), ast.unparse(right)}
            asks = any(word.rpartition(".")[2] in _QUESTIONS for word in words)
            return (
                asks or any(_is_status(side) for side in (left, right)) or "invalid_input" in words
            )
        case ast.Attribute(attr="names_runtime" | "already_stopped", ctx=ast.Load()):
            return True
    return False


def _alternatives(kinds: ast.AST) -> list[ast.AST]:
    if isinstance(kinds, ast.BinOp):
        return [*_alternatives(kinds.left), *_alternatives(kinds.right)]
    if isinstance(kinds, ast.Tuple):
        return list(kinds.elts)
    return [kinds]


def _is_status(node: ast.AST) -> bool:
    """Return True for the status or the code of an error."""
    match node:
        case ast.Attribute(value=ast.Name(name), attr="status" | "code" | "reason_class"):
            return name in _ERRORS
    return False


def _is_look_up(node: ast.AST) -> bool:
    match node:
        case ast.Attribute(value=ast.Attribute(attr="kind") | ast.Name("kind")):
            return True
        case ast.Compare(left=ast.Attribute(attr="kind") | ast.Name("kind")):
            return True
    return False


def _is_edit(node: ast.AST) -> bool:
    match node:
        case ast.Assign(targets=targets):
            return any(map(_is_field, targets))
        case ast.AugAssign(target=target):
            return _is_field(target)
        case ast.Call(func=ast.Attribute(attr="with_traceback" | "add_note")):
            return True
    return False


def _is_field(target: ast.AST) -> bool:
    match target:
        case ast.Attribute(value=ast.Name(name), attr=field):
            return name != "self" and field in _FIELDS and name != "call"
    return False


def count_all(package: Path) -> dict[str, Decisions]:
    """Count the places in the core of a package, by module."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if name.split("/")[0].removesuffix(".py") not in _EXTRAS:
            found[name] = count(path.read_text("utf-8"))
    return found


def _main() -> None:
    package = Path(sys.argv[1] if len(sys.argv) > 1 else "bctrl_async")
    found = count_all(package)
    total: Counter[str] = Counter()
    for name, decisions in found.items():
        total.update(decisions._asdict())
        if any(decisions):
            _write(name, *decisions)
    _write("", *total.values())


def _write(name: str, *numbers: int) -> None:
    sys.stdout.write(f"{name:28}" + "".join(f" {number:4}" for number in numbers) + "\n")


if __name__ == "__main__":
    _main()
