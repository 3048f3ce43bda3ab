"""What the command finds in a workspace: it lists, filters, and asks before anything is stopped."""

import re
import sys
from typing import NamedTuple

from bctrl_async import (
    BctrlResponseError,
    BctrlSession,
    Runtime,
    RuntimeFilter,
    RuntimeRef,
    _display,
)

_ANY = "any"
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_is_age = re.compile(r"(\d{1,12}(?:\.\d{1,12})?)([smhd]?)").fullmatch


class Found(NamedTuple):
    """What there is in a workspace.

    Attributes:
        workspace: Its id, as it was given.
        runtimes: Those that fit.
        unreadable: Whether there are any that could not be read; each was complained about.
    """

    workspace: str
    runtimes: list[Runtime]
    unreadable: bool

    @property
    def targets(self) -> list[RuntimeRef]:
        """The runtimes, as targets."""
        return [RuntimeRef(self.workspace, runtime.alias) for runtime in self.runtimes]


def condition(status: str | None, kind: str | None, older_than: str | None) -> RuntimeFilter:
    """Return the filter of the command's options.

    Args:
        status: Of the runtimes; None and `any` are any.
        kind: Of the runtimes, None for any.
        older_than: Such as 90, 90s, 15m, 2h or 1.5d; None for any age.

    Raises:
        ValueError: It is no such age.
    """
    seconds: float | None = None
    if older_than is not None:
        age = _is_age(older_than)
        seconds = float(age[1]) * _SECONDS[age[2]] if age else 0.0
        if not seconds:
            raise ValueError(f"--older-than is {older_than!r}: give such as 90s, 15m, 2h, 1d")
    return RuntimeFilter(status=None if status == _ANY else status, kind=kind, older_than=seconds)


async def find(session: BctrlSession, workspace: str, wanted: RuntimeFilter) -> Found:
    """List what fits, and complain about each runtime that cannot be read.

    Raises:
        BctrlError: It cannot be listed.
    """
    unreadable: list[BctrlResponseError] = []
    async with session:
        runtimes = await session.list_runtimes(workspace, on_unreadable=unreadable.append)
    for error in unreadable:
        _display.complain(str(error))
    return Found(workspace, [one for one in runtimes if wanted(one)], bool(unreadable))


def can_ask() -> bool:
    """Whether there is somebody to answer."""
    return sys.stdin is not None and sys.stdin.isatty()


def is_agreed(found: Found) -> bool:
    """Ask whether what was found is to be stopped."""
    count = len(found.targets)
    what = f"{count:,} runtime{'' if count == 1 else 's'}"
    _display.ask(f"Stop {what} of workspace {_display.visible(found.workspace)}? [y/N] ")
    return sys.stdin.readline().strip().lower() in {"y", "yes"}
