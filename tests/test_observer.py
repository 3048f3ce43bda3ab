"""Observers: notified of every call and attempt, and unable to disturb any."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, cast

import pytest
from helpers import Connect, add_runtimes, wait_for_requests

from bctrl_async import (
    Attempt,
    AttemptObserver,
    BctrlConfigError,
    BctrlError,
    BctrlNotFoundError,
    BctrlResponseError,
    BctrlSession,
    BulkObserver,
    CallObserver,
    Observer,
    RetryPolicy,
    Runtime,
    StopObserver,
    StopOutcome,
    StopReport,
    StopResult,
)
from bctrl_async.emulator import Emulator, Fault, Reply


class Recorder(Observer, BulkObserver, StopObserver, CallObserver, AttemptObserver):
    """Records every event, and observes all calls, stops, reads and attempts itself."""

    def __init__(self, sends: Mapping[str, str] | None = None) -> None:
        self.events: list[str] = []
        self.outcomes: list[StopOutcome] = []
        self.begun = 0
        self._sends = sends or {}

    def begin_bulk(self) -> BulkObserver:
        self.begun += 1
        self.events.append("bulk")
        return self

    def begin_stop(self, workspace_id: str, alias: str) -> StopObserver:
        self.begun += 1
        self.events.append(f"stop {workspace_id} {alias}")
        return self

    def begin_call(self, operation: str, workspace_id: str, alias: str | None) -> CallObserver:
        self.begun += 1
        self.events.append(f"{operation} {workspace_id} {alias}")
        return self

    def begin_attempt(self, attempt: Attempt) -> AttemptObserver:
        self.begun += 1
        self.events.append(f"attempt {attempt.number} {attempt.method} {attempt.url.path}")
        return self

    def headers(self) -> Mapping[str, str]:
        return self._sends

    def answered(self, status: int) -> None:
        self.events.append(f"answered {status}")

    def outcome(self, outcome: StopOutcome) -> None:
        self.outcomes.append(outcome)

    def end(self, ended: BaseException | StopOutcome | StopReport | None) -> None:
        self.begun -= 1
        self.events.append("end" if ended is None else f"end {type(ended).__name__}")
        if isinstance(ended, StopOutcome):
            self.outcomes.append(ended)


class Faulty(Recorder):
    """A recorder of which one method raises."""

    def __init__(self, method: str, error: BaseException) -> None:
        super().__init__()
        self._method, self._error = method, error

    def __getattribute__(self, name: str) -> Any:  # noqa: ANN401 - any attribute.
        own = object.__getattribute__(self, "__dict__")
        return self._fail if name == own.get("_method") else super().__getattribute__(name)

    def _fail(self, *_: object) -> None:
        raise self._error


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
async def session(connect: Connect, recorder: Recorder) -> AsyncIterator[BctrlSession]:
    """A session whose calls the recorder observes."""
    async with connect(observer=recorder) as opened:
        yield opened


LIST = "/v1/workspaces/ws-1/runtimes"
GET = f"{LIST}/crm"
STOP = f"{GET}/stop"


async def test_each_attempt_of_a_stop_is_observed(
    emulator: Emulator, session: BctrlSession, recorder: Recorder
) -> None:
    emulator.inject(Fault.SERVER_ERROR)
    await session.stop_runtime("ws-1", "crm")

    assert recorder.events == [
        "stop ws-1 crm",
        f"attempt 1 POST {STOP}",
        "answered 500",
        "end BctrlServerError",
        f"attempt 2 POST {STOP}",
        "answered 200",
        "end",
        "end StopOutcome",
    ]
    [outcome] = recorder.outcomes
    assert outcome.elapsed > 0
    assert (outcome.result, outcome.attempts, outcome.error) == (StopResult.STOPPED, 2, None)
    assert outcome.runtime is not None


async def test_get_and_list_are_observed(emulator: Emulator, connect: Connect) -> None:
    emulator.inject(Fault.SERVER_ERROR, method="GET")
    recorder = Recorder({"traceparent": "00-1-2-01"})
    async with connect(observer=recorder) as session:
        await session.get_runtime("ws-1", "crm")
        with pytest.raises(BctrlNotFoundError):
            await session.list_runtimes("nowhere")
        with pytest.raises(BctrlConfigError):
            await session.get_runtime("ws-1", "..")

    assert recorder.events == [
        "get ws-1 crm",
        f"attempt 1 GET {GET}",
        "answered 500",
        "end BctrlServerError",
        f"attempt 2 GET {GET}",
        "answered 200",
        "end",
        "end",
        "list nowhere None",
        "attempt 1 GET /v1/workspaces/nowhere/runtimes",
        "answered 404",
        "end BctrlNotFoundError",
        "end BctrlNotFoundError",
        "get ws-1 ..",
        "end BctrlConfigError",
    ]
    assert all(request.headers["traceparent"] == "00-1-2-01" for request in emulator.requests)


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

    assert recorder.events[1:3] == ["key", f"attempt 1 POST {STOP}"]
    assert recorder.events[-3:] == ["get ws-1 crm", "key", "end BctrlConfigError"]
    assert (caught.value.attempts, recorder.outcomes[0].attempts) == (0, 1)


async def test_a_list_that_cannot_be_parsed_ends_with_its_error(
    emulator: Emulator, session: BctrlSession, recorder: Recorder
) -> None:
    emulator.add_runtime("ws-1", "odd")
    emulator.runtimes["ws-1", "odd"]["id"] = "no UUID"
    with pytest.raises(BctrlResponseError):
        await session.list_runtimes("ws-1")
    assert recorder.events[-1] == "end BctrlResponseError"
    await session.list_runtimes("ws-1", on_unreadable=str)
    assert recorder.events[-1] == "end"


async def test_a_cancelled_read_is_observed_to_end(
    emulator: Emulator, session: BctrlSession, recorder: Recorder
) -> None:
    emulator.inject(Fault.HANG, method="GET")
    reading = asyncio.create_task(session.list_runtimes("ws-1"))
    await wait_for_requests(emulator, 1)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)

    assert recorder.events[-2:] == ["end CancelledError"] * 2
    assert recorder.begun == 0


async def test_an_observer_without_methods_changes_nothing(
    emulator: Emulator, connect: Connect
) -> None:
    async with connect(observer=Observer()) as session:
        assert len(await session.list_runtimes("ws-1")) == 1
        # A canary is a read of its own.
        emulator.inject(Fault.DROP_BEFORE, Fault.DROP_BEFORE, Fault.ACCEPTED)
        report = await session.stop_runtimes([("ws-1", "crm")], verify=True)
        assert report.counts == {StopResult.STOPPED: 1}
        emulator.add_runtime("ws-1", "crm")
        await session.stop_runtime("ws-1", "crm")


@pytest.mark.parametrize(
    ("alias", "result", "attempts"),
    [
        ("..", StopResult.REJECTED, 0),
        ("missing", StopResult.NOT_FOUND, 1),
        # It no longer runs, which is no error of its outcome.
        ("done", StopResult.ALREADY_STOPPED, 1),
    ],
)
async def test_the_error_observed_is_the_one_raised(  # noqa: PLR0917 - a table.
    emulator: Emulator,
    session: BctrlSession,
    recorder: Recorder,
    alias: str,
    result: StopResult,
    attempts: int,
) -> None:
    emulator.add_runtime("ws-1", "done", status="stopped")
    with pytest.raises(BctrlError) as caught:
        await session.stop_runtime("ws-1", alias)

    [outcome] = recorder.outcomes
    assert (outcome.result, outcome.attempts, recorder.begun) == (result, attempts, 0)
    assert outcome.ok is (alias == "done")
    assert outcome.error is (None if outcome.ok else caught.value)


@pytest.mark.parametrize(
    ("fault", "result", "words"),
    [
        (Fault.HANG, StopResult.UNKNOWN, "aborted before an answer: CancelledError"),
        (
            Reply(503, headers={"Retry-After": "30"}),
            StopResult.REJECTED,
            (
                "aborted before it was sent again: CancelledError; before that, the server "
                "answered 503 server.unavailable: Service Unavailable"
            ),
        ),
    ],
)
async def test_the_end_of_a_cancelled_stop_is_observed(
    emulator: Emulator, connect: Connect, fault: Fault | Reply, result: StopResult, words: str
) -> None:
    recorder = Recorder()
    emulator.inject(fault)
    retry = RetryPolicy(base=1000.0, cap=1000.0)
    async with connect(observer=recorder, max_connections=1, retry=retry) as session:
        stopping = asyncio.create_task(session.stop_runtime("ws-1", "crm"))
        await wait_for_requests(emulator, 1)
        while isinstance(fault, Reply) and not session.stats.waiting:
            await asyncio.sleep(0)
        queued = asyncio.create_task(session.stop_runtime("ws-1", "mail"))
        await asyncio.sleep(0)
        for task in (queued, stopping):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    unsent, outcome = recorder.outcomes
    assert (unsent.result, unsent.attempts, recorder.begun) == (StopResult.NOT_SENT, 0, 0)
    assert isinstance(outcome.error, BctrlError)
    assert (outcome.error.summary, outcome.result) == (words, result)
    assert outcome.attempts == outcome.error.attempts == 1


# Their coroutines are closed with GeneratorExit. Without a loop, slots cannot be released.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_calls_of_a_closed_loop_are_observed_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(connected: Callable[[], object]) -> Runtime:
        connected()
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    monkeypatch.setattr(
        "bctrl_async._http.transport.send_once",
        lambda _, __, call, *___, **____: never(call.on_connection),
    )
    recorder = Recorder()

    async def begin() -> list[object]:
        session = BctrlSession("key", observer=recorder)
        batch = session.stop_runtimes([("ws-1", f"r{number}") for number in range(3)])
        left = [asyncio.ensure_future(batch), asyncio.create_task(session.stop_runtime("ws", "a"))]
        while recorder.begun < 9:
            await asyncio.sleep(0)
        return [session, *left]

    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)
    left = loop.run_until_complete(begin())
    loop.close()
    del left
    gc.collect()

    assert recorder.begun == 0
    assert {outcome.result for outcome in recorder.outcomes} == {StopResult.UNKNOWN}


class TestBulk:
    async def test_each_stop_the_run_and_every_outcome_are_observed_once(
        self, session: BctrlSession, recorder: Recorder
    ) -> None:
        await session.stop_runtimes([("ws-1", "crm"), ("ws-1", ".."), cast("Any", 7)])

        assert recorder.events[0] == "bulk"
        assert recorder.events[-1] == "end StopReport"
        assert [page for page in recorder.events if page.startswith("stop ")] == ["stop ws-1 crm"]
        # A stop that was begun is observed at its end and as an outcome.
        assert sorted(outcome.index for outcome in recorder.outcomes) == [0, 0, 1, 2]
        assert recorder.begun == 0

    @pytest.mark.parametrize("cut", ["abort", "leave", "cancel"])
    async def test_everything_ends_however_the_run_ends_early(
        self, emulator: Emulator, connect: Connect, cut: str
    ) -> None:
        recorder = Recorder()
        emulator.inject(*[Fault.HANG] * 5)
        targets = add_runtimes(emulator, 5)
        async with connect(observer=recorder, max_connections=3) as session:
            if cut == "cancel":
                task = asyncio.ensure_future(session.stop_runtimes(targets))
                await wait_for_requests(emulator, 3)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            else:
                async with session.stop_runtimes(targets) as batch:
                    await wait_for_requests(emulator, 3)
                    if cut == "abort":
                        batch.abort()
                        assert len([outcome async for outcome in batch]) == 5

        assert recorder.begun == 0
        assert recorder.events[-1] == "end StopReport"
        assert {outcome.index for outcome in recorder.outcomes} == {0, 1, 2, 3, 4}


class TestHeaders:
    async def test_they_are_sent_unless_the_session_or_the_call_has_them(
        self, emulator: Emulator, connect: Connect
    ) -> None:
        sends = {"traceparent": "00-1-2-01", "user-agent": "recorder", "x-team": "recorder"}
        async with connect(observer=Recorder(sends)) as session:
            await session.stop_runtime("ws-1", "crm", headers={"X-Team": "blue"})

        headers = emulator.requests[0].headers
        assert headers["traceparent"] == "00-1-2-01"
        assert headers["User-Agent"].startswith("bctrl-async/")
        assert [value for name, value in headers.items() if name.lower() == "x-team"] == ["blue"]

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
        caplog: pytest.LogCaptureFixture,
        headers: Mapping[str, str],
    ) -> None:
        async with connect(observer=Recorder(headers)) as session:
            await session.stop_runtime("ws-1", "crm")

        assert emulator.requests[0].headers["Authorization"] == "Bearer emulator-key"
        assert "X-Other" not in emulator.requests[0].headers
        assert [record.levelno for record in caplog.records] == [logging.ERROR]


METHODS = ("begin_stop", "begin_attempt", "headers", "answered", "end", "begin_bulk", "begin_call")


@pytest.mark.parametrize("error", [LookupError("its own fault"), asyncio.CancelledError()])
@pytest.mark.parametrize("method", [*METHODS, "outcome"])
async def test_an_error_of_an_observer_is_logged_and_changes_nothing(
    emulator: Emulator,
    connect: Connect,
    caplog: pytest.LogCaptureFixture,
    method: str,
    error: BaseException,
) -> None:
    emulator.add_runtime("ws-1", "mail")
    async with connect(observer=Faulty(method, error)) as session:
        assert (await session.stop_runtime("ws-1", "crm")).alias == "crm"
        assert (await session.get_runtime("ws-1", "crm")).alias == "crm"
        report = await session.stop_runtimes([("ws-1", "mail"), ("ws-1", ".."), ("ws-1", "no")])

    assert report.counts == dict.fromkeys(
        [StopResult.STOPPED, StopResult.REJECTED, StopResult.NOT_FOUND], 1
    )
    assert caplog.records
    assert {record.levelno for record in caplog.records} == {logging.ERROR}
    assert "emulator-key" not in caplog.text
