"""An event loop with virtual time: its clock jumps to the next timer."""

from __future__ import annotations

import asyncio
import functools
import inspect
import selectors
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

_P = ParamSpec("_P")
_T = TypeVar("_T")


class StuckError(BaseException):
    """Raised out of a loop whose tasks wait for ever, or never wait."""


class Clock(selectors.BaseSelector):
    """A selector of nothing, which advances virtual time instead of blocking."""

    def __init__(self) -> None:
        self.now = 0.0
        self._keys: dict[int, selectors.SelectorKey] = {}

    def register(
        self,
        fileobj: FileDescriptorLike,
        events: int,
        data: Any = None,  # noqa: ANN401 - as in the base class.
    ) -> selectors.SelectorKey:
        number = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        self._keys[number] = key = selectors.SelectorKey(fileobj, number, events, data)
        return key

    def unregister(self, fileobj: FileDescriptorLike) -> selectors.SelectorKey:
        return self._keys.pop(fileobj if isinstance(fileobj, int) else fileobj.fileno())

    def get_map(self) -> Mapping[FileDescriptorLike, selectors.SelectorKey]:
        return cast("Mapping[FileDescriptorLike, selectors.SelectorKey]", self._keys)

    def select(
        self, timeout: float | None = None
    ) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise StuckError("every task waits, and no timer is set")
        self.now += timeout
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on a virtual clock, without sockets and threads."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._virtual = clock or Clock()
        super().__init__(self._virtual)

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self._virtual.now


def run(main: Coroutine[None, None, _T]) -> _T:
    """Run a coroutine in virtual time and return its result."""
    results: list[_T] = []

    async def keep() -> None:
        results.append(await main)

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        # It formats its task, with the result, twice: a report may have ten thousand
        # failures.
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
