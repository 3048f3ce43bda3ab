"""The wire log: what each attempt sends and receives, without the values of secrets."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import TypeVar

import aiohttp
from aiohttp import hdrs
from multidict import CIMultiDict
from yarl import URL

from bctrl_async._config import Secret
from bctrl_async._http.redaction import bearer_key, excerpt_of, redacted, sanitize
from bctrl_async._http.request import Request
from bctrl_async._kinds import Failure
from bctrl_async.errors import log_fields

_MAX_BODY = 1024
"""The most characters of a body that are logged."""
_T = TypeVar("_T")
_log = logging.getLogger("bctrl_async.wire")


class Record:
    """A record of one attempt, made when it starts and logged when it ends."""

    def __init__(self, request_line: str, headers: CIMultiDict[str]) -> None:
        self._request_line = request_line
        self._headers = headers
        self._started = time.monotonic()

    def log_failure(self, failure: Failure) -> None:
        """Log an attempt without an answer."""
        self._write([f"! {failure.summary}"], log_fields(failure.error()))

    def log_answer(
        self,
        response: aiohttp.ClientResponse,
        body: bytes,
        problem: BaseException | None,
    ) -> None:
        """Log an answer with the start of its body, and what truncated the body."""
        key = bearer_key(self._headers[hdrs.AUTHORIZATION])
        # The headers of the caller are `Secret`s, like the key.
        secrets = [
            value for value in self._headers.values() if isinstance(value, Secret)
        ]
        lines = [f"< {response.status}"]
        for name, value in response.headers.items():
            line = sanitize(f"{name}: {value}", key)
            if name.lower() == "set-cookie":
                line = f"{name}: ***"
            lines.append(f"< {redacted(line, secrets)}")
        excerpt = redacted(excerpt_of(body, key), secrets)
        lines.append(f"< {excerpt[:_MAX_BODY]!r}")
        if problem is not None:
            lines.append(f"! the body was cut off: {type(problem).__name__}")
        self._write(lines, {"http.response.status_code": response.status})

    def _write(self, lines: list[str], fields: Mapping[str, object]) -> None:
        elapsed = time.monotonic() - self._started
        request = [f"{self._request_line} in {elapsed:.3f} s"]
        # The repr of a `Secret` hides it.
        request += [f"> {name}: {value!r}" for name, value in self._headers.items()]
        extra = {**fields, "bctrl.event": "wire", "bctrl.elapsed": elapsed}
        _log.debug("\n".join([*request, *lines]), extra=extra)


def record(request: Request[_T], url: URL, headers: CIMultiDict[str]) -> Record | None:
    """Return the record of an attempt that starts; None unless the log is on.

    Only the logger's own level counts: a level for a whole app does not ask for bodies.
    """
    if not logging.NOTSET < _log.level <= logging.DEBUG:
        return None
    url = url.with_path(request.path, encoded=True)
    return Record(f"{request.operation.method} {url}", headers)
