"""The exit codes of the command, beside 0 and 130 (Ctrl-C)."""

from collections.abc import Iterable

from bctrl_async import BctrlAuthenticationError, BctrlError

FAILED = 1
"""Something is left to do; the same command may do it."""
USAGE = 2
"""The same command will fail again: its options, the key or the URL must change."""


def exit_code(errors: Iterable[BctrlError | None]) -> int:
    """Return the exit code of a command that failed with these errors."""
    key_is_invalid = any(isinstance(error, BctrlAuthenticationError) for error in errors)
    return USAGE if key_is_invalid else FAILED
