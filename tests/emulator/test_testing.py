"""The fixtures in a project of their own, with the package installed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest
from aioresponses import aioresponses
from support.helpers import Connect, pass_time, started
from support.servers import emulator_in_a_thread

from bctrl_async import (
    BctrlNetworkError,
    BctrlSession,
    RetryPolicy,
    StopOutcome,
    StopResult,
)
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
MARKED = """
import pytest

@pytest.mark.bctrl_emulator({arguments})
def test_it(bctrl_session): ...
"""
PLUGINS = {
    "pytest-asyncio, strict": (["-o", "asyncio_mode=strict"], "@pytest.mark.asyncio"),
    "anyio": (["-p", "no:asyncio", "-p", "anyio"], "@pytest.mark.anyio"),
}


def run_pytest(folder: Path, tests: str, *options: str, before: str = "") -> str:
    """Run tests in a project of their own, as users do; return the output."""
    folder.joinpath("pytest.ini").write_text("[pytest]\n")
    folder.joinpath("test_mine.py").write_text(tests)
    arguments = ["-q", "-p", "no:cacheprovider", "--strict-markers", *options]
    program = (
        f"import sys\n{before}\nimport pytest\nsys.exit(pytest.main({arguments!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("plugin", PLUGINS)
def test_the_fixtures_work_with_every_asyncio_plugin(
    plugin: str, tmp_path: Path
) -> None:
    options, mark = PLUGINS[plugin]
    if plugin == "anyio":
        pytest.importorskip("anyio")
        mark += "\n@pytest.mark.parametrize('anyio_backend', ['asyncio'])"
    assert "1 passed" in run_pytest(tmp_path, TEST.format(mark=mark), *options)


USES = """
import os

import pytest
from bctrl_async import BctrlSession
from bctrl_async.emulator import Fault

pytestmark = pytest.mark.bctrl_emulator(api_key="module", faults={Fault.LATENCY: 1})


@pytest.mark.bctrl_emulator(api_key="test", faults={})
async def test_the_environment_is_that_of_the_emulator(bctrl_env, bctrl_emulator):
    bctrl_emulator.add_runtime("ws-1", "crm")
    async with BctrlSession() as session:  # As an app would make it.
        await session.stop_runtime("ws-1", "crm")
    assert (bctrl_emulator.api_key, bctrl_emulator.stops[0].fault) == ("test", None)
    assert "BCTRL_PROFILE" not in os.environ


async def test_a_module_can_be_marked(bctrl_emulator, bctrl_session):
    bctrl_emulator.add_runtime("ws-1", "crm")
    await bctrl_session.stop_runtime("ws-1", "crm")
    assert bctrl_emulator.api_key == "module"
    assert bctrl_emulator.stops[0].fault == Fault.LATENCY

"""


def test_the_fixtures_are_configured_by_a_marker_and_set_the_environment(
    tmp_path: Path,
) -> None:
    before = "import os; os.environ.update(BCTRL_PROFILE='mine', BCTRL_BASE_URL='http://[::1]:1')"
    output = run_pytest(tmp_path, USES, "-o", "asyncio_mode=auto", before=before)
    assert "2 passed" in output, output


INVALID = {
    "rate_limt=50": "TypeError: .*unexpected keyword argument 'rate_limt'",
    "50": "TypeError: .*takes 1 positional argument",
    "latency='1s'": "ValueError: latency is '1s': give int or float, not str",
}


def test_an_invalid_argument_of_the_marker_is_an_error_that_names_it(
    tmp_path: Path,
) -> None:
    # A single run imports pytest, its plugins and the package once.
    tests = [
        MARKED.format(arguments=arguments).replace("test_it", f"test_{number}")
        for number, arguments in enumerate(INVALID)
    ]
    output = run_pytest(tmp_path, "".join(tests))
    assert "3 errors" in output
    _, *reports = re.split(r"ERROR at setup of test_\d", output)
    for report, message in zip(reports, INVALID.values(), strict=True):
        assert re.search(f"^E +{message}", report, re.MULTILINE)


def test_an_emulator_that_cannot_start_is_an_error_not_a_hang(tmp_path: Path) -> None:
    with emulator_in_a_thread() as running:
        _, _, port = running.url.rpartition(":")
        output = run_pytest(tmp_path, MARKED.format(arguments=f"port={port}"))
    assert "in use" in output
    assert "1 error" in output


def test_the_fixtures_work_without_an_event_loop(
    bctrl_emulator: Emulator,  # noqa: F811 - the fixture.
    bctrl_session: BctrlSession,  # noqa: F811 - the fixture.
) -> None:
    assert "not opened yet" in repr(bctrl_session)
    assert bctrl_emulator.url.startswith("http://127.0.0.1:")


# Mocks.

API = "https://api.bctrl.ai"


async def test_mocked_answers_are_retried_and_decoded(
    bctrl_aioresponses: aioresponses, emulator: Emulator, pauses: list[float]
) -> None:
    stop = f"{API}/v1/workspaces/ws-1/runtimes/crm/stop"
    bctrl_aioresponses.post(stop, status=503, headers={"Retry-After": "7"})
    bctrl_aioresponses.post(stop, exception=aiohttp.ServerDisconnectedError())
    bctrl_aioresponses.post(stop, payload=dict(emulator.runtimes["ws-1", "crm"]))
    async with BctrlSession("k", base_url=API) as session:
        assert (await session.stop_runtime("ws-1", "crm")).alias == "crm"
    assert pauses[0] >= 7


@pytest.mark.usefixtures("bctrl_aioresponses")
async def test_a_request_that_is_not_mocked_is_not_sent(
    emulator: Emulator, connect: Connect
) -> None:
    """Fault: a test that forgets a mock stops a real browser."""
    async with connect(retry=RetryPolicy(attempts=1)) as session:
        with pytest.raises(BctrlNetworkError, match="Connection refused"):
            await session.stop_runtime("ws-1", "crm")
    assert emulator.requests == []


# With None in `sys.modules` the submodule would be missing, and not the package. Python
# 3.15 cannot print that error.
WITHOUT_AIORESPONSES = """
class Finder:
    def find_spec(name, *_):
        if name == "aioresponses":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Finder)
"""


def test_without_aioresponses_its_fixture_names_the_package(tmp_path: Path) -> None:
    tests = """
def test_mocked(bctrl_aioresponses): ...
def test_served(bctrl_emulator): ...
"""
    output = run_pytest(tmp_path, tests, before=WITHOUT_AIORESPONSES)
    assert re.search("ModuleNotFoundError: .*aioresponses", output)
    assert "1 passed, 1 error" in output


# Faults and retries.

# The outcome of a stop that meets a single fault, and its attempts.
SINGLE = {
    Fault.LATENCY: (StopResult.STOPPED, 1),
    Fault.RATE_LIMITED: (StopResult.STOPPED, 2),
    Fault.SERVER_ERROR: (StopResult.STOPPED, 2),
    Fault.BAD_GATEWAY: (StopResult.ALREADY_STOPPED, 2),
    Fault.DROP_BEFORE: (StopResult.STOPPED, 2),
    Fault.DROP_AFTER: (StopResult.ALREADY_STOPPED, 2),
    Fault.HANG: (StopResult.ALREADY_STOPPED, 2),
    Fault.TRUNCATED_JSON: (StopResult.ACCEPTED, 1),
    Fault.MALFORMED_JSON: (StopResult.ACCEPTED, 1),
    Fault.UNKNOWN_VALUES: (StopResult.ACCEPTED, 1),
    Fault.FAILED: (StopResult.ACCEPTED, 1),
    Fault.ACCEPTED: (StopResult.ACCEPTED, 1),
}


@pytest.mark.parametrize("fault", Fault)
async def test_a_single_fault_is_settled_by_one_retry(
    emulator: Emulator, connect: Connect, fault: Fault
) -> None:
    outcomes: list[StopOutcome] = []
    emulator.inject(fault, alias="crm")
    async with connect() as session:
        batch = session.stop_runtimes(
            [("ws-1", "crm")], on_outcome=outcomes.append, verify=False
        )
        running = await started(batch, emulator, 1)
        if fault is Fault.HANG:
            pass_time(60)
        await running

    [outcome] = outcomes
    assert (outcome.result, emulator.received["ws-1", "crm"]) == SINGLE[fault]
