"""The commands `emulator` and `demo`."""

from __future__ import annotations

import asyncio
import re
import signal
import sys

import aiohttp
import pytest
from support.commands import (
    Command,
    Process,
    begin_to_end,
    finish,
    start,
    without_times,
)
from support.helpers import BOUND, wait_for_line
from support.warm_server import program
from yarl import URL

from bctrl_async.cli._emulator import emulator as run_emulator
from bctrl_async.emulator import Emulator, Fault

RUNTIMES = "/v1/workspaces/demo/runtimes"


async def start_emulator(*options: str) -> tuple[Process, str, list[str]]:
    """Start an emulator; return it with its URL and the three lines that it prints."""
    process = await start(*program(), "emulator", "--port", "0", *options)
    assert process.stdout is not None
    async with asyncio.timeout(BOUND):
        lines = [(await process.stdout.readline()).decode() for _ in range(3)]
    return process, lines[0].strip().partition("=")[2], lines


# The emulator


@pytest.mark.parametrize(
    ("signal_", "expected", "options"),
    [(signal.SIGTERM, 0, ()), (signal.SIGINT, 130, ("--host", "0.0.0.0"))],  # noqa: S104 - shown.
)
async def test_the_emulator_prints_commands_to_paste_and_ends_on_a_signal(
    command: Command,
    *,
    signal_: signal.Signals,
    expected: int,
    options: tuple[str, ...],
) -> None:
    process, url, (_, key, first) = await start_emulator("--api-key", "it's", *options)
    assert url.startswith("http://127.0.0.1:")
    assert key == "export BCTRL_API_KEY='it'\"'\"'s'\n"
    assert first == "bctrl-async stop demo runtime-0001\n"
    command.setenv(BCTRL_BASE_URL=url, BCTRL_API_KEY="it's")
    code, out, _ = await command(*first.split()[1:])
    assert (code, out.split()[:2]) == (0, ["runtime-0001", "stopped"])

    process.send_signal(signal_)
    said = "The emulator is running; stop it with Ctrl-C. In another terminal, run:\n\n"
    assert await finish(process) == (expected, "", f"{said}1 request received\n")


async def test_the_emulator_injects_faults_and_prints_requests() -> None:
    process, url, _ = await start_emulator(
        "--runtimes", "1", "--fault", "drop_before=1", "-v"
    )
    async with aiohttp.ClientSession(
        url, headers={"Authorization": "Bearer sk-1"}
    ) as client:
        for path in (f"{RUNTIMES}?api_key=secret", f"{RUNTIMES}/%1B%5B2J"):
            await client.get(URL(path, encoded=True))
    async with aiohttp.ClientSession(
        headers={"Authorization": "Bearer emulator-key"}
    ) as client:
        await client.post(f"{url}{RUNTIMES}/runtime-0002/stop")
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await client.post(f"{url}{RUNTIMES}/runtime-0001/stop")
    process.terminate()
    _, _, err = await finish(process)
    assert err.splitlines()[1:-2] == [
        f"401 GET  {RUNTIMES}",
        f"401 GET  {RUNTIMES}/%1B%5B2J",
        f"404 POST {RUNTIMES}/runtime-0002/stop",
        # A request without an answer has no status.
        f"--- POST {RUNTIMES}/runtime-0001/stop drop_before",
    ]


async def test_the_emulator_counts_the_runtimes_that_it_was_still_ending() -> None:
    process, url, _ = await start_emulator("--runtimes", "3", "--stop-takes", "1h")
    async with aiohttp.ClientSession(
        headers={"Authorization": "Bearer emulator-key"}
    ) as client:
        for number in (1, 2, 2):
            stop = await client.post(f"{url}{RUNTIMES}/runtime-000{number}/stop")
            assert (await stop.json())["status"] == "active"
    process.terminate()
    _, _, err = await finish(process)
    assert err.splitlines()[-1] == "3 requests received, 2 runtimes still ending"


async def test_a_port_in_use_is_reported_with_a_remedy(command: Command) -> None:
    port = command.api.url.rpartition(":")[2]
    code, out, err = await command("emulator", "--port", port)
    assert f"error: cannot listen on 127.0.0.1 port {port}: " in err
    assert (code, out, err.count("\n")) == (2, "", 1)


def test_the_help_names_every_fault() -> None:
    _, _, names = (run_emulator.__doc__ or "").partition("Faults:\n")
    assert names.replace(",", "").split() == list(Fault)


# The demo


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the delays out of the demo's emulator."""

    def quick(*, latency: float, fault_latency: float, **options: object) -> Emulator:
        assert latency < fault_latency
        return Emulator(**options)  # type: ignore[arg-type]  # passed on.

    monkeypatch.setattr("bctrl_async.cli._emulator.Emulator", quick)
    monkeypatch.setattr("bctrl_async.cli._emulator._SLOW_STOP", 0.1)


@pytest.mark.usefixtures("_quick")
async def test_the_demo_ends_with_a_report_that_the_emulator_confirms(
    command: Command,
) -> None:
    command.setenv(BCTRL_BASE_URL="https://bctrl.test")
    code, out, err = await command("demo", "--runtimes", "60")
    summary, requests, verdict = without_times(out).splitlines()
    assert summary.startswith("59 of 60 no longer running, 1 unconfirmed after 0.0 s: ")
    assert summary.endswith("1 not_found")
    assert re.fullmatch(r"It took \d+ requests; \d+ were throttled\.", requests)
    stopped = "59 of 59 runtimes are stopped; 1 of 60 names have no runtime."
    assert verdict == f"The emulator confirms: {stopped}"
    slow = "one in ten takes a second to end"
    emulator = f"a faulty emulator that allows 100/s; {slow}"
    assert err == f"Stopping 60 runtimes on {emulator}.\n"
    assert code == 0


@pytest.mark.usefixtures("_quick")
async def test_a_demo_that_the_emulator_contradicts_exits_with_1(
    command: Command,
) -> None:
    command.patch.setattr(Emulator, "status", lambda *_: "active")
    code, out, _ = await command("demo", "--runtimes", "3")
    assert "The emulator disagrees about 3 of 3:\n" in out
    assert re.search(r"^runtime-0001: \w+, but it is active\.$", out, re.MULTILINE)
    assert code == 1


@pytest.mark.usefixtures("_quick")
async def test_a_stop_that_stays_unknown_does_not_hold_up_the_demo(
    command: Command,
) -> None:
    """Fault: its runtime was polled for two minutes, in one demo of four."""
    command.patch.setattr(
        "bctrl_async.cli._emulator._DEMO_FAULTS", {Fault.SERVER_ERROR: 1.0}
    )
    command.patch.setattr("bctrl_async.cli._emulator._VERIFY_FOR", 0.1, raising=False)
    code, out, _ = await command("demo", "--runtimes", "1")
    assert out.startswith("0 of 1 no longer running, 1 still running after ")
    assert ": 1 unknown\nIt took " in out
    assert code == 0


HANGING_DEMO = """
import sys
from functools import partial
from bctrl_async import __main__
from bctrl_async.cli import _app, _emulator
from bctrl_async.emulator import Emulator, Fault

_emulator._DEMO_FAULTS = {Fault.HANG: 1.0}
show = partial(print, file=sys.stderr, flush=True)
_emulator.Emulator = partial(Emulator, on_request=show)
sys.argv = ["bctrl-async", "demo"]
sys.exit(__main__.main())
"""


SLOW_DEMO = """
import sys
from functools import partial
from bctrl_async import __main__
from bctrl_async.cli import _app, _emulator
from bctrl_async.emulator import Emulator

_emulator._DEMO_FAULTS = {}
_emulator._SLOW_STOP = 3600
show = partial(print, file=sys.stderr, flush=True)
_emulator.Emulator = partial(Emulator, on_request=show)
sys.argv = ["bctrl-async", "demo", "--runtimes", "1"]
sys.exit(__main__.main())
"""


async def test_the_demo_counts_the_runtimes_that_are_still_ending_as_such() -> None:
    process = await start(sys.executable, "-c", SLOW_DEMO)
    await wait_for_line(process.stderr, "GET")
    process.send_signal(signal.SIGINT)
    code, out, _ = await finish(process)
    assert out.startswith("Interrupted: 0 of 1 no longer running, 1 still running ")
    stopped = "0 of 1 runtimes are stopped, 1 still ending"
    assert f"\nThe emulator confirms: {stopped}; 0 of 1 names have no runtime.\n" in out
    assert code == 130


async def test_a_second_ctrl_c_aborts_the_demo_and_prints_its_report() -> None:
    process = await start(sys.executable, "-c", HANGING_DEMO)
    await wait_for_line(process.stderr, "ReceivedRequest")
    await begin_to_end(process)
    process.send_signal(signal.SIGINT)
    code, out, _ = await finish(process)
    assert out.startswith("Interrupted: ")
    assert re.search(r"[1-9]\d* unknown", out)
    assert "\nThe emulator confirms: " in out
    assert code == 130
