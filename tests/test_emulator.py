"""The emulator on the wire: other tests rely on it, so it has tests of its own."""

import ast
import asyncio
import gzip
import json
import socket
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Self, cast
from urllib.parse import quote
from uuid import UUID

import aiohttp
import pytest
import yaml
from helpers import BOUND, free_port, pass_time
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from yarl import URL

from bctrl_async import BctrlSession, StopResult
from bctrl_async.emulator import (
    Emulator,
    Fault,
    ReceivedRequest,
    Reply,
    WireRuntime,
    _faults,
)
from bctrl_async.emulator._contract import parse_route

KEY = {"Authorization": "Bearer emulator-key"}
CONTRACT = Path(__file__).parent.parent / "docs" / "contract" / "openapi.yaml"
UUID_WORKSPACE = "6f1f7a52-9f0e-4d53-8a64-0d1c6d6d2f11"

Stop = Callable[..., Coroutine[object, object, "Answer"]]


class Answer:
    def __init__(self, response: aiohttp.ClientResponse, body: bytes) -> None:
        self.status = response.status
        self.headers = response.headers
        self.body = body

    @property
    def json(self) -> dict[str, object]:
        return cast("dict[str, object]", json.loads(self.body))


def path_of(workspace_id: str, alias: str) -> str:
    return f"/v1/workspaces/{workspace_id}/runtimes/{alias}/stop"


@pytest.fixture
async def emulator() -> AsyncIterator[Emulator]:
    async with Emulator(port=0, fault_latency=0.001) as emulator:
        emulator.add_runtime("ws", "crm")
        yield emulator


@pytest.fixture
async def client(emulator: Emulator) -> AsyncIterator[aiohttp.ClientSession]:
    timeout = aiohttp.ClientTimeout(total=BOUND)
    async with aiohttp.ClientSession(emulator.url, headers=KEY, timeout=timeout) as client:
        yield client


async def send(
    client: aiohttp.ClientSession, path: str, method: str = "POST", **headers: str
) -> Answer:
    url = URL(path, encoded=True)
    async with client.request(method, url, headers=headers, allow_redirects=False) as response:
        return Answer(response, await response.read())


@pytest.fixture
def stop(client: aiohttp.ClientSession) -> Stop:
    async def stop(workspace_id: str = "ws", alias: str = "crm") -> Answer:
        return await send(client, path_of(quote(workspace_id, safe=""), quote(alias, safe="")))

    return stop


@asynccontextmanager
async def running(
    options: Mapping[str, object],
) -> AsyncIterator[tuple[Emulator, Callable[..., Coroutine[object, object, Answer]]]]:
    """Run an emulator with the runtime `crm`; yield it, and a function that stops a runtime."""
    async with (
        Emulator(port=0, **options) as emulator,  # type: ignore[arg-type]
        aiohttp.ClientSession(emulator.url, headers=KEY) as client,
    ):
        emulator.add_runtime("ws", "crm")

        async def request(alias: str = "crm", method: str = "POST", **headers: str) -> Answer:
            path = path_of("ws", alias).removesuffix("/stop" * (method == "GET"))
            return await send(client, path, method, **headers)

        yield emulator, request


class Wire:
    """A raw connection: the test writes every byte."""

    def __init__(self, emulator: Emulator) -> None:
        self._url = URL(emulator.url)

    async def __aenter__(self) -> Self:
        self.reader, self._writer = await asyncio.open_connection(self._url.host, self._url.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.leave()

    async def send(self, path: str = path_of("ws", "crm"), body: bytes = b"") -> None:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer emulator-key\r\n"
        self._writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await self._writer.drain()

    async def head(self) -> tuple[int, dict[str, str]]:
        async with asyncio.timeout(BOUND):
            lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().splitlines()
        headers = dict(line.lower().split(": ", 1) for line in lines[1:-1])
        return int(lines[0].split()[1]), headers

    async def answer(self) -> tuple[int, bytes]:
        status, headers = await self.head()
        async with asyncio.timeout(BOUND):
            return status, await self.reader.readexactly(int(headers["content-length"]))

    @property
    def unread(self) -> bytes:
        """What has arrived and was not read."""
        return bytes(self.reader._buffer)  # type: ignore[attr-defined]

    async def rest(self) -> bytes:
        async with asyncio.timeout(BOUND):
            return await self.reader.read()

    async def leave(self) -> None:
        self._writer.close()
        with suppress(ConnectionError):
            await self._writer.wait_closed()


@pytest.fixture
async def wire(emulator: Emulator) -> AsyncIterator[Wire]:
    async with Wire(emulator) as wire:
        yield wire


def encode(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(BOUND):
        while not condition():
            await asyncio.sleep(0)


def errors_against_contract(value: object) -> list[str]:
    document = yaml.safe_load(CONTRACT.read_text())
    schema = {**document, "$ref": "#/components/schemas/Runtime"}
    checker = Draft202012Validator.FORMAT_CHECKER
    validator = Draft202012Validator(schema, format_checker=checker)
    return [error.message for error in validator.iter_errors(value)]


# Normal behaviour.


async def test_a_stop_turns_an_active_runtime_into_a_stopped_one(
    emulator: Emulator, stop: Stop
) -> None:
    answer = await stop()
    assert answer.status == 200
    assert answer.json == emulator.runtimes["ws", "crm"]
    assert answer.json["status"] == emulator.status("ws", "crm") == "stopped"
    assert answer.json["alias"] == "crm"
    assert not emulator.runtimes["ws", "crm"]["summary"]["browserRunning"]
    assert emulator.runtimes["ws", "crm"]["updatedAt"] > str(answer.json["createdAt"])


@pytest.mark.parametrize("kind", ["browser", "desktop", "spreadsheet"])
@pytest.mark.parametrize("workspace_id", ["ws", UUID_WORKSPACE, UUID_WORKSPACE.upper(), "wörk/1"])
async def test_every_normal_response_satisfies_the_contract(
    emulator: Emulator, stop: Stop, kind: str, workspace_id: str
) -> None:
    emulator.add_runtime(workspace_id, "crm", kind=kind)
    answer = await stop(workspace_id)
    assert errors_against_contract(answer.json) == []
    assert answer.json["kind"] == kind
    assert answer.headers["Content-Type"] == "application/json"
    if workspace_id.lower() == UUID_WORKSPACE:
        assert answer.json["workspaceId"] == UUID_WORKSPACE


def test_the_contract_check_itself_can_fail() -> None:
    assert len(errors_against_contract({"id": "no uuid", "status": "paused"})) > 2


async def test_runtime_ids_are_unique_and_reproducible(
    emulator: Emulator,
) -> None:
    targets = [("ws", "crm"), ("ws", "mail"), ("w", "scrm"), ("ws2", "crm")]
    other = Emulator()
    for target in targets:
        emulator.add_runtime(*target)
        other.add_runtime(*target)
    ids = [UUID(emulator.runtimes[target]["id"]) for target in targets]
    assert len(set(ids)) == len(targets)
    assert emulator.runtimes == other.runtimes


@pytest.mark.parametrize("status", ["stopped", "failed"])
async def test_stopping_an_inactive_runtime_is_a_conflict_and_changes_nothing(
    emulator: Emulator, stop: Stop, status: str
) -> None:
    emulator.add_runtime("ws", "crm", status=status)
    answer = await stop()
    assert (answer.status, answer.json["code"]) == (409, "runtime.not_active")
    assert emulator.status("ws", "crm") == status


async def test_the_second_stop_is_a_conflict(stop: Stop) -> None:
    assert [(await stop()).status for _ in range(3)] == [200, 409, 409]


async def test_only_one_of_many_simultaneous_stops_succeeds(emulator: Emulator, stop: Stop) -> None:
    answers = await asyncio.gather(*(stop() for _ in range(20)))
    assert sorted(answer.status for answer in answers) == [200] + [409] * 19
    assert emulator.received == {("ws", "crm"): 20}


async def test_a_stopped_runtime_that_is_added_again_is_active_again(
    emulator: Emulator, stop: Stop
) -> None:
    await stop()
    emulator.add_runtime("ws", "crm")
    assert (await stop()).status == 200


@pytest.mark.parametrize("target", [("ws", "mail"), ("other", "crm"), ("crm", "ws")])
async def test_an_unknown_workspace_or_alias_is_not_found(
    emulator: Emulator, stop: Stop, target: tuple[str, str]
) -> None:
    answer = await stop(*target)
    assert (answer.status, answer.json["code"]) == (404, "runtime.not_found")
    assert emulator.status(*target) is None
    assert emulator.received[target] == 1


@pytest.mark.parametrize("key", ["Bearer wrong", "emulator-key", "Basic emulator-key", ""])
async def test_a_wrong_key_stops_nothing(
    emulator: Emulator, client: aiohttp.ClientSession, key: str
) -> None:
    answer = await send(client, path_of("ws", "crm"), Authorization=key)
    assert (answer.status, answer.json["code"]) == (401, "auth.required")
    assert emulator.status("ws", "crm") == "active"
    assert not emulator.received


async def test_a_missing_key_is_rejected_even_for_an_unknown_runtime(emulator: Emulator) -> None:
    async with aiohttp.ClientSession(emulator.url) as client:
        assert (await send(client, path_of("ws", "gone"))).status == 401


async def test_the_key_is_configurable_and_can_be_rotated() -> None:
    assert Emulator().api_key == "emulator-key"
    async with running({"api_key": "k2"}) as (emulator, request):
        keys = ["emulator-key", "k2", "k3"]
        statuses = [(await request(Authorization=f"Bearer {key}")).status for key in keys]
        emulator.api_key = "k3"
        statuses += [(await request(Authorization=f"Bearer {key}")).status for key in keys]
    assert statuses == [401, 200, 401, 401, 401, 409]


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1/stop",
        "/v2/workspaces/ws/runtimes/crm/stop",
        "/v1/v1/workspaces/ws/runtimes/crm/stop",
        "/v1/workspaces/ws",
        "/v1/workspaces/ws/runtimes/",
        "/v1/workspaces/../runtimes",
        "/v1/workspaces/ws/runtimes/..",
        "/v1/workspaces/ws/runtimes/crm/stop/",
        "/v1/workspaces/ws/runtimes/a/b/stop",
        "//v1/workspaces/ws/runtimes/crm/stop",
        "/v1/workspaces//runtimes/crm/stop",
        "/v1/workspaces/ws/runtimes/../stop",
        "/v1/workspaces/./runtimes/crm/stop",
    ],
)
async def test_an_unknown_path_is_not_found(emulator: Emulator, wire: Wire, path: str) -> None:
    await wire.send(path)
    status, body = await wire.answer()
    assert (status, json.loads(body)["code"]) == (404, "route.not_found")
    assert not emulator.received
    assert [(r.workspace_id, r.alias, r.raw_path) for r in emulator.requests] == [
        (None, None, path)
    ]


@pytest.mark.parametrize("segment", ["%", "%2", "%zz", "%FF", "%C3", "%ED%A0%80"])
async def test_a_name_that_is_not_percent_encoded_utf_8_is_no_path(
    emulator: Emulator, wire: Wire, segment: str
) -> None:
    await wire.send(path_of("ws", segment))
    status, body = await wire.answer()
    assert (status, json.loads(body)["code"]) == (404, "route.not_found")
    assert not emulator.received


def test_a_name_that_is_not_encoded_at_all_is_no_path() -> None:
    # aiohttp's C parser rejects such a path first, its Python parser does not.
    for segment in ("é", "\udcc3\udca9"):
        assert parse_route(path_of("ws", segment), {}) is None


@pytest.mark.parametrize(
    ("path", "method", "allowed"),
    [
        ("/crm/stop", "GET", "POST"),
        ("/crm/stop", "PUT", "POST"),
        ("/crm/stop", "DELETE", "POST"),
        ("/crm", "POST", "GET"),
        ("", "POST", "GET"),
    ],
)
async def test_a_wrong_method_stops_nothing_and_is_told_the_allowed_one(
    emulator: Emulator, client: aiohttp.ClientSession, path: str, method: str, allowed: str
) -> None:
    answer = await send(client, f"/v1/workspaces/ws/runtimes{path}", method)
    assert (answer.status, answer.headers["Allow"]) == (405, allowed)
    assert emulator.status("ws", "crm") == "active"
    assert not emulator.received


async def test_a_query_is_not_part_of_the_name(emulator: Emulator, wire: Wire) -> None:
    await wire.send(path_of("ws", "crm") + "?force=/true")
    assert (await wire.answer())[0] == 200
    assert emulator.received == {("ws", "crm"): 1}


async def test_every_error_body_has_the_documented_fields(
    emulator: Emulator, client: aiohttp.ClientSession, stop: Stop
) -> None:
    emulator.inject(Fault.SERVER_ERROR, Fault.RATE_LIMITED, None)
    answers = [await stop() for _ in range(4)]
    answers.append(await stop("ws", "gone"))
    answers.append(await send(client, "/"))
    answers.append(await send(client, path_of("ws", "crm"), "PUT"))
    answers.append(await send(client, path_of("ws", "crm"), Authorization="no"))
    assert [a.status for a in answers] == [500, 429, 200, 409, 404, 404, 405, 401]
    for answer in answers[:2] + answers[3:]:
        assert set(answer.json) == {"code", "error", "reasonClass", "requestId", "hint"}
        assert all(isinstance(value, str) and value for value in answer.json.values())
        assert answer.json["requestId"] == answer.headers["x-request-id"]
    assert len({answer.headers["x-request-id"] for answer in answers}) == len(answers)


# Reading.


async def test_a_get_returns_the_runtime_and_changes_nothing(
    emulator: Emulator, client: aiohttp.ClientSession, stop: Stop
) -> None:
    first = await send(client, "/v1/workspaces/ws/runtimes/crm", "GET")
    await stop()
    second = await send(client, "/v1/workspaces/ws/runtimes/crm", "GET")
    for answer in (first, second):
        assert answer.status == 200
        assert errors_against_contract(answer.json) == []
    assert (first.json["status"], second.json["status"]) == ("active", "stopped")
    assert second.json == emulator.runtimes["ws", "crm"]


async def test_a_list_has_all_runtimes_of_its_workspace_and_no_others(
    emulator: Emulator, client: aiohttp.ClientSession
) -> None:
    emulator.add_runtime("ws", "a/b", status="failed")
    emulator.add_runtime("other", "crm")
    answer = await send(client, "/v1/workspaces/ws/runtimes", "GET")
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json == {
        "runtimes": [emulator.runtimes["ws", "crm"], emulator.runtimes["ws", "a/b"]]
    }


@pytest.mark.parametrize(
    ("path", "key", "expected"),
    [
        ("/v1/workspaces/ws/runtimes/no", "emulator-key", (404, "runtime.not_found")),
        ("/v1/workspaces/no/runtimes", "emulator-key", (404, "runtime.not_found")),
        ("/v1/workspaces/ws/runtimes/crm", "wrong", (401, "auth.required")),
        ("/v1/workspaces/ws/runtimes", "wrong", (401, "auth.required")),
    ],
)
async def test_only_what_is_known_can_be_read_and_only_with_the_key(
    client: aiohttp.ClientSession, path: str, key: str, expected: tuple[int, str]
) -> None:
    answer = await send(client, path, "GET", Authorization=f"Bearer {key}")
    assert (answer.status, answer.json["code"]) == expected


async def test_reads_are_recorded_as_requests_but_not_as_received_stops(
    emulator: Emulator, client: aiohttp.ClientSession, stop: Stop
) -> None:
    await send(client, "/v1/workspaces/ws/runtimes/c%2Fm", "GET")
    await send(client, "/v1/workspaces/ws/runtimes", "GET")
    await stop()
    assert emulator.received == {("ws", "crm"): 1}
    assert [(r.method, r.workspace_id, r.alias) for r in emulator.requests] == [
        ("GET", "ws", "c/m"),
        ("GET", "ws", None),
        ("POST", "ws", "crm"),
    ]


@pytest.mark.parametrize("path", ["/v1/workspaces/ws/runtimes/crm", "/v1/workspaces/ws/runtimes"])
async def test_faults_of_stops_and_of_reads_are_separate(
    emulator: Emulator, client: aiohttp.ClientSession, stop: Stop, path: str
) -> None:
    emulator.inject(Fault.RATE_LIMITED)
    emulator.inject(Fault.SERVER_ERROR, Fault.FAILED, method="GET")
    statuses = [(await send(client, path, "GET")).status for _ in range(3)]
    assert statuses == [500, 200, 200]
    assert emulator.status("ws", "crm") == "active"
    assert (await stop()).status == 429


async def test_random_faults_apply_to_stops_only() -> None:
    async with running({"faults": {Fault.SERVER_ERROR: 1.0}}) as (_, request):
        assert [(await request(method=method)).status for method in ("GET", "POST")] == [200, 500]


async def test_a_list_may_contain_unknown_values(
    emulator: Emulator, client: aiohttp.ClientSession
) -> None:
    emulator.inject(Fault.UNKNOWN_VALUES, method="GET")
    answer = await send(client, "/v1/workspaces/ws/runtimes", "GET")
    [runtime] = cast("list[dict[str, object]]", answer.json["runtimes"])
    assert (runtime["status"], runtime["region"]) == ("paused", "moon")


async def test_the_rate_limit_covers_reads() -> None:
    async with running({"rate_limit": 0.001}) as (_, request):
        answers = [await request(method="GET") for _ in range(4)]
    assert answers[-1].status == 429


# The two names of a workspace.


async def test_a_workspace_is_known_by_the_uuid_of_its_answers_as_well(
    emulator: Emulator, client: aiohttp.ClientSession, stop: Stop
) -> None:
    emulator.add_runtime("ws", "mail")
    listed = await send(client, "/v1/workspaces/ws/runtimes", "GET")
    [crm, mail] = cast("list[dict[str, str]]", listed.json["runtimes"])
    workspace_id = crm["workspaceId"]

    assert str(UUID(workspace_id)) == workspace_id
    again = await send(client, f"/v1/workspaces/{workspace_id}/runtimes", "GET")
    assert again.json == listed.json
    assert (await stop(workspace_id, "crm")).status == 200
    assert (await stop("ws", "crm")).status == 409

    assert emulator.received == {("ws", "crm"): 2}
    assert [request.workspace_id for request in emulator.requests] == ["ws"] * 4
    assert workspace_id in emulator.requests[2].raw_path
    assert emulator.status(workspace_id, "crm") == "stopped"
    assert (await stop(mail["workspaceId"].upper(), "mail")).status == 404


async def test_what_a_session_lists_can_be_stopped(emulator: Emulator) -> None:
    emulator.add_runtime("ws", "mail")
    async with BctrlSession(emulator.api_key, base_url=emulator.url) as session:
        runtimes = await session.list_runtimes("ws")
        report = await session.stop_runtimes(
            (str(runtime.workspace_id), runtime.alias) for runtime in runtimes
        )
    assert report.counts == {StopResult.STOPPED: 2}
    emulator.assert_stopped("ws", "crm", "mail", only=True)
    emulator.assert_stopped(str(runtimes[0].workspace_id), "crm", "mail", only=True)


async def test_faults_are_met_under_either_name_of_a_workspace(
    emulator: Emulator, stop: Stop
) -> None:
    workspace_id = emulator.runtimes["ws", "crm"]["workspaceId"]
    emulator.inject(Fault.SERVER_ERROR, workspace_id=workspace_id)
    emulator.inject(Reply(503), workspace_id="ws", alias="crm")
    assert [(await stop(name)).status for name in (workspace_id, "ws")] == [503, 500]
    emulator.poison(workspace_id, "crm", Fault.RATE_LIMITED)
    assert [(await stop(name)).status for name in (workspace_id, "ws")] == [429, 429]


async def test_a_workspace_that_is_named_by_a_uuid_is_not_taken_for_another(
    emulator: Emulator, stop: Stop
) -> None:
    workspace_id = emulator.runtimes["ws", "crm"]["workspaceId"]
    emulator.add_runtime(workspace_id, "mail")
    assert (await stop(workspace_id, "mail")).status == 200
    assert (await stop(workspace_id, "crm")).status == 404


# Exact names.


@pytest.mark.parametrize(
    ("segment", "name"),
    [
        ("a%2Fb", "a/b"),
        ("a%2fb", "a/b"),
        ("%252F", "%2F"),
        ("%2525", "%25"),
        ("%2e%2e", ".."),
        ("%2E", "."),
        ("...", "..."),
        ("a;b", "a;b"),
        ("a%3Bb", "a;b"),
        ("a%3Fb", "a?b"),
        ("a+b", "a+b"),
        ("a%20b", "a b"),
        ("%00%0D%0A", "\0\r\n"),
        ("caf%C3%A9", "café"),
        ("cafe%CC%81", "cafe\u0301"),
        ("%F0%9F%98%80", "😀"),
        ("%EF%BB%BFx", "\ufeffx"),
    ],
)
async def test_a_name_is_decoded_from_the_bytes_on_the_wire(
    emulator: Emulator, wire: Wire, segment: str, name: str
) -> None:
    emulator.add_runtime(name, name)
    await wire.send(path_of(segment, segment))
    assert (await wire.answer())[0] == 200
    (received,) = emulator.requests
    assert (received.workspace_id, received.alias) == (name, name)
    assert received.raw_path == path_of(segment, segment)


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


def test_the_time_of_creation_is_as_given() -> None:
    emulator = Emulator()
    emulator.add_runtime("ws", "crm", created_at="2026-11-25T08:00:00Z")
    assert emulator.runtimes["ws", "crm"]["createdAt"] == "2026-11-25T08:00:00Z"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(names, names), min_size=1, max_size=10, unique=True))
def test_any_two_strings_arrive_exactly(targets: list[tuple[str, str]]) -> None:
    emulator = asyncio.run(send_all(targets))
    assert [(r.workspace_id, r.alias) for r in emulator.requests] == targets
    assert [r.status for r in emulator.requests] == [200] * len(targets)
    assert emulator.received == dict.fromkeys(targets, 1)


# Recording.


async def test_a_request_is_recorded_as_it_arrived(emulator: Emulator, wire: Wire) -> None:
    emulator.inject(Fault.SERVER_ERROR)
    await wire.send(path_of("ws", "%63rm") + "?x=1", b'{"why": 1}')
    await wire.answer()
    (received,) = emulator.requests
    assert received == ReceivedRequest(
        workspace_id="ws",
        alias="crm",
        method="POST",
        raw_path="/v1/workspaces/ws/runtimes/%63rm/stop?x=1",
        headers=received.headers,
        body=b'{"why": 1}',
        fault=Fault.SERVER_ERROR,
        status=500,
        operation="stop",
        received_at=received.received_at,
    )
    assert received.headers["authorization"] == "Bearer emulator-key"
    assert "emulator-key" not in repr(received)


async def test_a_body_is_recorded_as_on_the_wire(
    emulator: Emulator, client: aiohttp.ClientSession
) -> None:
    packed = gzip.compress(b"{}")
    headers = {"Content-Encoding": "gzip"}
    async with client.post(path_of("ws", "crm"), data=packed, headers=headers) as response:
        assert response.status == 200
    assert emulator.requests[0].body == packed


async def test_requests_are_recorded_in_order_of_arrival_with_what_was_answered(
    emulator: Emulator, client: aiohttp.ClientSession, stop: Stop
) -> None:
    await stop()
    await send(client, path_of("ws", "crm"), Authorization="no")
    await stop()
    await stop("ws", "gone")
    assert [(r.alias, r.status) for r in emulator.requests] == [
        ("crm", 200),
        ("crm", 401),
        ("crm", 409),
        ("gone", 404),
    ]
    assert emulator.received == {("ws", "crm"): 2, ("ws", "gone"): 1}


async def test_requests_know_their_operation_and_stops_are_a_view_of_them(
    client: aiohttp.ClientSession, emulator: Emulator
) -> None:
    runtime = "/v1/workspaces/ws/runtimes/crm"
    sent = [
        ("GET", path_of("ws", "crm")),
        ("POST", path_of("ws", "gone")),
        ("POST", path_of("ws", "crm")),
        ("GET", runtime),
        ("POST", runtime),
        ("GET", "/v1/workspaces/ws/runtimes"),
        ("GET", "/v1"),
    ]
    for method, path in sent:
        await send(client, path, method)
    operations = [request.operation for request in emulator.requests]
    assert operations == [None, "stop", "stop", "get", None, "list", None]
    assert emulator.stops == emulator.requests[1:3]


async def test_the_time_between_two_requests_is_recorded() -> None:
    async with running({}) as (emulator, request):
        await request()
        pass_time(40)
        await request()
    first, second = emulator.requests
    assert 0 <= first.received_at < 40
    assert 40 <= second.received_at - first.received_at < 80


async def test_each_request_is_passed_to_a_function_before_it_is_answered() -> None:
    passed: list[ReceivedRequest] = []
    async with Emulator(port=0, on_request=passed.append) as emulator, Wire(emulator) as wire:
        emulator.add_runtime("ws", "crm")
        emulator.inject(Fault.HANG)
        await wire.send()
        await until(lambda: passed)
        assert passed == emulator.requests
        assert wire.unread == b""


# Each fault.


@pytest.mark.parametrize("fault", Fault)
async def test_a_stop_took_effect_exactly_when_the_fault_says_so(
    emulator: Emulator, wire: Wire, fault: Fault
) -> None:
    emulator.inject(fault)
    await wire.send()
    await until(lambda: emulator.requests)
    assert (emulator.status("ws", "crm") != "active") is fault.takes_effect
    assert emulator.requests[0].fault is fault


def test_every_fault_has_a_docstring() -> None:
    tree = ast.parse(Path(_faults.__file__).read_text())
    (faults,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Fault"]
    kinds = [type(node) for node in faults.body[1:-1]]
    assert kinds == [ast.Assign, ast.Expr] * len(Fault)


async def test_every_delay_is_as_long_as_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    real_sleep = asyncio.sleep

    async def sleep(delay: float) -> None:
        slept.extend([delay] if delay else [])
        await real_sleep(0)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    async with (
        Emulator(port=0, latency=3, fault_latency=40) as slow,
        Wire(slow) as wire,
    ):
        slow.add_runtime("ws", "crm")
        for path, fault, expected in [
            ("/elsewhere", None, [3]),
            (path_of("ws", "crm"), None, [3]),
            (path_of("ws", "crm"), Fault.LATENCY, [43]),
        ]:
            slow.inject(*[fault] if fault else [])
            await wire.send(path)
            await wire.answer()
            assert slept == expected
            slept.clear()
        slow.inject(Fault.SLOW_DRIP)
        await wire.send()
        _, body = await wire.answer()
        assert slept[: len(body)] == [3] + [40 / len(body)] * (len(body) - 1)


async def test_a_delayed_response_does_not_delay_others() -> None:
    async with (
        Emulator(port=0, fault_latency=3600) as emulator,
        Wire(emulator) as late,
        Wire(emulator) as normal,
    ):
        emulator.add_runtime("ws", "crm")
        emulator.inject(Fault.LATENCY)
        await late.send()
        await until(lambda: emulator.status("ws", "crm") == "stopped")
        await normal.send()
        assert (await normal.answer())[0] == 409


JSON, HTML = "application/json", "text/html"


@pytest.mark.parametrize(
    ("fault", "expected", "body"),
    [
        (Fault.RATE_LIMITED, (429, JSON, None), '{"code":"rate.limited",'),
        (Fault.SERVER_ERROR, (500, JSON, None), '{"code":"server.error",'),
        (Fault.BAD_GATEWAY, (502, HTML, None), "<html><head><title>502 "),
    ],
)
async def test_a_fault_with_an_answer_of_its_own_has_it_once(
    emulator: Emulator, stop: Stop, fault: Fault, expected: tuple[object, ...], body: str
) -> None:
    emulator.inject(fault)
    answer = await stop()
    headers = [answer.headers.get(name) for name in ("Content-Type", "Retry-After")]
    assert (answer.status, *headers) == expected
    assert answer.body.decode().startswith(body)
    assert (await stop()).status == (409 if fault.takes_effect else 200)


@pytest.mark.parametrize("fault", [Fault.DROP_BEFORE, Fault.DROP_AFTER])
async def test_a_dropped_connection_carries_no_byte_of_a_response(
    emulator: Emulator, stop: Stop, wire: Wire, fault: Fault
) -> None:
    emulator.inject(fault, fault)
    await wire.send()
    assert await wire.rest() == b""
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await stop()
    assert [request.status for request in emulator.requests] == [None, None]


async def test_a_kept_alive_connection_closes_after_a_complete_response(
    emulator: Emulator, wire: Wire
) -> None:
    emulator.inject(Fault.CLOSE_KEPT_ALIVE)
    await wire.send()
    status, headers = await wire.head()
    assert status == 200
    assert "connection" not in headers
    body = await wire.rest()
    assert len(body) == int(headers["content-length"])
    assert json.loads(body) == emulator.runtimes["ws", "crm"]


async def test_a_connection_without_a_fault_is_kept_alive(emulator: Emulator, wire: Wire) -> None:
    statuses = []
    for _ in range(3):
        await wire.send()
        statuses.append((await wire.answer())[0])
    assert statuses == [request.status for request in emulator.requests] == [200, 409, 409]


async def test_a_hanging_stop_takes_effect_and_ends_when_the_client_disconnects(
    emulator: Emulator,
) -> None:
    emulator.inject(Fault.HANG)
    before = asyncio.all_tasks()
    async with Wire(emulator) as wire:
        await wire.send()
        await until(lambda: emulator.status("ws", "crm") == "stopped")
        assert asyncio.all_tasks() > before
    await until(lambda: asyncio.all_tasks() == before)
    assert emulator.requests[0].status is None


async def test_a_slow_body_arrives_in_single_bytes_and_complete(
    emulator: Emulator, wire: Wire
) -> None:
    emulator.inject(Fault.SLOW_DRIP)
    await wire.send()
    status, headers = await wire.head()
    length = int(headers["content-length"])
    assert status == 200
    pieces = 0
    body = b""
    while len(body) < length:
        body += await wire.reader.read(length)
        pieces += 1
    assert json.loads(body) == emulator.runtimes["ws", "crm"]
    assert pieces > 1


async def test_a_client_that_disconnects_during_a_slow_body_is_not_an_error(
    emulator: Emulator, caplog: pytest.LogCaptureFixture
) -> None:
    emulator.inject(Fault.SLOW_DRIP)
    before = asyncio.all_tasks()
    async with Wire(emulator) as wire:
        await wire.send()
        await wire.reader.readuntil(b"{")
    await until(lambda: asyncio.all_tasks() == before)
    assert not caplog.records


async def test_truncated_json_promises_more_than_it_sends(
    emulator: Emulator, wire: Wire, stop: Stop
) -> None:
    emulator.inject(Fault.TRUNCATED_JSON, Fault.TRUNCATED_JSON)
    await wire.send()
    status, headers = await wire.head()
    assert status == 200
    assert 0 < len(await wire.rest()) < int(headers["content-length"])
    with pytest.raises(aiohttp.ClientPayloadError):
        await stop()


async def test_a_fault_of_the_body_breaks_the_contract_as_it_says(
    emulator: Emulator, stop: Stop
) -> None:
    bodies = {}
    for fault in (
        Fault.MALFORMED_JSON,
        Fault.OVERSIZED,
        Fault.UNKNOWN_VALUES,
        Fault.FAILED,
        Fault.ACCEPTED,
    ):
        emulator.inject(fault)
        answer = await stop()
        assert (answer.status, answer.headers["Content-Type"]) == (200, JSON)
        bodies[fault] = answer.body
    with pytest.raises(json.JSONDecodeError):
        json.loads(bodies.pop(Fault.MALFORMED_JSON))
    assert len(bodies[Fault.OVERSIZED]) > 2 * 2**20
    assert set(json.loads(bodies[Fault.UNKNOWN_VALUES])) > set(emulator.runtimes["ws", "crm"])
    errors = {fault: errors_against_contract(json.loads(body)) for fault, body in bodies.items()}
    unknown = errors.pop(Fault.UNKNOWN_VALUES)
    assert ["is not one of" in text for text in unknown] == [True] * 3
    assert errors == {Fault.OVERSIZED: [], Fault.FAILED: [], Fault.ACCEPTED: []}


async def test_a_bomb_is_small_on_the_wire_and_huge_unpacked(
    emulator: Emulator, wire: Wire
) -> None:
    emulator.inject(Fault.COMPRESSED_BOMB)
    await wire.send()
    _, headers = await wire.head()
    length = int(headers["content-length"])
    assert headers["content-encoding"] == "gzip"
    assert length < 100 * 2**10
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16)
    body = unpacker.decompress(await wire.reader.readexactly(length))
    assert unpacker.eof
    assert len(body) > 64 * 2**20
    assert (body[:12], body[-2:]) == (b'{"padding":"', b'"}')


@pytest.mark.parametrize(
    ("fault", "said", "is_now"),
    [
        (Fault.FAILED, "failed", "failed"),
        (Fault.ACCEPTED, "active", "stopped"),
        (Fault.UNKNOWN_VALUES, "paused", "stopped"),
    ],
)
async def test_a_fault_of_the_body_answers_200_for_a_stopped_runtime_too(
    emulator: Emulator, stop: Stop, fault: Fault, said: str, is_now: str
) -> None:
    emulator.inject(fault, fault)
    for _ in range(2):
        answer = await stop()
        assert (answer.status, answer.json.get("status")) == (200, said)
        assert emulator.status("ws", "crm") == is_now
    assert (await stop()).status == 409


async def test_a_read_that_is_to_say_failed_says_it_and_changes_nothing(
    emulator: Emulator, client: aiohttp.ClientSession
) -> None:
    """Fault: it said what was true."""
    emulator.inject(Fault.FAILED, method="GET")
    answer = await send(client, "/v1/workspaces/ws/runtimes/crm", "GET")
    assert (answer.status, answer.json["status"]) == (200, "failed")
    assert emulator.status("ws", "crm") == "active"


async def test_a_client_that_follows_the_redirect_is_recorded(
    emulator: Emulator, client: aiohttp.ClientSession
) -> None:
    emulator.inject(Reply(307, headers={"Location": "/moved"}))
    async with client.post(path_of("ws", "crm")) as response:
        assert response.status == 404
    assert [request.status for request in emulator.requests] == [307, 404]
    assert emulator.requests[1].raw_path == "/moved"
    assert emulator.requests[1].headers["Authorization"] == "Bearer emulator-key"
    assert emulator.status("ws", "crm") == "active"


async def test_a_stray_answer_is_a_403_right_behind_the_response(
    emulator: Emulator, wire: Wire
) -> None:
    emulator.inject(Fault.STRAY_ANSWER)
    await wire.send()
    assert await wire.answer() == (200, encode(emulator.runtimes["ws", "crm"]))
    # It came in the same segment: it is there without waiting.
    assert b"HTTP/1.1 403 Forbidden\r\n" in wire.unread
    status, body = await wire.answer()
    assert (status, json.loads(body)["code"]) == (403, "auth.forbidden")


async def test_a_late_stray_answer_is_a_200_about_another_runtime(
    emulator: Emulator, wire: Wire
) -> None:
    emulator.inject(Fault.LATE_STRAY_ANSWER)
    await wire.send()
    assert await wire.answer() == (200, encode(emulator.runtimes["ws", "crm"]))
    assert wire.unread == b""
    status, body = await wire.answer()
    stray = json.loads(body)
    assert (status, stray["alias"], stray["status"]) == (200, "stray", "stopped")
    assert errors_against_contract(stray) == []
    assert set(emulator.runtimes) == {("ws", "crm")}


@pytest.mark.parametrize("fault", [Fault.STRAY_ANSWER, Fault.LATE_STRAY_ANSWER])
async def test_a_stray_answer_shifts_all_that_follow_on_its_connection(
    emulator: Emulator, wire: Wire, fault: Fault
) -> None:
    emulator.inject(fault)
    statuses = []
    for _ in range(3):
        await wire.send()
        statuses.append((await wire.answer())[0])
    stray = 403 if fault is Fault.STRAY_ANSWER else 200
    assert statuses == [200, stray, 409]
    await until(lambda: len(emulator.requests) == 3)
    assert [request.status for request in emulator.requests] == [200, 409, 409]


async def test_a_client_that_leaves_before_a_late_stray_answer_is_not_an_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Emulator(port=0, fault_latency=3600) as emulator:
        emulator.add_runtime("ws", "crm")
        emulator.inject(Fault.LATE_STRAY_ANSWER)
        before = asyncio.all_tasks()
        async with Wire(emulator) as wire:
            await wire.send()
            await wire.answer()
        await until(lambda: asyncio.all_tasks() == before)
    assert not caplog.records


@pytest.mark.parametrize(
    "fault",
    [
        Fault.LATENCY,
        Fault.SLOW_DRIP,
        Fault.CLOSE_KEPT_ALIVE,
        Fault.STRAY_ANSWER,
        Fault.LATE_STRAY_ANSWER,
    ],
)
async def test_a_fault_of_the_connection_carries_the_normal_response(
    emulator: Emulator, fault: Fault
) -> None:
    emulator.inject(fault, fault)
    for expected in (200, 409):
        async with Wire(emulator) as wire:
            await wire.send()
            assert (await wire.answer())[0] == expected


# Selection of faults.


async def test_injected_faults_are_met_in_order_and_once(emulator: Emulator, stop: Stop) -> None:
    emulator.inject(Fault.RATE_LIMITED, Fault.SERVER_ERROR)
    emulator.inject(Reply(503))
    assert [(await stop()).status for _ in range(4)] == [429, 500, 503, 200]


async def test_a_fault_for_a_target_waits_for_it(emulator: Emulator, stop: Stop) -> None:
    for target in [("ws", "mail"), ("b", "crm"), ("b", "mail")]:
        emulator.add_runtime(*target)
    emulator.inject(Fault.RATE_LIMITED, workspace_id="ws", alias="crm")
    emulator.inject(Fault.SERVER_ERROR, workspace_id="b")
    emulator.inject(Reply(503), alias="crm")
    emulator.inject(Fault.BAD_GATEWAY)
    statuses = [
        (await stop("b", "mail")).status,
        (await stop("ws", "crm")).status,
        (await stop("b", "crm")).status,
        (await stop("ws", "mail")).status,
        (await stop("ws", "crm")).status,
    ]
    assert statuses == [500, 429, 503, 502, 200]


async def test_a_fault_waits_for_a_valid_key_and_a_known_runtime(
    emulator: Emulator, client: aiohttp.ClientSession, stop: Stop
) -> None:
    emulator.inject(Fault.SERVER_ERROR)
    statuses = [
        (await send(client, path_of("ws", "crm"), Authorization="no")).status,
        (await send(client, "/")).status,
        (await stop("ws", "gone")).status,
        (await stop()).status,
    ]
    assert statuses == [401, 404, 404, 500]


async def test_a_poisoned_runtime_meets_its_fault_in_every_request_until_it_is_cleared(
    emulator: Emulator, client: aiohttp.ClientSession, stop: Stop
) -> None:
    emulator.add_runtime("ws", "mail")
    emulator.poison("ws", "crm", Fault.SERVER_ERROR)
    read = "/v1/workspaces/ws/runtimes/crm"
    assert [(await stop()).status for _ in range(3)] == [500] * 3
    assert (await send(client, read, "GET")).status == 500
    assert (await stop("ws", "mail")).status == 200

    emulator.poison("ws", "crm", Fault.RATE_LIMITED)
    assert (await stop()).status == 429
    emulator.poison("ws", "crm", None)
    emulator.poison("ws", "crm", None)
    assert (await send(client, read, "GET")).json["status"] == "active"
    assert (await stop()).status == 200


async def test_the_list_of_a_poisoned_workspace_is_read_as_usual(
    emulator: Emulator, client: aiohttp.ClientSession
) -> None:
    emulator.poison("ws", "crm", Fault.SERVER_ERROR)
    assert (await send(client, "/v1/workspaces/ws/runtimes", "GET")).status == 200


async def test_poison_wins_over_injected_faults_which_stay_in_their_queue(
    emulator: Emulator, stop: Stop
) -> None:
    emulator.inject(Fault.RATE_LIMITED, alias="crm")
    emulator.poison("ws", "crm", Fault.SERVER_ERROR)
    assert (await stop()).status == 500
    emulator.poison("ws", "crm", None)
    assert [(await stop()).status for _ in range(2)] == [429, 200]


@pytest.mark.parametrize(("rate_limit", "expected"), [(0.001, {200: 1, 429: 9}), (1e6, {200: 10})])
async def test_requests_above_the_rate_limit_get_a_429_and_change_nothing(
    rate_limit: float, expected: dict[int, int]
) -> None:
    async with running({"rate_limit": rate_limit}) as (emulator, request):
        for number in range(10):
            emulator.add_runtime("ws", f"r{number}")
        answers = [await request(f"r{number}") for number in range(10)]
    assert Counter(answer.status for answer in answers) == expected
    stopped = [runtime["status"] for runtime in emulator.runtimes.values()].count("stopped")
    assert stopped == expected[200]
    assert emulator.received.total() == 10


async def faults_met(
    order: list[tuple[str, str]], faults: Mapping[Fault, float], *, seed: int = 7
) -> dict[tuple[str, str], list[Fault | Reply | None]]:
    met: dict[tuple[str, str], list[Fault | Reply | None]] = {}
    async with (
        Emulator(port=0, faults=faults, seed=seed) as emulator,
        aiohttp.ClientSession(emulator.url, headers=KEY) as client,
    ):
        for target in order:
            emulator.add_runtime(*target)
        await asyncio.gather(*(send(client, path_of(*target)) for target in order))
    for request in emulator.requests:
        assert request.workspace_id is not None
        assert request.alias is not None
        met.setdefault((request.workspace_id, request.alias), []).append(request.fault)
    return met


TARGETS = [(f"ws{number % 3}", f"a{number}") for number in range(30)] * 4
SOME = {Fault.SERVER_ERROR: 0.25, Fault.RATE_LIMITED: 0.25, Fault.ACCEPTED: 0.0}


async def test_a_seed_repeats_its_faults_whatever_the_order_of_requests() -> None:
    met = await faults_met(TARGETS, SOME)
    turned = await faults_met(TARGETS[::-1], dict(reversed(SOME.items())))
    alone = await faults_met(TARGETS[:1] * 4, SOME)
    assert met == turned
    assert alone == {TARGETS[0]: met[TARGETS[0]]}


async def test_targets_with_the_same_concatenated_name_draw_independently() -> None:
    met = await faults_met([("a", "bc"), ("ab", "c")] * 30, SOME)
    assert met["a", "bc"] != met["ab", "c"]


async def test_another_seed_draws_other_faults() -> None:
    assert await faults_met(TARGETS, SOME) != await faults_met(TARGETS, SOME, seed=8)


async def test_each_fault_occurs_with_its_probability() -> None:
    met = await faults_met(TARGETS * 5, SOME)
    drawn = [fault for faults in met.values() for fault in faults]
    for fault, share in {Fault.SERVER_ERROR: 0.25, Fault.RATE_LIMITED: 0.25, None: 0.5}.items():
        assert abs(drawn.count(fault) / len(drawn) - share) < 0.08
    assert Fault.ACCEPTED not in drawn


async def test_certain_faults_always_occur_and_impossible_ones_never() -> None:
    certain = await faults_met(TARGETS, {Fault.SERVER_ERROR: 0.5, Fault.RATE_LIMITED: 0.5})
    impossible = await faults_met(TARGETS, {Fault.SERVER_ERROR: 0.0})
    assert all(None not in faults for faults in certain.values())
    assert all(set(faults) == {None} for faults in impossible.values())


async def test_an_injected_fault_wins_over_a_random_one() -> None:
    async with running({"faults": {Fault.SERVER_ERROR: 1}}) as (emulator, request):
        emulator.inject(Fault.RATE_LIMITED, None)
        assert [(await request()).status for _ in range(3)] == [429, 200, 500]


# Start and close.


async def test_a_free_port_is_picked_and_named_in_the_url() -> None:
    async with Emulator(port=0) as one, Emulator(port=0) as other:
        assert one.url.startswith("http://127.0.0.1:")
        assert one.url != other.url


async def test_an_ipv6_address_stands_in_brackets() -> None:
    try:
        async with Emulator(host="::1", port=0) as emulator, aiohttp.ClientSession() as client:
            assert emulator.url.startswith("http://[::1]:")
            async with client.get(emulator.url) as response:
                assert response.status == 404
    except OSError as error:  # pragma: no cover - depends on the machine
        pytest.skip(f"no IPv6 here: {error}")


async def test_the_repr_is_of_use_in_a_failed_test(emulator: Emulator, stop: Stop) -> None:
    assert repr(Emulator()) == "<Emulator not started, 0 runtimes, 0 requests>"
    await stop()
    assert repr(emulator) == f"<Emulator {emulator.url}, 1 runtimes, 1 requests>"


def test_there_is_no_url_before_the_start() -> None:
    with pytest.raises(RuntimeError, match=r"await start\(\)"):
        _ = Emulator(port=0).url


async def test_a_port_in_use_is_an_error_and_the_emulator_can_try_again() -> None:
    port = free_port()
    async with Emulator(port=port) as emulator:
        second = Emulator(port=port)
        with pytest.raises(OSError, match="address already in use"):
            await second.start()
    await second.start()
    assert second.url == emulator.url
    await second.close()


async def test_an_emulator_starts_only_once() -> None:
    async with Emulator(port=0) as emulator:
        with pytest.raises(RuntimeError, match="make a new Emulator"):
            await emulator.start()


async def test_close_may_be_called_twice_or_before_start() -> None:
    emulator = Emulator(port=0)
    await emulator.close()
    await emulator.start()
    await emulator.close()
    await emulator.close()
    with pytest.raises(ConnectionRefusedError):
        await Wire(emulator).__aenter__()


@pytest.mark.parametrize(
    "fault", [Fault.HANG, Fault.LATENCY, Fault.SLOW_DRIP, Fault.OVERSIZED, Fault.LATE_STRAY_ANSWER]
)
async def test_close_aborts_pending_responses_and_leaves_no_task(
    fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    before = asyncio.all_tasks()
    emulator = Emulator(port=0, fault_latency=3600)
    emulator.add_runtime("ws", "crm")
    emulator.inject(fault)
    await emulator.start()
    async with asyncio.timeout(BOUND), Wire(emulator) as idle, Wire(emulator) as busy:
        await busy.send()
        await until(lambda: emulator.requests)
        await emulator.close()
        assert asyncio.all_tasks() == before
        assert await idle.rest() == b""
        await busy.rest()
    assert not caplog.records


@pytest.mark.parametrize("iterations", range(8))
async def test_close_aborts_a_connection_that_is_being_accepted(iterations: int) -> None:
    before = asyncio.all_tasks()
    emulator = Emulator(port=0)
    await emulator.start()
    url = URL(emulator.url)
    # The kernel completes the connection; the event loop sees it some iterations later.
    with socket.create_connection((str(url.host), url.port), timeout=BOUND) as connection:
        for _ in range(iterations):
            await asyncio.sleep(0)
        await emulator.close()
        assert asyncio.all_tasks() == before
        with suppress(ConnectionResetError):
            assert connection.recv(1) == b""


@pytest.mark.parametrize("iterations", range(8))
async def test_a_connection_made_during_close_is_aborted(iterations: int) -> None:
    before = asyncio.all_tasks()
    emulator = Emulator(port=0)
    await emulator.start()
    url = URL(emulator.url)
    closing = asyncio.create_task(emulator.close())
    for _ in range(iterations):
        await asyncio.sleep(0)
    with (
        suppress(ConnectionError),
        socket.create_connection((str(url.host), url.port), timeout=BOUND) as connection,
    ):
        await closing
        assert connection.recv(1) == b""
    await closing
    assert asyncio.all_tasks() == before


async def test_close_in_the_middle_of_a_body_is_not_an_error(
    emulator: Emulator, wire: Wire, caplog: pytest.LogCaptureFixture
) -> None:
    emulator.inject(Fault.SLOW_DRIP)
    await wire.send()
    await wire.reader.readuntil(b"{")
    await emulator.close()
    assert not (await wire.rest()).endswith(b"}")
    assert not caplog.records


async def test_close_waits_for_a_connection_that_is_already_closing() -> None:
    emulator = Emulator(port=0)
    await emulator.start()
    async with Wire(emulator) as wire:
        await until(lambda: emulator._server.connections)
        emulator._server.connections[0].force_close()
        await emulator.close()
        assert emulator._server.connections == []
        assert await wire.rest() == b""


# Arguments.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Emulator(port=-1), "port is -1: give 0 to 65535"),
        (lambda: Emulator(port=65536), "port is 65536: give 0 to 65535"),
        (lambda: Emulator(api_key=""), "api_key is empty: give"),
        (lambda: Emulator(latency=-1), "latency is -1: give 0 to 86400"),
        (lambda: Emulator(rate_limit=0), "rate_limit is 0: give 0.0001 to 1000000"),
        (lambda: Emulator(rate_limit=float("inf")), "rate_limit is inf: give 0.0001 to"),
        (lambda: Emulator(fault_latency=float("nan")), "fault_latency is nan: give 0 to"),
        (lambda: Emulator(faults={Fault.HANG: -0.1}), r"faults\[hang\] is -0.1: give 0 to 1"),
        (lambda: Emulator(faults={Fault.HANG: 1.1}), r"faults\[hang\] is 1.1: give 0 to 1"),
        (lambda: Emulator(faults={Fault.HANG: float("nan")}), r"faults\[hang\] is nan: give 0"),
        (
            lambda: Emulator(faults={Fault.HANG: 0.6, Fault.FAILED: 0.6}),
            "add up to 1.2: give probabilities of at most 1 together",
        ),
        (lambda: Emulator(faults={cast("Fault", "x"): 0.1}), "'x': give members of Fault"),
        (
            lambda: Emulator(faults={Fault.HANG: cast("float", "1")}),
            r"faults\[hang\] is '1': give int or float, not str",
        ),
        (lambda: Emulator(on_request=cast("Callable[..., object]", 1)), "on_request is 1: give a"),
        (lambda: Emulator().add_runtime("", "crm"), "workspace_id is empty"),
        (lambda: Emulator().add_runtime("ws", ""), "alias is empty"),
        (lambda: Emulator().add_runtime("ws", "\ud800"), "surrogates not allowed"),
        (lambda: Emulator().add_runtime("\ud800", "crm"), "surrogates not allowed"),
        (lambda: Emulator().add_runtime("ws", "crm", kind="car"), "'car': give one of browser"),
        (lambda: Emulator().add_runtime("ws", "crm", status="on"), "'on': give one of active"),
    ],
)
def test_an_invalid_argument_is_an_error_with_advice(
    make: Callable[[], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make()


_OF_A_WRONG_TYPE: list[tuple[Callable[..., object], dict[str, object]]] = [
    (Emulator, {"host": 1, "port": "1", "api_key": b"x", "faults": [], "seed": 0.5}),
    (Emulator, {"latency": "1", "fault_latency": None, "rate_limit": True}),
    (Emulator, {"port": True, "latency": True, "on_request": "x"}),
    (
        partial(Emulator().add_runtime, workspace_id="ws", alias="crm"),
        {"workspace_id": 1, "alias": None, "kind": 1, "status": [], "created_at": 0.5},
    ),
    (
        partial(Emulator().status, workspace_id="ws", alias="crm"),
        {"workspace_id": UUID(int=1), "alias": None},
    ),
    (Emulator().inject, {"workspace_id": 1, "alias": b"x", "method": "get"}),
    (
        partial(Emulator().poison, workspace_id="ws", alias="crm", fault=None),
        {"workspace_id": 1, "alias": None, "fault": "hang"},
    ),
]


@pytest.mark.parametrize(("make", "values"), _OF_A_WRONG_TYPE)
def test_an_argument_of_a_wrong_type_is_an_error_that_names_it(
    make: Callable[..., object], values: dict[str, object]
) -> None:
    for name, value in values.items():
        with pytest.raises(ValueError, match=rf"^{name} (is|has) .*: give "):
            make(**{name: value})


def test_probabilities_may_add_up_to_one_in_floating_point() -> None:
    assert sum([1 / len(Fault)] * len(Fault)) == pytest.approx(1)
    Emulator(faults=dict.fromkeys(Fault, 1 / len(Fault)))


def test_runtimes_is_a_view_that_cannot_be_written() -> None:
    emulator = Emulator()
    view = emulator.runtimes
    emulator.add_runtime("ws", "crm")
    assert list(view) == [("ws", "crm")]
    with pytest.raises(TypeError):
        cast("dict[tuple[str, str], WireRuntime]", view)["ws", "mail"] = view["ws", "crm"]
