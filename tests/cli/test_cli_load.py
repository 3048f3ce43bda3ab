"""The line below the summary of a run that mostly waited for slow answers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
from support.commands import Command
from support.helpers import add_runtimes

from bctrl_async import SessionStats, StopReport
from bctrl_async.cli._load import Load, propose_connections
from bctrl_async.emulator import Emulator


@dataclass(frozen=True)
class Facts:
    """The facts of a run of 50 s: 500 answers of 10 s over 100 connections."""

    connections: int = 100
    full: int = 190
    elapsed: float = 50.0
    attempts: int = 500
    failed: dict[str, int] = field(default_factory=dict)
    retries: int = 0
    cancelled: int = 0
    total: int = 500
    resumed: int = 0
    rate: float | None = None

    @property
    def proposal(self) -> str:
        """The line of this run, with 200 samples."""
        in_flight = 200 * self.connections
        load = Load(self.connections, 200, self.full, in_flight)
        stats = SessionStats(
            attempts=self.attempts,
            failed=self.failed,
            retries=self.retries,
            cancelled=self.cancelled,
        )
        report = StopReport(
            total=self.total,
            counts=Counter(),
            running=0,
            not_running=self.total,
            failures=(),
            elapsed=self.elapsed,
            resumed=self.resumed,
        )
        return propose_connections(load, stats, report, self.rate)


SLOW = Facts()


@pytest.mark.parametrize(
    ("facts", "proposal"),
    [
        (SLOW, "--concurrency 500 may be up to 5 times as fast"),
        (replace(SLOW, total=9999), "--concurrency 500 may be up to 5 times as fast"),
        (replace(SLOW, total=390), "--concurrency 300 may be up to 3 times as fast"),
        (replace(SLOW, resumed=110), "--concurrency 300 may be up to 3 times as fast"),
        (replace(SLOW, rate=25.0), "--concurrency 200 may be up to 2 times as fast"),
        (
            replace(SLOW, connections=400, attempts=2000, total=9999),
            "--concurrency 800 may be up to 2 times as fast",
        ),
        # A broken connection in a hundred attempts is no overload.
        (replace(SLOW, retries=5), "--concurrency 500 may be up to 5 times as fast"),
    ],
)
def test_a_slow_run_is_told_which_concurrency_would_help(
    facts: Facts, proposal: str
) -> None:
    waited = f"{facts.connections} connections waited for answers of 10.0 s"
    assert facts.proposal == f"{waited} most of the time: {proposal}"


@pytest.mark.parametrize(
    "facts",
    [
        pytest.param(replace(SLOW, elapsed=9.9, attempts=99), id="a short run"),
        pytest.param(replace(SLOW, full=100), id="idle connections"),
        pytest.param(replace(SLOW, attempts=5051, total=5051), id="quick answers"),
        pytest.param(replace(SLOW, failed={"429": 1}), id="throttled"),
        pytest.param(replace(SLOW, retries=6), id="many retries"),
        pytest.param(replace(SLOW, cancelled=100), id="aborted"),
        pytest.param(replace(SLOW, total=199), id="few targets"),
        pytest.param(replace(SLOW, rate=19.9), id="a rate that is reached"),
        pytest.param(replace(SLOW, connections=501, total=9999), id="many connections"),
        pytest.param(
            replace(SLOW, full=0, attempts=0, total=0), id="a run without targets"
        ),
    ],
)
def test_a_run_that_more_connections_would_not_speed_up_is_told_nothing(
    facts: Facts,
) -> None:
    assert facts.proposal == ""


async def test_the_line_follows_the_summary_but_for_quiet_people_and_programs(
    command: Command,
) -> None:
    for name, seconds in (("SAMPLE_EVERY", 0.01), ("SHORT_RUN", 0), ("SLOW_ANSWER", 0)):
        command.patch.setattr(f"bctrl_async.cli._load._{name}", seconds)
    args = ("stop", "--concurrency", "2", "ws-1")
    lines = []
    async with Emulator(port=0, latency=0.1) as api:
        command.setenv(BCTRL_BASE_URL=api.url)
        aliases = [alias for _, alias in add_runtimes(api, 12)]
        for n, options in enumerate(((), ("-q",), ("-o", "json"))):
            code, _, err = await command(*args, *aliases[4 * n : 4 * n + 4], *options)
            assert code == 0
            lines.append(err)

    proposal, quiet, summary = lines
    assert proposal.startswith("2 connections waited for answers of ")
    assert proposal.endswith(": --concurrency 4 may be up to 2 times as fast\n")
    assert (quiet, summary.count("\n")) == ("", 1)
