"""The command `doctor`: what it finds, what it advises, and that it stops nothing."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import unquote

import pytest
from conftest import KEY
from helpers import Command, pass_time
from servers import answering, raw_server
from test_cli import Terminal, finish, start
from tls import forward_proxy, over_tls
from warm_server import program

from bctrl_async.cli._reach import _Way
from bctrl_async.emulator import Emulator, Reply

LOGIN = "proxy-user:s3cret-p4ss%40"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, emulator: Emulator) -> None:
    emulator.add_runtime("ws", "a")
    monkeypatch.setenv("BCTRL_API_KEY", KEY)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8")
    for name in ("https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


async def examine(
    command: Command, *args: str | Path
) -> tuple[int, Mapping[str, Mapping[str, object]]]:
    """Return the exit code of `doctor`, and its checks by name."""
    code, out, err = await command("doctor", "-o", "json", *args)
    assert err == ""
    assert KEY not in out
    checks = [json.loads(line) for line in out.splitlines()]
    return code, {check["check"]: check for check in checks}


def failed(checks: Mapping[str, Mapping[str, object]]) -> list[str]:
    return [name for name, check in checks.items() if check["ok"] is False]


async def test_until_it_lists_it_waits_for_the_way_to_the_api(
    command: Command, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    @asynccontextmanager
    async def show_waiting(_: object, describe: Callable[[], str]) -> AsyncIterator[None]:
        said.append(describe())
        yield

    monkeypatch.setattr("bctrl_async.cli._doctor.show_waiting", show_waiting)
    assert (await examine(command, "--base-url", emulator.url))[0] == 0
    assert said == ["Checking the way to the API"]


class TestAllIsWell:
    async def test_every_check_is_a_line_with_a_mark(
        self, command: Command, emulator: Emulator
    ) -> None:
        code, out, err = await command("doctor", "--base-url", emulator.url, "ws")
        port = emulator.url.rpartition(":")[2]
        lines = out.splitlines()
        assert [line[:12].strip() for line in lines] == [
            *("✓ versions", "✓ config", "✓ URL", "✓ key", "✓ DNS", "✓ TCP", "✓ API")
        ]
        assert lines[1].endswith("no file /nonexistent/bctrl-async/config.toml")
        assert lines[2].endswith(f"{emulator.url} (--base-url)")
        assert lines[3].endswith("from BCTRL_API_KEY")
        assert lines[4].endswith("127.0.0.1 is 127.0.0.1")
        assert f"127.0.0.1 port {port} in " in lines[5]
        assert lines[6].endswith("the key is accepted: 1 runtime in 'ws'")
        assert (code, err) == (0, "")

    async def test_it_only_lists_the_workspace(self, command: Command, emulator: Emulator) -> None:
        await examine(command, "--base-url", emulator.url, "ws")
        assert [request.method for request in emulator.requests] == ["GET"]
        assert emulator.status("ws", "a") == "active"

    async def test_a_runtime_that_cannot_be_read_counts(
        self, command: Command, emulator: Emulator
    ) -> None:
        runtime = {**emulator.runtimes["ws", "a"]}
        emulator.inject(Reply(200, json={"runtimes": [runtime, {}]}), method="GET")
        code, checks = await examine(command, "--base-url", emulator.url, "ws")
        assert (code, checks["API"]["found"]) == (0, "the key is accepted: 2 runtimes in 'ws'")

    async def test_without_a_workspace_the_key_is_not_sent(
        self, command: Command, emulator: Emulator
    ) -> None:
        code, checks = await examine(command, "--base-url", emulator.url)
        assert code == 0
        assert checks["API"] == {
            "check": "API",
            "ok": None,
            "found": "the key was not tried",
            "advice": "Name a workspace that it may list",
        }
        assert not emulator.requests

    @pytest.mark.parametrize("of_environment", [True, False])
    async def test_through_a_proxy_it_checks_the_tunnel_and_the_certificate(
        self,
        command: Command,
        emulator: Emulator,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        *,
        of_environment: bool,
    ) -> None:
        async with over_tls(emulator, "bctrl.test") as server, forward_proxy() as proxy:
            with_login = proxy.url.replace("//", f"//{LOGIN}@")
            monkeypatch.setenv(
                "HTTPS_PROXY", with_login if of_environment else "http://unused.test"
            )
            args = [] if of_environment else ["--proxy", with_login]
            code, checks = await examine(
                command,
                *args,
                "--base-url",
                server.url,
                "--ca-file",
                server.write_ca(tmp_path),
                "ws",
            )
        assert (code, failed(checks)) == (0, [])
        origin = "HTTPS_PROXY" if of_environment else "--proxy"
        assert checks["proxy"]["found"] == f"{proxy.url} ({origin})"
        port, proxy_port = (url.rpartition(":")[2] for url in (server.url, proxy.url))
        assert (
            checks["tunnel"]["found"] == f"127.0.0.1 port {proxy_port} leads to bctrl.test:{port}"
        )
        assert str(checks["TLS"]["found"]).startswith("TLSv1.3, CA trustme v")
        # Its tunnel, and that of the session.
        basic = b64encode(unquote(LOGIN).encode()).decode()
        assert [f"Proxy-Authorization: Basic {basic}\r\n" in head for head in proxy.heads] == [
            *(True, True)
        ]
        assert "s3cret" not in json.dumps(checks)

    async def test_a_proxy_can_be_reached_over_tls(
        self, command: Command, emulator: Emulator, tmp_path: Path
    ) -> None:
        async with over_tls(emulator, "bctrl.test") as server:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            server.authority.issue_cert("localhost").configure_cert(context)
            async with forward_proxy(context=context) as proxy:
                code, checks = await examine(
                    command,
                    *("--proxy", proxy.url, "--base-url", server.url),
                    *("--ca-file", server.write_ca(tmp_path), "ws"),
                )
        assert (code, failed(checks)) == (0, [])

    async def test_no_proxy_excepts_a_host(
        self, command: Command, emulator: Emulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        # Without a scheme, as curl accepts it.
        monkeypatch.setenv("HTTPS_PROXY", "127.0.0.1:9")
        async with over_tls(emulator) as server:
            args = ["--base-url", server.url, "--ca-file", str(server.write_ca(tmp_path)), "ws"]
            monkeypatch.setenv("NO_PROXY", "localhost")
            code, checks = await examine(command, *args)
            assert (code, "proxy" in checks) == (0, False)
            monkeypatch.delenv("NO_PROXY")
            code, checks = await examine(command, *args)
        assert code == 1
        assert checks["proxy"]["found"] == "http://127.0.0.1:9 (HTTPS_PROXY)"

    async def test_it_names_the_profile_in_effect_and_what_it_sets(
        self, command: Command, emulator: Emulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        file = tmp_path / "config.toml"
        monkeypatch.setenv("BCTRL_CONFIG", str(file))
        monkeypatch.setenv("STAGING_KEY", KEY)
        file.write_text(
            f"[profiles.staging]\nbase_url = '{emulator.url}'\napi_key_env = 'STAGING_KEY'\n"
        )
        profile = f"profile 'staging' of {file}"
        code, checks = await examine(command, "--profile", "staging", "ws")
        assert code == 0
        assert checks["config"]["found"] == profile
        assert checks["URL"]["found"] == f"{emulator.url} (base_url in {profile})"
        assert checks["key"]["found"] == f"from STAGING_KEY (api_key_env of {profile})"
        _, checks = await examine(command, "--base-url", emulator.url)
        assert checks["config"]["found"] == f"no profile 'default' of {file}"


class TestFailures:
    async def test_a_rejected_key_exits_with_2(
        self, command: Command, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("BCTRL_API_KEY", "another")
        code, checks = await examine(command, "--base-url", emulator.url, "ws")
        assert (code, failed(checks)) == (2, ["API"])
        assert "answered 401" in str(checks["API"]["found"])
        assert checks["API"]["advice"] == "Check the API key from BCTRL_API_KEY"

    async def test_an_unknown_workspace_exits_with_1(
        self, command: Command, emulator: Emulator
    ) -> None:
        code, checks = await examine(command, "--base-url", emulator.url, "nosuch")
        assert (code, failed(checks)) == (1, ["API"])
        assert "404" in str(checks["API"]["found"])

    async def test_an_invalid_workspace_exits_with_2(
        self, command: Command, emulator: Emulator
    ) -> None:
        code, checks = await examine(command, "--base-url", emulator.url, "..")
        assert (code, failed(checks)) == (2, ["API"])

    @pytest.mark.parametrize("key", ["", "two words"])
    async def test_a_missing_or_invalid_key_exits_with_2_after_the_other_checks(
        self, command: Command, emulator: Emulator, monkeypatch: pytest.MonkeyPatch, key: str
    ) -> None:
        monkeypatch.setenv("BCTRL_API_KEY", key)
        code, checks = await examine(command, "--base-url", emulator.url, "ws")
        assert (code, failed(checks)) == (2, ["key"])
        assert checks["TCP"]["ok"]
        assert checks["API"]["found"] == "the key was not tried"
        assert not emulator.requests

    async def test_an_unknown_host_ends_the_checks_of_the_network(self, command: Command) -> None:
        code, checks = await examine(command, "--base-url", "https://bctrl.invalid", "ws")
        assert (code, failed(checks)) == (1, ["DNS"])
        assert str(checks["DNS"]["found"]).startswith("bctrl.invalid port 443: ")
        assert "if a proxy is needed, give --proxy" in str(checks["DNS"]["advice"])
        assert checks["API"]["ok"] is None
        assert not {"TCP", "TLS"} & checks.keys()

    @pytest.mark.parametrize("host", [f"{'a' * 70}.com", ".bctrl.invalid"])
    async def test_a_name_that_is_none_of_a_host_fails_as_one_that_is_unknown(
        self, command: Command, host: str
    ) -> None:
        """Fault: it left the command as a traceback in a box."""
        code, checks = await examine(command, "--base-url", f"https://{host}", "ws")
        assert (code, failed(checks)) == (1, ["DNS"])
        assert checks["DNS"]["found"] == f"{host} port 443: not a valid name of a host"

    async def test_such_a_name_behind_a_proxy_fails_too(self, command: Command) -> None:
        async with forward_proxy(b"HTTP/1.1 200 OK\r\n\r\n") as proxy:
            code, checks = await examine(
                command, "--proxy", proxy.url, "--base-url", "https://.bctrl.invalid", "ws"
            )
        assert (code, failed(checks)) == (1, ["TLS"])
        assert checks["TLS"]["found"] == ".bctrl.invalid port 443: not a valid name of a host"

    async def test_a_url_with_a_scheme_in_capitals_has_all_steps(
        self, command: Command, emulator: Emulator
    ) -> None:
        """Fault: TLS was not checked, and the proxy of the environment not used."""
        async with over_tls(emulator) as server:
            url = server.url.replace("https:", "HTTPS:")
            code, checks = await examine(command, "--base-url", url, "ws")
        assert (code, failed(checks)) == (1, ["TLS"])

    async def test_a_closed_port_is_named_with_its_reason(self, command: Command) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
            code, checks = await examine(command, "--base-url", f"http://127.0.0.1:{port}", "ws")
        assert (code, failed(checks)) == (1, ["TCP"])
        assert checks["TCP"]["found"] == f"127.0.0.1 port {port}: Connection refused"

    async def test_an_untrusted_certificate_is_named_with_the_remedy(
        self, command: Command, emulator: Emulator
    ) -> None:
        async with over_tls(emulator) as server:
            code, checks = await examine(command, "--base-url", server.url, "ws")
        assert (code, failed(checks)) == (1, ["TLS"])
        assert "unable to get local issuer certificate" in str(checks["TLS"]["found"])
        assert "give it with --ca-file" in str(checks["TLS"]["advice"])

    async def test_a_certificate_for_another_host_is_told_from_an_unknown_ca(
        self, command: Command, emulator: Emulator, tmp_path: Path
    ) -> None:
        """Fault: the advice was to give the CA, which had been given."""
        async with over_tls(emulator) as server:
            url = server.url.replace("localhost", "127.0.0.1")
            args = ("--ca-file", server.write_ca(tmp_path), "--base-url", url, "ws")
            code, checks = await examine(command, *args)
        assert (code, failed(checks)) == (1, ["TLS"])
        assert checks["TLS"]["advice"] == "Check the host: the certificate is for another"

    async def test_a_port_without_tls_is_told_from_an_unknown_ca(
        self, command: Command, emulator: Emulator
    ) -> None:
        url = emulator.url.replace("http:", "https:")
        code, checks = await examine(command, "--base-url", url, "ws")
        assert (code, failed(checks)) == (1, ["TLS"])
        assert checks["TLS"]["advice"] == "Check the port, and the scheme of the URL"

    @pytest.mark.parametrize(
        ("answer", "reason"),
        [
            (b"HTTP/1.1 407 No\r\n\r\n", "it answered 'HTTP/1.1 407 No'"),
            (b"nonsense\r\n\r\n", "it answered 'nonsense'"),
            (b"", "it closed the connection"),
            (b"x" * 100_000, "Separator is not found, and chunk exceed the limit"),
        ],
        ids=["407", "nonsense", "nothing", "endless"],
    )
    async def test_a_proxy_that_opens_no_tunnel_is_named_with_its_answer(
        self, command: Command, answer: bytes, reason: str
    ) -> None:
        async with forward_proxy(answer) as proxy:
            code, checks = await examine(command, "--proxy", proxy.url, "ws")
        port = proxy.url.rpartition(":")[2]
        assert (code, failed(checks)) == (1, ["tunnel"])
        assert checks["tunnel"]["found"] == f"127.0.0.1 port {port}: {reason}"
        assert checks["tunnel"]["advice"] == "Check its user and password, and what it allows"

    async def test_a_server_that_is_silent_fails_after_the_timeout(
        self, command: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def start_tls(way: _Way) -> str:
            asyncio.get_running_loop().call_soon(pass_time, 10)
            return await real(way)

        real = _Way.start_tls
        monkeypatch.setattr(_Way, "start_tls", start_tls)
        # It waits for the end of a request that TLS does not begin.
        async with raw_server(answering(b"")) as plain:
            url = plain.replace("http:", "https:")
            port = url.rpartition(":")[2]
            code, checks = await examine(command, "--base-url", url, "--timeout", "10s", "ws")
        assert (code, failed(checks)) == (1, ["TLS"])
        assert checks["TLS"]["found"] == f"127.0.0.1 port {port}: no answer within 10 s"

    async def test_an_invalid_option_is_an_error_at_once(self, command: Command) -> None:
        code, out, err = await command("doctor", "--base-url", "nosuch")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "invalid --base-url" in err

    async def test_a_server_without_tls_is_named_with_the_reason_of_tls(
        self, command: Command, emulator: Emulator
    ) -> None:
        """Fault: its number is also that of EPERM, so the operation was "not permitted"."""
        url = emulator.url.replace("http", "https")
        code, checks = await examine(command, "--base-url", url)
        assert (code, failed(checks)) == (1, ["TLS"])
        assert "WRONG_VERSION_NUMBER" in str(checks["TLS"]["found"])

    async def test_an_invalid_proxy_of_the_environment_is_named_without_its_password(
        self, command: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HTTPS_PROXY", f"socks5://{LOGIN}@127.0.0.1:9")
        code, out, err = await command("doctor", "--base-url", "https://bctrl.test")
        assert (code, out) == (2, "")
        assert err.startswith("bctrl-async: error: invalid HTTPS_PROXY. Give a URL such as http://")
        assert "s3cret" not in err

    async def test_a_proxy_that_is_down_is_the_place_to_look_at(self, command: Command) -> None:
        code, checks = await examine(command, "--proxy", "http://127.0.0.1:9", "ws")
        assert (code, failed(checks)) == (1, ["TCP"])
        assert checks["TCP"]["advice"] == "Check the URL of the proxy and the network"


class TestLayout:
    async def test_advice_is_on_a_line_of_its_own(
        self, command: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("BCTRL_API_KEY", "")
        _, out, _ = await command("doctor", "--base-url", "https://bctrl.invalid")
        lines = out.splitlines()
        assert lines[3] == "✗ key       no API key: set BCTRL_API_KEY"
        assert lines[4].startswith("✗ DNS       bctrl.invalid port 443: ")
        assert lines[5] == (
            "            Check the URL and the network; if a proxy is needed, give --proxy"
        )

    async def test_marks_are_ascii_where_stdout_is(
        self, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PYTHONIOENCODING", "ascii")

        process = await start(*program(), "doctor", "--base-url", emulator.url)
        code, out, err = await finish(process)
        assert (code, err) == (0, "")
        assert [line.split()[0] for line in out.splitlines()[:-2]] == ["ok"] * 6
        assert out.splitlines()[-2] == "-      API       the key was not tried"

    async def test_long_lines_wrap_within_their_column_on_a_terminal(
        self, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:

        monkeypatch.setenv("TERM", "xterm")
        terminal = Terminal()
        process = await start(
            *program(), "doctor", "--base-url", emulator.url, stdout=terminal.fd, stderr=terminal.fd
        )
        text = await terminal.rest()
        assert await process.wait() == 0
        lines = text.splitlines()
        assert all(len(line) <= 80 for line in lines)
        assert lines[1].startswith(" " * 12)
        assert lines[1].strip()
