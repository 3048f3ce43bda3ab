"""Options that several commands share, and checks of option values."""

import math
import re
from functools import partial
from typing import Annotated

import typer

from bctrl_async import RuntimeKind, RuntimeStatus

MAX_RUNTIMES = 100_000
_ANY = "any"
_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_NUMBER = r"[0-9]{1,12}(?:\.[0-9]{1,12})?"
_is_number = re.compile(_NUMBER).fullmatch
# Each unit at most once, the longest first.
_is_duration = re.compile("".join(f"(?:({_NUMBER}){unit})?" for unit in _UNITS)).fullmatch


def check_positive(value: float | None) -> float | None:
    """Reject a number that is not finite and above 0."""
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter(f"{value:g} is not a positive number")
    return value


def check_not_empty(value: str | None) -> str | None:
    """Reject an empty text, which often comes from an unset shell variable."""
    if value == "":
        raise typer.BadParameter("must not be empty")
    return value


def duration(value: str | float) -> float:
    """Return a duration such as 500ms, 90s, 15m, 2h30m or 1.5d in seconds.

    A unit is required: a bare 90 could be taken for minutes. Only 0 needs none. A number is
    returned as it is, because typer also parses defaults.
    """
    if isinstance(value, float):
        return value
    if _is_number(value):
        if not float(value):
            return 0.0
        raise typer.BadParameter(f"{value!r} has no unit: write {value}s, {value}m or {value}h")
    parts = _is_duration(value)
    if not value or parts is None:
        raise typer.BadParameter(
            f"{value!r} is not a duration such as 500ms, 90s, 15m, 2h30m or 1d"
        )
    numbers = zip(parts.groups("0"), _UNITS.values(), strict=True)
    return sum(float(number) * seconds for number, seconds in numbers)


def format_duration(seconds: float) -> str:
    """Return seconds in their two largest units, such as 2h30m, as `duration` reads them."""
    left = int(max(seconds, 0))
    parts: list[str] = []
    for unit in "dhms":
        count, left = divmod(left, int(_UNITS[unit]))
        if count or parts:
            parts.append(f"{count}{unit}" if count else "")
    return "".join(parts[:2]) or "0s"


# Each option of these groups may be given once.
target_option = partial(typer.Option, rich_help_panel="Targets")
run_option = partial(typer.Option, rich_help_panel="Run")
_filter = partial(typer.Option, rich_help_panel="Filters")
status_option = partial(
    _filter,
    "--status",
    metavar="STATUS",
    callback=check_not_empty,
    autocompletion=lambda: [*map(str, RuntimeStatus), _ANY],
)

Kind = Annotated[
    str | None,
    _filter(
        "--kind",
        metavar="KIND",
        callback=check_not_empty,
        help="Only of this kind, such as browser.",
        autocompletion=lambda: [*map(str, RuntimeKind)],
    ),
]
OlderThan = Annotated[
    float | None,
    _filter(
        "--older-than",
        metavar="AGE",
        parser=duration,
        callback=check_positive,
        help="Only older than AGE: 90s, 15m, 2h30m, 1d.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Random seed of the faults.")]

AllowEmpty = Annotated[
    bool, target_option("--allow-empty", metavar="", help="Accept a FILE without targets.")
]
JournalMaxAge = Annotated[
    float | None,
    run_option(
        "--journal-max-age",
        metavar="AGE",
        parser=duration,
        callback=check_positive,
        help="Reject a journal begun longer ago than AGE.",
    ),
]
IgnoreNotFound = Annotated[
    bool, run_option("--ignore-not-found", metavar="", help="Do not count not_found as a failure.")
]
