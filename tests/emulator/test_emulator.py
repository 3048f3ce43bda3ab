"""The emulator on the wire: other tests rely on it, so it has tests of its own."""

import asyncio
import gzip
import json
import socket
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self, cast
from urllib.parse import quote
from uuid import UUID

import pytest
import yaml
from helpers import BOUND, free_port, pass_time
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from yarl import URL

from bctrl_async.emulator import Emulator, Fault, ReceivedRequest, Reply, WireRuntime
from bctrl_async.emulator._contract import parse_route

KEY = "Bearer emulator-key"
CONTRACT = Path(__file__).parents[2] / "docs" / "contract" / "openapi.yaml"
UUID_WORKSPACE = "6f1f7a52-9f0e-4d53-8a64-0d1c6d6d2f11"
LIST = "/v1/workspaces/ws/runtimes"
GET = f"{LIST}/crm"
STOP = f"{GET}/stop"


class Answer(NamedTuple):
    """An answer; the names of its headers are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, object]:
        return cast("dict[str, object]", json.loads(self.body))


class Wire:
    """A raw connection: the test writes every byte."""

    def __init__(self, emulator: Emulator) -> None:
        self._url = URL(emulator.url)

    async def __aenter__(self) -> Self:
        self.reader, self._writer = await asyncio.open_connection(self._url.host, self._url.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()
        with suppress(ConnectionError):
            await self._writer.wait_closed()

    async def send(
        self,
        path: str = STOP,
        method: str = "POST",
        key: str = KEY,
        *,
        body: bytes = b"",
        encoding: str = "identity",
    ) -> None:
        lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Authorization: {key}"]
        lines += [f"Content-Encoding: {encoding}", f"Content-Length: {len(body)}", "", ""]
        self._writer.write("\r\n".join(lines).encode() + body)
        await self._writer.drain()

    async def head(self) -> tuple[int, dict[str, str]]:
        async with asyncio.timeout(BOUND):
            lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().splitlines()
        pairs = [line.split(": ", 1) for line in lines[1:-1]]
        headers = {name.lower(): value for name, value in pairs}
        assert len(headers) == len(pairs), "a header was sent twice"
        return int(lines[0].split()[1]), headers

    async def answer(self) -> Answer:
        status, headers = await self.head()
        async with asyncio.timeout(BOUND):
            body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        return Answer(status, headers, body)

    @property
    def unread(self) -> bytes:
        """What has arrived and was not read."""
        return bytes(self.reader._buffer)  # type: ignore[attr-defined]

    async def rest(self) -> bytes:
        async with asyncio.timeout(BOUND):
            return await self.reader.read()


async def ask(emulator: Emulator, path: str = STOP, method: str = "POST", key: str = KEY) -> Answer:
    """Return the answer to a request, by default a stop of `crm` in `ws`."""
    async with Wire(emulator) as wire:
        await wire.send(path, method, key)
        return await wire.answer()


Send = Callable[..., Coroutine[object, object, Answer]]


@pytest.fixture
async def emulator() -> AsyncIterator[Emulator]:
    async with Emulator(port=0, fault_latency=0.001) as emulator:
        emulator.add_runtime("ws", "crm")
        yield emulator


@pytest.fixture
def send(emulator: Emulator) -> Send:
    return partial(ask, emulator)


@pytest.fixture
async def wire(emulator: Emulator) -> AsyncIterator[Wire]:
    async with Wire(emulator) as wire:
        yield wire


def path_of(workspace_id: str, alias: str) -> str:
    return f"/v1/workspaces/{workspace_id}/runtimes/{alias}/stop"


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


@pytest.mark.parametrize(
    ("workspace_id", "kind"),
    [("wörk/1", "desktop"), (UUID_WORKSPACE, "spreadsheet"), (UUID_WORKSPACE.upper(), "browser")],
)
async def test_a_stop_and_a_get_answer_with_the_runtime_as_in_the_contract(
    emulator: Emulator, send: Send, kind: str, workspace_id: str
) -> None:
    emulator.add_runtime(workspace_id, "crm", kind=kind)
    stop = path_of(quote(workspace_id, safe=""), "crm")
    before = await send(stop.removesuffix("/stop"), "GET")
    stopped = await send(stop)
    after = await send(stop.removesuffix("/stop"), "GET")

    for answer in (before, stopped, after):
        assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
        assert errors_against_contract(answer.json) == []
        assert (answer.json["kind"], answer.json["alias"]) == (kind, "crm")
    assert stopped.json == after.json == emulator.runtimes[workspace_id, "crm"]
    assert [each.json["status"] for each in (before, stopped)] == ["active", "stopped"]
    assert emulator.status(workspace_id, "crm") == "stopped"
    assert emulator.runtimes[workspace_id, "crm"]["summary"]["browserRunning"] is False
    assert str(stopped.json["updatedAt"]) > str(stopped.json["createdAt"])
    if workspace_id.lower() == UUID_WORKSPACE:
        assert stopped.json["workspaceId"] == UUID_WORKSPACE


def test_runtime_ids_are_unique_and_reproducible() -> None:
    one, other = Emulator(), Emulator()
    targets = [("ws", "crm"), ("ws", "mail"), ("w", "scrm"), ("ws2", "crm")]
    for target in targets:
        one.add_runtime(*target)
        other.add_runtime(*target)
    assert len({UUID(runtime["id"]) for runtime in one.runtimes.values()}) == len(targets)
    assert one.runtimes == other.runtimes


@pytest.mark.parametrize("status", ["stopped", "failed"])
async def test_stopping_an_inactive_runtime_is_a_conflict_and_changes_nothing(
    emulator: Emulator, send: Send, status: str
) -> None:
    emulator.add_runtime("ws", "crm", status=status)
    before = json.dumps(emulator.runtimes["ws", "crm"])
    answer = await send()
    assert (answer.status, answer.json["code"]) == (409, "runtime.not_active")
    assert json.dumps(emulator.runtimes["ws", "crm"]) == before
    assert emulator.runtimes["ws", "crm"]["summary"]["browserRunning"] is False


async def test_only_one_of_many_simultaneous_stops_succeeds(emulator: Emulator, send: Send) -> None:
    answers = await asyncio.gather(*(send() for _ in range(20)))
    assert sorted(answer.status for answer in answers) == [200] + [409] * 19
    assert emulator.received == {("ws", "crm"): 20}


@pytest.mark.parametrize(
    ("method", "path", "key", "expected"),
    [
        ("POST", path_of("ws", "mail"), KEY, (404, "runtime.not_found")),
        ("POST", path_of("other", "crm"), KEY, (404, "runtime.not_found")),
        ("GET", f"{LIST}/mail", KEY, (404, "runtime.not_found")),
        ("GET", "/v1/workspaces/other/runtimes", KEY, (404, "runtime.not_found")),
        ("POST", STOP, "emulator-key", (401, "auth.required")),
        ("POST", STOP, "", (401, "auth.required")),
        ("POST", path_of("ws", "mail"), "", (401, "auth.required")),
        ("GET", LIST, "Bearer wrong", (401, "auth.required")),
        ("GET", STOP, KEY, (405, "method.not_allowed")),
        ("POST", GET, KEY, (405, "method.not_allowed")),
        ("POST", "/", KEY, (404, "route.not_found")),
    ],
)
async def test_a_refusal_has_the_documented_fields_and_stops_nothing(  # noqa: PLR0917 - a table.
    emulator: Emulator, send: Send, method: str, path: str, key: str, expected: tuple[int, str]
) -> None:
    answer = await send(path, method, key)
    assert (answer.status, answer.json["code"]) == expected
    assert set(answer.json) == {"code", "error", "reasonClass", "requestId", "hint"}
    assert all(isinstance(value, str) and value for value in answer.json.values())
    assert answer.json["requestId"] == answer.headers["x-request-id"]
    if answer.status == 405:
        assert answer.headers["allow"] == ("POST" if path == STOP else "GET")
    assert emulator.status("ws", "crm") == "active"
    assert emulator.status("ws", "mail") is None
    is_known_stop = method == "POST" and answer.json["code"] == "runtime.not_found"
    assert emulator.received.total() == is_known_stop


async def test_the_key_is_configurable_and_can_be_rotated() -> None:
    async with Emulator(port=0, api_key="k2") as emulator:
        emulator.add_runtime("ws", "crm")
        keys = [KEY, "Bearer k2", "Bearer k3"]
        statuses = [(await ask(emulator, key=key)).status for key in keys]
        emulator.api_key = "k3"
        statuses += [(await ask(emulator, key=key)).status for key in keys]
    assert statuses == [401, 200, 401, 401, 401, 409]


@pytest.mark.parametrize(
    "path",
    [
        "/v2/workspaces/ws/runtimes/crm/stop",
        "/v1/workspaces/ws/runtimes/",
        "/v1/workspaces/../runtimes",
        "//v1/workspaces/ws/runtimes/crm/stop",
        "/v1/workspaces//runtimes/crm/stop",
        "/v1/workspaces/ws/runtimes/../stop",
        "/v1/workspaces/./runtimes/crm/stop",
        # These names are not percent-encoded UTF-8.
        *(path_of("ws", name) for name in ("%", "%zz", "%FF", "%ED%A0%80")),
    ],
)
async def test_an_unknown_path_is_not_found(emulator: Emulator, wire: Wire, path: str) -> None:
    await wire.send(path)
    answer = await wire.answer()
    assert (answer.status, answer.json["code"]) == (404, "route.not_found")
    assert not emulator.received
    [request] = emulator.requests
    assert (request.workspace_id, request.alias, request.raw_path) == (None, None, path)


def test_a_name_that_is_not_encoded_at_all_is_no_path() -> None:
    # aiohttp's C parser rejects such a path first, its Python parser does not.
    for segment in ("é", "\udcc3\udca9"):
        assert parse_route(path_of("ws", segment), {}) is None


async def test_a_list_has_all_runtimes_of_its_workspace_and_no_others(
    emulator: Emulator, send: Send
) -> None:
    emulator.add_runtime("ws", "a/b", status="failed", created_at="2026-11-25T08:00:00Z")
    emulator.add_runtime("other", "crm")
    answer = await send(LIST, "GET")
    failed = emulator.runtimes["ws", "a/b"]
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json == {"runtimes": [emulator.runtimes["ws", "crm"], failed]}
    assert (failed["status"], failed["createdAt"]) == ("failed", "2026-11-25T08:00:00Z")


# The two names of a workspace.


async def test_a_workspace_is_known_by_the_uuid_of_its_answers_as_well(
    emulator: Emulator, send: Send
) -> None:
    workspace_id = emulator.runtimes["ws", "crm"]["workspaceId"]
    assert str(UUID(workspace_id)) == workspace_id
    for prefix in (workspace_id, "ws"):
        listed = await send(f"/v1/workspaces/{prefix}/runtimes", "GET")
        assert listed.json == {"runtimes": [emulator.runtimes["ws", "crm"]]}

    stops = [workspace_id, "ws", workspace_id.upper()]
    assert [(await send(path_of(name, "crm"))).status for name in stops] == [200, 409, 404]
    assert emulator.received["ws", "crm"] == 2
    assert [request.workspace_id for request in emulator.requests[:4]] == ["ws"] * 4
    assert workspace_id in emulator.requests[2].raw_path
    assert emulator.status(workspace_id, "crm") == "stopped"
    emulator.assert_stopped(workspace_id, "crm")


async def test_faults_are_met_under_either_name_of_a_workspace(
    emulator: Emulator, send: Send
) -> None:
    workspace_id = emulator.runtimes["ws", "crm"]["workspaceId"]
    paths = [path_of(workspace_id, "crm"), STOP]
    emulator.inject(Fault.SERVER_ERROR, workspace_id=workspace_id)
    emulator.inject(Reply(503), workspace_id="ws", alias="crm")
    assert [(await send(path)).status for path in paths] == [503, 500]
    emulator.poison(workspace_id, "crm", Fault.RATE_LIMITED)
    assert [(await send(path)).status for path in paths] == [429, 429]


async def test_a_workspace_that_is_named_by_a_uuid_is_not_taken_for_another(
    emulator: Emulator, send: Send
) -> None:
    workspace_id = emulator.runtimes["ws", "crm"]["workspaceId"]
    emulator.add_runtime(workspace_id, "mail")
    emulator.add_runtime("ws", "note")
    assert (await send(path_of(workspace_id, "mail"))).status == 200
    assert (await send(path_of(workspace_id, "crm"))).status == 404


# Exact names.


@pytest.mark.parametrize(
    ("segment", "name"),
    [
        ("a%2Fb", "a/b"),
        ("%252F", "%2F"),
        ("%2e%2E", ".."),
        ("a+b", "a+b"),
        ("%00%0D%0A", "\0\r\n"),
        ("cafe%CC%81", "cafe\u0301"),
    ],
)
async def test_a_name_is_decoded_from_the_bytes_on_the_wire(
    emulator: Emulator, wire: Wire, segment: str, name: str
) -> None:
    emulator.add_runtime(name, name)
    await wire.send(path_of(segment, segment))
    assert (await wire.answer()).status == 200
    [received] = emulator.requests
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


@settings(max_examples=50)
@given(st.lists(st.tuples(names, names), min_size=1, max_size=10, unique=True))
def test_any_two_strings_arrive_exactly(targets: list[tuple[str, str]]) -> None:
    emulator = asyncio.run(send_all(targets))
    assert [(r.workspace_id, r.alias) for r in emulator.requests] == targets
    assert [r.status for r in emulator.requests] == [200] * len(targets)
    assert emulator.received == dict.fromkeys(targets, 1)


# Recording.


async def test_a_request_is_recorded_as_it_arrived(emulator: Emulator, wire: Wire) -> None:
    emulator.inject(Fault.SERVER_ERROR)
    packed = gzip.compress(b"{}")
    path = f"{path_of('ws', '%63rm')}?x=/1"
    await wire.send(path, body=packed, encoding="gzip")
    await wire.answer()
    [received] = emulator.requests
    assert received == ReceivedRequest(
        workspace_id="ws",
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


async def test_requests_are_recorded_with_what_they_asked_for_and_were_answered(
    emulator: Emulator, send: Send
) -> None:
    expected = [
        ("GET", STOP, ("ws", "crm", None, 405)),
        ("POST", path_of("ws", "g%2Fone"), ("ws", "g/one", "stop", 404)),
        ("POST", STOP, ("ws", "crm", "stop", 200)),
        ("POST", STOP, ("ws", "crm", "stop", 409)),
        ("GET", GET, ("ws", "crm", "get", 200)),
        ("POST", GET, ("ws", "crm", None, 405)),
        ("GET", LIST, ("ws", None, "list", 200)),
        ("GET", "/v1", (None, None, None, 404)),
    ]
    answers = [await send(path, method) for method, path, _ in expected]
    requests = emulator.requests
    assert [
        (each.method, each.raw_path, (each.workspace_id, each.alias, each.operation, each.status))
        for each in requests
    ] == expected
    assert emulator.stops == requests[1:4]
    assert emulator.received == {("ws", "crm"): 2, ("ws", "g/one"): 1}
    assert len({answer.headers["x-request-id"] for answer in answers}) == len(answers)


async def test_the_time_between_two_requests_is_recorded() -> None:
    async with Emulator(port=0) as emulator:
        await ask(emulator)
        pass_time(40)
        await ask(emulator)
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


async def test_every_delay_is_as_long_as_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    real_sleep = asyncio.sleep

    async def sleep(delay: float) -> None:
        slept.extend([delay] if delay else [])
        await real_sleep(0)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    async with Emulator(port=0, latency=3, fault_latency=40) as slow, Wire(slow) as wire:
        slow.add_runtime("ws", "crm")
        for fault, expected in [(None, [3]), (Fault.RATE_LIMITED, [3]), (Fault.LATENCY, [43])]:
            slow.inject(fault)
            await wire.send()
            await wire.answer()
            assert slept == expected
            slept.clear()
        # A body that drips arrives byte by byte.
        slow.inject(Fault.SLOW_DRIP)
        await wire.send()
        body = (await wire.answer()).body
        assert slept[: len(body)] == [3] + [40 / len(body)] * (len(body) - 1)


JSON, HTML = "application/json", "text/html"
STOPPED = '"status":"stopped"'


@pytest.mark.parametrize(
    ("fault", "statuses", "said"),
    [
        # They answer two stops with the fault, and one without.
        (Fault.LATENCY, [200, 409, 409], STOPPED),
        (Fault.SLOW_DRIP, [200, 409, 409], STOPPED),
        (Fault.CLOSE_KEPT_ALIVE, [200, 409, 409], STOPPED),
        (Fault.STRAY_ANSWER, [200, 409, 409], STOPPED),
        (Fault.LATE_STRAY_ANSWER, [200, 409, 409], STOPPED),
        (Fault.RATE_LIMITED, [429, 429, 200], '{"code":"rate.limited",'),
        (Fault.SERVER_ERROR, [500, 500, 200], '{"code":"server.error",'),
        (Fault.BAD_GATEWAY, [502, 502, 409], "<html><head><title>502 "),
        (Fault.FAILED, [200, 200, 409], '"status":"failed"'),
        (Fault.ACCEPTED, [200, 200, 409], '"status":"active"'),
        (Fault.UNKNOWN_VALUES, [200, 200, 409], '"status":"paused"'),
    ],
)
async def test_a_fault_is_answered_as_it_says(
    emulator: Emulator, send: Send, fault: Fault, statuses: list[int], said: str
) -> None:
    emulator.inject(fault, fault)
    answers = [await send() for _ in statuses]
    assert [answer.status for answer in answers] == statuses
    kind = HTML if fault is Fault.BAD_GATEWAY else JSON
    assert answers[0].headers["content-type"] == kind
    assert "retry-after" not in answers[0].headers
    assert said in answers[0].body.decode()
    assert (fault is Fault.FAILED) is (emulator.status("ws", "crm") == "failed")
    if statuses[0] == 200 and fault is not Fault.UNKNOWN_VALUES:
        assert errors_against_contract(answers[0].json) == []


@pytest.mark.parametrize("fault", [Fault.DROP_BEFORE, Fault.DROP_AFTER])
async def test_a_dropped_connection_carries_no_byte_of_a_response(
    emulator: Emulator, wire: Wire, fault: Fault
) -> None:
    emulator.inject(fault)
    await wire.send()
    assert await wire.rest() == b""
    assert emulator.requests[0].status is None


async def test_a_kept_alive_connection_closes_after_a_complete_response(
    emulator: Emulator, wire: Wire
) -> None:
    emulator.inject(Fault.CLOSE_KEPT_ALIVE)
    await wire.send()
    answer = await wire.answer()
    assert (answer.status, answer.json) == (200, emulator.runtimes["ws", "crm"])
    assert "connection" not in answer.headers
    assert await wire.rest() == b""


async def test_truncated_json_promises_more_than_it_sends(emulator: Emulator, wire: Wire) -> None:
    emulator.inject(Fault.TRUNCATED_JSON)
    await wire.send()
    status, headers = await wire.head()
    assert status == 200
    assert 0 < len(await wire.rest()) < int(headers["content-length"])


async def test_a_fault_of_the_body_breaks_the_contract_as_it_says(
    emulator: Emulator, send: Send
) -> None:
    faults = [Fault.MALFORMED_JSON, Fault.OVERSIZED, Fault.UNKNOWN_VALUES]
    emulator.inject(*faults)
    answers = [await send() for _ in faults]
    assert [(each.status, each.headers["content-type"]) for each in answers] == [(200, JSON)] * 3
    malformed, oversized, unknown = answers
    with pytest.raises(json.JSONDecodeError):
        json.loads(malformed.body)
    assert len(oversized.body) > 2 * 2**20
    assert errors_against_contract(oversized.json) == []
    assert set(unknown.json) > set(emulator.runtimes["ws", "crm"])
    errors = errors_against_contract(unknown.json)
    assert ["is not one of" in text for text in errors] == [True] * 3


async def test_a_bomb_is_small_on_the_wire_and_huge_unpacked(
    emulator: Emulator, wire: Wire
) -> None:
    emulator.inject(Fault.COMPRESSED_BOMB)
    await wire.send()
    answer = await wire.answer()
    assert answer.headers["content-encoding"] == "gzip"
    assert len(answer.body) < 100 * 2**10
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16)
    body = unpacker.decompress(answer.body)
    assert unpacker.eof
    assert len(body) > 64 * 2**20
    assert (body[:12], body[-2:]) == (b'{"padding":"', b'"}')


@pytest.mark.parametrize(
    ("fault", "statuses"),
    [
        (None, [200, 409, 409]),
        (Fault.STRAY_ANSWER, [200, 403, 409]),
        (Fault.LATE_STRAY_ANSWER, [200, 200, 409]),
    ],
)
async def test_a_stray_answer_shifts_all_that_follow_on_its_connection(
    emulator: Emulator, wire: Wire, fault: Fault | None, statuses: list[int]
) -> None:
    emulator.inject(fault)
    answers = []
    for number in range(3):
        await wire.send()
        answers.append(await wire.answer())
        if number == 0:
            # A stray answer in the same segment is there without waiting.
            assert wire.unread.startswith(b"HTTP/1.1 403") is (fault is Fault.STRAY_ANSWER)
    assert [answer.status for answer in answers] == statuses
    assert answers[0].json == emulator.runtimes["ws", "crm"]
    await until(lambda: len(emulator.requests) == 3)
    assert [request.status for request in emulator.requests] == [200, 409, 409]
    stray = answers[1].json
    if fault is Fault.STRAY_ANSWER:
        assert stray["code"] == "auth.forbidden"
    elif fault is Fault.LATE_STRAY_ANSWER:
        assert (stray["alias"], stray["status"]) == ("stray", "stopped")
        assert errors_against_contract(stray) == []
        assert set(emulator.runtimes) == {("ws", "crm")}


@pytest.mark.parametrize("fault", [Fault.HANG, Fault.SLOW_DRIP, Fault.LATE_STRAY_ANSWER])
async def test_a_client_that_leaves_ends_its_request_without_an_error(
    fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    async with Emulator(port=0, fault_latency=3600) as emulator:
        emulator.add_runtime("ws", "crm")
        emulator.inject(fault)
        before = asyncio.all_tasks()
        async with Wire(emulator) as wire:
            await wire.send()
            await until(lambda: emulator.status("ws", "crm") == "stopped")
            assert asyncio.all_tasks() > before
        await until(lambda: asyncio.all_tasks() == before)
        assert emulator.requests[0].status == (None if fault is Fault.HANG else 200)
    assert not caplog.records


# Selection of faults.


async def test_a_fault_for_a_target_waits_for_it(emulator: Emulator, send: Send) -> None:
    emulator.add_runtime("ws", "mail")
    emulator.add_runtime("b", "crm")
    emulator.inject(Fault.RATE_LIMITED, workspace_id="ws", alias="crm")
    emulator.inject(Fault.SERVER_ERROR, workspace_id="b")
    emulator.inject(Reply(503), alias="crm")
    emulator.inject(Fault.BAD_GATEWAY)
    # The queue of the target comes first, then the queues of the workspace, the alias, and all.
    targets = [("b", "crm"), ("ws", "crm"), ("b", "crm"), ("ws", "mail"), ("ws", "crm")]
    statuses = [(await send(path_of(*target))).status for target in targets]
    assert statuses == [500, 429, 503, 502, 200]


async def test_a_fault_waits_for_a_valid_key_and_a_known_runtime(
    emulator: Emulator, send: Send
) -> None:
    emulator.inject(Fault.SERVER_ERROR)
    statuses = [
        (await send(key="no")).status,
        (await send("/")).status,
        (await send(path_of("ws", "gone"))).status,
        (await send()).status,
    ]
    assert statuses == [401, 404, 404, 500]


@pytest.mark.parametrize("path", [GET, LIST])
async def test_faults_of_stops_and_of_reads_are_separate(
    emulator: Emulator, send: Send, path: str
) -> None:
    emulator.inject(Fault.RATE_LIMITED)
    emulator.inject(Fault.SERVER_ERROR, Fault.FAILED, method="GET")
    answers = [await send(path, "GET") for _ in range(3)]
    assert [answer.status for answer in answers] == [500, 200, 200]
    # It says so, and nothing has changed.
    assert answers[1].json["status"] == "failed"
    assert emulator.status("ws", "crm") == "active"
    assert (await send()).status == 429


async def test_a_poisoned_runtime_meets_its_fault_in_every_request_until_it_is_cleared(
    emulator: Emulator, send: Send
) -> None:
    emulator.add_runtime("ws", "mail")
    emulator.inject(Reply(502), alias="crm")
    emulator.poison("ws", "crm", Fault.SERVER_ERROR)
    assert [(await send()).status for _ in range(3)] == [500] * 3
    assert (await send(GET, "GET")).status == 500
    # Others are not touched, nor is the list of the workspace.
    assert (await send(path_of("ws", "mail"))).status == 200
    assert (await send(LIST, "GET")).status == 200

    emulator.poison("ws", "crm", Reply(403))
    assert (await send()).status == 403
    emulator.poison("ws", "crm", None)
    emulator.poison("ws", "crm", None)
    assert (await send(GET, "GET")).json["status"] == "active"
    # What was queued before is still there.
    assert [(await send()).status for _ in range(2)] == [502, 200]


@pytest.mark.parametrize(("rate_limit", "expected"), [(0.001, {200: 1, 429: 9}), (1e6, {200: 10})])
async def test_requests_above_the_rate_limit_get_a_429_and_change_nothing(
    rate_limit: float, expected: dict[int, int]
) -> None:
    async with Emulator(port=0, rate_limit=rate_limit) as emulator:
        for number in range(9):
            emulator.add_runtime("ws", f"r{number}")
        # It covers reads as well.
        answers = [await ask(emulator, f"{LIST}/r0", "GET")]
        answers += [await ask(emulator, path_of("ws", f"r{number}")) for number in range(9)]
    assert Counter(answer.status for answer in answers) == expected
    stopped = [runtime["status"] for runtime in emulator.runtimes.values()].count("stopped")
    assert stopped == expected[200] - 1
    assert emulator.received.total() == 9


async def test_random_faults_are_met_by_stops_only_and_after_injected_ones() -> None:
    async with Emulator(port=0, faults={Fault.SERVER_ERROR: 1}) as emulator:
        emulator.add_runtime("ws", "crm")
        emulator.inject(Fault.RATE_LIMITED, None)
        assert (await ask(emulator, GET, "GET")).status == 200
        assert [(await ask(emulator)).status for _ in range(3)] == [429, 200, 500]


async def faults_met(
    order: list[tuple[str, str]], faults: Mapping[Fault, float], *, seed: int = 7
) -> dict[tuple[str, str], list[Fault | Reply | None]]:
    met: dict[tuple[str, str], list[Fault | Reply | None]] = {}
    async with Emulator(port=0, faults=faults, seed=seed) as emulator:
        for target in order:
            emulator.add_runtime(*target)
        await asyncio.gather(*(ask(emulator, path_of(*target)) for target in order))
    for request in emulator.requests:
        met.setdefault(request.target, []).append(request.fault)
    return met


TARGETS = [(f"ws{number % 3}", f"a{number}") for number in range(30)] * 4
SOME = {Fault.SERVER_ERROR: 0.25, Fault.RATE_LIMITED: 0.25, Fault.ACCEPTED: 0.0}


async def test_a_seed_repeats_its_faults_whatever_the_order_of_requests() -> None:
    met = await faults_met(TARGETS, SOME)
    assert met == await faults_met(TARGETS[::-1], dict(reversed(SOME.items())))
    assert await faults_met(TARGETS[:1] * 4, SOME) == {TARGETS[0]: met[TARGETS[0]]}
    assert met != await faults_met(TARGETS, SOME, seed=8)
    similar = await faults_met([("a", "bc"), ("ab", "c")] * 30, SOME)
    assert similar["a", "bc"] != similar["ab", "c"]


async def test_each_fault_occurs_with_its_probability() -> None:
    met = await faults_met(TARGETS * 5, SOME)
    drawn = [fault for faults in met.values() for fault in faults]
    for fault, share in {Fault.SERVER_ERROR: 0.25, Fault.RATE_LIMITED: 0.25, None: 0.5}.items():
        assert abs(drawn.count(fault) / len(drawn) - share) < 0.08
    assert Fault.ACCEPTED not in drawn
    certain = await faults_met(TARGETS, {Fault.SERVER_ERROR: 0.5, Fault.RATE_LIMITED: 0.5})
    assert all(None not in faults for faults in certain.values())


# Start and close.


async def test_an_ipv6_address_stands_in_brackets() -> None:
    try:
        async with Emulator(host="::1", port=0) as emulator:
            assert emulator.url.startswith("http://[::1]:")
            assert (await ask(emulator)).status == 404
    except OSError as error:  # pragma: no cover - depends on the machine
        pytest.skip(f"no IPv6 here: {error}")


async def test_before_the_start_there_is_a_repr_and_no_url(emulator: Emulator, send: Send) -> None:
    assert repr(Emulator()) == "<Emulator not started, 0 runtimes, 0 requests>"
    with pytest.raises(RuntimeError, match=r"await start\(\)"):
        _ = Emulator(port=0).url
    await send()
    assert repr(emulator) == f"<Emulator {emulator.url}, 1 runtimes, 1 requests>"


async def test_a_port_in_use_is_an_error_and_the_emulator_can_try_again() -> None:
    port = free_port()
    async with Emulator(port=port) as emulator:
        second = Emulator(port=port)
        with pytest.raises(OSError, match="address already in use"):
            await second.start()
    async with second:
        assert second.url == emulator.url


async def test_an_emulator_starts_only_once_and_may_be_closed_at_any_time() -> None:
    emulator = Emulator(port=0)
    await emulator.close()
    await emulator.start()
    with pytest.raises(RuntimeError, match="make a new Emulator"):
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


@pytest.mark.parametrize("iterations", range(0, 8, 2))
@pytest.mark.parametrize("during", [False, True], ids=["before it", "during it"])
async def test_close_aborts_a_connection_that_was_just_made(
    iterations: int, *, during: bool
) -> None:
    before = asyncio.all_tasks()
    emulator = Emulator(port=0)
    await emulator.start()
    url = URL(emulator.url)
    closing = asyncio.ensure_future(emulator.close()) if during else None
    for _ in range(iterations if during else 0):
        await asyncio.sleep(0)
    # The kernel completes the connection; the event loop sees it some iterations later.
    with (
        suppress(*([ConnectionError] if during else [])),
        socket.create_connection((str(url.host), url.port), timeout=BOUND) as connection,
    ):
        for _ in range(0 if during else iterations):
            await asyncio.sleep(0)
        await (closing or emulator.close())
        with suppress(ConnectionResetError):
            assert connection.recv(1) == b""
    await (closing or emulator.close())
    assert asyncio.all_tasks() == before


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
        (lambda: Emulator(api_key=""), "api_key is empty: give"),
        (lambda: Emulator(rate_limit=0), "rate_limit is 0: give 0.0001 to 1000000"),
        (lambda: Emulator(fault_latency=float("nan")), "fault_latency is nan: give 0 to"),
        (lambda: Emulator(faults={Fault.HANG: -0.1}), r"faults\[hang\] is -0.1: give 0 to 1"),
        (lambda: Emulator(faults={Fault.HANG: 0.6, Fault.FAILED: 0.6}), "add up to 1.2: give"),
        (lambda: Emulator(faults={cast("Fault", "x"): 0.1}), "'x': give members of Fault"),
        (lambda: Emulator().add_runtime("", "crm"), "workspace_id is empty"),
        (lambda: Emulator().add_runtime("ws", ""), "alias is empty"),
        (lambda: Emulator().add_runtime("ws", "\ud800"), "surrogates not allowed"),
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


def test_runtimes_is_a_view_that_cannot_be_written() -> None:
    emulator = Emulator()
    view = emulator.runtimes
    emulator.add_runtime("ws", "crm")
    assert list(view) == [("ws", "crm")]
    with pytest.raises(TypeError):
        cast("dict[tuple[str, str], WireRuntime]", view)["ws", "mail"] = view["ws", "crm"]
