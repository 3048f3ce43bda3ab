"""The directive `cli-options`: tables of the options in the `--help` of a command.

A copy of them in the page could go stale.
"""

from __future__ import annotations

import io
import os
import re
from contextlib import redirect_stdout
from typing import TYPE_CHECKING
from unittest.mock import patch

from docutils import nodes
from docutils.parsers.rst import Directive

from bctrl_async import cli

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sphinx.application import Sphinx
    from sphinx.util.typing import ExtensionMetadata

_PANEL = re.compile(r"╭─ (\w+) ─.*?╰─", re.DOTALL)
_OPTION = re.compile(r"^│ (-.*?\S)  +(\S.*?) +│$", re.MULTILINE)
_CODE = re.compile(r"(--[a-z-]+|\w+_\w+|'[^']+')")


def _help(command: str) -> str:
    # So wide that no description is broken.
    with patch.dict(os.environ, COLUMNS="400"), redirect_stdout(io.StringIO()) as out:
        cli.main([command, "--help"])
    return out.getvalue()


def _row(name: str, description: str) -> nodes.row:
    parts = enumerate(_CODE.split(description))
    text = [
        nodes.literal("", part) if number % 2 else nodes.Text(part)
        for number, part in parts
    ]
    cells = [
        nodes.paragraph("", "", nodes.literal("", name)),
        nodes.paragraph("", "", *text),
    ]
    return nodes.row("", *(nodes.entry("", cell) for cell in cells))


def _table(options: list[tuple[str, str]]) -> nodes.table:
    columns = [nodes.colspec(colwidth=width) for width in (35, 65)]
    rows = nodes.tbody("", *(_row(*option) for option in options))
    return nodes.table("", nodes.tgroup("", *columns, rows, cols=2), classes=["api"])


class _CliOptions(Directive):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        return list(self._tables())

    def _tables(self) -> Iterator[nodes.Node]:
        for panel in _PANEL.finditer(_help(self.arguments[0])):
            if options := _OPTION.findall(panel[0]):
                yield nodes.rubric("", panel[1])
                yield _table(options)


def setup(app: Sphinx) -> ExtensionMetadata:
    app.add_directive("cli-options", _CliOptions)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
