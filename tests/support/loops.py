"""The event loops of tests: asyncio's or uvloop's, with lazy or eager tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import Context
from importlib import import_module
from typing import Any, TypeVar

_T = TypeVar("_T")

EAGER_HELP = "run each task at once to its first wait (Python 3.12 or newer)"


class LoopFactory:
    """Makes the event loop of each test.

    Args:
        package: `asyncio` or `uvloop`.

    Attributes:
        made: The number of loops made.
    """

    def __init__(self, package: str) -> None:
        self.package = package
        self.made = 0

    def __call__(self) -> asyncio.AbstractEventLoop:
        self.made += 1
        loop: asyncio.AbstractEventLoop = import_module(self.package).new_event_loop()
        return loop


def package_of(loop: asyncio.AbstractEventLoop) -> str:
    """Return the package of a loop, which is also uvicorn's name of it."""
    package, _, _ = type(loop).__module__.partition(".")
    return package


def eager_task_factory() -> Callable[..., Any]:
    """Return asyncio's factory, which is new in Python 3.12."""
    factory: Callable[..., Any] = vars(asyncio)["eager_task_factory"]
    return factory


def start_eagerly() -> None:
    """Let every event loop that this process makes start its tasks eagerly."""
    uvloop = import_module("uvloop")
    for kind in (asyncio.BaseEventLoop, uvloop.Loop):
        _make_eager(kind)
    # uvloop 0.23 passes `eager_start=None` to asyncio's factory, which then fails or is
    # lazy.
    uvloop.Loop.create_task = _create_eager_task


def _make_eager(kind: Any) -> None:  # noqa: ANN401 - these classes have only `object` in common.
    initialize = kind.__init__

    def initialize_eager(loop: asyncio.AbstractEventLoop, *args: object) -> None:
        initialize(loop, *args)
        loop.set_task_factory(eager_task_factory())

    kind.__init__ = initialize_eager


def _create_eager_task(
    loop: asyncio.AbstractEventLoop,
    coroutine: Coroutine[Any, Any, _T],
    *,
    name: str | None = None,
    context: Context | None = None,
) -> asyncio.Task[_T]:
    task: asyncio.Task[_T] = eager_task_factory()(
        loop, coroutine, name=name, context=context
    )
    return task
