"""The event loop of a command, whose end waits for no thread."""

import asyncio
import sys
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

_T = TypeVar("_T")

if sys.platform == "win32":  # pragma: no cover - no test runs there.
    _SystemLoop = asyncio.ProactorEventLoop
else:
    _SystemLoop = asyncio.SelectorEventLoop


class _CommandLoop(_SystemLoop):
    """A loop that calls functions in daemon threads.

    The threads of asyncio are joined twice, at the end of the loop and of the process.
    A lookup of a host, which nothing can end, would hold up both.
    """

    def run_in_executor(
        self, executor: object, func: Callable[..., _T], *args: object
    ) -> asyncio.Future[_T]:
        """Call a function in a thread; no command passes an executor."""
        del executor
        answer = Future[_T]()
        # The answer then cannot be cancelled, so the thread can set it.
        answer.set_running_or_notify_cancel()
        call = partial(func, *args)
        threading.Thread(target=_answer, args=(answer, call), daemon=True).start()
        return asyncio.wrap_future(answer, loop=self)


def _answer(answer: Future[_T], call: Callable[[], _T]) -> None:
    try:
        answer.set_result(call())
    except BaseException as error:  # noqa: BLE001 - raised where it is awaited.
        answer.set_exception(error)


def run(main: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine as `asyncio.run` does, but wait for no thread in the end."""
    with asyncio.Runner(loop_factory=_CommandLoop) as runner:
        return runner.run(main)
