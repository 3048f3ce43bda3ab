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
from functools import partial

from rich.console import Console
from rich.text import Text

from bctrl_async import BctrlConfigError, BctrlError, StopResult
from bctrl_async._kinds import kind_of
from bctrl_async.errors import quote, subject_of

FAILED = 1
"""The exit code if some runtimes run, or may run: running the command again may help."""
USAGE = 2
"""The exit code of a usage or configuration error: the same command would fail again."""
IN_USE = 75
"""The exit code if the journal is in use, and the command may succeed later: EX_TEMPFAIL."""
INTERRUPTED = 130
"""The exit code after Ctrl-C."""

MAX_SHOWN = 10
"""The most invalid or unreadable targets that are shown one by one."""
MAX_WIDTH = 28
"""The most characters to which a column is padded."""
WRITE_ERRORS = frozenset({errno.EBADF, errno.EIO, errno.ENOSPC, errno.EPIPE})
# A filter may be mistyped, a run may skip runtimes that were started anew, or exceed a rate that it
# shares: the user must see these warnings.
_ALWAYS_SHOWN = {f"bctrl_async.{name}" for name in ("cli", "filters", "journal", "pace")}
is_quiet: ContextVar[bool] = ContextVar("is_quiet", default=False)


class _LogPrinter(logging.Handler):
    """A handler that prints log records on stderr: some warnings always, all if verbose."""

    verbose = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        is_warning = record.levelno >= logging.WARNING
        if self.verbose or (is_warning and record.name in _ALWAYS_SHOWN and not is_quiet.get()):
            _print_line(f"bctrl-async: {record.levelname.lower()}: {record.getMessage()}")


LOG_PRINTER = _LogPrinter()
"""The only handler: without it, Python prints warnings to stderr, into the live display."""


def set_verbosity(*, verbose: int, quiet: bool) -> None:
    """Set how much is printed on stderr. This is global, as the process is the command's own."""
    if verbose and quiet:
        raise BctrlConfigError("--verbose cannot be combined with --quiet")
    LOG_PRINTER.verbose = verbose
    is_quiet.set(quiet)
    logger = logging.getLogger("bctrl_async")
    logger.addHandler(LOG_PRINTER)
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    logger.getChild("wire").setLevel(logging.DEBUG if verbose > 1 else logging.NOTSET)


def exit_code(errors: Iterable[BctrlError | None]) -> int:
    """Return the exit code of a command that failed with these errors."""
    codes = [kind_of(error).exit_code for error in errors if error is not None]
    return max(codes, default=FAILED)


def pluralize(count: int, noun: str) -> str:
    """Return a count with its noun, such as `1 stop` or `2,000 stops`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def escape(text: str) -> str:
    """Return visible text unchanged, and other text, such as `'a '`, as a literal."""
    # The repr of an enum's member would show its Python name.
    text = str.__str__(text)
    is_visible = text and text.isprintable() and text == text.strip()
    return text if is_visible else ascii(text)


def describe(error: BctrlError) -> str:
    """Return an error's text without its target, and with at most one piece of advice."""
    shown = copy(error)
    if error.advice:
        shown.hint = None
    return str(shown).removeprefix(subject_of(error))


def name_call(error: BctrlError) -> str:
    """Return the start of an error's text, such as `could not get 'crm': `."""
    name = error.workspace_id if error.alias is None else error.alias
    if name is None:
        return ""
    kind = "workspace " if error.alias is None else ""
    return f"could not {error.operation} {kind}{quote(name)}: "


def format_counts(counts: Counter[StopResult]) -> str:
    """Return the counts that are not 0."""
    return ", ".join(f"{counts[result]:,} {result}" for result in StopResult if counts[result])


def _escape_unprintable(text: str) -> str:
    """Escape what a terminal would obey or hide, such as control characters, except newlines."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """Return text on one line, with its unprintable characters escaped."""
    return _escape_unprintable(" ".join(text.split()))


def print_error(error: str | BctrlError) -> None:
    """Print an error on stderr as one line; on a narrow terminal, its advice goes below it."""
    text = error if isinstance(error, str) else f"{name_call(error)}{describe(error)}"
    line = f"bctrl-async: error: {one_line(text)}"
    if isinstance(error, BctrlError) and 0 < _columns() < len(line):
        advice = one_line(error.advice or "").rstrip(".")
        line = line.removesuffix(f". {advice}") + f"\n{advice}" * bool(advice)
    _print_line(line)


def print_info(line: str) -> None:
    """Print on stderr a line that is not a result, unless --quiet is given."""
    if not is_quiet.get():
        _print_line(line)


def _columns() -> int:
    """Return the width of the terminal on stderr, 0 if there is none."""
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    return shutil.get_terminal_size().columns if is_terminal else 0


def _print_line(line: str) -> None:
    if sys.stderr is None:  # The shell has closed stderr, and `print` would use stdout.
        return
    lines = _escape_unprintable(line).split("\n")
    if columns := _columns():
        # A terminal would break lines within words.
        wrap = partial(textwrap.fill, break_long_words=False, break_on_hyphens=False)
        lines = [wrap(each, columns) for each in lines]
    with suppress(OSError):
        print("\n".join(lines), file=sys.stderr, flush=True)  # noqa: T201 - rich may be drawing.


class Output(Console):
    """Stdout, for results.

    If writing fails (`| head`, a full disk), no more results are printed, and the stops go on.
    """

    def __init__(self) -> None:
        if sys.stdout is None:
            # The shell has closed stdout. Rich would drop the results; writing to this file fails.
            sys.stdout = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w")
        super().__init__(highlight=False, markup=False, emoji=False)
        self.shows_progress = True
        self.write_failed = False
        """True if results were lost, other than to a reader that left (`| head`)."""
        self.in_pipe = False
        """True if stdout is a pipe, whose reader prints later, or was one until it left."""
        with suppress(OSError):  # Stdout may be closed.
            self.in_pipe = stat.S_ISFIFO(os.fstat(self.file.fileno()).st_mode)

    def print_result(self, result: str | Text, *, exact: bool = False) -> None:
        """Print a line, which wraps on a terminal unless it is exact."""
        if isinstance(result, str) and (self.on_terminal or not exact):
            result = _escape_unprintable(result)
        try:
            if isinstance(result, Text) or self.on_terminal:
                self.print(result, soft_wrap=exact or not self.on_terminal)
            elif not self.quiet:
                # A million lines of JSON would cost rich half a minute.
                self.file.write(f"{result}\n")
                self.file.flush()
        except OSError as error:
            self.fail(error)

    def print_object(self, fields: Mapping[str, object]) -> None:
        """Print an object as JSON on one line, in ASCII."""
        self.print_result(json.dumps(fields), exact=True)

    def fail(self, error: OSError) -> None:
        """Print no more results; report the error unless the reader left (`| head`)."""
        self.quiet = True
        # Buffered text would fail again when it is flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            self.write_failed = True
            print_error(f"cannot write to stdout: {error.strerror}")

    def on_broken_pipe(self) -> None:
        """Print no more results; rich would exit, and leave stops without an outcome."""
        self.fail(BrokenPipeError())

    @property
    def on_terminal(self) -> bool:
        """True if stdout is a terminal, whatever FORCE_COLOR says."""
        return self.file.isatty() and not self.is_dumb_terminal

    def progress_console(self) -> tuple[Console, bool]:
        """Return the console for progress, and whether to draw on it."""
        errors = Console(stderr=True)
        # Drawing progress would erase what the reader of a pipe prints on the terminal.
        is_hidden = errors.is_dumb_terminal or is_quiet.get() or self.in_pipe
        draws = errors.file.isatty() and not is_hidden
        # Two consoles on one terminal would draw over each other.
        return (self if draws and self.on_terminal else errors), draws
