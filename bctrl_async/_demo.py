"""The demonstration: many stops on a misbehaving server, whose own state is the judge."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from bctrl_async import RetryPolicy, RuntimeRef, StopOutcome, StopResult, _display
from bctrl_async._fan_out import stop_all
from bctrl_async.emulator import Emulator, Fault

WORKSPACE = "demo"
KEY = "emulator-key"
_IN_FLIGHT = 40
_RETRY = RetryPolicy(attempts=3, base=0.05, cap=0.4)
_FAULTS = {
    Fault.LATENCY: 0.10,
    Fault.SERVER_ERROR: 0.05,
    Fault.BAD_GATEWAY: 0.05,
    Fault.DROP_BEFORE: 0.05,
    Fault.DROP_AFTER: 0.05,
    Fault.UNKNOWN_VALUES: 0.05,
}
# Refusals come together, as those of a busy server do. Spread at random over the whole run they
# would look like a limit that no pace can keep, and the client would slow down and down.
_BUSY = (
    *[Fault.RATE_LIMITED] * 4,
    *[Fault.RATE_LIMITED_RETRY_AFTER] * 4,
    *[Fault.UNAVAILABLE] * 4,
)


def aliases(count: int) -> Iterator[str]:
    """Name this many runtimes."""
    return (f"runtime-{number:04}" for number in range(1, count + 1))


def run(runtimes: int, seed: int) -> bool:
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
        retry_after="0.1",
        fault_latency=0.5,
    )
    targets = [RuntimeRef(WORKSPACE, alias) for alias in aliases(runtimes)]
    for number, target in enumerate(targets, start=1):
        # One in fifty does not exist, and a few are stopped already.
        if number % 50:
            emulator.add_runtime(*target, status="active" if number % 20 else "stopped")
    for target, fault in zip(targets, _BUSY, strict=False):
        emulator.inject(fault, alias=target.alias)
    before = {target: emulator.status(*target) for target in targets}
    outcomes: list[StopOutcome] = []
    output = _display.Output()
    _display.note(f"Stopping {runtimes} runtimes of a local emulator that misbehaves.")
    began = time.monotonic()
    with _display.progress(output, runtimes) as advance:

        def report(outcome: StopOutcome) -> None:
            outcomes.append(outcome)
            advance()

        cut_short = asyncio.run(_demonstrate(emulator, targets, report))
    outcomes.extend(cut_short)
    elapsed = time.monotonic() - began
    _display.note("")
    output.say(_display.table(Counter(outcome.result for outcome in outcomes)))
    output.say("")
    took = f"{len(emulator.requests)} requests and {elapsed:.1f} s"
    output.say(f"Interrupted after {took}." if cut_short else f"{runtimes} stops took {took}.")
    wrong = [outcome for outcome in outcomes if not _agrees(outcome, before, emulator)]
    output.say(_verdict(wrong, list(before), emulator))
    if cut_short:
        raise KeyboardInterrupt
    return not (wrong or output.lost)


async def _demonstrate(
    emulator: Emulator, targets: Sequence[RuntimeRef], report: Callable[[StopOutcome], None]
) -> list[StopOutcome]:
    async with emulator:
        return await stop_all(
            targets,
            report,
            api_key=KEY,
            base_url=emulator.url,
            max_connections=_IN_FLIGHT,
            retry=_RETRY,
        )


def _agrees(
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
