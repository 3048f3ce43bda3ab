"""The operations of the API: each one's effect, errors and retries."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
from support.helpers import Connect
from support.runtimes import RUNTIME, Name
from support.servers import http_answer, served
from test_observer import Recorder
from test_wire import ONCE
from yarl import URL

from bctrl_async import (
    Attempt,
    BctrlError,
    BctrlSession,
    RetryPolicy,
)
from bctrl_async._calls.call import Call
from bctrl_async._http import request as operations
from bctrl_async._http.request import Operation
from bctrl_async._http.response import decode_runtime
from bctrl_async._kinds import Failure, Kind, Repeat
from bctrl_async.emulator import Emulator, Reply

AnyOperation = Operation[Any]
ALL: dict[str, AnyOperation] = {
    found.name: found
    for found in vars(operations).values()
    if isinstance(found, Operation)
}


class Facts(NamedTuple):
    """The facts about an operation in the API's contract."""

    method: str
    template: str
    repeat: Repeat
    stops: bool
    status: str = "active"
    """The status of an active runtime after it; each effect has another."""


LIST = "/v1/workspaces/{id}/runtimes"
FACTS = {
    "stop": Facts(
        "POST", f"{LIST}/{{alias}}/stop", Repeat.CONVERGES, stops=True, status="stopped"
    ),
    "get": Facts("GET", f"{LIST}/{{alias}}", Repeat.READ, stops=False),
    "list": Facts("GET", LIST, Repeat.READ, stops=False),
}
"""A new operation needs a row here, and a word in `docs/contract/`."""


CONTRACT = Path(__file__).parents[2] / "docs/contract"
_ADVICE = (
    "write in FACTS what the contract (docs/contract/) says of a second {}: READ if it "
    "has no effect, CONVERGES if two are as good as one, else ONCE; write the same in "
    "its Operation"
)


def facts_of(name: str) -> Facts:
    assert name in FACTS, _ADVICE.format(name)
    return FACTS[name]


START: AnyOperation = Operation(
    name="start",
    method="POST",
    suffix="/start",
    repeat=Repeat.ONCE,
    parse=decode_runtime,
)
"""An operation that the API does not have: starting twice is not starting once."""

every_operation = pytest.mark.parametrize(
    "operation", [*ALL.values(), START], ids=lambda operation: operation.name
)
AGAIN = RetryPolicy(attempts=2, base=0.001, cap=0.001)
BUSY = http_answer("409 Conflict", b'{"code": "runtime.busy"}')


def call_of(
    session: BctrlSession, operation: AnyOperation, policy: RetryPolicy = ONCE
) -> Call[Any]:
    alias = None if operation.suffix is None else "crm"
    return session._make_call(operation, session._timeout, "ws-1", alias, policy=policy)


async def failure(operation: AnyOperation, first: bytes) -> tuple[BctrlError, int]:
    """Make a call; return its error and the number of requests.

    Args:
        operation: Its operation.
        first: The answer to the first request; without bytes, the connection is closed.
    """
    requests = 0

    async def handle(_: bytes, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        requests += 1
        writer.write(first if requests == 1 else BUSY)
        if not first:
            writer.close()

    async with served(handle) as session:
        with pytest.raises(BctrlError) as caught:
            await session._sender.call(call_of(session, operation, AGAIN))
    return caught.value, requests


FAILURES = {
    "no answer": (b"", True),
    "500": (http_answer("500 X"), True),
    "the 503 of a gateway": (http_answer("503 X"), True),
    "429": (http_answer("429 X"), False),
    "503": (http_answer("503 X", b'{"code": "server.busy"}'), False),
}
"""Answers to a first request, and whether it may have taken effect."""


@every_operation
@pytest.mark.parametrize(("first", "in_doubt"), FAILURES.values(), ids=FAILURES)
async def test_a_request_is_sent_again_if_it_did_nothing_or_if_that_does_no_harm(
    operation: AnyOperation, first: bytes, *, in_doubt: bool
) -> None:
    error, requests = await failure(operation, first)

    is_repeated = operation.repeat is not Repeat.ONCE or not in_doubt
    assert requests == 1 + is_repeated
    # aiohttp itself sends a GET again.
    assert error.attempts == requests or operation.method == "GET"
    assert error.may_have_worked is (operation.repeat is not Repeat.READ and in_doubt)
    assert error.may_have_stopped is (operation.stops and in_doubt)
    assert ("the runtime may have stopped" in str(error)) is error.may_have_stopped
    advice = f"The {operation.name} may have worked: look before repeating it"
    assert str(error).endswith(advice) is not is_repeated


async def test_an_observer_of_an_attempt_reads_the_same_advice(
    connect: Connect,
) -> None:
    """Fault: it read that retrying a start was safe, after its answer was lost."""
    lost = Failure(kind=Kind.LOST, summary="the connection broke")
    async with connect() as session:
        call = call_of(session, START)
    assert "look before repeating it" in str(call.attempt_error(lost))


@every_operation
async def test_an_unreadable_answer_is_not_asked_for_again(
    operation: AnyOperation,
) -> None:
    error, requests = await failure(operation, http_answer("200 OK"))

    assert (requests, error.status) == (1, 200)
    assert error.accepted is operation.stops
    assert error.may_have_stopped is operation.stops
    assert ("may have worked" in str(error)) is (operation.repeat is Repeat.ONCE)


@every_operation
async def test_a_408_of_the_api_is_not_sent_again_if_its_effect_may_happen_twice(
    operation: AnyOperation,
) -> None:
    """Fault: a pause was sent twice after it.

    RFC 9110, section 15.5.9, lets a client repeat the request.
    """
    error, requests = await failure(
        operation, http_answer("408 X", b'{"code": "request.timeout"}')
    )

    is_once = operation.repeat is Repeat.ONCE
    assert requests == 2 - is_once
    assert error.may_have_worked is is_once
    assert ("may have worked: look before" in str(error)) is is_once


@every_operation
async def test_only_a_stop_has_nothing_to_do(
    operation: AnyOperation, connect: Connect
) -> None:
    failure = Failure(
        kind=Kind.NOT_RUNNING, summary="409", status=409, code="runtime.not_active"
    )
    async with connect() as session:
        error = call_of(session, operation).error(failure)
    assert ("Nothing to do: it is not running" in str(error)) is operation.stops


@every_operation
@pytest.mark.parametrize("connected", [True, False])
async def test_the_error_of_an_aborted_call_advises_the_same(
    operation: AnyOperation, *, connected: bool, connect: Connect
) -> None:
    """Fault: a stop that was never sent was called safe to repeat, or "Stop it"."""
    async with connect() as session:
        call = call_of(session, operation)
    call.attempts, call.in_flight, call.is_connected = 1, True, connected
    error = call.error(call.aborted("the run has ended"))
    is_safe = operation.repeat is not Repeat.ONCE or not connected
    assert ("Try again: nothing was sent" in str(error)) is not connected
    assert (f"a {operation.name} is safe to repeat" in str(error)) is (
        is_safe and connected
    )
    assert ("may have worked" in str(error)) is not is_safe
    assert error.may_have_stopped is (operation.stops and connected)


Make = Callable[[BctrlSession], Awaitable[object]]
CALLS: dict[str, Make] = {
    "stop": lambda session: session.stop_runtime(Name.WORKSPACE, Name.ALIAS),
    "get": lambda session: session.get_runtime(Name.WORKSPACE, Name.ALIAS),
    "list": lambda session: session.list_runtimes(Name.WORKSPACE),
}


@pytest.mark.parametrize(
    "call", [*CALLS.values(), lambda session: session.stop_workspace(Name.WORKSPACE)]
)
async def test_an_error_shows_the_value_of_a_member_of_an_enum(
    emulator: Emulator, session: BctrlSession, call: Make
) -> None:
    emulator.inject(Reply(403))
    emulator.inject(Reply(403), method="GET")
    with pytest.raises(BctrlError) as caught:
        await call(session)

    assert (type(caught.value.workspace_id), caught.value.workspace_id) == (str, "ws-1")
    assert "Name." not in str(caught.value)


@pytest.mark.parametrize("name", ALL)
async def test_an_observer_and_the_emulator_know_the_operation_of_an_attempt(
    name: str, emulator: Emulator, connect: Connect
) -> None:
    recorder, facts = Recorder(), facts_of(name)
    path = facts.template.format(id="ws-1", alias="crm")
    with patch.object(recorder, "begin_attempt", wraps=recorder.begin_attempt) as begin:
        async with connect(observer=recorder) as session:
            await CALLS[name](session)

    assert recorder.events, f"observe the call of {name}"
    assert recorder.events[0].startswith(f"{name} "), "observe it by its own name"
    assert recorder.events[-1].startswith("end StopOutcome" if facts.stops else "end")
    assert not [event for event in recorder.events if "Name." in event]
    begin.assert_called_once_with(
        Attempt(
            number=1,
            operation=name,
            stops=facts.stops,
            method=facts.method,
            url=URL(f"{emulator.url}{path}"),
            template=facts.template,
        )
    )
    # The emulator imports nothing of the client, so nothing else keeps the two
    # together.
    assert [request.operation for request in emulator.requests] == [name]
    assert emulator.status("ws-1", "crm") == facts.status
    assert ALL[name].stops is facts.stops


@pytest.mark.parametrize("name", ALL)
def test_the_contract_says_what_a_request_does_that_arrives_twice(name: str) -> None:
    """Fault: a pause without an answer was sent again, and called safe."""
    facts = facts_of(name)

    assert ALL[name].repeat is facts.repeat, _ADVICE.format(name)
    # A read is a GET (RFC 9110 section 9.2.1), and what is no read has an effect in the
    # emulator.
    is_read = facts.repeat is Repeat.READ
    assert is_read is (facts.method == "GET") is (facts.status == "active"), (
        _ADVICE.format(name)
    )
    contract = "".join(path.read_text("utf-8") for path in CONTRACT.iterdir())
    assert facts.template in contract, (
        f"say in docs/contract/ where {name} is documented"
    )


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("status", ["200 OK", "200 Unreadable", "403 No"])
async def test_a_call_has_the_request_id_of_its_last_answer(
    name: str, status: str
) -> None:
    body = (
        {"list": b'{"runtimes": []}'}.get(name, RUNTIME) if status == "200 OK" else b"?"
    )
    async with served(
        http_answer(status, body, "X-Bctrl-Request-Id: req-7")
    ) as session:
        call = call_of(session, ALL[name])
        ended: list[object] = await asyncio.gather(
            session._sender.request(call), return_exceptions=True
        )
    assert call.request_id == "req-7"
    assert not isinstance(ended[0], BctrlError) or ended[0].request_id == "req-7"
