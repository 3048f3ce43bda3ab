"""A machine that lacks file descriptors, or what else a connection needs."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import resource
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import NoReturn

import pytest
from support.commands import finish, start
from support.helpers import Bulk
from support.runtimes import WIRE
from support.servers import http_answer, raw_server

from bctrl_async import (
    BctrlNetworkError,
    BctrlSession,
    RetryPolicy,
    Runtime,
    StopResult,
)
from bctrl_async._calls.results import result_of
from bctrl_async.journal import read_journals

LIMIT = 64
PROGRAM = """
import asyncio, encodings.idna, json, logging, resource, sys, {loop}
from bctrl_async import BctrlSession

records = []
handler = logging.Handler()
handler.emit = records.append
logging.getLogger("bctrl_async").addHandler(handler)

async def main():
    options = dict(base_url=sys.argv[1], max_connections=1000)
    async with BctrlSession("k", **options) as session:
        stops = (session.stop_runtime("ws-1", "crm") for _ in range(200))
        await asyncio.gather(*stops)
        report = await session.stop_runtimes([("ws-1", "crm")] * 200)
        assert session.stats.retries == 0
    print(json.dumps([report.to_dict(), [vars(record) for record in records]]))

resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))
{loop}.run(main())
"""
"""Stops 400 runtimes with few file descriptors."""
COMMAND = f"""
import resource, sys
from bctrl_async.__main__ import main
resource.setrlimit(resource.RLIMIT_NOFILE, ({LIMIT}, {LIMIT}))
sys.exit(main())
"""
CURE = "Raise the limit of open files (ulimit -n)"
BOUND = "max_connections (--concurrency)"


class SlowServer:
    """A server that answers after a while, and counts its requests."""

    def __init__(self) -> None:
        self.methods: Counter[bytes] = Counter()

    async def handle(self, head: bytes, writer: asyncio.StreamWriter) -> None:
        self.methods[head.partition(b" ")[0]] += 1
        await asyncio.sleep(0.2)
        alias = head.split(b"/")[5].decode()
        body = {**WIRE, "alias": alias, "status": "stopped"}
        writer.write(http_answer("200 OK", json.dumps(body).encode()))


@contextmanager
def no_descriptors() -> Iterator[None]:
    """Let this process open no file and no socket."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_without_a_descriptor_a_last_look_corrects_the_journal(
    bulk: Bulk, tmp_path: Path
) -> None:
    """Fault: all was stopped, and an error said to use another journal."""
    path = tmp_path / "journal.jsonl"
    with ExitStack() as stack:

        def where(_: Runtime) -> bool:
            if bulk.emulator.stops:
                stack.enter_context(no_descriptors())
            return True

        report = await bulk.session.stop_workspace(
            "ws-1",
            where=where,
            journal=path,
            on_outcome=lambda _: bulk.emulator.add_runtime("ws-1", "crm"),
        )

    assert report.ok
    [outcome] = read_journals([path], [("ws-1", "crm")])
    assert not outcome.ok


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_all_is_stopped_with_fewer_descriptors_than_attempts_may_be_in_flight(
    loop: str,
) -> None:
    """Fault: it looked like a dead server, and a third of the stops was not sent."""
    server = SlowServer()
    async with raw_server(server.handle) as url:
        program = PROGRAM.format(loop=loop, limit=LIMIT)
        code, out, err = await finish(await start(sys.executable, "-c", program, url))

    assert (code, err) == (0, "")
    report, records = json.loads(out)
    assert report["counts"]["stopped"] == report["total"] == 200
    assert server.methods == {b"POST": 400}
    [record] = records
    assert (record["bctrl.event"], record["levelname"]) == ("machine_full", "WARNING")
    assert LIMIT / 2 < record["bctrl.in_flight"] < LIMIT


async def test_the_command_says_once_why_it_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = tmp_path / "targets"
    lines = (f"ws-1,r{number}" for number in range(200))
    targets.write_text("\n".join(lines), "utf-8")
    monkeypatch.setenv("BCTRL_API_KEY", "k")
    server = SlowServer()
    async with raw_server(server.handle) as url:
        monkeypatch.setenv("BCTRL_BASE_URL", url)
        args = ("stop", "--from", targets, "--concurrency", "1000")
        code, out, err = await finish(await start(sys.executable, "-c", COMMAND, *args))

    assert code == 0
    assert out.startswith("200 of 200 no longer running")
    assert err.count("warning") == err.count(CURE) == 1
    assert "no answer" not in err


@pytest.mark.parametrize(
    ("url", "proxy"),
    [
        ("http://127.0.0.1:9", None),
        ("http://localhost:9", None),
        ("https://bctrl.test", "http://127.0.0.1:9"),
    ],
)
async def test_without_a_single_connection_the_error_names_the_cure(
    url: str, proxy: str | None
) -> None:
    """Fault: the advice was to check the base URL and the network."""
    policy = RetryPolicy(attempts=3, base=0.001)
    async with BctrlSession("k", base_url=url, proxy=proxy, retry=policy) as session:
        # What a look-up imports needs a descriptor as well.
        await asyncio.get_running_loop().getaddrinfo("localhost", 9)
        with no_descriptors(), pytest.raises(BctrlNetworkError) as raised:
            await session.stop_runtime("ws-1", "crm")

    error = raised.value
    assert error.summary == "no connection: Too many open files"
    assert str(error).endswith(f"(3 attempts). {CURE}, or lower {BOUND}")
    assert result_of(error) is StopResult.NOT_SENT


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.ENFILE, "Raise the system's limit"),
        (errno.ENOBUFS, "Free memory"),
        (errno.ENOMEM, "Free memory"),
        (errno.EADDRNOTAVAIL, "Check the host, and widen the range of local ports"),
    ],
)
async def test_the_cure_is_for_what_the_machine_lacks(
    monkeypatch: pytest.MonkeyPatch, number: int, cure: str
) -> None:
    async def fail(*_: object, **__: object) -> NoReturn:
        raise OSError(number, "Connect call failed")

    monkeypatch.setattr("aiohappyeyeballs.start_connection", fail)
    error = await error_of_a_stop()

    assert error.summary == f"no connection: {os.strerror(number)}"
    assert str(error.advice).startswith(cure)


@pytest.mark.parametrize("has_descriptors", [True, False])
async def test_a_host_is_not_unknown_if_its_look_up_had_no_descriptor(
    monkeypatch: pytest.MonkeyPatch, *, has_descriptors: bool
) -> None:
    """Fault: macOS says that it knows no such host."""

    async def fail(*_: object, **__: object) -> NoReturn:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr("aiohttp.TCPConnector._resolve_host", fail)
    with nullcontext() if has_descriptors else no_descriptors():
        error = await error_of_a_stop()

    assert error.summary.endswith(
        "Name or service not known" if has_descriptors else "Too many open files"
    )


async def error_of_a_stop() -> BctrlNetworkError:
    policy = RetryPolicy(attempts=1)
    async with BctrlSession(
        "k", base_url="http://127.0.0.1:9", retry=policy
    ) as session:
        with pytest.raises(BctrlNetworkError) as raised:
            await session.stop_runtime("ws-1", "crm")
    return raised.value
