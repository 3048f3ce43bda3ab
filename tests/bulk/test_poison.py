"""Bulk stops of which some runtimes are behind a dead node: real sockets, in virtual time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import pytest
from support import virtual_time
from support.helpers import add_runtimes

from bctrl_async import BctrlSession, RetryPolicy, StopOutcome, StopReport, StopResult
from bctrl_async.emulator import Emulator, Fault, Reply

STOPPED, UNKNOWN = StopResult.STOPPED, StopResult.UNKNOWN
ATTEMPTS = RetryPolicy().attempts
NO_UPSTREAM = Reply(503, body="no healthy upstream")
ASKS_TO_WAIT = Reply(503, body="Backend fetch failed", headers={"Retry-After": "5"})


class Run(NamedTuple):
    """A bulk stop that has ended, its emulator, and the virtual seconds of all and of each."""

    report: StopReport
    outcomes: dict[str, StopOutcome]
    emulator: Emulator
    seconds: float
    ended: dict[str, float]


def stop_poisoned(
    count: int,
    dead: Iterable[int],
    fault: Fault | Reply,
    *,
    concurrency: int = 100,
    fails_once: str | None = None,
) -> Run:
    outcomes: dict[str, StopOutcome] = {}
    ended: dict[str, float] = {}

    def keep(outcome: StopOutcome) -> None:
        outcomes[outcome.target.alias] = outcome
        ended[outcome.target.alias] = virtual_time.now()

    async def main() -> Run:
        async with Emulator(port=0, latency=0.01) as emulator:
            targets = add_runtimes(emulator, count)
            for number in dead:
                emulator.poison(*targets[number], fault)
            if fails_once is not None:
                emulator.inject(Fault.DROP_BEFORE, alias=fails_once)
            async with BctrlSession("emulator-key", base_url=emulator.url, timeout=1.0) as session:
                report = await session.stop_runtimes(
                    targets, concurrency=concurrency, on_outcome=keep, verify=False
                )
            return Run(report, outcomes, emulator, virtual_time.now(), ended)

    return virtual_time.run(main())


CASES: dict[str, tuple[int, Iterable[int], Fault | Reply, int, float, float]] = {
    # They say how many targets there are, which of them are dead, how these fail, how many are
    # stopped at once, and the most seconds until the others have ended, and until all have.
    "one of many has a bad gateway": (1000, [500], Fault.BAD_GATEWAY, 100, 1.5, 8),
    "one of many breaks its connection": (1000, [500], Fault.DROP_BEFORE, 100, 1.5, 8),
    "one of many never answers": (1000, [500], Fault.HANG, 100, 1.5, 14),
    "the first never answers": (30, [0], Fault.HANG, 1, 20, 20),
    "the first breaks its connection": (30, [0], Fault.DROP_BEFORE, 2, 20, 20),
    "the last has a bad gateway": (30, [29], Fault.BAD_GATEWAY, 1, 20, 20),
    "the last never answers": (30, [29], Fault.HANG, 2, 20, 20),
    "a fifth have a bad gateway": (500, range(2, 500, 5), Fault.BAD_GATEWAY, 100, 20, 20),
    "a fifth never answer": (500, range(2, 500, 5), Fault.HANG, 100, 20, 20),
    "one of many has no upstream": (1000, [500], NO_UPSTREAM, 100, 5, 12),
    "the first has no upstream": (1000, [0], NO_UPSTREAM, 100, 5, 12),
    "the last has no upstream": (1000, [999], NO_UPSTREAM, 100, 5, 12),
    "a twentieth have no upstream": (1000, range(25, 1000, 50), NO_UPSTREAM, 100, 5, 20),
    "some ask to wait, which holds no other": (
        *(1000, range(100, 1000, 200), ASKS_TO_WAIT, 100, 5, 30),
    ),
    "the last fifth has no upstream": (100, range(80, 100), NO_UPSTREAM, 100, 12, 12),
    "the first three have no upstream": (100, range(3), NO_UPSTREAM, 1, 36, 36),
    # Fault: they passed for a limit, and each dead target after them slowed the others: 20 s.
    "a cluster has no upstream": (
        *(500, [*range(100, 110), *range(115, 500, 10)], NO_UPSTREAM, 100, 8, 60),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_dead_spend_their_attempts_and_all_others_are_stopped_although(case: str) -> None:
    """Fault: a dead upstream was taken for throttling, and cost 300 seconds of patience."""
    count, dead, fault, concurrency, seconds, longest = CASES[case]
    run = stop_poisoned(count, dead, fault, concurrency=concurrency)

    poisoned = {f"r{number}" for number in dead}
    assert run.report.counts == {STOPPED: count - len(poisoned), UNKNOWN: len(poisoned)}
    assert {alias for alias, each in run.outcomes.items() if not each.ok} == poisoned
    received = max(run.emulator.received["ws-1", alias] for alias in poisoned)
    # Whether a first 503 is throttling is not known.
    assert received <= ATTEMPTS + 2 * isinstance(fault, Reply)
    assert run.report.ended_early is None
    assert run.seconds <= longest
    assert max(ended for alias, ended in run.ended.items() if alias not in poisoned) <= seconds


def test_what_is_read_to_find_out_has_been_stopped_before() -> None:
    run = stop_poisoned(100, range(80, 100), Fault.DROP_BEFORE)

    stopped: set[str | None] = set()
    for request in run.emulator.requests:
        if request.method == "GET":
            assert request.alias in stopped
        elif request.status == 200:
            stopped.add(request.alias)
    assert len(stopped) == 80


def test_what_the_api_itself_answers_costs_patience() -> None:
    run = stop_poisoned(100, [50], Reply(503))

    assert run.report.counts == {STOPPED: 99, StopResult.REJECTED: 1}
    assert run.seconds >= 300


@pytest.mark.parametrize("fault", [Fault.BAD_GATEWAY, Fault.HANG])
def test_a_good_target_that_fails_once_is_retried_while_a_dead_one_is(fault: Fault) -> None:
    run = stop_poisoned(30, [20], fault, fails_once="r29")

    assert run.outcomes["r29"].attempts == 2
    assert run.report.counts == {STOPPED: 29, UNKNOWN: 1}
    assert run.ended["r29"] < run.ended["r20"]
