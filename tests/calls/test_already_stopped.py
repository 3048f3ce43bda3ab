"""`stop_runtime` for a runtime that is not running, also with `stopped_ok`."""

from __future__ import annotations

import pytest
from support.helpers import Connect
from support.runtimes import RUNTIME, Name
from support.servers import answering, http_answer, served
from test_observer import Recorder

from bctrl_async import (
    BctrlConflictError,
    BctrlServerError,
    BctrlSession,
    RetryPolicy,
    RuntimeStatus,
    StopResult,
)
from bctrl_async.emulator import Emulator, Fault, Reply

NOT_ACTIVE = http_answer(
    "409 Conflict", b'{"code": "runtime.not_active", "error": "Not active."}'
)


def methods(emulator: Emulator) -> list[str]:
    return [request.method for request in emulator.requests]


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


class TestLostAnswer:
    """Fault: a call raised a conflict for what its own lost attempt had done."""

    @pytest.fixture(autouse=True)
    def _lose_the_answer(self, emulator: Emulator) -> None:
        emulator.inject(Fault.DROP_AFTER)

    async def test_the_runtime_is_returned(
        self, connect: Connect, recorder: Recorder
    ) -> None:
        """Fault: the GET after a 409 was sent to `/workspaces/Name.WORKSPACE/`."""
        async with connect(observer=recorder) as session:
            runtime = await session.stop_runtime(Name.WORKSPACE, Name.ALIAS)

        assert (runtime.alias, runtime.status) == ("crm", RuntimeStatus.STOPPED)
        path = "/v1/workspaces/ws-1/runtimes/crm"
        assert recorder.events == [
            "stop ws-1 crm",
            f"attempt 1 POST {path}/stop",
            "end BctrlNetworkError",
            f"attempt 2 POST {path}/stop",
            "answered 409",
            "end BctrlConflictError",
            f"attempt 1 GET {path}",
            "answered 200",
            "end",
            "end StopOutcome",
        ]
        [outcome] = recorder.outcomes
        assert (outcome.result, outcome.attempts) == (StopResult.ALREADY_STOPPED, 2)
        assert outcome.runtime is runtime
        assert (outcome.ok, outcome.error) == (True, None)

    async def test_if_the_runtime_cannot_be_had_the_conflict_is_raised_with_the_reason(
        self, emulator: Emulator, connect: Connect, recorder: Recorder
    ) -> None:
        emulator.inject(*[Fault.SERVER_ERROR] * 4, method="GET")
        async with connect(observer=recorder) as session:
            with pytest.raises(BctrlConflictError) as caught:
                await session.stop_runtime("ws-1", "crm")

        error = caught.value
        assert (error.already_stopped, error.may_have_stopped, error.attempts) == (
            True,
            True,
            2,
        )
        [earlier] = error.__notes__
        assert earlier.startswith("attempt 1: ")
        assert isinstance(error.__cause__, BctrlServerError)
        assert (error.__cause__.operation, error.__cause__.attempts) == ("get", 4)
        [outcome] = recorder.outcomes
        assert (outcome.result, outcome.attempts) == (StopResult.ALREADY_STOPPED, 2)
        assert (outcome.runtime, outcome.ok, outcome.error) == (None, True, None)


async def test_a_runtime_that_was_started_anew_is_returned_as_active() -> None:
    active = http_answer("200 OK", RUNTIME.replace(b"stopped", b"active"))
    answers = answering(http_answer("502 X"), NOT_ACTIVE, active)
    async with served(answers, retry=RetryPolicy(base=0.001)) as session:
        runtime = await session.stop_runtime("ws-1", "crm")
    assert runtime.status is RuntimeStatus.ACTIVE


async def test_what_did_not_run_is_a_conflict(
    emulator: Emulator, session: BctrlSession
) -> None:
    emulator.add_runtime("ws-1", "mail", status="stopped")
    emulator.inject(Fault.RATE_LIMITED)  # Nothing was done, so there is no doubt.

    with pytest.raises(BctrlConflictError) as caught:
        await session.stop_runtime("ws-1", "mail")

    assert caught.value.already_stopped
    assert not caught.value.may_have_stopped
    assert methods(emulator) == ["POST", "POST"]


async def test_with_stopped_ok_a_get_returns_it(
    emulator: Emulator, session: BctrlSession
) -> None:
    emulator.add_runtime("ws-1", "mail", status="stopped")

    headers = {"X-Team": "blue", "idempotency-key": "once-7"}
    runtime = await session.stop_runtime(
        "ws-1", "mail", headers=headers, stopped_ok=True
    )

    assert (runtime.alias, runtime.status) == ("mail", RuntimeStatus.STOPPED)
    assert methods(emulator) == ["POST", "GET"]
    [stop, get] = emulator.requests
    assert (stop.headers["X-Team"], stop.headers["Idempotency-Key"]) == (
        "blue",
        "once-7",
    )
    assert get.headers["X-Team"] == "blue"
    assert "Idempotency-Key" not in get.headers


async def test_with_stopped_ok_any_other_conflict_is_raised_without_another_request(
    emulator: Emulator, session: BctrlSession
) -> None:
    emulator.inject(Reply(409, code="runtime.busy"))
    with pytest.raises(BctrlConflictError, match=r"runtime\.busy"):
        await session.stop_runtime("ws-1", "crm", stopped_ok=True)
    assert methods(emulator) == ["POST"]
