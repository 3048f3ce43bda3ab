"""The two ways of a request: the fast path, and aiohttp's `ClientSession`."""

from __future__ import annotations

import os
import runpy
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import aiohttp
from yarl import URL

from bctrl_async._http.fast import FastPath

LONG_WAY_HELP = (
    "send each request through aiohttp.ClientSession, as if a tracer had wrapped it"
)

_STARTUP = Path(__file__).parent / "long_way"

_post, _build_url = FastPath.post, aiohttp.ClientSession._build_url


def take_long_way() -> None:
    """Make this process and those that it starts send every request the long way."""
    runpy.run_path(str(_STARTUP / "sitecustomize.py"))
    others = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(_STARTUP), *([others] if others else [])]
    )


@contextmanager
def long_way() -> Iterator[None]:
    """Send the requests of this block the long way."""
    request = aiohttp.ClientSession._request

    def wrapper(
        *args: Any,  # noqa: ANN401 - aiohttp's own arguments.
        **kwargs: Any,  # noqa: ANN401
    ) -> Coroutine[Any, Any, aiohttp.ClientResponse]:
        return request(*args, **kwargs)

    with patch.object(aiohttp.ClientSession, "_request", wrapper):
        yield


class Ways:
    """A count of the requests that took each way.

    Attributes:
        short: The POSTs that took the fast path.
        long: The requests that `ClientSession._request` made.
    """

    def __init__(self) -> None:
        self.short = 0
        self.long = 0

    @property
    def taken(self) -> tuple[int, int]:
        """Both counts: short, long."""
        return self.short, self.long

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count the requests of this block."""

        async def post(fast_path: FastPath, path: str, *args: Any) -> Any:  # noqa: ANN401
            # The requests of a rehearsal do not count.
            self.short += path.startswith("/v1/")
            return await _post(fast_path, path, *args)

        def build_url(http: aiohttp.ClientSession, url: str | URL) -> URL:
            # `_request` calls it once, and must not be replaced itself.
            self.long += 1
            return _build_url(http, url)

        with (
            patch.object(FastPath, "post", post),
            patch.object(aiohttp.ClientSession, "_build_url", build_url),
        ):
            yield
