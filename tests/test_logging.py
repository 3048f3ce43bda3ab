"""The log lines of `bctrl_async`: retries and throttling, with their ids, never the API key."""

from __future__ import annotations

import ast
import asyncio
import logging
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import ANY

import pytest
import virtual_time
from helpers import Connect, add_runtimes, unused_url
from servers import answering, http_answer, raw_server

import bctrl_async
from bctrl_async import (
    BctrlApiError,
    BctrlAuthenticationError,
    BctrlError,
    BctrlRateLimitError,
    BctrlSession,
    RetryPolicy,
)
from bctrl_async._limiter.limiter import Limiter
from bctrl_async._limiter.rate import AdaptiveRate
from bctrl_async.emulator import Emulator, Fault

KEY = "a-key-that-must-not-be-logged"
PACKAGE = Path(bctrl_async.__file__).parent


def lines(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "bctrl_async" and record.levelno == level
    ]


def fields(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    """Return what a JSON formatter would find in each record, apart from the standard fields."""
    return [
        {name: value for name, value in vars(record).items() if "." in name}
        for record in caplog.records
    ]


@pytest.fixture(autouse=True)
def _capture_debug(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "bctrl_async")


class TestRetries:
    async def test_a_retry_is_logged_with_its_ids_reason_and_delay(
        self,
        emulator: Emulator,
        session: BctrlSession,
        pauses: list[float],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        emulator.inject(Fault.SERVER_ERROR)

        await session.stop_runtime("ws-1", "crm")

        [line] = lines(caplog, logging.INFO)
        assert line.startswith("attempt 1 failed: stop of 'crm' in workspace 'ws-1': ")
        assert "500" in line
        assert line.endswith(f"; the next follows in {pauses[0]:.3f} s at the earliest")
        assert fields(caplog) == [
            {
                "bctrl.event": "retry",
                "bctrl.workspace_id": "ws-1",
                "bctrl.alias": "crm",
                "bctrl.attempts": 1,
                "bctrl.delay": pauses[0],
                "bctrl.request_id": ANY,
                "error.type": "500",
                "http.response.status_code": 500,
            }
        ]

    async def test_a_retry_of_a_list_names_the_workspace(
        self, emulator: Emulator, session: BctrlSession, caplog: pytest.LogCaptureFixture
    ) -> None:
        emulator.inject(Fault.SERVER_ERROR, method="GET")

        await session.list_runtimes("ws-1")

        [line] = lines(caplog, logging.INFO)
        assert line.startswith("attempt 1 failed: list of workspace 'ws-1': ")
        [record] = fields(caplog)
        assert record["bctrl.workspace_id"] == "ws-1"
        assert "bctrl.alias" not in record

    async def test_a_retry_without_an_answer_has_a_type_and_an_alias_cannot_forge_a_line(
        self, emulator: Emulator, session: BctrlSession, caplog: pytest.LogCaptureFixture
    ) -> None:
        emulator.add_runtime("ws-1", "100%s {x} \u2028")
        emulator.inject(Fault.DROP_BEFORE)

        await session.stop_runtime("ws-1", "100%s {x} \u2028")

        [line], [record] = lines(caplog, logging.INFO), fields(caplog)
        assert "'100%s {x} \\u2028'" in line
        assert record["error.type"] == "BctrlNetworkError"
        assert "http.response.status_code" not in record

    async def test_successes_permanent_errors_and_complete_runs_at_a_rate_log_nothing(
        self, connect: Connect, caplog: pytest.LogCaptureFixture
    ) -> None:
        # The rate of the session is not logged as throttling.
        async with connect(rate=1000.0) as session:
            await session.stop_runtime("ws-1", "crm")
            with pytest.raises(BctrlApiError):
                await session.stop_runtime("ws-1", "crm")
            report = await session.stop_runtimes([("ws-1", "crm"), ("ws-1", "nobody")])

        assert report.ended_early is None
        assert caplog.records == []

    async def test_each_probe_of_an_outage_is_logged(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        with unused_url() as url:
            policy = RetryPolicy(base=0.001, cap=0.001)
            async with BctrlSession(KEY, base_url=url, retry=policy) as session:
                report = await session.stop_runtimes(
                    [("ws-1", f"r{n}") for n in range(9)], verify=False
                )

        assert len(lines(caplog, logging.INFO)) == report.retries > 0


class TestThrottling:
    def test_the_start_and_the_end_of_throttling_are_logged_once_each(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def throttle_then_recover() -> None:
            limiter = Limiter(10, AdaptiveRate())
            for retry_after in (2.0, None, None):
                await limiter.acquire(60.0)
                limiter.release(BctrlRateLimitError("429", status=429, retry_after=retry_after))
            for _ in range(2000):
                await limiter.acquire(60.0)
                await asyncio.sleep(0.01)
                limiter.release("a runtime")

        virtual_time.run(throttle_then_recover())

        began, ended = lines(caplog, logging.INFO)
        assert began == (
            "throttled by the server (status 429): all calls of the session slow down, and the "
            "next attempt starts in 2.000 s"
        )
        assert ended.startswith("no longer throttled by the server, after ")
        assert fields(caplog) == [
            {"bctrl.event": "throttled", "http.response.status_code": 429, "bctrl.delay": 2.0},
            {"bctrl.event": "throttling_ended", "bctrl.elapsed": ANY},
        ]

    async def test_throttling_is_logged_once_for_all_stops_of_a_session(
        self, emulator: Emulator, session: BctrlSession, caplog: pytest.LogCaptureFixture
    ) -> None:
        targets = add_runtimes(emulator, 8)
        emulator.inject(*[Fault.RATE_LIMITED] * 8)

        report = await session.stop_runtimes(targets)

        assert (report.ok, report.throttled) == (True, 8)
        # On a busy machine, the throttling may have ended as well.
        events = [record["bctrl.event"] for record in fields(caplog)]
        assert (events.count("throttled"), events.count("retry")) == (1, 8)
        # Without configured logging, nothing is printed: a bulk stop finds its rate this way.
        assert lines(caplog, logging.WARNING) == []


class TestBulk:
    async def test_an_early_end_is_logged_with_its_reason_and_counts(
        self, emulator: Emulator, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with BctrlSession("wrong", base_url=emulator.url) as session:
            report = await session.stop_runtimes([("ws-1", f"r{n}") for n in range(500)])

        assert isinstance(report.ended_early, BctrlAuthenticationError)
        assert lines(caplog, logging.WARNING) == [
            "a bulk stop ended early, with 500 targets read and 500 failures: "
            + report.ended_early.summary
        ]
        [record] = [record for record in fields(caplog) if record["bctrl.event"] == "ended_early"]
        assert (
            record.items()
            >= {
                "error.type": "401",
                "http.response.status_code": 401,
                "bctrl.total": 500,
                "bctrl.failures": 500,
            }.items()
        )

    @pytest.mark.parametrize("how", ["stop_reading", "abort", "deadline", "cancel", "leave"])
    async def test_an_end_that_the_caller_asked_for_is_no_warning(
        self, emulator: Emulator, caplog: pytest.LogCaptureFixture, how: str
    ) -> None:
        async with BctrlSession(emulator.api_key, base_url=emulator.url) as session:
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
        assert [record.levelname for record in caplog.records] == ["INFO"]
        assert lines(caplog, logging.INFO)[0].startswith("a bulk stop ended early, with ")

    async def test_an_end_that_nobody_asked_for_is_a_warning(
        self, session: BctrlSession, caplog: pytest.LogCaptureFixture
    ) -> None:
        with pytest.raises(ZeroDivisionError):
            await session.stop_runtimes(("ws-1", f"r{1 // number}") for number in (1, 0))

        assert [record.levelname for record in caplog.records] == ["WARNING"]


class TestKey:
    @pytest.mark.parametrize(
        "status", ["429 X", "500 X", "401 X", f"503 {KEY}", f"no HTTP, but Bearer {KEY}"]
    )
    async def test_a_key_echoed_by_the_server_is_not_logged(
        self, status: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        body = f'{{"code":"{KEY}","message":"no entry for Bearer {KEY}","requestId":"{KEY}"}}'
        answer = http_answer(status, body.encode(), "Retry-After: 0", f"X-Request-Id: {KEY}")
        if status.startswith("no HTTP"):
            answer = answer.removeprefix(b"HTTP/1.1 ")
        policy = RetryPolicy(attempts=2, base=0.001, patience=0.05)
        async with (
            raw_server(answering(answer)) as url,
            BctrlSession(KEY, base_url=url, retry=policy) as session,
        ):
            with pytest.raises(BctrlError):
                await session.stop_runtime("ws-1", "crm")
            # A 401 ends a run early only if another stop is in progress.
            targets = [("ws-1", "a"), ("ws-1", "b")][: 2 if status.startswith("401") else 1]
            await session.stop_runtimes(targets, verify=False)

        assert caplog.records
        assert KEY not in caplog.text + "".join(repr(vars(record)) for record in caplog.records)


def test_every_record_above_debug_names_its_event() -> None:
    calls = [
        node
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and re.match(r"_log\.(?!debug|isEnabled)", ast.unparse(node))
    ]
    unnamed = [call for call in map(ast.unparse, calls) if "bctrl.event" not in call]
    assert calls
    assert unnamed == []


def test_importing_the_package_configures_no_logging() -> None:
    program = (
        "import logging, bctrl_async; log = logging.getLogger('bctrl_async');"
        "print(log.handlers, log.level, log.propagate, logging.getLogger().handlers)"
    )
    printed = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert printed == "[] 0 True []\n"
