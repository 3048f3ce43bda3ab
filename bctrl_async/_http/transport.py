"""Make one attempt over aiohttp, and return its parsed response or its failure."""

from __future__ import annotations

import asyncio
import io
import math
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from types import CoroutineType
from typing import TypeVar

import aiohttp
from aiohttp import hdrs
from msgspec.structs import replace
from multidict import CIMultiDict
from yarl import URL

from bctrl_async import _config
from bctrl_async._http import fast, wire
from bctrl_async._http.failures import AIOHTTP_ERRORS, failed_request, partial_response
from bctrl_async._http.lists import check_whole
from bctrl_async._http.pool import Pool
from bctrl_async._http.redaction import detached
from bctrl_async._http.request import Operation, Request
from bctrl_async._http.response import (
    DECODE_ERRORS,
    MIB,
    Answer,
    check_answer,
    is_success,
    parse_error,
    request_id_in,
    unreadable,
    with_body,
)
from bctrl_async._kinds import Failure

_T = TypeVar("_T")

_Response = aiohttp.ClientResponse | fast.Exchange
_Answer = Answer | fast.PlainAnswer

# Connecting times out after this fraction of an attempt's time limit, so that the error
# can say that nothing was sent.
_CONNECT_SHARE = 0.9

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
    """Return these limits, or the limits for this many seconds if they are lower."""
    if limit.total is not None and limit.total <= seconds:
        return limit
    return time_limit(seconds)


class Transport:
    """A way to send requests over a pool, each once, and to parse their responses."""

    def __init__(self, pool: Pool, url: URL, *, check_answers: bool) -> None:
        self._pool = pool
        self._url = url
        self._check_answers = check_answers

    async def send_once(
        self,
        http: aiohttp.ClientSession,
        call: Request[_T],
        headers: CIMultiDict[str],
        on_status: Callable[[int], object] | None = None,
    ) -> _T | Failure:
        """Send a request with just these headers; return the value or a failure."""
        authorization = headers[hdrs.AUTHORIZATION]
        record = wire.record(call, self._url, headers)
        try:
            response = await self._send(http, call, headers, record)
        except BaseException as error:
            failure = failed_request(error, call, authorization, is_closed=http.closed)
            if failure is None:
                raise
            if record is not None:
                record.log_failure(failure)
            return failure
        if on_status is not None:
            on_status(response.status)
        answer = response.answer if isinstance(response, fast.Exchange) else None
        if answer is None:
            answer = await _read(response, call.operation, record)
        if not answer.is_success:
            # A truncated body does not matter if the status is an error.
            now = datetime.now(UTC)
            return parse_error(
                answer.status, answer.header, answer.body, authorization, now=now
            )
        try:
            result = _parse(call, answer, authorization)
            # A list is parsed in slices, by a coroutine.
            if isinstance(result, CoroutineType):
                result = await result
        except DECODE_ERRORS as error:
            result = unreadable(answer.status, "the body", call.operation.schema, error)
        return self._check(call, response, answer, result, authorization)

    def _send(
        self,
        http: aiohttp.ClientSession,
        call: Request[_T],
        headers: CIMultiDict[str],
        record: wire.Record | None,
    ) -> Awaitable[_Response]:
        """Send a request, on the fast path if possible; await its response's head."""
        fast_path = self._pool.fast_path
        # With the log on, every request takes the long way.
        if (
            record is None
            and fast_path is not None
            and fast_path.takes(call.operation.method)
        ):
            return fast_path.post(call.path, headers, call.limit, call.on_connection)
        # The connector of an owned pool calls this once it has a connection.
        fast.on_connection.set(call.on_connection)
        return http.request(
            call.operation.method,
            self._url.with_path(call.path, encoded=True),
            headers=headers,
            skip_auto_headers=fast.NO_CONTENT_TYPE,
            allow_redirects=False,
            raise_for_status=False,
            auto_decompress=True,
            timeout=call.limit,
        )

    def _check(
        self,
        call: Request[_T],
        response: _Response,
        answer: _Answer,
        result: _T | Failure,
        authorization: str,
    ) -> _T | Failure:
        """Return the result of a 2xx, or a failure if it answers another request."""
        if self._check_answers:
            failure = check_answer(
                result, answer.body, call.workspace_id, call.alias, authorization
            )
            if failure is not None:
                fast.close_connection(response)
                return replace(failure, request_id=call.request_id)
        if type(result) is not Failure:
            return result
        content_type = answer.header(hdrs.CONTENT_TYPE) or ""
        failure = with_body(result, content_type, answer.body, authorization)
        return replace(failure, request_id=call.request_id)


def _parse(
    call: Request[_T], answer: _Answer, authorization: str
) -> _T | Failure | CoroutineType[object, object, _T | Failure]:
    """Keep the request id of a 2xx, for `_check`, and return its value or its failure.

    It raises one of `DECODE_ERRORS` if the body cannot be parsed.
    """
    operation = call.operation
    call.request_id = None
    if answer.may_have_id:
        call.request_id = request_id_in(answer.header, authorization)
    if answer.problem is not None or len(answer.body) > operation.max_body:
        return partial_response(answer.status, answer.problem, call.limit, operation)
    # A request without an alias is for a list.
    if call.alias is None:
        check_whole(answer.status, answer.links)
    # An `async def` gives a coroutine, and mypy cannot know that no `_T` is one.
    return operation.parse(answer.body)  # type: ignore[return-value]


async def _read(
    response: _Response, operation: Operation[_T], record: wire.Record | None
) -> Answer:
    """Read a response, and close its connection unless the body is complete."""
    max_body = MIB
    if is_success(response.status):
        max_body = operation.max_body
    body, problem = await _read_body(response, max_body)
    if isinstance(response, fast.Exchange):
        return Answer(response.status, response.header, body, problem)
    if record is not None:
        record.log_answer(response, body, problem)
    links = response.headers.getall(hdrs.LINK, ())
    return Answer(response.status, response.headers.get, body, problem, links)


async def _read_body(
    response: _Response, max_body: int
) -> tuple[bytes, BaseException | None]:
    """Read a body up to about `max_body` bytes; return it with what truncated it."""
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
                # A compressed body unpacks to many chunks at once, which would stall
                # the loop.
                await asyncio.sleep(0)
    except (*AIOHTTP_ERRORS, RuntimeError) as error:
        # RuntimeError is raised if this side has just closed the connection.
        return body.getvalue(), detached(error)
    finally:
        # This closes the connection if the body is incomplete; else the pool has it
        # back already.
        response.close()
    return body.getvalue(), None
