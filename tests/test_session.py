"""`stop_runtime` and the options of a session, against a running server."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial

import aiohttp
import pytest
from contract import assert_request_fits_contract
from helpers import Connect, add_runtimes, pass_time, wait_for_requests
from ways import Ways

import bctrl_async
from bctrl_async import (
    BctrlAuthenticationError,
    BctrlConfigError,
    BctrlNotFoundError,
    BctrlSession,
    BctrlTimeoutError,
    RetryPolicy,
    RuntimeKind,
    RuntimeStatus,
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
        RuntimeStatus.STOPPED,
        RuntimeKind.BROWSER,
    )
    assert (str(runtime.id), runtime.created_at) == (sent["id"], sent["createdAt"])
    # It can be passed back.
    assert runtime.workspace_id == workspace
    assert sent["status"] == "stopped"


async def test_a_request_fits_the_contract_and_has_only_the_necessary_headers(
    emulator: Emulator, session: BctrlSession
) -> None:
    await session.stop_runtime("ws-1", "crm")

    [request] = emulator.requests
    headers = dict(request.headers)
    assert_request_fits_contract(request.method, request.raw_path, headers, request.body)
    assert headers == {
        "Host": emulator.url.removeprefix("http://"),
        "Accept": "application/json",
        "Accept-Encoding": headers["Accept-Encoding"],
        "Authorization": "Bearer emulator-key",
        "Content-Length": "0",
        "User-Agent": f"bctrl-async/{bctrl_async.__version__}",
    }


async def test_every_attempt_has_the_idempotency_key_which_replaces_one_in_the_headers(
    emulator: Emulator, session: BctrlSession
) -> None:
    emulator.inject(Fault.SERVER_ERROR)

    await session.stop_runtime(
        "ws-1", "crm", idempotency_key="once-7", headers={"idempotency-key": "b"}
    )

    for request in emulator.requests:
        items = request.headers.items()
        assert [value for name, value in items if name == "Idempotency-Key"] == ["once-7"]
    assert len(emulator.requests) == 2


async def test_headers_of_a_session_are_in_every_request_unless_a_call_replaces_them(
    emulator: Emulator, connect: Connect, ways: Ways, request: pytest.FixtureRequest
) -> None:
    emulator.add_runtime("ws-1", "mail")
    async with connect(headers={"X-Team": "blue", "user-agent": "me/1"}) as session:
        await session.list_runtimes("ws-1")
        await session.get_runtime("ws-1", "crm")
        headers = {"x-team": "red", "User-Agent": "you/2"}
        await session.stop_runtime("ws-1", "crm", headers=headers)
        await session.stop_runtimes([("ws-1", "mail")])

    sent = [(each.headers["X-Team"], each.headers["User-Agent"]) for each in emulator.requests]
    assert sent == [("blue", "me/1"), ("blue", "me/1"), ("red", "you/2"), ("blue", "me/1")]
    assert {each.headers["Authorization"] for each in emulator.requests} == {"Bearer emulator-key"}
    assert ways.taken == ((0, 4) if request.config.getoption("long_way") else (2, 2))


@pytest.mark.parametrize("given", ["argument", "variable", "function"])
async def test_a_line_end_after_a_key_is_none_of_it(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    # `BCTRL_API_KEY=$(cat key; echo)` and a secret store add one.
    key = "emulator-key\r\n"
    monkeypatch.setenv("BCTRL_API_KEY", key)
    api_key = {"argument": key, "variable": None, "function": lambda: key}[given]

    async with BctrlSession(api_key, base_url=emulator.url) as session:
        assert (await session.stop_runtime("ws-1", "crm")).status == "stopped"


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer other"},
        {"Transfer-Encoding": "chunked"},
        {"X-Split": "a\r\nX-Other: b"},
    ],
)
async def test_headers_that_replace_the_key_or_reframe_the_request_are_rejected(
    emulator: Emulator, session: BctrlSession, headers: dict[str, str]
) -> None:
    with pytest.raises(BctrlConfigError, match="header"):
        await session.stop_runtime("ws-1", "crm", headers=headers)
    with pytest.raises(BctrlConfigError, match="header"):
        BctrlSession("key", headers=headers)
    assert emulator.requests == []


async def test_an_idempotency_key_must_not_be_empty_or_of_all_calls(
    emulator: Emulator, session: BctrlSession
) -> None:
    with pytest.raises(BctrlConfigError, match="an Idempotency-Key for all calls"):
        BctrlSession("key", headers={"idempotency-KEY": "once-7"})
    with pytest.raises(BctrlConfigError, match="idempotency_key is empty"):
        await session.stop_runtime("ws-1", "crm", idempotency_key="")
    assert emulator.requests == []


async def test_an_invalid_key_is_an_authentication_error_after_one_request(
    emulator: Emulator,
) -> None:
    async with BctrlSession("wrong-key-of-mine", base_url=emulator.url) as session:
        with pytest.raises(BctrlAuthenticationError, match=r"Check the API key \(BCTRL_API_KEY\)"):
            await session.stop_runtime("ws-1", "crm")
    assert len(emulator.requests) == 1


async def test_key_and_url_come_from_the_environment(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BCTRL_API_KEY", "emulator-key")
    monkeypatch.setenv("BCTRL_BASE_URL", f"{emulator.url}/v1/")

    async with BctrlSession() as session:
        await session.stop_runtime("ws-1", "crm")

    assert emulator.status("ws-1", "crm") == "stopped"


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_a_key_function_is_called_for_each_attempt(
    emulator: Emulator, *, asynchronous: bool
) -> None:
    """A rotated key is used from the next attempt on."""
    keys = iter(["emulator-key", "rotated-away"])

    async def later() -> str:
        return next(keys)

    emulator.inject(Fault.SERVER_ERROR)
    async with BctrlSession(
        later if asynchronous else lambda: next(keys),
        base_url=emulator.url,
        retry=RetryPolicy(base=0.001),
    ) as session:
        with pytest.raises(BctrlAuthenticationError):
            await session.stop_runtime("ws-1", "crm")

    sent = [request.headers["Authorization"] for request in emulator.requests]
    assert sent == ["Bearer emulator-key", "Bearer rotated-away"]


def missing_key() -> str:
    raise KeyError("vault entry s3cr3t-of-the-vault")


async def cancelled_key() -> str:
    """Await something that was cancelled; the stop itself is not."""
    raise asyncio.CancelledError


async def slow_key() -> str:
    return await asyncio.Future[str]()


@pytest.mark.parametrize(
    ("api_key", "error_class", "message"),
    [
        (missing_key, BctrlConfigError, "api_key function raised KeyError"),
        (cancelled_key, BctrlConfigError, "api_key function raised CancelledError"),
        (lambda: None, BctrlConfigError, "expected a str, not NoneType"),
        (slow_key, BctrlTimeoutError, "api_key function returned no key within 0.01 s"),
    ],
    ids=["raises", "raises CancelledError", "returns None", "hangs"],
)
async def test_an_error_of_a_key_function_is_one_of_its_calls_which_send_nothing(
    emulator: Emulator,
    api_key: Callable[[], str],
    error_class: type[BctrlConfigError | BctrlTimeoutError],
    message: str,
) -> None:
    retry = RetryPolicy(attempts=2, base=0.001)
    async with BctrlSession(api_key, base_url=emulator.url, timeout=0.01, retry=retry) as session:
        with pytest.raises(error_class, match=message) as caught:
            await session.stop_runtime("ws-1", "crm")
        report = await session.stop_runtimes(add_runtimes(emulator, 3))

    assert caught.value.may_have_stopped is False
    assert "s3cr3t" not in str(caught.value)
    if api_key is missing_key:
        assert isinstance(caught.value.__cause__, KeyError)
    # The run does not take it for a server that does not answer.
    assert report.counts == {StopResult.NOT_SENT: 3}
    assert isinstance(report.ended_early, BctrlConfigError | None)
    assert (report.ended_early is None) is (error_class is BctrlTimeoutError)
    if error_class is BctrlTimeoutError:
        for outcome in report.failures:
            assert isinstance(outcome.error, BctrlTimeoutError)
            assert (outcome.attempts, outcome.error.argument) == (0, "api_key")
    assert emulator.requests == []


def test_a_session_whose_constructor_raised_has_a_repr() -> None:
    session = BctrlSession.__new__(BctrlSession)
    with pytest.raises(BctrlConfigError):
        session.__init__("bad key")  # type: ignore[misc]  # on purpose
    assert repr(session) == "<BctrlSession with invalid arguments>"


async def test_a_borrowed_pool_must_not_send_the_key_unencrypted_to_a_proxy() -> None:
    async with aiohttp.ClientSession(trust_env=True) as http:
        with pytest.raises(BctrlConfigError, match="unencrypted to a proxy"):
            BctrlSession("k", base_url="http://localhost", http=http)
        BctrlSession("k", base_url="http://localhost", http=http, allow_plaintext=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("timeout", 0),
        ("timeout", float("nan")),
        ("timeout", 10**400),
        ("max_connections", 0),
        ("rate", 0),
    ],
)
def test_an_invalid_option_is_named(name: str, value: object) -> None:
    with pytest.raises(BctrlConfigError, match=name) as caught:
        BctrlSession("k", **{name: value})  # type: ignore[arg-type]  # wrong on purpose
    assert caught.value.argument == name


@pytest.mark.parametrize("limits", [None, {"limit": 1}, {"limit": 0, "limit_per_host": 1}])
async def test_the_timeout_excludes_the_wait_for_a_connection_slot(
    emulator: Emulator, connect: Connect, limits: dict[str, int] | None
) -> None:
    """As in aiohttp#1463, with a pool of the session or a borrowed one."""
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


async def test_consecutive_stops_share_one_connection(
    emulator: Emulator, session: BctrlSession
) -> None:
    for number in range(20):
        emulator.add_runtime("ws-1", f"r{number}")
        await session.stop_runtime("ws-1", f"r{number}")
        with pytest.raises(BctrlNotFoundError):
            await session.stop_runtime("ws-1", "nobody")
    assert len(emulator._server.connections) == 1


async def test_a_borrowed_pool_is_used_whatever_its_options_and_left_open(
    emulator: Emulator,
) -> None:
    borrow = partial(BctrlSession, "emulator-key", base_url=emulator.url)
    async with aiohttp.ClientSession(
        headers={"X-From": "the borrowed one"}, raise_for_status=True, auto_decompress=False
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


async def test_pool_options_are_rejected_with_a_borrowed_pool() -> None:
    async with aiohttp.ClientSession() as http:
        with pytest.raises(BctrlConfigError, match="borrowed"):
            BctrlSession("k", http=http, trust_env=True)
