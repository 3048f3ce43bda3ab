"""Send calls: the limiter admits their attempts until a call succeeds or gives up."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import TypeVar

import aiohttp
from msgspec.structs import replace
from multidict import CIMultiDict
from yarl import URL

from bctrl_async import _config
from bctrl_async._calls.call import Call, is_cancelled
from bctrl_async._calls.observing import notify
from bctrl_async._calls.retry import RetryQuota
from bctrl_async._http import transport
from bctrl_async._http.failures import is_untrusted
from bctrl_async._http.pool import Pool
from bctrl_async._http.redaction import detached
from bctrl_async._http.request import checked_headers
from bctrl_async._limiter.limiter import Limiter
from bctrl_async.errors import (
    THROTTLED,
    BctrlApiError,
    BctrlConfigError,
    BctrlError,
    BctrlNetworkError,
    BctrlTimeoutError,
    format_duration,
    is_unanswered,
    session_closed,
)
from bctrl_async.observer import Attempt, AttemptObserver
from bctrl_async.stats import SessionStats

_T = TypeVar("_T")

KeyProvider = Callable[[], str | Awaitable[str]]
"""A plain or async function that returns the API key."""


class Sender:
    """Sends the calls of a session.

    `headers` go with every request. The key provider is called for each attempt; it is None if the
    headers have the key.
    """

    def __init__(
        self,
        pool: Pool,
        limiter: Limiter,
        url: URL,
        headers: CIMultiDict[str],
        key_provider: KeyProvider | None,
        *,
        check_answers: bool = True,
    ) -> None:
        self._pool = pool
        self.limiter: Limiter = limiter
        self._url = url
        self.closed: bool = False
        # The highest number of an answered attempt; answers may come in any order.
        self.last_answered: int = 0
        self._headers = headers
        self._key_provider = key_provider
        self._send = partial(transport.send_once, check_answers=check_answers)
        self.quota: RetryQuota = RetryQuota()
        self.tally: SessionStats = SessionStats()

    @property
    def opened(self) -> bool:
        """True once the pool was opened."""
        return self._pool.opened

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
        """Fail waiting calls; close the pace, and the pool if the session owns it."""
        if self.closed:
            return
        has_loop = not self._pool.gone
        if has_loop:
            self._pool.check_loop()
            self.limiter.close()
        self.closed = True
        try:
            await self._pool.close()
        finally:
            if has_loop:
                await self.limiter.close_pace()

    def open_pool(self) -> aiohttp.ClientSession:
        """Return the pool, opened on the running loop."""
        if self.closed:
            raise session_closed()
        return self._pool.get()

    async def request(self, call: Call[_T]) -> _T:
        """Acquire a slot, then make the attempts of a call."""
        try:
            http = self.open_pool()
            if not self.limiter.acquire_nowait(call.retries.workspace):
                await self._acquire(call)
        except BctrlError as error:
            call.annotate(error)
            raise
        return await self.attempt_loop(call, http)

    async def attempt_loop(self, call: Call[_T], http: aiohttp.ClientSession) -> _T:
        """Make the attempts of a call that holds a slot."""
        ended: _T | BctrlError | None = None
        try:
            while True:
                ended, target_failed = None, False
                try:
                    key = None
                    if self._key_provider is not None:
                        key = await _fetch_key(self._key_provider, call.limit)
                    self.tally.retries += call.attempts > 0
                    call.attempts += 1
                    self.tally.attempts += 1
                    call.number = self.tally.attempts
                    call.in_flight, call.is_connected = True, self._pool.is_borrowed
                    ended = await self._attempt(call, http, key)
                except BctrlError as error:  # The key could not be fetched.
                    ended = error.with_traceback(None)
                except asyncio.CancelledError:
                    # Closing the pool cancels a DNS lookup, and aiohttp raises CancelledError in
                    # every task that waits for it.
                    if not http.closed or is_cancelled():
                        raise
                    ended = BctrlNetworkError(
                        "the DNS lookup was still in progress", may_have_stopped=call.is_connected
                    )
                finally:
                    self.tally.cancelled += ended is None and call.in_flight
                    target_failed = self.limiter.release(ended, call.retries)
                was_sent, call.in_flight = call.in_flight, False
                if not isinstance(ended, BctrlError):
                    self.last_answered = max(self.last_answered, call.number)
                    self.quota.release()
                    self.tally.succeeded += 1
                    return ended
                self._record_failure(call, ended, was_sent=was_sent)
                call.retries.record(ended, target_failed=target_failed)
                if self.closed and ended.status in THROTTLED:
                    # The call would wait next, so it fails like a waiting call; any doubt remains.
                    raise session_closed() from ended
                ends = self.closed or not call.may_be_repeated
                if ends or not await self._wait_to_retry(call, ended):
                    raise ended
                http = self.open_pool()
                await self._acquire(call)
        except BctrlError as error:
            call.annotate(error)
            raise
        finally:
            # A traceback refers to this frame; an error kept in it would be a reference cycle.
            ended = None

    async def _acquire(self, call: Call[_T]) -> None:
        retries = call.retries
        await self.limiter.acquire(retries.policy.max_throttle_wait, call.priority, retries)

    def _record_failure(self, call: Call[_T], error: BctrlError, *, was_sent: bool) -> None:
        if self.closed and isinstance(error, BctrlNetworkError) and error.status is None:
            error.summary = "the session was closed during the call"
            error.advice = "Close the session after its calls have ended"
        call.on_failure(error)
        if was_sent:
            has_status = isinstance(error, BctrlApiError) and error.status is not None
            self.tally.failed[str(error.status) if has_status else type(error).__name__] += 1
            if not is_unanswered(error):
                self.last_answered = max(self.last_answered, call.number)

    async def _wait_to_retry(self, call: Call[_T], failure: BctrlError) -> bool:
        if call.wait_to_retry is not None:
            return await call.wait_to_retry(call)
        # A single call cannot know that a retry may meet another certificate, so it gives up.
        return not is_untrusted(failure) and await call.back_off(self.limiter)

    def _attempt(
        self, call: Call[_T], http: aiohttp.ClientSession, key: _config.Secret | None
    ) -> Awaitable[_T | BctrlError]:
        # A failed attempt is returned, not raised: the frames of a traceback may hold parts of the
        # key that the server echoed.
        if call.observer is not None or call.headers or key is not None:
            return self._attempt_with_headers(call, http, key)
        return self._send(http, self._pool.fast_path, call, self._url, self._headers)

    async def _attempt_with_headers(
        self, call: Call[_T], http: aiohttp.ClientSession, key: _config.Secret | None
    ) -> _T | BctrlError:
        """Make an attempt with its own headers; observe it if the call has an observer."""
        headers = self._headers.copy()
        headers.update(call.headers)
        if key is not None:
            headers["Authorization"] = key
        send = partial(self._send, http, self._pool.fast_path, call, self._url, headers)
        if call.observer is None:
            return await send()
        begun = Attempt(
            number=call.attempts,
            operation=call.operation.name,
            stops=call.operation.stops,
            method=call.operation.method,
            url=self._url.with_path(call.path, encoded=True),
            template=call.operation.template,
        )
        attempt = notify(call.observer.begin_attempt, begun) or AttemptObserver()
        added: Mapping[str, str] = notify(lambda: checked_headers(attempt.headers())) or {}
        for name, value in added.items():
            headers.setdefault(name, value)
        try:
            ended = await send(answered=lambda status: notify(attempt.answered, status))
        except BaseException as error:
            notify(attempt.end, error)
            raise
        if isinstance(ended, BctrlError):
            call.on_failure(ended)
        notify(attempt.end, ended if isinstance(ended, BctrlError) else None)
        return ended


async def _fetch_key(provider: KeyProvider, limit: aiohttp.ClientTimeout) -> _config.Secret:
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
            # The traceback's frames refer to the call, which keeps the error: a reference cycle.
            raise BctrlTimeoutError(
                f"the api_key function returned no key within {format_duration(limit.total)}",
                argument="api_key",
            ) from detached(error)
        # The function's error may hold secrets, so only the cause shows its text.
        raise BctrlConfigError(
            f"the api_key function raised {type(error).__name__}", advice="See the error's cause"
        ) from error
    return _config.authorization(key)
