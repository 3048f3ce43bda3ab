"""`stop_runtime` and the options of a session, against a running server."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import aiohttp
import pytest
from support.contract import assert_request_fits_contract
from support.helpers import Connect, add_runtimes, pass_time, wait_for_requests
from support.ways import Ways

import bctrl_async
from bctrl_async import (
    BctrlAuthenticationError,
    BctrlConfigError,
    BctrlError,
    BctrlNotFoundError,
    BctrlSession,
    BctrlTimeoutError,
    RetryPolicy,
    StopResult,
)
from bctrl_async.emulator import Emulator, Fault


async def test_a_stop_returns_the_stopped_runtime(
    emulator: Emulator, session: BctrlSession
) -> None:
    workspace = uuid.uuid4()
    emulator.add_runtime(str(workspace), "crm")
    sent = emulator.runtimes[str(workspace), "crm"]

    runtime = await session.stop_runtime(workspace, "crm")

    assert (runtime.alias, runtime.status, runtime.kind) == (
        "crm",
        "stopped",
        "browser",
    )
    assert (str(runtime.id), runtime.created_at) == (sent["id"], sent["createdAt"])
    # It can be passed back.
    assert runtime.workspace_id == workspace
    assert sent["status"] == "stopped"


async def test_consecutive_stops_share_one_connection(
    emulator: Emulator, session: BctrlSession
) -> None:
    for target in add_runtimes(emulator, 20):
        await session.stop_runtime(*target)
        with pytest.raises(BctrlNotFoundError):
            await session.stop_runtime("ws-1", "nobody")
    assert len(emulator._server.connections) == 1


class TestHeaders:
    async def test_a_request_fits_the_contract_and_has_only_the_necessary_ones(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        await session.stop_runtime("ws-1", "crm")

        [request] = emulator.requests
        headers = dict(request.headers)
        assert_request_fits_contract(
            request.method, request.raw_path, headers, request.body
        )
        assert headers == {
            "Host": emulator.url.removeprefix("http://"),
            "Accept": "application/json",
            "Accept-Encoding": headers["Accept-Encoding"],
            "Authorization": "Bearer emulator-key",
            "Content-Length": "0",
            "User-Agent": f"bctrl-async/{bctrl_async.__version__}",
        }

    async def test_those_of_a_session_are_in_every_request_unless_a_call_replaces_them(
        self,
        emulator: Emulator,
        connect: Connect,
        ways: Ways,
        request: pytest.FixtureRequest,
    ) -> None:
        emulator.add_runtime("ws-1", "mail")
        async with connect(headers={"X-Team": "blue", "user-agent": "me/1"}) as session:
            await session.list_runtimes("ws-1")
            await session.get_runtime("ws-1", "crm")
            headers = {"x-team": "red", "User-Agent": "you/2"}
            await session.list_runtimes("ws-1", headers=headers)
            await session.get_runtime("ws-1", "crm", headers=headers)
            await session.stop_runtime("ws-1", "crm", headers=headers)
            await session.stop_runtimes([("ws-1", "mail")])

        sent = [
            (call.headers["X-Team"], call.headers["User-Agent"])
            for call in emulator.requests
        ]
        assert sent == [
            ("blue", "me/1"),
            ("blue", "me/1"),
            ("red", "you/2"),
            ("red", "you/2"),
            ("red", "you/2"),
            ("blue", "me/1"),
        ]
        keys = {call.headers["Authorization"] for call in emulator.requests}
        assert keys == {"Bearer emulator-key"}
        assert ways.taken == (
            (0, 6) if request.config.getoption("long_way") else (2, 4)
        )

    async def test_every_attempt_has_the_idempotency_key_of_its_call(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        emulator.inject(Fault.SERVER_ERROR)
        await session.stop_runtime("ws-1", "crm", headers={"Idempotency-Key": "once-7"})

        keys = [request.headers["Idempotency-Key"] for request in emulator.requests]
        assert keys == ["once-7", "once-7"]

    async def test_the_key_in_them_and_a_common_idempotency_key_are_rejected(
        self, emulator: Emulator, session: BctrlSession
    ) -> None:
        key = {"authorization": "Bearer other"}
        for call in (
            session.stop_runtime("ws-1", "crm", headers=key),
            session.get_runtime("ws-1", "crm", headers=key),
            session.list_runtimes("ws-1", headers=key),
        ):
            with pytest.raises(BctrlConfigError, match="is set by the session"):
                await call
        with pytest.raises(BctrlConfigError, match="is set by the session"):
            BctrlSession("key", headers=key)
        advice = r"an Idempotency-Key for all calls .*\. Pass it in headers= of a call$"
        with pytest.raises(BctrlConfigError, match=advice):
            BctrlSession("key", headers={"idempotency-KEY": "once-7"})
        assert emulator.requests == []


async def raising() -> str:
    raise KeyError("vault entry s3cr3t-of-the-vault")


async def cancelled() -> str:
    """Await something that was cancelled; the stop itself is not."""
    raise asyncio.CancelledError


async def hanging() -> str:
    return await asyncio.Future[str]()


FAILURES: dict[str, tuple[Callable[[], Any], type[BctrlError], str]] = {
    "raises": (raising, BctrlConfigError, "api_key function raised KeyError"),
    "is cancelled": (
        cancelled,
        BctrlConfigError,
        "api_key function raised CancelledError",
    ),
    "returns None": (lambda: None, BctrlConfigError, "expected a str, not NoneType"),
    "hangs": (
        hanging,
        BctrlTimeoutError,
        "api_key function returned no key within 10ms",
    ),
}


class TestKey:
    @pytest.mark.parametrize(
        ("api_key", "origin"),
        [
            (None, "BCTRL_API_KEY"),
            ("wrong-key-of-mine", "the argument api_key"),
            (lambda: "wrong-key-of-mine", "the api_key function"),
        ],
    )
    async def test_an_invalid_one_is_an_error_after_one_request_that_says_its_origin(
        self,
        emulator: Emulator,
        monkeypatch: pytest.MonkeyPatch,
        api_key: str | Callable[[], str] | None,
        origin: str,
    ) -> None:
        """Fault: the advice was to check a variable that was not used."""
        monkeypatch.setenv("BCTRL_API_KEY", "wrong-key-of-the-environment")
        async with BctrlSession(api_key, base_url=emulator.url) as session:
            with pytest.raises(BctrlAuthenticationError) as caught:
                await session.stop_runtime("ws-1", "crm")
            report = await session.stop_runtimes([("ws-1", "crm")])
        assert len(emulator.requests) == 2
        for error in (caught.value, report.failures[0].error):
            assert str(error).endswith(f". Check the API key from {origin}")

    async def test_it_and_the_url_come_from_the_environment(
        self, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # `BCTRL_API_KEY=$(cat key; echo)` and a secret store add a line end.
        monkeypatch.setenv("BCTRL_API_KEY", "emulator-key\r\n")
        monkeypatch.setenv("BCTRL_BASE_URL", f"{emulator.url}/v1/")
        async with BctrlSession() as session:
            await session.stop_runtime("ws-1", "crm")
        assert emulator.status("ws-1", "crm") == "stopped"

    @pytest.mark.parametrize("asynchronous", [False, True])
    async def test_a_function_is_called_for_each_attempt(
        self, emulator: Emulator, *, asynchronous: bool
    ) -> None:
        """A rotated key is used from the next attempt on."""
        keys = iter(["emulator-key\n", "rotated-away"])

        async def later() -> str:
            return next(keys)

        emulator.inject(Fault.SERVER_ERROR)
        api_key = later if asynchronous else lambda: next(keys)
        retry = RetryPolicy(base=0.001)
        async with BctrlSession(api_key, base_url=emulator.url, retry=retry) as session:
            with pytest.raises(BctrlAuthenticationError):
                await session.stop_runtime("ws-1", "crm")

        sent = [request.headers["Authorization"] for request in emulator.requests]
        assert sent == ["Bearer emulator-key", "Bearer rotated-away"]

    @pytest.mark.parametrize("name", FAILURES)
    async def test_an_error_of_a_function_is_one_of_its_calls_which_send_nothing(
        self, emulator: Emulator, name: str
    ) -> None:
        api_key, error_class, message = FAILURES[name]
        retry = RetryPolicy(attempts=2, base=0.001)
        url = emulator.url
        async with BctrlSession(
            api_key, base_url=url, timeout=0.01, retry=retry
        ) as session:
            with pytest.raises(error_class, match=message) as caught:
                await session.stop_runtime("ws-1", "crm")
            report = await session.stop_runtimes(add_runtimes(emulator, 3))

        assert caught.value.may_have_stopped is False
        assert "s3cr3t" not in str(caught.value)
        assert isinstance(caught.value.__cause__, KeyError) is (name == "raises")
        assert report.counts == {StopResult.NOT_SENT: 3}
        assert emulator.requests == []
        # The run does not take a slow function for a server that does not answer.
        assert (report.ended_early is None) is (name == "hangs")
        if name == "hangs":
            for outcome in report.failures:
                assert isinstance(outcome.error, BctrlTimeoutError)
                assert (outcome.attempts, outcome.error.argument) == (0, "api_key")


@pytest.mark.parametrize(
    "limits", [None, {"limit": 1}, {"limit": 0, "limit_per_host": 1}]
)
async def test_the_timeout_excludes_the_wait_for_a_connection_slot(
    emulator: Emulator, connect: Connect, limits: dict[str, int] | None
) -> None:
    """As in aiohttp#1463, with a pool of the session or a borrowed pool."""
    emulator.add_runtime("ws-1", "mail")
    emulator.inject(Fault.HANG, alias="crm")
    once = RetryPolicy(attempts=1)
    async with AsyncExitStack() as stack:
        options: dict[str, object] = {"max_connections": 1}
        if limits is not None:
            pool = aiohttp.ClientSession(connector=aiohttp.TCPConnector(**limits))  # type: ignore[arg-type]
            options = {"http": await stack.enter_async_context(pool)}
        session = await stack.enter_async_context(connect(retry=once, **options))
        hanging = asyncio.create_task(session.stop_runtime("ws-1", "crm", timeout=40))
        waiting = asyncio.create_task(session.stop_runtime("ws-1", "mail", timeout=30))
        await wait_for_requests(emulator, 1)
        pass_time(40)

        with pytest.raises(BctrlTimeoutError):
            await hanging
        assert (await waiting).alias == "mail"


class TestBorrowedPool:
    async def test_it_is_used_whatever_its_options_and_left_open(
        self, emulator: Emulator
    ) -> None:
        borrow = partial(BctrlSession, "emulator-key", base_url=emulator.url)
        async with aiohttp.ClientSession(
            headers={"X-From": "the borrowed one"},
            raise_for_status=True,
            auto_decompress=False,
        ) as http:
            async with borrow(http=http) as session:
                await session.stop_runtime("ws-1", "crm")
                with pytest.raises(BctrlNotFoundError):
                    await session.stop_runtime("ws-1", "nobody")
            assert session.closed
            assert not http.closed
            used, unused = borrow(http=http), borrow(http=http)
            await used.get_runtime("ws-1", "crm")

        assert emulator.requests[0].headers["X-From"] == "the borrowed one"
        for left in (used, unused, borrow(http=http)):
            with pytest.raises(BctrlConfigError, match="given as http= is closed"):
                await left.stop_runtime("ws-1", "crm")

    async def test_it_has_options_of_its_own_and_sends_no_key_unencrypted_to_a_proxy(
        self,
    ) -> None:
        async with aiohttp.ClientSession(trust_env=True) as http:
            with pytest.raises(BctrlConfigError, match="no effect on a borrowed http="):
                BctrlSession("k", http=http, trust_env=True)
            with pytest.raises(BctrlConfigError, match="unencrypted to a proxy"):
                BctrlSession("k", base_url="http://localhost", http=http)
            BctrlSession(
                "k", base_url="http://localhost", http=http, allow_plaintext=True
            )
