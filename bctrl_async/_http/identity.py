"""Compare an answer with the request: is it about the runtime that was asked for? Sans-IO."""

from __future__ import annotations

import re
from functools import lru_cache
from unicodedata import normalize
from uuid import UUID

import msgspec

from bctrl_async._http.redaction import bearer_key, sanitize
from bctrl_async.errors import BctrlResponseError
from bctrl_async.models import Runtime

_is_uuid = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE).fullmatch


class Names(msgspec.Struct, rename="camel"):
    """The names in an answer that is not a valid Runtime."""

    alias: str
    id: str = ""
    workspace_id: str = ""


_decode_names = msgspec.json.Decoder(Names).decode


def names_in(body: bytes) -> Names | None:
    """Return the names in a body that is not a valid Runtime, or None."""
    try:
        return _decode_names(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


def check_answer(
    parsed: object,
    workspace_id: str,
    alias: str | None,
    authorization: str,
    request_id: str | None = None,
) -> BctrlResponseError | None:
    """Return an error if an answer belongs to another request.

    Args:
        parsed: The parsed body, or the names in it; of a list, the first runtime is compared.
        workspace_id: The workspace that was asked for; compared if it is a UUID.
        alias: The alias that was asked for, None for a list. The server may know it as the
            runtime's id, and may write it in another case or Unicode normalization form.
        authorization: The `Authorization` header that was sent, to keep the key out of the error.
        request_id: The server's id of the request that it answers.
    """
    if type(parsed) is Runtime and parsed.alias == alias and _is_in(parsed, workspace_id):
        return None
    if isinstance(parsed, list):
        parsed = next((item for item in parsed if isinstance(item, Runtime)), None)
    if not isinstance(parsed, Runtime | Names):
        return None
    if (alias is None or _is_named(parsed, alias)) and _is_in(parsed, workspace_id):
        return None
    other = sanitize(parsed.alias, bearer_key(authorization)) or ""
    return BctrlResponseError(
        f"the server answered about runtime {other!r} in workspace {str(parsed.workspace_id)!r}, "
        "which was not asked for",
        advice="Retrying is safe. If a mock server answers with made-up data, pass "
        "check_answers=False to the session",
        # It says nothing about this request, so it has no status.
        may_have_stopped=True,
        request_id=request_id,
    )


def _is_named(runtime: Runtime | Names, alias: str) -> bool:
    if runtime.alias == alias:
        return True
    folded = _fold(alias)
    known_id = str(runtime.id).replace("-", "").lower()
    return folded == _fold(runtime.alias) or (
        known_id != "" and folded.replace("-", "") == known_id
    )


def _fold(text: str) -> str:
    # Case folding may undo the normalization.
    return normalize("NFC", normalize("NFC", text).casefold())


def _is_in(runtime: Runtime | Names, workspace_id: str) -> bool:
    # A name is not compared: the answer does not repeat it.
    known_id = _as_uuid(workspace_id)
    answered = runtime.workspace_id
    if known_id is None or answered == known_id:
        return True
    return isinstance(answered, str) and answered.lower() in {"", workspace_id.lower()}


@lru_cache(maxsize=64)
def _as_uuid(text: str) -> UUID | None:
    """Return the UUID that a text is, in its usual form; None if it is anything else."""
    return UUID(text) if _is_uuid(text) else None
