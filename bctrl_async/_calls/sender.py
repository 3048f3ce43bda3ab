"""How a call is sent: through the limiter, attempt by attempt, until one of them settles it."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from bctrl_async import _config
from bctrl_async._calls.call import Call
from bctrl_async._calls.cancellation import is_cancelled
from bctrl_async._calls.observing import extra_headers, notify
from bctrl_async._calls.retry import RetryQuota, RetryState
from bctrl_async._http import transport
from bctrl_async._http.pool import Pool
from bctrl_async._limiter.limiter import Limiter
from bctrl_async.errors import (
    BctrlConfigError,
    BctrlError,
    BctrlNetworkError,
    BctrlTimeoutError,
    session_closed,
)
from bctrl_async.observer import AttemptObserver
from bctrl_async.stats import SessionStats, Tally

_T = TypeVar("_T")

KeyProvider = Callable[[], str | Awaitable[str]]
"""A function, plain or async, that gives the key."""


class Sender:
    """Sends the calls of a session.

    Args:
        pool: What they are sent through.
        limiter: What every attempt passes.
        url: Where the API is.
        headers: Those of every request.
        key_provider: Asked for the key of each attempt; None if it is in the headers.

    Attributes:
        closed: Whether the session was closed.
    """

    def __init__(
        self,
        pool: Pool,
        limiter: Limiter,
        url: URL,
        headers: CIMultiDict[str],
        key_provider: KeyProvider | None,
    ) -> None:
        self._pool = pool
        self._limiter = limiter
        self._url = url
        self.closed: bool = False
        self._headers = headers
        self._ask_key = key_provider
        self._quota = RetryQuota()
        self._tally = Tally()

    @property
    def opened(self) -> bool:
        """Whether the pool was ever opened."""
        return self._pool.opened

    @property
    def stats(self) -> SessionStats:
        """What was sent so far."""
        return self._tally.stats(self._limiter.in_use, self._limiter.tasks_waiting)

    async def close(self) -> None:
        """End what waits, and close the pool if it is the session's own.

        Raises:
            BctrlConfigError: The pool belongs to another loop, which still runs.
        """
        if self.closed:
            return
        if not self._pool.gone:
            self._pool.check_loop()
            self._limiter.close()
        self.closed = True
        await self._pool.close()

    def open_pool(self) -> aiohttp.ClientSession:
        """Return what to send through, opened on the running loop.

        Raises:
            BctrlConfigError: It cannot be used here, or no more.
        """
        if self.closed:
            raise session_closed()
        return self._pool.get()

    async def request(self, call: Call[_T]) -> _T:
        """Wait for a call's turn and make its attempts, for the first time or once more.

        Raises:
            BctrlError: What ended them.
        """
        try:
            http = self.open_pool()
            if not self._limiter.acquire_nowait():
                await self._limiter.acquire(call.policy.max_throttle_wait, call.priority)
        except BctrlError as error:
            call.annotate(error)
            raise
        return await self.attempt_loop(call, http)

    async def attempt_loop(self, call: Call[_T], http: aiohttp.ClientSession) -> _T:
        """Make the attempts of a call whose turn has come.

        Raises:
            BctrlError: What ended them.
        """
        ended: _T | BctrlError | None = None
        try:
            while True:
                ended = None
                call.answers_before = self._limiter.answers
                try:
                    key = (
                        None
                        if self._ask_key is None
                        else await _fetch_key(self._ask_key, call.limit)
                    )
                    self._tally.retries += call.attempts > 0
                    call.attempts += 1
                    self._tally.attempts += 1
                    call.in_flight = True
                    ended = await self._attempt(call, http, key)
                except BctrlError as error:  # There is no key.
                    ended = error
                except asyncio.CancelledError:
                    # Closing the pool cancels a look-up of the host's address, and aiohttp passes
                    # that on to those who wait for it, whom nobody has cancelled.
                    if not http.closed or is_cancelled():
                        raise
                    ended = BctrlNetworkError("the host's address was still being looked up")
                finally:
                    self._limiter.release(ended)
                was_sent, call.in_flight = call.in_flight, False
                if not isinstance(ended, BctrlError):
                    self._quota.release()
                    self._tally.succeeded += 1
                    return ended
                ended = self._as_session_closed(ended)
                if was_sent:
                    self._tally.record(ended)
                self._record_failure(call, ended)
                if self.closed or not await self._wait_to_retry(call):
                    raise ended
                http = self.open_pool()
                await self._limiter.acquire(call.policy.max_throttle_wait, call.priority)
        except BctrlError as error:
            call.annotate(error)
            raise
        finally:
            # A traceback refers to this frame: an error kept in it would be a reference cycle.
            ended = None

    def _record_failure(self, call: Call[_T], error: BctrlError) -> None:
        if call.retries is None:
            call.retries = RetryState(call.policy, self._quota, reads=not call.operation.stops)
        call.retries.record(error)

    def _wait_to_retry(self, call: Call[_T]) -> Awaitable[bool]:
        if call.wait_to_retry is not None:
            return call.wait_to_retry(call)
        return call.back_off(self._limiter)

    def _attempt(
        self, call: Call[_T], http: aiohttp.ClientSession, key: _config.Secret | None
    ) -> Awaitable[_T | BctrlError]:
        # A failed attempt is returned, not raised: a traceback would show the variables of the
        # frames below, which may hold what the server sent back of the key.
        url = self._url.with_path(call.path, encoded=True)
        if call.observer is not None or call.headers or key is not None:
            return self._observed_attempt(call, http, url, key)
        return transport.send_once(
            http, call.operation, url, headers=self._headers, limit=call.limit
        )

    async def _observed_attempt(
        self, call: Call[_T], http: aiohttp.ClientSession, url: URL, key: _config.Secret | None
    ) -> _T | BctrlError:
        """Make an attempt with headers of its own, and tell whoever watches it."""
        headers = self._headers.copy()
        headers.update(call.headers)
        if key is not None:
            headers["Authorization"] = key
        send = partial(transport.send_once, http, call.operation, url, headers=headers)
        if call.observer is None:
            return await send(limit=call.limit)
        method = call.operation.method
        attempt = (
            notify(call.observer.begin_attempt, call.attempts, method, url) or AttemptObserver()
        )
        for name, value in extra_headers(attempt).items():
            headers.setdefault(name, value)
        try:
            ended = await send(
                limit=call.limit, answered=lambda status: notify(attempt.answered, status)
            )
        except BaseException as error:
            notify(attempt.end, error)
            raise
        notify(attempt.end, ended if isinstance(ended, BctrlError) else None)
        return ended

    def _as_session_closed(self, ended: BctrlError) -> BctrlError:
        """Name the reason, where it is that the session was closed under an attempt."""
        broke_off = isinstance(ended, BctrlNetworkError) and ended.status is None
        if not (self.closed and broke_off):
            return ended
        closed = BctrlNetworkError(
            "the session was closed while the call was under way",
            advice="Close the session after its calls have ended",
            may_have_stopped=ended.may_have_stopped,
        )
        closed.__cause__ = ended
        return closed


async def _fetch_key(ask: KeyProvider, limit: aiohttp.ClientTimeout) -> _config.Secret:
    try:
        async with asyncio.timeout(limit.total) as timeout:
            key = ask()
            if inspect.isawaitable(key):
                key = await key
            key = _config.Secret(key) if isinstance(key, str) else key
    except (Exception, asyncio.CancelledError) as error:
        if isinstance(error, asyncio.CancelledError) and is_cancelled():
            raise
        if timeout.expired():
            raise BctrlTimeoutError(
                f"the api_key function gave no key within {limit.total:g} s"
            ) from error
        # Its text is left to the cause: it may hold what the function was working with.
        raise BctrlConfigError(
            f"the api_key function raised {type(error).__name__}", advice="See the error's cause"
        ) from error
    return _config.authorization(key)
