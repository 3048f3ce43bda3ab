"""Write names.pyi: each public name with its signature, for readers without docs.

`python docs/reference/names.py` takes the names from the pages beside it, and all else
from the source.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path

import bctrl_async

_FOLDER = Path(__file__).parent
_ROOT = Path(bctrl_async.__file__).parents[1]
_HEAD = "# By `python docs/reference/names.py`. The docstrings in its files say more."
_DIRECTIVE = re.compile(
    r"^\.\. auto(?:class|exception|function):: ([\w.]+)(.*)\n(?:   :members:(.*))?",
    re.MULTILINE,
)
_DESCRIBED = re.compile(
    r"^\.\. py:(?:class|data|type):: ([\w.]+)\n\n((?:   .+\n)+)", re.MULTILINE
)
"""A name that its page describes itself."""
_ALIASES = {
    "bctrl_async.bulk._input": ("Target", "Targets"),
    "bctrl_async.bulk._options": ("OnOutcome",),
    "bctrl_async.fastapi._app": ("Lifespan", "PlainLifespan"),
    "bctrl_async.models": ("_OpenEnum",),
    "bctrl_async.redis": ("_Client",),
}
"""The types in signatures that have no page."""
_IMPORTABLE = "# Types in signatures; bctrl_async.bulk has OnOutcome and Targets."
_PROTOCOLS = {"__aenter__", "__aiter__"}
_ARGUMENT = re.compile(r"^    (\w+): (.+(?:\n        .+)*)", re.MULTILINE)
"""An argument in a docstring, with its text."""
_WIDTH = 100

_Function = ast.FunctionDef | ast.AsyncFunctionDef


def text() -> str:
    """Return the text of names.pyi."""
    index = (_FOLDER.parent / "index.md").read_text("utf-8")
    lines = [_HEAD, "", _IMPORTABLE, *_aliases(), ""]
    for page in re.findall(r"^reference/(\w+)$", index, re.MULTILINE):
        written = (_FOLDER / f"{page}.md").read_text("utf-8")
        for name, description in _DESCRIBED.findall(written):
            lines += [f"# {name}", _sentence(description), ""]
        for match in _DIRECTIVE.finditer(written):
            name, arguments, members = match.groups()
            module, _, short = name.rpartition(".")
            found = inspect.unwrap(getattr(import_module(module), short))
            lines.append(
                f"# {name}, in {Path(inspect.getfile(found)).relative_to(_ROOT)}"
            )
            if isinstance(found, type):
                shown = {"__init__"} if arguments != "()" else set[str]()
                shown |= set(re.findall(r"\w+", members or ""))
                lines += [*_class(found, shown, shows_all=members == ""), ""]
            else:
                lines += [*_function(_node(found)), ""]
    return "\n".join(lines)


def _aliases() -> Iterator[str]:
    for module, names in _ALIASES.items():
        source = ast.parse(
            Path(inspect.getfile(import_module(module))).read_text("utf-8")
        )
        for node in source.body:
            match node:
                case ast.Assign(targets=[ast.Name(name)]) if name in names:
                    yield ast.unparse(node)
                case ast.ClassDef(name=name) if name in names:
                    yield from _class(
                        getattr(import_module(module), name), set(), shows_all=False
                    )


def _node(found: object) -> ast.ClassDef | _Function:
    [node] = ast.parse(textwrap.dedent(inspect.getsource(found))).body
    return node


def _class(found: type, shown: set[str], *, shows_all: bool) -> Iterator[str]:
    node = _node(found)
    bases = ", ".join(map(ast.unparse, node.bases))
    yield f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    yield f"    {_sentence(ast.get_docstring(node))}"
    described = dict(_ARGUMENT.findall(ast.get_docstring(node) or ""))
    # What a private base class has is a part of its public subclass.
    classes = [each for each in found.__bases__ if each.__name__.startswith("_With")]
    for member in (each for part in [*classes, found] for each in _node(part).body):
        lines: list[str] = []
        match member:
            case ast.Assign(targets=[ast.Name(name)]) if name.isupper():
                lines = [ast.unparse(member)]
            case ast.AnnAssign(target=ast.Name(name)) if name[0] != "_":
                lines = [
                    f"{name}: {ast.unparse(member.annotation)}{_default(member.value)}"
                ]
                lines += [_sentence(described[name])] if name in described else []
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                if name in shown or (
                    shows_all and (name[0] != "_" or name in _PROTOCOLS)
                ):
                    lines = [
                        *_function(member, described if name == "__init__" else {})
                    ]
                if name == "__init__" and shows_all:
                    lines += [*_attributes(member)]
        yield from (f"    {line}" for line in lines)


def _attributes(node: _Function) -> Iterator[str]:
    """Yield the public attributes that a constructor declares."""
    for each in ast.walk(node):
        match each:
            case ast.AnnAssign(target=ast.Attribute(attr=name)) if name[0] != "_":
                yield f"{name}: {ast.unparse(each.annotation)}"


def _function(node: _Function, described: Mapping[str, str] = {}) -> Iterator[str]:
    yield from (
        f"@{each.id}"
        for each in node.decorator_list
        if getattr(each, "id", "") == "property"
    )
    positional, keywords = node.args.posonlyargs + node.args.args, node.args.kwonlyargs
    missing = [None] * (len(positional) - len(node.args.defaults))
    parts = [
        *map(_parameter, positional, missing + node.args.defaults),
        *(
            [f"*{ast.unparse(node.args.vararg)}"]
            if node.args.vararg
            else ["*"]
            if keywords
            else []
        ),
        *map(_parameter, keywords, node.args.kw_defaults),
    ]
    head = f"{'async ' * isinstance(node, ast.AsyncFunctionDef)}def {node.name}("
    tail = f") -> {ast.unparse(node.returns)}:"
    if len(head) + len(", ".join(parts)) + len(tail) < _WIDTH:
        yield f"{head}{', '.join(parts)}{tail}"
    else:
        yield head
        texts = {**described, **dict(_ARGUMENT.findall(ast.get_docstring(node) or ""))}
        for part in parts:
            text = texts.get(part.partition(":")[0])
            yield f"    {part},  # {_first(text)}" if text else f"    {part},"
        yield tail
    yield f"    {_sentence(ast.get_docstring(node))}"


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    return ast.unparse(argument) + _default(default)


def _default(value: ast.expr | None) -> str:
    written = "" if value is None else f" = {ast.unparse(value)}"
    # A private constant or a factory says nothing.
    return " = ..." if re.search(r"\b_[A-Z]|field\(", written) else written


def _sentence(text: str | None) -> str:
    return f'"""{_first(text)}"""' if text else "..."


def _first(text: str) -> str:
    """Return the first sentence of a text."""
    paragraph = " ".join(text.partition("\n\n")[0].split())
    return re.split(r"(?<=[.?]) (?=[A-Z`])", paragraph)[0]


if __name__ == "__main__":
    _FOLDER.joinpath("names.pyi").write_text(text(), "utf-8")
