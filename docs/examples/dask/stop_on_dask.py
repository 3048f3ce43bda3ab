"""Stop a list of runtimes on a cluster of dask.distributed.

    python stop_on_dask.py tcp://127.0.0.1:8786 runtimes.csv tonight.jsonl

Each chunk of the list is a task of the cluster, which stops it and returns its
outcomes. They are written to the journal here. A chunk that does not come back is
pending: the same command stops it again, and nothing else.
"""

import asyncio
import csv
import logging
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import distributed

from bctrl_async import (
    BctrlAuthenticationError,
    BctrlError,
    BctrlSession,
    RuntimeRef,
    StopOutcome,
)
from bctrl_async.journal import Journal, read_journals

CHUNK = 1_000
"""The targets of a task; if its worker dies, all of them are sent again."""

# Few functions of dask have types.
dask: Any = distributed
log = logging.getLogger(__name__)


class Session(distributed.WorkerPlugin):
    """The session of a worker, which its chunks share; the worker has the key."""

    # A run finds the session of an earlier one.
    idempotent = True

    def __init__(self, base_url: str) -> None:
        self.name = f"bctrl-async {base_url}"
        self.base_url = base_url
        self.session: BctrlSession | None = None

    def open(self) -> BctrlSession:
        if self.session is None:
            self.session = BctrlSession(base_url=self.base_url)
        return self.session

    async def teardown(
        self,
        worker: distributed.Worker,  # noqa: ARG002 - dask passes it.
    ) -> None:
        if self.session is not None:
            await self.session.close()


async def stop_chunk(plugin: str, chunk: list[RuntimeRef]) -> list[StopOutcome]:
    """Stop a chunk, on a worker; if it dies, dask calls this again on another."""
    session: BctrlSession = dask.get_worker().plugins[plugin].open()
    outcomes: list[StopOutcome] = []
    await session.stop_runtimes(chunk, on_outcome=outcomes.append)
    return outcomes


async def stop_all(
    client: Any,  # noqa: ANN401 - it has no types.
    targets: list[RuntimeRef],
    journal: Journal,
) -> None:
    """Stop targets on the cluster, and write the outcomes to the journal."""
    plugin = Session(journal.base_url)
    await client.register_plugin(plugin)
    chunks = {}
    for start in range(0, len(targets), CHUNK):
        chunk = targets[start : start + CHUNK]
        chunks[client.submit(stop_chunk, plugin.name, chunk, pure=False)] = chunk
    try:
        async for future in dask.as_completed(list(chunks), loop=client.loop):
            chunk = chunks.pop(future)
            try:
                outcomes: list[StopOutcome] = await future
            except Exception as error:  # noqa: BLE001 - a task may raise anything.
                log.warning("%d targets did not come back: %.200r", len(chunk), error)
                continue
            finally:
                # If its worker died later, dask would repeat a chunk that is held here.
                future.release()
            for outcome in outcomes:
                journal.write(outcome)
            # The server would reject the key for all other chunks as well.
            for outcome in outcomes:
                if isinstance(outcome.error, BctrlAuthenticationError):
                    raise outcome.error
    finally:
        # No worker starts another chunk; those that have started end.
        for future in chunks:
            future.release()


async def run(address: str, targets: list[RuntimeRef], journal: Journal) -> None:
    async with dask.Client(address, asynchronous=True) as client:
        await stop_all(client, targets, journal)


def main(address: str, list_path: str, journal_path: str) -> int:
    with Path(list_path).open(newline="", encoding="utf-8") as lines:
        targets = [RuntimeRef(*row) for row in csv.reader(lines)]
    try:
        with Journal(journal_path) as journal:
            known = read_journals([journal_path], targets)
            pending = [outcome.target for outcome in known if not outcome.ok]
            asyncio.run(run(address, pending, journal))
    except (BctrlError, OSError, KeyboardInterrupt) as error:
        print(f"It ended early: {error!r}")
    outcomes = list(read_journals([journal_path], targets))
    total = len(outcomes)
    done = sum(outcome.ok for outcome in outcomes)
    results = Counter(outcome.result.value for outcome in outcomes)
    print(f"{done:,} of {total:,} done, {total - done:,} pending: {dict(results)}")
    return int(done < total)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
