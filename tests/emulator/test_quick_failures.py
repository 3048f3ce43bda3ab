"""Failures that are quick in tests: all their requests, and no waits."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
from support.helpers import (
    BOUND,
    add_runtimes,
    pass_time,
    started,
    wait_for_requests,
)
from support.runtimes import runtime
from support.simulated import Simulate

from bctrl_async import (
    BctrlConfigError,
    BctrlError,
    BctrlSession,
    RetryPolicy,
    StopOutcome,
    StopReport,
    _quick_failures,
)
from bctrl_async.emulator import Emulator, Fault, Reply
from bctrl_async.testing import (
    bctrl_emulator,  # noqa: F401 - a fixture.
    bctrl_env,  # noqa: F401 - a fixture.
    bctrl_session,  # noqa: F401 - a fixture.
    set_testing,
)

CRM = ("ws-1", "crm")
OWN = RetryPolicy(attempts=10, patience=300)
THROTTLED = Reply(429, headers={"Retry-After": "5"})


class Endings(NamedTuple):
    """The requests about a runtime that meets a fault for ever."""

    fault: Fault | Reply
    stops: int
    own_stops: int
    """The stops with a policy of ten attempts."""
    polls: int


ENDINGS = {
    "Reply(503)": Endings(Reply(503), 10, 10, 0),
    "Reply(500)": Endings(Reply(500), 4, 10, 10),
    "Reply(429)": Endings(Reply(429), 10, 10, 0),
    "RATE_LIMITED": Endings(Fault.RATE_LIMITED, 10, 10, 0),
    "Retry-After": Endings(THROTTLED, 10, 10, 0),
    "BAD_GATEWAY": Endings(Fault.BAD_GATEWAY, 4, 10, 10),
    # aiohttp sends a GET twice if a kept-alive connection is lost.
    "DROP_AFTER": Endings(Fault.DROP_AFTER, 4, 10, 2 * 10),
    "DROP_BEFORE": Endings(Fault.DROP_BEFORE, 4, 10, 2 * 10),
    "HANG": Endings(Fault.HANG, 2, 2, 1),
}
every_ending = pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
every_session = pytest.mark.parametrize("fixture", ["bctrl_session", "bctrl_env"])


@pytest.fixture
def emulator(bctrl_emulator: Emulator) -> Emulator:  # noqa: F811 - the fixture.
    bctrl_emulator.add_runtime(*CRM)
    return bctrl_emulator


@pytest.fixture
def session(
    fixture: str, emulator: Emulator, request: pytest.FixtureRequest
) -> BctrlSession:
    """The fixture's session, or an app's own, which is made before the fixture runs."""
    own = BctrlSession(emulator.api_key, base_url=emulator.url, retry=OWN, timeout=60)
    provided: BctrlSession | None = request.getfixturevalue(fixture)
    return own if provided is None else provided


async def result_of(emulator: Emulator, call: Coroutine[Any, Any, object]) -> object:
    """Return what a call returns or raises; each hanging attempt times out."""
    running = asyncio.create_task(call)
    received = 0
    async with asyncio.timeout(BOUND):
        while not running.done():
            await asyncio.sleep(0)
            if len(emulator.requests) > received:
                received = len(emulator.requests)
                if emulator.requests[-1].fault is Fault.HANG:
                    pass_time(_quick_failures.TIME_LIMIT)
    try:
        return running.result()
    except BctrlError as error:
        return error


async def report_of(
    emulator: Emulator, session: BctrlSession, *aliases: str
) -> StopReport:
    targets = [("ws-1", alias) for alias in aliases]
    report = await result_of(emulator, session.stop_runtimes(targets, verify=60))
    assert isinstance(report, StopReport)
    return report


def polls(emulator: Emulator) -> int:
    """Return the number of reads of the runtime `crm`."""
    return sum(
        request.method == "GET" and request.alias == "crm"
        for request in emulator.requests
    )


@every_session
@every_ending
async def test_a_failing_call_makes_a_documented_number_of_attempts(
    emulator: Emulator, session: BctrlSession, fixture: str, ending: Endings
) -> None:
    emulator.poison(*CRM, ending.fault)
    async with session:
        error = await result_of(emulator, session.stop_runtime(*CRM))

    assert isinstance(error, BctrlError)
    stops = ending.stops if fixture == "bctrl_session" else ending.own_stops
    assert error.attempts == emulator.received[CRM] == stops
    # The advice to allow a longer timeout would be in vain.
    assert ("It is a limit of tests" in str(error)) is (ending.fault is Fault.HANG)


@every_session
@every_ending
async def test_a_failing_bulk_stop_makes_a_documented_number_of_attempts_and_polls(
    emulator: Emulator, session: BctrlSession, fixture: str, ending: Endings
) -> None:
    emulator.poison(*CRM, ending.fault)
    async with session:
        report = await report_of(emulator, session, "crm")

    assert not report.ok
    stops = ending.stops if fixture == "bctrl_session" else ending.own_stops
    assert (emulator.received[CRM], polls(emulator)) == (stops, ending.polls)


@every_session
async def test_retries_and_polls_go_on_as_in_production(
    emulator: Emulator, session: BctrlSession
) -> None:
    emulator.inject(*[Fault.DROP_BEFORE] * 3, Fault.MALFORMED_JSON)
    emulator.inject(
        *[Fault.SERVER_ERROR] * 3, Fault.ACCEPTED, Fault.ACCEPTED, method="GET"
    )
    async with session:
        report = await report_of(emulator, session, "crm")

    assert report.ok
    assert (emulator.received[CRM], polls(emulator)) == (4, 6)


# A list answers for all from the tenth on; each of the nine before was got once.
@pytest.mark.parametrize(("count", "gets", "lists"), [(1, 4, 0), (20, 9, 4)])
def test_a_bulk_stop_waits_for_runtimes_that_take_their_time(
    simulate: Simulate, count: int, gets: int, lists: int
) -> None:
    """Fault: ten polls came within milliseconds, and no runtime had ended."""
    active, ended = runtime("active"), runtime("stopped")
    simulation = simulate(lambda request: active if request.at < 0.3 else ended, 0.001)
    with set_testing(True):
        report = simulation.stop(count, verify=60)

    assert report.ok
    assert (len(simulation.reads), len(simulation.lists)) == (gets + lists, lists)


@pytest.mark.parametrize("fixture", ["bctrl_session"])
async def test_every_failing_target_gets_the_attempts_of_its_policy(
    emulator: Emulator, session: BctrlSession
) -> None:
    """The quota, which would refuse the eleventh retry, is for a server under load."""
    aliases = [f"r{number}" for number in range(20)]
    for alias in aliases:
        emulator.add_runtime("ws-1", alias)
        emulator.poison("ws-1", alias, Reply(500))
    async with session:
        await report_of(emulator, session, *aliases)

    assert {emulator.received["ws-1", alias] for alias in aliases} == {4}


@pytest.mark.parametrize(
    ("ending", "attempts"),
    [
        # After every third canary, the stop is sent again.
        ("closes", 2 + 10 + 3),
        ("hangs", 2 + 1),
    ],
)
async def test_a_server_that_answers_no_more_is_given_up(
    ending: str, attempts: int
) -> None:
    outcomes: list[StopOutcome] = []
    async with Emulator(port=0) as emulator:
        targets = add_runtimes(emulator, 3)

        async def silence(outcome: StopOutcome) -> None:
            outcomes.append(outcome)
            emulator.hold("ws-1", "r0", "r1", "r2")
            if ending == "closes":
                await emulator.close()

        session = BctrlSession(emulator.api_key, base_url=emulator.url, retry=OWN)
        async with session:
            with set_testing(True):
                stop = session.stop_runtimes(targets, concurrency=1, on_outcome=silence)
                running = await started(stop, emulator, 1)
                if ending == "hangs":
                    for received in (2, 3):
                        await wait_for_requests(emulator, received)
                        pass_time(_quick_failures.TIME_LIMIT)
                await running

    assert "answers no more" in str(stop.ended_early)
    assert [outcome.ok for outcome in outcomes] == [True, False, False]
    assert session.stats.attempts == attempts


def attempts_in_a_thread(emulator: Emulator) -> int:
    """Return the attempts of a failing stop in a thread with its own loop."""
    emulator.poison(*CRM, Reply(503))

    async def stop() -> int:
        async with BctrlSession(
            emulator.api_key, base_url=emulator.url, retry=OWN
        ) as session:
            with pytest.raises(BctrlError) as raised:
                await session.stop_runtime(*CRM)
        return raised.value.attempts

    with ThreadPoolExecutor() as threads:
        return threads.submit(asyncio.run, stop()).result()


def is_quick() -> bool:
    return _quick_failures.is_on


def test_the_switch_reaches_other_threads_and_is_set_back(emulator: Emulator) -> None:
    with set_testing(True):
        assert attempts_in_a_thread(emulator) == 10
        with set_testing(False):
            assert not is_quick()
        assert is_quick()
    assert not is_quick()


def test_no_environment_variable_is_the_switch(request: pytest.FixtureRequest) -> None:
    assert "PYTEST_CURRENT_TEST" in os.environ
    assert not is_quick()
    for fixture in ("bctrl_env", "bctrl_session"):
        request.getfixturevalue(fixture)
        assert is_quick()


def test_the_switch_takes_a_bool() -> None:
    with pytest.raises(
        BctrlConfigError, match="invalid testing: expected a bool, not str"
    ):
        set_testing("yes")  # type: ignore[arg-type]
