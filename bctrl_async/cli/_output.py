"""The command's stdout and stderr, and the words that several commands share."""

import errno
import json
import logging
import os
import re
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
from pathlib import Path

from msgspec.structs import replace
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from bctrl_async import BctrlConfigError, BctrlError, StopReport, StopResult
from bctrl_async._kinds import kind_of
from bctrl_async.errors import quote, subject_of

FAILED = 1
"""The exit code if some runtimes run, or may run: a second run may help."""
USAGE = 2
"""The exit code of a usage or configuration error: a second run would fail, too."""
IN_USE = 75
"""The exit code if the journal is in use, so that a later run may help: EX_TEMPFAIL."""
INTERRUPTED = 130
"""The exit code after Ctrl-C."""

MAX_SHOWN = 10
"""The most invalid or unreadable targets that are shown one by one."""
_MAX_WIDTH = 28
"""The most characters to which a column is padded."""
WRITE_ERRORS = frozenset({errno.EBADF, errno.EIO, errno.ENOSPC, errno.EPIPE})
# A filter may be mistyped, a run may skip runtimes that were started anew, exceed a
# rate that it shares, or have few connections: the user must see these warnings.
_IMPORTANT = {
    f"bctrl_async.{name}" for name in ("capacity", "cli", "filters", "journal", "pace")
}
_replace_colon = re.compile("^( *):(?=:)", re.MULTILINE).sub
is_quiet: ContextVar[bool] = ContextVar("is_quiet", default=False)


class _LogPrinter(logging.Handler):
    """A handler that prints some warnings on stderr, and all records if verbose."""

    verbose = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        is_warning = record.levelno >= logging.WARNING
        is_important = is_warning and record.name in _IMPORTANT
        if self.verbose or (is_important and not is_quiet.get()):
            level = record.levelname.lower()
            _print_line(f"bctrl-async: {level}: {record.getMessage()}")


LOG_PRINTER = _LogPrinter()
"""The only handler: without it, Python prints warnings into the live display."""


def set_verbosity(*, verbose: int, quiet: bool) -> None:
    """Set how much is printed on stderr, for the whole process."""
    if verbose and quiet:
        raise BctrlConfigError("--verbose cannot be combined with --quiet")
    LOG_PRINTER.verbose = verbose
    is_quiet.set(quiet)
    logger = logging.getLogger("bctrl_async")
    logger.addHandler(LOG_PRINTER)
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    logger.getChild("wire").setLevel(logging.DEBUG if verbose > 1 else logging.NOTSET)


def exit_code_of(errors: Iterable[BctrlError | None]) -> int:
    """Return the exit code of a command that failed with these errors."""
    codes = [kind_of(error).exit_code for error in errors if error is not None]
    return max(codes, default=FAILED)


def pluralize(count: int, noun: str) -> str:
    """Return a count with its noun, such as `1 stop` or `2,000 stops`."""
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {noun}s"


def escape(text: str) -> str:
    """Return visible text unchanged, and other text, such as `'a '`, as a literal."""
    # The repr of an enum's member would show its Python name.
    text = str.__str__(text)
    if text and text.isprintable() and text == text.strip():
        return _neutralize(text)
    return _neutralize(ascii(text))


def describe(error: BctrlError) -> str:
    """Return an error's text without its target, with at most one piece of advice."""
    shown = copy(error)
    if error.advice:
        # The hint is the API's own advice.
        shown.hint = None
    return str(shown).removeprefix(subject_of(error))


def name_call(error: BctrlError) -> str:
    """Return the start of an error's text, such as `could not get 'crm': `."""
    if error.alias is not None:
        return f"could not {error.operation} {quote(error.alias)}: "
    if error.workspace_id is not None:
        return f"could not {error.operation} workspace {quote(error.workspace_id)}: "
    return ""


def format_counts(counts: Counter[StopResult]) -> str:
    """Return the counts that are not 0."""
    return ", ".join(
        f"{counts[result]:,} {result}" for result in StopResult if counts[result]
    )


def summarize(report: StopReport, *, is_interrupted: bool) -> str:
    """Return the last line of a run, without the reason for an early end."""
    summary = str(replace(report, ended_early=None))
    if is_interrupted:
        return f"Interrupted: {summary}"
    return summary


def width_of(texts: Iterable[str]) -> int:
    """Return the width of a column of texts."""
    return min(max(map(cell_len, texts), default=_MAX_WIDTH), _MAX_WIDTH)


def pad(text: str, width: int) -> str:
    """Return a text as wide as its column; a longer text moves the rest of its line."""
    return text + " " * (width - cell_len(text))


def _neutralize(text: str) -> str:
    """Escape what a terminal or a CI system would obey or hide, except newlines."""
    text = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
    # GitHub obeys `::name::` at the start of a line, and like Azure Pipelines and
    # TeamCity what follows `##` anywhere, such as `##vso[name]`.
    return _replace_colon(r"\1\\x3a", text).replace("##", r"#\x23")


def one_line(text: str) -> str:
    """Return text on one line, with its unprintable characters escaped."""
    return _neutralize(" ".join(text.split()))


def check_input(file: Path) -> None:
    """Raise a ValueError if stdout or stderr goes to this file, as `cat` does."""
    outputs = [name for name in ("stdout", "stderr") if _goes_to(name, file)]
    if not outputs:
        return
    if "stderr" in outputs:
        # The error would stand in the file, too.
        sys.stderr = None if "stdout" in outputs else sys.stdout
    raise ValueError(
        f"{outputs[0]} goes to {str(file)!r}: redirect {outputs[0]} to another file"
    )


def _goes_to(output: str, file: Path) -> bool:
    # The shell may have closed it, and the file may not exist.
    with suppress(OSError, AttributeError):
        status = os.fstat(getattr(sys, output).fileno())
        return stat.S_ISREG(status.st_mode) and os.path.samestat(status, file.stat())
    return False


def print_error(error: str | BctrlError) -> None:
    """Print an error on stderr as one line, or two on a narrow terminal."""
    if isinstance(error, str):
        _print_line(f"bctrl-async: error: {one_line(error)}")
        return
    line = f"bctrl-async: error: {one_line(name_call(error) + describe(error))}"
    if error.advice and 0 < _columns() < len(line):
        # The advice moves from the end of the line to a line of its own.
        advice = one_line(error.advice).rstrip(".")
        line = line.removesuffix(f". {advice}") + f"\n{advice}"
    _print_line(line)


def print_info(line: str) -> None:
    """Print on stderr a line that is not a result, unless --quiet is given."""
    if not is_quiet.get():
        _print_line(line)


def _columns() -> int:
    """Return the width of the terminal on stderr, 0 if there is none."""
    if sys.stderr is None or not sys.stderr.isatty():
        return 0
    return shutil.get_terminal_size().columns


def _print_line(line: str) -> None:
    if sys.stderr is None:  # The shell has closed stderr, and `print` would use stdout.
        return
    lines = _neutralize(line).split("\n")
    columns = _columns()
    if columns:
        # A terminal would break lines within words.
        wrap = partial(textwrap.fill, break_long_words=False, break_on_hyphens=False)
        lines = [wrap(text, columns) for text in lines]
    with suppress(OSError):
        text = "\n".join(lines)
        print(text, file=sys.stderr, flush=True)  # noqa: T201 - rich may be drawing.


class Output(Console):
    """Stdout, for results.

    If writing fails (`| head`, a full disk), no more results are printed, and the stops
    go on.
    """

    def __init__(self, *, prints_json: bool = False) -> None:
        if sys.stdout is None:
            # The shell has closed stdout. Rich would drop the results; writing fails.
            sys.stdout = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w")
        super().__init__(highlight=False, markup=False, emoji=False)
        self.prints_json = prints_json
        self.shows_progress = True
        self.write_failed = False
        """True if results were lost, other than to a reader that left (`| head`)."""
        self.in_pipe = False
        """True if stdout is or was a pipe, whose reader prints later."""
        with suppress(OSError):  # Stdout may be closed.
            self.in_pipe = stat.S_ISFIFO(os.fstat(self.file.fileno()).st_mode)

    def print_result(self, result: str | Text, *, is_exact: bool = False) -> None:
        """Print a line, which wraps on a terminal unless it is exact."""
        is_terminal = self.on_terminal
        # A program that reads exact text must get every character.
        if isinstance(result, str) and (is_terminal or not is_exact):
            result = _neutralize(result)
        try:
            if isinstance(result, Text) or is_terminal:
                self.print(result, soft_wrap=is_exact or not is_terminal)
            # `fail` sets `quiet`, a switch of rich, and --quiet sets `is_quiet`.
            elif not self.quiet:
                # A million lines of JSON would cost rich half a minute.
                self.file.write(f"{result}\n")
                self.file.flush()
        except OSError as error:
            self.fail(error)

    def print_object(self, fields: Mapping[str, object]) -> None:
        """Print an object as JSON on one line, in ASCII."""
        # Two of these characters may start a command of a CI system.
        line = json.dumps(fields).replace("##", r"#\u0023")
        self.print_result(line, is_exact=True)

    def print_summary(self, summary: str, *, is_needed: bool = False) -> None:
        """Print the last line; with --quiet, only if it is needed."""
        if self.prints_json:
            print_info(summary)
        elif is_needed or not is_quiet.get():
            self.print_result(summary)

    def exit_code(self, *, is_failure: bool = False) -> int:
        """Return the exit code of a command; lost results are a failure, too."""
        if is_failure or self.write_failed:
            return FAILED
        return 0

    def fail(self, error: OSError) -> None:
        """Print no more results; report the error unless the reader left (`| head`)."""
        self.quiet = True
        # Buffered text would fail again when it is flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            self.write_failed = True
            print_error(f"cannot write to stdout: {error.strerror}")

    def on_broken_pipe(self) -> None:
        """Print no more results; rich would exit and leave stops without an outcome."""
        self.fail(BrokenPipeError())

    @property
    def on_terminal(self) -> bool:
        """True if stdout is a terminal, whatever FORCE_COLOR says."""
        return self.file.isatty() and not self.is_dumb_terminal

    def progress_console(self) -> tuple[Console, bool]:
        """Return the console for progress, and whether to draw on it."""
        stderr = Console(stderr=True)
        is_terminal = stderr.file.isatty() and not stderr.is_dumb_terminal
        # Drawing progress would erase what the reader of a pipe prints on the terminal.
        if is_quiet.get() or self.in_pipe or not is_terminal:
            return stderr, False
        if self.on_terminal:
            # Two consoles on one terminal would draw over each other.
            return self, True
        return stderr, True
