"""Options that several commands share, and the checks of their values."""

import math
import os
import re
from typing import Annotated

import typer

from bctrl_async import RuntimeFilter, RuntimeKind, RuntimeStatus

MAX_RUNTIMES = 100_000
FILTERS, CONNECTION, OUTPUT = "Filters", "Connection", "Output"
_ANY = "any"
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_is_age = re.compile(r"(\d{1,12}(?:\.\d{1,12})?)([smhd]?)").fullmatch


def check_positive(value: float | None) -> float | None:
    """Check a number that must be finite and above 0."""
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter(f"{value} is not a positive number")
    return value


def check_not_empty(value: str | None) -> str | None:
    """Check a text: an empty one often comes from a variable that is not set."""
    if value == "":
        raise typer.BadParameter("it is empty")
    return value


def parse_age(text: str) -> float:
    """Return the seconds of an age such as 90, 90s, 15m, 2h or 1.5d."""
    age = _is_age(text)
    seconds = float(age[1]) * _SECONDS[age[2]] if age else 0.0
    if not seconds:
        raise typer.BadParameter(f"{text!r} is not an age such as 90s, 15m, 2h or 1d")
    return seconds


def complete_status() -> list[str]:
    """Return the statuses that a shell can complete."""
    return [*map(str, RuntimeStatus), _ANY]


Kind = Annotated[
    str | None,
    typer.Option(
        "--kind",
        metavar="KIND",
        help="Only of this kind, such as browser.",
        autocompletion=lambda: list(map(str, RuntimeKind)),
        rich_help_panel=FILTERS,
    ),
]
OlderThan = Annotated[
    float | None,
    typer.Option(
        "--older-than",
        metavar="AGE",
        parser=parse_age,
        help="Only older ones; such as 90s, 15m, 2h, 1d.",
        rich_help_panel=FILTERS,
    ),
]
Timeout = Annotated[
    float,
    typer.Option(
        "--timeout",
        metavar="SECONDS",
        callback=check_positive,
        help="What one attempt may take.",
        rich_help_panel=CONNECTION,
    ),
]
BaseUrl = Annotated[
    str | None,
    typer.Option(
        "--base-url",
        metavar="URL",
        envvar="BCTRL_BASE_URL",
        show_default="https://api.bctrl.ai",
        help="Where the API is.",
        rich_help_panel=CONNECTION,
    ),
]


def build_filter(status: str | None, kind: str | None, older_than: float | None) -> RuntimeFilter:
    """Return the filter of the options; the status `any` is any."""
    return RuntimeFilter(
        status=None if status == _ANY else status, kind=kind, older_than=older_than
    )


def require_api_key(context: typer.Context) -> str:
    """Return the key of the environment."""
    return os.environ.get("BCTRL_API_KEY") or context.fail("there is no API key: set BCTRL_API_KEY")
