"""The fixtures in a project of their own, with the package installed."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from helpers import await_batch, pass_time, wait_for_requests
from servers import emulator_in_a_thread

from bctrl_async import BctrlSession, RetryPolicy, StopOutcome
from bctrl_async.emulator import Emulator, Fault
from bctrl_async.testing import (
    _in_a_thread,
    bctrl_emulator,  # noqa: F401 - a fixture.
    bctrl_session,  # noqa: F401 - a fixture.
)

TEST = """
import pytest
from bctrl_async.emulator import Fault

{mark}
async def test_a_stop_is_retried(bctrl_emulator, bctrl_session):
    bctrl_emulator.add_runtime("ws-1", "crm")
    bctrl_emulator.inject(Fault.DROP_BEFORE, alias="crm")
    assert (await bctrl_session.stop_runtime("ws-1", "crm")).status == "stopped"
    assert bctrl_emulator.received["ws-1", "crm"] == 2
"""
PLUGINS = {
    "pytest-asyncio, strict": (["-o", "asyncio_mode=strict"], "@pytest.mark.asyncio"),
    "pytest-asyncio, auto": (["-o", "asyncio_mode=auto"], ""),
    "anyio": (["-p", "no:asyncio", "-p", "anyio"], "@pytest.mark.anyio"),
}


def test_pytest_finds_the_plugin() -> None:
    [plugin] = entry_points(group="pytest11", name="bctrl_async")
    assert plugin.value == "bctrl_async.testing"


@pytest.mark.parametrize("plugin", PLUGINS)
def test_the_fixtures_work_with_every_asyncio_plugin(plugin: str, tmp_path: Path) -> None:
    options, mark = PLUGINS[plugin]
    if plugin == "anyio":
        pytest.importorskip("anyio")
        mark += "\n@pytest.mark.parametrize('anyio_backend', ['asyncio'])"
    tmp_path.joinpath("pytest.ini").write_text("[pytest]\n")
    tmp_path.joinpath("test_mine.py").write_text(TEST.format(mark=mark))

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *options],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_an_emulator_that_cannot_start_is_an_error_not_a_hang() -> None:
    with emulator_in_a_thread() as running:
        _, _, port = running.url.rpartition(":")
        with pytest.raises(OSError, match="in use"), _in_a_thread(Emulator(port=int(port))):
            pass


def test_the_fixtures_work_without_an_event_loop(
    bctrl_emulator: object,  # noqa: F811 - the fixture.
    bctrl_session: object,  # noqa: F811 - the fixture.
) -> None:
    assert "not opened yet" in repr(bctrl_session)
    assert str(getattr(bctrl_emulator, "url", "")).startswith("http://127.0.0.1:")


PROGRAM_WITHOUT_AIORESPONSES = """
import sys
sys.modules["aioresponses"] = None
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider"]))
"""


def test_without_aioresponses_its_fixture_names_the_package(tmp_path: Path) -> None:
    tmp_path.joinpath("pytest.ini").write_text("[pytest]\n")
    tmp_path.joinpath("test_mine.py").write_text(
        "def test_mocked(bctrl_aioresponses): ...\ndef test_served(bctrl_emulator): ...\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", PROGRAM_WITHOUT_AIORESPONSES],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert "needs the package aioresponses: pip install aioresponses" in done.stdout
    assert "1 passed, 1 error" in done.stdout, done.stdout + done.stderr


PAGE = Path(__file__).parent.parent / "docs" / "how-to" / "testing.md"
ROW = re.compile(
    r"^\| `([A-Z_]+)` \| .* \| (yes|no|failed) \| `(\w+)`(, 2 attempts)?", re.MULTILINE
)
ROWS: list[tuple[str, str, str, str]] = ROW.findall(PAGE.read_text("utf-8"))


def test_the_table_of_faults_has_every_fault() -> None:
    assert [row[0] for row in ROWS] == [fault.name for fault in Fault]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row[0]))
async def test_a_single_fault_ends_as_the_table_says(row: tuple[str, str, str, str]) -> None:
    name, stopped, result, twice = row
    outcomes: list[StopOutcome] = []
    async with (
        Emulator(port=0, retry_after="0", fault_latency=0.01) as emulator,
        BctrlSession(
            "emulator-key", base_url=emulator.url, timeout=60, retry=RetryPolicy(base=0.01)
        ) as session,
    ):
        emulator.add_runtime("ws-1", "crm")
        emulator.inject(Fault[name], alias="crm")
        batch = session.stop_runtimes([("ws-1", "crm")], on_outcome=outcomes.append)
        running = asyncio.create_task(await_batch(batch))
        await wait_for_requests(emulator, 1)
        if Fault[name] is Fault.HANG:
            pass_time(60)
        await running

    [outcome] = outcomes
    assert outcome.result == result
    assert emulator.received["ws-1", "crm"] == (2 if twice else 1)
    assert Fault[name].takes_effect == (stopped != "no")
    assert (emulator.status("ws-1", "crm") == "failed") == (stopped == "failed")
