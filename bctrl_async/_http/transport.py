"""One attempt over aiohttp: send a request, read the answer, say in our terms how it ended.

aiohttp's exceptions end here: every failure is returned as one of our errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TypeVar

import aiohttp
from aiohttp import hdrs
from multidict import CIMultiDict
from yarl import URL

from bctrl_async import _config
from bctrl_async._http.operations import MAX_BODY, MIB, Operation
from bctrl_async._http.response import one_line, read_error
from bctrl_async.errors import (
    BctrlConfigError,
    BctrlError,
    BctrlNetworkError,
    BctrlResponseError,
    BctrlTimeoutError,
    session_closed,
)

_T = TypeVar("_T")

# Without this aiohttp announces a body (`application/octet-stream`) that the contract does not
# have, and servers that check content types refuse it. It is cheaper for a whole pool than with
# each request.
NO_CONTENT_TYPE = (hdrs.CONTENT_TYPE,)

# A connection that takes this share of an attempt's time is given up first, so that "never
# connected" is told apart from "connected, and no answer came".
_CONNECT_SHARE = 0.9

# What aiohttp raises, with the operating system's own and those of wrong arguments.
_AIOHTTP_ERRORS = (aiohttp.ClientError, OSError, ValueError)

# Those of them after which the server has seen nothing of the request.
_NEVER_CONNECTED = (
    aiohttp.ClientConnectorError,
    aiohttp.ClientHttpProxyError,
    aiohttp.ServerFingerprintMismatch,
)


def time_limit(timeout: object) -> aiohttp.ClientTimeout:
    """Return the limits of one attempt that may take this many seconds.

    Raises:
        BctrlConfigError: Not a positive, finite number.
    """
    total = _config.seconds(timeout, "timeout")
    # Never rounded up to whole seconds: rounding could turn the order of the two limits round.
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
    answered: Callable[[int], object] | None = None,
) -> _T | BctrlError:
    """Send a request without a body, and read the answer.

    Args:
        http: The pool.
        operation: Decides the method, and how the answer is read.
        url: The encoded URL.
        headers: All headers, `Authorization` among them.
        limit: From `time_limit`.
        answered: Called with the status of an answer, before its body is read.

    Returns:
        What the operation reads, or why there is none.
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
        key = headers["Authorization"].removeprefix("Bearer ")
        return _with_cause(_scrub(error, key), _no_answer(error, limit))
    except RuntimeError as error:
        # Closed since the look at the pool, while the key was asked for.
        if http.closed:
            return _with_cause(error, session_closed())
        raise
    if answered is not None:
        answered(response.status)
    status = response.status
    is_success = HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES
    max_body = operation.max_body if is_success else MAX_BODY
    body, problem = await _read_body(response, max_body)
    if not is_success:
        # However the body ended: the status has said it.
        return read_error(
            status, response.headers, body, headers["Authorization"], now=datetime.now(UTC)
        )
    if problem is not None:
        return _with_cause(problem, _cut_short(status, problem, limit, stops=operation.stops))
    if len(body) > max_body:
        most = max_body // MIB
        return BctrlResponseError(
            f"the server answered {status} with a body of more than {most} MiB",
            may_have_stopped=True,
            status=status,
        )
    return operation.read(status, body, headers["Authorization"])


async def _read_body(
    response: aiohttp.ClientResponse, max_body: int
) -> tuple[bytes, Exception | None]:
    """Read a body, but little more than this; return what came, and what cut it short."""
    body = bytearray()
    try:
        if response.content.is_eof():
            # It came together with the headers, as a Runtime does.
            return response.content.read_nowait(), None
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > max_body:
                break
    except (*_AIOHTTP_ERRORS, RuntimeError) as error:
        # The RuntimeError is aiohttp's for a connection that this side has just closed.
        return bytes(body), _without_traceback(error)
    finally:
        # After a whole body the connection is back in the pool, and this does nothing to it.
        response.close()
    return bytes(body), None


def _scrub(error: Exception, key: str) -> Exception:
    """Remove what could show the key: aiohttp keeps parts of the request and of a broken answer."""
    if isinstance(error, aiohttp.ServerDisconnectedError):
        error.message = "Server disconnected"
        error.args = (error.message,)
    elif isinstance(error, aiohttp.ClientResponseError) and not isinstance(
        error, aiohttp.ClientHttpProxyError
    ):
        error.message = one_line(error.message, key) or ""
        error.args = ()
    return _without_traceback(error)


def _without_traceback(error: Exception) -> Exception:
    # Its traceback and what lies behind it hold parts of the request and of the answer.
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _with_cause(cause: Exception, error: BctrlError) -> BctrlError:
    error.__cause__ = cause
    return error


def _no_answer(error: Exception, limit: aiohttp.ClientTimeout) -> BctrlError:
    """Say in our own terms why no answer came."""
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return BctrlTimeoutError(f"no connection within {limit.connect:g} s")
    if isinstance(error, TimeoutError):
        return BctrlTimeoutError(f"no answer within {limit.total:g} s", may_have_stopped=True)
    # Before ValueError, which the certificate error is as well.
    if isinstance(error, _NEVER_CONNECTED):
        return BctrlNetworkError(f"no connection: {error}")
    if isinstance(error, ValueError):
        return BctrlConfigError(
            f"aiohttp refuses the request: {error}",
            advice="Leave credentials to api_key=, and check base_url and netrc",
        )
    if isinstance(error, aiohttp.ClientResponseError):
        return BctrlResponseError(f"the answer is not HTTP: {error.message}", may_have_stopped=True)
    return BctrlNetworkError(
        f"the connection broke before the answer: {str(error) or type(error).__name__}",
        may_have_stopped=True,
    )


def _cut_short(
    status: int, problem: Exception, limit: aiohttp.ClientTimeout, *, stops: bool
) -> BctrlError:
    """Say what cut an answer with a 2xx status short."""
    kind: type[BctrlNetworkError]
    if isinstance(problem, TimeoutError):
        what, kind = f"its body took more than {limit.total:g} s", BctrlTimeoutError
    else:
        # A stop was taken all the same, so its answer is one that cannot be read.
        what, kind = "its body broke off", BctrlResponseError if stops else BctrlNetworkError
    return kind(f"the server answered {status}, but {what}", may_have_stopped=True, status=status)
