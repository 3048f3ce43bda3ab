"""Answers to another request, too many on a connection that is kept alive.

The simulation stops runtimes through servers that send such answers at any moment.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack, suppress
from typing import Literal
from unicodedata import normalize

import aiohttp
import pytest
from support.helpers import add_runtimes
from support.runtimes import WIRE, wire
from support.servers import Handler, http_answer, raw_server, recording, served
from support.tls import over_tls

from bctrl_async import (
    BctrlPermissionError,
    BctrlResponseError,
    BctrlSession,
    RetryPolicy,
    StopResult,
)
from bctrl_async._calls.results import result_of
from bctrl_async._http.fast.answer import _readable_check
from bctrl_async._http.response import check_answer, decode_runtime
from bctrl_async._kinds import Failure, Kind
from bctrl_async.emulator import Emulator

KEY = "a-key-that-is-not-shown"
WORKSPACE = str(WIRE["workspaceId"])
ANOTHER = "4b0d6b3e-6f0a-4b57-9a55-0f7f8f5d3c21"
QUICK = RetryPolicy(base=0.001, cap=0.001)
FORBIDDEN = http_answer("403 Forbidden", b'{"code": "auth.forbidden"}')


def stopped(alias: str) -> bytes:
    return http_answer("200 OK", wire(alias=alias))


def alias_in(head: bytes) -> str:
    return head.split(b" ")[1].split(b"/")[5].decode()


async def turns(count: int = 20) -> None:
    """Let everything happen that needs no time to pass."""
    for _ in range(count):
        await asyncio.sleep(0)


async def stop_one(session: BctrlSession) -> None:
    with suppress(BctrlPermissionError):
        await session.stop_runtime("ws-1", "crm")


def keeping(writers: list[asyncio.StreamWriter], *answers: bytes) -> Handler:
    """Keep the writer of each request; by default, say that it was stopped."""
    remaining = list(answers)

    async def handle(head: bytes, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        writer.write(remaining.pop(0) if remaining else stopped(alias_in(head)))

    return handle


class TestIdleConnections:
    @pytest.mark.parametrize(
        "arrived", [b"\r\n", b"HTTP/1.1 200 OK\r\n", stopped("crm"), b"\0"]
    )
    @pytest.mark.parametrize("first", [stopped("crm"), FORBIDDEN])
    @pytest.mark.parametrize("read", [True, False])
    async def test_any_byte_closes_it(
        self, arrived: bytes, first: bytes, *, read: bool
    ) -> None:
        """Fault: an answer's start vanishes in aiohttp's parser; its end follows.

        A busy loop reads its sockets only now and then, and takes connections in
        between.
        """
        writers: list[asyncio.StreamWriter] = []
        async with served(keeping(writers, first)) as session:
            await stop_one(session)
            writers[0].write(arrived)
            await turns(20 * read)
            await session.stop_runtime("ws-1", "crm")
        assert writers[1] is not writers[0]

    async def test_any_byte_closes_it_before_a_read(self) -> None:
        writers: list[asyncio.StreamWriter] = []
        async with served(keeping(writers)) as session:
            await session.stop_runtime("ws-1", "crm")
            writers[0].write(b"\0")
            await session.get_runtime("ws-1", "crm")
        assert writers[1] is not writers[0]

    @pytest.mark.parametrize("first", [stopped("crm"), FORBIDDEN])
    async def test_another_answer_behind_an_answer_closes_it(
        self, first: bytes
    ) -> None:
        writers: list[asyncio.StreamWriter] = []
        async with served(keeping(writers, first + first)) as session:
            await stop_one(session)
            await session.stop_runtime("ws-1", "crm")
        assert writers[1] is not writers[0]

    async def test_a_silent_tls_connection_is_used_again(
        self, emulator: Emulator
    ) -> None:
        """Fault: session tickets of TLS 1.3 count as bytes nobody asked for."""
        async with (
            over_tls(emulator) as server,
            BctrlSession(
                "emulator-key", base_url=server.url, ssl=server.trusted
            ) as session,
        ):
            for target in add_runtimes(emulator, 5):
                await session.stop_runtime(*target)
        assert server.trusted.session_stats()["connect"] == 1

    @pytest.mark.parametrize("transport", [None, asyncio.Transport()])
    def test_without_a_socket_nothing_is_unread(
        self, transport: asyncio.Transport | None
    ) -> None:
        assert not _readable_check(transport)()


class TestAnswersAboutAnotherRuntime:
    async def test_the_error_names_that_runtime_and_the_switch(self) -> None:
        async with served(stopped("mail"), retry=QUICK) as session:
            with pytest.raises(BctrlResponseError) as caught:
                await session.stop_runtime("ws-1", "crm")

        error = caught.value
        assert result_of(error) is StopResult.UNKNOWN
        assert str(error) == (
            "stop of 'crm' in workspace 'ws-1': the answer describes another runtime, "
            f"'mail' in workspace '{WORKSPACE}' (4 attempts, the runtime may have "
            "stopped). Retrying is safe. If a mock server answers with made-up data, "
            "pass check_answers=False to the session"
        )
        assert (error.status, error.may_have_stopped, error.accepted) == (
            None,
            True,
            False,
        )

    @pytest.mark.parametrize("place", [[KEY], KEY, KEY * 30_000])
    async def test_it_shows_no_key_that_the_answer_echoes(self, place: object) -> None:
        body = json.dumps({"alias": KEY, "workspaceId": place}).encode()
        async with served(http_answer("200 OK", body), KEY, retry=QUICK) as session:
            with pytest.raises(
                BctrlResponseError, match=r"another runtime, '\*\*\*'"
            ) as caught:
                await session.stop_runtime("ws-1", "crm")

        assert KEY not in f"{caught.value}{caught.value.__notes__}{vars(caught.value)}"
        assert len(str(caught.value)) < 2000

    @pytest.mark.parametrize(
        ("header", "borrowed"),
        [("X: 1", False), ("X: 1", True), ("Connection: close", False)],
    )
    async def test_the_retry_has_another_connection(
        self, header: str, *, borrowed: bool
    ) -> None:
        writers: list[asyncio.StreamWriter] = []
        foreign = http_answer("200 OK", wire(alias="mail"), header)
        async with (
            raw_server(keeping(writers, foreign)) as url,
            AsyncExitStack() as stack,
        ):
            http = (
                await stack.enter_async_context(aiohttp.ClientSession())
                if borrowed
                else None
            )
            async with BctrlSession(
                "k", base_url=url, http=http, retry=QUICK
            ) as session:
                assert (await session.stop_runtime("ws-1", "crm")).alias == "crm"
        assert writers[0] is not writers[1]

    async def test_a_get_of_another_runtime_is_an_error_and_stopped_nothing(
        self,
    ) -> None:
        async with served(stopped("mail"), retry=QUICK) as session:
            with pytest.raises(
                BctrlResponseError, match="another runtime, 'mail'"
            ) as caught:
                await session.get_runtime("ws-1", "crm")
        assert (caught.value.attempts, caught.value.may_have_stopped) == (4, False)

    async def test_a_list_of_another_workspace_stops_nothing(self) -> None:
        listed = {**WIRE, "status": "active", "workspaceId": ANOTHER}
        answer = http_answer("200 OK", json.dumps({"runtimes": ["?", listed]}).encode())
        heads: list[bytes] = []
        async with served(recording(heads, answer), retry=QUICK) as session:
            with pytest.raises(
                BctrlResponseError, match="the answer describes another runtime"
            ):
                await session.stop_workspace(WORKSPACE)
            assert len(await session.list_runtimes("a-name", on_unreadable=repr)) == 1
        assert not any(head.startswith(b"POST") for head in heads)

    async def test_without_the_check_an_answer_about_any_runtime_is_accepted(
        self,
    ) -> None:
        async with served(stopped("mail"), check_answers=False) as session:
            assert (await session.stop_runtime("ws-1", "crm")).alias == "mail"
            assert (await session.get_runtime(ANOTHER, "crm")).alias == "mail"


ID = str(WIRE["id"])
UNREADABLE = Failure(kind=Kind.UNREADABLE, summary="the answer cannot be read")


def belongs(
    parsed: object,
    workspace_id: str = "ws-1",
    alias: str | None = "crm",
    *,
    body: bytes = b"",
) -> bool:
    return check_answer(parsed, body, workspace_id, alias, "Bearer k") is None


@pytest.mark.parametrize(
    ("asked", "answered", "is_same"),
    [
        ("crm", "Crm", True),
        ("CAFE\u0301", "caf\u00e9", True),
        ("stra\u00dfe", "STRASSE", True),
        ("\u0390", "\u1fd3", True),
        # Case folding undoes the normalization.
        ("\u00df\u0301", "SS\u0301", True),
        # Each character is four in another form, and no text that is kept may be
        # shorter.
        ("\u1f82" * 1_000, "\u03b1\u0313\u0300\u0345" * 1_000, True),
        (ID.upper(), "crm", True),
        (ID.replace("-", ""), "crm", True),
        ("crm", "mail", False),
        ("crm", "", False),
        ("cafe", "caf\u00e9", False),
        ("x" * 1_000, "x" * 100_000, False),
        (ANOTHER, "crm", False),
        (WORKSPACE, "crm", False),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_an_alias_has_many_forms(asked: str, answered: str, *, is_same: bool) -> None:
    assert belongs(decode_runtime(wire(alias=answered)), alias=asked) is is_same


def test_a_long_alias_is_compared_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: 300 KB stalled the loop for a minute: normalizing is quadratic."""
    lengths: list[int] = []

    def normalized(form: Literal["NFC"], text: str) -> str:
        lengths.append(len(text))
        return normalize(form, text[:100])

    monkeypatch.setattr("bctrl_async._http.response.normalize", normalized)
    body = json.dumps({"alias": "e" + "\u0301\u0323" * 75_000}).encode()

    assert not belongs(UNREADABLE, body=body)
    assert max(lengths) <= 4 * len("crm")


@pytest.mark.parametrize(
    ("workspace_id", "is_same"),
    [
        (WORKSPACE.upper(), True),
        ("ws-1", True),
        (f"urn:uuid:{ANOTHER}", True),
        ("a-name-of-thirty-six-characters-0001", True),
        (ANOTHER.upper(), False),
    ],
)
def test_only_a_uuid_of_a_workspace_is_compared(
    workspace_id: str, *, is_same: bool
) -> None:
    assert belongs(decode_runtime(wire()), workspace_id) is is_same


@pytest.mark.parametrize(
    ("body", "is_same"),
    [
        (b'{"alias":"mail"}', False),
        (b'{"alias":"mail","id":"crm"}', True),
        (b'{"alias":"crm","driver":"\\ud83d"}', True),
        (b'{"alias":"crm","workspaceId":"%b"}' % WORKSPACE.upper().encode(), True),
        (b'{"alias":"crm","workspaceId":"%b"}' % ANOTHER.encode(), False),
        (b'{"id":"mail"}', True),
        (b'{"alias":"mail"', True),
        (b"[" * 100_000, True),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_an_invalid_answer_is_compared_by_its_names(
    body: bytes, *, is_same: bool
) -> None:
    """Fault: an answer about another runtime that lacked one field was `accepted`."""
    assert belongs(UNREADABLE, WORKSPACE, body=body) is is_same


@pytest.mark.parametrize(
    ("listed", "workspace_id", "is_same"),
    [
        ([], ANOTHER, True),
        ([UNREADABLE], ANOTHER, True),
        ([UNREADABLE, decode_runtime(wire())], WORKSPACE, True),
        ([UNREADABLE, decode_runtime(wire())], ANOTHER, False),
    ],
)
def test_a_list_is_compared_by_its_workspace(
    listed: list[object], workspace_id: str, *, is_same: bool
) -> None:
    assert belongs(listed, workspace_id, None) is is_same
