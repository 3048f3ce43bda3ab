"""Make one attempt over aiohttp. Its exceptions are mapped to ours, and returned."""

from __future__ import annotations

import asyncio
import io
import math
import re
from collections.abc import Callable
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TypeVar

import aiohttp
from aiohttp import hdrs
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from bctrl_async import _config
from bctrl_async._http.identity import check_answer, names_in
from bctrl_async._http.listing import Slices
from bctrl_async._http.operations import LONG_BODY, MAX_BODY, MIB, Operation
from bctrl_async._http.redaction import bearer_key, detached, sanitize
from bctrl_async._http.response import parse_error, unusable
from bctrl_async.errors import (
    BctrlConfigError,
    BctrlError,
    BctrlNetworkError,
    BctrlResponseError,
    BctrlTimeoutError,
    session_closed,
)

_T = TypeVar("_T")

# By default aiohttp sends a Content-Type of `application/octet-stream`, although there is no body,
# and strict servers reject it. Setting this once for a pool is cheaper than for each request.
NO_CONTENT_TYPE = (hdrs.CONTENT_TYPE,)

# Connecting times out after this share of an attempt's time, so that a request that was never sent
# is not reported as one without a response.
_CONNECT_SHARE = 0.9

# aiohttp also raises OSError, and ValueError for bad arguments.
_AIOHTTP_ERRORS = (aiohttp.ClientError, OSError, ValueError)

_is_words = re.compile("[A-Za-z ,.]+").fullmatch
_NO_HEADERS = CIMultiDictProxy[str](CIMultiDict())

# After these, nothing of the request was sent.
_CONNECT_ERRORS = (
    aiohttp.ClientConnectorError,
    aiohttp.ClientHttpProxyError,
    aiohttp.ServerFingerprintMismatch,
)


def time_limit(timeout: object) -> aiohttp.ClientTimeout:
    """Return aiohttp's limits for an attempt of at most this many seconds.

    Raises:
        BctrlConfigError: The timeout is not a positive, finite number.
    """
    total = _config.seconds(timeout, "timeout")
    # Without rounding to whole seconds, which could make the two limits equal.
    return aiohttp.ClientTimeout(
        total=total, connect=total * _CONNECT_SHARE, ceil_threshold=math.inf
    )


async def send_once(
    http: aiohttp.ClientSession,
    operation: Operation[_T],
    url: URL,
    *,
    headers: CIMultiDict[str],
    limit: aiohttp.ClientTimeout,
    asked_for: tuple[str, str | None] | None = None,
    answered: Callable[[int], object] | None = None,
) -> _T | BctrlError:
    """Send a request without a body, and parse the response.

    Args:
        http: The pool.
        operation: The operation to make.
        url: The encoded URL.
        headers: All headers, including `Authorization`.
        limit: The time limits, from `time_limit`.
        asked_for: The workspace and the alias that the answer must be about, with None for a whole
            workspace; without them an answer about any runtime is accepted.
        answered: Called with the status of the response, before its body is read.

    Returns:
        The parsed response, or the error in its place.
    """
    skip = None if hdrs.CONTENT_TYPE in http.skip_auto_headers else NO_CONTENT_TYPE
    try:
        response = await http.request(
            operation.method,
            url,
            headers=headers,
            skip_auto_headers=skip,
            allow_redirects=False,
            raise_for_status=False,
            auto_decompress=True,
            timeout=limit,
        )
    except _AIOHTTP_ERRORS as error:
        cause = _scrub(error, bearer_key(headers["Authorization"]))
        return _with_cause(_map_error(cause, limit), cause)
    except RuntimeError as error:
        # The pool was closed while the key was fetched.
        if http.closed:
            return _with_cause(session_closed(), detached(error))
        raise
    if answered is not None:
        answered(response.status)
    status = response.status
    is_success = HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES
    max_body = operation.max_body if is_success else MAX_BODY
    body, problem = await _read_body(response, max_body)
    if not is_success:
        # For an error status, a truncated body does not matter.
        return parse_error(
            status, response.headers, body, headers["Authorization"], now=datetime.now(UTC)
        )
    if problem is not None or len(body) > max_body:
        parsed: _T | BctrlError = _partial_error(
            status, problem, limit, max_body, stops=operation.stops
        )
    elif operation.parse_long is not None and len(body) > LONG_BODY:
        parsed = await _in_slices(operation.parse_long(status, body, headers["Authorization"]))
    else:
        parsed = operation.parse(status, body, headers["Authorization"])
    return _check(response, parsed, body, asked_for, headers["Authorization"])


def _check(
    response: aiohttp.ClientResponse,
    parsed: _T | BctrlError,
    body: bytes,
    asked_for: tuple[str, str | None] | None,
    authorization: str,
) -> _T | BctrlError:
    """Return the parsed body of a 2xx response, or an error if it settles nothing."""
    if isinstance(parsed, BctrlError):
        content_type = response.headers.get(hdrs.CONTENT_TYPE, "")
        settled: _T | BctrlError = unusable(parsed, content_type, body, authorization)
        names: object = names_in(body)
    else:
        settled = names = parsed
    if asked_for is not None:
        foreign = check_answer(names, *asked_for, authorization)
        if foreign is not None:
            _close_connection(response)
            return foreign
    return settled


async def _in_slices(slices: Slices[_T]) -> _T:
    """Let the event loop run between the slices of a computation."""
    while True:
        try:
            next(slices)
        except StopIteration as finished:
            value: _T = finished.value
            return value
        await asyncio.sleep(0)


async def _read_body(
    response: aiohttp.ClientResponse, max_body: int
) -> tuple[bytes, Exception | None]:
    """Read a body up to about `max_body` bytes; return it with the error that truncated it."""
    # Unlike a bytearray, it is turned into bytes without a copy.
    body = io.BytesIO()
    try:
        if response.content.is_eof():
            # It arrived with the headers, as a Runtime does.
            return response.content.read_nowait(), None
        async for chunk in response.content.iter_any():
            body.write(chunk)
            if body.tell() > max_body:
                break
            if body.tell() > LONG_BODY:
                # A compressed body unpacks to many chunks that need not be waited for.
                await asyncio.sleep(0)
    except (*_AIOHTTP_ERRORS, RuntimeError) as error:
        # aiohttp raises RuntimeError if this side has just closed the connection.
        return body.getvalue(), detached(error)
    finally:
        # After a complete body the connection is back in the pool already, and stays open.
        response.close()
    return body.getvalue(), None


def _close_connection(response: aiohttp.ClientResponse) -> None:
    """Close the connection of a response that was read completely.

    It is back in the pool, or has the next request on it already. Its answer would be a wrong one
    as well.
    """
    # The public `connection` is None by now; a mocked response has neither.
    protocol = getattr(response, "_protocol", None)
    if protocol is not None and protocol.transport is not None:
        protocol.transport.close()


def _scrub(error: Exception, key: str) -> Exception:
    """Remove from an error what may contain the key, or the credentials of a proxy."""
    if isinstance(error, aiohttp.ServerDisconnectedError):
        error.message = "Server disconnected"
        error.args = (error.message,)
    elif isinstance(error, aiohttp.ClientResponseError):
        error.message = sanitize(error.message, key) or ""
        error.args = ()
        url = error.request_info.real_url.with_user(None)
        error.request_info = aiohttp.RequestInfo(url, error.request_info.method, _NO_HEADERS, url)
    elif isinstance(error, aiohttp.ClientConnectorError):
        # Of a tunnel whose TLS failed, it names the proxy with its credentials.
        place = error._conn_key._replace(proxy=None, proxy_auth=None)  # noqa: SLF001
        error._conn_key = place  # noqa: SLF001
        error.args = (place, *error.args[1:])
    elif isinstance(error, ValueError):
        # It may quote the URL of a proxy, even in part.
        words = str(error)
        return ValueError(words if _is_words(words) else f"{type(error).__name__} (not shown)")
    return detached(error)


def _with_cause(error: BctrlError, cause: Exception) -> BctrlError:
    error.__cause__ = cause
    return error


def _map_error(error: Exception, limit: aiohttp.ClientTimeout) -> BctrlError:
    """Return our error for one of aiohttp's that came instead of a response."""
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return BctrlTimeoutError(f"no connection within {limit.connect:g} s")
    if isinstance(error, TimeoutError):
        return BctrlTimeoutError(f"no response within {limit.total:g} s", may_have_stopped=True)
    # Before ValueError, since a certificate error is one as well.
    if isinstance(error, _CONNECT_ERRORS):
        return BctrlNetworkError(f"no connection: {error}")
    if isinstance(error, ValueError):
        return BctrlConfigError(
            f"aiohttp rejected the request: {error}",
            advice="Check base_url, the proxies and netrc, and pass the key only as api_key=",
        )
    if isinstance(error, aiohttp.ClientResponseError):
        return BctrlResponseError(f"invalid HTTP response: {error.message}", may_have_stopped=True)
    return BctrlNetworkError(
        f"connection lost before a response: {str(error) or type(error).__name__}",
        may_have_stopped=True,
    )


def _partial_error(
    status: int,
    cause: Exception | None,
    limit: aiohttp.ClientTimeout,
    max_body: int,
    *,
    stops: bool,
) -> BctrlError:
    """Return the error for a 2xx response of which not all was read; without a cause, by choice."""
    if cause is None:
        return BctrlResponseError(
            f"the server answered {status} with a body of more than {max_body // MIB} MiB",
            may_have_stopped=True,
            status=status,
        )
    # A stop was accepted all the same: its response is invalid, and it must not be sent again.
    kind, problem = BctrlResponseError if stops else BctrlNetworkError, "was truncated"
    if isinstance(cause, TimeoutError):
        kind, problem = BctrlTimeoutError, f"took more than {limit.total:g} s"
    summary = f"the server answered {status}, but the body {problem}"
    return _with_cause(kind(summary, may_have_stopped=True, status=status), cause)
