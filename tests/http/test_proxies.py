"""A fixed proxy and a TLS context of a session."""

from __future__ import annotations

import asyncio
import base64
import re
import socket
import ssl
from typing import Any

import aiohttp
import pytest
from conftest import KEY
from runtimes import RUNTIME
from servers import answering, http_answer, raw_server
from test_secrets import everything_of
from test_wire import ONCE
from tls import forward_proxy, over_tls
from ways import Ways

from bctrl_async import (
    BctrlConfigError,
    BctrlNetworkError,
    BctrlSession,
    RetryPolicy,
    StopResult,
)
from bctrl_async.emulator import Emulator

USER, PASSWORD = "proxy-user", "s3cret-p4ss"


async def failure(url: str, **options: Any) -> BctrlNetworkError:  # noqa: ANN401 - of a session.
    """Return the error of a stop that is not sent."""
    async with BctrlSession(KEY, base_url=url, retry=ONCE, **options) as session:
        with pytest.raises(BctrlNetworkError) as caught:
            await session.stop_runtime("ws-1", "crm")
    assert (caught.value.may_have_stopped, caught.value.status) == (False, None)
    return caught.value


class TestProxy:
    async def test_stops_and_reads_go_through_it_whatever_the_environment(
        self, emulator: Emulator, ways: Ways, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
        async with (
            over_tls(emulator, "bctrl.test") as server,
            forward_proxy() as proxy,
            BctrlSession(
                KEY, base_url=server.url, proxy=proxy.url, ssl=server.trusted, trust_env=True
            ) as session,
        ):
            await session.stop_runtime("ws-1", "crm")
            await session.get_runtime("ws-1", "crm")

        # One tunnel, which both used; the fast path does not know proxies.
        (head,) = proxy.heads
        assert head.startswith(f"CONNECT {server.url.removeprefix('https://')} HTTP/1.1\r\n")
        assert KEY not in head
        assert ways.taken == (0, 2)
        assert emulator.status("ws-1", "crm") == "stopped"

    @pytest.mark.parametrize(
        ("answer", "advice"),
        [
            ("407 Denied", "Check the user and the password of the proxy"),
            ("403 Denied", "Check that the proxy allows and can reach the host of the API"),
        ],
    )
    async def test_its_answer_is_told_from_that_of_the_server_and_its_password_is_not_shown(
        self, answer: str, advice: str
    ) -> None:
        """Fault: the text was the repr of aiohttp's, and the advice to check the base URL."""
        async with forward_proxy(http_answer(answer)) as proxy:
            with_login = proxy.url.replace("//", f"//{USER}:{PASSWORD}@")
            error = await failure("https://bctrl.test", proxy=with_login)
        assert error.summary == f"no connection: the proxy answered {answer}"
        assert str(error).endswith(f". {advice}")

        basic = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        assert f"Proxy-Authorization: Basic {basic}" in proxy.heads[0]
        for secret in (PASSWORD, basic, KEY):
            assert secret not in everything_of(error)
        assert PASSWORD not in repr(BctrlSession(KEY, proxy=with_login))

    @pytest.mark.parametrize("answer", [b"", b"nonsense\r\n\r\n"], ids=["none", "nonsense"])
    async def test_one_that_breaks_before_the_tunnel_has_stopped_nothing(
        self, answer: bytes
    ) -> None:
        """Fault: such a stop was `unknown`, although its request was never sent."""
        async with forward_proxy(answer) as proxy:
            with_login = proxy.url.replace("//", f"//{USER}:{PASSWORD}@")
            session = BctrlSession(KEY, base_url="https://bctrl.test", proxy=with_login, retry=ONCE)
            async with session:
                report = await session.stop_runtimes([("ws-1", "crm")])
        error = report.failures[0].error
        assert error is not None
        assert report.counts[StopResult.NOT_SENT] == 1
        place = proxy.url.removeprefix("http://")
        assert error.summary == f"no connection: proxy {place}: it opened no tunnel"
        assert str(error).endswith(". Check the URL of the proxy and the network; retrying is safe")
        assert PASSWORD not in everything_of(error)

    async def test_it_gets_requests_to_an_http_api_only_if_plaintext_is_allowed(self) -> None:
        with pytest.raises(BctrlConfigError, match="could read the API key") as caught:
            BctrlSession(KEY, base_url="http://127.0.0.1:8787", proxy="http://127.0.0.1:9")
        assert caught.value.argument == "proxy"
        async with (
            raw_server(answering(http_answer("200 OK", RUNTIME))) as url,
            BctrlSession(
                KEY, base_url="http://bctrl.invalid", proxy=url, allow_plaintext=True
            ) as session,
        ):
            assert (await session.stop_runtime("ws-1", "crm")).alias == "crm"

    @pytest.mark.parametrize(
        "proxy",
        [
            "",
            f"{USER}:{PASSWORD}@127.0.0.1:9",
            f"socks5://{USER}:{PASSWORD}@127.0.0.1:9",
            f"http://{USER}:{PASSWORD}@",
            f"http://{USER}:{PASSWORD}@127.0.0.1:port",
            f"http://{USER}:1#{PASSWORD}@127.0.0.1:9",
            f"http://{USER}:{PASSWORD}@127.0.0.1:9/path",
            f"{USER}:{PASSWORD}".encode(),
        ],
    )
    def test_an_invalid_one_is_rejected_and_not_shown(self, proxy: str) -> None:
        with pytest.raises(BctrlConfigError, match="invalid proxy") as caught:
            BctrlSession(KEY, proxy=proxy)
        assert caught.value.argument == "proxy"
        assert PASSWORD not in everything_of(caught.value)

    def test_its_password_is_not_in_the_frames_of_another_error(self) -> None:
        with pytest.raises(BctrlConfigError) as caught:
            BctrlSession(KEY, proxy=f"http://{USER}:{PASSWORD}@127.0.0.1:9", timeout=0)
        assert PASSWORD not in everything_of(caught.value)


class TestReasons:
    """Fault: the text was that of aiohttp, with the repr of a context or an exception."""

    @pytest.mark.parametrize("part", ["", "proxy "])
    async def test_a_closed_port_is_named_with_its_reason(self, part: str) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            place = f"127.0.0.1:{unused.getsockname()[1]}"
            proxy = f"http://{USER}:{PASSWORD}@{place}" if part else None
            url = "https://bctrl.test" if part else f"https://{place}"
            error = await failure(url, proxy=proxy)
        assert error.summary == f"no connection: {part}{place}: Connection refused"
        assert PASSWORD not in everything_of(error)

    async def test_a_port_without_tls_is_named(self, emulator: Emulator) -> None:
        error = await failure(emulator.url.replace("http:", "https:"))
        assert re.fullmatch("no connection: .*: it does not speak TLS", error.summary)

    async def test_an_unknown_name_is_named_with_its_reason(self) -> None:
        error = await failure("https://bctrl.invalid")
        assert re.match(r"no connection: bctrl\.invalid:443: \w", error.summary)
        assert "ssl" not in str(error)

    async def test_a_certificate_with_another_fingerprint_is_named(
        self, emulator: Emulator
    ) -> None:
        connector = aiohttp.TCPConnector(ssl=aiohttp.Fingerprint(bytes(32)))
        async with over_tls(emulator) as server, aiohttp.ClientSession(connector=connector) as http:
            error = await failure(server.url, http=http)
        assert error.summary.endswith(": the certificate has another fingerprint")


class TestTlsContext:
    async def test_it_decides_which_certificates_are_trusted(
        self, emulator: Emulator, ways: Ways, fast_path_only: None
    ) -> None:
        del fast_path_only
        async with over_tls(emulator) as server:
            place = server.url.removeprefix("https://")
            assert str(await failure(server.url)) == (
                f"stop of 'crm' in workspace 'ws-1': no connection: {place}: the certificate is "
                "not trusted: unable to get local issuer certificate. "
                "Check the host; if its CA is a private one, trust that"
            )
            async with BctrlSession(KEY, base_url=server.url, ssl=server.trusted) as session:
                await session.stop_runtime("ws-1", "crm")
                await session.get_runtime("ws-1", "crm")
        assert ways.taken == (2, 1)

    @pytest.mark.parametrize(
        ("host", "reason"),
        [
            ("localhost", "unable to get local issuer certificate"),
            ("127.0.0.1", "IP address mismatch, certificate is not valid for '127.0.0.1'."),
        ],
    )
    async def test_a_certificate_that_is_not_trusted_is_not_tried_again(
        self, emulator: Emulator, host: str, reason: str
    ) -> None:
        """Fault: it cost four attempts, as if it could be trusted some seconds later."""
        async with over_tls(emulator) as server:
            context = server.trusted if host == "127.0.0.1" else None
            url = server.url.replace("localhost", host)
            async with BctrlSession(KEY, base_url=url, ssl=context) as session:
                for call in (session.stop_runtime, session.get_runtime):
                    with pytest.raises(BctrlNetworkError, match=reason) as caught:
                        await call("ws-1", "crm")
                    assert caught.value.attempts == 1
                assert session.stats.attempts == 2

    async def test_with_it_a_bulk_stop_ends_early_and_nothing_is_sent(
        self, emulator: Emulator
    ) -> None:
        targets = [("ws-1", f"r{number}") for number in range(1000)]
        async with (
            over_tls(emulator) as server,
            BctrlSession(KEY, base_url=server.url) as session,
        ):
            report = await session.stop_runtimes(targets, concurrency=10)
        assert report.counts == {StopResult.NOT_SENT: 1000}
        # One for each worker, two canaries, and a new target or probe meanwhile.
        assert session.stats.attempts <= 10 + 5
        assert "Check the host; if its CA is a private one, trust that" in str(report.ended_early)

    async def test_a_handshake_that_is_reset_is_retried(self) -> None:
        async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(1)
            writer.transport.abort()

        server = await asyncio.start_server(reset, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        policy = RetryPolicy(base=0.001)
        async with (
            server,
            BctrlSession(KEY, base_url=f"https://{host}:{port}", retry=policy) as session,
        ):
            with pytest.raises(BctrlNetworkError) as caught:
                await session.stop_runtime("ws-1", "crm")
        assert caught.value.attempts == 4


async def test_both_are_rejected_with_a_borrowed_pool() -> None:
    async with aiohttp.ClientSession() as http:
        with pytest.raises(BctrlConfigError, match="borrowed"):
            BctrlSession(KEY, http=http, proxy="http://127.0.0.1:9")
        with pytest.raises(BctrlConfigError, match="borrowed"):
            BctrlSession(KEY, http=http, ssl=ssl.create_default_context())
