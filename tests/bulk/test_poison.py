"""Bulk stops of which a few runtimes are behind a dead node: real sockets, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import NamedTuple

import pytest
import virtual_time
from helpers import add_runtimes

from bctrl_async import BctrlSession, RetryPolicy, StopOutcome, StopReport, StopResult
from bctrl_async.emulator import Emulator, Fault, Reply

STOPPED, UNKNOWN = StopResult.STOPPED, StopResult.UNKNOWN
ATTEMPTS = RetryPolicy().attempts
POISON = [Fault.BAD_GATEWAY, Fault.DROP_BEFORE, Fault.HANG]
NO_UPSTREAM = Reply(503, body="no healthy upstream")
ASKS_TO_WAIT = Reply(503, body="Backend fetch failed", headers={"Retry-After": "5"})

every_poison = pytest.mark.parametrize("fault", POISON)


class Run(NamedTuple):
    """A bulk stop that has ended, its emulator, and virtual seconds: all, and those of each."""

    report: StopReport
    outcomes: dict[str, StopOutcome]
    emulator: Emulator
    seconds: float
    ended: dict[str, float]

    def received(self, alias: str) -> int:
        return self.emulator.received["ws-1", alias]


def aliases(numbers: Iterable[int]) -> set[str]:
    return {f"r{number}" for number in numbers}


def poisoned_emulator(
    count: int, poisoned: set[str], fault: Fault | Reply, port: int = 0
) -> Emulator:
    emulator = Emulator(port=port, latency=0.01)
    add_runtimes(emulator, count)
    for alias in poisoned:
        emulator.poison("ws-1", alias, fault)
    return emulator


async def stop_all(emulator: Emulator, *, concurrency: int = 100) -> Run:
    loop = asyncio.get_running_loop()
    outcomes: dict[str, StopOutcome] = {}
    ended: dict[str, float] = {}

    def keep(outcome: StopOutcome) -> None:
        outcomes[outcome.target.alias] = outcome
        ended[outcome.target.alias] = loop.time() - began

    began = loop.time()
    async with BctrlSession("emulator-key", base_url=emulator.url, timeout=1.0) as session:
        report = await session.stop_runtimes(
            list(emulator.runtimes), concurrency=concurrency, on_outcome=keep, verify=False
        )
    return Run(report, outcomes, emulator, loop.time() - began, ended)


def stop_poisoned(
    count: int, poisoned: set[str], fault: Fault | Reply, *, concurrency: int = 100
) -> Run:
    async def main() -> Run:
        async with poisoned_emulator(count, poisoned, fault) as emulator:
            return await stop_all(emulator, concurrency=concurrency)

    return virtual_time.run(main())


class TestOneOfAThousand:
    @pytest.mark.parametrize(
        ("fault", "seconds"),
        [(Fault.BAD_GATEWAY, 8), (Fault.DROP_BEFORE, 8), (Fault.HANG, 14)],
    )
    def test_it_spends_its_own_attempts_and_the_others_are_stopped_at_once(
        self, fault: Fault, seconds: float
    ) -> None:
        run = stop_poisoned(1000, {"r500"}, fault)

        assert run.report.counts == {STOPPED: 999, UNKNOWN: 1}
        assert run.outcomes["r500"].result is UNKNOWN
        assert run.received("r500") == ATTEMPTS
        assert sum(outcome.attempts for outcome in run.outcomes.values()) == 999 + ATTEMPTS
        assert run.report.ended_early is None
        assert run.seconds <= seconds
        assert max(ended for alias, ended in run.ended.items() if alias != "r500") <= 1.5

    @every_poison
    @pytest.mark.parametrize("dead", ["r0", "r29"])
    @pytest.mark.parametrize("concurrency", [1, 2])
    def test_it_is_the_only_one_unknown_wherever_it_stands(
        self, fault: Fault, dead: str, concurrency: int
    ) -> None:
        run = stop_poisoned(30, {dead}, fault, concurrency=concurrency)

        assert run.report.counts == {STOPPED: 29, UNKNOWN: 1}
        assert run.received(dead) == ATTEMPTS
        assert run.report.ended_early is None
        assert run.seconds <= 20


class TestAFifth:
    @every_poison
    def test_the_others_are_stopped(self, fault: Fault) -> None:
        poisoned = aliases(range(2, 500, 5))
        run = stop_poisoned(500, poisoned, fault)

        assert {alias for alias, outcome in run.outcomes.items() if outcome.result is UNKNOWN} == (
            poisoned
        )
        assert run.report.counts == {STOPPED: 400, UNKNOWN: 100}
        assert max(run.received(alias) for alias in poisoned) <= ATTEMPTS
        assert run.report.ended_early is None
        assert run.seconds <= 20

    @every_poison
    def test_what_is_read_to_find_out_has_been_stopped_before(self, fault: Fault) -> None:
        run = stop_poisoned(100, aliases(range(80, 100)), fault)

        assert run.report.counts == {STOPPED: 80, UNKNOWN: 20}
        assert run.report.ended_early is None
        assert run.seconds <= 20
        stopped: set[str | None] = set()
        for request in run.emulator.requests:
            if request.method == "GET":
                assert request.alias in stopped
            elif request.status == 200:
                stopped.add(request.alias)


class TestAGatewayThatAnswers503:
    """Fault: a dead upstream was taken for throttling, and cost 300 seconds of patience."""

    @pytest.mark.parametrize(
        ("poisoned", "reply", "seconds"),
        [
            ({"r500"}, NO_UPSTREAM, 12),
            ({"r0"}, NO_UPSTREAM, 12),
            ({"r999"}, NO_UPSTREAM, 12),
            (aliases(range(25, 1000, 50)), NO_UPSTREAM, 20),
            (aliases(range(100, 1000, 200)), ASKS_TO_WAIT, 30),
        ],
    )
    def test_the_dead_spend_their_attempts_and_the_others_are_stopped(
        self, poisoned: set[str], reply: Reply, seconds: float
    ) -> None:
        run = stop_poisoned(1000, poisoned, reply)

        assert {alias for alias, outcome in run.outcomes.items() if not outcome.ok} == poisoned
        assert run.report.counts == {STOPPED: 1000 - len(poisoned), UNKNOWN: len(poisoned)}
        # Nothing is known of the others at the first.
        assert {run.received(alias) for alias in poisoned} == {1 + ATTEMPTS}
        assert run.report.throttled == (1 + ATTEMPTS) * len(poisoned)
        assert run.seconds <= seconds
        # Their Retry-After holds no other.
        assert max(ended for alias, ended in run.ended.items() if alias not in poisoned) < 5

    @pytest.mark.parametrize("concurrency", [1, 100])
    @pytest.mark.parametrize("dead", [range(80, 100), range(97, 100), range(3)])
    def test_wherever_they_stand_they_cost_seconds(self, dead: range, concurrency: int) -> None:
        run = stop_poisoned(100, aliases(dead), NO_UPSTREAM, concurrency=concurrency)

        assert run.report.counts == {STOPPED: 100 - len(dead), UNKNOWN: len(dead)}
        assert run.seconds <= 12 * (len(dead) if concurrency == 1 else 1)

    def test_a_cluster_of_the_dead_holds_up_the_others_for_seconds(self) -> None:
        """Fault: it passed for a limit, and each dead target after it slowed the others: 20 s."""
        poisoned = aliases([*range(100, 110), *range(115, 500, 10)])
        run = stop_poisoned(500, poisoned, NO_UPSTREAM)

        assert {alias for alias, outcome in run.outcomes.items() if not outcome.ok} == poisoned
        assert max(ended for alias, ended in run.ended.items() if alias not in poisoned) < 8

    def test_what_the_api_itself_answers_costs_patience(self) -> None:
        run = stop_poisoned(100, {"r50"}, Reply(503))

        assert run.report.counts == {STOPPED: 99, StopResult.REJECTED: 1}
        assert run.seconds >= 300


@every_poison
def test_a_good_target_that_fails_once_is_retried_while_a_dead_one_is(fault: Fault) -> None:
    async def main() -> Run:
        async with poisoned_emulator(30, {"r20"}, fault) as emulator:
            emulator.inject(Fault.DROP_BEFORE, alias="r29")
            return await stop_all(emulator)

    run = virtual_time.run(main())

    assert run.outcomes["r29"].result is STOPPED
    assert run.outcomes["r29"].attempts == 2
    assert run.report.counts == {STOPPED: 29, UNKNOWN: 1}
    order = [request.alias for request in run.emulator.requests if request.method == "POST"]
    assert order[-1] == "r20"
