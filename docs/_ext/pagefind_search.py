"""Index the pages with pagefind, if it is installed, for the search box of `search.js`.

Sphinx's own search stays where pagefind is not installed, in pages that are opened as
files, and without WebAssembly. `search.html` lets it find numbers as well, such as 429.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

from sphinx.search.en import SearchEnglish
from sphinx.util import logging

try:
    from pagefind.service import PagefindService
except ModuleNotFoundError:
    PagefindService = None

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.config import Config
    from sphinx.util.typing import ExtensionMetadata

_log = logging.getLogger(__name__)

_PATIENCE = 300.0
"""Seconds for the index, which takes two on a machine that is not busy."""
_ASIDE = {
    "CONTRIBUTING",
    "changelog",
    "contributing/architecture",
    "contributing/limiter",
}
"""Pages for few readers, which mention much: they rank last."""

_KEYWORDS = {
    "explanation/comparison": "memory usage",
    "reference/endings": "timeout",
    "how-to/asyncio": "timeout",
    "how-to/configure": "custom headers. user agent. secret rotation, rotate the key. "
    "self-signed certificate. mTLS, client certificate",
    "how-to/fastapi": "SSE, server-sent events",
    "how-to/fastapi-production": "health check, readiness probe",
    "how-to/fastapi-runs": "progress",
    "how-to/find": "stop all runtimes. pagination. dry run",
    "how-to/journal": "crash recovery",
    "how-to/nightly": "Windows. mail on failure",
    "how-to/rate-limits": "429",
    "reference/command": "Ctrl-C. exit code",
    "reference/errors": "connection refused",
    "reference/outcomes": "is everything stopped",
    "reference/problems": "RFC 9457",
    "reference/session": "timeout=, timeout. max_connections",
}
"""Words to find a page by, which others have as often, or which it lacks."""


class _English(SearchEnglish):
    """The words of Sphinx's own search, and numbers."""

    def word_filter(self, word: str) -> bool:
        return word.isdigit() or super().word_filter(word)


def _prepare(html: str) -> str:
    """Give headings and names the ids of their sections: pagefind links to headings."""
    html = re.sub(r'<section id="([^"]+)">\s*<h(\d)>', r'<section><h\2 id="\1">', html)
    return re.sub(
        r'<dt class="sig [^>]* id="(bctrl_async\.((?:[^".]+\.)*([^".]+)))">',
        r'<dt><h4 id="\1">\2</h4><p data-pagefind-weight="10">\3</p>',
        html,
    )


async def _index(app: Sphinx) -> None:
    bundle = app.outdir / "pagefind"
    config = {
        "root_selector": "article",
        "exclude_selectors": [".headerlink", ".viewcode-link"],
        "force_language": "en",
        "keep_index_url": True,
        "output_path": str(bundle),
    }
    async with asyncio.timeout(_PATIENCE), PagefindService() as service:
        index = await service.create_index(config)
        for page in sorted(app.env.found_docs):
            content = _prepare((app.outdir / f"{page}.html").read_text("utf-8"))
            if page in _KEYWORDS:
                keywords = f'<p data-pagefind-weight="10">{_KEYWORDS[page]}</p>'
                content = content.replace("</h1>", f"</h1>{keywords}", 1)
            if page in _ASIDE:
                content = content.replace(
                    "<article", '<article data-pagefind-weight="0.2"', 1
                )
            await index.add_html_file(content=content, source_path=f"{page}.html")
        await index.write_files()
        # It answers before its last files are on disk, and would end without them.
        while not all(  # noqa: ASYNC110 - another process writes them.
            path.stat().st_size for path in bundle.rglob("*")
        ):
            await asyncio.sleep(0.1)


def _add_script(_app: Sphinx, config: Config) -> None:
    config.html_js_files.append(("search.js", {"type": "module"}))


def _finish(app: Sphinx, failure: Exception | None) -> None:
    if failure is None and app.builder.name == "html":
        asyncio.run(_index(app))


def setup(app: Sphinx) -> ExtensionMetadata:
    app.add_search_language(_English)
    if PagefindService is None:
        _log.info("pagefind is not installed: the search is Sphinx's own")
    else:
        app.connect("config-inited", _add_script)
        app.connect("build-finished", _finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
