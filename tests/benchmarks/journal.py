"""A million outcomes in a journal: what writing, opening and reading it back costs.

`python tests/benchmarks/journal.py [--entries 1000000] [--json]`
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import msgspec
from harness import Goal, Report, command, measured

from bctrl_async import Runtime, RuntimeKind, RuntimeRef, RuntimeState, RuntimeStatus
from bctrl_async.journal import Journal, read_journals
from bctrl_async.outcomes import StopOutcome, StopResult

_SERVER = "https://api.test/v1"
_MOST_MEBIBYTES = 127
_WORKSPACES = 100


class _Figures(msgspec.Struct, frozen=True):
    seconds: float
    mebibytes: float


def _targets(entries: int) -> Iterator[RuntimeRef]:
    workspaces = [str(UUID(int=number)) for number in range(_WORKSPACES)]
    for number in range(entries):
        yield RuntimeRef(workspaces[number % _WORKSPACES], f"runtime-{number}")


def _outcomes(entries: int) -> Iterator[StopOutcome]:
    runtime = Runtime(
        id=UUID(int=1),
        alias="crm",
        workspace_id=UUID(int=2),
        kind=RuntimeKind.BROWSER,
        status=RuntimeStatus.STOPPED,
        driver="playwright",
        created_at="2026-11-24T02:30:00Z",
        updated_at="2026-11-24T02:30:00Z",
    )
    at = datetime.now(UTC)
    for index, target in enumerate(_targets(entries)):
        yield StopOutcome(
            index=index,
            target=target,
            result=StopResult.STOPPED,
            state=RuntimeState.NOT_RUNNING,
            runtime=runtime,
            elapsed=0.123456,
            at=at,
            request_id="req_0123456789abcdef",
        )


def _peak_mebibytes() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _child(task: str, path: str, entries: str) -> _Figures:
    count = int(entries)
    made: list[StopOutcome] = []
    if task == "write":
        made = list(_outcomes(count))
    before, start = _peak_mebibytes(), time.process_time()
    match task:
        case "write":
            journal = Journal(path, _SERVER)
            for outcome in made:
                journal.write(outcome)
            journal.close()
        case "open":
            Journal(path, _SERVER).close()
        case "resume":
            journal = Journal(path, _SERVER)
            assert all(journal.done(target) for target in _targets(count))
            journal.close()
        case _:
            assert sum(each.ok for each in read_journals([path], _targets(count))) == count
    return _Figures(time.process_time() - start, _peak_mebibytes() - before)


def _compare(entries: int) -> Report:
    rows: list[list[str | float]] = []
    figures: dict[str, _Figures] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "night.jsonl")
        for task in ("write", "open", "resume", "report"):
            run = measured(__file__, "--measure", task, path, str(entries), kind=_Figures)
            figures[task] = run
            rows.append([task, run.seconds, run.seconds / entries * 1e6, run.mebibytes])
        size = path.stat().st_size / 2**20
    most = _MOST_MEBIBYTES * max(entries, 100_000) / 1_000_000
    goal = Goal("memory to open it, of what it may take", figures["open"].mebibytes / most, 1.0)
    title = f"A journal of {entries:,} entries, {size:,.0f} MiB; CPU time, and growth of the peak"
    return Report(title, ["", "seconds", "µs an entry", "MiB"], rows, [goal], [])


if __name__ == "__main__":
    command(__doc__, _compare, _child, entries=1_000_000)
