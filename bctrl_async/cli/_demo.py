"""The demonstration: a bulk stop on a misbehaving server, whose own state is the judge."""

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated

import typer

from bctrl_async import BctrlSession, RetryPolicy, RuntimeRef, StopOutcome, StopResult
from bctrl_async.cli import _output
from bctrl_async.cli._emulator import KEY, WORKSPACE, runtime_aliases
from bctrl_async.cli._exit_codes import FAILED
from bctrl_async.cli._options import MAX_RUNTIMES
from bctrl_async.cli._run import FinishedRun, run_stops
from bctrl_async.emulator import Emulator, Fault

_IN_FLIGHT = 40
_RETRY = RetryPolicy(attempts=4, base=0.05, cap=0.4)
_RATE_LIMIT = 100.0
_FAULTS = {
    Fault.LATENCY: 0.10,
    Fault.SERVER_ERROR: 0.03,
    Fault.BAD_GATEWAY: 0.03,
    Fault.DROP_BEFORE: 0.03,
    Fault.DROP_AFTER: 0.03,
    Fault.UNKNOWN_VALUES: 0.05,
}


def demo(
    *,
    runtimes: Annotated[
        int,
        typer.Option("--runtimes", metavar="N", min=1, max=MAX_RUNTIMES, help="How many to stop."),
    ] = 300,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", help="What the faults are drawn from.")
    ] = 4,
) -> int:
    """Watch many stops on a misbehaving server; no key, no network.

    A local emulator answers late, refuses, fails and drops connections. At the
    end its own state is compared with what was reported; the exit code is 0 if
    they agree.
    """
    return 0 if run_demo(runtimes, seed) else FAILED


def run_demo(runtimes: int, seed: int) -> bool:
    """Stop this many and show what became of them.

    Returns:
        Whether what was reported agrees with the emulator's state, and could be shown.

    Raises:
        KeyboardInterrupt: After the report, if Ctrl-C cut the stops short.
    """
    emulator = Emulator(
        port=0,
        api_key=KEY,
        faults=_FAULTS,
        seed=seed,
        latency=0.1,
        fault_latency=0.5,
        rate_limit=_RATE_LIMIT,
    )
    targets = [RuntimeRef(WORKSPACE, alias) for alias in runtime_aliases(runtimes)]
    for number, target in enumerate(targets, start=1):
        # One in fifty does not exist, and a few are stopped already.
        if number % 50:
            emulator.add_runtime(*target, status="active" if number % 20 else "stopped")
    before = {target: emulator.status(*target) for target in targets}
    outcomes: list[StopOutcome] = []
    output = _output.Output()
    what = _output.pluralize(runtimes, "runtime")
    _output.print_info(f"Stopping {what} of a local emulator that misbehaves.")
    _output.print_info(f"It takes no more than {_RATE_LIMIT:.0f} stops a second.")
    finished = asyncio.run(_stop_all(emulator, targets, outcomes, output))
    report = finished.report
    _output.print_info("")
    output.print_result(_output.counts_table(report.counts))
    output.print_result("")
    output.print_result(
        ("Interrupted after " if finished.interrupted else f"To stop {what} took ")
        + f"{_output.pluralize(len(emulator.requests), 'request')} and {report.elapsed:.1f} s; "
        f"{report.throttled:,} of them refused for their pace."
    )
    wrong = [outcome for outcome in outcomes if not _is_consistent(outcome, before, emulator)]
    output.print_result(_verdict(wrong, list(before), emulator))
    if finished.interrupted:
        raise KeyboardInterrupt
    return not (wrong or output.write_failed)


async def _stop_all(
    emulator: Emulator,
    targets: Sequence[RuntimeRef],
    outcomes: list[StopOutcome],
    output: _output.Output,
) -> FinishedRun:
    async with emulator:
        session = BctrlSession(KEY, base_url=emulator.url, max_connections=_IN_FLIGHT, retry=_RETRY)
        return await run_stops(session, targets, outcomes.append, output)


def _is_consistent(
    outcome: StopOutcome, before: Mapping[RuntimeRef, str | None], emulator: Emulator
) -> bool:
    now = emulator.status(*outcome.target)
    match outcome.result:
        case StopResult.UNKNOWN:
            return True
        case StopResult.NOT_FOUND:
            return now is None
        case StopResult.REJECTED | StopResult.NOT_SENT:
            return now == before[outcome.target]
    return now == "stopped"


def _verdict(
    wrong: Sequence[StopOutcome], targets: Sequence[RuntimeRef], emulator: Emulator
) -> str:
    if wrong:
        first = wrong[0]
        status = emulator.status(*first.target)
        return (
            f"The emulator disagrees about {len(wrong)} of {len(targets)}:\n"
            f"{first.target.alias} was reported {first.result}, and it is {status or 'not there'}."
        )
    counts = Counter(emulator.status(*target) for target in targets)
    known = counts.total() - counts[None]
    if counts["stopped"] == known:
        return f"The emulator confirms: all {known} runtimes are stopped."
    return (
        f"The emulator confirms: {counts['stopped']} of {known} runtimes are stopped.\n"
        f"Still running: {counts['active']}, all of them reported as not settled."
    )
