"""The two ways of a request: the fast path, and the long way through aiohttp's `ClientSession`."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

LONG_WAY_HELP = (
    "send each request through aiohttp.ClientSession.request, as where a tracer wraps it"
)

_STARTUP = Path(__file__).parent / "long_way"


def take_long_way() -> None:
    """Make this process and those that it starts send every request the long way."""
    runpy.run_path(str(_STARTUP / "sitecustomize.py"))
    others = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_STARTUP), *([others] if others else [])])
