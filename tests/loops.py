"""The event loops of tests: asyncio's or uvloop's, with lazy or eager tasks."""

from __future__ import annotations

import asyncio
from importlib import import_module
from typing import Any

EAGER_HELP = "run each task to its first wait at once, as asyncio.eager_task_factory does"


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


def start_eagerly() -> None:
    """Let every event loop that this process makes start its tasks eagerly."""
    for kind in (asyncio.BaseEventLoop, import_module("uvloop").Loop):
        _make_eager(kind)


def _make_eager(kind: Any) -> None:  # noqa: ANN401 - uvloop's loop has no base class of ours.
    # It is new in Python 3.12.
    eager_task_factory = getattr(asyncio, "eager_task_factory")  # noqa: B009
    initialize = kind.__init__

    def initialize_eager(loop: asyncio.AbstractEventLoop, *args: object) -> None:
        initialize(loop, *args)
        loop.set_task_factory(eager_task_factory)

    kind.__init__ = initialize_eager
