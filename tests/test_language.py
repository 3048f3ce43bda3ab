"""The language of the docstrings: CONTRIBUTING.md says how they begin."""

import ast
import re
from pathlib import Path

import pytest

import bctrl_async

PACKAGE = Path(bctrl_async.__file__).parent
MODULES = [str(path.relative_to(PACKAGE)) for path in sorted(PACKAGE.rglob("*.py"))]
begins_with_a_clause = re.compile(
    r"(What(ever)?|Whether|How|Who(ever)?|Where|Which|When|Why|Those|One of|The same)\b"
).match


@pytest.mark.parametrize("module", MODULES)
def test_no_docstring_begins_with_a_clause(module: str) -> None:
    # Docstrings of attributes are included: every text that stands alone.
    texts = [
        (node.lineno, node.value.value.strip())
        for node in ast.walk(ast.parse((PACKAGE / module).read_text("utf-8")))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]
    found = [f"{module}:{line}: {text}" for line, text in texts if begins_with_a_clause(text)]
    assert not found, "\n".join(found)
