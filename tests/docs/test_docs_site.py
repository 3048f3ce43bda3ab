"""The built documentation, in Chromium.

sphinx-build docs docs/_build && BCTRL_DOCS_HTML=docs/_build pytest
tests/docs/test_docs_site.py
"""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator
from importlib import import_module
from pathlib import Path
from urllib.parse import quote

import pytest
from aiohttp import web
from support.browser import CHROMIUM, Tab
from support.commands import COMMANDS

from bctrl_async import cli

FOLDER = os.environ.get("BCTRL_DOCS_HTML")
SITE = Path(FOLDER or "docs/_build").resolve()
# Without Sphinx's index of names, search page and sources.
PAGES = sorted(
    str(page.relative_to(SITE))
    for page in SITE.rglob("*.html")
    if FOLDER
    and (SITE / "_sources" / page.relative_to(SITE).with_suffix(".md.txt")).exists()
)

pytestmark = pytest.mark.skipif(
    FOLDER is None, reason="BCTRL_DOCS_HTML names no built docs"
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
needs_pagefind = pytest.mark.skipif(
    not (SITE / "pagefind").exists(), reason="the docs were built without pagefind"
)


@pytest.fixture
async def url() -> AsyncIterator[str]:
    app = web.Application()
    # In a folder, as on most servers.
    app.router.add_static("/docs/", SITE)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}/docs"
    await runner.cleanup()


async def open_search(tab: Tab, page: str, key: str, *, control: bool = False) -> None:
    await tab.open(page)
    memory = "new WebAssembly.Memory({initial: 1}); return true"
    if not await tab.run(
        f"(() => {{ try {{ {memory} }} catch {{ return false }} }})()"
    ):
        # The search needs it; what the docs do without it has a test of its own.
        pytest.skip("this Chromium runs no WebAssembly")
    await tab.wait_for("document.querySelector('pagefind-modal-trigger button')")
    await tab.press(key, control=control)


async def write(tab: Tab, words: str) -> None:
    """Write into the open search box, in place of what is there and was found."""
    box = "document.querySelector('pagefind-modal input')"
    await tab.wait_for(f"document.activeElement === {box}")
    await tab.run(f"{box}.value = ''; {box}.dispatchEvent(new Event('input'))")
    await tab.wait_for("!document.querySelector('pagefind-modal .pf-result')")
    await tab.write(words)


async def hits(tab: Tab, words: str) -> list[str]:
    """Search for words, and return the first three pages found."""
    await write(tab, words)
    # They are filled in singly, in any order.
    first = "[...document.querySelectorAll('pagefind-modal .pf-result')].slice(0, 3)"
    links = f"{first}.map(hit => hit.querySelector('.pf-result-link'))"
    await tab.wait_for(f"{first}.length && {links}.every(link => link)")
    found = await tab.run(f"{links}.map(link => link.pathname)")
    return [str(each).removeprefix("/docs/") for each in found]


# What each page is found by, and first.
FOUND = {
    "how-to/asyncio": "timeout, which time limit",
    "how-to/bulk-script": "pandas, DataFrame",
    "explanation/comparison": "memory usage",
    "how-to/configure": "mTLS, custom headers, user agent, secret rotation, "
    "self-signed certificate",
    "how-to/fastapi": "SSE",
    "how-to/fastapi-production": "readiness probe, health check",
    "how-to/fastapi-runs": "progress",
    "how-to/find": "pagination, dry run",
    "how-to/journal": "crash recovery",
    "how-to/nightly": "Windows, Docker, Kubernetes",
    "how-to/rate-limits": "429",
    "reference/command": "Ctrl-C, exit code",
    "reference/endings": "timeout",
    "reference/errors": "connection refused",
    "reference/outcomes": "is everything stopped",
    "reference/problems": "RFC 9457",
    "reference/session": "timeout, max_connections, stop_runtimes",
}
FOUND_FIRST = {
    "how-to/bulk-script": "database, sqlite",
    "how-to/fastapi": "EventSource",
    "how-to/find": "stop all runtimes",
    "how-to/nightly": "mail, cron",
    "how-to/rate-limits": "rate limit, rate lim",
    "reference/command": "Excel, NO_COLOR, wildcard",
    "reference/index": "mypy",
}


def words_of(pages: dict[str, str]) -> list[tuple[str, str]]:
    return [
        (word, f"{page}.html")
        for page, words in pages.items()
        for word in words.split(", ")
    ]


@needs_chromium
@needs_pagefind
async def test_the_search_finds_every_page(tab: Tab, url: str) -> None:
    await open_search(tab, f"{url}/how-to/find.html", "/")
    pairs = words_of(FOUND)
    missing = [pair for pair in pairs if pair[1] not in await hits(tab, pair[0])]
    assert (missing, tab.errors) == ([], [])


@needs_chromium
@needs_pagefind
async def test_a_search_has_the_page_with_the_answer_first(tab: Tab, url: str) -> None:
    await open_search(tab, f"{url}/how-to/find.html", "/")
    pairs = words_of(FOUND_FIRST)
    first = [(word, (await hits(tab, word))[0]) for word, _ in pairs]
    assert (first, tab.errors) == (pairs, [])


@needs_chromium
@needs_pagefind
async def test_a_word_that_no_page_has_has_no_hits(tab: Tab, url: str) -> None:
    """Fault: pagefind looked for its beginning, such as the `s` of `sqlite`."""
    await open_search(tab, f"{url}/index.html", "/")
    for words in ("postgres", "numpy", "rate postgres"):
        await write(tab, words)
        summary = "document.querySelector('pagefind-modal pagefind-summary').innerText"
        await tab.wait_for(f"{summary} === 'No results for {words}'")


@needs_chromium
@needs_pagefind
async def test_a_search_needs_no_mouse(tab: Tab, url: str) -> None:
    await open_search(tab, f"{url}/index.html", "k", control=True)
    first = (await hits(tab, "429"))[0]
    await tab.press("Enter")
    await tab.wait_for(f"location.pathname === '/docs/{first}'")


@needs_chromium
@pytest.mark.parametrize(
    "is_file", [True, False], ids=["as a file", "without WebAssembly"]
)
async def test_without_it_the_search_of_sphinx_stays(
    tab: Tab, url: str, *, is_file: bool
) -> None:
    if not is_file:
        script = "delete window.WebAssembly"
        await tab.call("Page.addScriptToEvaluateOnNewDocument", source=script)
    await tab.open((SITE / "index.html").as_uri() if is_file else f"{url}/index.html")
    assert await tab.run("document.querySelector('.sidebar-search').name") == "q"
    assert not await tab.run("!!document.querySelector('pagefind-modal')")
    assert is_file or tab.errors == []


@needs_chromium
@pytest.mark.parametrize(
    "width",
    [
        pytest.param(390, id="a phone"),
        pytest.param(1320, id="a window in which both sidebars have just enough room"),
    ],
)
async def test_no_page_or_table_is_scrolled_sideways(
    tab: Tab, url: str, width: int
) -> None:
    await tab.show_as(width=width)
    page = f"document.documentElement.scrollWidth > {width}"
    tables = "[...document.querySelectorAll('.table-wrapper')]"
    is_wide = f"{page} || {tables}.some(each => each.scrollWidth > each.clientWidth)"
    wide = []
    for each in PAGES:
        await tab.open(f"{url}/{each}")
        if await tab.run(is_wide):
            wide.append(each)
    assert (wide, tab.errors) == ([], [])


@needs_chromium
async def test_the_tab_key_stops_only_at_code_that_scrolls(tab: Tab, url: str) -> None:
    code = "[...document.querySelectorAll('article .highlight pre')]"
    await tab.open(f"{url}/how-to/testing.html")
    for width, scrolls in [(390, True), (1280, False)]:
        await tab.show_as(width=width)
        await tab.wait_for(
            f"{code}.some(each => each.tabIndex === 0) === {str(scrolls).lower()}"
        )


@needs_chromium
@pytest.mark.parametrize("word", ["429", "503 gateway"])
async def test_the_search_of_sphinx_finds_numbers_as_well(tab: Tab, word: str) -> None:
    await tab.open((SITE / "search.html").as_uri() + f"?q={quote(word)}")
    # They are listed singly.
    hits = "[...document.querySelectorAll('#search-results li a')]"
    await tab.wait_for(
        f"{hits}.some(each => each.pathname.includes('reference/outcomes'))"
    )


def test_the_index_has_every_public_name() -> None:
    page = (SITE / "genindex.html").read_text("utf-8")
    listed = set(re.findall(r'href="[^"#]*#([\w.]+)"', page))
    extras = ("emulator", "fastapi", "otel", "pace", "redis", "testing")
    modules = ["bctrl_async", *(f"bctrl_async.{name}" for name in extras)]
    names = {
        f"{name}.{public}" for name in modules for public in import_module(name).__all__
    }
    assert names - listed == {"bctrl_async.__version__"}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_reference_has_every_option(
    command: str, capfd: pytest.CaptureFixture[str]
) -> None:
    page = (SITE / "reference" / "command.html").read_text("utf-8")
    section = page.partition(f'<section id="bctrl-async-{command}">')[2]
    section = section.partition('<section id="bctrl-async-')[0]
    assert cli.main([command, "--help"]) == 0
    options = re.findall(r"^│ (--[a-z-]+)", capfd.readouterr().out, re.MULTILINE)
    assert options
    name = r'<td><p><code[^>]*><span class="pre">(--[a-z-]+)</span>'
    assert options == re.findall(name, section)
