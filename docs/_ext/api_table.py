"""The directive `api-table`: every public name, with a link and its first sentence.

The names are those that the pages of the same folder document, under the titles of
these pages, so the table has no list of its own that could go stale. `methods` names
classes whose methods it has.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, ClassVar

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx import addnodes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sphinx.application import Sphinx
    from sphinx.util.typing import ExtensionMetadata


class _Placeholder(nodes.General, nodes.Element):
    """The place of the table until all pages have been read."""


class _ApiTable(Directive):
    option_spec: ClassVar = {"methods": str.split}

    def run(self) -> list[nodes.Node]:
        return [_Placeholder(methods=self.options.get("methods", []))]


@cache
def _public(module: str) -> frozenset[str]:
    """Return the public names of a module; a class has none."""
    try:
        return frozenset(import_module(module).__all__)
    except ModuleNotFoundError:
        return frozenset()


def _first_sentence(content: addnodes.desc_content) -> Iterator[nodes.Node]:
    paragraphs = (
        each
        for each in content.findall(nodes.paragraph)
        if each.astext()[:6] != "Bases:"
    )
    for child in next(paragraphs, nodes.paragraph()).children:
        if isinstance(child, addnodes.pending_xref):
            yield nodes.literal("", child.astext())
            continue
        text, period, _ = child.astext().partition(". ")
        if isinstance(child, nodes.Text) and period:
            yield nodes.Text(f"{text}.")
            return
        yield child.deepcopy()


def _row(described: addnodes.desc, name: str, uri: str) -> nodes.row:
    link = nodes.reference("", "", nodes.literal("", name), refuri=uri)
    sentence = _first_sentence(next(iter(described.findall(addnodes.desc_content))))
    cells = [nodes.paragraph("", "", link), nodes.paragraph("", "", *sentence)]
    return nodes.row("", *(nodes.entry("", cell) for cell in cells))


def _rows(
    doctree: nodes.document, uri: str, with_methods: list[str]
) -> Iterator[nodes.row]:
    for described in doctree.findall(addnodes.desc):
        signature = next(iter(described.findall(addnodes.desc_signature)))
        name = signature["ids"][0]
        parent, _, short = name.rpartition(".")
        if short in _public(parent):
            yield _row(described, short, f"{uri}#{name}")
        elif (
            described["objtype"] == "method"
            and parent.rpartition(".")[2] in with_methods
        ):
            yield _row(described, f".{short}()", f"{uri}#{name}")


def _table(rows: list[nodes.row]) -> nodes.table:
    columns = [nodes.colspec(colwidth=width) for width in (35, 65)]
    group = nodes.tgroup("", *columns, nodes.tbody("", *rows), cols=2)
    return nodes.table("", group, classes=["api"])


def _fill(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    folder = docname.rpartition("/")[0]
    for placeholder in list(doctree.findall(_Placeholder)):
        filled: list[nodes.Node] = []
        for page in app.env.toctree_includes[app.config.root_doc]:
            if page == docname or page.rpartition("/")[0] != folder:
                continue
            uri = app.builder.get_relative_uri(docname, page)
            if rows := list(
                _rows(app.env.get_doctree(page), uri, placeholder["methods"])
            ):
                link = nodes.reference("", app.env.titles[page].astext(), refuri=uri)
                filled += [nodes.rubric("", "", link), _table(rows)]
        placeholder.replace_self(filled)


def setup(app: Sphinx) -> ExtensionMetadata:
    app.add_node(_Placeholder)
    app.add_directive("api-table", _ApiTable)
    app.connect("doctree-resolved", _fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
