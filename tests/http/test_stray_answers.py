"""Answers that belong to another request: one too many on a connection that is kept alive."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from uuid import NAMESPACE_URL, UUID, uuid5

import aiohttp
import pytest
from helpers import add_runtimes
from runtimes import WIRE
from servers import Handler, http_answer, raw_server, recording, served
from tls import over_tls

from bctrl_async import (
    BctrlError,
    BctrlResponseError,
    BctrlSession,
    RetryPolicy,
    Runtime,
    RuntimeFilter,
    StopOutcome,
    StopResult,
)
from bctrl_async._http.fast.answer import _readability
from bctrl_async.emulator import Emulator
from bctrl_async.outcomes import result_of

KEY = "a-key-that-is-not-shown"
WORKSPACE = UUID("0b2f6a54-9d2c-4a5e-8f10-3c2b1a0d9e8f")
ANOTHER_WORKSPACE = UUID("4b0d6b3e-6f0a-4b57-9a55-0f7f8f5d3c21")
QUICK = RetryPolicy(base=0.001, cap=0.001)


def fields(alias: str, **changes: object) -> dict[str, object]:
    return {**WIRE, "id": str(uuid5(NAMESPACE_URL, alias)), "alias": alias, **changes}


def runtime(alias: str, **changes: object) -> bytes:
    return http_answer("200 OK", json.dumps(fields(alias, **changes)).encode())


def problem(status: str, code: str) -> bytes:
    return http_answer(status, json.dumps({"code": code}).encode())


def alias_in(head: bytes) -> str:
    return head.split(b" ")[1].split(b"/")[5].decode()


async def turns(count: int = 20) -> None:
    """Let everything happen that needs no time to pass."""
    for _ in range(count):
        await asyncio.sleep(0)


Delivery = Callable[[asyncio.StreamWriter, bytes, bytes], Awaitable[None]]


async def in_the_same_segment(writer: asyncio.StreamWriter, answer: bytes, stray: bytes) -> None:
    writer.write(answer + stray)


async def with_the_end_of_the_answer(
    writer: asyncio.StreamWriter, answer: bytes, stray: bytes
) -> None:
    writer.write(answer[:-9])
    await turns()
    writer.write(answer[-9:] + stray)


async def a_moment_later(writer: asyncio.StreamWriter, answer: bytes, stray: bytes) -> None:
    writer.write(answer)
    await turns(5)
    writer.write(stray)


async def in_halves(writer: asyncio.StreamWriter, answer: bytes, stray: bytes) -> None:
    writer.write(answer)
    await turns(5)
    writer.write(stray[:9])
    await turns(5)
    writer.write(stray[9:])


class Gateway:
    """A server that repeats some of its answers, and knows which runtimes it stopped.

    It refuses to stop runtimes that are called `denied-…`.

    Args:
        deliver: Sends an answer, and the same answer again. None sends it again when the next
            request has arrived, before the answer to that request.
        every: The requests on a connection of which one answer is repeated.
        refusals: Repeat refusals as well.
    """

    def __init__(self, deliver: Delivery | None, *, every: int = 3, refusals: bool = True) -> None:
        self._deliver = deliver
        self._every = every
        self._refusals = refusals
        self._owed: dict[asyncio.StreamWriter, bytes] = {}
        self.requests: Counter[asyncio.StreamWriter] = Counter()
        self.stopped: set[str] = set()
        self.strays = 0

    async def __call__(self, head: bytes, writer: asyncio.StreamWriter) -> None:
        self.requests[writer] += 1
        answer = self._answer(alias_in(head))
        if stray := self._owed.pop(writer, None):
            writer.write(stray)
        repeats = self._refusals or answer.startswith(b"HTTP/1.1 200")
        if self.requests[writer] % self._every or not repeats:
            writer.write(answer)
            return
        self.strays += 1
        if self._deliver is None:
            writer.write(answer)
            self._owed[writer] = answer
        else:
            await self._deliver(writer, answer, answer)

    def _answer(self, alias: str) -> bytes:
        if alias.startswith("denied"):
            return problem("403 Forbidden", "auth.forbidden")
        if alias in self.stopped:
            return problem("409 Conflict", "runtime.not_active")
        self.stopped.add(alias)
        return runtime(alias)

    def false_results(self, results: dict[str, StopResult]) -> list[str]:
        """Return the aliases whose result is not what became of the runtime."""
        return [
            alias
            for alias, result in results.items()
            if result is not StopResult.UNKNOWN
            and (result in {StopResult.STOPPED, StopResult.ALREADY_STOPPED})
            is not (alias in self.stopped)
        ]


async def stop_one(session: BctrlSession, alias: str) -> StopResult:
    stopping = session.stop_runtime("ws-1", alias)
    [ended] = await asyncio.gather(stopping, return_exceptions=True)
    assert isinstance(ended, Runtime | BctrlError)
    return result_of(ended)


Stop = Callable[[BctrlSession, list[str]], Awaitable[dict[str, StopResult]]]


async def one_after_the_other(session: BctrlSession, aliases: list[str]) -> dict[str, StopResult]:
    results = {}
    for alias in aliases:
        results[alias] = await stop_one(session, alias)
        await turns()
    return results


async def gathered(session: BctrlSession, aliases: list[str]) -> dict[str, StopResult]:
    results = await asyncio.gather(*(stop_one(session, alias) for alias in aliases))
    return dict(zip(aliases, results, strict=True))


async def in_bulk(session: BctrlSession, aliases: list[str]) -> dict[str, StopResult]:
    results: dict[str, StopResult] = {}

    def keep(outcome: StopOutcome) -> None:
        results[outcome.target.alias] = outcome.result

    targets = [("ws-1", alias) for alias in aliases]
    await session.stop_runtimes(targets, on_outcome=keep, verify=False)
    return results


every_way_to_stop = pytest.mark.parametrize(
    "stop", [one_after_the_other, gathered, in_bulk], ids=lambda stop: stop.__name__
)


async def stop_through(gateway: Gateway, stop: Stop) -> dict[str, StopResult]:
    """Stop a hundred runtimes, of which the gateway refuses about half; return the results."""
    order = random.Random(7)
    aliases = [f"{order.choice(('denied', 'crm'))}-{number}" for number in range(100)]
    async with (
        raw_server(gateway) as url,
        BctrlSession("k", base_url=url, retry=QUICK, max_connections=4, timeout=10) as session,
    ):
        results = await stop(session, aliases)
    assert gateway.strays
    assert set(results) == set(aliases)
    return results


@every_way_to_stop
@pytest.mark.parametrize(
    "deliver", [in_the_same_segment, with_the_end_of_the_answer], ids=lambda it: it.__name__
)
async def test_an_answer_with_another_one_behind_it_is_the_last_of_its_connection(
    deliver: Delivery, stop: Stop
) -> None:
    """Fault: aiohttp looks behind an answer only if both arrive at once."""
    gateway = Gateway(deliver)

    results = await stop_through(gateway, stop)

    assert gateway.false_results(results) == []
    assert StopResult.UNKNOWN not in results.values()


@pytest.mark.parametrize("deliver", [a_moment_later, in_halves], ids=lambda it: it.__name__)
async def test_an_answer_to_an_idle_connection_is_not_that_of_the_next_request(
    deliver: Delivery,
) -> None:
    """Fault: the next request gets a stray answer as its own, and all that follow shift.

    A runtime that was refused, and runs on, is `stopped`; one that was stopped is `rejected`.
    """
    gateway = Gateway(deliver)

    results = await stop_through(gateway, one_after_the_other)

    assert gateway.false_results(results) == []
    assert set(results.values()) == {StopResult.STOPPED, StopResult.REJECTED}


@every_way_to_stop
@pytest.mark.parametrize(
    "deliver", [a_moment_later, in_halves, None], ids=["a_moment_later", "in_halves", "when_busy"]
)
async def test_an_answer_about_another_runtime_is_never_that_of_a_request(
    deliver: Delivery | None, stop: Stop
) -> None:
    """Fault: an answer that arrives just after the next request was written counts as its own."""
    gateway = Gateway(deliver, every=5, refusals=False)

    results = await stop_through(gateway, stop)

    assert gateway.false_results(results) == []
    assert all(results[alias] is not StopResult.UNKNOWN for alias in gateway.stopped)


@every_way_to_stop
async def test_a_refusal_too_many_shifts_no_more_than_one_answer(stop: Stop) -> None:
    """Fault: after one answer too many, all later ones on the connection are those of others.

    A refusal names no runtime. If it arrives just after a request was written, nothing tells it
    from the answer to that request.
    """
    gateway = Gateway(None, every=10)

    results = await stop_through(gateway, stop)

    assert len(gateway.false_results(results)) <= gateway.strays


def keeping(writers: list[asyncio.StreamWriter], *answers: bytes) -> Handler:
    """Keep the writer of each request; without answers, say that its runtime was stopped."""
    remaining = list(answers)

    async def handle(head: bytes, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        writer.write(remaining.pop(0) if remaining else runtime(alias_in(head)))

    return handle


class TestIdleConnections:
    async def test_an_answer_that_the_loop_has_not_read_yet_closes_the_connection(self) -> None:
        """Fault: an answer that waits in the socket is overlooked, and read as that of a request.

        A busy loop reads its sockets only now and then, and takes connections in between.
        """
        writers: list[asyncio.StreamWriter] = []
        async with served(keeping(writers)) as session:
            await session.stop_runtime("ws-1", "crm")
            writers[0].write(problem("403 Forbidden", "auth.forbidden"))
            # Nothing waits in between, so the loop reads nothing.
            stopped = await session.stop_runtime("ws-1", "mail")

        assert stopped.alias == "mail"
        assert writers[1] is not writers[0]

    @pytest.mark.parametrize("arrived", [b"\r\n", b"HTTP/1.1 200 OK\r\n", runtime("crm"), b"\x00"])
    @pytest.mark.parametrize("first", [runtime("crm"), problem("403 Forbidden", "auth.forbidden")])
    async def test_any_byte_closes_the_connection(self, arrived: bytes, first: bytes) -> None:
        """Fault: the beginning of an answer vanishes in aiohttp's parser, and its end follows."""
        writers: list[asyncio.StreamWriter] = []
        async with served(keeping(writers, first)) as session:
            await stop_one(session, "crm")
            await turns()
            writers[0].write(arrived)
            await turns()
            await session.stop_runtime("ws-1", "crm")

        assert writers[1] is not writers[0]

    async def test_a_silent_connection_is_used_again(self) -> None:
        writers: list[asyncio.StreamWriter] = []
        async with served(keeping(writers)) as session:
            for _ in range(5):
                await session.stop_runtime("ws-1", "crm")
                await turns()
        assert len(writers) == 5
        assert len(set(writers)) == 1

    async def test_a_silent_tls_connection_is_used_again(self, emulator: Emulator) -> None:
        """Fault: the session tickets of TLS 1.3 count as bytes that nobody asked for."""
        targets, connected = add_runtimes(emulator, 5), 0

        async def count(*_: object) -> None:
            nonlocal connected
            connected += 1

        trace = aiohttp.TraceConfig()
        trace.on_connection_create_end.append(count)
        async with (
            over_tls(emulator) as server,
            BctrlSession(
                "emulator-key", base_url=server.url, ssl=server.trusted, trace_configs=[trace]
            ) as session,
        ):
            for target in targets:
                await session.stop_runtime(*target)
        assert connected == 1

    @pytest.mark.parametrize("transport", [None, asyncio.Transport()])
    def test_a_transport_without_a_socket_has_nothing_unread(
        self, transport: asyncio.Transport | None
    ) -> None:
        assert not _readability(transport)()


class TestAnswersAboutAnotherRuntime:
    async def test_the_error_names_that_runtime_and_the_switch(self) -> None:
        async with served(runtime("mail"), retry=QUICK) as session:
            with pytest.raises(BctrlResponseError) as caught:
                await session.stop_runtime("ws-1", "crm")
            assert await in_bulk(session, ["crm"]) == {"crm": StopResult.UNKNOWN}

        error = caught.value
        assert str(error) == (
            "stop of 'crm' in workspace 'ws-1': the answer describes another runtime, 'mail' in "
            f"workspace '{WORKSPACE}' (4 attempts, the runtime may have stopped). Retrying is "
            "safe. If a mock server answers with made-up data, pass check_answers=False to the "
            "session"
        )
        assert (error.status, error.may_have_stopped, error.accepted) == (None, True, False)

    @pytest.mark.parametrize("place", [[KEY], KEY, KEY * 30_000])
    async def test_it_shows_no_key_that_the_answer_echoes(self, place: object) -> None:
        body = json.dumps({"alias": KEY, "workspaceId": place}).encode()
        async with served(http_answer("200 OK", body), KEY, retry=QUICK) as session:
            with pytest.raises(BctrlResponseError, match=r"another runtime, '\*\*\*'") as caught:
                await session.stop_runtime("ws-1", "crm")

        assert KEY not in f"{caught.value}{caught.value.__notes__}{vars(caught.value)}"
        assert len(str(caught.value)) < 2000

    @pytest.mark.parametrize("borrowed", [False, True])
    async def test_the_retry_is_sent_on_another_connection(self, *, borrowed: bool) -> None:
        writers: list[asyncio.StreamWriter] = []
        async with raw_server(keeping(writers, runtime("mail"))) as url, AsyncExitStack() as stack:
            http = await stack.enter_async_context(aiohttp.ClientSession()) if borrowed else None
            async with BctrlSession("k", base_url=url, http=http, retry=QUICK) as session:
                assert (await session.stop_runtime("ws-1", "crm")).alias == "crm"
        assert writers[0] is not writers[1]

    async def test_a_get_of_another_runtime_is_an_error_and_stopped_nothing(self) -> None:
        async with served(runtime("mail", status="active"), retry=QUICK) as session:
            with pytest.raises(BctrlResponseError, match="another runtime, 'mail'") as caught:
                await session.get_runtime("ws-1", "crm")
        assert (caught.value.attempts, caught.value.may_have_stopped) == (4, False)

    async def test_a_list_of_another_workspace_stops_nothing(self) -> None:
        listed = [fields("crm", status="active", workspaceId=str(ANOTHER_WORKSPACE))]
        answer = http_answer("200 OK", json.dumps({"runtimes": ["?", *listed]}).encode())
        heads: list[bytes] = []
        async with served(recording(heads, answer), retry=QUICK) as session:
            with pytest.raises(BctrlResponseError, match="the answer describes another runtime"):
                await session.stop_workspace(WORKSPACE, where=RuntimeFilter())
            assert len(await session.list_runtimes("a-name", on_unreadable=repr)) == 1
        assert not any(head.startswith(b"POST") for head in heads)

    async def test_without_the_check_an_answer_about_any_runtime_is_accepted(self) -> None:
        async with served(runtime("mail"), check_answers=False) as session:
            assert (await session.stop_runtime("ws-1", "crm")).alias == "mail"
            assert (await session.get_runtime(ANOTHER_WORKSPACE, "crm")).alias == "mail"
            assert await in_bulk(session, ["crm"]) == {"crm": StopResult.STOPPED}
