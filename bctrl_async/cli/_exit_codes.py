"""Exit codes of the command, besides 0 and 130 (interrupted)."""

from collections.abc import Iterable

from bctrl_async import BctrlAuthenticationError, BctrlError

FAILED = 1
"""Some runtimes run, or may run; running the command again may help."""
USAGE = 2
"""A usage or configuration error: the same command would fail again."""
JOURNAL_IN_USE = 75
"""The journal is in use, and the same command may succeed later: EX_TEMPFAIL of sysexits.h."""


def exit_code(errors: Iterable[BctrlError | None]) -> int:
    """Return the exit code of a command that failed with these errors."""
    is_unauthorized = any(isinstance(error, BctrlAuthenticationError) for error in errors)
    return USAGE if is_unauthorized else FAILED
