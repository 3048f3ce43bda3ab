"""The options `--verbose` and `--quiet`: how much is printed on stderr."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated

import typer

from bctrl_async.cli._output import is_quiet, print_log

# A filter may be mistyped, a run may skip runtimes that were started anew, or exceed a rate that it
# shares: the user must see these warnings.
_ALWAYS_SHOWN = ("bctrl_async.filters", "bctrl_async.journal", "bctrl_async.pace")

_option = partial(typer.Option, rich_help_panel="Output")


class LogPrinter(logging.Handler):
    """A handler that prints log records on stderr: some warnings always, all if verbose."""

    verbose = False

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record as one line."""
        is_warning = record.levelno >= logging.WARNING
        if self.verbose or (is_warning and record.name in _ALWAYS_SHOWN):
            print_log(record.levelname.lower(), record.getMessage())


LOG_PRINTER = LogPrinter()
"""The only handler: without one, Python prints warnings to stderr, into the live display."""


@contextmanager
def verbosity(
    context: typer.Context,
    *,
    verbose: Annotated[
        bool, _option("--verbose", "-v", metavar="", help="Print what is retried, and why.")
    ] = False,
    quiet: Annotated[
        bool, _option("--quiet", "-q", metavar="", help="Print only results and errors.")
    ] = False,
) -> Iterator[None]:
    """Print more or less on stderr. Each keyword is an option of the commands that have it."""
    if verbose and quiet:
        context.fail("--verbose cannot be combined with --quiet")
    logger = logging.getLogger("bctrl_async")
    level, token = logger.level, is_quiet.set(quiet)
    LOG_PRINTER.verbose = verbose
    if verbose:
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        LOG_PRINTER.verbose = False
        is_quiet.reset(token)
