"""The emulator: what it answers, records and refuses, and its invalid arguments."""

from __future__ import annotations

import asyncio
import gzip
import socket
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from urllib.parse import quote
from uuid import UUID

import pytest
from hypothesis import given, settings, strategies as st
from support.helpers import BOUND, free_port, pass_time, until
from support.wire import (
    GET,
    KEY,
    LIST,
    STOP,
    Wire,
    ask,
    errors_against_contract,
    path_of,
)
from support.wire_faults import OVERSIZED
from yarl import URL

from bctrl_async.emulator import Emulator, Fault, ReceivedRequest, Reply

# Answers.


@pytest.mark.parametrize(
    ("workspace_id", "uuid"),
    [
        ("wörk/1", None),
        (
            "6F1F7A52-9F0E-4D53-8A64-0D1C6D6D2F11",
            "6f1f7a52-9f0e-4d53-8a64-0d1c6d6d2f11",
        ),
    ],
)
async def test_a_stop_and_a_get_have_the_runtime_as_in_the_contract(
    emulator: Emulator, workspace_id: str, uuid: str | None
) -> None:
    emulator.add_runtime(workspace_id, "crm", kind="desktop")
    stop = path_of(quote(workspace_id, safe=""), "crm")
    before = await ask(emulator, stop.removesuffix("/stop"), "GET")
    stopped = await ask(emulator, stop)
    after = await ask(emulator, stop.removesuffix("/stop"), "GET")

    for answer in (before, stopped, after):
        assert (answer.status, answer.headers["content-type"]) == (
            200,
            "application/json",
        )
        assert errors_against_contract(answer.json) == []
        assert (answer.json["kind"], answer.json["alias"]) == ("desktop", "crm")
        assert uuid is None or answer.json["workspaceId"] == uuid
    assert [each.json["status"] for each in (before, stopped)] == ["active", "stopped"]
    assert stopped.json == after.json == emulator.runtimes[workspace_id, "crm"]
    assert emulator.status(workspace_id, "crm") == "stopped"
    assert emulator.runtimes[workspace_id, "crm"]["summary"]["browserRunning"] is False


@pytest.mark.parametrize(
    "created_at",
    [
        "2026-01-01T00:00:00.000Z",
        "2026-01-01T00:00:00",
        "2999-12-31T23:59:59.999999+14:00",
        "2999-12-31",
        "long ago",
        "9999-12-31T23:59:59.9999Z",
    ],
)
async def test_a_runtime_is_updated_when_it_ends_and_never_before_it_was_created(
    emulator: Emulator, created_at: str
) -> None:
    """Fault: runtimes of the command's emulator were updated months before."""
    emulator.add_runtime("ws-1", "crm", created_at=created_at)
    runtime = emulator.runtimes["ws-1", "crm"]
    assert runtime["updatedAt"] == runtime["createdAt"] == created_at
    before = datetime.now(UTC) - timedelta(milliseconds=1)
    await ask(emulator)

    updated_at = datetime.fromisoformat(runtime["updatedAt"])
    assert updated_at > before
    if created_at.startswith("2"):
        created = datetime.fromisoformat(created_at)
        assert updated_at > (created if created.tzinfo else created.replace(tzinfo=UTC))


@pytest.mark.parametrize(
    ("method", "path", "key", "status", "code"),
    [
        ("POST", path_of("ws-1", "mail"), KEY, 404, "runtime.not_found"),
        ("GET", "/v1/workspaces/other/runtimes", KEY, 404, "runtime.not_found"),
        ("POST", path_of("ws-1", "old"), KEY, 409, "runtime.not_active"),
        ("POST", STOP, "emulator-key", 401, "auth.required"),
        ("POST", path_of("ws-1", "mail"), "", 401, "auth.required"),
        ("GET", LIST, "Bearer wrong", 401, "auth.required"),
        ("GET", STOP, KEY, 405, "method.not_allowed"),
        ("POST", GET, KEY, 405, "method.not_allowed"),
        ("POST", "/", KEY, 404, "route.not_found"),
        # A gateway resolves these, and finds nothing.
        ("POST", "/v1/workspaces/ws-1/runtimes/../stop", KEY, 404, "route.not_found"),
        ("POST", "/v1/workspaces//runtimes/crm/stop", KEY, 404, "route.not_found"),
        # These names are not percent-encoded UTF-8.
        ("POST", path_of("ws-1", "%zz"), KEY, 404, "route.not_found"),
        ("POST", path_of("ws-1", "%FF"), KEY, 404, "route.not_found"),
    ],
)
async def test_a_refusal_has_the_documented_fields_and_stops_nothing(  # noqa: PLR0917 - a table.
    emulator: Emulator, method: str, path: str, key: str, status: int, code: str
) -> None:
    emulator.add_runtime("ws-1", "old", status="failed")
    answer = await ask(emulator, path, method, key)

    assert (answer.status, answer.json["code"]) == (status, code)
    assert set(answer.json) == {"code", "error", "reasonClass", "requestId", "hint"}
    assert all(isinstance(value, str) and value for value in answer.json.values())
    assert answer.json["requestId"] == answer.headers["x-request-id"]
    if status == 405:
        assert answer.headers["allow"] == ("POST" if path == STOP else "GET")
    statuses = [emulator.status("ws-1", alias) for alias in ("crm", "old", "mail")]
    assert statuses == ["active", "failed", None]
    has_counted = method == "POST" and code.startswith("runtime.")
    assert emulator.received.total() == has_counted


async def test_the_key_can_be_chosen_and_rotated() -> None:
    async with Emulator(port=0, api_key="k2") as emulator:
        emulator.add_runtime("ws-1", "crm")
        keys = [KEY, "Bearer k2", "Bearer k3"]
        statuses = [(await ask(emulator, key=key)).status for key in keys]
        emulator.api_key = "k3"
        statuses += [(await ask(emulator, key=key)).status for key in keys]
    assert statuses == [401, 200, 401, 401, 401, 409]


async def test_a_workspace_is_known_by_its_name_and_by_the_uuid_of_its_answers(
    emulator: Emulator,
) -> None:
    emulator.add_runtime(
        "ws-1", "a/b", status="failed", created_at="2026-11-25T08:00:00Z"
    )
    emulator.add_runtime("other", "crm")
    crm, failed = emulator.runtimes["ws-1", "crm"], emulator.runtimes["ws-1", "a/b"]
    workspace_id = crm["workspaceId"]
    for name in (workspace_id, "ws-1"):
        listed = await ask(emulator, f"/v1/workspaces/{name}/runtimes", "GET")
        assert listed.json == {"runtimes": [crm, failed]}
    assert (failed["status"], failed["createdAt"]) == ("failed", "2026-11-25T08:00:00Z")

    emulator.inject(Fault.SERVER_ERROR, workspace_id=workspace_id)
    emulator.poison(workspace_id, "a/b", Reply(403))
    stops = [
        path_of("ws-1", "crm"),
        path_of("ws-1", "a%2Fb"),
        path_of(workspace_id, "crm"),
    ]
    assert [(await ask(emulator, path)).status for path in stops] == [500, 403, 200]
    assert {request.workspace_id for request in emulator.requests} == {"ws-1"}
    assert emulator.received["ws-1", "crm"] == 2
    emulator.assert_stopped(workspace_id, "crm")


# Names and records.


def encode_all(name: str) -> str:
    return "".join(f"%{byte:02X}" for byte in name.encode())


async def send_all(targets: list[tuple[str, str]]) -> Emulator:
    async with Emulator(port=0) as emulator, Wire(emulator) as wire:
        for workspace_id, alias in targets:
            emulator.add_runtime(workspace_id, alias)
            await wire.send(path_of(encode_all(workspace_id), encode_all(alias)))
            await wire.answer()
    return emulator


names = st.one_of(
    st.text(min_size=1, max_size=30),
    st.text("./%2Fe;?#&=+ \\\0\r\né😀", min_size=1, max_size=8),
)


@settings(max_examples=50)
@given(st.lists(st.tuples(names, names), min_size=1, max_size=10, unique=True))
def test_any_two_strings_arrive_exactly(targets: list[tuple[str, str]]) -> None:
    emulator = asyncio.run(send_all(targets))
    assert [(r.workspace_id, r.alias) for r in emulator.requests] == targets
    assert [r.status for r in emulator.requests] == [200] * len(targets)
    assert emulator.received == dict.fromkeys(targets, 1)


async def test_a_request_is_recorded_as_it_arrived(emulator: Emulator) -> None:
    emulator.inject(Fault.SERVER_ERROR)
    packed = gzip.compress(b"{}")
    path = f"{path_of('ws-1', '%63rm')}?x=/1"
    async with Wire(emulator) as wire:
        await wire.send(path, packed=packed)
        await wire.answer()
    pass_time(40)
    await ask(emulator, "/v1")

    received, later = emulator.requests
    assert received == ReceivedRequest(
        workspace_id="ws-1",
        alias="crm",
        method="POST",
        raw_path=path,
        headers=received.headers,
        body=packed,
        fault=Fault.SERVER_ERROR,
        status=500,
        operation="stop",
        received_at=received.received_at,
    )
    assert received.headers["authorization"] == KEY
    assert "emulator-key" not in repr(received)
    assert (
        0 <= received.received_at < 40 <= later.received_at - received.received_at < 80
    )


async def test_each_request_has_what_it_asked_for_and_was_answered(
    emulator: Emulator,
) -> None:
    expected = [
        ("GET", STOP, ("ws-1", "crm", None, 405)),
        ("POST", path_of("ws-1", "g%2Fone"), ("ws-1", "g/one", "stop", 404)),
        ("POST", STOP, ("ws-1", "crm", "stop", 200)),
        ("POST", STOP, ("ws-1", "crm", "stop", 409)),
        ("GET", GET, ("ws-1", "crm", "get", 200)),
        ("POST", GET, ("ws-1", "crm", None, 405)),
        ("GET", LIST, ("ws-1", None, "list", 200)),
        ("GET", "/v1", (None, None, None, 404)),
    ]
    answers = [await ask(emulator, path, method) for method, path, _ in expected]

    requests = emulator.requests
    seen = [
        (each.workspace_id, each.alias, each.operation, each.status)
        for each in requests
    ]
    assert seen == [facts for _, _, facts in expected]
    assert [(r.method, r.raw_path) for r in requests] == [each[:2] for each in expected]
    assert emulator.stops == requests[1:4]
    assert emulator.received == {("ws-1", "crm"): 2, ("ws-1", "g/one"): 1}
    assert len({answer.headers["x-request-id"] for answer in answers}) == len(answers)


async def test_each_request_is_passed_to_a_function_before_it_is_answered() -> None:
    passed: list[ReceivedRequest] = []
    async with (
        Emulator(port=0, on_request=passed.append) as emulator,
        Wire(emulator) as wire,
    ):
        emulator.add_runtime("ws-1", "crm")
        emulator.inject(Fault.HANG)
        await wire.send()
        await until(lambda: passed)
        assert passed == emulator.requests
        assert wire.unread == b""


# Start and close.


async def test_an_ipv6_address_stands_in_brackets() -> None:
    try:
        async with Emulator(host="::1", port=0) as emulator:
            assert emulator.url.startswith("http://[::1]:")
            assert (await ask(emulator)).status == 404
    except OSError as error:  # pragma: no cover - depends on the machine
        pytest.skip(f"no IPv6 here: {error}")


async def test_an_emulator_starts_once_and_may_be_closed_at_any_time() -> None:
    emulator = Emulator(port=0)
    assert repr(emulator) == "<Emulator not started, 0 runtimes, 0 requests>"
    with pytest.raises(RuntimeError, match=r"await start\(\)"):
        _ = emulator.url
    await emulator.close()
    await emulator.start()
    await ask(emulator)
    assert repr(emulator) == f"<Emulator {emulator.url}, 0 runtimes, 1 requests>"
    with pytest.raises(RuntimeError, match="make a new Emulator"):
        await emulator.start()
    await emulator.close()
    await emulator.close()
    with pytest.raises(ConnectionRefusedError):
        await Wire(emulator).__aenter__()


async def test_a_port_in_use_is_an_error_and_the_emulator_can_try_again() -> None:
    port = free_port()
    async with Emulator(port=port) as emulator:
        second = Emulator(port=port)
        with pytest.raises(OSError, match="address already in use"):
            await second.start()
    async with second:
        assert second.url == emulator.url


@pytest.mark.parametrize("is_held", [False, True])
async def test_a_client_that_leaves_ends_its_request_without_an_error(
    caplog: pytest.LogCaptureFixture, *, is_held: bool
) -> None:
    async with Emulator(port=0) as emulator:
        emulator.add_runtime("ws-1", "crm")
        if is_held:
            emulator.hold("ws-1", "crm")
        else:
            emulator.inject(Fault.HANG)
        before = asyncio.all_tasks()
        async with Wire(emulator) as wire:
            await wire.send()
            await until(lambda: emulator.status("ws-1", "crm") == "stopped")
            assert asyncio.all_tasks() > before
        await until(lambda: asyncio.all_tasks() == before)
    assert not caplog.records


@pytest.mark.parametrize("fault", [Fault.HANG, None, OVERSIZED])
async def test_close_aborts_pending_answers_and_leaves_no_task(
    fault: Fault | Reply | None, caplog: pytest.LogCaptureFixture
) -> None:
    before = asyncio.all_tasks()
    emulator = Emulator(port=0)
    emulator.add_runtime("ws-1", "crm")
    emulator.inject(fault)
    if fault is None:
        emulator.hold("ws-1", "crm")
    await emulator.start()
    async with asyncio.timeout(BOUND), Wire(emulator) as idle, Wire(emulator) as busy:
        await busy.send()
        await until(lambda: emulator.requests)
        await emulator.close()
        assert asyncio.all_tasks() == before
        assert await idle.rest() == b""
        await busy.rest()
    assert not caplog.records


async def test_answers_about_a_held_runtime_wait_for_its_release(
    emulator: Emulator,
) -> None:
    emulator.add_runtime("ws-1", "mail")
    workspace = emulator.runtimes["ws-1", "crm"]["workspaceId"]
    emulator.hold(workspace, "crm", "gone")
    async with Wire(emulator) as stopping, Wire(emulator) as reading:
        await stopping.send()
        await reading.send(GET, "GET")
        await until(lambda: len(emulator.requests) == 2)
        assert emulator.status("ws-1", "crm") == "stopped"
        assert (await ask(emulator, path_of("ws-1", "mail"))).status == 200
        assert (stopping.unread, reading.unread) == (b"", b"")

        # A test may hold and release in a thread of its own.
        await asyncio.to_thread(emulator.release, "ws-1", "crm", "mail")
        assert (await stopping.answer()).status == 200
        assert (await reading.answer()).status == 200
        await stopping.send()
        assert (await stopping.answer()).status == 409


async def test_without_a_start_a_release_has_nothing_to_send() -> None:
    emulator = Emulator(port=0)
    emulator.hold("ws-1", "crm")
    emulator.release("ws-1", "crm")
    with pytest.raises(ValueError, match="no alias is given"):
        emulator.hold("ws-1")


@pytest.mark.parametrize("iterations", range(0, 8, 2))
async def test_close_aborts_a_connection_that_was_just_made(iterations: int) -> None:
    before = asyncio.all_tasks()
    emulator = Emulator(port=0)
    await emulator.start()
    url = URL(emulator.url)
    # The kernel completes the connection; the event loop sees it some iterations later.
    with socket.create_connection(
        (str(url.host), url.port), timeout=BOUND
    ) as connection:
        for _ in range(iterations):
            await asyncio.sleep(0)
        await emulator.close()
        with suppress(ConnectionResetError):
            assert connection.recv(1) == b""
    assert asyncio.all_tasks() == before


@pytest.mark.parametrize("iterations", range(0, 8, 2))
async def test_close_aborts_a_connection_that_is_made_meanwhile(
    iterations: int,
) -> None:
    """Fault: a client that connects while its server closes is never answered."""
    before = asyncio.all_tasks()
    emulator = Emulator(port=0)
    await emulator.start()
    url = URL(emulator.url)
    closing = asyncio.create_task(emulator.close())
    for _ in range(iterations):
        await asyncio.sleep(0)
    with (
        suppress(ConnectionError),
        socket.create_connection(
            (str(url.host), url.port), timeout=BOUND
        ) as connection,
    ):
        await closing
        assert connection.recv(1) == b""
    await closing
    assert asyncio.all_tasks() == before


# Arguments.


def make(**options: Any) -> Callable[[], object]:  # noqa: ANN401 - invalid options.
    return partial(Emulator, **options)


def reply(status: Any = 403, **options: Any) -> Callable[[], object]:  # noqa: ANN401 - wrong ones.
    return partial(Reply, status, **options)


def call(name: str, *args: object, **options: object) -> Callable[[], object]:
    return partial(getattr(Emulator(), name), *args, **options)


INVALID: list[tuple[Callable[[], object], str]] = [
    (make(host=1), "host is 1: give str, not int"),
    (make(port=True), "port is True: give int, not bool"),
    (make(port=-1), "port is -1: give 0 to 65535"),
    (make(api_key=""), "api_key is empty: give"),
    (make(seed=0.5), "seed is 0.5: give int, not float"),
    (make(rate_limit=0), "rate_limit is 0: give 0.0001 to 1000000"),
    (make(fault_latency=float("nan")), "fault_latency is nan: give 0 to"),
    (make(stop_takes=-1), "stop_takes is -1: give 0 to 86400"),
    (make(on_request="x"), "on_request is 'x': give a function"),
    (make(faults=[]), r"faults is \[\]: give Mapping, not list"),
    (make(faults={"x": 0.1}), "faults has 'x': give members of Fault"),
    (make(faults={Reply(403): 1}), r"faults has Reply\(status=403"),
    (make(faults={Fault.HANG: -0.1}), r"faults\[hang\] is -0.1: give 0 to 1"),
    (make(faults={Fault.HANG: 0.6, Fault.FAILED: 0.6}), "add up to 1.2: give"),
    (call("add_runtime", "", "crm"), "workspace_id is empty"),
    (call("add_runtime", "ws", None), "alias is None: give str, not NoneType"),
    (call("add_runtime", "ws", "\ud800"), "surrogates not allowed"),
    (call("add_runtime", "ws", "crm", kind="car"), "'car': give one of browser"),
    (call("add_runtime", "ws", "crm", stop_takes="1s"), "stop_takes is .1s.: give int"),
    (
        call("status", UUID(int=1), "crm"),
        r"workspace_id is UUID\(.*: give str, not UUID",
    ),
    (call("inject", "hang"), "fault is 'hang': give Fault or Reply"),
    (call("inject", method="get"), "method is 'get': give one of POST, GET"),
    (call("poison", "ws", "crm", 403), "fault is 403: give Fault or"),
    (call("assert_stopped", "ws-1"), "no alias is given: name the runtimes"),
    (
        call("assert_stopped", "ws-1", ["crm"]),
        r"alias is \['crm'\]: give str, not list",
    ),
    (
        call("assert_not_stopped", ("ws-1", "crm"), "crm"),
        "workspace_id is .*: give str, not tuple",
    ),
    (reply(199), "status is 199: give 200 to 599"),
    (reply(takes_effect=1), "takes_effect is 1: give bool"),
    (reply(headers=None), "headers is None: give Mapping"),
    (
        reply(headers={"Retry-After": 7}),
        r"headers\['Retry-After'\] is 7: give str, not int",
    ),
    (reply(headers={"a b": "x"}), "headers has 'a b': 'x', which HTTP"),
    (reply(headers={"x": "1\r\ny: 2"}), "which HTTP cannot express"),
    (reply(code="x", body={}), "code and body are both given"),
    (reply(200, code="x"), "code is for .*: give a status of 400 to 599, not 200"),
    (reply(200, body=object()), "body cannot be sent: Object of type object"),
    (reply(200, body="\ud800"), "body cannot be sent: .*surrogates not allowed"),
]


@pytest.mark.parametrize(
    ("invalid", "message"), INVALID, ids=[text for _, text in INVALID]
)
def test_an_invalid_argument_is_an_error_with_advice(
    invalid: Callable[[], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        invalid()
