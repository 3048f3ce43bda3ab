"""The configuration of Sphinx: `sphinx-build -nW docs docs/_build`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent / "_ext"))

from bctrl_async import __version__

project = "bctrl_async"
copyright = "the authors of bctrl_async, MIT licence"  # noqa: A001 - Sphinx names it.
version = release = __version__

extensions = [
    "cli_options",
    "myst_parser",
    # Sphinx's own search has the right page among its first three hits for 24 of 38
    # queries of the tests, and Pagefind for all.
    "pagefind_search",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "examples"]

html_theme = "furo"
html_title = f"bctrl_async {__version__}"
html_static_path = ["_static"]
templates_path = ["_templates"]
html_favicon = "_static/logo.svg"
html_logo = "_static/logo.svg"
html_css_files = ["custom.css"]
html_js_files = [("scroll.js", {"defer": ""})]
html_copy_source = False
html_show_sourcelink = False

# A copy has no prompts, and none of the output after them.
copybutton_prompt_text = r">>> |\.\.\. |\$ |PS> "
copybutton_prompt_is_regexp = True

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

# In our docstrings, single backticks are code.
default_role = "code"
autodoc_class_signature = "mixed"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True
maximum_signature_line_length = 60

# The clients that `RedisPace` takes are described in its text.
nitpick_ignore = [
    ("py:class", "bctrl_async.redis._Client"),
    ("py:class", "aioresponses"),
]
nitpick_ignore_regex = [
    # Starlette's documentation has no reference of names.
    (r"py:.*", r"starlette\..*"),
    # pytest documents its classes by their public names.
    (r"py:class", r"_pytest\..*"),
    # Type variables.
    (r"py:.*", r".*\._T"),
]

# Trimmed copies, so that a build needs no network: see `_inventories/trim.py`.
intersphinx_mapping = {
    project: (url, f"_inventories/{project}.inv")
    for project, url in {
        "aiohttp": "https://docs.aiohttp.org/en/stable",
        "fastapi": "https://fastapi.tiangolo.com",
        "opentelemetry": "https://opentelemetry-python.readthedocs.io/en/stable",
        "pytest": "https://docs.pytest.org/en/stable",
        "python": "https://docs.python.org/3",
        "yarl": "https://yarl.aio-libs.org/en/stable",
    }.items()
}


_COLON = "\N{PRESENTATION FORM FOR VERTICAL COLON}"


def _prepare(
    _app: Sphinx,
    what: str,
    _name: str,
    _object: object,
    _options: object,
    lines: list[str],
) -> None:
    """Convert our docstrings to reStructuredText."""
    prepared: list[str] = []
    in_returns = False
    for number, line in enumerate(lines):
        # In our docstrings, a code block is only indented.
        before = next((text for text in reversed(lines[:number]) if text.strip()), "")
        is_block = line.startswith("    ") and not lines[number - 1].strip()
        if is_block and not before.startswith(" "):
            language = (
                "text" if any("├" in text for text in lines[number:]) else "python"
            )
            prepared += [f".. code-block:: {language}", ""]
        # Escape a plural such as `Struct`s.
        plural = re.sub(r"(`[^`]+`)(?=\w)", r"\1\\ ", line)
        # Napoleon takes text before a colon for a type.
        in_returns = line == "Returns:" or (in_returns and line.startswith("    "))
        is_type = in_returns and line != "Returns:"
        is_type |= number == 0 and what in {"attribute", "data", "property"}
        prepared.append(plural.replace(":", _COLON) if is_type else plural)
    lines[:] = prepared


def _restore(
    _app: Sphinx,
    _what: str,
    _name: str,
    _object: object,
    _options: object,
    lines: list[str],
) -> None:
    lines[:] = [line.replace(_COLON, ":") for line in lines]


def _shorten(
    _app: Sphinx,
    _what: str,
    _name: str,
    _object: object,
    _options: object,
    signature: str | None,
    returns: str | None,
) -> tuple[str | None, str | None]:
    """Abbreviate the defaults of Structs, which msgspec keeps as values."""
    if signature is not None:
        signature = signature.replace("<factory>", "...")
        signature = re.sub(
            r"(\{\d+, \d+, \d+), [\d, ]+, (\d+\})", r"\1, ..., \2", signature
        )
    return signature, returns


def _set_level(
    _app: Sphinx, _page: str, _template: str, context: dict[str, Any], _doctree: object
) -> None:
    """Give the captions of the navigation a level, for screen readers."""
    tree = context.get("furo_navigation_tree", "")
    context["furo_navigation_tree"] = tree.replace(
        'role="heading"', 'role="heading" aria-level="2"'
    )


def setup(app: Sphinx) -> None:
    """Connect the handlers that mend signatures and captions, also around napoleon."""
    app.connect("autodoc-process-signature", _shorten)
    app.connect("html-page-context", _set_level, priority=900)
    app.connect("autodoc-process-docstring", _prepare, priority=100)
    app.connect("autodoc-process-docstring", _restore, priority=900)
