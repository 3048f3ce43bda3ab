"""The examples of README.md and docs/, run against an emulator."""

from __future__ import annotations

import ast
import asyncio
import inspect
import logging
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

import pytest
from support.helpers import BOUND
from support.warm_server import program

from bctrl_async.emulator import Emulator
from bctrl_async.testing import bctrl_emulator  # noqa: F401 - a fixture.

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# Skip built documentation.
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
GUIDES = [
    path for path in PAGES if path.parent.name == "how-to" or path.stem == "tutorial"
]

# An indented block of a docstring that no heading such as "Args:" introduces.
EXAMPLE = re.compile(r"\n\n((?:(?:    .*)?\n)*    .*)(?=\n\n|$)")
# Before a block: `<!-- not run -->`, or `<!-- file: test_app.py -->` for a block that
# is a file.
BLOCK = re.compile(
    r"""
    ^(?:<!--[ ](?P<note>[^\n]*)[ ]-->\n\n?)?
    ```(?P<language>python|sh)\n(?P<code>.*?)^```$
    """,
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)
FILE = "file: "
NOT_RUN = "not run"
BASH = shutil.which("bash")


class Block(NamedTuple):
    """One example, with the number of its first line of code."""

    language: str
    code: str
    line: int
    note: str

    @property
    def file(self) -> str | None:
        return self.note.removeprefix(FILE) if self.note.startswith(FILE) else None


def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    found = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(match["language"], match["code"], line, match["note"] or ""))
    return found


def compiled(page: Path, block: Block) -> object:
    # A traceback has the line numbers of the page.
    code = "\n" * (block.line - 1) + block.code
    return compile(code, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def succeed(*command: str | Path) -> None:
    """Run a command in this folder, and check that it succeeds."""
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=BOUND * 4, check=False
    )
    assert ended.returncode == 0, f"{command[-1]}\n{ended.stdout}{ended.stderr}"


def shell(code: str) -> None:
    functions = {"bctrl-async": program(), "python": [sys.executable]}
    defined = [
        f'{name}() {{ {shlex.join(each)} "$@"; }}' for name, each in functions.items()
    ]
    succeed(
        BASH or pytest.skip("there is no bash"), "-e", "-c", "\n".join([*defined, code])
    )


def run_tests() -> None:
    """Run the tests of a page with BCTRL_BASE_URL, as the tutorial does.

    The configuration comes from the guide to tests, and must not be deprecated.
    """
    guide = (DOCS / "how-to" / "testing.md").read_text("utf-8")
    [settings] = re.findall(r"(?ms)^```toml\n(\[tool\.pytest\..*?)^```$", guide)
    Path("pyproject.toml").write_text(settings, "utf-8")
    plugin = "bctrl_async.testing"
    is_installed = any(
        point.value == plugin for point in entry_points(group="pytest11")
    )
    options = [] if is_installed else ["-p", plugin]
    succeed(
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-W",
        "error::DeprecationWarning",
        *options,
    )


@pytest.fixture
def _emulator_environment(
    bctrl_emulator: Emulator,  # noqa: F811 - the fixture.
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The emulator and the environment variables that the examples assume."""
    for number in range(1, 1001):
        bctrl_emulator.add_runtime("demo", f"runtime-{number:04}")
    monkeypatch.setenv("BCTRL_BASE_URL", bctrl_emulator.url)
    monkeypatch.setenv("BCTRL_API_KEY", "emulator-key")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv(
        "PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    )
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def _same_logging() -> Iterator[None]:
    """Leave the loggers as they were: examples configure them."""
    root, package = logging.getLogger(), logging.getLogger("bctrl_async")
    before = [
        (logger, logger.level, list(logger.handlers)) for logger in (root, package)
    ]
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers


@pytest.mark.usefixtures("_emulator_environment", "_same_logging")
@pytest.mark.parametrize(
    "page",
    [page for page in [ROOT / "README.md", *PAGES] if blocks(page)],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_every_example_of_a_page_runs_in_order(page: Path) -> None:
    namespace: dict[str, object] = {"__name__": "__main__"}
    with asyncio.Runner() as runner:
        for block in blocks(page):
            if block.language == "python":
                code = compiled(page, block)
            if block.note == NOT_RUN:
                continue
            if block.file is not None:
                Path(block.file).write_text(block.code, "utf-8")
            elif block.language == "python":
                # Code with a top-level await evaluates to a coroutine.
                ended = eval(code, namespace)  # type: ignore[arg-type]  # noqa: S307 - our docs.
                if inspect.iscoroutine(ended):
                    runner.run(ended)
            elif page in GUIDES:
                shell(block.code)
    if any(block.file and block.file.startswith("test_") for block in blocks(page)):
        run_tests()


def test_the_code_of_the_pages_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: the code of a guide failed the type checker of its reader."""
    pytest.importorskip("mypy")
    for page in [ROOT / "README.md", *PAGES]:
        for block in blocks(page):
            if block.language == "python":
                name = block.file or f"page_{page.stem.replace('-', '_')}.py"
                with (tmp_path / name).open("a", encoding="utf-8") as file:
                    file.write(block.code)
    # The blocks of a page define `main` anew, and some packages have no types.
    allowed = ("no-redef", "top-level-await", "no-any-return", "no-untyped-call")
    options = [
        f"--disable-error-code={code}" for code in (*allowed, "untyped-decorator")
    ]
    monkeypatch.chdir(tmp_path)
    succeed(
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--ignore-missing-imports",
        *options,
        ".",
    )


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md"])
def test_links_of_pages_outside_sphinx_exist(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    inside = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert [link for link in inside if not (ROOT / link).exists()] == []


def test_the_examples_of_docstrings_are_code() -> None:
    """Fault: an example was wrapped as prose."""
    examples = [
        dedent(example)
        for path in sorted((ROOT / "bctrl_async").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        for example in EXAMPLE.findall(ast.get_docstring(node) or "")
    ]
    assert len(examples) > 10
    for example in examples:
        # The tree of the errors is a picture.
        if "├" not in example:
            compile(example, "example", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_no_text_tells_to_install_the_package_from_an_index() -> None:
    """Fault: the name is on no index: pip installed what anybody registered."""
    paths = [ROOT / "README.md", *PAGES, *(DOCS / "examples").rglob("*")]
    paths += (ROOT / "bctrl_async").rglob("*.py")
    tool = r"\b(pip3? install|pipx|uvx|uv (add|pip|tool))\b"
    command = re.compile(rf"{tool}.*[\s'\"]bctrl[-_]async\b")
    files = [path for path in paths if path.is_file() and path.suffix != ".pyc"]
    assert [path for path in files if command.search(path.read_text("utf-8"))] == []


def test_the_signatures_for_readers_without_a_site_are_up_to_date() -> None:
    text = runpy.run_path(str(DOCS / "reference" / "names.py"))["text"]()
    ast.parse(text)
    is_same = text == (DOCS / "reference" / "names.pyi").read_text("utf-8")
    assert is_same, "run `python docs/reference/names.py`"
