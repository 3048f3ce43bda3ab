"""Make one attempt over aiohttp and parse its response; errors are returned, not raised."""

from __future__ import annotations

import asyncio
import io
import math
from collections.abc import Callable
from datetime import UTC, datetime
from types import CoroutineType
from typing import TypeVar

import aiohttp
from aiohttp import hdrs
from multidict import CIMultiDict
from yarl import URL

from bctrl_async import _config
from bctrl_async._http import fast, wire
from bctrl_async._http.failures import AIOHTTP_ERRORS, failed_request, partial_response
from bctrl_async._http.lists import check_whole
from bctrl_async._http.redaction import detached
from bctrl_async._http.request import Request
from bctrl_async._http.response import (
    DECODE_ERRORS,
    MIB,
    check_answer,
    parse_error,
    request_id_in,
    unreadable,
    unusable,
)
from bctrl_async.errors import BctrlError, session_closed

_T = TypeVar("_T")

_Response = aiohttp.ClientResponse | fast.Exchange

# Connecting times out after this fraction of an attempt's time limit, so that the error can say
# that nothing was sent.
_CONNECT_SHARE = 0.9

_OK, _REDIRECTS = 200, 300
_LONG_BODY = MIB // 4
"""Past this many bytes of a body, other tasks get a turn after each chunk."""


def time_limit(timeout: object) -> aiohttp.ClientTimeout:
    """Return aiohttp's limits for an attempt of at most this many seconds."""
    total = _config.seconds(timeout, "timeout")
    # Rounding up to whole seconds is off, because it could make the two limits equal.
    return aiohttp.ClientTimeout(
        total=total, connect=total * _CONNECT_SHARE, ceil_threshold=math.inf
    )


def at_most(limit: aiohttp.ClientTimeout, seconds: float) -> aiohttp.ClientTimeout:
    """Return aiohttp's limits for an attempt of at most this many seconds, if that is less."""
    if limit.total is not None and limit.total <= seconds:
        return limit
    return time_limit(seconds)


async def send_once(  # noqa: C901, PLR0912, PLR0915 - the steps of an attempt, one after the other.
    http: aiohttp.ClientSession,
    fast_path: fast.FastPath | None,
    call: Request[_T],
    url: URL,
    headers: CIMultiDict[str],
    *,
    check_answers: bool,
    answered: Callable[[int], object] | None = None,
) -> _T | BctrlError:
    """Send a request with exactly these headers; return the parsed body or an error."""
    operation, authorization = call.operation, headers[hdrs.AUTHORIZATION]
    record: wire.Record | None = None
    if wire.is_on():
        request_line = f"{operation.method} {url.with_path(call.path, encoded=True)}"
        record = wire.Record(request_line, headers)
    try:
        response: _Response
        if fast_path is not None and record is None and fast_path.takes(operation.method):
            response = await fast_path.post(call.path, headers, call.limit, call.on_connection)
        else:
            response = await _request(http, call, url, headers)
    except AIOHTTP_ERRORS as error:
        failure = failed_request(error, call, authorization)
        if record is not None:
            record.log_failure(failure)
        return failure
    except BaseException as error:
        # The pool may be closed while the key is fetched, or a tracer waits.
        if http.closed and isinstance(error, RuntimeError | AssertionError):
            return session_closed(may_have_stopped=call.is_connected)
        # The frames of aiohttp and asyncio have the bytes of the request, and with them the key.
        detached(error)
        raise
    if answered is not None:
        answered(response.status)
    is_success = _OK <= response.status < _REDIRECTS
    max_body = operation.max_body if is_success else MIB
    problem: BaseException | None = None
    if isinstance(response, fast.Exchange):
        body, header, may_have_id = response.body, response.header, response.may_have_id
    else:
        body, header, may_have_id = None, response.headers.get, True
    if body is None:
        body, problem = await _read_body(response, max_body)
    # With the log on, every request takes the long way.
    if record is not None and not isinstance(response, fast.Exchange):
        record.log_answer(response, body, problem)
    if not is_success:
        # A truncated body does not matter if the status is an error.
        now = datetime.now(UTC)
        return parse_error(response.status, header, body, authorization, now=now)
    call.request_id = request_id_in(header, authorization) if may_have_id else None
    ended: _T | BctrlError
    try:
        if problem is not None or len(body) > max_body:
            ended = partial_response(response.status, problem, call.limit, operation)
        else:
            if call.alias is None and isinstance(response, aiohttp.ClientResponse):
                check_whole(response.status, response.headers.getall(hdrs.LINK, ()))
            found = operation.parse(body)
            # An `async def` gives this type; mypy cannot know that no `_T` is a coroutine.
            ended = await found if isinstance(found, CoroutineType) else found  # type: ignore[assignment]
    except DECODE_ERRORS as error:
        expected = "list of runtimes" if call.alias is None else "Runtime"
        ended = unreadable(response.status, "the body", expected, error)
    foreign = None
    if check_answers:
        foreign = check_answer(ended, body, call.workspace_id, call.alias, authorization)
    if foreign is not None:
        fast.close_connection(response)
        ended = foreign
    elif isinstance(ended, BctrlError):
        ended = unusable(ended, header(hdrs.CONTENT_TYPE) or "", body, authorization)
    if isinstance(ended, BctrlError):
        ended.request_id = call.request_id
    return ended


async def _request(
    http: aiohttp.ClientSession, call: Request[_T], url: URL, headers: CIMultiDict[str]
) -> aiohttp.ClientResponse:
    fast.on_connection.set(call.on_connection)
    return await http.request(
        call.operation.method,
        url.with_path(call.path, encoded=True),
        headers=headers,
        skip_auto_headers=fast.NO_CONTENT_TYPE,
        allow_redirects=False,
        raise_for_status=False,
        auto_decompress=True,
        timeout=call.limit,
    )


async def _read_body(response: _Response, max_body: int) -> tuple[bytes, BaseException | None]:
    """Read a body up to about `max_body` bytes; return it with the error that truncated it."""
    # A BytesIO, unlike a bytearray, becomes bytes without a copy.
    body = io.BytesIO()
    try:
        if response.content.is_eof():
            # The body arrived with the headers, as the body of a Runtime does.
            return response.content.read_nowait(), None
        async for chunk in response.content.iter_any():
            body.write(chunk)
            if body.tell() > max_body:
                break
            if body.tell() > _LONG_BODY:
                # A compressed body unpacks to many chunks at once, which would stall the loop.
                await asyncio.sleep(0)
    except (*AIOHTTP_ERRORS, RuntimeError) as error:
        # RuntimeError is raised if this side has just closed the connection.
        return body.getvalue(), detached(error)
    finally:
        # This closes the connection if the body is incomplete; else the pool has it back already.
        response.close()
    return body.getvalue(), None
