"""The errors of this package.

One root and two branches that never overlap: a `BctrlApiError` is an answer of the
server with an error status, a `BctrlNetworkError` is the lack of a usable answer.

    BctrlError
    ├── BctrlConfigError (also ValueError)
    │   └── journal.JournalInUseError
    ├── BctrlNetworkError
    │   ├── BctrlTimeoutError (also TimeoutError)
    │   └── BctrlResponseError
    └── BctrlApiError
        ├── BctrlValidationError       400, 422
        ├── BctrlAuthenticationError   401
        ├── BctrlPermissionError       403
        ├── BctrlNotFoundError         404
        ├── BctrlConflictError         409
        ├── BctrlRateLimitError        429
        └── BctrlServerError           5xx
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from http import HTTPStatus
from itertools import pairwise

__all__ = [
    "BctrlApiError",
    "BctrlAuthenticationError",
    "BctrlConfigError",
    "BctrlConflictError",
    "BctrlError",
    "BctrlNetworkError",
    "BctrlNotFoundError",
    "BctrlPermissionError",
    "BctrlRateLimitError",
    "BctrlResponseError",
    "BctrlServerError",
    "BctrlTimeoutError",
    "BctrlValidationError",
]

THROTTLED = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE})
"""Statuses of a request not processed because of load (contract errors.md)."""
NOT_FOUND_CODES = frozenset({"runtime.not_found", "workspace.not_found"})
"""The codes of a workspace or an alias that does not exist (contract errors.md)."""
NOT_RUNNING_CODE = "runtime.not_active"
"""The code of an alias under which nothing runs (contract errors.md)."""

_UNITS = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))

_short_repr = reprlib.Repr()
_short_repr.maxstring = _short_repr.maxother = 100
quote: Callable[[object], str] = _short_repr.repr
"""Return the repr of a name, shortened in the middle if it is long."""


def format_duration(seconds: float | None) -> str:
    """Return seconds in their two largest units, such as 2h30m or 0.5ms; None is 0s."""
    seconds = max(seconds or 0.0, 0.0)
    if 0 < seconds < 1:
        return f"{seconds * 1000:g}ms"
    # Only whole seconds are divided into units.
    if seconds % 1:
        return f"{seconds:g}s"
    for (unit, size), (smaller_unit, smaller_size) in pairwise(_UNITS):
        if seconds >= size:
            text = f"{seconds // size:.0f}{unit}"
            count = int(seconds % size) // smaller_size
            if count:
                text += f"{count}{smaller_unit}"
            return text
    return f"{seconds:.0f}s"


@dataclass(eq=False, repr=False)
class BctrlError(Exception):
    """The base class of all errors of this package.

    Errors can be pickled. An attribute that does not apply is None.

    Args:
        summary: The failure in one line, without a full stop.
        advice: The remedy, by default the advice of the class; None if there is none.
        operation: The operation of the API, such as `stop`.
        workspace_id: The workspace of the call.
        alias: The alias of the call.
        attempts: The number of requests started for this call.
        may_have_worked: True if any of these requests may have taken effect; always
            False for an operation that only reads.
        may_have_stopped: The same for a stop: the runtime may have stopped.
        accepted: True if the server accepted a stop with a 2xx status, but its answer
            has an unusable body (`BctrlNetworkError` only).
        status: The HTTP status of the last answer.
        code: The server's error code, such as `runtime.not_active`.
        message: The server's message.
        reason_class: The server's `reasonClass`, such as `conflict`; new values will
            appear. Also `invalid_input` for an id or an alias that cannot be sent.
        request_id: The server's id of the request, for its support team.
        hint: The server's advice.
        retry_after: The seconds that the server asked to wait.
        body: The first 2,048 characters of the answer's body.
        argument: The name of the argument that the error is about, such as `timeout`;
            `api_key` for an `api_key` function that was too slow.
    """

    summary: str
    _: KW_ONLY
    advice: str | None = None
    operation: str = "stop"
    workspace_id: str | None = None
    alias: str | None = None
    attempts: int = 0
    may_have_worked: bool = False
    may_have_stopped: bool = False
    accepted: bool = False
    status: int | None = None
    code: str | None = None
    message: str | None = None
    reason_class: str | None = None
    request_id: str | None = None
    hint: str | None = None
    retry_after: float | None = None
    body: str | None = None
    argument: str | None = None

    def __post_init__(self) -> None:
        self.summary = self.summary.rstrip(".")
        self.may_have_worked |= self.may_have_stopped
        if self.advice is None:
            self.advice = type(self).advice
        # Pickle calls the class with `args`, and restores the attributes afterwards.
        super().__init__(self.summary)

    def __str__(self) -> str:
        facts = []
        if self.request_id is not None:
            facts.append(f"request id {self.request_id}")
        if self.attempts > 1:
            facts.append(f"{self.attempts} attempts")
        if self.may_have_stopped:
            facts.append("the runtime may have stopped")
        text = f"{subject_of(self)}{self.summary}"
        if facts:
            text += f" ({', '.join(facts)})"
        return _joined(text, advice_of(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"


class BctrlConfigError(BctrlError, ValueError):
    """The call cannot be made: nothing was sent.

    The API key is missing, a URL, id, alias or other argument is invalid, or the
    session is closed, belongs to another event loop or was opened before a fork.
    `argument` names an invalid argument.
    """


class BctrlNetworkError(BctrlError):
    """No usable answer: connection refused, host unreachable, disconnected."""

    advice: str | None = "Check the base URL and the network; retrying is safe"


class BctrlTimeoutError(BctrlNetworkError, TimeoutError):
    """An attempt took longer than `timeout`, or an `api_key` function did.

    `status` is set if the answer had started to arrive.
    """

    advice: str | None = "Allow a longer timeout; retrying is safe"


class BctrlResponseError(BctrlNetworkError):
    """An unreadable answer: not JSON, malformed, too large, a page or a redirect."""

    advice: str | None = "Check that the base URL points to the bctrl API"


class BctrlApiError(BctrlError):
    """The server answered with an error status."""

    advice: str | None = "Retrying will not help: contact the server's support"


class BctrlValidationError(BctrlApiError):
    """400 or 422: the request is invalid and will fail again."""

    advice: str | None = "Correct the request; retrying will not help"


class BctrlAuthenticationError(BctrlApiError):
    """401: the API key is missing or invalid; every call with it will fail."""

    advice: str | None = "Check the API key"


class BctrlPermissionError(BctrlApiError):
    """403: the API key has no access to this resource."""

    advice: str | None = "Use a key with access to this workspace"


class BctrlNotFoundError(BctrlApiError):
    """404: the workspace, the alias or the path does not exist."""

    advice: str | None = "Check the workspace id, the alias and the base URL"

    @property
    def names_runtime(self) -> bool:
        """True if the API reports that the workspace or the alias does not exist.

        Its code is then `runtime.not_found` (contract) or `workspace.not_found`. Any
        other 404, such as a gateway's, says nothing about them.
        """
        return self.code in NOT_FOUND_CODES


class BctrlConflictError(BctrlApiError):
    """409: the state of the runtime does not allow a stop."""

    advice: str | None = "Check the runtime's status; retrying is safe"

    @property
    def already_stopped(self) -> bool:
        """True if nothing ran under this alias (contract: `runtime.not_active`)."""
        return self.code == NOT_RUNNING_CODE


class BctrlRateLimitError(BctrlApiError):
    """429: too many requests; the server did not process this request.

    If `status` is None, nothing was sent: an earlier `Retry-After` is longer than this
    call's patience, or all other calls were throttled for that long.
    """

    advice: str | None = "Limit the rate, or retry later"


class BctrlServerError(BctrlApiError):
    """5xx: the server or a gateway failed."""

    advice: str | None = "Retrying is safe"


def advice_of(error: BctrlError) -> str:
    """Return the remedy in an error's text: the server's hint, the client's advice."""
    return _joined(error.hint, error.advice)


def _joined(*sentences: str | None) -> str:
    return ". ".join(sentence.rstrip(".") for sentence in sentences if sentence)


def subject_of(error: BctrlError) -> str:
    """Return the start of an error's text: the call and its target, if known."""
    if error.alias is not None:
        target = f"{quote(error.alias)} in workspace {quote(error.workspace_id)}"
    elif error.workspace_id is not None:
        target = f"workspace {quote(error.workspace_id)}"
    else:
        return ""
    return f"{error.operation} of {target}: "


def error_type(error: BaseException) -> str:
    """Return OpenTelemetry's `error.type`: an error status, or an exception's name."""
    if isinstance(error, BctrlError):
        if error.status is not None and error.status >= HTTPStatus.BAD_REQUEST:
            return str(error.status)
        # The class of all errors says nothing of the reason, but the cause does.
        if type(error) is BctrlError and error.__cause__ is not None:
            error = error.__cause__
    return type(error).__qualname__


def log_fields(error: BctrlError) -> dict[str, object]:
    """Return the fields of an error for a log record, named as in spans."""
    fields = {
        "bctrl.workspace_id": error.workspace_id,
        "bctrl.alias": error.alias,
        "error.type": error_type(error),
        "http.response.status_code": error.status,
        "bctrl.request_id": error.request_id,
    }
    return {name: value for name, value in fields.items() if value is not None}


def session_closed() -> BctrlConfigError:
    """Return the error of a call on a closed session."""
    advice = "Make the call inside `async with`, or make a new session"
    return BctrlConfigError("the session is closed", advice=advice)
