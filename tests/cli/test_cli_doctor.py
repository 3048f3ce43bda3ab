"""The command `doctor`: what is in effect, one list with one attempt, and that it stops nothing."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path
from urllib.parse import unquote

import pytest
from conftest import KEY
from helpers import Command
from tls import forward_proxy, over_tls

from bctrl_async.emulator import Emulator

LOGIN = "proxy-user:s3cret-p4ss%40"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, emulator: Emulator) -> None:
    emulator.add_runtime("ws", "a")
    monkeypatch.setenv("BCTRL_API_KEY", KEY)


def found_in(out: str) -> dict[str, str]:
    """Return what was found, by the name of the line."""
    assert KEY not in out
    return {line[:8].rstrip(): line[10:] for line in out.splitlines()}


async def test_it_lists_once_and_stops_nothing(
    command: Command, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A proxy is another machine: what may go without TLS must not reach it.
    monkeypatch.setenv("HTTPS_PROXY", "http://unused.test")
    code, out, err = await command("doctor", "--base-url", emulator.url, "ws")
    assert list(found_in(out)) == ["versions", "config", "URL", "key", "API"]
    assert out.startswith("versions  bctrl_async ")
    assert (code, err) == (0, "")
    assert [request.method for request in emulator.requests] == ["GET"]
    assert emulator.status("ws", "a") == "active"


@pytest.mark.parametrize("origin", ["HTTPS_PROXY", "--proxy"])
async def test_the_list_goes_through_the_proxy_which_is_shown_without_its_password(
    command: Command,
    emulator: Emulator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    origin: str,
) -> None:
    async with over_tls(emulator, "bctrl.test") as server, forward_proxy() as proxy:
        with_login = proxy.url.replace("//", f"//{LOGIN}@")
        is_option = origin.startswith("--")
        monkeypatch.setenv("HTTPS_PROXY", "http://unused.test" if is_option else with_login)
        args = ["--base-url", server.url, "--ca-file", str(server.write_ca(tmp_path))]
        code, out, err = await command("doctor", *args, *[origin, with_login] * is_option, "ws")
    assert (code, err) == (0, "")
    assert found_in(out)["proxy"] == f"{proxy.url} ({origin})"
    basic = b64encode(unquote(LOGIN).encode()).decode()
    assert [f"Proxy-Authorization: Basic {basic}\r\n" in head for head in proxy.heads] == [True]
    assert "s3cret" not in out


async def test_no_proxy_excepts_a_host(
    command: Command, emulator: Emulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Curl accepts it without a scheme, too.
    monkeypatch.setenv("HTTPS_PROXY", "127.0.0.1:9")
    async with over_tls(emulator) as server:
        args = ["--base-url", server.url, "--ca-file", str(server.write_ca(tmp_path)), "ws"]
        code, out, _ = await command("doctor", *args)
        assert (code, found_in(out)["proxy"]) == (1, "http://127.0.0.1:9 (HTTPS_PROXY)")
        monkeypatch.setenv("NO_PROXY", "localhost")
        code, out, _ = await command("doctor", *args)
        assert (code, "proxy" in found_in(out)) == (0, False)


async def test_an_invalid_proxy_of_the_environment_is_named_without_its_password(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", f"socks5://{LOGIN}@127.0.0.1:9")
    code, out, err = await command("doctor", "--base-url", "https://bctrl.test")
    assert (code, out) == (2, "")
    problem = "invalid HTTPS_PROXY: expected an http or https URL with a host"
    assert err == f"bctrl-async: error: {problem}\n"
