"""Run one seed: a loop and clocks around a world, and a search for its leaks."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import CoroutineType, NoneType
from typing import Any
from unittest.mock import patch

from support.virtual_time import StuckError

from bctrl_async import Runtime
from sim.check_bulk import check_run
from sim.check_calls import check_call
from sim.check_throttling import check_flood, check_rate
from sim.faults import FAULTS, put_back
from sim.loop import SimLoop
from sim.plan import Plan
from sim.rules import Problem, Problems
from sim.shared_journal import SharedJournal
from sim.world import World

_LIMIT = 50_000.0
"""Virtual seconds after which a run counts as stuck."""


@dataclass
class Verdict:
    """The result of one seed.

    Attributes:
        problems: The rules that it broke.
        trace: What happened, one event a line.
        plan: What the seed decided.
        seconds: The virtual seconds that it took.
        requests: The number of requests that the client wrote.
        lists: The number of lists that the server was asked for.
        results: The results of the targets, and `returned` and `raised` for single
            calls.
    """

    seed: int
    problems: list[Problem] = field(default_factory=list)
    trace: list[str] = field(default_factory=list)
    plan: str = ""
    seconds: float = 0.0
    requests: int = 0
    lists: int = 0
    results: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        return f"seed {self.seed}: " + (
            "; ".join(text for _, text in self.problems[:5]) or "ok"
        )


def simulate(
    seed: int, fault: str | None = None, *, shares_journal: bool = False
) -> Verdict:
    """Run one seed in virtual time, and check everything afterwards.

    Args:
        seed: The seed.
        fault: A fault of `FAULTS` to put back into the client.
        shares_journal: Run bulk stops that share a journal, as for some faults.
    """
    if fault is not None:
        shares_journal |= FAULTS[fault].shares_journal
    with ExitStack() as stack:
        stack.enter_context(put_back(fault))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=_memory())))
        random.seed(seed)
        plan = Plan(seed)
        verdict = Verdict(seed)
        loop = SimLoop(_LIMIT)
        found = verdict.problems
        stack.enter_context(_watched(loop, found))
        stack.enter_context(
            patch("bctrl_async.bulk._batch._MAX_UNREAD", plan.max_unread)
        )
        stack.enter_context(patch("bctrl_async.bulk._polls._MAX_POLLS", plan.max_polls))
        world = (SharedJournal if shares_journal else World)(plan, loop, folder)
        _run(loop, world, found)
        if not found:
            found += _check(world)
    verdict.requests = len(world.network.exchanges)
    verdict.lists = sum(exchange.lists for exchange in world.network.exchanges)
    verdict.seconds = loop.time()
    verdict.results = _results(world)
    verdict.plan = f"{plan.kind}, {plan.ending}\n{plan}"
    found.sort()
    verdict.trace = [
        f"{when:10.4f} {_connection(number):>5} {event.replace(str(folder), '')}"
        for when, number, event in world.network.trace
    ]
    return verdict


def _check(world: World) -> Problems:
    if isinstance(world, SharedJournal):
        yield from world.check()
        return
    for run in world.runs:
        yield from check_run(world, run)
    for call in world.calls:
        yield from check_call(world, call)
    yield from check_rate(world.plan, world.network.exchanges)
    yield from check_flood(world.plan, world.network.exchanges)


def _connection(number: int) -> str:
    return f"#{number}" if number else ""


def _results(world: World) -> Counter[str]:
    results: Counter[str] = Counter()
    for run in world.runs:
        results.update(run.report.counts if run.report else ())
    ended = Counter(type(call.result) for call in world.calls)
    returned, cancelled = ended.pop(Runtime, 0), ended.pop(NoneType, 0)
    return results + Counter(
        returned=returned, cancelled=cancelled, raised=ended.total()
    )


def _memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - a folder in memory.


def _run(loop: SimLoop, world: World, found: list[Problem]) -> None:
    main = loop.create_task(world.run())
    try:
        loop.run_until_complete(main)
    except StuckError as error:
        found.append(Problem("stuck", str(error)))
        found += (Problem("stuck", _where(task)) for task in asyncio.all_tasks(loop))
    except Exception as error:  # noqa: BLE001 - a problem as any other.
        found.append(Problem("simulation", "".join(traceback.format_exception(error))))
    else:
        found += (
            Problem("task left", _where(task)) for task in asyncio.all_tasks(loop)
        )
        found += (
            Problem("connection left", f"connection {connection.number} is left open")
            for connection in world.network.connections
            if connection.client.protocol is not None
        )
        found += (
            Problem("slot left", f"{gate.in_use} slots are left in use")
            for limiter in world.limiters
            for gate in limiter._gates()
            if gate.in_use
        )
        found += (
            Problem("timer left", repr(timer))
            for timer in _timers(loop)
            if not timer.cancelled()
        )
    _close(loop)


def _timers(loop: SimLoop) -> list[asyncio.TimerHandle]:
    # There is no public way to ask for them.
    return loop._scheduled  # type: ignore[attr-defined, no-any-return]


def _where(task: asyncio.Task[Any]) -> str:
    """Return the functions in which a task waits, the outermost first."""
    places: list[str] = []
    awaited: object = task.get_coro()
    while isinstance(awaited, CoroutineType):
        frame = awaited.cr_frame
        if frame is not None:
            code = frame.f_code
            places.append(
                f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}"
            )
        awaited = awaited.cr_await
    return " > ".join(places)


def _close(loop: SimLoop) -> None:
    with suppress(StuckError):
        for task in asyncio.all_tasks(loop):
            task.cancel()
        for _ in range(20):
            loop.call_soon(loop.stop)
            loop.run_forever()
        loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


@contextmanager
def _watched(loop: SimLoop, found: list[Problem]) -> Iterator[None]:
    """Give the process virtual time, and collect what it complains about."""

    def on_exception(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        text = f"{context.get('message')} {context.get('exception')!r}"
        found.append(Problem("loop reports", text))

    loop.set_exception_handler(on_exception)
    handler = _Collector(found)
    logging.getLogger().addHandler(handler)
    warned: list[warnings.WarningMessage]
    try:
        with (
            warnings.catch_warnings(record=True) as warned,
            patch("time.monotonic", loop.time),
            # It has a reference of its own.
            patch("aiohttp.connector.monotonic", loop.time),
            # The order of sets of connections must not depend on addresses in memory
            # either.
            patch(
                "aiohttp.client_proto.ResponseHandler.__hash__",
                lambda self: self.number,
            ),
            patch("aiohttp.connector._TransportPlaceholder.__hash__", lambda _: 0),
        ):
            warnings.simplefilter("always")
            # Garbage is collected once, and only this run's is looked at.
            gc.disable()
            gc.freeze()
            yield
            gc.collect()
    finally:
        gc.unfreeze()
        gc.enable()
        logging.getLogger().removeHandler(handler)
    found += (
        Problem("warning", f"{warning.category.__name__}: {warning.message}")
        for warning in warned
    )


class _Collector(logging.Handler):
    """Collects errors that are logged by asyncio and aiohttp."""

    def __init__(self, found: list[Problem]) -> None:
        super().__init__(logging.ERROR)
        self._found = found

    def emit(self, record: logging.LogRecord) -> None:
        self._found.append(Problem("log", f"{record.name}: {self.format(record)}"))
