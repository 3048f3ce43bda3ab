"""The load of a run on its connections, and the gain of more of them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bctrl_async import StopReport
from bctrl_async.cli._output import pluralize

if TYPE_CHECKING:
    from bctrl_async import BctrlSession, SessionStats

_SAMPLE_EVERY = 0.25
"""Seconds between two looks at the requests in flight."""
_SHORT_RUN = 10.0
"""Seconds of a run that need not be faster."""
_SLOW_ANSWER = 1.0
"""Seconds of an answer from which connections, not the CPU, decide the speed."""
_MAX_DISTURBED = 0.01
"""The highest share of attempts that were retried or cancelled: of more, the server may
be slow because it is overloaded, or may have stopped answering."""
_MIN_FACTOR = 2
_MAX_FACTOR = 5
"""The least and the highest gain that is proposed: a run five times as fast."""
_MAX_CONNECTIONS = 1000
"""The most connections that are proposed: a process may often open 1,024 files."""


@dataclass
class Load:
    """The requests of a session that were in flight at each sample.

    Attributes:
        connections: The most requests in flight.
        samples: The number of samples.
        full: The samples in which all connections were in flight.
        in_flight: The sum of the requests in flight.
    """

    connections: int
    samples: int = 0
    full: int = 0
    in_flight: int = 0

    def add(self, in_flight: int) -> None:
        """Count a sample."""
        self.samples += 1
        self.in_flight += in_flight
        if in_flight >= self.connections:
            self.full += 1

    def seconds_per_answer(self, elapsed: float, answers: int) -> float:
        """Return the mean time of an answer, by Little's law."""
        return self.in_flight / self.samples * elapsed / answers


@asynccontextmanager
async def measured(session: "BctrlSession", connections: int) -> AsyncIterator[Load]:
    """Sample the requests in flight within the block."""
    load = Load(connections)
    sampling = asyncio.create_task(_sample(session, load))
    try:
        yield load
    finally:
        sampling.cancel()
        await asyncio.wait([sampling])


async def _sample(session: "BctrlSession", load: Load) -> None:
    while True:
        await asyncio.sleep(_SAMPLE_EVERY)
        load.add(session.stats.in_flight)


def propose_connections(
    load: Load, stats: "SessionStats", report: StopReport, rate: float | None
) -> str:
    """Return what a higher `--concurrency` would change; empty if it would not help.

    Args:
        load: The samples of the run.
        stats: The counters of its session.
        report: Its report.
        rate: The bound on its requests per second, or None.
    """
    # 1. The run was short, or did not wait for its connections.
    if report.elapsed < _SHORT_RUN or 2 * load.full <= load.samples:
        return ""
    # 2. The server has shown a limit, or trouble.
    disturbed = stats.retries + stats.cancelled
    if stats.throttled or disturbed > _MAX_DISTURBED * stats.attempts:
        return ""
    # 3. The answers were quick: the CPU of either side decides.
    seconds = load.seconds_per_answer(report.elapsed, stats.attempts)
    if seconds < _SLOW_ANSWER:
        return ""
    # 4. More connections would have nothing to do.
    targets = report.total - report.resumed
    most = min(_MAX_FACTOR * load.connections, _MAX_CONNECTIONS, targets)
    if rate is not None:
        most = min(most, int(rate * seconds))
    factor = most // load.connections
    if factor < _MIN_FACTOR:
        return ""
    return (
        f"{pluralize(load.connections, 'connection')} waited for answers of "
        f"{seconds:.1f} s most of the time: --concurrency "
        f"{factor * load.connections} may be up to {factor} times as fast"
    )
