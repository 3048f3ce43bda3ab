"""The log lines of `bctrl_async`: retries, throttling, early ends, and ids."""

from __future__ import annotations

import ast
import asyncio
import logging
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import cast
from unittest.mock import ANY

import pytest
from support import virtual_time
from support.helpers import Connect, unused_url

import bctrl_async
from bctrl_async import (
    BctrlApiError,
    BctrlConfigError,
    BctrlRateLimitError,
    BctrlSession,
    RetryPolicy,
    RuntimeRef,
)
from bctrl_async._kinds import Failure
from bctrl_async._limiter.evidence import History
from bctrl_async._limiter.limiter import Limiter
from bctrl_async._limiter.rate import AdaptiveRate
from bctrl_async.emulator import Emulator, Fault

Log = pytest.LogCaptureFixture
PACKAGE = Path(bctrl_async.__file__).parent


@pytest.fixture(autouse=True)
def _capture_debug(caplog: Log) -> None:
    caplog.set_level(logging.DEBUG, "bctrl_async")


def fields(record: logging.LogRecord) -> dict[str, object]:
    """Return what a JSON formatter would find beside the standard fields."""
    return {name: value for name, value in vars(record).items() if "." in name}


ODD = "100%s {x} \u2028"
Call = Callable[[BctrlSession], Awaitable[object]]
# The call, the fault of its first attempt, the start of the line, and its fields.
RETRIES: dict[str, tuple[Call, Fault, str, dict[str, object]]] = {
    "of a stop": (
        lambda session: session.stop_runtime("ws-1", "crm"),
        Fault.SERVER_ERROR,
        "stop of 'crm' in workspace 'ws-1': the server answered 500",
        {"bctrl.alias": "crm", "error.type": "500", "http.response.status_code": 500},
    ),
    "of a list": (
        lambda session: session.list_runtimes("ws-1"),
        Fault.SERVER_ERROR,
        "list of workspace 'ws-1': the server answered 500",
        {"error.type": "500", "http.response.status_code": 500},
    ),
    "without an answer, and with an alias that would forge a line": (
        lambda session: session.stop_runtime("ws-1", ODD),
        Fault.DROP_BEFORE,
        "stop of '100%s {x} \\u2028' in workspace 'ws-1': connection lost",
        {"bctrl.alias": ODD, "error.type": "BctrlNetworkError"},
    ),
}


@pytest.mark.parametrize(
    ("call", "fault", "text", "of_error"), RETRIES.values(), ids=RETRIES
)
async def test_a_retry_is_logged_with_its_reason_and_delay(  # noqa: PLR0917 - a table.
    emulator: Emulator,
    session: BctrlSession,
    pauses: list[float],
    caplog: Log,
    call: Call,
    fault: Fault,
    text: str,
    of_error: dict[str, object],
) -> None:
    emulator.add_runtime("ws-1", ODD)
    for method in ("GET", "POST"):
        emulator.inject(fault, method=method)
    await call(session)

    [record] = caplog.records
    line = record.getMessage()
    assert record.levelno == logging.INFO
    assert line.startswith(f"attempt 1 failed: {text}")
    assert line.endswith(f"; the next follows in {pauses[0]:.3f} s at the earliest")
    request_id = {"bctrl.request_id": ANY} if "500" in text else {}
    assert fields(record) == {
        "bctrl.event": "retry",
        "bctrl.workspace_id": "ws-1",
        "bctrl.attempts": 1,
        "bctrl.delay": pauses[0],
        **request_id,
        **of_error,
    }


async def test_each_probe_of_an_outage_is_logged(caplog: Log) -> None:
    policy = RetryPolicy(base=0.001, cap=0.001)
    with unused_url() as url:
        async with BctrlSession("key", base_url=url, retry=policy) as session:
            report = await session.stop_runtimes([("ws-1", f"r{n}") for n in range(9)])

    retries = [
        record for record in caplog.records if fields(record)["bctrl.event"] == "retry"
    ]
    assert len(retries) == report.retries > 0


async def test_calls_that_settle_at_once_log_nothing(
    connect: Connect, caplog: Log
) -> None:
    # The rate of the session is not logged as throttling.
    async with connect(rate=1000.0) as session:
        await session.stop_runtime("ws-1", "crm")
        with pytest.raises(BctrlApiError):
            await session.stop_runtime("ws-1", "crm")
        report = await session.stop_runtimes([("ws-1", "crm"), ("ws-1", "nobody")])

    assert report.ended_early is None
    assert caplog.records == []


@pytest.mark.parametrize(
    ("count", "scope"),
    [(1, "the calls in workspace 'ws-0'"), (8, "the calls of the session")],
)
def test_the_start_and_the_end_of_throttling_are_logged_once_each(
    caplog: Log, count: int, scope: str
) -> None:
    async def throttle_then_recover() -> None:
        limiter = Limiter(10, AdaptiveRate())
        workspaces = [f"ws-{number % count}" for number in range(8)]
        for workspace in workspaces:
            history = History(workspace=workspace)
            await limiter.acquire(60.0, history=history)
            error = BctrlRateLimitError("429", status=429, retry_after=2.0)
            limiter.release(Failure.of(error), history)
        for _ in range(2000):
            history = History(workspace="ws-0")
            await limiter.acquire(60.0, history=history)
            await asyncio.sleep(0.01)
            limiter.release("a runtime", history)

    virtual_time.run(throttle_then_recover())

    began, ended = caplog.records
    assert began.getMessage() == (
        f"throttled by the server (status 429): {scope} slow down, and the next "
        "attempt starts in 2.000 s"
    )
    assert re.fullmatch(
        r"no longer throttled by the server, after [\d.]+ s: "
        rf"{scope} start at full speed",
        ended.getMessage(),
    )
    assert [fields(record) for record in caplog.records] == [
        {
            "bctrl.event": "throttled",
            "http.response.status_code": 429,
            "bctrl.delay": 2.0,
        },
        {"bctrl.event": "throttling_ended", "bctrl.elapsed": ANY},
    ]
    # Nothing is printed without configured logging: a bulk stop finds its rate this
    # way.
    assert {record.levelno for record in caplog.records} == {logging.INFO}


class TestEarlyEnd:
    async def test_it_is_a_warning_with_its_counts(
        self, emulator: Emulator, caplog: Log
    ) -> None:
        async with BctrlSession("wrong", base_url=emulator.url) as session:
            report = await session.stop_runtimes(
                [("ws-1", f"r{n}") for n in range(500)]
            )

        assert report.ended_early is not None
        [record] = [
            record for record in caplog.records if record.levelno == logging.WARNING
        ]
        assert record.getMessage() == (
            "a bulk stop ended early, with 500 targets read and 500 failures: "
            + report.ended_early.summary
        )
        status = {"error.type": "401", "http.response.status_code": 401}
        counts = {"bctrl.total": 500, "bctrl.failures": 500}
        event = {"bctrl.event": "ended_early", **status, **counts}
        assert fields(record).items() >= event.items()

    @pytest.mark.parametrize(
        "how", ["stop_reading", "abort", "deadline", "cancel", "leave"]
    )
    async def test_it_is_no_warning_if_the_caller_asked_for_it(
        self, connect: Connect, caplog: Log, how: str
    ) -> None:
        async with connect() as session:
            deadline = 0.001 if how == "deadline" else None
            batch = session.stop_runtimes([("ws-1", "crm")] * 500, deadline=deadline)
            if how == "leave":
                async with batch:
                    await anext(batch)
            else:
                running = asyncio.create_task(batch)
                await asyncio.sleep(0)
                if how == "cancel":
                    running.cancel()
                elif how != "deadline":
                    getattr(batch, how)()
                await asyncio.wait([running])

        assert not batch.report.ok
        [record] = caplog.records
        assert record.levelno == logging.INFO
        assert record.getMessage().startswith("a bulk stop ended early, with ")

    async def test_a_failed_input_is_a_warning(
        self, session: BctrlSession, caplog: Log
    ) -> None:
        with pytest.raises(ZeroDivisionError):
            await session.stop_runtimes(
                ("ws-1", f"r{1 // number}") for number in (1, 0)
            )
        assert [record.levelname for record in caplog.records] == ["WARNING"]

    @pytest.mark.parametrize("targets", [[None], {"a", "b"}, iter(["ws-1"])])
    async def test_wrong_targets_are_raised_alone(
        self, session: BctrlSession, caplog: Log, targets: object
    ) -> None:
        with pytest.raises(BctrlConfigError, match="invalid targets"):
            await session.stop_runtimes(cast("list[RuntimeRef]", targets))
        assert caplog.records == []


def test_every_record_above_debug_names_its_event() -> None:
    calls = [
        ast.unparse(node)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and re.match(r"_log\.(?!debug|isEnabled)", ast.unparse(node))
    ]
    assert calls
    assert [call for call in calls if "bctrl.event" not in call] == []


def test_importing_the_package_configures_no_logging() -> None:
    program = (
        "import logging, bctrl_async; log = logging.getLogger('bctrl_async');"
        "print(log.handlers, log.level, log.propagate, logging.getLogger().handlers)"
    )
    printed = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert printed == "[] 0 True []\n"
