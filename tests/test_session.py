"""`stop_runtime` and the options of a session, against a running server."""

from __future__ import annotations

import asyncio
import uuid

import aiohttp
import pytest
from contract import assert_request_fits_contract
from helpers import Connect, add_runtimes, pass_time, wait_for_requests
from ways import Ways

import bctrl_async
from bctrl_async import (
    BctrlAuthenticationError,
    BctrlConfigError,
    BctrlConflictError,
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
    runtime = await session.stop_runtime("ws-1", "crm")

    assert (runtime.alias, runtime.status, runtime.kind) == (
        "crm",
        RuntimeStatus.STOPPED,
        RuntimeKind.BROWSER,
    )
    assert str(runtime.id) == emulator.runtimes["ws-1", "crm"]["id"]
    assert runtime.created_at == emulator.runtimes["ws-1", "crm"]["createdAt"]
    assert emulator.status("ws-1", "crm") == "stopped"


async def test_a_workspace_id_from_a_response_can_be_passed_back(
    emulator: Emulator, session: BctrlSession
) -> None:
    workspace = uuid.uuid4()
    emulator.add_runtime(str(workspace), "crm")

    runtime = await session.stop_runtime(workspace, "crm")

    assert runtime.workspace_id == workspace


async def test_the_request_fits_the_contract(emulator: Emulator, session: BctrlSession) -> None:
    await session.stop_runtime("ws-1", "crm")

    [request] = emulator.requests
    assert_request_fits_contract(
        request.method, request.raw_path, dict(request.headers), request.body
    )


async def test_a_request_has_only_the_necessary_headers(
    emulator: Emulator, session: BctrlSession
) -> None:
    await session.stop_runtime("ws-1", "crm")

    [request] = emulator.requests
    assert dict(request.headers) == {
        "Host": emulator.url.removeprefix("http://"),
        "Accept": "application/json",
        "Accept-Encoding": request.headers["Accept-Encoding"],
        "Authorization": "Bearer emulator-key",
        "Content-Length": "0",
        "User-Agent": f"bctrl-async/{bctrl_async.__version__}",
    }


async def test_every_attempt_has_the_same_idempotency_key(
    emulator: Emulator, session: BctrlSession
) -> None:
    emulator.inject(Fault.SERVER_ERROR)

    await session.stop_runtime("ws-1", "crm", idempotency_key="once-7")

    assert [request.headers["Idempotency-Key"] for request in emulator.requests] == ["once-7"] * 2


async def test_headers_of_a_call_are_added_and_may_replace_the_user_agent(
    emulator: Emulator, session: BctrlSession
) -> None:
    await session.stop_runtime("ws-1", "crm", headers={"X-Team": "blue", "user-agent": "me/1"})

    [request] = emulator.requests
    assert (request.headers["X-Team"], request.headers["User-Agent"]) == ("blue", "me/1")
    assert request.headers["Authorization"] == "Bearer emulator-key"


async def test_headers_of_a_session_are_in_every_request_unless_a_call_replaces_them(
    emulator: Emulator, connect: Connect, ways: Ways, request: pytest.FixtureRequest
) -> None:
    emulator.add_runtime("ws-1", "mail")
    async with connect(headers={"X-Team": "blue", "user-agent": "me/1"}) as session:
        await session.list_runtimes("ws-1")
        await session.get_runtime("ws-1", "crm")
        await session.stop_runtime("ws-1", "crm", headers={"x-team": "red"})
        await session.stop_runtimes([("ws-1", "mail")])

    assert [received.headers["X-Team"] for received in emulator.requests] == [
        *("blue", "blue", "red", "blue"),
    ]
    assert {received.headers["User-Agent"] for received in emulator.requests} == {"me/1"}
    assert ways.taken == ((0, 4) if request.config.getoption("long_way") else (2, 2))


def test_invalid_headers_of_a_session_are_rejected() -> None:
    for headers in ({"authorization": "Bearer other"}, {"X-Split": "a\r\nX-Other: b"}):
        with pytest.raises(BctrlConfigError, match="header"):
            BctrlSession("key", headers=headers)


@pytest.mark.parametrize("given", ["argument", "variable", "function"])
async def test_a_line_end_after_a_key_is_none_of_it(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    """Fault: `BCTRL_API_KEY=$(cat key; echo)` and a secret store add one."""
    key = "emulator-key\r\n"
    monkeypatch.setenv("BCTRL_API_KEY", key)
    api_key = {"argument": key, "variable": None, "function": lambda: key}[given]

    async with BctrlSession(api_key, base_url=emulator.url) as session:
        assert (await session.stop_runtime("ws-1", "crm")).status == "stopped"


def test_an_idempotency_key_of_a_session_is_rejected() -> None:
    """All its stops would be one request for the server, which stops the first runtime only."""
    with pytest.raises(BctrlConfigError, match="an Idempotency-Key for all calls"):
        BctrlSession("key", headers={"idempotency-KEY": "once-7"})


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer other"},
        {"HOST": "elsewhere"},
        {"Transfer-Encoding": "chunked"},
        {"X-Split": "a\r\nX-Other: b"},
        {"X Y": "a"},
    ],
)
async def test_headers_that_replace_the_key_or_reframe_the_request_are_rejected(
    emulator: Emulator, session: BctrlSession, headers: dict[str, str]
) -> None:
    with pytest.raises(BctrlConfigError, match="header"):
        await session.stop_runtime("ws-1", "crm", headers=headers)
    assert emulator.requests == []


async def test_an_idempotency_key_replaces_one_in_the_headers(
    emulator: Emulator, session: BctrlSession
) -> None:
    await session.stop_runtime("ws-1", "crm", idempotency_key="a", headers={"idempotency-key": "b"})

    [request] = emulator.requests
    assert [value for name, value in request.headers.items() if name == "Idempotency-Key"] == ["a"]


async def test_an_empty_idempotency_key_is_rejected(
    emulator: Emulator, session: BctrlSession
) -> None:
    with pytest.raises(BctrlConfigError, match="idempotency_key is empty"):
        await session.stop_runtime("ws-1", "crm", idempotency_key="")
    assert emulator.requests == []


async def test_a_second_stop_is_an_already_stopped_conflict(session: BctrlSession) -> None:
    await session.stop_runtime("ws-1", "crm")

    with pytest.raises(BctrlConflictError) as caught:
        await session.stop_runtime("ws-1", "crm")

    assert caught.value.already_stopped
    assert (caught.value.code, caught.value.reason_class) == ("runtime.not_active", "conflict")
    assert caught.value.may_have_stopped is False


async def test_an_error_names_the_workspace_the_alias_and_the_request(
    session: BctrlSession,
) -> None:
    with pytest.raises(BctrlNotFoundError) as caught:
        await session.stop_runtime("ws-9", "nobody")

    error = caught.value
    assert (error.workspace_id, error.alias, error.attempts) == ("ws-9", "nobody", 1)
    assert error.request_id is not None
    for part in ("'nobody'", "'ws-9'", "404", error.request_id):
        assert part in str(error)


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


def test_the_error_of_a_missing_key_names_the_argument_and_the_variable() -> None:
    with pytest.raises(BctrlConfigError, match="api_key= or set BCTRL_API_KEY"):
        BctrlSession()


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


async def test_a_key_function_that_raises_is_a_configuration_error_with_its_cause(
    emulator: Emulator,
) -> None:
    def broken() -> str:
        raise KeyError("vault entry s3cr3t-of-the-vault")

    async with BctrlSession(broken, base_url=emulator.url) as session:
        with pytest.raises(BctrlConfigError, match="KeyError") as caught:
            await session.stop_runtime("ws-1", "crm")

    assert isinstance(caught.value.__cause__, KeyError)
    assert "s3cr3t" not in str(caught.value)


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


async def test_headers_that_are_not_a_mapping_are_rejected(session: BctrlSession) -> None:
    with pytest.raises(BctrlConfigError, match=r"invalid headers: .*, not list"):
        await session.stop_runtime("ws-1", "crm", headers=[("a", "b")])  # type: ignore[arg-type]


async def test_a_rate_applies_to_single_calls(emulator: Emulator, connect: Connect) -> None:
    add_runtimes(emulator, 30)
    async with connect(rate=1000) as session:
        await asyncio.gather(*(session.stop_runtime("ws-1", f"r{n}") for n in range(30)))
    assert len(emulator.requests) == 30


async def test_a_key_function_that_does_not_return_a_str_is_a_configuration_error(
    emulator: Emulator,
) -> None:
    async with BctrlSession(lambda: None, base_url=emulator.url) as session:  # type: ignore[arg-type, return-value]  # on purpose
        with pytest.raises(BctrlConfigError, match="expected a str, not NoneType"):
            await session.stop_runtime("ws-1", "crm")
    assert emulator.requests == []


async def test_a_key_function_that_hangs_times_out(emulator: Emulator) -> None:
    async def hang() -> str:
        never: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        return await never

    async with BctrlSession(
        hang, base_url=emulator.url, timeout=0.01, retry=RetryPolicy(attempts=1)
    ) as session:
        with pytest.raises(BctrlTimeoutError, match="api_key function") as caught:
            await session.stop_runtime("ws-1", "crm")
    assert caught.value.may_have_stopped is False


async def test_a_slow_key_function_is_not_taken_for_a_server_that_does_not_answer(
    emulator: Emulator,
) -> None:
    """Fault: a bulk stop whose key function was slow ended with "the server does not answer"."""

    async def hang() -> str:
        return await asyncio.Future[str]()

    targets = add_runtimes(emulator, 3)
    retry = RetryPolicy(attempts=2, base=0.001)
    async with BctrlSession(hang, base_url=emulator.url, timeout=0.01, retry=retry) as session:
        report = await session.stop_runtimes(targets)
    assert report.ended_early is None
    assert report.counts == {StopResult.NOT_SENT: 3}
    for outcome in report.failures:
        assert isinstance(outcome.error, BctrlTimeoutError)
        assert (outcome.attempts, outcome.error.argument) == (0, "api_key")
    assert emulator.requests == []


async def test_a_stop_can_be_cancelled_while_it_waits_for_the_key(emulator: Emulator) -> None:
    called = asyncio.Event()

    async def hang() -> str:
        called.set()
        return await asyncio.Future[str]()

    async with BctrlSession(hang, base_url=emulator.url) as session:
        stopping = asyncio.create_task(session.stop_runtime("ws-1", "crm"))
        await called.wait()
        stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopping
    assert emulator.requests == []


async def test_a_key_function_that_raises_cancelled_error_is_a_configuration_error(
    emulator: Emulator,
) -> None:
    """The function awaited something that was cancelled; the stop itself was not cancelled."""

    async def cancelled() -> str:
        raise asyncio.CancelledError

    async with BctrlSession(cancelled, base_url=emulator.url) as session:
        with pytest.raises(BctrlConfigError, match="api_key function raised CancelledError"):
            await session.stop_runtime("ws-1", "crm")
        report = await session.stop_runtimes([("ws-1", "crm"), ("ws-1", "mail")])
    assert report.counts == {StopResult.NOT_SENT: 2}
    assert emulator.requests == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"timeout": 0}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"max_connections": 0}, "max_connections"),
        ({"max_connections": 2.5}, "max_connections"),
        ({"retry": 3}, "retry"),
        ({"base_url": "api.bctrl.ai"}, "base_url"),
        ({"rate": 0}, "rate"),
        ({"timeout": 10**400}, "timeout"),
        (
            {"http": aiohttp.ClientSession},
            "invalid http: expected an aiohttp.ClientSession",
        ),
    ],
)
def test_an_invalid_option_is_named(arguments: dict[str, object], named: str) -> None:
    with pytest.raises(BctrlConfigError, match=named):
        BctrlSession("k", **arguments)  # type: ignore[arg-type]  # wrong on purpose


async def test_an_invalid_option_of_a_call_is_named(
    emulator: Emulator, session: BctrlSession
) -> None:
    with pytest.raises(BctrlConfigError, match="timeout"):
        await session.stop_runtime("ws-1", "crm", timeout=-1)
    with pytest.raises(BctrlConfigError, match="retry"):
        await session.stop_runtime("ws-1", "crm", retry=3)  # type: ignore[arg-type]  # on purpose
    assert emulator.requests == []


async def assert_the_wait_for_a_slot_is_not_timed(
    emulator: Emulator, session: BctrlSession
) -> None:
    """Check that a call on a session with one slot waits for it longer than its timeout."""
    emulator.add_runtime("ws-1", "mail")
    emulator.inject(Fault.HANG, alias="crm")
    hanging = asyncio.create_task(session.stop_runtime("ws-1", "crm", timeout=40))
    waiting = asyncio.create_task(session.stop_runtime("ws-1", "mail", timeout=30))
    await wait_for_requests(emulator, 1)
    pass_time(40)

    with pytest.raises(BctrlTimeoutError):
        await hanging
    assert (await waiting).alias == "mail"


async def test_the_timeout_excludes_the_wait_for_a_connection_slot(
    emulator: Emulator, connect: Connect
) -> None:
    """Fault: time spent queueing for the pool counts as the request's timeout (aiohttp#1463)."""
    async with connect(max_connections=1, retry=RetryPolicy(attempts=1)) as session:
        await assert_the_wait_for_a_slot_is_not_timed(emulator, session)


async def test_no_more_than_max_connections_are_in_flight(connect: Connect) -> None:
    in_flight: set[int] = set()
    maximum = 0

    async def begin(_: object, context: object, __: object) -> None:
        nonlocal maximum
        in_flight.add(id(context))
        maximum = max(maximum, len(in_flight))

    async def end(_: object, context: object, __: object) -> None:
        in_flight.remove(id(context))

    trace = aiohttp.TraceConfig()
    trace.on_request_start.append(begin)
    trace.on_request_end.append(end)
    trace.on_request_exception.append(end)
    async with connect(max_connections=3, trace_configs=[trace]) as session:
        await asyncio.gather(
            *(session.stop_runtime("ws-1", f"{n}") for n in range(50)), return_exceptions=True
        )
    assert maximum == 3


async def test_consecutive_stops_share_one_connection(
    emulator: Emulator, session: BctrlSession
) -> None:
    for number in range(20):
        emulator.add_runtime("ws-1", f"r{number}")
        await session.stop_runtime("ws-1", f"r{number}")
        with pytest.raises(BctrlNotFoundError):
            await session.stop_runtime("ws-1", "nobody")
    assert len(emulator._server.connections) == 1


async def test_a_borrowed_pool_is_used_and_left_open(emulator: Emulator) -> None:
    async with aiohttp.ClientSession(headers={"X-From": "the borrowed one"}) as http:
        async with BctrlSession("emulator-key", base_url=emulator.url, http=http) as session:
            await session.stop_runtime("ws-1", "crm")
        assert session.closed
        assert not http.closed

    [request] = emulator.requests
    assert request.headers["X-From"] == "the borrowed one"


async def test_a_borrowed_pool_with_raise_for_status_still_raises_bctrl_errors(
    emulator: Emulator,
) -> None:
    async with aiohttp.ClientSession(raise_for_status=True, auto_decompress=False) as http:
        session = BctrlSession("emulator-key", base_url=emulator.url, http=http)
        with pytest.raises(BctrlNotFoundError):
            await session.stop_runtime("ws-1", "nobody")


async def test_a_borrowed_pool_closed_before_its_first_use_is_an_error() -> None:
    http = aiohttp.ClientSession()
    await http.close()
    session = BctrlSession("emulator-key", http=http)
    with pytest.raises(BctrlConfigError, match="given as http= is closed"):
        await session.stop_runtime("ws-1", "crm")


async def test_a_borrowed_pool_closed_before_the_session_is_an_error(emulator: Emulator) -> None:
    async with aiohttp.ClientSession() as http:
        session = BctrlSession("emulator-key", base_url=emulator.url, http=http)
    with pytest.raises(BctrlConfigError, match="http="):
        await session.stop_runtime("ws-1", "crm")


@pytest.mark.parametrize(("limit", "limit_per_host"), [(1, 0), (0, 1)])
async def test_the_limits_of_a_borrowed_pool_bound_the_attempts_in_flight(
    emulator: Emulator, limit: int, limit_per_host: int
) -> None:
    """Fault: time spent queueing for the pool counts as the request's timeout (aiohttp#1463)."""
    connector = aiohttp.TCPConnector(limit=limit, limit_per_host=limit_per_host)
    async with aiohttp.ClientSession(connector=connector) as http:
        session = BctrlSession(
            "emulator-key", base_url=emulator.url, http=http, retry=RetryPolicy(attempts=1)
        )
        await assert_the_wait_for_a_slot_is_not_timed(emulator, session)


async def test_pool_options_are_rejected_with_a_borrowed_pool() -> None:
    async with aiohttp.ClientSession() as http:
        with pytest.raises(BctrlConfigError, match="borrowed"):
            BctrlSession("k", http=http, trust_env=True)


async def test_trace_configs_trace_the_requests(emulator: Emulator) -> None:
    recorded: list[str] = []

    async def record(*arguments: object) -> None:
        recorded.append(type(arguments[-1]).__name__)

    trace = aiohttp.TraceConfig()
    trace.on_request_start.append(record)
    async with BctrlSession(
        "emulator-key", base_url=emulator.url, trace_configs=[trace]
    ) as session:
        await session.stop_runtime("ws-1", "crm")
    assert recorded == ["TraceRequestStartParams"]
