"""Redirections of stdout and stderr that would damage a file of the command."""

import os
import stat
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import TextIO

from bctrl_async import BctrlConfigError


def check_redirects(files: Iterable[tuple[str, str | None]]) -> None:
    """Check that neither stdout nor stderr goes to a file that the command reads or writes.

    A shell that truncates such a file (`> FILE`) has done so already, but not for `>> FILE`.

    Args:
        files: Each option or argument with its path; `-` is stdin, and None is not given.

    Raises:
        BctrlConfigError: One of them does.
    """
    given = [(option, path, found) for option, path in files if (found := _status(path))]
    problems = {
        name: f"{name} and {option} are the same file{'' if path == '-' else f': {path}'}"
        for name, stream in (("stderr", sys.stderr), ("stdout", sys.stdout))
        for option, path, found in given
        if _is_file(_status_of(stream), found)
    }
    if not problems:
        return
    # The error itself would damage the file.
    if "stderr" in problems:
        sys.stderr = None if "stdout" in problems else sys.stdout
    name, problem = problems.popitem()
    raise BctrlConfigError(problem, advice=f"Redirect {name} to another file")


def _is_file(status: os.stat_result | None, found: os.stat_result) -> bool:
    # A pipe or a device has no content to damage.
    return status is not None and stat.S_ISREG(status.st_mode) and os.path.samestat(status, found)


def _status(path: str | None) -> os.stat_result | None:
    if path == "-":
        return _status_of(sys.stdin)
    with suppress(OSError, ValueError):
        return None if path is None else os.stat(path)  # noqa: PTH116 - as for a descriptor.
    return None


def _status_of(stream: TextIO | None) -> os.stat_result | None:
    # A shell that closes a stream leaves None in its place, and a test may replace it.
    with suppress(OSError, ValueError):
        return None if stream is None else os.fstat(stream.fileno())
    return None
