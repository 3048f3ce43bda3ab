"""`get_runtime` and `list_runtimes`: their results, and how they differ from a stop."""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import Literal
from unittest.mock import Mock

import pytest
from support.helpers import Connect, add_runtimes, pass_time, until, wait_for_requests
from support.runtimes import WIRE
from support.servers import answering, http_answer, served
from support.wire_faults import OVERSIZED, bomb

from bctrl_async import (
    BctrlConfigError,
    BctrlError,
    BctrlNetworkError,
    BctrlNotFoundError,
    BctrlResponseError,
    BctrlSession,
    Observer,
    RetryPolicy,
)
from bctrl_async.emulator import Emulator, Fault, Reply

Operation = Literal["get", "list"]


async def read(
    session: BctrlSession, operation: Operation, workspace_id: str = "ws-1"
) -> object:
    if operation == "get":
        return await session.get_runtime(workspace_id, "crm")
    return await session.list_runtimes(workspace_id)


both = pytest.mark.parametrize("operation", ["get", "list"])


class TestResults:
    async def test_a_get_returns_the_runtime_as_it_is(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        before = await session.get_runtime("ws-1", "crm")
        stopped = await session.stop_runtime("ws-1", "crm")

        assert before.status == "active"
        assert await session.get_runtime("ws-1", "crm") == stopped
        assert emulator.received == {("ws-1", "crm"): 1}

    async def test_requests_have_the_paths_of_the_contract_and_no_body(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        workspace = uuid.uuid4()
        emulator.add_runtime(str(workspace), "a/b")
        emulator.add_runtime(str(workspace), "mail", status="stopped")
        await session.get_runtime(workspace, "a/b")
        runtimes = await session.list_runtimes(workspace)

        # It has every runtime of the workspace, in the server's order.
        assert [(runtime.alias, runtime.status) for runtime in runtimes] == [
            ("a/b", "active"),
            ("mail", "stopped"),
        ]
        assert [(r.method, r.raw_path, r.body) for r in emulator.requests] == [
            ("GET", f"/v1/workspaces/{workspace}/runtimes/a%2Fb", b""),
            ("GET", f"/v1/workspaces/{workspace}/runtimes", b""),
        ]
        for request in emulator.requests:
            assert not {"Content-Length", "Content-Type"} & request.headers.keys()

    async def test_unknown_values_are_kept(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        emulator.inject(Fault.UNKNOWN_VALUES, method="GET")
        [runtime] = await session.list_runtimes("ws-1")
        assert (runtime.status, runtime.kind) == ("paused", "hologram")

    async def test_a_list_may_be_larger_than_a_runtime(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        add_runtimes(emulator, 5000)
        assert len(await session.list_runtimes("ws-1")) == 5001

        emulator.inject(OVERSIZED, method="GET")
        with pytest.raises(BctrlResponseError, match="more than 1 MiB"):
            await session.get_runtime("ws-1", "crm")

    @pytest.mark.parametrize(
        ("fault", "error_class", "message"),
        [
            (
                Fault.TRUNCATED_JSON,
                BctrlNetworkError,
                r"truncated.* \(request id req_4, 4 att.* the base URL and the network",
            ),
            (bomb(), BctrlResponseError, "more than 64 MiB"),
        ],
    )
    async def test_a_list_that_is_always_truncated_or_endless_is_an_error(
        self,
        emulator: Emulator,
        session: BctrlSession,
        fault: Fault | Reply,
        error_class: type[BctrlError],
        message: str,
    ) -> None:
        emulator.inject(*[fault] * 4, method="GET")
        with pytest.raises(error_class, match=message) as caught:
            await session.list_runtimes("ws-1")
        assert (caught.value.status, caught.value.may_have_stopped) == (200, False)


class TestInvalidRuntimes:
    """An invalid runtime in a list hides neither itself nor the others."""

    async def test_each_is_an_error_with_its_alias_that_a_callback_may_handle(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        odd = {**WIRE, "alias": "odd", "id": emulator.api_key}
        # A lone surrogate is replaced.
        valid = {**WIRE, "createdAt": "\ud83d", "driver": "😀"}
        body = json.dumps({"runtimes": [valid, odd, "crm", {"alias": 5}], "next": None})
        emulator.inject(*[Reply(200, body=body)] * 2, method="GET")
        errors: list[BctrlResponseError] = []
        with pytest.raises(BctrlResponseError) as caught:
            await session.list_runtimes("ws-1")
        [runtime] = await session.list_runtimes("ws-1", on_unreadable=errors.append)

        assert (runtime.alias, runtime.created_at, runtime.driver) == ("crm", "?", "😀")
        assert [error.alias for error in errors] == ["odd", None, None]
        assert str(errors[0]) == str(caught.value)
        assert str(errors[0]).startswith(
            "list of 'odd' in workspace 'ws-1': the server answered 200, but "
            "runtimes[1] is not a valid Runtime: "
        )
        assert "but runtimes[2] " in errors[1].summary
        assert (errors[0].status, errors[0].may_have_stopped) == (200, False)
        assert emulator.api_key not in repr(vars(errors[0]))

    @pytest.mark.parametrize(
        ("status", "body", "problem"),
        [
            (200, b"nope", "but the body is not JSON"),
            (200, b"[" * 100_000, "is not a valid list of runtimes: Expected `object`"),
            (
                200,
                b'{"runtimes":{}}',
                "is not a valid list of runtimes: Expected `array`",
            ),
            (
                201,
                b'{"runtimes":[]}',
                "is not a valid list of runtimes: only 200 is a whole list",
            ),
            (
                206,
                b'{"runtimes":[]}',
                "is not a valid list of runtimes: only 200 is a whole list",
            ),
            (
                200,
                b'{"runtimes":[],"nextCursor":"x"}',
                "its nextCursor says that it is a page of",
            ),
        ],
    )
    async def test_an_answer_that_is_not_a_whole_list_is_an_error_and_stops_nothing(
        self,
        emulator: Emulator,
        session: BctrlSession,
        status: int,
        body: bytes,
        problem: str,
    ) -> None:
        """Fault: `stop --all` said that all was done after a part of the list."""
        emulator.inject(*[Reply(status, body=body)] * 2, method="GET")
        with pytest.raises(BctrlResponseError, match=problem):
            await session.list_runtimes("ws-1", on_unreadable=str)
        with pytest.raises(BctrlResponseError, match=f"^list of .*{problem}") as caught:
            await session.stop_workspace("ws-1")
        assert not caught.value.may_have_stopped
        assert emulator.stops == []

    @pytest.mark.parametrize(
        "links",
        [
            ['Link: </r?p=2>; rel="next"'],
            ["Link: </a>; rel=prev, </b>;rel=Next"],
            ['Link: </a>; rel="prev"', 'Link: </b>; rel="last next"'],
        ],
    )
    async def test_a_link_to_the_next_page_is_an_error(self, links: list[str]) -> None:
        listed = http_answer(
            "200 OK", json.dumps({"runtimes": [WIRE]}).encode(), *links
        )
        async with served(answering(listed)) as session:
            with pytest.raises(
                BctrlResponseError, match="its Link header says that it is a page"
            ):
                await session.list_runtimes("ws-1")

    async def test_the_last_page_is_a_whole_list(self) -> None:
        body = json.dumps({"runtimes": [WIRE], "nextCursor": None}).encode()
        links = (
            'Link: </r?rel=next>; rel="prev"; title="next to it", </next>; rel=x-next'
        )
        listed = http_answer("200 OK", body, links)
        async with served(answering(listed)) as session:
            assert len(await session.list_runtimes("ws-1")) == 1


async def test_a_body_that_takes_too_long_is_read_again() -> None:
    """A stop whose status was 200 is not sent again, but a GET may be."""
    whole = http_answer("200 OK", json.dumps({"runtimes": [WIRE]}).encode())
    requests = 0

    async def handle(_: bytes, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        requests += 1
        writer.write(whole[:-5] if requests == 1 else whole)

    observer = Mock(spec=Observer)
    attempt = observer.begin_call.return_value.begin_attempt.return_value
    attempt.headers.return_value = {}
    async with served(handle, observer=observer) as session:
        listing = asyncio.create_task(session.list_runtimes("ws-1", timeout=40))
        await until(lambda: attempt.answered.called)
        pass_time(40)
        [runtime] = await listing

    assert (runtime.alias, requests) == ("crm", 2)


class TestErrors:
    @pytest.mark.parametrize(
        ("operation", "subject"),
        [
            ("get", "get of 'crm' in workspace 'ws-9'"),
            ("list", "list of workspace 'ws-9'"),
        ],
    )
    async def test_it_names_the_call(
        self, session: BctrlSession, operation: Operation, subject: str
    ) -> None:
        with pytest.raises(BctrlNotFoundError) as caught:
            await read(session, operation, "ws-9")

        assert str(caught.value).startswith(
            f"{subject}: the server answered 404 runtime.not_found"
        )
        assert (caught.value.operation, caught.value.attempts) == (operation, 1)

    @both
    async def test_an_invalid_name_is_rejected_before_a_byte_is_sent(
        self, emulator: Emulator, session: BctrlSession, operation: Operation
    ) -> None:
        with pytest.raises(
            BctrlConfigError, match=f"^{operation} of .*could be taken for a path"
        ):
            await read(session, operation, "..")
        with pytest.raises(BctrlConfigError, match="alias"):
            await session.get_runtime("ws-1", None)  # type: ignore[arg-type]  # on purpose
        assert emulator.requests == []

    @both
    async def test_closing_the_session_during_the_call_is_named(
        self, emulator: Emulator, session: BctrlSession, operation: Operation
    ) -> None:
        emulator.inject(Fault.HANG, method="GET")
        reading = asyncio.create_task(read(session, operation))
        await wait_for_requests(emulator, 1)
        await session.close()
        with pytest.raises(BctrlNetworkError, match="closed during the call") as caught:
            await reading
        assert caught.value.may_have_stopped is False


class TestShared:
    """Reads share the retries, the limiter and the retry quota with stops."""

    @both
    async def test_they_are_retried_by_the_same_rules(
        self,
        emulator: Emulator,
        session: BctrlSession,
        pauses: list[float],
        operation: Operation,
    ) -> None:
        # aiohttp itself retries a GET once after a lost connection.
        drops = [Fault.DROP_BEFORE] * 2
        throttled = Reply(429, headers={"Retry-After": "1"})
        # A stop is not retried after a truncated answer, because it was carried out.
        faults: list[Fault | Reply] = [
            *drops,
            throttled,
            Fault.SERVER_ERROR,
            Fault.TRUNCATED_JSON,
        ]
        emulator.inject(*faults, method="GET")
        await read(session, operation)

        assert len(emulator.requests) == 6
        assert len(pauses) == 4
        assert pauses[1] >= 1

    async def test_reads_and_stops_share_max_connections(
        self, emulator: Emulator, connect: Connect
    ) -> None:
        emulator.inject(Fault.HANG)
        async with connect(max_connections=1, retry=RetryPolicy(attempts=1)) as session:
            stopping = asyncio.create_task(session.stop_runtime("ws-1", "crm"))
            await wait_for_requests(emulator, 1)
            reading = asyncio.create_task(session.get_runtime("ws-1", "crm"))
            await until(lambda: session.stats.waiting)
            assert len(emulator.requests) == 1
            pass_time(60)
            await asyncio.wait([stopping, reading])
        assert isinstance(stopping.exception(), BctrlNetworkError)
        assert reading.result().status == "stopped"
