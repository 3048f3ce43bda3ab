"""The life of the one aiohttp connection pool: opened late, bound to its loop, closed once."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress

import aiohttp

from bctrl_async.errors import BctrlConfigError, session_closed

_forks = 0


def _count_fork() -> None:
    global _forks  # noqa: PLW0603 - a process has one count of its forks.
    _forks += 1


# Asking for the process id instead would be a system call for each attempt.
if hasattr(os, "register_at_fork"):  # pragma: no branch - Windows has no fork.
    os.register_at_fork(after_in_child=_count_fork)


class Pool:
    """An `aiohttp.ClientSession` that is owned, or borrowed and then never closed.

    Args:
        make: Makes the pool's own session; it is called once, where a loop runs.
        borrowed: Somebody else's session, used instead.
    """

    def __init__(
        self, make: Callable[[], aiohttp.ClientSession], borrowed: aiohttp.ClientSession | None
    ) -> None:
        self._make = make
        self._borrowed = borrowed
        self._http: aiohttp.ClientSession | None = None
        self._lifetime: AsyncGenerator[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._forks = _forks

    @property
    def opened(self) -> bool:
        """Whether it was ever opened."""
        return self._http is not None

    def get(self) -> aiohttp.ClientSession:
        """Return the session to send through, opened on the running loop.

        Raises:
            BctrlConfigError: It belongs to another loop or process, or the borrowed one is closed.
        """
        http = self._http or self._open()
        self.check_loop()
        if http.closed:
            given = BctrlConfigError(
                "the aiohttp.ClientSession given as http= is closed",
                advice="Keep it open for as long as the BctrlSession is used",
            )
            raise given if self._borrowed is not None else session_closed()
        return http

    def _open(self) -> aiohttp.ClientSession:
        self._forks = _forks
        if self._borrowed is not None:
            self._http = self._borrowed
            # aiohttp deprecates the public `.loop` and offers nothing else that tells.
            self._loop = self._borrowed._loop  # noqa: SLF001
        else:
            self._http = self._make()
            self._loop = asyncio.get_running_loop()
            self._lifetime = _close_with_its_loop(self._http)
            # One step, without waiting, makes the loop know the generator.
            with suppress(StopIteration):
                self._lifetime.asend(None).send(None)
        return self._http

    def check_loop(self) -> None:
        """Refuse a loop or a process other than those that it was opened in.

        Raises:
            BctrlConfigError: This is another one.
        """
        if self._forks != _forks:
            raise BctrlConfigError(
                "the session was opened before a fork", advice="Make a session in each process"
            )
        if self._loop is not asyncio.get_running_loop():
            ended = ", which has ended" if self._loop and self._loop.is_closed() else ""
            raise BctrlConfigError(
                f"the session belongs to another event loop{ended}",
                advice="Make a session in each loop, and use it only there",
            )

    @property
    def gone(self) -> bool:
        """Whether there is nothing to close: not opened, or its loop or process has ended."""
        return self._loop is None or self._loop.is_closed() or self._forks != _forks

    async def close(self) -> None:
        """Close the pool's own session where its loop runs; the borrowed one is left alone."""
        if self._lifetime is not None and not self.gone:
            await anext(self._lifetime, None)

    def __del__(self) -> None:
        # A loop that was closed without `shutdown_asyncgens` left the connections open. With its
        # loop gone there is nothing to wait for, so the coroutine ends at its first step.
        loop, http = self._loop, self._http
        if self._lifetime and loop and loop.is_closed() and http and not http.closed:
            with suppress(StopIteration):
                http.close().send(None)


async def _close_with_its_loop(http: aiohttp.ClientSession) -> AsyncGenerator[None]:
    # `asyncio.run` and its kin close every asynchronous generator before they close the loop, and
    # a loop closes a generator that nobody refers to any more: so the pool is closed in time,
    # even if nobody calls `close`.
    try:
        yield
    finally:
        await http.close()
