"""The account of a bulk stop: its completeness, and what an earlier run adds."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from support.helpers import Bulk, add_runtimes, until
from support.journal_lines import entry_line, header_line

from bctrl_async import RuntimeRef, StopOutcome, StopResult
from bctrl_async._calls.retry import RetryPolicy
from bctrl_async.bulk._input import Input
from bctrl_async.bulk._ledger import Ledger
from bctrl_async.bulk._parked import Parked
from bctrl_async.bulk._polls import Polls
from bctrl_async.bulk._state import RunState
from bctrl_async.journal import Journal, JournalInUseError, open_journal

OK = StopOutcome(
    index=0,
    target=RuntimeRef("ws-1", "crm"),
    result=StopResult.STOPPED,
    running=False,
)


@pytest.fixture
def ledger() -> Ledger:
    """The ledger of a run that took a second."""
    ledger = Ledger(
        RunState(Input([]), Parked(), Polls(RetryPolicy(), 0.0)), missing_ok=False
    )
    ledger.started_at, ledger.ended_at = 1.0, 2.0
    return ledger


def can_open(path: Path) -> bool:
    """Return True if no other run has a journal."""
    try:
        Journal(path, base_url="http://127.0.0.1").close()
    except JournalInUseError:
        return False
    return True


class TestReport:
    def test_it_is_ok_once_each_target_that_was_read_has_an_outcome(
        self, ledger: Ledger
    ) -> None:
        ledger.record(OK)

        assert ledger.report(1).ok
        missing = ledger.report(2)
        assert not missing.ok
        assert "the bulk stop has not ended" in str(missing.ended_early)


class TestClose:
    async def test_a_journal_is_closed_even_if_nobody_waits_for_it(
        self, ledger: Ledger, tmp_path: Path
    ) -> None:
        ledger.journal = open_journal(tmp_path / "journal", "http://127.0.0.1/v1")

        closing = ledger.close()
        closing.send(None)
        closing.close()

        await until(lambda: can_open(tmp_path / "journal"))
        assert ledger.state.ended_early is None

    async def test_a_loop_that_ends_meanwhile_leaves_it_closed(
        self, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fault: if all threads were busy, it was not flushed, and stayed locked."""
        ledger.journal = open_journal(tmp_path / "journal", "http://127.0.0.1/v1")

        async def wait_for_a_thread(*_: object) -> None:
            await asyncio.get_running_loop().create_future()

        monkeypatch.setattr(asyncio, "to_thread", wait_for_a_thread)
        closing = asyncio.create_task(ledger.close())
        await asyncio.sleep(0)
        # As at the end of `asyncio.run`.
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.wait([closing])

        assert can_open(tmp_path / "journal")


class TestEarlierRun:
    async def test_an_old_journal_is_warned_of_once_and_only_if_it_counts(
        self, bulk: Bulk, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path, yesterday = tmp_path / "old", datetime.now(UTC) - timedelta(hours=25)
        done, other = add_runtimes(bulk.emulator, 3)[:2], ("ws-1", "r2")
        header = header_line(f"{bulk.emulator.url}/v1", yesterday)
        path.write_bytes(
            header + b"".join(entry_line(target, yesterday) for target in done)
        )

        with caplog.at_level(logging.WARNING, "bctrl_async.journal"):
            assert (
                await bulk.session.stop_runtimes([other], journal=path)
            ).resumed == 0
            assert caplog.records == []
            assert (
                await bulk.session.stop_runtimes([*done, other], journal=path)
            ).resumed == 3

        assert len(caplog.records) == 1
