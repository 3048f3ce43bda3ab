"""The options of the connection, `doctor`, and the option of the pace."""

from __future__ import annotations

import sys
from base64 import b64encode
from unittest.mock import Mock

import pytest
from conftest import KEY
from redis.asyncio import Redis
from support.commands import Command
from support.helpers import unused_url
from support.redis_server import SERVER, redis_server
from support.tls import forward_proxy, over_tls

from bctrl_async import BctrlSession, RetryPolicy
from bctrl_async.emulator import Fault
from bctrl_async.pace import FilePace

SESSION_OPTIONS: list[tuple[str, str, object]] = [
    ("stop ws a", "timeout", 60),
    ("stop ws a", "retry", RetryPolicy(attempts=4)),
    # A command that only reads gives up sooner.
    ("list ws", "timeout", 10),
    ("list ws", "retry", RetryPolicy(attempts=2)),
    ("get ws a", "timeout", 10),
    ("get --timeout 9s ws a", "timeout", 9),
    ("stop --attempts 1 ws a", "retry", RetryPolicy(attempts=1)),
    ("stop --patience 0 ws a", "retry", RetryPolicy(attempts=4, patience=0)),
    ("stop --rate 10 ws a", "rate", 10),
    ("stop --concurrency 3 ws a", "max_connections", 3),
]


@pytest.mark.parametrize(("args", "option", "value"), SESSION_OPTIONS)
async def test_the_session_gets_the_options(
    command: Command, args: str, option: str, value: object
) -> None:
    made = Mock(wraps=BctrlSession)
    command.patch.setattr("bctrl_async.BctrlSession", made)
    assert (await command(*args.split()))[0] == 0
    assert made.call_args.kwargs[option] == value


@pytest.mark.parametrize(
    ("option", "shown"), [("-v", 1), ("--verbose", 1), ("--timeout=9s", 0)]
)
@pytest.mark.parametrize("args", ["stop ws a", "list ws"])
async def test_verbose_shows_retries(
    command: Command, args: str, option: str, shown: int
) -> None:
    command.api.inject(
        Fault.SERVER_ERROR, method="GET" if args == "list ws" else "POST"
    )
    _, _, err = await command(*args.split(), option)
    assert err.count("bctrl-async: info: attempt 1 failed: ") == shown
    assert err.count("bctrl-async: ") == shown


@pytest.mark.parametrize("option", [["-vv"], ["-v", "-v"], ["--verbose", "--verbose"]])
async def test_twice_verbose_shows_what_is_sent_and_received(
    command: Command, option: list[str]
) -> None:
    """Fault: a key's owner was asked what differs, and `-v` did not show it."""
    command.api.inject(Fault.SERVER_ERROR)
    code, _, err = await command("stop", *option, "ws", "a")
    wire, retry = err.partition("bctrl-async: info: attempt 1 failed: ")[::2]
    url = f"{command.api.url}/v1/workspaces/ws/runtimes/a/stop"
    assert code == 0
    assert wire.startswith(f"bctrl-async: debug: POST {url} in ")
    assert {"> Authorization: '***'", "< 500"} <= {*wire.splitlines()}
    # Older versions of aiohttp spell the names of headers in another way.
    assert "< x-request-id: req_1" in wire.lower().splitlines()
    assert "\n< 200\n" in retry
    assert KEY not in err
    # The next command in this process is not verbose.
    assert "POST" not in (await command("stop", "ws", "b"))[2]


async def test_the_completion_expects_no_value_after_verbose(command: Command) -> None:
    _, script, _ = await command("--show-completion", "fish")
    options = [line for line in script.splitlines() if " -l verbose " in line]
    assert options
    assert not [line for line in options if " -r " in line]


async def test_an_unexpected_error_is_one_line_without_its_text(
    command: Command,
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("http://user:s3cret@proxy")

    command.patch.setattr("bctrl_async.cli._list._print_table", broken)
    line = broken.__code__.co_firstlineno + 1
    place = f"unexpected RuntimeError at line {line} of test_cli_connection.py"
    advice = "This is a fault of bctrl-async: please report it"
    error = f"bctrl-async: error: {place}. {advice}\n"
    assert await command("list", "ws") == (1, "", error)


# The command doctor


def found_in(out: str) -> dict[str, str]:
    """Return what was found, by the name of the line."""
    assert KEY not in out
    return {line[:8].rstrip(): line[10:] for line in out.splitlines()}


async def test_doctor_lists_once_and_stops_nothing(command: Command) -> None:
    # A proxy is another machine: what may go without TLS must not reach it.
    command.setenv(HTTPS_PROXY="http://unused.test")
    code, out, err = await command("doctor", "--base-url", command.api.url, "ws")
    assert list(found_in(out)) == ["versions", "config", "URL", "key", "API"]
    assert (code, err) == (0, "")
    assert [request.method for request in command.api.requests] == ["GET"]
    assert command.api.status("ws", "a") == "active"


async def test_the_proxy_is_used_and_shown_without_its_password(
    command: Command,
) -> None:
    async with over_tls(command.api, "bctrl.test") as server, forward_proxy() as proxy:
        command.setenv(HTTPS_PROXY=proxy.url.replace("//", "//user:s3cret%40@"))
        args = [
            "--base-url",
            server.url,
            "--ca-file",
            str(server.write_ca(command.folder)),
            "ws",
        ]
        code, out, err = await command("doctor", *args)
    assert (code, err, "s3cret" in out) == (0, "", False)
    assert found_in(out)["proxy"] == f"{proxy.url} (HTTPS_PROXY)"
    basic = b64encode(b"user:s3cret@").decode()
    assert [
        f"Proxy-Authorization: Basic {basic}\r\n" in head for head in proxy.heads
    ] == [True]


async def test_no_proxy_excepts_a_host(command: Command) -> None:
    # Curl accepts it without a scheme, too.
    command.setenv(HTTPS_PROXY="127.0.0.1:9")
    async with over_tls(command.api) as server:
        args = [
            "--base-url",
            server.url,
            "--ca-file",
            str(server.write_ca(command.folder)),
            "ws",
        ]
        code, out, _ = await command("doctor", *args)
        assert (code, found_in(out)["proxy"]) == (1, "http://127.0.0.1:9 (HTTPS_PROXY)")
        command.setenv(NO_PROXY="localhost")
        code, out, _ = await command("doctor", *args)
        assert (code, "proxy" in found_in(out)) == (0, False)


# The option --pace


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(
    "args", ["--pace pace ws a", "--pace pace ws --all --yes", "ws a"]
)
async def test_the_rate_is_of_all_who_share_the_pace(
    command: Command, args: str
) -> None:
    """Fault: the password of a server can only be given where other users see it."""
    command.setenv(BCTRL_PACE="" if "--pace" in args else "pace")
    made = Mock(wraps=BctrlSession)
    command.patch.setattr("bctrl_async.BctrlSession", made)
    code, _, err = await command("stop", "--rate", "5", *args.split())
    given = made.call_args.kwargs
    assert (code, err, type(given["rate"])) == (0, "", FilePace)
    assert (command.folder / "pace").exists()


async def test_a_dry_run_asks_no_store(command: Command) -> None:
    args = ("stop", "--dry-run", "--rate", "5", "--pace", "pace", "ws", "a")
    assert (await command(*args))[0] == 0
    assert not (command.folder / "pace").exists()


@pytest.mark.usefixtures("patient")
async def test_the_url_of_a_server_is_used_for_the_list_and_the_stops(
    command: Command,
) -> None:
    """Fault: a client of one event loop was used in the next, and never closed."""
    with redis_server(SERVER) as server:
        args = (
            "--rate",
            "20",
            "--pace",
            f"{server.url}?protocol=3",
            "ws",
            "--all",
            "--yes",
        )
        code, out, err = await command("stop", *args)
        async with Redis.from_url(server.url) as client:
            assert await client.keys() == [b"bctrl-async:default"]
    assert (code, "3 of 3 no longer running" in out, err) == (0, True, "")


@pytest.mark.parametrize(
    "url",
    [
        "redis:6379",
        "valkey://localhost",
        "redis://localhost:99999",
        "redis://[::1",
        "redis://localhost/prod",
        "redis://localhost?nonsense=1",
        "rediss://localhost?ssl_cert_reqs=perhaps",
        # The error does not show a password that is not encoded.
        "redis://me:s3cr/et@localhost",
        "redis://me:12#s3cret@localhost",
        "redis://me:12?s3cret@localhost",
        "http://me:s3cret@localhost",
    ],
)
async def test_an_invalid_url_is_an_error_without_it(
    command: Command, url: str
) -> None:
    code, out, err = await command("stop", "--rate", "9", "--pace", url, "ws", "a")
    assert "error: invalid --pace: expected the URL of a Redis server" in err
    assert (code, "s3cr" in f"{out}{err}") == (2, False)
    assert command.api.requests == []


async def test_without_the_extra_a_url_says_what_to_install(command: Command) -> None:
    command.patch.setitem(sys.modules, "redis.asyncio", None)
    code, _, err = await command(
        "stop", "--rate", "9", "--pace", "redis://h", "ws", "a"
    )
    advice = "install bctrl-async with the extra redis"
    assert f"cannot use --pace: redis.asyncio is missing: {advice}" in err
    assert (code, err.count("\n")) == (2, 1)


@pytest.mark.usefixtures("patient")
async def test_a_store_that_is_away_is_a_warning_without_its_password(
    command: Command,
) -> None:
    with unused_url() as url:
        place = url.replace("http://", "redis://:secret@")
        code, out, err = await command(
            "stop", "--rate", "5", "--pace", place, "ws", "a"
        )
    host = url.removeprefix("http://")
    warning = f"bctrl-async: warning: the shared pace at {host} cannot be asked"
    assert (code, err.startswith(warning), "secret" in out + err) == (0, True, False)
    assert command.api.status("ws", "a") == "stopped"
