"""`verify=True` against the emulator, over real sockets."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from helpers import Connect, wait_for_requests
from journal_lines import read_lines

from bctrl_async import (
    BctrlError,
    BctrlSession,
    RetryPolicy,
    StopOutcome,
    StopResult,
)
from bctrl_async.emulator import Emulator, Fault, Reply
from bctrl_async.journal import Journal

STOPPED, ACCEPTED, UNKNOWN = StopResult.STOPPED, StopResult.ACCEPTED, StopResult.UNKNOWN


async def test_each_unverified_outcome_is_settled_by_the_polled_status(
    emulator: Emulator, connect: Connect, tmp_path: Path
) -> None:
    emulator.inject(Fault.OVERSIZED, alias="crm")
    for alias, fault in (
        ("accepted", Fault.ACCEPTED),
        ("broken", Fault.MALFORMED_JSON),
        ("failed", Fault.FAILED),
        ("lost", Fault.SERVER_ERROR),
    ):
        emulator.add_runtime("ws-1", alias)
        emulator.inject(fault, alias=alias)
    once = RetryPolicy(attempts=1, base=0.001, cap=0.001, patience=0.2)
    async with connect(retry=once) as session:
        outcomes: dict[str, StopOutcome] = {}
        report = await session.stop_workspace(
            "ws-1",
            on_outcome=lambda outcome: outcomes.update({outcome.target.alias: outcome}),
            journal=tmp_path / "journal.jsonl",
            verify=0.2,
        )

    assert {alias: outcome.result for alias, outcome in outcomes.items()} == {
        "crm": STOPPED,
        "accepted": STOPPED,
        "broken": STOPPED,
        "failed": ACCEPTED,
        "lost": UNKNOWN,
    }
    assert [outcome.target.alias for outcome in report.failures] == ["lost"]
    assert all(outcome.attempts == 1 for outcome in outcomes.values())
    assert emulator.received.total() == 5
    entries = read_lines((tmp_path / "journal.jsonl").read_bytes()).entries
    assert sorted(each["result"] == "stopped" for each in entries) == [False] * 2 + [True] * 3


async def test_the_batch_counts_the_runtimes_that_are_polled(
    emulator: Emulator, session: BctrlSession
) -> None:
    emulator.add_runtime("ws-1", "mail")
    emulator.inject(Fault.ACCEPTED, alias="crm")
    emulator.inject(Fault.HANG, alias="crm", method="GET")
    async with session.stop_runtimes([("ws-1", "crm"), ("ws-1", "mail")], verify=True) as batch:
        assert batch.polling == 0
        await wait_for_requests(emulator, 3)
        polling = batch.polling
        batch.abort()
        async for _ in batch:
            pass
    assert (polling, batch.polling) == (1, 0)


async def test_elapsed_includes_the_polls(emulator: Emulator, connect: Connect) -> None:
    emulator.inject(Fault.ACCEPTED)
    outcomes: list[StopOutcome] = []
    async with connect(retry=RetryPolicy(base=0.1, cap=0.1)) as session:
        await session.stop_runtimes([("ws-1", "crm")], on_outcome=outcomes.append, verify=True)
    assert [outcome.elapsed >= 0.05 for outcome in outcomes] == [True]


async def test_the_time_of_an_outcome_is_that_of_the_last_poll(
    emulator: Emulator, connect: Connect
) -> None:
    emulator.inject(Fault.ACCEPTED)
    active = {**emulator.runtimes["ws-1", "crm"], "status": "active"}
    emulator.inject(Reply(200, body=active), Fault.HANG, method="GET")
    async with (
        connect(retry=RetryPolicy(base=0.001)) as session,
        session.stop_runtimes([("ws-1", "crm")], verify=True) as batch,
    ):
        await wait_for_requests(emulator, 2)
        stopped_at = datetime.now(UTC)
        await wait_for_requests(emulator, 3)
        polled_at = datetime.now(UTC)
        batch.abort()
        outcomes = [outcome async for outcome in batch]
    assert [outcome.result for outcome in outcomes] == [ACCEPTED]
    assert stopped_at <= outcomes[0].at <= polled_at


async def test_a_journal_error_during_the_last_polls_is_reported(
    emulator: Emulator, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise BctrlError("the journal cannot be written")

    emulator.inject(Fault.ACCEPTED)
    monkeypatch.setattr(Journal, "write", fail)
    async with connect() as session:
        report = await session.stop_runtimes(
            [("ws-1", "crm")], journal=tmp_path / "journal.jsonl", verify=True
        )
    assert report.counts == {STOPPED: 1}
    assert str(report.ended_early) == "the journal cannot be written"
    assert not report.ok
