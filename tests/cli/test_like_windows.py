"""The command in a process that lacks what Windows lacks.

This is not Windows: its event loop, its files and its console differ as well. It shows that nothing
depends on file locks, poll(), fork, signal handlers or readers of a loop.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections import Counter
from pathlib import Path

from conftest import KEY
from helpers import BOUND, add_runtimes, wait_for_requests

from bctrl_async import StopResult
from bctrl_async.emulator import Emulator
from bctrl_async.journal import read_journals

WITHOUT = """
import asyncio, os, select, signal, sys
from types import SimpleNamespace

def missing(*args):
    raise NotImplementedError

for name in ("add_reader", "remove_reader", "add_signal_handler", "remove_signal_handler"):
    setattr(asyncio.SelectorEventLoop, name, missing)
from fcntl import LOCK_EX, LOCK_NB, flock
sys.modules["msvcrt"] = SimpleNamespace(
    LK_NBLCK=LOCK_EX | LOCK_NB, locking=lambda file, mode, _: flock(file, mode)
)
sys.modules["fcntl"] = None
del select.poll, os.register_at_fork, os.fork, os.O_NONBLOCK, signal.SIGHUP

from bctrl_async.__main__ import main
from bctrl_async.pace import _leases

# A busy disk is no reason for a warning.
_leases._PATIENCE = _leases._INTERVAL = 50.0
sys.exit(main())
"""


async def start(emulator: Emulator, *args: str | Path) -> Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", WITHOUT, *args),
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
        env={"BCTRL_API_KEY": KEY, "BCTRL_BASE_URL": emulator.url},
    )


async def finish(process: Process, text: str = "") -> tuple[int | None, str]:
    async with asyncio.timeout(BOUND):
        out, err = await process.communicate(text.encode())
    return process.returncode, (out + err).decode()


async def test_a_list_is_stopped_and_its_journal_resumed_at_a_shared_rate(
    emulator: Emulator, tmp_path: Path
) -> None:
    text = "".join(f"{workspace},{alias}\n" for workspace, alias in add_runtimes(emulator, 20))
    args = ("stop", "--from", "-", "--journal", tmp_path / "journal.jsonl")
    pace = ("--rate", "1000", "--pace", tmp_path / "pace")

    first = await finish(await start(emulator, *args, *pace), text)
    again = await finish(await start(emulator, *args, *pace), text)

    assert first[0] == again[0] == 0, first[1] + again[1]
    assert "20 of 20 no longer running" in first[1]
    assert "20 from an earlier run, not sent again" in again[1]
    assert "warning" not in first[1]
    assert emulator.received.total() == 20


async def test_the_first_ctrl_c_aborts_and_every_target_has_its_outcome(tmp_path: Path) -> None:
    file, journal = tmp_path / "targets.csv", tmp_path / "journal.jsonl"
    async with Emulator(port=0, api_key=KEY, latency=60.0) as emulator:
        file.write_text("".join(f"{ws},{alias}\n" for ws, alias in add_runtimes(emulator, 150)))
        process = await start(emulator, "stop", "--from", file, "--journal", journal)
        await wait_for_requests(emulator, 100)

        process.send_signal(signal.SIGINT)
        code, output = await finish(process)

    assert code == 130, output
    results = Counter(outcome.result for outcome in read_journals([journal]))
    assert results == {StopResult.UNKNOWN: 100, StopResult.NOT_SENT: 50}
