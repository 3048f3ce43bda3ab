"""The aiohttp connection pool: opened at first use, in one event loop, closed once."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from functools import partial

import aiohttp

from bctrl_async._http.fast import FastPath, loop_of
from bctrl_async._lifetime import close_with_loop
from bctrl_async.errors import BctrlConfigError

_forks = 0


def _count_fork() -> None:
    global _forks  # noqa: PLW0603 - the count belongs to the process.
    _forks += 1


# Counting forks is cheaper than `os.getpid`, a system call for each attempt.
if hasattr(os, "register_at_fork"):  # pragma: no branch - Windows has no fork.
    os.register_at_fork(after_in_child=_count_fork)


class Pool:
    """An owned `ClientSession` with its fast path, or a borrowed session."""

    def __init__(
        self,
        open_pool: Callable[[], tuple[aiohttp.ClientSession, FastPath | None]],
        borrowed: aiohttp.ClientSession | None,
    ) -> None:
        self._open_pool = open_pool
        self.is_borrowed: bool = borrowed is not None
        self._borrowed = borrowed
        self.fast_path: FastPath | None = None
        self._http: aiohttp.ClientSession | None = None
        self._lifetime: AsyncGenerator[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._forks_at_open = _forks

    @property
    def was_opened(self) -> bool:
        """True if the pool was ever opened."""
        return self._http is not None

    def get(self) -> aiohttp.ClientSession:
        """Return the `aiohttp.ClientSession`, opened on the running loop."""
        http = self._http
        if http is None:
            http = self._open()
        self.check_loop()
        if self.is_borrowed and http.closed:
            raise BctrlConfigError(
                "the aiohttp.ClientSession given as http= is closed",
                advice="Keep it open while the BctrlSession is in use",
            )
        return http

    def _open(self) -> aiohttp.ClientSession:
        self._forks_at_open = _forks
        if self._borrowed is not None:
            self._http = self._borrowed
            self._loop = loop_of(self._borrowed)
        else:
            self._http, self.fast_path = self._open_pool()
            self._loop = asyncio.get_running_loop()
            self._lifetime = close_with_loop(
                partial(_close, self._http, self.fast_path)
            )
        return self._http

    def check_loop(self) -> None:
        """Raise a BctrlConfigError if used from another event loop or after a fork."""
        if self._forks_at_open != _forks:
            raise BctrlConfigError(
                "the session was opened before a fork",
                advice="Make one session per process",
            )
        if not self.is_in_its_loop:
            problem = "the session belongs to another event loop"
            advice = "Make one session per event loop"
            if not self.has_open_loop:
                problem += ", which is closed"
                advice += (
                    ": one in each asyncio.run; in a test, use `with TestClient(app)`"
                )
            raise BctrlConfigError(problem, advice=advice)

    @property
    def is_in_its_loop(self) -> bool:
        """True if the running loop is the loop in which the pool was opened."""
        return self._loop is asyncio.get_running_loop()

    @property
    def has_open_loop(self) -> bool:
        """True if the pool was opened in this process, in a loop that is not closed."""
        return (
            self._loop is not None
            and not self._loop.is_closed()
            and self._forks_at_open == _forks
        )

    async def close(self) -> None:
        """Close an owned session, if its loop runs; leave a borrowed session open."""
        if self._lifetime is not None and self.has_open_loop:
            # The generator calls `_close` when it is advanced.
            await anext(self._lifetime, None)

    def __del__(self) -> None:
        # A loop closed without `shutdown_asyncgens` leaves the connections open.
        loop = self._loop
        http = self._http
        if self._lifetime and loop and http and loop.is_closed() and not http.closed:
            # There is nothing to wait for without a loop, so the coroutine ends at its
            # first step.
            with suppress(StopIteration):
                http.close().send(None)


async def _close(http: aiohttp.ClientSession, fast_path: FastPath | None) -> None:
    if fast_path is not None:
        fast_path.close()
    await http.close()
