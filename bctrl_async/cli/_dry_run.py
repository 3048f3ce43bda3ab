"""A dry run: print the targets that a bulk stop would stop, and send nothing."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterable, Iterable
from contextlib import nullcontext
from pathlib import Path

from bctrl_async import (
    BctrlError,
    BctrlResponseError,
    BctrlSession,
    RuntimeRef,
    StopOutcome,
    StopResult,
)
from bctrl_async.cli._exit_codes import FAILED
from bctrl_async.cli._format import INPUT_LEFT, MAX_SHOWN, describe, print_read_error
from bctrl_async.cli._lines import ends_input
from bctrl_async.cli._output import Output, print_error, print_info
from bctrl_async.cli._records import print_json, target_fields
from bctrl_async.filters import FoundTargets
from bctrl_async.journal import Journal


def dry_run(
    session: BctrlSession,
    targets: Iterable[RuntimeRef] | AsyncIterable[RuntimeRef],
    output: Output,
    *,
    journal: str | None,
    journal_max_age: float | None,
) -> int:
    """Print the targets to stop as JSON Lines, without what a journal has as stopped."""
    known: Journal | None = None
    # What a list has is sent, whatever the journal has.
    if journal is not None and Path(journal).exists() and not isinstance(targets, FoundTargets):
        known = Journal(journal, session.base_url, journal_max_age, only_read=True)
    counts: Counter[str] = Counter()
    input_left = False

    def show(outcome: StopOutcome) -> None:
        nonlocal input_left
        is_last = ends_input(outcome)
        input_left = input_left or is_last
        if outcome.result is StopResult.REJECTED:
            counts["invalid"] += 1
            if counts["invalid"] <= MAX_SHOWN or is_last:
                print_error(_describe(outcome.error))
        elif known is not None and known.done(outcome.target) is not None:
            counts["stopped"] += 1
        else:
            counts["to stop"] += 1
            print_json(output, target_fields(outcome.target))

    async def run() -> None:
        plain = [t async for t in targets] if isinstance(targets, AsyncIterable) else targets
        async with session:
            batch = session.stop_runtimes(plain, on_outcome=show)
            # Before anything is sent, so that valid targets are `not_sent`.
            batch.stop_reading()
            await batch

    try:
        with nullcontext() if known is None else known.file:
            asyncio.run(run())
    except OSError as error:
        print_read_error(error)
        return FAILED
    if known is not None and counts["stopped"]:
        known.warn_if_old()
    skipped = f", {counts['stopped']:,} no longer running" if counts["stopped"] else ""
    left = f"; {INPUT_LEFT}" if input_left else ""
    print_info(
        f"Dry run: {counts['to stop']:,} to stop{skipped}, {counts['invalid']:,} invalid{left}"
    )
    return FAILED if counts["invalid"] or output.write_failed else 0


def _describe(error: BctrlError | None) -> str:
    # A runtime that could not be parsed has no other name than that of the error.
    if isinstance(error, BctrlResponseError):
        return describe(error)
    return error.summary if error else ""
