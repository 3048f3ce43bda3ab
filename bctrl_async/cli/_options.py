"""Options: their groups in the help, the conversion of their values, and durations."""

import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from cyclopts import Group, Parameter, Token, validators

from bctrl_async import RuntimeKind, RuntimeStatus
from bctrl_async.cli._output import check_input

_T = TypeVar("_T")

MAX_RUNTIMES = 100_000
STDIN = Path("-")
"""The FILE `-`. Compare it by identity: the path of a file `./-` is equal to it."""
_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_NUMBER = r"[0-9]{1,12}(?:\.[0-9]{1,12})?"
# Each unit may be given once, the longest first.
_match_duration = re.compile(
    "".join(f"(?:({_NUMBER}){unit})?" for unit in _UNITS)
).fullmatch


def converter(parse: Callable[[str], _T]) -> Callable[[object, Sequence[Token]], _T]:
    """Return the converter of an option that takes one value."""

    def convert(_: object, tokens: Sequence[Token]) -> _T:
        return parse(tokens[0].value)

    return convert


def _text(value: str) -> str:
    """Reject an empty text, which often comes from an unset shell variable."""
    if not value:
        raise ValueError("must not be empty")
    return value


def _file(value: str) -> Path:
    if value == "-":
        return STDIN
    file = Path(_text(value))
    check_input(file)
    return file


def duration(value: str) -> float:
    """Return a duration such as 500ms, 90s, 15m, 2h30m or 1.5d in seconds.

    A unit is required: a bare 90 could be taken for minutes. Only 0 needs none.
    """
    if value == "0":
        return 0.0
    # An empty text matches, because no unit is required by the pattern.
    match = _match_duration(value)
    if not value or match is None:
        raise ValueError(
            f"{value!r} is not a duration such as 500ms, 90s, 15m, 2h30m or 1d"
        )
    numbers = zip(match.groups("0"), _UNITS.values(), strict=True)
    return sum(float(number) * seconds for number, seconds in numbers)


def _whole(value: str) -> int:
    if not re.fullmatch("-?[0-9]+", value):
        raise ValueError(f"{value!r} is not a whole number")
    return int(value)


def _number(value: str) -> float:
    with suppress(ValueError):
        number = float(value)
        if math.isfinite(number):
            return number
    raise ValueError(f"{value!r} is not a number")


def whole_number(least: int | None = None, most: int | None = None) -> Parameter:
    """Return the parameter of a whole number within bounds."""
    bounds = validators.Number(gte=least, lte=most)
    return Parameter(metavar="N", converter=converter(_whole), validator=bounds)


# These are groups of the help. The last value of an option wins, so that a user can
# override a script, but options that decide what is stopped, or where that is recorded,
# cannot be repeated.
in_targets = partial(
    Parameter, group=Group("Targets", sort_key=0), allow_repeating=False
)
in_filters = partial(
    Parameter, group=Group("Filters", sort_key=1), allow_repeating=False
)
in_run = partial(Parameter, group=Group("Run", sort_key=2), allow_repeating=False)
in_pace = partial(Parameter, group=Group("Pace", sort_key=3))
in_output = partial(Parameter, group=Group("Output", sort_key=4))
in_connection = partial(Parameter, group=Group("Connection", sort_key=5))

# A flag may be repeated: the effect is the same.
in_flags = partial(in_targets, allow_repeating=True, show_default=False)
in_run_flags = partial(in_run, allow_repeating=True, show_default=False)
in_output_flags = partial(in_output, show_default=False)

Quiet = Annotated[
    bool, in_output_flags(alias="-q", help="Print nothing but errors on stderr.")
]
_above_0 = validators.Number(gt=0)
Text = Annotated[str, Parameter(converter=converter(_text))]
File = Annotated[Path, Parameter(converter=converter(_file), metavar="FILE")]
Wait = Annotated[float, Parameter(converter=converter(duration), metavar="DURATION")]
Duration = Annotated[Wait, Parameter(validator=_above_0)]
Count = Annotated[int, whole_number(1)]
Rate = Annotated[
    float, Parameter(metavar="N", converter=converter(_number), validator=_above_0)
]

with_status = partial(
    in_filters,
    "--status",
    metavar="STATUS",
    completer=lambda _: [*RuntimeStatus, "any"],
)
Kind = Annotated[
    Text | None,
    in_filters(
        "--kind",
        metavar="KIND",
        completer=lambda _: [*RuntimeKind],
        help="Only of this kind, such as browser.",
    ),
]
OlderThan = Annotated[
    Duration | None,
    in_filters(
        "--older-than", metavar="AGE", help="Only older than AGE: 90s, 15m, 2h30m, 1d."
    ),
]
Alias = Annotated[
    Text | None,
    in_filters(
        "--alias", metavar="PATTERN", help="Only aliases that match, such as 'ci-*'."
    ),
]
in_files = partial(in_targets, "--from", allow_leading_hyphen=True)
AllowEmpty = Annotated[bool, in_flags(help="Accept a FILE without targets.")]
JournalMaxAge = Annotated[
    Duration | None,
    in_run(metavar="AGE", help="Reject a journal that is older than AGE."),
]
IgnoreNotFound = Annotated[
    bool, in_run_flags(help="Do not count not_found as a failure.")
]
Seed = Annotated[int, whole_number(), Parameter(help="Random seed of the faults.")]
Format = Annotated[
    Literal["table", "json"],
    in_output(("--output", "-o"), metavar="FORMAT", help="json is an object per line."),
]
in_workspace = partial(in_targets, ("--workspace", "-w"), metavar="ID")
Workspace = Annotated[
    Text | None,
    in_workspace(help="Workspace id; by default from BCTRL_WORKSPACE or the profile."),
]
Names = Annotated[
    Text,
    Parameter(
        "WORKSPACE|ALIAS", help="Aliases, after their workspace unless -w names it."
    ),
]
