"""An event loop in virtual time, without sockets, threads or signals of the system.

Libraries such as looptime bring the clock alone, and wait a little for real sockets
before each jump. Here nothing is real, so the clock is a few lines.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import Callable
from selectors import SelectorKey
from typing import TYPE_CHECKING, Any, TypeVar

from support.virtual_time import Clock, StuckError, VirtualLoop

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

    from sim.network import Listener, Network

_T = TypeVar("_T")

_MAX_STEPS = 200_000
"""Steps after which a run counts as a loop without an end."""
_STEP, _BUSY_STEP, _BUSY_AFTER = 1e-6, 1e-3, 100
"""Virtual seconds that a step takes, and one in a row of so many without a wait.

A loop that is never idle must not stop the clock: anyio cancels a task in every step
until it has left its scope.
"""
STALL = 1.0
"""Virtual seconds for which a process that is starved of CPU runs no callback."""


class _Clock(Clock):
    """A clock of a busy machine: each step takes time, and it may be starved."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit
        self.step = 0
        self.stalls: list[float] = []
        self._busy = 0
        self.hooks: dict[int, list[Callable[[], object]]] = {}

    def select(self, timeout: float | None = None) -> list[tuple[SelectorKey, int]]:
        self.step += 1
        if timeout is None:
            raise StuckError("every task waits, and no timer is set")
        self._busy = 0 if timeout > 0 else self._busy + 1
        self.now += timeout + (_STEP if self._busy < _BUSY_AFTER else _BUSY_STEP)
        while self.stalls and self.now >= self.stalls[0]:
            # All that was due meanwhile is called at once.
            self.now += STALL
            del self.stalls[0]
        if self.now > self.limit:
            raise StuckError(f"not done after {self.limit:.0f} s")
        if self.step > _MAX_STEPS:
            raise StuckError(f"not done after {_MAX_STEPS} steps")
        for hook in self.hooks.pop(self.step, ()):
            hook()
        return []


class _Future(asyncio.Future[Any]):
    """A future with a reproducible place in sets."""

    def __init__(self, number: int, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self._number = number

    def __hash__(self) -> int:
        return self._number


class SimLoop(VirtualLoop):
    """A virtual loop whose network, threads and signals are simulated, too.

    Args:
        limit: The virtual seconds after which a run counts as stuck.

    Attributes:
        network: The network of its connections; to be set before the first.
        signal_handlers: The handlers that were added, by the number of the signal.
        thread_delay: The virtual seconds that a call in a thread takes.
        has_threads: False while no thread can start.
    """

    network: Network

    def __init__(self, limit: float) -> None:
        self._clock = _Clock(limit)
        super().__init__(self._clock)
        self._future_numbers = itertools.count()
        self.signal_handlers: dict[int, Callable[[], object]] = {}
        self.thread_delay = 0.0
        self.has_threads = True

    @property
    def step(self) -> int:
        """The number of iterations so far."""
        return self._clock.step

    def at_step(self, step: int, hook: Callable[[], object]) -> None:
        """Call a function between two iterations, as a signal or a thread would."""
        self._clock.hooks.setdefault(step, []).append(hook)

    def starve(self, times: list[float]) -> None:
        """Run no callback for `STALL` seconds from each of these times on."""
        self._clock.stalls += times

    def create_future(self) -> asyncio.Future[Any]:
        return _Future(next(self._future_numbers), self)

    def run_in_executor(
        self, executor: object, func: Callable[..., _T], *args: object
    ) -> asyncio.Future[_T]:
        """Run a function in the loop, also if its future is cancelled meanwhile."""
        del executor
        self._check_threads()
        future: asyncio.Future[_T] = self.create_future()
        self.call_later(self.thread_delay, _run, future, func, args)
        return future

    def _check_threads(self) -> None:
        if not self.has_threads:
            raise RuntimeError("can't start new thread")

    def add_signal_handler(
        self, sig: int, callback: Callable[..., object], *args: object
    ) -> None:
        self.signal_handlers[sig] = lambda: callback(*args)

    def remove_signal_handler(self, sig: int) -> bool:
        return self.signal_handlers.pop(sig, None) is not None

    def remove_reader(self, fd: FileDescriptorLike) -> bool:
        del fd
        return False

    async def getaddrinfo(self, host: Any, port: Any, **_: Any) -> Any:  # noqa: ANN401
        del host
        self._check_threads()
        await self.network.look_up()
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    async def create_server(  # type: ignore[override] # the form that the emulator uses.
        self,
        protocol_factory: Callable[[], asyncio.Protocol],
        host: str,
        port: int,
        *,
        backlog: int,
    ) -> Listener:
        del backlog
        return self.network.listen(protocol_factory, host, port or 8787)

    async def sock_connect(self, sock: socket.socket, address: Any) -> None:  # noqa: ANN401
        del address
        await self.network.connect(sock)

    async def create_connection(  # type: ignore[override] # the form that aiohttp uses.
        self,
        protocol_factory: Callable[[], asyncio.Protocol],
        *,
        sock: socket.socket,
        **_: object,
    ) -> tuple[asyncio.Transport, asyncio.Protocol]:
        return await self.network.open(protocol_factory, sock)


def _run(
    future: asyncio.Future[_T], func: Callable[..., _T], args: tuple[object, ...]
) -> None:
    try:
        result = func(*args)
    except Exception as error:  # noqa: BLE001 - raised where the future is awaited.
        if not future.cancelled():
            future.set_exception(error)
    else:
        if not future.cancelled():
            future.set_result(result)
