"""The language of the package's docstrings and comments, as CONTRIBUTING.md says it."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import pytest

import bctrl_async

PACKAGE = Path(bctrl_async.__file__).parent
begins_with_a_clause = re.compile(
    r"(What(ever)?|Whether|How|Who(ever)?|Where|Which|When|Why|Those|One of|The same)\b"
).match
pragma = re.compile(r"# ?(noqa|pragma|type):?.*")
code = re.compile(r"`[^`]*`")

HABITS = {
    r"\b(that|those) of\b": 0.3,
    # "One" stands for a noun unless it counts one: "one attempt", "one or more", "at least one".
    r"\bones\b|(?<!least )\bone\b(?=$|[.,;:)]| (that|which|is|was|has|may|as|with|if|to)\b)": 0.2,
    r"\b(begin|begins|began|begun|beginning)\b": 0.5,
    r"\bfurther\b": 0.3,
    r"\b(all the same|such an?|no such)\b": 0.1,
}
"""The most hits in 1,000 words; httpx, httpcore and anyio have 0 to 0.3, of "one" 0.8."""

is_fragment = re.compile(
    r"(Above|After|Also|And|Around|As|At|Before|Below|Between|But|By|Else|Even|For|From|First|Here|"
    r"In|Late|Never|Nor|Not|Of|On|Only|Or|Perhaps|So|To|Unlike|Until|With|Without)\b"
).match
"""Matches a comment whose first word seldom starts a sentence with a subject."""


class Text(NamedTuple):
    """A docstring, also of an attribute, or a comment of one or more lines."""

    place: str
    text: str


def docstrings() -> Iterator[Text]:
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                text = " ".join(node.value.value.split())
                yield Text(f"{path.relative_to(PACKAGE)}:{node.lineno}", text)


def comments() -> Iterator[Text]:
    for path in sorted(PACKAGE.rglob("*.py")):
        found = {
            token.start: text
            for token in tokenize.generate_tokens(io.StringIO(path.read_text("utf-8")).readline)
            if token.type == tokenize.COMMENT
            and (text := pragma.sub("", token.string).lstrip("#").strip())
        }
        # A block is a run of lines: there, the line less its position in the run is constant.
        lines = enumerate(sorted(found))
        for _, block in groupby(lines, lambda item: (item[1][0] - item[0], item[1][1])):
            places = [place for _, place in block]
            text = " ".join(found[place] for place in places)
            yield Text(f"{path.relative_to(PACKAGE)}:{places[0][0]}", text)


def test_no_docstring_begins_with_a_clause() -> None:
    found = [f"{place}: {text}" for place, text in docstrings() if begins_with_a_clause(text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("pattern", "goal"), HABITS.items())
def test_habits_of_the_text_are_as_rare_as_in_other_libraries(pattern: str, goal: float) -> None:
    texts = [(place, code.sub("`…`", text)) for place, text in (*docstrings(), *comments())]
    words = sum(len(text.split()) for _, text in texts)
    found = [
        f"{place}: {text[max(hit.start() - 60, 0) : hit.end() + 40]}"
        for place, text in texts
        for hit in re.finditer(pattern, text, re.IGNORECASE)
    ]
    assert len(found) <= goal * words / 1000, "\n".join(found)


def test_comments_are_sentences() -> None:
    texts = list(comments())
    found = [f"{place}: {text}" for place, text in texts if is_fragment(text)]
    assert len(found) <= 0.05 * len(texts), "\n".join(found)
