"""Shared fixtures: a running emulator, sessions connected to it, and skipped waits."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import re
import signal
import sys
from collections.abc import AsyncIterator, Generator, Iterator
from functools import partial
from pathlib import Path

import hypothesis
import pytest
from pytest_asyncio import is_async_test
from support import commands, warm_server
from support.browser import Tab, chromium, new_tab
from support.commands import Command
from support.helpers import BOUND, Bulk, Connect, pass_time
from support.loops import EAGER_HELP, LoopFactory, start_eagerly
from support.simulated import Simulate, Simulation
from support.ways import LONG_WAY_HELP, Ways, take_long_way

from bctrl_async import BctrlSession, RetryPolicy
from bctrl_async._limiter.limiter import Limiter
from bctrl_async._limiter.rate import AdaptiveRate
from bctrl_async.emulator import Emulator
from bctrl_async.testing import bctrl_aioresponses  # noqa: F401 - a fixture.

KEY = "emulator-key"

# The tests start hundreds of processes, each of which would compile the package again.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A machine may be busy. Hypothesis itself does so where it finds a CI.
hypothesis.settings.register_profile(
    "busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("busy")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts background jobs with SIGINT ignored. Child processes would inherit
    # that, and tests could not interrupt them.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# They run the same lines millions of times, or in many processes, so that coverage
# would cost more than they do. Tests of single decisions reach these lines as well.
_NOT_MEASURED = {
    "test_chaos",
    "test_contract",
    "test_crash",
    "test_dask_example",
    "test_differential",
    "test_docket_example",
    "test_nginx",
    "test_rate",
    "test_shard_crash",
    "test_simulate",
}


_FACTORY = pytest.StashKey[LoopFactory]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long-way", action="store_true", help=LONG_WAY_HELP)
    parser.addoption(
        "--loop",
        choices=("asyncio", "uvloop"),
        default="asyncio",
        help="the event loop of async tests; with uvloop, no other tests run",
    )
    parser.addoption("--eager", action="store_true", help=EAGER_HELP)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_FACTORY] = LoopFactory(config.getoption("loop"))
    if config.getoption("long_way"):
        take_long_way()
    if config.getoption("eager"):
        start_eagerly()


def pytest_asyncio_loop_factories(config: pytest.Config) -> dict[str, LoopFactory]:
    factory = config.stash[_FACTORY]
    return {factory.package: factory}


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    factory = config.stash[_FACTORY]
    if factory.package != "asyncio":
        skipped = terminalreporter.getreports("skipped")
        marked = sum("moves_clock" in report.keywords for report in skipped)
        terminalreporter.write_line(
            f"{factory.made} tests ran on {factory.package}; "
            f"{marked} marked moves_clock were left out"
        )


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Freeze the modules and test items: garbage collections skip them."""
    gc.disable()
    try:
        return (yield)
    finally:
        # Hypothesis makes its generator now; later it would warn that its owner is
        # frozen.
        hypothesis.find(hypothesis.strategies.none(), lambda _: True)
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    if config.getoption("loop") != "asyncio":
        others = [item for item in items if not is_async_test(item)]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if is_async_test(item)]
        for item in items:
            if "pauses" in getattr(item, "fixturenames", ()):
                # The fixture moves the clock by each wait that it skips.
                item.add_marker("moves_clock")
            if item.get_closest_marker("moves_clock"):
                item.add_marker(pytest.mark.skip("the clock of uvloop cannot be moved"))
    if config.getoption("long_way"):
        # Their requests end where the two ways would part.
        simulated = [item for item in items if _is_simulated(item)]
        config.hook.pytest_deselected(items=simulated)
        items[:] = [item for item in items if not _is_simulated(item)]
    for item in items:
        if item.path.stem in _NOT_MEASURED:
            item.add_marker("no_cover")
    # What they cache would not be run again where it is measured.
    items.sort(key=lambda item: item.path.stem in _NOT_MEASURED)


def _is_simulated(item: pytest.Item) -> bool:
    return "simulate" in getattr(item, "fixturenames", ())


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Run the whole suite in several processes, but named files here, for debuggers."""
    is_whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    # Many tests wait for other processes.
    return (os.cpu_count() or 1) + 1 if is_whole else 0


@pytest.fixture(scope="session", autouse=True)
def _warm_server() -> Iterator[None]:
    """End the server of `warm_server.program`, if a test has started it."""
    yield
    warm_server.running.close()


@pytest.fixture(autouse=True)
def _seeded_jitter() -> None:
    """Make the jitter of retries the same in every run of a test."""
    random.seed(0)


@pytest.fixture(autouse=True)
def _no_coverage_of_processes(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measure no processes of a test that is not measured itself."""
    if request.node.get_closest_marker("no_cover"):
        monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no configuration of the user reach a test, and give it one terminal."""
    colors = ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
    proxies = [f"{kind}_proxy" for kind in ("http", "https", "all", "no")]
    proxies += [name.upper() for name in proxies]
    names = [*colors, *proxies, *filter(re.compile("BCTRL_").match, os.environ)]
    for name in (*names, "PYTEST_ADDOPTS"):
        monkeypatch.delenv(name, raising=False)
    # The command's config file is there.
    monkeypatch.setenv("XDG_CONFIG_HOME", "/nonexistent")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "30")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8")


@pytest.fixture
async def emulator() -> AsyncIterator[Emulator]:
    async with Emulator(port=0, api_key=KEY) as running:
        running.add_runtime("ws-1", "crm")
        yield running


@pytest.fixture
def connect(emulator: Emulator) -> Connect:
    """Return a function that makes sessions on the emulator, of little back-off."""
    return partial(
        BctrlSession,
        KEY,
        base_url=emulator.url,
        retry=RetryPolicy(base=0.001, cap=0.001),
    )


@pytest.fixture
async def session(connect: Connect) -> AsyncIterator[BctrlSession]:
    async with connect() as opened:
        yield opened


@pytest.fixture
def bulk(emulator: Emulator, session: BctrlSession) -> Bulk:
    return Bulk(emulator, session)


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch) -> Simulate:
    return partial(Simulation, monkeypatch)


@pytest.fixture
async def holding(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Emulator]:
    """An emulator with the runtimes a, b and c, which the command uses."""
    async with Emulator(port=0) as running:
        for alias in ("a", "b", "c"):
            running.add_runtime("ws", alias)
        monkeypatch.setenv("BCTRL_API_KEY", KEY)
        monkeypatch.setenv("BCTRL_BASE_URL", running.url)
        yield running


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with three targets."""
    path = tmp_path / "targets"
    path.write_text("workspace_id,alias\nws,a\nws,b\nws,c\n")
    return path


@pytest.fixture(autouse=True)
def _no_process_stays() -> Iterator[None]:
    yield
    commands.end_started()


@pytest.fixture
def command(
    holding: Emulator,
    file: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Command:
    """The command, whose retries do not wait, in a folder of its own."""
    monkeypatch.setattr(RetryPolicy, "backoff", lambda *_: 0.0)
    # It would show its progress on a busy machine.
    monkeypatch.setattr("bctrl_async.cli._progress._SHOW_AFTER", 3600)
    monkeypatch.setattr("bctrl_async.cli._progress._LINE_EVERY", 3600)
    monkeypatch.chdir(file.parent)
    return Command(holding, file.parent, monkeypatch, capfd)


@pytest.fixture(scope="module")
def browser() -> Iterator[str]:
    """The address of a running Chromium."""
    with chromium() as running:
        yield running


@pytest.fixture
async def tab(browser: str) -> AsyncIterator[Tab]:
    """A new tab of Chromium."""
    async with new_tab(browser) as tab:
        yield tab


@pytest.fixture
def fast_path_only(request: pytest.FixtureRequest) -> None:
    """Skip a test of the fast path itself while the suite takes the long way."""
    if request.config.getoption("long_way"):
        pytest.skip("no request takes the fast path with --long-way")


@pytest.fixture
def lazy_only(request: pytest.FixtureRequest) -> None:
    """Skip a test of tasks that have not started, with --eager."""
    if request.config.getoption("eager"):
        pytest.skip("an eager task has started before it can be cancelled")


@pytest.fixture
def ways() -> Iterator[Ways]:
    """The count of the requests of a test that took each way."""
    ways = Ways()
    with ways.counted():
        yield ways


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no store be away because it is slow, and ask an absent store only once."""
    for name in ("pace._leases._INTERVAL", "pace._file.PATIENCE", "redis.PATIENCE"):
        monkeypatch.setattr(f"bctrl_async.{name}", BOUND)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Skip back-off and throttling, and record the length of each skipped wait."""
    delays: list[float] = []
    paused = 0.0

    def skip(limiter: Limiter, delay: float) -> asyncio.Future[None]:
        nonlocal paused
        delays.append(max(delay, paused))
        paused = 0.0
        pass_time(delay)
        return start_sleep(limiter, 0.0)

    def on_throttled(
        _: AdaptiveRate,
        __: float,
        retry_after: float | None,
        *___: object,
        **____: object,
    ) -> None:
        nonlocal paused
        paused = retry_after or 0.0

    start_sleep = Limiter.start_sleep
    monkeypatch.setattr(Limiter, "start_sleep", skip)
    monkeypatch.setattr(AdaptiveRate, "on_throttled", on_throttled)
    return delays
