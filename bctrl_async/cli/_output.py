"""The command's stdout and stderr, and the words that several commands share."""

import errno
import json
import logging
import os
import shutil
import stat
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from copy import copy

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bctrl_async import (
    BctrlAuthenticationError,
    BctrlConfigError,
    BctrlError,
    Runtime,
    RuntimeRef,
    StopResult,
)
from bctrl_async.errors import quote, subject_of

FAILED = 1
"""The exit code if some runtimes run, or may run: running the command again may help."""
USAGE = 2
"""The exit code of a usage or configuration error: the same command would fail again."""
IN_USE = 75
"""The exit code if the journal is in use, and the command may succeed later: EX_TEMPFAIL."""

MAX_SHOWN = 10
"""The number of targets that are shown one by one if they are invalid, or have no outcome."""
INPUT_LEFT = "; the input was not read to its end"
_WRITE_ERRORS = frozenset({errno.EBADF, errno.EIO, errno.ENOSPC, errno.EPIPE})
# A filter may be mistyped, a run may skip runtimes that were started anew, or exceed a rate that it
# shares: the user must see these warnings.
_ALWAYS_SHOWN = ("bctrl_async.filters", "bctrl_async.journal", "bctrl_async.pace")
is_quiet: ContextVar[bool] = ContextVar("is_quiet", default=False)


class _LogPrinter(logging.Handler):
    """A handler that prints log records on stderr: some warnings always, all if verbose."""

    verbose = False

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record as one line."""
        is_warning = record.levelno >= logging.WARNING
        if self.verbose or (is_warning and record.name in _ALWAYS_SHOWN and not is_quiet.get()):
            _print_line(f"bctrl-async: {record.levelname.lower()}: {one_line(record.getMessage())}")


LOG_PRINTER = _LogPrinter()
"""The only handler: without one, Python prints warnings to stderr, into the live display."""


def set_verbosity(*, verbose: bool, quiet: bool) -> None:
    """Print more or less on stderr from now on: the process is the command's own."""
    if verbose and quiet:
        raise BctrlConfigError("--verbose cannot be combined with --quiet")
    LOG_PRINTER.verbose = verbose
    is_quiet.set(quiet)
    logger = logging.getLogger("bctrl_async")
    logger.addHandler(LOG_PRINTER)
    logger.setLevel(logging.INFO if verbose else logging.WARNING)


def exit_code(errors: Iterable[BctrlError | None]) -> int:
    """Return the exit code of a command that failed with these errors."""
    is_unauthorized = any(isinstance(error, BctrlAuthenticationError) for error in errors)
    return USAGE if is_unauthorized else FAILED


def pluralize(count: int, noun: str) -> str:
    """Return a count with its noun, such as `1 stop` or `2,000 stops`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def escape(text: str) -> str:
    """Return visible text as it is, and any other, such as a space at its end, as a literal."""
    # The repr of an enum's member would be its Python name.
    text = str.__str__(text)
    is_visible = text and text.isprintable() and text == text.strip()
    return text if is_visible else ascii(text)


def describe(error: BctrlError, *, with_subject: bool = True) -> str:
    """Return the text of an error with a single advice, without the server's own."""
    shown = copy(error)
    if error.advice or error.default_advice:
        shown.hint = None
    text = str(shown).removeprefix(subject_of(error))
    return f"{name_call(error)}{text}" if with_subject else text


def name_call(error: BctrlError) -> str:
    """Return the beginning of an error's text, such as `could not get 'crm': `."""
    name = error.workspace_id if error.alias is None else error.alias
    if name is None:
        return ""
    kind = "workspace " if error.alias is None else ""
    return f"could not {error.operation} {kind}{quote(name)}: "


def format_counts(counts: Counter[StopResult]) -> str:
    """Return the counts that are not 0."""
    return ", ".join(f"{counts[result]:,} {result}" for result in StopResult if counts[result])


def _escape_unprintable(text: str) -> str:
    """Escape what a terminal would obey or hide, such as control characters, but no line ends."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """Return text on one line, with its unprintable characters escaped."""
    return _escape_unprintable(" ".join(text.split()))


def print_error(error: str | BctrlError) -> None:
    """Print an error on stderr as one line; if the terminal is too narrow, its advice below."""
    text, advice = error if isinstance(error, str) else describe(error), ""
    line = f"bctrl-async: error: {one_line(text)}"
    if not isinstance(error, str):
        advice = one_line(error.advice or error.default_advice).rstrip(".")
    if advice and _is_terminal() and len(line) > shutil.get_terminal_size().columns:
        line = f"{line.removesuffix(f'. {advice}')}\n{advice}"
    _print_line(line)


def print_info(line: str) -> None:
    """Print on stderr a line that is not a result, unless --quiet is given."""
    if not is_quiet.get():
        _print_line(line)


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _print_line(line: str) -> None:
    # `print` would take a stderr that the shell has closed (None) for stdout.
    if sys.stderr is not None:
        with suppress(OSError):
            text = _escape_unprintable(line)
            if _is_terminal():
                text = "\n".join(map(_wrap, text.split("\n")))
            print(text, file=sys.stderr, flush=True)  # noqa: T201 - rich may be drawing.


def _wrap(line: str) -> str:
    """Wrap a line between words: a terminal would break them."""
    width = shutil.get_terminal_size().columns
    return textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)


def can_ask() -> bool:
    """Return True if stdin and stderr are terminals."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))


def ask(question: str) -> bool:
    """Ask on the terminal, and return True if the answer is yes."""
    # Not on stdout: the results may go to a file.
    text = f"{_escape_unprintable(question)} [y/N] "
    try:
        print(text, end="", file=sys.stderr, flush=True)  # noqa: T201 - rich would wrap it.
        return sys.stdin.readline().strip().lower() in {"y", "yes"}
    except KeyboardInterrupt:
        print_info("\nNothing was stopped")  # Below the ^C.
        raise


def report_os_error(error: OSError) -> None:
    """Report an error of stdout, to which the help is written, or of anything else."""
    if error.errno in _WRITE_ERRORS and error.filename is None:
        _stdout_failed(error)
    else:
        print_error(str(error))


def print_read_error(error: OSError) -> None:
    """Report that an input could be opened, but not read to its end."""
    print_error(f"cannot read all targets: {error.strerror}")


def _stdout_failed(error: OSError) -> None:
    _discard_stdout()
    print_error(f"cannot write to stdout: {error.strerror}")


def _discard_stdout() -> None:
    # Buffered text would fail again when it is flushed at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Output(Console):
    """Stdout, for results.

    If it cannot be written any more (`| head`, a full disk), it falls silent and the stops go on.
    """

    def __init__(self) -> None:
        super().__init__(highlight=False, markup=False, emoji=False)
        self.shows_progress = True
        self.write_failed = False
        """True if results were lost, other than to a reader that left (`| head`)."""

    def print_result(self, result: str | Text | Table, *, exact: bool = False) -> None:
        """Print a table or a line, which wraps on a terminal only."""
        if isinstance(result, str) and (self.on_terminal or not exact):
            result = _escape_unprintable(result)
        try:
            if isinstance(result, str) and not self.on_terminal:
                self._write_line(result)
            else:
                wraps = isinstance(result, Table) or (self.on_terminal and not exact)
                self.print(result, soft_wrap=not wraps)
        except OSError as error:
            self.quiet = self.write_failed = True
            _stdout_failed(error)

    def print_object(self, fields: Mapping[str, object]) -> None:
        """Print an object as JSON on one line, in ASCII."""
        self.print_result(json.dumps(fields), exact=True)

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

    def end_line(self) -> None:
        """Begin a new line after the ^C that a terminal shows."""
        if self.on_terminal:
            self.print_result("")


def target_fields(target: RuntimeRef) -> dict[str, object]:
    """Return the fields of a target, which `--from` reads."""
    return {"workspace_id": target.workspace_id, "alias": target.alias}


def runtime_fields(workspace: str, runtime: Runtime) -> dict[str, object]:
    """Return the fields of a runtime; as a target has them, `--from` reads them."""
    return {
        "workspace_id": workspace,
        "alias": runtime.alias,
        "status": runtime.status,
        "kind": runtime.kind,
        "created_at": runtime.created_at,
        "runtime": msgspec.to_builtins(runtime),
    }
