"""Observers of calls and the statistics of a session, which disturb no call."""

from __future__ import annotations

import asyncio
import gc
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, cast

import msgspec
import pytest
from support.helpers import Connect, add_runtimes, started, until, wait_for_requests
from support.servers import emulator_in_a_thread

from bctrl_async import (
    Attempt,
    AttemptObserver,
    BctrlConfigError,
    BctrlError,
    BctrlNotFoundError,
    BctrlSession,
    BulkObserver,
    CallObserver,
    Observer,
    RetryPolicy,
    SessionStats,
    StopObserver,
    StopOutcome,
    StopReport,
    StopResult,
)
from bctrl_async.emulator import Emulator, Fault, Reply

Log = pytest.LogCaptureFixture


class Recorder(Observer, BulkObserver, StopObserver, CallObserver, AttemptObserver):
    """Records every event, and observes all calls, stops, reads and attempts itself."""

    def __init__(self, sends: Mapping[str, str] | None = None) -> None:
        self.events: list[str] = []
        self.outcomes: list[StopOutcome] = []
        self.begun = 0
        self.session: BctrlSession
        self._sends = sends or {}

    def begin_bulk(self) -> BulkObserver:
        return self._begin("bulk")

    def begin_stop(self, workspace_id: str, alias: str) -> StopObserver:
        return self._begin(f"stop {workspace_id} {alias}")

    def begin_call(
        self, operation: str, workspace_id: str, alias: str | None
    ) -> CallObserver:
        return self._begin(f"{operation} {workspace_id} {alias}")

    def begin_attempt(self, attempt: Attempt) -> AttemptObserver:
        return self._begin(
            f"attempt {attempt.number} {attempt.method} {attempt.url.path}"
        )

    def headers(self) -> Mapping[str, str]:
        return self._sends

    def answered(self, status: int) -> None:
        self.events.append(f"answered {status}")

    def raised(self, error: BaseException) -> None:
        self.events.append(f"raised {type(error).__name__}")

    def outcome(self, outcome: StopOutcome) -> None:
        self.outcomes.append(outcome)

    def end(self, ended: BaseException | StopOutcome | StopReport | None) -> None:
        self.begun -= 1
        self.events.append("end" if ended is None else f"end {type(ended).__name__}")
        if isinstance(ended, StopOutcome):
            self.outcomes.append(ended)

    def _begin(self, event: str) -> Recorder:
        self.begun += 1
        self.events.append(event)
        return self


class Faulty(Recorder):
    """A recorder of which one method raises."""

    def __init__(self, method: str, error: BaseException) -> None:
        super().__init__()
        self._method, self._error = method, error

    def __getattribute__(self, name: str) -> Any:  # noqa: ANN401 - any attribute.
        own = object.__getattribute__(self, "__dict__")
        return (
            self._fail if name == own.get("_method") else super().__getattribute__(name)
        )

    def _fail(self, *_: object) -> None:
        raise self._error


@pytest.fixture
async def recorder(connect: Connect) -> AsyncIterator[Recorder]:
    """A recorder, and the session whose calls it observes."""
    recorder = Recorder()
    async with connect(observer=recorder) as recorder.session:
        yield recorder


Call = Callable[[BctrlSession], Awaitable[object]]

LIST = "/v1/workspaces/ws-1/runtimes"
GET = f"{LIST}/crm"
# The call, the fault of its first request, and the events.
EVENTS: dict[str, tuple[Call, Fault | Reply | None, str]] = {
    "a stop": (
        lambda session: session.stop_runtime("ws-1", "crm"),
        Fault.SERVER_ERROR,
        f"""stop ws-1 crm, attempt 1 POST {GET}/stop, answered 500,
        end BctrlServerError, attempt 2 POST {GET}/stop, answered 200, end,
        end StopOutcome""",
    ),
    "a stop that raises": (
        lambda session: session.stop_runtime("ws-1", "crm"),
        Reply(409, code="runtime.not_active"),
        f"""stop ws-1 crm, attempt 1 POST {GET}/stop, answered 409,
        end BctrlConflictError, raised BctrlConflictError, end StopOutcome""",
    ),
    "a read": (
        lambda session: session.get_runtime("ws-1", "crm"),
        Fault.SERVER_ERROR,
        f"""get ws-1 crm, attempt 1 GET {GET}, answered 500, end BctrlServerError,
        attempt 2 GET {GET}, answered 200, end, end""",
    ),
    "a list that cannot be parsed": (
        lambda session: session.list_runtimes("ws-1"),
        Reply(200, body={"runtimes": [{}]}),
        f"""list ws-1 None, attempt 1 GET {LIST}, answered 200, end,
        end BctrlResponseError""",
    ),
    "a call that sends nothing": (
        lambda session: session.get_runtime("ws-1", ".."),
        None,
        "get ws-1 .., end BctrlConfigError",
    ),
    "a bulk stop": (
        lambda session: session.stop_runtimes(
            [("ws-1", "crm"), ("ws-1", ".."), cast("Any", 7)]
        ),
        None,
        f"""bulk, stop ws-1 crm, attempt 1 POST {GET}/stop, answered 200, end,
        end StopOutcome, end StopReport""",
    ),
}


@pytest.mark.parametrize(("call", "fault", "events"), EVENTS.values(), ids=EVENTS)
async def test_the_events_of_a_call(
    emulator: Emulator,
    recorder: Recorder,
    call: Call,
    fault: Fault | Reply | None,
    events: str,
) -> None:
    for method in ("GET", "POST"):
        emulator.inject(fault, method=method)
    with suppress(BctrlError):
        await call(recorder.session)
    assert recorder.events == re.split(r",\s+", events)
    assert recorder.begun == 0


@pytest.mark.parametrize(
    ("alias", "result", "attempts"),
    [
        ("..", StopResult.INVALID, 0),
        ("missing", StopResult.NOT_FOUND, 1),
        # It no longer runs, which is no error of its outcome.
        ("done", StopResult.ALREADY_STOPPED, 1),
    ],
)
async def test_the_error_observed_is_the_one_raised(
    emulator: Emulator,
    recorder: Recorder,
    alias: str,
    result: StopResult,
    attempts: int,
) -> None:
    emulator.add_runtime("ws-1", "done", status="stopped")
    with pytest.raises(BctrlError) as caught:
        await recorder.session.stop_runtime("ws-1", alias)

    [outcome] = recorder.outcomes
    assert (outcome.result, outcome.attempts) == (result, attempts)
    assert outcome.ok is (alias == "done")
    assert outcome.error is (None if outcome.ok else caught.value)


async def test_fetching_the_key_is_not_part_of_an_attempt(emulator: Emulator) -> None:
    recorder = Recorder()
    keys = iter(["emulator-key"])

    def key() -> str:
        recorder.events.append("key")
        return next(keys)

    async with BctrlSession(key, base_url=emulator.url, observer=recorder) as session:
        await session.stop_runtime("ws-1", "crm")
        with pytest.raises(BctrlConfigError) as caught:
            await session.get_runtime("ws-1", "crm")
        assert session.stats.attempts == 1

    assert recorder.events[1:3] == ["key", f"attempt 1 POST {GET}/stop"]
    assert recorder.events[-3:] == ["get ws-1 crm", "key", "end BctrlConfigError"]
    assert (caught.value.attempts, recorder.outcomes[0].attempts) == (0, 1)


BETWEEN = "aborted before its next attempt"
CANCELLED = "because CancelledError was raised"


class TestCancellation:
    """Every start has an end."""

    async def test_of_a_read(self, emulator: Emulator, recorder: Recorder) -> None:
        emulator.inject(Fault.HANG, method="GET")
        reading = asyncio.create_task(recorder.session.list_runtimes("ws-1"))
        await wait_for_requests(emulator, 1)
        reading.cancel()
        await asyncio.wait([reading])

        assert recorder.events[-2:] == ["end CancelledError"] * 2
        assert recorder.begun == 0

    @pytest.mark.parametrize(
        ("fault", "said"),
        [
            (Fault.HANG, f"unknown: aborted before an answer {CANCELLED}"),
            (
                Reply(503, headers={"Retry-After": "30"}),
                f"rejected: {BETWEEN} {CANCELLED}; before that, the",
            ),
        ],
    )
    async def test_of_stops_in_flight_and_queued(
        self, emulator: Emulator, connect: Connect, fault: Fault | Reply, said: str
    ) -> None:
        emulator.inject(fault)
        async with connect(
            max_connections=1, observer=(recorder := Recorder())
        ) as session:
            stopping = asyncio.create_task(session.stop_runtime("ws-1", "crm"))
            await wait_for_requests(emulator, 1)
            await until(lambda: fault is Fault.HANG or session.stats.waiting)
            # The only slot is taken, also if the throttled stop waits without it.
            assert session._limiter._all.acquire_if_due() is not (fault is Fault.HANG)
            queued = asyncio.create_task(session.stop_runtime("ws-1", "mail"))
            await asyncio.sleep(0)
            for task in (queued, stopping):
                task.cancel()
                await asyncio.wait([task])

        unsent, outcome = recorder.outcomes
        assert (unsent.result, unsent.attempts, recorder.begun) == (
            StopResult.NOT_SENT,
            0,
            0,
        )
        assert isinstance(outcome.error, BctrlError)
        assert f"{outcome.result}: {outcome.error.summary}".startswith(said)
        assert outcome.attempts == outcome.error.attempts == 1

    @pytest.mark.parametrize("cut", ["abort", "leave", "cancel"])
    async def test_of_a_bulk_stop(
        self, emulator: Emulator, connect: Connect, cut: str
    ) -> None:
        emulator.inject(*[Fault.HANG] * 5)
        async with connect(
            max_connections=3, observer=(recorder := Recorder())
        ) as session:
            batch = session.stop_runtimes(add_runtimes(emulator, 5))
            if cut == "leave":
                async with batch:
                    await wait_for_requests(emulator, 3)
            else:
                running = await started(batch, emulator, 3)
                end = batch.abort if cut == "abort" else running.cancel
                end()
                await asyncio.wait([running])

        assert recorder.begun == 0
        assert recorder.events[-1] == "end StopReport"
        # A stop that was started is observed at its end and as an outcome.
        indexes = sorted(outcome.index for outcome in recorder.outcomes)
        assert indexes == [0, 0, 1, 1, 2, 2, 3, 4]

    # Their coroutines are closed with GeneratorExit. Without a loop, slots cannot be
    # released.
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_of_calls_whose_loop_is_closed(self) -> None:
        recorder = Recorder()

        async def begin(emulator: Emulator) -> list[object]:
            session = BctrlSession(
                "emulator-key", base_url=emulator.url, observer=recorder
            )
            batch = session.stop_runtimes(
                [("ws-1", f"r{number}") for number in range(3)]
            )
            stopping = asyncio.create_task(session.stop_runtime("ws-1", "r3"))
            left = [session, stopping, asyncio.ensure_future(batch)]
            await wait_for_requests(emulator, 4)
            return left

        with emulator_in_a_thread(*[Fault.HANG] * 4) as emulator:
            loop = asyncio.new_event_loop()
            loop.set_exception_handler(lambda *_: None)
            left = loop.run_until_complete(begin(emulator))
            loop.close()
            del left
            gc.collect()
        assert recorder.begun == 0
        assert {outcome.result for outcome in recorder.outcomes} == {StopResult.UNKNOWN}


class TestHeaders:
    async def test_they_are_sent_unless_the_session_or_the_call_has_them(
        self, emulator: Emulator, connect: Connect
    ) -> None:
        sends = {
            "traceparent": "00-1-2-01",
            "user-agent": "recorder",
            "x-team": "recorder",
        }
        async with connect(observer=Recorder(sends)) as session:
            await session.stop_runtime("ws-1", "crm", headers={"X-Team": "blue"})

        headers = emulator.requests[0].headers
        assert headers["traceparent"] == "00-1-2-01"
        assert headers["User-Agent"].startswith("bctrl-async/")
        assert [
            value for name, value in headers.items() if name.lower() == "x-team"
        ] == ["blue"]

    @pytest.mark.parametrize(
        "headers",
        [
            {"Authorization": "Bearer mine"},
            {"X-Split": "a\r\nX-Other: b"},
            ["no mapping"],
        ],
    )
    async def test_invalid_headers_are_left_out_and_logged(
        self,
        emulator: Emulator,
        connect: Connect,
        caplog: Log,
        headers: Mapping[str, str],
    ) -> None:
        async with connect(observer=Recorder(headers)) as session:
            await session.stop_runtime("ws-1", "crm")

        assert emulator.requests[0].headers["Authorization"] == "Bearer emulator-key"
        assert "X-Other" not in emulator.requests[0].headers
        assert [record.levelno for record in caplog.records] == [logging.ERROR]


METHODS = (
    "begin_stop",
    "begin_attempt",
    "headers",
    "answered",
    "raised",
    "end",
    "begin_bulk",
)
OBSERVERS = {
    "no methods": Observer(),
    "cancelled": Faulty("end", asyncio.CancelledError()),
    **{
        name: Faulty(name, LookupError("its own fault"))
        for name in (*METHODS, "begin_call", "outcome")
    },
}


@pytest.mark.parametrize("observer", OBSERVERS.values(), ids=OBSERVERS)
async def test_an_error_of_an_observer_is_logged_and_changes_nothing(
    emulator: Emulator, connect: Connect, caplog: Log, observer: Observer
) -> None:
    emulator.add_runtime("ws-1", "mail")
    async with connect(observer=observer) as session:
        assert (await session.stop_runtime("ws-1", "crm")).alias == "crm"
        assert (await session.get_runtime("ws-1", "crm")).alias == "crm"
        with pytest.raises(BctrlNotFoundError):
            await session.stop_runtime("ws-1", "gone")
        # A canary is a read of its own.
        emulator.inject(Fault.DROP_BEFORE, Fault.DROP_BEFORE, Fault.ACCEPTED)
        report = await session.stop_runtimes(
            [("ws-1", "mail"), ("ws-1", ".."), ("ws-1", "no")]
        )

    assert report.counts == {"stopped": 1, "invalid": 1, "not_found": 1}
    levels = {
        record.levelname for record in caplog.records if record.levelname != "INFO"
    }
    assert levels == ({"ERROR"} if isinstance(observer, Faulty) else set())
    assert "emulator-key" not in caplog.text


class TestStats:
    async def test_attempts_are_counted_by_status_or_error(
        self, emulator: Emulator, session: BctrlSession, pauses: list[float]
    ) -> None:
        before = session.stats
        assert before == SessionStats()
        emulator.inject(Fault.RATE_LIMITED, Reply(503), Fault.DROP_BEFORE)
        await session.stop_runtime("ws-1", "crm")
        with pytest.raises(BctrlError):
            await session.stop_runtime("ws-1", "crm")
        emulator.inject(Reply(200, body="what?"))
        with pytest.raises(BctrlError):
            await session.stop_runtime("ws-1", "crm")

        stats = session.stats
        failed = dict.fromkeys(
            ["429", "503", "BctrlNetworkError", "409", "BctrlResponseError"], 1
        )
        assert stats.failed == failed
        assert (stats.attempts, stats.retries, stats.succeeded, stats.throttled) == (
            6,
            3,
            1,
            2,
        )
        assert len(pauses) == 3
        assert before == SessionStats()
        assert msgspec.json.decode(msgspec.json.encode(stats))["failed"] == failed

    async def test_calls_in_flight_are_counted(
        self, emulator: Emulator, connect: Connect
    ) -> None:
        emulator.inject(*[Fault.HANG] * 5)
        async with connect(max_connections=2) as session:
            calls = [
                asyncio.create_task(session.stop_runtime("ws-1", "crm"))
                for _ in range(5)
            ]
            await wait_for_requests(emulator, 2)
            assert (session.stats.in_flight, session.stats.waiting) == (2, 3)

            calls[4].cancel()
            assert session.stats.waiting == 2

            for call in calls:
                call.cancel()
            await asyncio.wait(calls)
            # Those that waited had not started an attempt.
            assert session.stats == SessionStats(attempts=2, cancelled=2)

    async def test_a_call_that_backs_off_waits(
        self, emulator: Emulator, connect: Connect
    ) -> None:
        emulator.inject(Fault.SERVER_ERROR)
        async with connect(retry=RetryPolicy(base=1000.0, cap=1000.0)) as session:
            call = asyncio.create_task(session.stop_runtime("ws-1", "crm"))
            await until(lambda: session.stats.failed)
            assert (session.stats.in_flight, session.stats.waiting) == (0, 1)
            call.cancel()
            await asyncio.wait([call])
            assert session.stats.cancelled == 0
