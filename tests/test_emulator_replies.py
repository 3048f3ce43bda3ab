"""Answers that a test gives to the emulator."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import cast

import aiohttp
import pytest
from helpers import BOUND, Connect

from bctrl_async import (
    BctrlPermissionError,
    BctrlResponseError,
    BctrlSession,
    BctrlValidationError,
    RetryPolicy,
    StopResult,
)
from bctrl_async.emulator import Emulator, Fault, Reply

STOP = "/v1/workspaces/ws-1/runtimes/crm/stop"
GET = "/v1/workspaces/ws-1/runtimes/crm"
LIST = "/v1/workspaces/ws-1/runtimes"


@pytest.fixture
async def client(emulator: Emulator) -> AsyncIterator[aiohttp.ClientSession]:
    headers = {"Authorization": "Bearer emulator-key"}
    async with aiohttp.ClientSession(emulator.url, headers=headers) as client:
        yield client


async def post(client: aiohttp.ClientSession) -> tuple[aiohttp.ClientResponse, bytes]:
    async with client.post(STOP, allow_redirects=False) as response:
        return response, await response.read()


async def post_json(client: aiohttp.ClientSession) -> dict[str, object]:
    _, body = await post(client)
    return cast("dict[str, object]", json.loads(body))


# What the client receives.


async def test_an_error_has_the_given_fields_and_stops_nothing(
    emulator: Emulator, client: aiohttp.ClientSession
) -> None:
    emulator.inject(
        Reply(403, code="plan.expired", message="Renew.", reason_class="billing", hint="Pay.")
    )
    response, body = await post(client)
    assert response.status == 403
    assert json.loads(body) == {
        "code": "plan.expired",
        "error": "Renew.",
        "reasonClass": "billing",
        "requestId": response.headers["x-request-id"],
        "hint": "Pay.",
    }
    assert emulator.status("ws-1", "crm") == "active"


@pytest.mark.parametrize(
    "expected",
    [
        (400, "request.invalid", "invalid_input", "Bad Request"),
        (401, "auth.required", "unauthorized", "Unauthorized"),
        (403, "auth.forbidden", "capability_denied", "Forbidden"),
        (404, "runtime.not_found", "not_found", "Not Found"),
        (409, "runtime.not_active", "conflict", "Conflict"),
        (429, "rate.limited", "rate_limited", "Too Many Requests"),
        (500, "server.error", "server", "Internal Server Error"),
        (503, "server.unavailable", "upstream", "Service Unavailable"),
        (520, "server.error", "server", "Error 520"),
    ],
)
async def test_a_bare_status_has_the_documented_error(
    emulator: Emulator,
    client: aiohttp.ClientSession,
    expected: tuple[int, str, str, str],
) -> None:
    emulator.inject(Reply(expected[0]), Reply(expected[0], code="", message="", hint=""))
    for _ in range(2):
        response, body = await post(client)
        error = json.loads(body)
        received = (response.status, error["code"], error["reasonClass"], error["error"])
        assert received == expected
        assert "hint" not in error


async def test_headers_replace_the_usual_ones_of_any_case(
    emulator: Emulator, client: aiohttp.ClientSession
) -> None:
    emulator.inject(Reply(429, headers={"Retry-After": "7", "X-Request-ID": "mine"}))
    response, _ = await post(client)
    assert response.headers["Retry-After"] == "7"
    assert response.headers.getall("x-request-id") == ["mine"]


@pytest.mark.parametrize(
    ("reply", "body", "content_type"),
    [
        (
            Reply(502, body="<h1>Bad</h1>", headers={"content-type": "text/html"}),
            b"<h1>Bad</h1>",
            "text/html",
        ),
        (Reply(502, body="é"), "é".encode(), "text/plain; charset=utf-8"),
        (Reply(200, body=b"\xff\x00"), b"\xff\x00", "text/plain; charset=utf-8"),
        (Reply(200, body=""), b"", "text/plain; charset=utf-8"),
        (Reply(418, body={"why": "é"}), '{"why":"é"}'.encode(), "application/json"),
        (
            Reply(400, body=[], headers={"Content-Type": "application/problem+json"}),
            b"[]",
            "application/problem+json",
        ),
    ],
)
async def test_a_body_is_sent_as_given(
    emulator: Emulator,
    client: aiohttp.ClientSession,
    reply: Reply,
    body: bytes,
    content_type: str,
) -> None:
    emulator.inject(reply)
    response, received = await post(client)
    assert (response.status, received) == (reply.status, body)
    assert response.headers["Content-Type"] == content_type


@pytest.mark.parametrize("status", [204, 205, 302, 304])
async def test_a_status_without_a_usual_body_has_none(
    emulator: Emulator, client: aiohttp.ClientSession, status: int
) -> None:
    emulator.inject(Reply(status), None)
    response, body = await post(client)
    assert (response.status, body) == (status, b"")
    # The connection is still of use.
    assert (await post(client))[0].status == (200 if status >= 300 else 409)


async def test_a_2xx_has_the_body_of_a_normal_response(
    emulator: Emulator, client: aiohttp.ClientSession
) -> None:
    emulator.inject(Reply(202, headers={"x-request-id": "mine"}))
    response, body = await post(client)
    assert response.status == 202
    assert response.headers["x-request-id"] == "mine"
    assert json.loads(body) == emulator.runtimes["ws-1", "crm"]


@pytest.mark.parametrize("path", [GET, LIST])
async def test_a_read_can_be_answered_too(
    emulator: Emulator, client: aiohttp.ClientSession, path: str
) -> None:
    emulator.inject(Reply(403), Reply(200), method="GET")
    statuses = []
    for _ in range(2):
        async with client.get(path) as response:
            statuses.append(response.status)
            body = await response.json()
    assert statuses == [403, 200]
    assert body.get("alias", "list") in {"crm", "list"}
    assert emulator.status("ws-1", "crm") == "active"


# What it does.


@pytest.mark.parametrize(
    ("reply", "status"),
    [
        (Reply(200), "stopped"),
        (Reply(200, takes_effect=False), "active"),
        (Reply(302), "active"),
        (Reply(500), "active"),
        (Reply(500, takes_effect=True), "stopped"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.status} {value.takes_effect}",
)
async def test_the_stop_takes_effect_if_the_reply_says_so(
    emulator: Emulator, client: aiohttp.ClientSession, reply: Reply, status: str
) -> None:
    emulator.inject(reply)
    await post(client)
    assert emulator.status("ws-1", "crm") == status
    assert reply.takes_effect is (status == "stopped")


async def test_replies_and_faults_share_a_queue(
    emulator: Emulator, client: aiohttp.ClientSession
) -> None:
    reply = Reply(418)
    emulator.inject(reply, Fault.RATE_LIMITED, None)
    assert [(await post(client))[0].status for _ in range(3)] == [418, 429, 200]
    assert [request.fault for request in emulator.requests] == [reply, Fault.RATE_LIMITED, None]


async def test_a_poisoned_runtime_gives_its_reply_until_it_is_cleared(
    emulator: Emulator, client: aiohttp.ClientSession
) -> None:
    emulator.poison("ws-1", "crm", Reply(403))
    assert [(await post(client))[0].status for _ in range(2)] == [403, 403]
    emulator.poison("ws-1", "crm", None)
    assert (await post(client))[0].status == 200


def test_a_reply_can_be_compared_and_be_in_a_set() -> None:
    assert {Reply(200, body={}), Reply(200, body={})} == {Reply(200, body={})}
    reply = Reply(429, headers={"Retry-After": "1"}, code="a.b")
    assert {reply, Reply(429, headers={"Retry-After": "1"}, code="a.b")} == {reply}
    assert reply != Reply(429, headers={"Retry-After": "2"}, code="a.b")


# What the session makes of it.


async def test_the_session_raises_the_error_that_was_injected(
    emulator: Emulator, session: BctrlSession
) -> None:
    emulator.inject(Reply(403, code="plan.expired", message="Renew.", hint="Pay."))
    with pytest.raises(BctrlPermissionError) as caught:
        await session.stop_runtime("ws-1", "crm")
    error = caught.value
    assert (error.code, error.message, error.hint) == ("plan.expired", "Renew.", "Pay.")
    assert error.request_id == "req_1"


async def test_a_bulk_stop_reports_what_a_lost_effect_leaves(
    emulator: Emulator, connect: Connect
) -> None:
    emulator.inject(Reply(500, takes_effect=True))
    async with connect() as session:
        report = await session.stop_runtimes([("ws-1", "crm")])
    assert report.counts == {StopResult.ALREADY_STOPPED: 1}


async def test_a_problem_of_a_gateway_is_read(emulator: Emulator, session: BctrlSession) -> None:
    problem = {"title": "Blocked", "detail": "By the firewall."}
    emulator.inject(Reply(422, body=problem, headers={"Content-Type": "application/problem+json"}))
    with pytest.raises(BctrlValidationError, match="By the firewall"):
        await session.stop_runtime("ws-1", "crm")


async def test_a_204_is_not_taken_for_a_stop(emulator: Emulator, connect: Connect) -> None:
    emulator.inject(Reply(204))
    async with connect(retry=RetryPolicy(attempts=1)) as session:
        with pytest.raises(BctrlResponseError):
            await asyncio.wait_for(session.stop_runtime("ws-1", "crm"), BOUND)


# Errors of the arguments.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Reply(199), "status is 199: give 200 to 599"),
        (lambda: Reply(600), "status is 600: give 200 to 599"),
        (lambda: Reply(cast("int", "403")), "status is '403': give int, not str"),
        (lambda: Reply(cast("int", 403.0)), "status is 403.0: give int, not float"),
        (lambda: Reply(True), "status is True: give int, not bool"),  # noqa: FBT003 - the fault.
        (lambda: Reply(403, code=cast("str", 7)), "code is 7: give str, not int"),
        (lambda: Reply(403, message=cast("str", [])), r"message is \[\]: give str, not list"),
        (lambda: Reply(200, takes_effect=cast("bool", 1)), "takes_effect is 1: give bool"),
        (lambda: Reply(200, headers=cast("dict[str, str]", 1)), "headers is 1: give Mapping"),
        (
            lambda: Reply(429, headers=cast("dict[str, str]", {"Retry-After": 7})),
            r"headers\['Retry-After'\] is 7: give str, not int",
        ),
        (
            lambda: Reply(429, headers=cast("dict[str, str]", {1: "x"})),
            "a header's name is 1: give str, not int",
        ),
        (lambda: Reply(429, headers=cast("dict[str, str]", None)), "headers is None: give Mapping"),
        (lambda: Reply(429, headers={"a b": "x"}), "headers has 'a b': 'x', which HTTP"),
        (
            lambda: Reply(429, headers={"x": "1\r\ny: 2"}),
            r"headers has 'x': '1\\r\\ny: 2', which HTTP cannot express",
        ),
        (lambda: Reply(403, code="x", body={}), "code and body are both given"),
        (lambda: Reply(403, hint="x", body=""), "hint and body are both given"),
        (lambda: Reply(200, code="x"), "code is for .*: give a status of 400 to 599, not 200"),
        (lambda: Reply(200, body=object()), "body cannot be sent: Object of type object"),
        (lambda: Reply(200, body=["\ud800"]), "body cannot be sent: .*surrogates not allowed"),
        (lambda: Reply(200, body="\ud800"), "body cannot be sent: .*surrogates not allowed"),
        (
            lambda: Emulator().inject(cast("Fault", "hang")),
            "fault is 'hang': give Fault or Reply, not str",
        ),
        (
            lambda: Emulator().inject(cast("Fault", [Fault.HANG])),
            "fault is .*: give Fault or Reply",
        ),
        (
            lambda: Emulator().poison("ws", "a", cast("Fault", 403)),
            "fault is 403: give Fault or Reply",
        ),
        (
            lambda: Emulator(faults={cast("Fault", Reply(403)): 1}),
            r"faults has Reply\(status=403.*: give members of Fault",
        ),
    ],
)
def test_an_invalid_argument_is_an_error_with_advice(
    make: Callable[[], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make()
