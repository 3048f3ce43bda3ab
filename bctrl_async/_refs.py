"""References to runtimes, made from the items of a list."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Set as AbstractSet
from contextlib import suppress
from uuid import UUID

from bctrl_async.errors import BctrlConfigError, quote
from bctrl_async.models import Runtime, RuntimeRef

PAIR = 2


def as_target(item: object) -> RuntimeRef:
    """Return a runtime or any pair of strings, such as a row of a CSV, as a target.

    Other items raise BctrlConfigError.
    """
    # Most items are RuntimeRefs or tuples; this check costs a third of the general.
    if (type(item) is RuntimeRef or type(item) is tuple) and len(item) == PAIR:
        workspace_id, alias = item
        if type(workspace_id) is str and type(alias) is str:
            if type(item) is RuntimeRef:
                return item
            return RuntimeRef(workspace_id, alias)
    match parts(item):
        case (str() | UUID() as workspace_id, str() as alias):
            return RuntimeRef(as_text(workspace_id), as_text(alias))
    raise BctrlConfigError(
        f"invalid target {quote(item)}: expected (workspace id, alias)",
        reason_class="invalid_input",
    )


def parts(item: object) -> tuple[object, ...]:
    """Return the parts of a row, or the names of a runtime, or an empty tuple."""
    if isinstance(item, tuple):
        return item
    if isinstance(item, Runtime):
        return item.workspace_id, item.alias
    # A lazily loaded row may raise on access; treat it as invalid.
    with suppress(Exception, asyncio.CancelledError):
        if isinstance(item, str | bytes | Mapping | AbstractSet):
            return ()
        if isinstance(item, Collection):
            return tuple(item)
    return ()


def as_text(value: object) -> str:
    """Return the text of a string or a UUID; the repr of any other value, shortened."""
    if isinstance(value, str):
        # `str()` of an enum's member may be its Python name.
        return str.__str__(value)
    if isinstance(value, UUID):
        return str(value)
    return quote(value)
