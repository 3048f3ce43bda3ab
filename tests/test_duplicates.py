"""Targets that are in the input of a bulk stop twice."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID

import pytest
from helpers import BOUND, Connect, HoldingEmulator

from bctrl_async import (
    BctrlConfigError,
    BctrlSession,
    RuntimeRef,
    StopBatch,
    StopOutcome,
    StopResult,
)
from bctrl_async.bulk import _duplicates
from bctrl_async.emulator import Emulator, Fault

A, B, C = ("ws-1", "a"), ("ws-1", "b"), ("ws-1", "c")
WORKSPACE = UUID("0190b5f0-0000-7000-8000-000000000001")


@pytest.fixture
async def emulator() -> AsyncIterator[HoldingEmulator]:
    async with HoldingEmulator() as running:
        yield running


@pytest.fixture
def runtimes(emulator: HoldingEmulator) -> HoldingEmulator:
    for name in ("a", "b", "c"):
        emulator.add_runtime("ws-1", name)
    emulator.add_runtime(str(WORKSPACE), "a")
    return emulator


def in_order(outcomes: list[StopOutcome]) -> list[tuple[str, bool]]:
    """Return result and duplicate of each outcome, after checking that each index has one."""
    outcomes.sort(key=lambda outcome: outcome.index)
    assert [outcome.index for outcome in outcomes] == list(range(len(outcomes)))
    return [(str(outcome.result), outcome.duplicate) for outcome in outcomes]


async def until_requested(emulator: Emulator, count: int) -> None:
    async with asyncio.timeout(BOUND):
        while len(emulator.requests) < count:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("concurrency", [1, 10])
async def test_a_target_that_is_in_a_list_twice_is_sent_once(
    runtimes: Emulator, session: BctrlSession, concurrency: int
) -> None:
    """Fault: of a target that was in the list twice, one outcome was a conflict with the other."""
    outcomes: list[StopOutcome] = []
    report = await session.stop_runtimes(
        [A, B, A, RuntimeRef(*A), A], concurrency=concurrency, on_outcome=outcomes.append
    )

    assert runtimes.received == {A: 1, B: 1}
    assert in_order(outcomes) == [
        ("stopped", False),
        ("stopped", False),
        ("stopped", True),
        ("stopped", True),
        ("stopped", True),
    ]
    assert [outcome.attempts for outcome in outcomes] == [1, 1, 0, 0, 0]
    assert {outcome.target for outcome in outcomes[2:]} == {RuntimeRef(*A)}
    assert (report.ok, report.total, report.duplicates) == (True, 5, 3)
    assert report.counts == {StopResult.STOPPED: 5}


async def test_a_uuid_and_its_text_are_one_target(
    runtimes: Emulator, session: BctrlSession
) -> None:
    report = await session.stop_runtimes([(WORKSPACE, "a"), (str(WORKSPACE), "a")])

    assert runtimes.received.total() == report.duplicates == 1


async def test_names_that_differ_in_case_are_two_targets(
    runtimes: Emulator, session: BctrlSession
) -> None:
    report = await session.stop_runtimes([A, ("ws-1", "A")])

    assert (runtimes.received.total(), report.duplicates) == (2, 0)


async def test_a_duplicate_repeats_the_error_and_is_a_failure_too(
    runtimes: Emulator, session: BctrlSession
) -> None:
    runtimes.inject(*[Fault.SERVER_ERROR] * 4, alias="a")
    report = await session.stop_runtimes([A, A, A])

    assert report.counts == {StopResult.UNKNOWN: 3}
    assert [outcome.duplicate for outcome in report.failures] == [False, True, True]
    assert len({outcome.error for outcome in report.failures}) == 1
    assert [outcome.attempts for outcome in report.failures] == [4, 0, 0]
    assert runtimes.received == {A: 4}


async def test_invalid_targets_are_rejected_one_by_one(session: BctrlSession) -> None:
    report = await session.stop_runtimes([("ws-1", ".."), ("ws-1", "..")])

    assert report.counts == {StopResult.REJECTED: 2}
    assert report.duplicates == 0


@pytest.mark.parametrize("concurrency", [1, 10])
async def test_an_invalid_item_has_no_part_in_the_outcome_of_a_target_of_the_same_name(
    runtimes: Emulator, session: BctrlSession, concurrency: int
) -> None:
    """Fault: a duplicate of a stop in flight had the error of an invalid item between the two."""
    runtimes.add_runtime("ws-1", "5")
    outcomes: list[StopOutcome] = []
    targets: list[object] = [("ws-1", "5"), ("ws-1", "5"), ("ws-1", 5), ("ws-1", "5")]
    await session.stop_runtimes(
        targets,  # type: ignore[arg-type]
        concurrency=concurrency,
        on_outcome=outcomes.append,
    )

    assert in_order(outcomes) == [
        ("stopped", False),
        ("stopped", True),
        ("rejected", False),
        ("stopped", True),
    ]


async def test_in_a_stream_every_target_is_sent(runtimes: Emulator, session: BctrlSession) -> None:
    report = await session.stop_runtimes(iter([A, A]))

    assert runtimes.received == {A: 2}
    assert (report.total, report.duplicates) == (2, 0)


async def test_duplicates_are_found_in_a_stream_and_not_in_a_list_if_the_caller_says_so(
    runtimes: Emulator, session: BctrlSession
) -> None:
    stream = await session.stop_runtimes(iter([A, A]), deduplicate=True)
    whole = await session.stop_runtimes([B, B], deduplicate=False)

    assert runtimes.received == {A: 1, B: 2}
    assert (stream.duplicates, whole.duplicates) == (1, 0)


async def test_deduplicate_must_be_a_bool(session: BctrlSession) -> None:
    with pytest.raises(BctrlConfigError, match="deduplicate"):
        session.stop_runtimes([A], deduplicate="no")  # type: ignore[arg-type]


async def test_duplicates_of_targets_beyond_the_limit_are_sent(
    runtimes: Emulator, session: BctrlSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: every target of a list or a file was remembered, however many there were."""
    monkeypatch.setattr(_duplicates, "_MAX_TARGETS", 2)
    report = await session.stop_runtimes([A, A, B, C, A, C, B])

    assert runtimes.received == {A: 1, B: 1, C: 2}
    assert (report.total, report.duplicates) == (7, 3)


async def test_duplicates_of_targets_whose_outcome_is_not_kept_are_sent(
    runtimes: Emulator, session: BctrlSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: the outcome of each target that did not stop was kept, with its runtime."""
    monkeypatch.setattr(_duplicates, "_MAX_OUTCOMES", 1)
    report = await session.stop_runtimes(
        [("ws-1", "x"), ("ws-1", "y"), A, ("ws-1", "x"), ("ws-1", "y"), A], concurrency=1
    )

    assert runtimes.received == {("ws-1", "x"): 1, ("ws-1", "y"): 2, A: 1}
    assert (report.total, report.duplicates) == (6, 2)


async def test_targets_whose_names_join_to_the_same_text_are_different(
    runtimes: Emulator, session: BctrlSession
) -> None:
    report = await session.stop_runtimes([("ws-1", "1a"), ("ws-11", "a"), ("1a", "ws-1")])

    assert (runtimes.received.total(), report.duplicates) == (3, 0)


async def test_duplicates_do_not_hold_up_the_workers(runtimes: Emulator, connect: Connect) -> None:
    runtimes.inject(Fault.HANG, alias="a")
    async with connect() as session:
        running = asyncio.ensure_future(session.stop_runtimes([*[A] * 20, B], concurrency=2))
        await until_requested(runtimes, 2)
        assert runtimes.received == {A: 1, B: 1}
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running


@pytest.mark.parametrize("end", [None, "stop_reading", "abort"])
async def test_no_more_is_read_while_many_duplicates_of_one_target_wait(
    runtimes: HoldingEmulator, connect: Connect, monkeypatch: pytest.MonkeyPatch, end: str | None
) -> None:
    """Fault: a million duplicates of a stop in flight were held, and recorded in one go."""
    monkeypatch.setattr(_duplicates, "_MAX_WAITING", 2)
    runtimes.held.add("a")
    async with connect() as session:
        batch = session.stop_runtimes([*[A] * 10, B], concurrency=2)
        running = asyncio.ensure_future(batch)
        await until_requested(runtimes, 1)
        for _ in range(20):
            await asyncio.sleep(0)
        read = batch.read
        if end is not None:
            getattr(batch, end)()
        runtimes.held.clear()
        report = await running

    assert read == 3
    assert (
        report.counts
        == {
            None: {StopResult.STOPPED: 11},
            "stop_reading": {StopResult.STOPPED: 10, StopResult.NOT_SENT: 1},
            "abort": {StopResult.UNKNOWN: 10, StopResult.NOT_SENT: 1},
        }[end]
    )
    assert report.duplicates == 9


@pytest.mark.parametrize(
    ("end", "result"), [("abort", "unknown"), ("stop_reading", "stopped"), ("cancel", "unknown")]
)
async def test_a_duplicate_of_a_stop_in_flight_ends_as_the_stop_does(
    runtimes: HoldingEmulator, connect: Connect, end: str, result: str
) -> None:
    runtimes.held.add("a")
    outcomes: list[StopOutcome] = []
    async with connect() as session:
        batch: StopBatch = session.stop_runtimes(
            [A, A, A, B, B], concurrency=1, on_outcome=outcomes.append
        )
        running = asyncio.create_task(batch)
        await until_requested(runtimes, 1)
        if end == "cancel":
            running.cancel()
        else:
            getattr(batch, end)()
        runtimes.held.clear()
        await asyncio.wait([running])

    report = batch.report
    assert report.counts == {StopResult(result): 3, StopResult.NOT_SENT: 2}
    assert (report.total, report.duplicates) == (5, 3)
    if end != "cancel":
        assert in_order(outcomes) == [
            (result, False),
            (result, True),
            (result, True),
            ("not_sent", False),
            ("not_sent", True),
        ]


async def test_a_failing_callback_leaves_each_duplicate_with_one_outcome(
    runtimes: Emulator, session: BctrlSession
) -> None:
    def fail(_: StopOutcome) -> None:
        raise RuntimeError

    batch = session.stop_runtimes([A, A, B, A, B], concurrency=2, on_outcome=fail)
    with pytest.raises(RuntimeError):
        await batch

    assert batch.report.counts.total() == batch.report.total == 5
    assert batch.report.duplicates == 3
    assert max(runtimes.received.values()) == 1


async def test_a_duplicate_waits_for_the_verification_of_the_first(
    runtimes: Emulator, session: BctrlSession
) -> None:
    runtimes.inject(Fault.UNKNOWN_VALUES, alias="a")
    outcomes: list[StopOutcome] = []
    async with session.stop_runtimes([A, A, B, A], verify=True, concurrency=1) as batch:
        outcomes.extend([outcome async for outcome in batch])

    assert {outcome.result for outcome in outcomes} == {StopResult.STOPPED}
    assert [duplicate for _, duplicate in in_order(outcomes)] == [False, True, False, True]
    assert runtimes.received == {A: 1, B: 1}


async def test_a_journal_has_an_entry_for_each_duplicate_and_resumes_all(
    runtimes: Emulator, session: BctrlSession, tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    runtimes.inject(*[Fault.SERVER_ERROR] * 4, alias="b")
    first = await session.stop_runtimes([A, A, B, B], journal=journal)
    entries = [line for line in journal.read_text().splitlines() if '"index"' in line]
    outcomes: list[StopOutcome] = []
    again = await session.stop_runtimes([A, A, B, B], journal=journal, on_outcome=outcomes.append)

    assert first.counts == {StopResult.STOPPED: 2, StopResult.UNKNOWN: 2}
    assert Counter('"duplicate":true' in entry for entry in entries) == {True: 2, False: 2}
    assert (again.ok, again.resumed, again.duplicates) == (True, 2, 2)
    assert {outcome.index: outcome.attempts for outcome in outcomes} == {0: 1, 1: 0, 2: 1, 3: 0}
    assert journal.read_text().count('"index"') == 4 + 2
    assert runtimes.received == {A: 1, B: 5}
