"""Stops that were accepted and had no effect: a run with the same journal sends them again."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import Command, add_runtimes
from journal_lines import read_lines

from bctrl_async import BctrlSession, RetryPolicy, StopResult
from bctrl_async.emulator import Emulator, Fault, Reply
from bctrl_async.journal import read_journals

CRM = ("ws-1", "crm")
STOPPED, ACCEPTED = StopResult.STOPPED, StopResult.ACCEPTED
ONCE = RetryPolicy(attempts=1, base=0.001, cap=0.001, patience=0.01)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ok.jsonl"


def without_effect(emulator: Emulator, target: tuple[str, str] = CRM) -> Reply:
    """Return the answer of a gateway: it says 200, and stops nothing."""
    return Reply(200, body=dict(emulator.runtimes[target]), takes_effect=False)


def results(path: Path) -> list[str]:
    return [entry["result"] for entry in read_lines(path.read_bytes()).entries]


def is_done(path: Path) -> bool:
    [outcome] = read_journals([path], [CRM])
    return outcome.ok


class TestSentAgain:
    @pytest.mark.parametrize("body", ["status active", "no runtime"])
    async def test_one_that_had_no_effect_is_stopped_by_the_next_run(
        self, emulator: Emulator, session: BctrlSession, path: Path, body: str
    ) -> None:
        """Fault: with a journal it was never sent again, so the runtime ran for ever."""
        is_active = body == "status active"
        unread = Reply(200, body="OK", takes_effect=False)
        emulator.inject(without_effect(emulator) if is_active else unread)
        first = await session.stop_runtimes([CRM], journal=path, verify=False)
        assert (first.ok, first.counts) == (False, {ACCEPTED: 1})
        assert not is_done(path)

        second = await session.stop_runtimes([CRM], journal=path)

        assert emulator.status(*CRM) == "stopped"
        assert (second.counts, second.resumed) == ({STOPPED: 1}, 0)
        assert results(path) == ["accepted", "stopped"]
        assert is_done(path)

    async def test_one_that_stopped_since_is_known_to_be_stopped(
        self, emulator: Emulator, session: BctrlSession, path: Path
    ) -> None:
        emulator.inject(Fault.ACCEPTED)
        for expected in (ACCEPTED, StopResult.ALREADY_STOPPED, StopResult.ALREADY_STOPPED):
            report = await session.stop_runtimes([CRM], journal=path, verify=False)
            assert report.counts == {expected: 1}

        assert report.resumed == 1
        assert emulator.received[CRM] == 2

    async def test_one_that_a_later_run_does_not_find_is_unconfirmed(
        self, emulator: Emulator, session: BctrlSession, path: Path
    ) -> None:
        """Fault: with the key of another account, it was reported as no longer running."""
        emulator.inject(Fault.ACCEPTED)
        await session.stop_runtimes([CRM], journal=path, verify=False)
        for missing_ok in (False, True):
            emulator.inject(Reply(404, code="runtime.not_found"))
            report = await session.stop_runtimes([CRM], journal=path, missing_ok=missing_ok)
            assert report.counts == {StopResult.NOT_FOUND: 1}
            assert (report.ok, report.resumed) == (missing_ok, 0)

    @pytest.mark.parametrize("fault", [Reply(403), Fault.SERVER_ERROR], ids=["403", "500"])
    async def test_one_that_fails_then_is_pending(
        self, emulator: Emulator, session: BctrlSession, path: Path, fault: Fault | Reply
    ) -> None:
        emulator.inject(without_effect(emulator))
        await session.stop_runtimes([CRM], journal=path, verify=False)
        emulator.inject(fault)
        await session.stop_runtimes([CRM], journal=path, retry=ONCE, verify=False)
        assert not is_done(path)

        assert (await session.stop_runtimes([CRM], journal=path)).counts == {STOPPED: 1}
        assert emulator.status(*CRM) == "stopped"


@pytest.mark.usefixtures("emulator_environment")
async def test_the_same_command_stops_what_the_first_one_left(
    emulator: Emulator, command: Command, path: Path, tmp_path: Path
) -> None:
    """Fault: each further run ended with 1, as nothing was sent."""
    targets = add_runtimes(emulator, 5)
    for target in targets:
        emulator.inject(without_effect(emulator, target), alias=target[1])
    file = tmp_path / "ok.csv"
    file.write_text("".join(f"{workspace},{alias}\n" for workspace, alias in targets))
    stop = ("stop", "--from", file, "--journal", path)

    first = await command(*stop, "--no-verify")
    planned = await command(*stop, "--dry-run")
    reported = await command("report", path, "--from", file)
    second = await command(*stop, "--no-verify")
    third = await command("report", path, "--from", file)

    assert first[0] == 1
    assert first[1].splitlines()[-1].startswith("0 of 5 no longer running, 5 still running")
    assert "Dry run: 5 to stop, 0 invalid\n" in planned[2]
    assert reported[0] == 1
    assert reported[1].splitlines()[-1].startswith("0 of 5 done, 5 pending")
    assert second[0] == 0
    assert second[1].splitlines()[-1].startswith("5 of 5 no longer running")
    assert all(emulator.status(*target) == "stopped" for target in targets)
    assert third[0] == 0
    assert third[1].splitlines()[-1].startswith("5 of 5 done, 0 pending")
