"""The faults of the emulator, and the replies that a test gives it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from support.wire import GET, LIST, Wire, ask, errors_against_contract, path_of

from bctrl_async.emulator import Emulator, Fault, Reply

JSON, TEXT, HTML = "application/json", "text/plain; charset=utf-8", "text/html"
STOPPED = '"status":"stopped"'


@pytest.fixture
async def wire(emulator: Emulator) -> AsyncIterator[Wire]:
    async with Wire(emulator) as wire:
        yield wire


# Faults.


@pytest.mark.parametrize(
    ("fault", "statuses", "said"),
    [
        # The answers to two stops with the fault, and to a third without it.
        (Fault.LATENCY, [200, 409, 409], STOPPED),
        (Fault.RATE_LIMITED, [429, 429, 200], '{"code":"rate.limited",'),
        (Fault.SERVER_ERROR, [500, 500, 200], '{"code":"server.error",'),
        (Fault.BAD_GATEWAY, [502, 502, 409], "<html><head><title>502 "),
        (Fault.MALFORMED_JSON, [200, 200, 409], '"status"="stopped"'),
        (Fault.UNKNOWN_VALUES, [200, 200, 409], '"status":"paused"'),
        (Fault.FAILED, [200, 200, 409], '"status":"failed"'),
        (Fault.ACCEPTED, [200, 200, 409], '"status":"active"'),
    ],
)
async def test_a_fault_is_answered_as_it_says(
    emulator: Emulator, fault: Fault, statuses: list[int], said: str
) -> None:
    emulator.inject(fault, fault)
    answers = [await ask(emulator) for _ in statuses]

    assert [answer.status for answer in answers] == statuses
    assert fault.takes_effect is (statuses[-1] == 409)
    kind = HTML if fault is Fault.BAD_GATEWAY else JSON
    assert answers[0].headers["content-type"] == kind
    assert "retry-after" not in answers[0].headers
    assert "connection" not in answers[0].headers
    assert said in answers[0].body.decode()
    assert (fault is Fault.FAILED) is (emulator.status("ws-1", "crm") == "failed")
    if fault is Fault.UNKNOWN_VALUES:
        assert set(answers[0].json) > set(emulator.runtimes["ws-1", "crm"])
        errors = errors_against_contract(answers[0].json)
        assert ["is not one of" in text for text in errors] == [True] * 3
    elif statuses[0] == 200 and fault is not Fault.MALFORMED_JSON:
        assert errors_against_contract(answers[0].json) == []


@pytest.mark.parametrize(
    "fault", [Fault.DROP_BEFORE, Fault.DROP_AFTER, Fault.TRUNCATED_JSON]
)
async def test_an_answer_is_cut_before_its_head_or_within_its_body(
    emulator: Emulator, wire: Wire, fault: Fault
) -> None:
    emulator.inject(fault)
    await wire.send()
    with pytest.raises(asyncio.IncompleteReadError) as cut:
        await wire.answer()
    is_truncated = fault is Fault.TRUNCATED_JSON
    assert (cut.value.partial != b"") is is_truncated
    assert emulator.requests[0].status == (200 if is_truncated else None)
    assert (emulator.status("ws-1", "crm") == "stopped") is fault.takes_effect


async def test_every_delay_is_as_long_as_configured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slept: list[float] = []
    real_sleep = asyncio.sleep

    async def sleep(delay: float) -> None:
        slept.extend([delay] if delay else [])
        await real_sleep(0)

    async with (
        Emulator(port=0, latency=3, fault_latency=40) as slow,
        Wire(slow) as wire,
    ):
        slow.add_runtime("ws-1", "crm")
        slow.inject(None, Fault.RATE_LIMITED, Fault.LATENCY)
        monkeypatch.setattr(asyncio, "sleep", sleep)
        for _ in range(3):
            await wire.send()
            await wire.answer()
    assert slept[:3] == [3, 3, 43]


# Which request meets which fault.


async def test_the_queue_of_the_target_comes_first_then_of_workspace_alias_and_all(
    emulator: Emulator,
) -> None:
    emulator.add_runtime("ws-1", "mail")
    emulator.add_runtime("b", "crm")
    emulator.inject(Fault.RATE_LIMITED, None, workspace_id="ws-1", alias="crm")
    emulator.inject(Fault.SERVER_ERROR, workspace_id="b")
    emulator.inject(unavailable := Reply(503), alias="crm")
    emulator.inject(Fault.BAD_GATEWAY)
    order = ["b/crm", "ws-1/crm", "b/crm", "ws-1/mail", "ws-1/crm"]
    statuses = [
        (await ask(emulator, path_of(*each.split("/")))).status for each in order
    ]
    assert statuses == [500, 429, 503, 502, 200]
    faults = [
        Fault.SERVER_ERROR,
        Fault.RATE_LIMITED,
        unavailable,
        Fault.BAD_GATEWAY,
        None,
    ]
    assert [request.fault for request in emulator.requests] == faults


async def test_a_fault_waits_for_a_valid_key_and_a_known_runtime(
    emulator: Emulator,
) -> None:
    emulator.inject(Fault.SERVER_ERROR)
    asked = [{"key": "no"}, {"path": "/"}, {"path": path_of("ws-1", "gone")}, {}]
    assert [(await ask(emulator, **each)).status for each in asked] == [
        401,
        404,
        404,
        500,
    ]


@pytest.mark.parametrize("path", [GET, LIST])
async def test_faults_of_stops_and_of_reads_are_separate(
    emulator: Emulator, path: str
) -> None:
    emulator.inject(Fault.RATE_LIMITED)
    emulator.inject(
        Fault.SERVER_ERROR, Fault.FAILED, Reply(403), Reply(200), method="GET"
    )
    answers = [await ask(emulator, path, "GET") for _ in range(5)]
    assert [answer.status for answer in answers] == [500, 200, 403, 200, 200]
    # It says so, and nothing has changed.
    assert answers[1].json["status"] == "failed"
    assert answers[3].json == answers[4].json
    assert emulator.status("ws-1", "crm") == "active"
    assert (await ask(emulator)).status == 429


async def test_a_poisoned_runtime_meets_its_fault_in_every_request_until_it_is_cleared(
    emulator: Emulator,
) -> None:
    emulator.add_runtime("ws-1", "mail")
    emulator.inject(Reply(502), alias="crm")
    emulator.poison("ws-1", "crm", Fault.SERVER_ERROR)
    assert [(await ask(emulator)).status for _ in range(2)] == [500, 500]
    assert (await ask(emulator, GET, "GET")).status == 500
    # Others are not touched, nor is the list of the workspace.
    assert (await ask(emulator, path_of("ws-1", "mail"))).status == 200
    assert (await ask(emulator, LIST, "GET")).status == 200

    emulator.poison("ws-1", "crm", Reply(403))
    assert (await ask(emulator)).status == 403
    emulator.poison("ws-1", "crm", None)
    # What was queued before is still there.
    assert [(await ask(emulator)).status for _ in range(2)] == [502, 200]


@pytest.mark.parametrize(("rate_limit", "allowed"), [(0.001, 1), (16, 5), (1e6, 10)])
async def test_a_request_above_the_rate_and_its_burst_gets_a_429_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, rate_limit: float, allowed: int
) -> None:
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: 100.0)
    async with Emulator(port=0, rate_limit=rate_limit) as emulator:
        for number in range(9):
            emulator.add_runtime("ws-1", f"r{number}")
        # It covers reads as well.
        answers = [await ask(emulator, f"{LIST}/r0", "GET")]
        answers += [
            await ask(emulator, path_of("ws-1", f"r{number}")) for number in range(9)
        ]
    statuses = [answer.status for answer in answers]
    assert statuses == [200] * allowed + [429] * (10 - allowed)
    stopped = [runtime["status"] for runtime in emulator.runtimes.values()].count(
        "stopped"
    )
    assert stopped == allowed - 1
    assert emulator.received.total() == 9


async def test_random_faults_are_met_by_stops_only_and_after_injected_ones() -> None:
    async with Emulator(port=0, faults={Fault.SERVER_ERROR: 1}) as emulator:
        emulator.add_runtime("ws-1", "crm")
        emulator.inject(Fault.RATE_LIMITED, None)
        assert (await ask(emulator, GET, "GET")).status == 200
        assert [(await ask(emulator)).status for _ in range(3)] == [429, 200, 500]


Targets = list[tuple[str, str]]
Met = dict[tuple[str, str], list[Fault | Reply | None]]

TARGETS: Targets = [(f"ws{number % 3}", f"a{number}") for number in range(30)] * 8
SOME = {Fault.SERVER_ERROR: 0.25, Fault.RATE_LIMITED: 0.25, Fault.ACCEPTED: 0.0}


async def faults_met(
    order: Targets, faults: dict[Fault, float] = SOME, *, seed: int = 7
) -> Met:
    met: Met = {}
    async with Emulator(port=0, faults=faults, seed=seed) as emulator:
        for target in order:
            emulator.add_runtime(*target)
        await asyncio.gather(*(ask(emulator, path_of(*target)) for target in order))
    for request in emulator.requests:
        met.setdefault(request.target, []).append(request.fault)
    return met


# Random faults.


async def test_a_seed_repeats_them_whatever_the_order_of_requests() -> None:
    met = await faults_met(TARGETS)
    assert met == await faults_met(TARGETS[::-1], dict(reversed(SOME.items())))
    assert await faults_met(TARGETS[:1] * 8) == {TARGETS[0]: met[TARGETS[0]]}
    assert met != await faults_met(TARGETS, seed=8)
    similar = await faults_met([("a", "bc"), ("ab", "c")] * 30)
    assert similar["a", "bc"] != similar["ab", "c"]


async def test_each_occurs_with_its_probability() -> None:
    met = await faults_met(TARGETS)
    drawn = [fault for faults in met.values() for fault in faults]
    for fault, share in {
        Fault.SERVER_ERROR: 0.25,
        Fault.RATE_LIMITED: 0.25,
        None: 0.5,
    }.items():
        assert abs(drawn.count(fault) / len(drawn) - share) < 0.1
    assert Fault.ACCEPTED not in drawn
    certain = await faults_met(
        TARGETS, {Fault.SERVER_ERROR: 0.5, Fault.RATE_LIMITED: 0.5}
    )
    assert all(None not in faults for faults in certain.values())


# Replies.


@pytest.mark.parametrize(
    ("status", "code", "reason_class", "message"),
    [
        (403, "auth.forbidden", "capability_denied", "Forbidden"),
        (409, "runtime.not_active", "conflict", "Conflict"),
        (418, "request.invalid", "invalid_input", "I'm a Teapot"),
        (503, "server.unavailable", "upstream", "Service Unavailable"),
        (520, "server.error", "server", "Error 520"),
    ],
)
async def test_a_bare_status_has_the_documented_error(
    emulator: Emulator, status: int, code: str, reason_class: str, message: str
) -> None:
    emulator.inject(
        Reply(status), Reply(status, code="", message="", reason_class="", hint="")
    )
    for answer in (await ask(emulator), await ask(emulator)):
        error = {"code": code, "error": message, "reasonClass": reason_class}
        assert answer.json == {**error, "requestId": answer.headers["x-request-id"]}


async def test_an_error_has_the_given_fields(emulator: Emulator) -> None:
    reply = Reply(
        403, code="plan.expired", message="Renew.", reason_class="billing", hint="Pay."
    )
    emulator.inject(reply)
    answer = await ask(emulator)
    assert answer.json == {
        "code": "plan.expired",
        "error": "Renew.",
        "reasonClass": "billing",
        "requestId": answer.headers["x-request-id"],
        "hint": "Pay.",
    }


@pytest.mark.parametrize(
    ("reply", "body", "kind", "takes_effect"),
    [
        (Reply(502, body="<p>", headers={"content-type": HTML}), b"<p>", HTML, False),
        (Reply(502, body="é"), "é".encode(), TEXT, False),
        (Reply(200, body=b"\xff\x00"), b"\xff\x00", TEXT, True),
        (Reply(200, body="", takes_effect=False), b"", TEXT, False),
        (
            Reply(418, body={"why": "é"}, takes_effect=True),
            '{"why":"é"}'.encode(),
            JSON,
            True,
        ),
        (
            Reply(400, body=[], headers={"Content-Type": "x/json"}),
            b"[]",
            "x/json",
            False,
        ),
        # They have no usual body.
        (Reply(204), b"", JSON, True),
        (Reply(205), b"", JSON, True),
        (Reply(302), b"", JSON, False),
    ],
)
async def test_a_reply_has_its_body_and_its_effect_and_leaves_the_connection_usable(
    emulator: Emulator,
    wire: Wire,
    reply: Reply,
    body: bytes,
    kind: str,
    *,
    takes_effect: bool,
) -> None:
    emulator.inject(reply, None)
    await wire.send()
    answer = await wire.answer()
    assert (answer.status, answer.body) == (reply.status, body)
    assert answer.headers["content-type"] == kind
    assert reply.takes_effect is takes_effect
    await wire.send()
    assert (await wire.answer()).status == (409 if takes_effect else 200)


@pytest.mark.parametrize("status", [202, 429])
async def test_headers_replace_the_usual_ones_of_any_case(
    emulator: Emulator, status: int
) -> None:
    emulator.inject(Reply(status, headers={"Retry-After": "7", "X-Request-ID": "mine"}))
    answer = await ask(emulator)
    headers = answer.headers
    assert (answer.status, headers["retry-after"]) == (status, "7")
    assert headers["x-request-id"] == "mine"
    assert status == 429 or answer.json == emulator.runtimes["ws-1", "crm"]
