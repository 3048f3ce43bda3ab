"""Send calls: the limiter admits their attempts until a call succeeds or gives up."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import TypeVar

import aiohttp
from aiohttp import hdrs
from msgspec.structs import replace
from multidict import CIMultiDict
from yarl import URL

from bctrl_async import _config
from bctrl_async._calls.call import Call
from bctrl_async._calls.observing import notify, observe_attempt
from bctrl_async._calls.retry import RetryQuota
from bctrl_async._http.pool import Pool
from bctrl_async._http.redaction import detached
from bctrl_async._http.transport import Transport
from bctrl_async._kinds import Failure, Kind
from bctrl_async._lifetime import is_cancelled
from bctrl_async._limiter.limiter import Limiter
from bctrl_async.errors import (
    BctrlConfigError,
    BctrlError,
    format_duration,
    session_closed,
)
from bctrl_async.observer import CallObserver, StopObserver
from bctrl_async.stats import SessionStats

_T = TypeVar("_T")

KeyProvider = Callable[[], str | Awaitable[str]]
"""A plain or async function that returns the API key."""
WaitToRetry = Callable[[Call[_T], Failure], Awaitable[bool]]
"""An async function that waits after a failed attempt, and returns False to give up."""
_Observer = CallObserver | StopObserver | None


class Sender:
    """Sends the calls of a session.

    `headers` go with every request. The key provider is called for each attempt; it is
    None if the headers have the key. `key_origin` says where the key comes from.
    """

    def __init__(
        self,
        pool: Pool,
        limiter: Limiter,
        url: URL,
        headers: CIMultiDict[str],
        key_provider: KeyProvider | None,
        *,
        key_origin: str,
        check_answers: bool = True,
    ) -> None:
        self._pool = pool
        self.limiter: Limiter = limiter
        self._url = url
        self.is_closed: bool = False
        # The highest number of an answered attempt; answers may come in any order.
        self.last_answered: int = 0
        self._headers = headers
        self._key_provider = key_provider
        self._key_origin = key_origin
        self._transport = Transport(pool, url, check_answers=check_answers)
        self.quota: RetryQuota = RetryQuota()
        self.tally: SessionStats = SessionStats()

    @property
    def was_opened(self) -> bool:
        """True once the pool was opened."""
        return self._pool.was_opened

    @property
    def is_in_its_loop(self) -> bool:
        """True if the running loop is the loop in which the pool was opened."""
        return self._pool.is_in_its_loop

    @property
    def stats(self) -> SessionStats:
        """The statistics so far."""
        return replace(
            self.tally,
            failed=dict(self.tally.failed),
            in_flight=self.limiter.in_use,
            waiting=self.limiter.waiting,
        )

    async def close(self) -> None:
        """Fail waiting calls; close the pace, and the pool unless it was borrowed."""
        if self.is_closed:
            return
        # Nothing waits any more if the loop was closed.
        has_loop = self._pool.has_open_loop
        if has_loop:
            self._pool.check_loop()
            self.limiter.close()
        self.is_closed = True
        try:
            await self._pool.close()
        finally:
            if has_loop:
                await self.limiter.close_pace()

    def open_pool(self) -> aiohttp.ClientSession:
        """Return the pool, opened on the running loop."""
        if self.is_closed:
            raise session_closed()
        return self._pool.get()

    async def call(self, call: Call[_T], observer: _Observer = None) -> _T:
        """Make a call, and raise the exception of its failure."""
        result = await self.request(call, observer=observer)
        if type(result) is not Failure:
            return result
        try:
            raise call.error(result)
        finally:
            # The frames of a key function that raised refer to this frame: a cycle.
            del result

    async def request(
        self,
        call: Call[_T],
        http: aiohttp.ClientSession | None = None,
        observer: _Observer = None,
        wait_to_retry: WaitToRetry[_T] | None = None,
    ) -> _T | Failure:
        """Make the attempts of a call; return its answer or its last failure.

        `http` is the open pool of a call that has its slot already. `wait_to_retry`
        takes the place of the wait that the call's policy asks for.
        """
        try:
            if http is None:
                http = self.open_pool()
                if not self.limiter.acquire_nowait(call.retries.workspace):
                    await self._acquire(call)
            while True:
                try:
                    result = await self._attempt(call, http, observer)
                except BaseException:
                    self._count_if_cancelled(call)
                    self.limiter.release(None, call.retries)
                    raise
                # `isinstance` takes four times as long for a Struct.
                if type(result) is not Failure:
                    self.limiter.release(result, call.retries)
                    self._record_success(call)
                    return result
                if not self._gives_way(call, result):
                    failure = self._record_failure(call, result)
                    if not await self._waits(call, failure, wait_to_retry):
                        return failure
                http = self.open_pool()
                await self._acquire(call)
        except BctrlError as error:
            # The pool, the limiter or a key function raised it. A key function's error
            # stays the cause. Its frames refer to the call, but the call does not keep
            # this failure: there is no reference cycle.
            return Failure.of(error)

    async def _acquire(self, call: Call[_T]) -> None:
        retries = call.retries
        await self.limiter.acquire(
            retries.policy.max_throttle_wait, call.priority, retries
        )

    def _count_if_cancelled(self, call: Call[_T]) -> None:
        # If a key function has raised, no attempt has started.
        if call.in_flight:
            self.tally.cancelled += 1

    def _record_success(self, call: Call[_T]) -> None:
        call.end_attempt()
        if call.attempt_number > self.last_answered:  # noqa: PLR1730 - `max` is slower.
            self.last_answered = call.attempt_number
        self.quota.release()
        self.tally.succeeded += 1

    def _gives_way(self, call: Call[_T], failure: Failure) -> bool:
        """Return True if other attempts have all connections that the machine holds.

        The call then waits for a slot, as if it had made no attempt.
        """
        # A borrowed pool may lack something after it has sent a request.
        if failure.may_have_worked or not failure.kind.is_local:
            return False
        if not self.limiter.give_way(failure, call.retries):
            return False
        self.tally.failed[failure.type] += 1
        call.forget_attempt()
        return True

    def _record_failure(self, call: Call[_T], failure: Failure) -> Failure:
        # The limiter learns from the answer, and knows from other calls if a gateway's
        # 503 is about this target alone.
        target_failed = self.limiter.release(failure, call.retries)
        kind = failure.kind
        if self.is_closed and kind.is_unanswered and failure.status is None:
            failure = replace(
                failure,
                summary="the session was closed during the call",
                advice="Close the session after its calls have ended",
            )
        if kind is Kind.NO_ACCESS:
            advice = f"Check the API key from {self._key_origin}"
            failure = replace(failure, advice=advice)
        # No attempt has started if there was no key.
        if call.in_flight:
            call.end_attempt()
            self.tally.failed[failure.type] += 1
            if not (kind.is_unanswered or kind.is_local):
                self.last_answered = max(self.last_answered, call.attempt_number)
        call.keep_request_id(failure.request_id)
        call.retries.record(failure, target_failed=target_failed)
        return failure

    async def _waits(
        self,
        call: Call[_T],
        failure: Failure,
        wait_to_retry: WaitToRetry[_T] | None,
    ) -> bool:
        """Wait before the next attempt; return False to give up."""
        if self.is_closed:
            return False
        if wait_to_retry is not None:
            return await wait_to_retry(call, failure)
        # A single call cannot tell whether other machines have another certificate, so
        # it gives up.
        return failure.kind is not Kind.UNTRUSTED and await call.back_off(self.limiter)

    def _attempt(
        self, call: Call[_T], http: aiohttp.ClientSession, observer: _Observer
    ) -> Awaitable[_T | Failure]:
        if observer is not None or call.headers or self._key_provider is not None:
            return self._attempt_with_headers(call, http, observer)
        self._start_attempt(call)
        return self._transport.send_once(http, call, self._headers)

    def _start_attempt(self, call: Call[_T]) -> None:
        tally = self.tally
        tally.attempts += 1
        if call.attempts:
            tally.retries += 1
        call.start_attempt(tally.attempts)
        if self._pool.is_borrowed:
            # A borrowed connector does not tell when it connects, so from its start
            # every request may have been sent.
            call.on_connection()

    async def _attempt_with_headers(
        self, call: Call[_T], http: aiohttp.ClientSession, observer: _Observer
    ) -> _T | Failure:
        """Make an attempt with its own headers; observe it if there is an observer."""
        headers = self._headers.copy()
        headers.update(call.headers)
        if self._key_provider is not None:
            key = await _fetch_key(self._key_provider, call.limit)
            if isinstance(key, Failure):
                return key
            headers[hdrs.AUTHORIZATION] = key
        self._start_attempt(call)
        if observer is None:
            return await self._transport.send_once(http, call, headers)
        attempt_observer = observe_attempt(observer, call, self._url, headers)
        try:
            result = await self._transport.send_once(
                http,
                call,
                headers,
                lambda status: notify(attempt_observer.answered, status),
            )
        except BaseException as error:
            notify(attempt_observer.end, error)
            raise
        attempt_error: BctrlError | None = None
        if isinstance(result, Failure):
            attempt_error = call.attempt_error(result)
        notify(attempt_observer.end, attempt_error)
        return result


async def _fetch_key(
    provider: KeyProvider, limit: aiohttp.ClientTimeout
) -> _config.Secret | Failure:
    try:
        async with asyncio.timeout(limit.total) as timeout:
            key: object = provider()
            if inspect.isawaitable(key):
                key = await key
            key = _config.hidden(key)
    except (Exception, asyncio.CancelledError) as error:
        if isinstance(error, asyncio.CancelledError) and is_cancelled():
            raise
        if timeout.expired():
            seconds = format_duration(limit.total)
            return Failure(
                kind=Kind.NO_KEY,
                summary=f"the api_key function returned no key within {seconds}",
                argument="api_key",
                # The traceback's frames refer to the call, which keeps the failure: a
                # reference cycle.
                cause=detached(error),
            )
        # The function's error may hold secrets, so only the cause shows its text.
        raise BctrlConfigError(
            f"the api_key function raised {type(error).__name__}",
            advice="See the error's cause",
        ) from error
    return _config.authorization(key)
