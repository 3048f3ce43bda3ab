"""What the command finds in a workspace: it lists, filters, and asks before anything is stopped."""

import asyncio
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from bctrl_async import (
    BctrlError,
    BctrlSession,
    BctrlTimeoutError,
    Runtime,
    RuntimeFilter,
    RuntimeKind,
    RuntimeRef,
    RuntimeStatus,
)
from bctrl_async.cli import _output


class FoundRuntimes(NamedTuple):
    """What there is in a workspace.

    Attributes:
        workspace: Its id, as it was given.
        base_url: Where it is.
        runtimes: Those that fit.
        incomplete: Whether there may be more: one that could not be read, or one that a mistyped
            filter has left out; each was complained about.
    """

    workspace: str
    base_url: str
    runtimes: list[Runtime]
    incomplete: bool

    @property
    def targets(self) -> list[RuntimeRef]:
        """The runtimes, as targets."""
        return [RuntimeRef(self.workspace, runtime.alias) for runtime in self.runtimes]


async def find_runtimes(
    session: BctrlSession, workspace: str, wanted: RuntimeFilter, *, deadline: float | None = None
) -> FoundRuntimes:
    """List what fits, and complain about what may be missing.

    Args:
        session: What the list is asked for through; it is closed afterwards.
        workspace: The workspace's id.
        wanted: What fits.
        deadline: Seconds that it may take.

    Raises:
        BctrlError: It cannot be listed, or not in time.
    """
    problems: list[str] = []
    listing = session.list_runtimes(
        workspace, on_unreadable=lambda error: problems.append(str(error))
    )
    async with session:
        try:
            runtimes = await asyncio.wait_for(listing, deadline)
        except BctrlError:
            raise
        except TimeoutError as error:
            raise BctrlTimeoutError(
                f"workspace {workspace!r} was not listed within the deadline of {deadline:g} s"
            ) from error
    problems += _unknown_filter_values(wanted, runtimes)
    for problem in problems:
        _output.print_error(problem)
    fitting = [runtime for runtime in runtimes if wanted(runtime)]
    return FoundRuntimes(workspace, session.base_url, fitting, bool(problems))


def _unknown_filter_values(wanted: RuntimeFilter, runtimes: Sequence[Runtime]) -> Iterator[str]:
    """Say which values of a filter are neither known nor there: nothing can ever fit them."""
    for option, value, known, seen in (
        ("--status", wanted.status, RuntimeStatus, {runtime.status for runtime in runtimes}),
        ("--kind", wanted.kind, RuntimeKind, {runtime.kind for runtime in runtimes}),
    ):
        if value is not None and value not in {*known, *seen}:
            yield f"{option} is {value!r}, which no runtime has: give such as {', '.join(known)}"


def can_prompt() -> bool:
    """Whether there is somebody who sees a question and can answer."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))


def confirm(found: FoundRuntimes) -> bool:
    """Show what was found, and ask whether it is to be stopped."""
    kinds = Counter(_output.escape(runtime.kind) for runtime in found.runtimes)
    what = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    workspace = _output.escape(found.workspace)
    _output.print_info(f"In workspace {workspace} at {found.base_url}: {what}")
    _output.print_question(f"Stop {_output.pluralize(len(found.runtimes), 'runtime')}? [y/N] ")
    try:
        return sys.stdin.readline().strip().lower() in {"y", "yes"}
    except KeyboardInterrupt:
        _output.print_info("")  # Begin a new line after the ^C.
        raise
