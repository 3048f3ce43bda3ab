"""The language of docstrings, comments and names, as CONTRIBUTING.md says it."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import pytest

import bctrl_async

PACKAGE = Path(bctrl_async.__file__).parent
TESTS = Path(__file__).parent
begins_with_a_clause = re.compile(
    r"(What(ever)?|Whether|How|Who(ever)?|Where|Which|When|Why|Those|One of|The same)\b"
).match
pragma = re.compile(r"# ?(noqa|pragma|type):?.*")
code = re.compile(r"`[^`]*`")

AFTER_A_NOUN = r"$|[.,;:)]| (that|which|is|was|has|may|as|with|if|to)\b"
HABITS = {
    r"\b(that|those) of\b": 0.3,
    # "One" stands for a noun unless it counts one: "one attempt", "one or more", "at
    # least one".
    rf"\bones\b|(?<!least )\bone\b(?={AFTER_A_NOUN})": 0.2,
    r"\b(begin|begins|began|begun|beginning)\b": 0.5,
    r"\bfurther\b": 0.3,
    r"\b(all the same|such an?|no such)\b": 0.1,
}
"""The most hits in 1,000 words; httpx and anyio have up to 0.3, of "one" 0.8."""

is_fragment = re.compile(
    r"(Above|After|Also|And|Around|As|At|Before|Below|Between|But|By|Else|Even|For|From|First|Here|"
    r"In|Late|Never|Nor|Not|Of|On|Only|Or|Perhaps|So|To|Unlike|Until|With|Without)\b"
).match
"""Matches a comment whose first word seldom starts a sentence with a subject."""

is_stand_in = re.compile(
    r"_*("
    r"answered|any_|asked|began|begun|both|closed|cut|drawn|each|ended|ends|"
    r"expected|failed|few|found|given|gives|gone|grown|held|how|it|its|kept|"
    r"known|left|listed|made|many|moved|opened|other|others|own|place|polled|"
    r"raised|read_|rest|said|seen|sent|settled|shown|some|takes|that|them|"
    r"these|this|those|told|waits|wanted|what|who|why"
    r")_*"
).fullmatch
"""Matches a name that says what happened to a thing or points at it, not what it is."""


class Text(NamedTuple):
    """A docstring, also of an attribute, a comment of one or more lines, or a name."""

    place: str
    text: str


@cache
def docstrings(root: Path) -> list[Text]:
    return [
        Text(place, " ".join(node.value.value.split()))
        for place, node in nodes(root)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]


@cache
def comments(root: Path) -> list[Text]:
    return [
        text for path in sorted(root.rglob("*.py")) for text in comments_of(path, root)
    ]


def comments_of(path: Path, root: Path) -> Iterator[Text]:
    texts = {
        token.start: text
        for token in tokenize.generate_tokens(
            io.StringIO(path.read_text("utf-8")).readline
        )
        if token.type == tokenize.COMMENT
        and (text := pragma.sub("", token.string).lstrip("#").strip())
    }
    # A block is a run of lines: there, the line less its position in the run is
    # constant.
    lines = enumerate(sorted(texts))
    for _, block in groupby(lines, lambda item: (item[1][0] - item[0], item[1][1])):
        starts = [start for _, start in block]
        text = " ".join(texts[start] for start in starts)
        yield Text(f"{path.relative_to(root)}:{starts[0][0]}", text)


def names(root: Path) -> Iterator[Text]:
    """Yield each name that is bound: variables, attributes and parameters."""
    for place, node in nodes(root):
        match node:
            case (
                ast.Name(id=name, ctx=ast.Store())
                | ast.Attribute(attr=name, ctx=ast.Store())
            ):
                yield Text(place, name)
            case ast.arg(arg=name):
                yield Text(place, name)


def nodes(root: Path) -> Iterator[tuple[str, ast.AST]]:
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            line = getattr(node, "lineno", 1)
            yield f"{path.relative_to(root)}:{line}", node


of_all_code = pytest.mark.parametrize(
    "root", [PACKAGE, TESTS], ids=["package", "tests"]
)


@of_all_code
def test_no_docstring_begins_with_a_clause(root: Path) -> None:
    hits = [
        f"{place}: {text}"
        for place, text in docstrings(root)
        if begins_with_a_clause(text)
    ]
    assert not hits, "\n".join(hits)


@of_all_code
@pytest.mark.parametrize(("pattern", "goal"), HABITS.items())
def test_habits_of_the_text_are_as_rare_as_in_other_libraries(
    root: Path, pattern: str, goal: float
) -> None:
    texts = [
        (place, code.sub("`…`", text))
        for place, text in docstrings(root) + comments(root)
    ]
    words = sum(len(text.split()) for _, text in texts)
    hits = [
        f"{place}: {text[max(hit.start() - 60, 0) : hit.end() + 40]}"
        for place, text in texts
        for hit in re.finditer(pattern, text, re.IGNORECASE)
    ]
    assert len(hits) <= goal * words / 1000, "\n".join(hits)


@of_all_code
def test_comments_are_sentences(root: Path) -> None:
    texts = comments(root)
    hits = [f"{place}: {text}" for place, text in texts if is_fragment(text)]
    assert len(hits) <= 0.05 * len(texts), "\n".join(hits)


def test_names_say_what_they_hold() -> None:
    """httpx, httpcore and anyio have 0.5 to 0.9 stand-ins in 100 names."""
    texts = list(names(PACKAGE))
    hits = [f"{place}: {name}" for place, name in texts if is_stand_in(name)]
    assert len(hits) <= 0.008 * len(texts), "\n".join(hits)
