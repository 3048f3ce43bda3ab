"""The wire log: what it shows of an attempt, what it hides, and when it is on."""

from __future__ import annotations

import gzip
import logging
from contextlib import suppress
from typing import Any
from unittest.mock import ANY

import pytest
from support.helpers import Connect, unused_url
from support.runtimes import RUNTIME
from support.servers import answering, closing, http_answer, raw_server, served
from support.tls import forward_proxy, over_tls
from support.ways import Ways
from test_secrets import BASIC, CALLS, ECHOES, KEY, LOGIN, ONCE, Call as SessionCall

from bctrl_async import BctrlError, BctrlSession, Observer
from bctrl_async.emulator import Emulator, Fault

Log = pytest.LogCaptureFixture

STOP = "/v1/workspaces/ws-1/runtimes/crm/stop"
STATUS = "http.response.status_code"


@pytest.fixture
def wire(caplog: Log) -> Log:
    """The wire log, which is on."""
    caplog.set_level(logging.DEBUG, "bctrl_async.wire")
    return caplog


def fields(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in vars(record).items() if "." in name}


def shown_by(wire: Log) -> str:
    """Return all that a formatter could show of the records."""
    return "\n".join([wire.text, *(repr(vars(record)) for record in wire.records)])


async def stop(session: BctrlSession) -> object:
    with suppress(BctrlError):
        return await session.stop_runtime("ws-1", "crm")
    return None


async def lines_of(wire: Log, answer: bytes, key: str = KEY) -> list[str]:
    """Return the lines about a stop that is answered with these bytes."""
    async with served(closing(answer), key, retry=ONCE) as session:
        await stop(session)
    [record] = wire.records
    return record.getMessage().split("\n")


@pytest.mark.parametrize(
    ("call", "request_line"),
    [
        (CALLS["stop"], f"POST {{}}{STOP}"),
        (CALLS["list"], "GET {}/v1/workspaces/ws-1/runtimes"),
    ],
)
async def test_an_attempt_is_shown_with_its_request_and_its_answer(
    wire: Log,
    session: BctrlSession,
    emulator: Emulator,
    call: SessionCall,
    request_line: str,
) -> None:
    await call(session)

    [record] = wire.records
    request, *lines = record.getMessage().split("\n")
    elapsed = fields(record)["bctrl.elapsed"]
    assert isinstance(elapsed, float)
    assert request == f"{request_line.format(emulator.url)} in {elapsed:.3f} s"
    assert lines[0] == "> Accept: 'application/json'"
    assert "> Authorization: '***'" in lines
    # Older versions of aiohttp spell the names of headers in another way.
    answered = {"< 200", "< content-type: application/json", "< x-request-id: req_1"}
    assert answered <= {line.lower() for line in lines}
    assert '"alias":"crm"' in lines[-1]
    assert fields(record) == {"bctrl.event": "wire", "bctrl.elapsed": ANY, STATUS: 200}
    assert record.levelno == logging.DEBUG


async def test_each_attempt_of_a_call_is_shown(
    wire: Log, emulator: Emulator, connect: Connect
) -> None:
    emulator.inject(Fault.SERVER_ERROR, Fault.DROP_BEFORE)
    # An observer and headers of the call do not hide an attempt.
    async with connect(observer=Observer()) as session:
        await session.stop_runtime("ws-1", "crm", headers={"X-A": "1"})
        await session.stop_runtimes([("ws-1", "crm")])

    messages = [record.getMessage() for record in wire.records if "wire" in record.name]
    assert [message.partition(STOP)[1] for message in messages] == [STOP] * 4
    results = ["< 500", "! connection lost before a response: Server disconnected"]
    results += ["< 200", "< 409"]
    assert all(
        f"\n{result}" in text for result, text in zip(results, messages, strict=True)
    )


class TestWhenItIsOn:
    @pytest.mark.usefixtures("fast_path_only")
    @pytest.mark.parametrize("name", [None, "bctrl_async"])
    async def test_the_level_of_another_logger_does_not_count(
        self, caplog: Log, session: BctrlSession, ways: Ways, name: str | None
    ) -> None:
        """Fault: bodies would be in the log of an app that debugs something else."""
        caplog.set_level(logging.DEBUG, name)
        await session.stop_runtime("ws-1", "crm")
        assert "bctrl_async.wire" not in {record.name for record in caplog.records}
        assert ways.taken == (1, 0)

    async def test_its_level_counts_at_once(
        self, caplog: Log, session: BctrlSession, emulator: Emulator
    ) -> None:
        for level, count in [
            (logging.WARNING, 0),
            (logging.DEBUG, 1),
            (logging.NOTSET, 1),
        ]:
            caplog.set_level(level, "bctrl_async.wire")
            emulator.add_runtime("ws-1", "crm")
            await session.stop_runtime("ws-1", "crm")
            assert len(caplog.records) == count


class TestBodies:
    async def test_the_first_kib_is_shown(self, wire: Log) -> None:
        lines = await lines_of(wire, http_answer("403 No", b"a" * 1024 + b"b"))
        assert lines[-1] == f"< '{'a' * 1024}'"

    async def test_a_compressed_body_is_shown_as_it_was_before(self, wire: Log) -> None:
        packed = gzip.compress(RUNTIME)
        lines = await lines_of(
            wire, http_answer("200 OK", packed, "Content-Encoding: gzip")
        )
        assert lines[-1] == f"< {RUNTIME.decode()!r}"
        assert "< Content-Encoding: gzip" in lines

    async def test_nothing_of_an_answer_reaches_the_terminal_as_a_control_character(
        self, wire: Log
    ) -> None:
        body = b"\x1b[31m\x00\xff\r\nbctrl-async: error: forged\x07\xe2\x80\xa8"
        lines = await lines_of(wire, http_answer("403 No", body, "X-A: \u2028 \xe9"))
        assert all(line.isprintable() for line in lines)
        assert lines[-1] == r"< '\x1b[31m�\r\nbctrl-async: error: forged\x07\u2028'"

    async def test_a_truncated_body_is_shown_as_far_as_it_came(self, wire: Log) -> None:
        lines = await lines_of(wire, http_answer("200 OK", RUNTIME)[:-5])
        assert lines[-2] == f"< {RUNTIME[:-5].decode()!r}"
        assert lines[-1] == "! the body was cut off: ClientPayloadError"


class TestFailures:
    async def test_a_refused_connection(self, wire: Log) -> None:
        with unused_url() as url:
            async with BctrlSession(KEY, base_url=url, retry=ONCE) as session:
                await stop(session)
        self.check(wire, f"{url}{STOP}", "! no connection: ", "BctrlNetworkError")

    async def test_a_timeout(
        self, wire: Log, emulator: Emulator, connect: Connect
    ) -> None:
        emulator.inject(Fault.HANG)
        async with connect(timeout=0.05, retry=ONCE) as session:
            await stop(session)
        self.check(wire, STOP, "! no response within 50ms", "BctrlTimeoutError")

    async def test_a_certificate_that_is_not_trusted(
        self, wire: Log, emulator: Emulator
    ) -> None:
        async with (
            over_tls(emulator) as server,
            BctrlSession(KEY, base_url=server.url, retry=ONCE) as session,
        ):
            await stop(session)
        text = "the certificate is not trusted: "
        self.check(wire, f"{server.url}{STOP}", text, "BctrlNetworkError")

    def check(self, wire: Log, url: str, result: str, error: str) -> None:
        [record] = wire.records
        request, *lines = record.getMessage().split("\n")
        assert f"{url} in " in request
        assert lines[0] == "> Accept: 'application/json'"
        assert result in lines[-1]
        assert fields(record)["error.type"] == error


class TestSecrets:
    @pytest.mark.parametrize("answer", ECHOES.values(), ids=ECHOES)
    @pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
    async def test_an_echoed_key_is_not_shown(
        self, wire: Log, answer: bytes, call: SessionCall
    ) -> None:
        async with served(closing(answer), KEY, retry=ONCE) as session:
            with pytest.raises(BctrlError):
                await call(session)
        assert wire.records
        assert "qwer" not in shown_by(wire)

    @pytest.mark.parametrize("start", range(1024 - len(KEY), 1024, 8))
    async def test_an_echoed_key_is_not_shown_where_the_body_is_cut(
        self, wire: Log, start: int
    ) -> None:
        body = b"." * start + KEY.encode() + b"." * 2000
        lines = await lines_of(wire, http_answer("403 No", body))
        assert lines[-1].startswith(f"< '{'.' * start}***")
        assert "qwer" not in shown_by(wire)

    async def test_what_a_server_echoes_of_the_caller_and_its_cookies_are_not_shown(
        self, wire: Log
    ) -> None:
        """Fault: only the key was cut out of an answer that echoes its request."""
        sent = {"Cookie": "login=of-the-caller", "X-Tenant": "tenant-of-the-caller"}
        body = b"you sent login=of-the-caller, tenant-of-the-caller"
        headers = ("X-Echo: tenant-of-the-caller", "Set-Cookie: sid=of-the-server")
        answer = closing(http_answer("403 No", body, *headers))
        async with served(answer, KEY, retry=ONCE, headers=sent) as session:
            await stop(session)

        assert "of-the" not in wire.text
        assert "< X-Echo: ***\n< Set-Cookie: ***\n" in wire.text
        assert "you sent ***, ***" in wire.text

    async def test_headers_of_the_caller_have_names_but_no_values(
        self, wire: Log
    ) -> None:
        async def key() -> str:
            return KEY

        options: dict[str, Any] = {
            "headers": {"X-Team": "qwer-1", "User-Agent": "qwer-2"}
        }
        async with raw_server(answering(http_answer("200 OK", RUNTIME))) as url:
            for api_key in (KEY, key):
                async with BctrlSession(api_key, base_url=url, **options) as session:
                    headers = {
                        "X-Token": "qwer-3",
                        "accept": "qwer-4",
                        "Idempotency-Key": "qwer-5",
                    }
                    await session.stop_runtime("ws-1", "crm", headers=headers)
        for record in wire.records:
            names = ("X-Team", "User-Agent", "X-Token", "accept", "Idempotency-Key")
            assert all(f"\n> {name}: '***'" in record.getMessage() for name in names)
        assert len(wire.records) == 2
        assert "qwer" not in shown_by(wire)

    async def test_the_password_of_a_proxy_is_not_shown(
        self, wire: Log, emulator: Emulator
    ) -> None:
        refuse = http_answer("407 Denied", b"", "Proxy-Authenticate: Basic")
        async with (
            raw_server(answering(http_answer("200 OK", RUNTIME))) as plain,
            raw_server(answering(refuse)) as refusing,
            over_tls(emulator, "bctrl.test") as server,
            forward_proxy() as forwarding,
        ):
            for url, proxy in [
                ("http://bctrl.invalid", plain),
                ("https://bctrl.invalid", refusing),
                (server.url, forwarding.url),
                ("https://bctrl.invalid", "http://127.0.0.1:9"),
            ]:
                async with BctrlSession(
                    KEY,
                    base_url=url,
                    proxy=proxy.replace("//", f"//{LOGIN}@"),
                    allow_plaintext=True,
                    ssl=server.trusted,
                    retry=ONCE,
                ) as session:
                    await stop(session)
        assert len(wire.records) == 4
        results = [
            "< 200",
            "! no connection: the proxy",
            "< 401",
            "! no connection: proxy",
        ]
        for record, result in zip(wire.records, results, strict=True):
            assert f"\n{result}" in record.getMessage()
        for secret in (LOGIN, LOGIN.partition(":")[2], BASIC, "qwer"):
            assert secret not in shown_by(wire)
