"""Runtimes of a workspace: list, filter, and confirm before they are stopped."""

import asyncio
import sys
from collections import Counter
from functools import partial
from typing import NamedTuple, Self

from bctrl_async import (
    BctrlError,
    BctrlResponseError,
    BctrlSession,
    BctrlTimeoutError,
    Runtime,
    RuntimeFilter,
    RuntimeRef,
)
from bctrl_async.cli._format import escape, pluralize
from bctrl_async.cli._output import Output, print_error, print_info, print_question
from bctrl_async.cli._shard import Shard
from bctrl_async.cli._waiting import describe_read, show_waiting
from bctrl_async.filters import unknown_status, unknown_values


class FoundRuntimes(NamedTuple):
    """Runtimes of a workspace that match a filter.

    Attributes:
        workspace: The workspace's id.
        base_url: The URL of the API.
        runtimes: The runtimes.
        unreadable: The errors of the runtimes that could not be parsed; they may match as well.
        unknown: The errors of the runtimes that may be active, by a status unknown to this version.
        is_doubtful: True if the filter may be mistyped, which was reported on stderr.
    """

    workspace: str
    base_url: str
    runtimes: list[Runtime]
    unreadable: list[BctrlResponseError]
    unknown: list[BctrlResponseError]
    is_doubtful: bool

    @property
    def targets(self) -> list[RuntimeRef | BctrlResponseError]:
        """The runtimes as targets; the bulk stop rejects the doubtful ones."""
        return [*map(self._ref, self.runtimes), *self.unreadable, *self.unknown]

    def in_shard(self, shard: Shard) -> Self:
        """Return those of a shard."""
        return self._replace(
            runtimes=[runtime for runtime in self.runtimes if shard.keeps(self._ref(runtime))],
            unreadable=[*filter(shard.keeps, self.unreadable)],
            unknown=[*filter(shard.keeps, self.unknown)],
        )

    def _ref(self, runtime: Runtime) -> RuntimeRef:
        return RuntimeRef(self.workspace, runtime.alias)


async def find_runtimes(
    session: BctrlSession,
    workspace: str,
    wanted: RuntimeFilter,
    output: Output,
    *,
    deadline: float | None = None,
) -> FoundRuntimes:
    """List the runtimes that match a filter, and report its unknown values on stderr."""
    unreadable: list[BctrlResponseError] = []
    listing = session.list_runtimes(workspace, on_unreadable=unreadable.append)
    async with session, show_waiting(output, partial(describe_read, session)):
        try:
            runtimes = await asyncio.wait_for(listing, deadline)
        except BctrlError:
            raise
        except TimeoutError as error:
            raise BctrlTimeoutError(
                f"workspace {workspace!r} was not listed within the deadline of {deadline:g} s",
                advice="Allow a longer --deadline; nothing was stopped",
            ) from error
    mistyped = [*unknown_values(wanted, runtimes)]
    for name, value, known in mistyped:
        expected = ", ".join(known)
        print_error(f"unknown --{name} {value!r}, and no runtime has it: try {expected}")
    matching: list[Runtime] = []
    unknown: list[BctrlResponseError] = []
    for runtime in runtimes:
        if wanted(runtime):
            matching.append(runtime)
        elif (doubt := unknown_status(wanted, workspace, runtime)) is not None:
            doubt.advice = "Add --status with this status, or --status any, to include it"
            unknown.append(doubt)
    return FoundRuntimes(workspace, session.base_url, matching, unreadable, unknown, bool(mistyped))


def can_prompt() -> bool:
    """Return True if stdin and stderr are terminals."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))


def confirm(found: FoundRuntimes) -> bool:
    """Show the runtimes and ask whether to stop them."""
    kinds = Counter(escape(runtime.kind) for runtime in found.runtimes)
    summary = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    if found.unreadable:
        summary += f"; {len(found.unreadable):,} cannot be read"
    if found.unknown:
        summary += f"; {len(found.unknown):,} of unknown status"
    print_question(f"In workspace {escape(found.workspace)} at {found.base_url}: {summary}\n")
    print_question(f"Stop {pluralize(len(found.runtimes), 'runtime')}? [y/N] ")
    try:
        return sys.stdin.readline().strip().lower() in {"y", "yes"}
    except KeyboardInterrupt:
        print_info("\nNothing was stopped")  # Below the ^C.
        raise
