"""Bulk stops in a queue: the queue, the files of a stop, and the task that runs one.

The queue holds ids only. The targets of a stop are in a file with its id, and its
outcomes in a journal beside it. The app and all workers need the same folder, on a disk
with file locks.
"""

import asyncio
import json
import os
from collections import Counter
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from uuid import UUID, uuid4

import msgspec
from docket import Docket, ExponentialRetry, Retry, Shared

from bctrl_async import BctrlSession, RuntimeRef, StopBatch, StopReport, StopResult
from bctrl_async.journal import read_journals

FOLDER = Path(os.environ.get("STOPS_FOLDER", "stops"))
DRAIN = 10.0
"""Seconds to wait for stops in flight when the worker is shut down."""
ATTEMPTS = 20
"""The most runs of a stop: another follows if it was interrupted or left targets."""
MAX_FAILURES = 1000
"""The most failures in a report, which the queue keeps."""
RETRY = ExponentialRetry(
    ATTEMPTS, minimum_delay=timedelta(seconds=5), maximum_delay=timedelta(minutes=10)
)
SESSION = Shared(BctrlSession)
"""One session for each worker process. The app has none, and needs no API key."""

docket = Docket(
    "stops",
    os.environ.get("DOCKET_URL", "redis://127.0.0.1:6379/0"),
    execution_ttl=timedelta(days=1),
)
"""The queue. It keeps the state and the report of a stop for a day after its end."""

batches: set[StopBatch] = set()
shutting_down = asyncio.Event()


def targets_file(stop_id: UUID) -> Path:
    return FOLDER / f"{stop_id}.targets.jsonl"


def journal_file(stop_id: UUID) -> Path:
    return FOLDER / f"{stop_id}.jsonl"


def save_targets(stop_id: UUID, targets: Iterable[RuntimeRef]) -> bool:
    """Save the targets of a stop; return False if it has others already."""
    # ASCII: an alias may have a lone surrogate, which UTF-8 cannot encode.
    lines = "".join(f"{json.dumps(target)}\n" for target in targets).encode()
    FOLDER.mkdir(exist_ok=True)
    draft = FOLDER / f"{uuid4()}.draft"
    draft.write_bytes(lines)
    try:
        # The file is whole from the start, and the first of two requests wins.
        targets_file(stop_id).hardlink_to(draft)
    except FileExistsError:
        return targets_file(stop_id).read_bytes() == lines
    finally:
        draft.unlink()
    return True


def load_targets(stop_id: UUID) -> list[RuntimeRef]:
    with targets_file(stop_id).open(encoding="utf-8") as lines:
        return [RuntimeRef(*json.loads(line)) for line in lines]


def count_outcomes(stop_id: UUID) -> tuple[int, Counter[StopResult]]:
    """Return the number of targets, and of the outcomes so far by result.

    Raises:
        FileNotFoundError: There is no such stop.
    """
    total = targets_file(stop_id).read_bytes().count(b"\n")
    outcomes = (
        read_journals([journal_file(stop_id)]) if journal_file(stop_id).exists() else ()
    )
    return total, Counter(outcome.result for outcome in outcomes)


async def stop_many(
    stop_id: UUID, session: BctrlSession = SESSION, retry: Retry = RETRY
) -> StopReport:
    """Run a bulk stop, or resume it from its journal.

    While another worker runs it, the journal is locked. That is an error here, as any
    other: docket runs the task again later.
    """
    targets = await asyncio.to_thread(load_targets, stop_id)
    batch = session.stop_runtimes(targets, journal=journal_file(stop_id))
    if shutting_down.is_set():
        batch.stop_reading()
    batches.add(batch)
    try:
        report = await batch
    finally:
        batches.discard(batch)
    left_over = report.counts[StopResult.NOT_SENT] + report.counts[StopResult.UNKNOWN]
    if (left_over or report.ended_early is not None) and retry.attempt < ATTEMPTS:
        # At shutdown, another worker goes on at once.
        retry.after(timedelta() if shutting_down.is_set() else retry.delay)
    return msgspec.structs.replace(report, failures=report.failures[:MAX_FAILURES])


def shut_down() -> None:
    """Send nothing new, and abandon requests still in flight after `DRAIN` seconds."""
    shutting_down.set()
    for batch in batches:
        batch.stop_reading()
        asyncio.get_running_loop().call_later(DRAIN, batch.abort)


docket.register(stop_many)
