"""The items of an input: targets, and lines that are not targets."""

import re
from collections.abc import Mapping

from bctrl_async import RuntimeRef, StopOutcome

MAX_LENGTH = 2**20
"""The number of characters that an item may have; a longer one is not held in memory."""

_MAX_SHOWN = 60
_find_control_character = re.compile(r"[\x00-\x1f\x7f-\x9f]").search
_WORKSPACE_KEYS = ("workspace_id", "workspaceId", "workspace")
_ALIAS_KEYS = ("alias", "name")


class BadLine(ValueError):  # noqa: N818 - it takes the place of a target, and is not raised.
    """A line that is not a target; the bulk stop rejects it and shows its repr and its reason.

    Args:
        number: The number of the line, from 1.
        text: The line; only its beginning is kept.
        reason: The reason why it is not a target.
        ends_input: True if nothing after it is read.

    Attributes:
        ends_input: True if nothing after it is read.
    """

    def __init__(self, number: int, text: str, reason: str, *, ends_input: bool = False) -> None:
        super().__init__(f"{reason}{'; nothing after it was read' * ends_input}")
        self._number = number
        self._text = text.strip(" \r\n")[:_MAX_SHOWN]
        self.ends_input = ends_input

    def __repr__(self) -> str:
        return f"{self._text!r} on line {self._number}"


Item = RuntimeRef | BadLine


def ends_input(outcome: StopOutcome) -> bool:
    """Return True if this is the outcome of a bad line after which nothing is read."""
    bad = None if outcome.error is None else outcome.error.__cause__
    return isinstance(bad, BadLine) and bad.ends_input


def to_item(number: int, text: str, workspace_id: object, alias: object) -> Item:
    """Return a target, or a bad line if the values are not the names of a runtime.

    Args:
        number: The number of the line.
        text: The text of the item.
        workspace_id: The workspace id, None if it is missing.
        alias: The alias, None if it is missing.
    """
    reason = _reason("workspace id", workspace_id) or _reason("alias", alias)
    if reason is not None:
        return BadLine(number, text, reason)
    return RuntimeRef(str(workspace_id), str(alias))


def from_json(number: int, text: str, value: object) -> Item:
    """Return the item of a JSON value, an object or a pair.

    Args:
        number: The number of the line on which it begins.
        text: The text of the item.
        value: The value.
    """
    match value:
        case dict():
            return to_item(number, text, _first(value, _WORKSPACE_KEYS), _first(value, _ALIAS_KEYS))
        case [workspace_id, alias]:
            return to_item(number, text, workspace_id, alias)
    return BadLine(number, text, "the list is not a pair")


def _first(value: Mapping[str, object], keys: tuple[str, ...]) -> object:
    return next((value[key] for key in keys if key in value), None)


def _reason(kind: str, name: object) -> str | None:
    """Return the reason why a value is not a name, None if it is one."""
    if not isinstance(name, str):
        return f"the {kind} is {'missing' if name is None else 'not text'}"
    if not name:
        return f"the {kind} is empty"
    if name.isprintable():
        return None
    if _find_control_character(name):
        return f"the {kind} contains a control character"
    # Bytes that are not UTF-8 were decoded as lone surrogates.
    try:
        name.encode()
    except UnicodeEncodeError:
        return f"the {kind} is not UTF-8"
    return None
