"""Answers that a test gives to the emulator."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import cast

import pytest
from test_emulator import Send, Wire, ask

from bctrl_async.emulator import Emulator, Fault, Reply

LIST = "/v1/workspaces/ws-1/runtimes"
GET = f"{LIST}/crm"
STOP = f"{GET}/stop"
JSON, TEXT, HTML = "application/json", "text/plain; charset=utf-8", "text/html"


@pytest.fixture
def send(emulator: Emulator) -> Send:
    """A function that sends a request, by default a stop."""
    return partial(ask, emulator, STOP)


async def test_an_error_has_the_given_fields_and_stops_nothing(
    emulator: Emulator, send: Send
) -> None:
    emulator.inject(
        Reply(403, code="plan.expired", message="Renew.", reason_class="billing", hint="Pay.")
    )
    answer = await send()
    assert answer.status == 403
    assert answer.json == {
        "code": "plan.expired",
        "error": "Renew.",
        "reasonClass": "billing",
        "requestId": answer.headers["x-request-id"],
        "hint": "Pay.",
    }
    assert emulator.status("ws-1", "crm") == "active"


@pytest.mark.parametrize(
    "expected",
    [
        (401, "auth.required", "unauthorized", "Unauthorized"),
        (403, "auth.forbidden", "capability_denied", "Forbidden"),
        (409, "runtime.not_active", "conflict", "Conflict"),
        (418, "request.invalid", "invalid_input", "I'm a Teapot"),
        (429, "rate.limited", "rate_limited", "Too Many Requests"),
        (503, "server.unavailable", "upstream", "Service Unavailable"),
        (520, "server.error", "server", "Error 520"),
    ],
)
async def test_a_bare_status_has_the_documented_error(
    emulator: Emulator, send: Send, expected: tuple[int, str, str, str]
) -> None:
    status = expected[0]
    for bare in (Reply(status), Reply(status, code="", message="", reason_class="", hint="")):
        emulator.inject(bare)
        status, _, body = await send()
        error = json.loads(body)
        assert expected == (status, error["code"], error["reasonClass"], error["error"])
        assert "hint" not in error


@pytest.mark.parametrize("status", [202, 429])
async def test_headers_replace_the_usual_ones_of_any_case(
    emulator: Emulator, send: Send, status: int
) -> None:
    emulator.inject(Reply(status, headers={"Retry-After": "7", "X-Request-ID": "mine"}))
    answer = await send()
    headers = answer.headers
    assert (answer.status, headers["retry-after"], headers["x-request-id"]) == (status, "7", "mine")
    assert status == 429 or answer.json == emulator.runtimes["ws-1", "crm"]


@pytest.mark.parametrize(
    ("status", "body", "headers", "sent", "content_type"),
    [
        (502, "<h1>Bad</h1>", {"content-type": HTML}, b"<h1>Bad</h1>", HTML),
        (502, "é", {}, "é".encode(), TEXT),
        (200, b"\xff\x00", {}, b"\xff\x00", TEXT),
        (200, "", {}, b"", TEXT),
        (418, {"why": "é"}, {}, '{"why":"é"}'.encode(), JSON),
        (400, [], {"Content-Type": "application/x+json"}, b"[]", "application/x+json"),
    ],
)
async def test_a_body_is_sent_as_given(  # noqa: PLR0917 - a table.
    emulator: Emulator,
    send: Send,
    status: int,
    body: object,
    headers: dict[str, str],
    sent: bytes,
    content_type: str,
) -> None:
    emulator.inject(Reply(status, body=body, headers=headers))
    answer = await send()
    assert (answer.status, answer.body) == (status, sent)
    assert answer.headers["content-type"] == content_type


@pytest.mark.parametrize("status", [204, 205, 302])
async def test_a_status_without_a_usual_body_has_none(emulator: Emulator, status: int) -> None:
    emulator.inject(Reply(status), None)
    async with Wire(emulator) as wire:
        await wire.send(STOP)
        answer = await wire.answer()
        assert (answer.status, answer.body) == (status, b"")
        # The connection is still of use.
        await wire.send(STOP)
        assert (await wire.answer()).status == (200 if status >= 300 else 409)


@pytest.mark.parametrize("path", [GET, LIST])
async def test_a_read_can_be_answered_too(emulator: Emulator, path: str) -> None:
    emulator.inject(Reply(403), Reply(200), method="GET")
    refused, read = [await ask(emulator, path, "GET") for _ in range(2)]
    assert (refused.status, read.status) == (403, 200)
    runtime = emulator.runtimes["ws-1", "crm"]
    assert read.json == (runtime if path == GET else {"runtimes": [runtime]})
    assert runtime["status"] == "active"


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
    emulator: Emulator, send: Send, reply: Reply, status: str
) -> None:
    emulator.inject(reply)
    await send()
    assert emulator.status("ws-1", "crm") == status
    assert reply.takes_effect is (status == "stopped")


async def test_replies_and_faults_share_a_queue(emulator: Emulator, send: Send) -> None:
    faults: list[Fault | Reply | None] = [Reply(418), Fault.RATE_LIMITED, None]
    emulator.inject(*faults[:2])
    emulator.inject(*faults[2:])
    assert [(await send()).status for _ in range(3)] == [418, 429, 200]
    assert [request.fault for request in emulator.requests] == faults


def test_a_reply_can_be_compared_and_be_in_a_set() -> None:
    make = partial(Reply, 429, code="a.b")
    one, same, other = (make(headers={"Retry-After": text}) for text in ("1", "1", "2"))
    assert {one, same} == {one}
    assert one != other


_reply: Callable[..., object] = Reply
_OF_A_WRONG_TYPE: list[tuple[str, object, str]] = [
    ("status", "403", "status is '403': give int, not str"),
    ("status", True, "status is True: give int, not bool"),
    ("code", 7, "code is 7: give str, not int"),
    ("takes_effect", 1, "takes_effect is 1: give bool"),
    ("headers", None, "headers is None: give Mapping"),
    ("headers", {"Retry-After": 7}, r"headers\['Retry-After'\] is 7: give str, not int"),
    ("headers", {1: "x"}, "a header's name is 1: give str, not int"),
]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *(
            (partial(_reply, **{"status": 403, name: value}), message)
            for name, value, message in _OF_A_WRONG_TYPE
        ),
        (lambda: Reply(199), "status is 199: give 200 to 599"),
        (lambda: Reply(429, headers={"a b": "x"}), "headers has 'a b': 'x', which HTTP"),
        (lambda: Reply(429, headers={"x": "1\r\ny: 2"}), "which HTTP cannot express"),
        (lambda: Reply(403, code="x", body={}), "code and body are both given"),
        (lambda: Reply(200, code="x"), "code is for .*: give a status of 400 to 599, not 200"),
        (lambda: Reply(200, body=object()), "body cannot be sent: Object of type object"),
        (lambda: Reply(200, body="\ud800"), "body cannot be sent: .*surrogates not allowed"),
        (lambda: Emulator().inject(cast("Fault", "hang")), "fault is 'hang': give Fault or Reply"),
        (lambda: Emulator().poison("ws", "a", cast("Fault", 403)), "fault is 403: give Fault or"),
        (lambda: Emulator(faults={cast("Fault", Reply(403)): 1}), r"faults has Reply\(status=403"),
    ],
)
def test_an_invalid_argument_is_an_error_with_advice(
    make: Callable[[], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make()
