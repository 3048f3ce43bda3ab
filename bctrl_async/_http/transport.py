"""Make one attempt over aiohttp, and parse its response. Its errors are returned, not raised."""

from __future__ import annotations

import asyncio
import io
import math
from collections.abc import Callable, Generator, Mapping
from datetime import UTC, datetime
from typing import Protocol, TypeVar

import aiohttp
from aiohttp import hdrs
from aiohttp.http_exceptions import HttpProcessingError
from multidict import CIMultiDict
from yarl import URL

from bctrl_async import _config
from bctrl_async._http.failures import AIOHTTP_ERRORS, failed_request, partial_response
from bctrl_async._http.fast import (
    NO_CONTENT_TYPE,
    Exchange,
    FastPath,
    close_connection,
    on_connection,
)
from bctrl_async._http.lists import Slices
from bctrl_async._http.redaction import detached
from bctrl_async._http.request import MAX_BODY, Operation
from bctrl_async._http.response import (
    MIB,
    check_answer,
    names_in,
    parse_error,
    request_id_in,
    unusable,
)
from bctrl_async.errors import BctrlError, session_closed

_T = TypeVar("_T")

# Connecting times out after this share of an attempt's time, so that a request that was never sent
# is not reported as one without a response.
_CONNECT_SHARE = 0.9

_OK, _REDIRECTS = 200, 300

_LONG_BODY = MIB // 4
"""The bytes of a body from which the event loop runs between its chunks."""


class Sending(Protocol[_T]):
    """The part of a call that an attempt needs, and where it records what it knows."""

    @property
    def operation(self) -> Operation[_T]: ...
    @property
    def workspace_id(self) -> str: ...
    @property
    def alias(self) -> str | None: ...
    @property
    def path(self) -> str: ...
    @property
    def limit(self) -> aiohttp.ClientTimeout: ...

    request_id: str | None

    def on_connection(self) -> None:
        """Record that the request has its connection: from then on it may have been sent."""


class _Response(Protocol):
    """The part of an `aiohttp.ClientResponse` that an attempt needs."""

    @property
    def status(self) -> int: ...
    @property
    def headers(self) -> Mapping[str, str]: ...
    @property
    def content(self) -> aiohttp.StreamReader: ...

    def close(self) -> None: ...


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
    fast_path: FastPath | None,
    call: Sending[_T],
    url: URL,
    headers: CIMultiDict[str],
    *,
    check_answers: bool,
    answered: Callable[[int], object] | None = None,
) -> _T | BctrlError:
    """Send a request without a body, and return the parsed response, or an error in its place.

    Args:
        http: The pool.
        fast_path: The fast path to its connections, if that is open.
        call: The call that it is an attempt of.
        url: The base URL.
        headers: All headers, including `Authorization`.
        check_answers: Reject an answer about another runtime than the call's.
        answered: Called with the status of the response, before its body is read.
    """
    operation, path, limit = call.operation, call.path, call.limit
    if http.closed:
        # While the key was fetched.
        return session_closed()
    try:
        response: _Response | BctrlError
        body: bytes | None = None
        if fast_path is not None and fast_path.takes(operation.method, headers):
            response = exchange = await fast_path.post(path, headers, limit, call.on_connection)
            body = exchange.body
        else:
            on_connection.set(call.on_connection)
            response = await _request(
                http, operation.method, url.with_path(path, encoded=True), headers, limit
            )
    except AIOHTTP_ERRORS as error:
        return failed_request(error, limit, headers["Authorization"])
    if isinstance(response, BctrlError):
        return response
    if answered is not None:
        answered(response.status)
    status = response.status
    is_success = _OK <= status < _REDIRECTS
    max_body = operation.max_body if is_success else MAX_BODY
    problem: Exception | None = None
    if body is None:
        body, problem = await _read_body(response, max_body)
    authorization = headers[hdrs.AUTHORIZATION]
    if not is_success:
        # For an error status, a truncated body does not matter.
        return parse_error(status, response.headers, body, authorization, now=datetime.now(UTC))
    if problem is not None or len(body) > max_body:
        parsed: _T | BctrlError = partial_response(
            status, problem, limit, max_body, reads=operation.reads
        )
    else:
        found = operation.parse(status, body, authorization)
        parsed = await _in_slices(found) if isinstance(found, Generator) else found
    return _check(call, response, parsed, body, authorization, check_answers=check_answers)


async def _request(
    http: aiohttp.ClientSession,
    method: str,
    url: URL,
    headers: CIMultiDict[str],
    limit: aiohttp.ClientTimeout,
) -> aiohttp.ClientResponse | BctrlError:
    skip = None if hdrs.CONTENT_TYPE in http.skip_auto_headers else NO_CONTENT_TYPE
    try:
        return await http.request(
            method,
            url,
            headers=headers,
            skip_auto_headers=skip,
            allow_redirects=False,
            raise_for_status=False,
            auto_decompress=True,
            timeout=limit,
        )
    except (RuntimeError, AssertionError):
        # A tracer may wait before the request, and the pool be closed meanwhile.
        if http.closed:
            return session_closed()
        raise


def _check(
    call: Sending[_T],
    response: _Response,
    parsed: _T | BctrlError,
    body: bytes,
    authorization: str,
    *,
    check_answers: bool,
) -> _T | BctrlError:
    """Return the parsed body of a 2xx response, or an error if it settles nothing."""
    header = response.header if isinstance(response, Exchange) else response.headers.get
    call.request_id = request_id_in(header, authorization)
    settled: _T | BctrlError = parsed
    names: object = parsed
    if isinstance(parsed, BctrlError):
        parsed.request_id = call.request_id
        content_type = response.headers.get(hdrs.CONTENT_TYPE, "")
        settled = unusable(parsed, content_type, body, authorization)
        names = names_in(body)
    if check_answers:
        foreign = check_answer(names, call.workspace_id, call.alias, authorization, call.request_id)
        if foreign is not None:
            close_connection(response)
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


async def _read_body(response: _Response, max_body: int) -> tuple[bytes, Exception | None]:
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
            if body.tell() > _LONG_BODY:
                # A compressed body unpacks to many chunks that need not be waited for.
                await asyncio.sleep(0)
    except (*AIOHTTP_ERRORS, HttpProcessingError, RuntimeError) as error:
        # aiohttp's parser in Python raises HttpProcessingError. RuntimeError is raised if this side
        # has just closed the connection.
        return body.getvalue(), detached(error)
    finally:
        # After a complete body the connection is back in the pool already, and stays open.
        response.close()
    return body.getvalue(), None
