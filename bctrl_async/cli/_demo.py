"""The command `demo`: a bulk stop on a misbehaving server, checked against its state."""

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from msgspec.structs import replace

from bctrl_async import BctrlSession, RetryPolicy, RuntimeRef, StopOutcome, StopResult
from bctrl_async.cli._emulator import KEY, WORKSPACE, runtime_aliases
from bctrl_async.cli._options import MAX_RUNTIMES, Seed, whole_number
from bctrl_async.cli._output import FAILED, Output, pluralize, print_info
from bctrl_async.cli._run import FinishedRun, run_stops

if TYPE_CHECKING:
    from bctrl_async.emulator import Emulator

_MAX_IN_FLIGHT = 40
_RETRY = RetryPolicy(attempts=4, base=0.05, cap=0.4)
_RATE_LIMIT = 100.0
_FAULTS = {
    "latency": 0.10,
    "server_error": 0.03,
    "bad_gateway": 0.03,
    "drop_before": 0.03,
    "drop_after": 0.03,
    "unknown_values": 0.05,
}


def demo(
    *,
    runtimes: Annotated[
        int, whole_number(1, MAX_RUNTIMES), Parameter(help="Runtimes to stop.")
    ] = 300,
    seed: Seed = 4,
) -> int:
    """Stop many runtimes on a misbehaving server; needs no key and no network.

    A local emulator answers late, throttles, fails and drops connections. At
    the end its state is compared with the report; the exit code is 0 if they
    agree.
    """
    return 0 if run_demo(runtimes, seed) else FAILED


def run_demo(runtimes: int, seed: int) -> bool:
    """Stop runtimes of an emulator and print a report; return True if it proved correct."""
    from bctrl_async.emulator import Emulator, Fault  # noqa: PLC0415 - imports a server.

    emulator = Emulator(
        port=0,
        api_key=KEY,
        faults={Fault(name): probability for name, probability in _FAULTS.items()},
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
    output = Output()
    print_info(f"Stopping {pluralize(runtimes, 'runtime')} on a local emulator that misbehaves.")
    print_info(f"It accepts at most {_RATE_LIMIT:.0f} requests per second.")
    finished = asyncio.run(_stop_all(emulator, targets, outcomes, output))
    report = finished.report
    interrupted = "Interrupted: " * finished.interrupted
    output.print_result(f"{interrupted}{replace(report, ended_early=None)}")
    requests = pluralize(len(emulator.requests), "request")
    output.print_result(f"It took {requests}, of which {report.throttled:,} were throttled.")
    wrong = [outcome for outcome in outcomes if not _is_consistent(outcome, before, emulator)]
    output.print_result(_verdict(wrong, list(before), emulator))
    if finished.interrupted:
        raise KeyboardInterrupt
    return not (wrong or output.write_failed)


async def _stop_all(
    emulator: "Emulator",
    targets: Sequence[RuntimeRef],
    outcomes: list[StopOutcome],
    output: Output,
) -> FinishedRun:
    async with emulator:
        session = BctrlSession(
            KEY, base_url=emulator.url, max_connections=_MAX_IN_FLIGHT, retry=_RETRY
        )
        make_batch = partial(session.stop_runtimes, targets, on_outcome=outcomes.append)
        return await run_stops(session, make_batch, output)


def _is_consistent(
    outcome: StopOutcome, before: Mapping[RuntimeRef, str | None], emulator: "Emulator"
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
    wrong: Sequence[StopOutcome], targets: Sequence[RuntimeRef], emulator: "Emulator"
) -> str:
    if wrong:
        first = wrong[0]
        status = emulator.status(*first.target)
        return (
            f"The emulator disagrees about {len(wrong)} of {len(targets)}:\n"
            f"{first.target.alias} was reported {first.result}, but it is {status or 'missing'}."
        )
    counts = Counter(emulator.status(*target) for target in targets)
    known = counts.total() - counts[None]
    if counts["stopped"] == known:
        missing = f"; {counts[None]} of {counts.total()} names have no runtime" * bool(counts[None])
        return f"The emulator confirms: all {known} runtimes are stopped{missing}."
    return (
        f"The emulator confirms: {counts['stopped']} of {known} runtimes are stopped.\n"
        f"Still running: {counts['active']}, none reported as stopped."
    )
