"""Options that several commands share, and what their mistakes are called."""

import os
from collections.abc import Callable
from typing import Annotated, Any, cast

import typer

from bctrl_async import BctrlAuthenticationError, BctrlConfigError, BctrlError, RuntimeFilter
from bctrl_async.cli import _find, _output

FAILED, USAGE = 1, 2
_MOST_RUNTIMES = 100_000

# What the session says of an argument, and what to do about it here.
_URL_ADVICE = "use https, or http on this machine"
SECONDS_ADVICE = "give seconds above 0"
_ARGUMENTS = {
    "base_url": ("--base-url", _URL_ADVICE),
    "BCTRL_BASE_URL": ("BCTRL_BASE_URL", _URL_ADVICE),
    "timeout": ("--timeout", SECONDS_ADVICE),
    "max_connections": ("--concurrency", "give a whole number from 1"),
    "rate": ("--rate", "give a number above 0"),
    "deadline": ("--deadline", SECONDS_ADVICE),
}

# Typer brings its own click or imports it, by version; this is either one's class.
UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])


def option(text: str, metavar: str | None = None, *names: str) -> Any:  # noqa: ANN401 - what typer.Option returns.
    # Typer's versions differ in how they show a default, so the text has it.
    return typer.Option(*names, help=text, metavar=metavar, show_default=False)


Kind = Annotated[str | None, option("Only of this kind, such as browser.", "KIND")]
OlderThan = Annotated[str | None, option("Only older ones; such as 90s, 15m, 2h, 1d.", "AGE")]
BaseUrl = Annotated[str | None, option("Where the API is; default is BCTRL_BASE_URL.", "URL")]
Timeout = Annotated[float, option("What one attempt may take; default 60.", "SECONDS")]


def wanted(status: str | None, kind: str | None, older_than: str | None) -> RuntimeFilter:
    try:
        return _find.condition(status, kind, older_than)
    except ValueError as error:
        raise UsageError(str(error)) from error


def api_key(*, needed: bool) -> str:
    key = os.environ.get("BCTRL_API_KEY")
    if needed and not key:
        raise UsageError("there is no API key: set BCTRL_API_KEY")
    return key or "dry-run"


def told(run: Callable[[], int]) -> int:
    """Run something of which errors are one line on stderr."""
    try:
        return run()
    except BctrlConfigError as error:
        raise _mistake(error) from error
    except BctrlError as error:
        _output.complain(str(error))
        return code_of(error)


def code_of(*errors: BctrlError | None) -> int:
    """Return the exit code of what has failed: the same again is of use, or it is not."""
    is_refused = any(isinstance(error, BctrlAuthenticationError) for error in errors)
    return USAGE if is_refused else FAILED


def _mistake(error: BctrlConfigError) -> Exception:
    """Say of an argument's error which option it is."""
    name, _, problem = error.summary.partition(" ")
    if name in _ARGUMENTS:
        name, advice = _ARGUMENTS[name]
        return UsageError(f"{name} {problem}: {advice}")
    advice = "correct BCTRL_API_KEY" if "API key" in error.summary else error.advice or ""
    return UsageError(f"{error.summary}: {advice[:1].lower()}{advice[1:]}")


def check_runtimes(count: int, *, at_least: int) -> None:
    if not at_least <= count <= _MOST_RUNTIMES:
        raise UsageError(f"--runtimes is {count}: give {at_least} to {_MOST_RUNTIMES}")
