"""The command's stdout and stderr."""

import errno
import os
import shutil
import stat
import sys
import textwrap
from contextlib import suppress
from contextvars import ContextVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

_WRITE_ERRORS = frozenset({errno.EBADF, errno.EIO, errno.ENOSPC, errno.EPIPE})
is_quiet: ContextVar[bool] = ContextVar("is_quiet", default=False)
"""True to print only results, errors and warnings."""


def escape_unprintable(text: str) -> str:
    """Escape what a terminal would obey or hide, such as control characters, but no line ends."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """Return text on one line, with its unprintable characters escaped."""
    return escape_unprintable(" ".join(text.split()))


def print_error(message: str) -> None:
    """Print an error on stderr as one line."""
    print_log("error", message)


def print_info(line: str) -> None:
    """Print on stderr a line that is not a result, unless --quiet is given."""
    if not is_quiet.get():
        _print_line(line)


def print_log(level: str, message: str) -> None:
    """Print a log record on stderr as one line."""
    _print_line(f"bctrl-async: {level}: {one_line(message)}")


def _print_line(line: str) -> None:
    # `print` would take a stderr that the shell has closed (None) for stdout.
    if sys.stderr is not None:
        with suppress(OSError):
            text = escape_unprintable(line)
            if sys.stderr.isatty():
                text = "\n".join(map(_wrap, text.split("\n")))
            print(text, file=sys.stderr, flush=True)  # noqa: T201 - rich may be drawing.


def _wrap(line: str) -> str:
    """Wrap a line between words: a terminal would break them."""
    width = shutil.get_terminal_size().columns
    return textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)


def print_question(question: str) -> None:
    """Print a question on stderr, without a line end."""
    # Not on stdout: the results may go to a file.
    print(escape_unprintable(question), end="", file=sys.stderr, flush=True)  # noqa: T201 - rich would wrap it.


def report_os_error(error: OSError) -> None:
    """Report an error of stdout, to which the help is written, or of anything else."""
    if error.errno in _WRITE_ERRORS and error.filename is None:
        stdout_failed(error)
    else:
        print_error(str(error))


def stdout_failed(error: OSError) -> None:
    """Report that stdout cannot be written, and write nothing more to it."""
    _discard_stdout()
    print_error(f"cannot write to stdout: {error.strerror}")


def _discard_stdout() -> None:
    # Buffered text would fail again when it is flushed at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Output(Console):
    """Stdout, for results.

    If it cannot be written any more (`| head`, a full disk), it falls silent and the stops go on.
    """

    def __init__(self, *, shows_progress: bool = True) -> None:
        super().__init__(highlight=False, markup=False, emoji=False)
        self.shows_progress = shows_progress
        self.write_failed = False
        """True if results were lost, other than to a reader that left (`| head`)."""

    def print_result(
        self, result: str | Text | Table, *, wrap: bool = False, exact: bool = False
    ) -> None:
        """Print a table or a line."""
        wraps = isinstance(result, Table) or (wrap and self.on_terminal)
        if isinstance(result, str) and not (exact and not self.on_terminal):
            result = escape_unprintable(result)
        try:
            if isinstance(result, str) and not self.on_terminal:
                self._write_line(result)
            else:
                self.print(result, soft_wrap=not wraps)
        except OSError as error:
            self.quiet = self.write_failed = True
            stdout_failed(error)

    def _write_line(self, line: str) -> None:
        # A million lines of JSON would cost rich two minutes.
        if self.quiet:
            return
        try:
            self.file.write(f"{line}\n")
            self.file.flush()
        except BrokenPipeError:
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Fall silent; rich would exit, and leave stops without an outcome."""
        self.quiet = True
        _discard_stdout()

    @property
    def on_terminal(self) -> bool:
        """True if stdout is a terminal, whatever FORCE_COLOR says."""
        return self.file.isatty() and not self.is_dumb_terminal

    @property
    def _is_pipe(self) -> bool:
        try:
            return stat.S_ISFIFO(os.fstat(self.file.fileno()).st_mode)
        except OSError:  # It is closed.
            return False

    def progress_console(self) -> tuple[Console, bool]:
        """Return the console for progress, and whether to draw on it."""
        errors = Console(stderr=True)
        if is_quiet.get() or not (errors.file.isatty() and not errors.is_dumb_terminal):
            return errors, False
        # What a reader prints on the terminal would be erased when progress is drawn anew.
        if self._is_pipe:
            return errors, False
        # Two consoles on one terminal would draw over each other.
        return (self if self.on_terminal else errors), True

    def escape_unencodable(self, text: str) -> str:
        """Escape characters that the terminal's encoding lacks: printing them would raise."""
        return text.encode(self.encoding, "backslashreplace").decode(self.encoding)

    def end_line(self) -> None:
        """Begin a new line after the ^C that a terminal shows."""
        if self.on_terminal:
            self.print_result("")
