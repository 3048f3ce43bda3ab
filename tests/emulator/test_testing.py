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

from bctrl_async import BctrlSession, RetryPolicy, StopOutcome, StopResult
from bctrl_async.emulator import Emulator, Fault
from bctrl_async.testing import (
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
    "anyio": (["-p", "no:asyncio", "-p", "anyio"], "@pytest.mark.anyio"),
}


def run_pytest(folder: Path, tests: str, *options: str, before: str = "") -> str:
    """Run tests in a project of their own, as a user with the package installed; return output."""
    folder.joinpath("pytest.ini").write_text("[pytest]\n")
    folder.joinpath("test_mine.py").write_text(tests)
    arguments = ["-q", "-p", "no:cacheprovider", "--strict-markers", *options]
    program = f"import sys\n{before}\nimport pytest\nsys.exit(pytest.main({arguments!r}))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout + done.stderr


def test_pytest_finds_the_plugin() -> None:
    [plugin] = entry_points(group="pytest11", name="bctrl_async")
    assert plugin.value == "bctrl_async.testing"


@pytest.mark.parametrize("plugin", PLUGINS)
def test_the_fixtures_work_with_every_asyncio_plugin(plugin: str, tmp_path: Path) -> None:
    options, mark = PLUGINS[plugin]
    if plugin == "anyio":
        pytest.importorskip("anyio")
        mark += "\n@pytest.mark.parametrize('anyio_backend', ['asyncio'])"
    assert "1 passed" in run_pytest(tmp_path, TEST.format(mark=mark), *options)


USES = """
import os

import pytest
from bctrl_async import BctrlSession, RetryPolicy
from bctrl_async.emulator import Fault

pytestmark = pytest.mark.bctrl_emulator(api_key="module", faults={Fault.LATENCY: 1})


@pytest.fixture(autouse=True)
def _runtime(bctrl_emulator):
    bctrl_emulator.add_runtime("ws-1", "crm")


async def stop():
    async with BctrlSession() as session:  # As an app would make it.
        await session.stop_runtime("ws-1", "crm")


@pytest.mark.bctrl_emulator(api_key="test", faults={})
async def test_the_environment_is_that_of_the_emulator(bctrl_env, bctrl_emulator):
    assert "BCTRL_PROFILE" not in os.environ
    await stop()
    bctrl_emulator.assert_stopped("ws-1", "crm")
    assert bctrl_emulator.api_key == os.environ["BCTRL_API_KEY"] == "test"


async def test_a_module_can_be_marked(bctrl_emulator, bctrl_session):
    assert bctrl_emulator.api_key == "module"
    await bctrl_session.stop_runtime("ws-1", "crm")
    assert bctrl_emulator.stops[0].fault is Fault.LATENCY


@pytest.mark.bctrl_emulator(rate_limit=0.001, faults={})
async def test_a_limit(bctrl_session):
    report = await bctrl_session.stop_runtimes([("ws-1", "crm")] * 3, retry=RetryPolicy(patience=0))
    assert report.throttled
"""


def test_the_fixtures_are_configured_by_a_marker_and_set_the_environment(tmp_path: Path) -> None:
    before = "import os; os.environ.update(BCTRL_PROFILE='mine', BCTRL_BASE_URL='http://[::1]:1')"
    output = run_pytest(tmp_path, USES, "-o", "asyncio_mode=auto", before=before)
    assert "3 passed" in output, output


def test_an_invalid_argument_of_the_marker_is_an_error_that_names_it(tmp_path: Path) -> None:
    messages = {
        "rate_limt=50": "unexpected keyword argument 'rate_limt'",
        "50": "takes 1 positional argument",
        "rate_limit=0": "rate_limit is 0: give 0.0001 to 1000000",
        "latency='1s'": "latency is '1s': give int or float, not str",
    }
    tests = [
        f"@pytest.mark.bctrl_emulator({marked})\ndef test_{number}(bctrl_session): ...\n"
        for number, marked in enumerate(messages)
    ]
    output = run_pytest(tmp_path, "\n".join(["import pytest", *tests]))
    assert "4 errors" in output
    for message in messages.values():
        assert re.search(f"^E +(Type|Value)Error: .*{re.escape(message)}", output, re.MULTILINE)


def test_an_emulator_that_cannot_start_is_an_error_not_a_hang(tmp_path: Path) -> None:
    with emulator_in_a_thread() as running:
        _, _, port = running.url.rpartition(":")
        mark = f"@pytest.mark.bctrl_emulator(port={port})"
        tests = f"import pytest\n\n{mark}\ndef test_it(bctrl_emulator): ...\n"
        output = run_pytest(tmp_path, tests)
    assert "in use" in output
    assert "1 error" in output


def test_the_fixtures_work_without_an_event_loop(
    bctrl_emulator: Emulator,  # noqa: F811 - the fixture.
    bctrl_session: BctrlSession,  # noqa: F811 - the fixture.
) -> None:
    assert "not opened yet" in repr(bctrl_session)
    assert bctrl_emulator.url.startswith("http://127.0.0.1:")


async def test_retries_and_polls_of_the_session_are_quick(
    bctrl_emulator: Emulator,  # noqa: F811 - the fixture.
    bctrl_session: BctrlSession,  # noqa: F811 - the fixture.
    pauses: list[float],
) -> None:
    bctrl_emulator.add_runtime("ws-1", "crm")
    bctrl_emulator.inject(*[Fault.DROP_BEFORE] * 3, Fault.MALFORMED_JSON)
    bctrl_emulator.inject(*[Fault.SERVER_ERROR] * 3, Fault.ACCEPTED, Fault.ACCEPTED, method="GET")
    async with bctrl_session as session:
        assert (await session.stop_runtimes([("ws-1", "crm")])).ok
    # Six retries, and two polls at least.
    assert len(pauses) >= 8
    assert max(pauses) <= 0.01


def test_without_aioresponses_its_fixture_names_the_package(tmp_path: Path) -> None:
    tests = "def test_mocked(bctrl_aioresponses): ...\ndef test_served(bctrl_emulator): ...\n"
    output = run_pytest(tmp_path, tests, before="sys.modules['aioresponses'] = None")
    assert re.search("ModuleNotFoundError: .*aioresponses", output)
    assert "1 passed, 1 error" in output


# The outcome of a stop that meets a single fault, and its attempts.
SINGLE = {
    Fault.LATENCY: (StopResult.STOPPED, 1),
    Fault.RATE_LIMITED: (StopResult.STOPPED, 2),
    Fault.SERVER_ERROR: (StopResult.STOPPED, 2),
    Fault.BAD_GATEWAY: (StopResult.ALREADY_STOPPED, 2),
    Fault.DROP_BEFORE: (StopResult.STOPPED, 2),
    Fault.DROP_AFTER: (StopResult.ALREADY_STOPPED, 2),
    Fault.CLOSE_KEPT_ALIVE: (StopResult.STOPPED, 1),
    Fault.HANG: (StopResult.ALREADY_STOPPED, 2),
    Fault.SLOW_DRIP: (StopResult.STOPPED, 1),
    Fault.TRUNCATED_JSON: (StopResult.ACCEPTED, 1),
    Fault.MALFORMED_JSON: (StopResult.ACCEPTED, 1),
    Fault.OVERSIZED: (StopResult.ACCEPTED, 1),
    Fault.COMPRESSED_BOMB: (StopResult.ACCEPTED, 1),
    Fault.UNKNOWN_VALUES: (StopResult.ACCEPTED, 1),
    Fault.FAILED: (StopResult.ACCEPTED, 1),
    Fault.ACCEPTED: (StopResult.ACCEPTED, 1),
    Fault.STRAY_ANSWER: (StopResult.STOPPED, 1),
    Fault.LATE_STRAY_ANSWER: (StopResult.STOPPED, 1),
}


@pytest.mark.parametrize("fault", Fault)
async def test_a_single_fault_is_settled_by_one_retry(fault: Fault) -> None:
    outcomes: list[StopOutcome] = []
    async with (
        Emulator(port=0, fault_latency=0.01) as emulator,
        BctrlSession(
            "emulator-key", base_url=emulator.url, timeout=60, retry=RetryPolicy(base=0.01)
        ) as session,
    ):
        emulator.add_runtime("ws-1", "crm")
        emulator.inject(fault, alias="crm")
        batch = session.stop_runtimes([("ws-1", "crm")], on_outcome=outcomes.append, verify=False)
        running = asyncio.create_task(await_batch(batch))
        await wait_for_requests(emulator, 1)
        if fault is Fault.HANG:
            pass_time(60)
        await running

    [outcome] = outcomes
    assert (outcome.result, emulator.received["ws-1", "crm"]) == SINGLE[fault]
