"""Checks of the emulator's arguments. Every error is a ValueError that says what to give."""

import math


def check_type(name: str, value: object, *types: type) -> None:
    """Raise an error unless an argument is of one of some types; a bool is not a number."""
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        wanted = " or ".join(kind.__name__ for kind in types)
        kind = type(value).__name__
        raise ValueError(f"{name} is {value!r:.50}: give {wanted}, not {kind}")


def check_texts(**texts: object) -> None:
    """Raise an error unless arguments are text or None."""
    for name, value in texts.items():
        if value is not None:
            check_type(name, value, str)


def check_seconds(**times: float) -> None:
    """Raise an error unless arguments are finite numbers of at least 0."""
    for name, value in times.items():
        check_type(name, value, int, float)
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}: give seconds, finite and not negative")
