"""Runtimes of a workspace: list, filter, and confirm before they are stopped."""

import asyncio
import sys
from collections import Counter
from functools import partial
from itertools import chain

from bctrl_async import (
    BctrlError,
    BctrlResponseError,
    BctrlSession,
    BctrlTimeoutError,
    Runtime,
    RuntimeFilter,
)
from bctrl_async.cli._format import escape, pluralize
from bctrl_async.cli._output import Output, print_info, print_question
from bctrl_async.cli._targets import Shard
from bctrl_async.cli._waiting import describe_read, show_waiting
from bctrl_async.filters import FoundTargets


class FoundRuntimes(FoundTargets):
    """Runtimes of a workspace that match a filter; the bulk stop rejects the unreadable ones."""

    def __init__(self, workspace: str, wanted: RuntimeFilter, base_url: str) -> None:
        super().__init__(workspace, wanted)
        self.base_url: str = base_url

    @property
    def runtimes(self) -> list[Runtime]:
        """The runtimes that match."""
        return [item for item in self.items if isinstance(item, Runtime)]

    @property
    def unreadable(self) -> list[BctrlResponseError]:
        """The errors of the runtimes that may match, and cannot be read."""
        return [item for item in self.items if not isinstance(item, Runtime)]

    def keep(self, shard: Shard) -> None:
        """Keep only those of a shard."""
        self.items = [
            item for item, target in zip(self.items, self, strict=True) if shard.keeps(target)
        ]


async def find_runtimes(
    session: BctrlSession,
    workspace: str,
    wanted: RuntimeFilter,
    output: Output,
    *,
    deadline: float | None = None,
) -> FoundRuntimes:
    """List the runtimes that match a filter."""
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
    found = FoundRuntimes(workspace, wanted, session.base_url)
    found.add(chain(runtimes, unreadable))
    return found


def can_prompt() -> bool:
    """Return True if stdin and stderr are terminals."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))


def confirm(found: FoundRuntimes) -> bool:
    """Show the runtimes and ask whether to stop them."""
    runtimes, unreadable = found.runtimes, found.unreadable
    kinds = Counter(escape(runtime.kind) for runtime in runtimes)
    summary = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    if unreadable:
        summary += f"; {len(unreadable):,} cannot be read"
    print_question(f"In workspace {escape(found.workspace_id)} at {found.base_url}: {summary}\n")
    print_question(f"Stop {pluralize(len(runtimes), 'runtime')}? [y/N] ")
    try:
        return sys.stdin.readline().strip().lower() in {"y", "yes"}
    except KeyboardInterrupt:
        print_info("\nNothing was stopped")  # Below the ^C.
        raise
