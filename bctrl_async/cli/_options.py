"""Options that several commands share, and checks of option values."""

import math
import os
import re
from functools import partial
from typing import Annotated

import typer

from bctrl_async import RuntimeFilter, RuntimeKind, RuntimeStatus

MAX_RUNTIMES = 100_000
_ANY = "any"
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_is_age = re.compile(r"(\d{1,12}(?:\.\d{1,12})?)([smhd]?)").fullmatch


def check_positive(value: float | None) -> float | None:
    """Reject a number that is not finite and above 0."""
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter(f"{value} is not a positive number")
    return value


def check_not_empty(value: str | None) -> str | None:
    """Reject an empty text, which often comes from an unset shell variable."""
    if value == "":
        raise typer.BadParameter("must not be empty")
    return value


def parse_age(text: str) -> float:
    """Return an age such as 90, 90s, 15m, 2h or 1.5d in seconds."""
    age = _is_age(text)
    seconds = float(age[1]) * _SECONDS[age[2]] if age else 0.0
    if not seconds:
        raise typer.BadParameter(f"{text!r} is not an age such as 90s, 15m, 2h or 1d")
    return seconds


_filter = partial(typer.Option, rich_help_panel="Filters")
_connection = partial(typer.Option, rich_help_panel="Connection")
status_option = partial(
    _filter, "--status", metavar="STATUS", autocompletion=lambda: [*map(str, RuntimeStatus), _ANY]
)

Kind = Annotated[
    str | None,
    _filter(
        "--kind",
        metavar="KIND",
        help="Only of this kind, such as browser.",
        autocompletion=lambda: [*map(str, RuntimeKind)],
    ),
]
OlderThan = Annotated[
    float | None,
    _filter(
        "--older-than",
        metavar="AGE",
        parser=parse_age,
        help="Only older than AGE: 90s, 15m, 2h, 1d.",
    ),
]
Timeout = Annotated[
    float,
    _connection(
        "--timeout", metavar="SECONDS", callback=check_positive, help="Time limit of one attempt."
    ),
]
BaseUrl = Annotated[
    str | None,
    _connection(
        "--base-url",
        metavar="URL",
        envvar="BCTRL_BASE_URL",
        show_default="https://api.bctrl.ai",
        help="URL of the API.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Random seed of the faults.")]


def build_filter(status: str | None, kind: str | None, older_than: float | None) -> RuntimeFilter:
    """Return the filter of the options; None and the status `any` match everything."""
    return RuntimeFilter(
        status=None if status == _ANY else status, kind=kind, older_than=older_than
    )


def require_api_key(context: typer.Context) -> str:
    """Return BCTRL_API_KEY, or fail if it is not set."""
    return os.environ.get("BCTRL_API_KEY") or context.fail("no API key: set BCTRL_API_KEY")
