"""An event loop with virtual time: its clock jumps to the next timer."""

from __future__ import annotations

import asyncio
import functools
import inspect
import selectors
from collections.abc import Callable, Coroutine
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


class _Selector(selectors.DefaultSelector):
    """A selector that advances virtual time instead of blocking."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        # Without sockets only that of the loop itself is left, by which threads wake it up.
        ready = super().select(0) if timeout is None or len(self.get_map()) > 1 else []
        if not ready:
            if timeout is None:
                raise RuntimeError("deadlock: every task waits, and no timer is set")
            self.now += max(timeout, 0.0)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """A selector event loop on a virtual clock."""

    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self._clock.now


def run(main: Coroutine[None, None, _T]) -> _T:
    """Run a coroutine in virtual time and return its result."""
    results: list[_T] = []

    async def keep() -> None:
        results.append(await main)

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        # It formats its task, with the result, twice: a report may have ten thousand failures.
        runner.run(keep())
    return results[0]


def now() -> float:
    """Return the time of the running loop."""
    return asyncio.get_running_loop().time()


def in_virtual_time(tests: type[_T]) -> type[_T]:
    """Let the coroutines of a class of tests run in virtual time, each from 0."""
    for name, test in [*vars(tests).items()]:
        if inspect.iscoroutinefunction(test):
            setattr(tests, name, _in_virtual_time(test))
    return tests


def _in_virtual_time(
    test: Callable[_P, Coroutine[None, None, None]],
) -> Callable[_P, None]:
    @functools.wraps(test)
    def run_test(*args: _P.args, **kwargs: _P.kwargs) -> None:
        run(test(*args, **kwargs))

    return run_test
