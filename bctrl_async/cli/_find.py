"""Runtimes of a workspace: list, filter, and confirm before they are stopped."""

import asyncio
import sys
from collections import Counter
from collections.abc import Iterable
from functools import partial
from itertools import chain
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
from bctrl_async.cli._shard import WHOLE, Shard, ShardItems
from bctrl_async.cli._waiting import describe_read, show_waiting
from bctrl_async.filters import Listed, ListedRuntimes, unknown_values, why_it_may_match

_ADVICE = {
    "status": "Add --status with this status, or --status any, to include it",
    "older_than": "Stop it by its alias, or leave out --older-than to include it",
}
"""The advice for a runtime that may match, by the condition of which that is not known."""


class FoundRuntimes(NamedTuple):
    """Runtimes of a workspace that match a filter.

    Attributes:
        workspace: The workspace's id.
        base_url: The URL of the API.
        runtimes: The runtimes.
        unreadable: The errors of the runtimes that could not be parsed; they may match as well.
        unknown: The errors of the runtimes that may match: their status or their age is unknown.
        is_doubtful: True if the filter may be mistyped, which was reported on stderr.
        listed: What the list says of all runtimes.
        shard: The shard that these are.
    """

    workspace: str
    base_url: str
    runtimes: list[Runtime]
    unreadable: list[BctrlResponseError]
    unknown: list[BctrlResponseError]
    is_doubtful: bool
    listed: ListedRuntimes
    shard: Shard = WHOLE

    @property
    def targets(self) -> "FoundItems":
        """The runtimes as targets; the bulk stop rejects the doubtful ones."""
        doubtful = chain(self.unreadable, self.unknown)
        return FoundItems(self.shard, chain(map(self._ref, self.runtimes), doubtful), self.listed)

    def in_shard(self, shard: Shard) -> Self:
        """Return those of a shard."""
        return self._replace(
            runtimes=[runtime for runtime in self.runtimes if shard.keeps(self._ref(runtime))],
            unreadable=[*filter(shard.keeps, self.unreadable)],
            unknown=[*filter(shard.keeps, self.unknown)],
            shard=shard,
        )

    def _ref(self, runtime: Runtime) -> RuntimeRef:
        return RuntimeRef(self.workspace, runtime.alias)


class FoundItems(ShardItems[RuntimeRef | BctrlResponseError], Listed):
    """The targets of a shard that were found in a list.

    Args:
        shard: The shard.
        items: The targets, and the errors of runtimes that may be targets.
        listed: The list.
    """

    def __init__(
        self,
        shard: Shard,
        items: Iterable[RuntimeRef | BctrlResponseError],
        listed: ListedRuntimes,
    ) -> None:
        super().__init__(shard, items)
        self.listed = listed


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
    listed = ListedRuntimes(workspace)
    for unnamed in unreadable:
        listed.add(unnamed)
    matching: list[Runtime] = []
    unknown: list[BctrlResponseError] = []
    for runtime in runtimes:
        listed.add(runtime)
        if wanted(runtime):
            matching.append(runtime)
        elif (doubt := why_it_may_match(wanted, workspace, runtime)) is not None:
            doubt.advice = _ADVICE[doubt.argument or ""]
            unknown.append(doubt)
    return FoundRuntimes(
        workspace, session.base_url, matching, unreadable, unknown, bool(mistyped), listed
    )


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
        summary += f"; {len(found.unknown):,} of unknown status or age"
    print_question(f"In workspace {escape(found.workspace)} at {found.base_url}: {summary}\n")
    print_question(f"Stop {pluralize(len(found.runtimes), 'runtime')}? [y/N] ")
    try:
        return sys.stdin.readline().strip().lower() in {"y", "yes"}
    except KeyboardInterrupt:
        print_info("\nNothing was stopped")  # Below the ^C.
        raise
