"""The language of the docstrings: CONTRIBUTING.md says how they begin."""

import ast
import re
from pathlib import Path

import bctrl_async

PACKAGE = Path(bctrl_async.__file__).parent
begins_with_a_clause = re.compile(
    r"(What(ever)?|Whether|How|Who(ever)?|Where|Which|When|Why|Those|One of|The same)\b"
).match


def test_no_docstring_begins_with_a_clause() -> None:
    # Docstrings of attributes are included: every text that stands alone.
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}: {text}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(text := node.value.value, str)
        and begins_with_a_clause(text.strip())
    ]
    assert not found, "\n".join(found)
