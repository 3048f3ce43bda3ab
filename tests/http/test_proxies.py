"""A fixed proxy and a TLS context, and the reasons of a missing connection."""

from __future__ import annotations

import base64
import ssl
from typing import NamedTuple

import aiohttp
import pytest
from conftest import KEY
from support.helpers import unused_url
from support.runtimes import RUNTIME
from support.servers import answering, http_answer, raw_server
from support.tls import forward_proxy, over_tls
from support.ways import Ways
from test_secrets import everything_of
from test_wire import ONCE

from bctrl_async import (
    BctrlConfigError,
    BctrlNetworkError,
    BctrlSession,
    RetryPolicy,
    StopResult,
)
from bctrl_async._calls.results import result_of
from bctrl_async.emulator import Emulator

USER, PASSWORD = "proxy-user", "s3cret-p4ss"
LOGIN = f"{USER}:{PASSWORD}"
BASIC = base64.b64encode(LOGIN.encode()).decode()
ISSUER = "the certificate is not trusted: unable to get local issuer certificate"
NO_TUNNEL = "proxy {proxy}: it opened no tunnel"
DENIED, NO = "407 Denied", "403 No"
MISMATCH = "the certificate is not trusted: IP address mismatch"


async def test_stops_and_reads_go_through_the_proxy_whatever_the_environment(
    emulator: Emulator, ways: Ways, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    async with (
        over_tls(emulator, "bctrl.test") as server,
        forward_proxy() as proxy,
        BctrlSession(
            KEY,
            base_url=server.url,
            proxy=proxy.url,
            ssl=server.trusted,
            trust_env=True,
        ) as session,
    ):
        await session.stop_runtime("ws-1", "crm")
        await session.get_runtime("ws-1", "crm")

    # One tunnel, which both used; the fast path does not know proxies.
    [head] = proxy.heads
    assert head.startswith(
        f"CONNECT {server.url.removeprefix('https://')} HTTP/1.1\r\n"
    )
    assert KEY not in head
    assert ways.taken == (0, 2)
    assert emulator.status("ws-1", "crm") == "stopped"


async def test_a_proxy_gets_requests_to_an_http_api_only_if_plaintext_is_allowed() -> (
    None
):
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
        f"{LOGIN}@127.0.0.1:9",
        f"socks5://{LOGIN}@127.0.0.1:9",
        f"http://{LOGIN}@",
        f"http://{LOGIN}@127.0.0.1:port",
        f"http://{USER}:1#{PASSWORD}@127.0.0.1:9",
        f"http://{LOGIN}@127.0.0.1:9/path",
        LOGIN.encode(),
    ],
)
def test_an_invalid_proxy_is_rejected_and_not_shown(proxy: str) -> None:
    with pytest.raises(BctrlConfigError, match="invalid proxy") as caught:
        BctrlSession(KEY, proxy=proxy)
    assert caught.value.argument == "proxy"
    assert PASSWORD not in everything_of(caught.value)


def test_its_password_is_not_in_a_repr_nor_in_the_frames_of_another_error() -> None:
    proxy = f"http://{LOGIN}@127.0.0.1:9"
    assert PASSWORD not in repr(BctrlSession(KEY, proxy=proxy))
    with pytest.raises(BctrlConfigError) as caught:
        BctrlSession(KEY, proxy=proxy, timeout=0)
    assert PASSWORD not in everything_of(caught.value)


CHECK = "Check the base URL and the network; retrying is safe"
CHECK_HOST = "Check the host; trust a private CA with ssl= or --ca-file"
CHECK_PROXY = "Check the URL of the proxy and the network; retrying is safe"
CHECK_LOGIN = "Check the user and the password of the proxy"
CHECK_RULES = "Check that the proxy allows and can reach the host of the API"


class Case(NamedTuple):
    """The reason, the advice, a URL without a connection, and a proxy to it.

    Attributes:
        answer: What the proxy `{proxy}` answers.
        trusted: The certificate of `{tls}` is trusted.
    """

    reason: str
    advice: str
    url: str = "https://bctrl.test"
    proxy: str = ""
    answer: bytes = b""
    trusted: bool = False


CASES = {
    # Fault: connection errors leak as the HTTP library's own exceptions (the vendor's
    # SDK).
    "a closed port": Case("{closed}: Connection refused", CHECK, "https://{closed}"),
    "a port without TLS": Case(
        "{plain}: it does not speak TLS", CHECK, "https://{plain}"
    ),
    "an unknown name": Case("bctrl.invalid:443: ", CHECK, "https://bctrl.invalid"),
    # Fault: it cost four attempts, as if it could be trusted some seconds later.
    "an untrusted CA": Case(
        f"localhost:{{tls}}: {ISSUER}", CHECK_HOST, "https://localhost:{tls}"
    ),
    "a certificate of another host": Case(
        f"127.0.0.1:{{tls}}: {MISMATCH}",
        CHECK_HOST,
        "https://127.0.0.1:{tls}",
        trusted=True,
    ),
    "a closed proxy": Case(
        "proxy {closed}: Connection refused", CHECK_PROXY, proxy="{closed}"
    ),
    # Fault: the stop was `unknown`, although its request was never sent.
    "a proxy that closes": Case(NO_TUNNEL, CHECK_PROXY, proxy="{proxy}"),
    "a proxy that talks nonsense": Case(
        NO_TUNNEL, CHECK_PROXY, proxy="{proxy}", answer=b"nonsense\r\n\r\n"
    ),
    # Fault: the text was the repr of aiohttp's, and the advice to check the base URL.
    "a proxy with another password": Case(
        f"the proxy answered {DENIED}",
        CHECK_LOGIN,
        proxy="{proxy}",
        answer=http_answer(DENIED),
    ),
    "a proxy with rules": Case(
        f"the proxy answered {NO}", CHECK_RULES, proxy="{proxy}", answer=http_answer(NO)
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
async def test_the_reason_is_named_and_nothing_was_sent(
    emulator: Emulator, case: Case
) -> None:
    """Fault: the text was aiohttp's, with the repr of a context or an exception."""
    async with over_tls(emulator) as server, forward_proxy(case.answer) as proxy:
        with unused_url() as closed:
            places = {
                "closed": closed.removeprefix("http://"),
                "plain": emulator.url.removeprefix("http://"),
                "proxy": proxy.url.removeprefix("http://"),
                "tls": server.url.rpartition(":")[2],
            }
            async with BctrlSession(
                KEY,
                base_url=case.url.format(**places),
                proxy=f"http://{LOGIN}@{case.proxy.format(**places)}"
                if case.proxy
                else None,
                ssl=server.trusted if case.trusted else None,
                retry=RetryPolicy(attempts=2, base=0.001),
            ) as session:
                with pytest.raises(BctrlNetworkError) as caught:
                    await session.stop_runtime("ws-1", "crm")

    error = caught.value
    assert error.summary.startswith(f"no connection: {case.reason.format(**places)}")
    assert str(error).endswith(f". {case.advice}")
    assert error.attempts == (1 if case.advice == CHECK_HOST else 2)
    assert (error.status, result_of(error)) == (None, StopResult.NOT_SENT)
    assert all(f"Proxy-Authorization: Basic {BASIC}" in head for head in proxy.heads)
    shown = everything_of(error)
    assert not [secret for secret in (PASSWORD, BASIC, KEY) if secret in shown]


async def test_a_certificate_with_another_fingerprint_is_named(
    emulator: Emulator,
) -> None:
    connector = aiohttp.TCPConnector(ssl=aiohttp.Fingerprint(bytes(32)))
    async with (
        over_tls(emulator) as server,
        aiohttp.ClientSession(connector=connector) as http,
    ):
        # If a name has two addresses, aiohttp would raise the error of the other
        # address.
        url = server.url.replace("localhost", "127.0.0.1")
        session = BctrlSession(KEY, base_url=url, http=http, retry=ONCE)
        with pytest.raises(
            BctrlNetworkError, match="the certificate has another fingerprint"
        ):
            await session.stop_runtime("ws-1", "crm")


@pytest.mark.usefixtures("fast_path_only")
async def test_over_tls_a_stop_takes_the_fast_path(
    emulator: Emulator, ways: Ways
) -> None:
    async with (
        over_tls(emulator) as server,
        BctrlSession(KEY, base_url=server.url, ssl=server.trusted) as session,
    ):
        await session.stop_runtime("ws-1", "crm")
        await session.get_runtime("ws-1", "crm")
    assert ways.taken == (1, 1)


async def test_both_are_rejected_with_a_borrowed_pool() -> None:
    async with aiohttp.ClientSession() as http:
        with pytest.raises(BctrlConfigError, match="borrowed"):
            BctrlSession(KEY, http=http, proxy="http://127.0.0.1:9")
        with pytest.raises(BctrlConfigError, match="borrowed"):
            BctrlSession(KEY, http=http, ssl=ssl.create_default_context())
