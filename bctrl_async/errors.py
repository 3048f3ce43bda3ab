"""Every error this package raises, and what each one knows.

One root, two branches that never overlap: `except BctrlApiError` means "the server said no",
`except BctrlNetworkError` means "there was no usable answer".

    BctrlError
    ├── BctrlConfigError (also ValueError)
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

from http import HTTPStatus
from typing import ClassVar

THROTTLED = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE})
"""Statuses of a request that was not carried out because of load (contract errors.md)."""

_GATEWAY_FAILURES = frozenset({HTTPStatus.BAD_GATEWAY, HTTPStatus.GATEWAY_TIMEOUT})


class BctrlError(Exception):
    """The root of every error that this package raises.

    All errors can be pickled. Attributes that do not apply are None.

    Args:
        summary: What failed, in one line without a full stop.
        advice: What to do about it; the class's own advice when None.
        operation: What was to be done: `stop`, or `get` or `list`.
        workspace_id: The workspace of the call that failed.
        alias: The alias of the runtime that was to be stopped or looked at.
        attempts: How many requests were begun for this call, the one that failed for want of a key
            among them.
        may_have_stopped: Whether any of these requests could have stopped the runtime; those of a
            `get` or `list` never can.
        status: The HTTP status of the last answer, where there was one.
        code: The server's error code, such as `runtime.not_active`.
        message: The server's own words.
        reason_class: The server's `reasonClass`, such as `conflict`; new values will appear. Also
            `invalid_input` where it is a workspace id or an alias that cannot be sent.
        request_id: The server's id of the request, to quote to its support.
        hint: The server's advice.
        retry_after: How many seconds the server asked to wait, if it did.
        body: The first 2,048 characters of the answer's body.
        argument: The name of the invalid argument, such as `timeout`; of a `BctrlConfigError` only.
    """

    default_advice: ClassVar[str] = ""

    def __init__(
        self,
        summary: str,
        *,
        advice: str | None = None,
        operation: str = "stop",
        workspace_id: str | None = None,
        alias: str | None = None,
        attempts: int = 0,
        may_have_stopped: bool = False,
        status: int | None = None,
        code: str | None = None,
        message: str | None = None,
        reason_class: str | None = None,
        request_id: str | None = None,
        hint: str | None = None,
        retry_after: float | None = None,
        body: str | None = None,
        argument: str | None = None,
    ) -> None:
        # Pickle calls the class with `args` and then restores the attributes, so `args` stays
        # what the constructor takes by position.
        super().__init__(summary)
        self.summary = summary
        self.advice = advice
        self.operation = operation
        self.workspace_id = workspace_id
        self.alias = alias
        self.attempts = attempts
        self.may_have_stopped = may_have_stopped
        self.status = status
        self.code = code
        self.message = message
        self.reason_class = reason_class
        self.request_id = request_id
        self.hint = hint
        self.retry_after = retry_after
        self.body = body
        self.argument = argument

    def __str__(self) -> str:
        subject = ""
        if self.alias is not None:
            subject = f"{self.operation} of {self.alias!r} in workspace {self.workspace_id!r}: "
        elif self.workspace_id is not None:
            subject = f"{self.operation} of workspace {self.workspace_id!r}: "
        facts = []
        if self.request_id is not None:
            facts.append(f"request id {self.request_id}")
        if self.attempts > 1:
            facts.append(f"{self.attempts} attempts")
        if self.may_have_stopped:
            facts.append("the runtime may have stopped")
        known = f" ({', '.join(facts)})" if facts else ""
        summary = self.summary.rstrip(".")
        sentences = [f"{subject}{summary}{known}", self.hint, self.advice or self.default_advice]
        return ". ".join(sentence.rstrip(".") for sentence in sentences if sentence)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"


class BctrlConfigError(BctrlError, ValueError):
    """The call itself cannot be made: nothing was sent by the attempt that raised it.

    No key, a bad URL, a bad workspace id or alias, a bad option, a session that is closed, that
    belongs to another event loop, or that was opened before a fork. Where an argument is invalid,
    `argument` names it.
    """


class BctrlNetworkError(BctrlError):
    """There was no usable answer: refused, unreachable, disconnected."""

    default_advice = "Check base_url and the network, then call again: it is safe to repeat"


class BctrlTimeoutError(BctrlNetworkError, TimeoutError):
    """The attempt took longer than `timeout`.

    `status` is set if the answer had begun to arrive.
    """

    default_advice = "Call again, it is safe to repeat, or allow a longer timeout"


class BctrlResponseError(BctrlNetworkError):
    """An answer came that cannot be read: not JSON, the wrong shape, too large, a redirect."""

    default_advice = "Check that base_url is the bctrl API itself"


class BctrlApiError(BctrlError):
    """The server answered with an error status."""

    default_advice = "Sending it again will not help: ask the server's support, with the request id"


class BctrlValidationError(BctrlApiError):
    """400 or 422: the request itself is wrong; the same request will fail again."""

    default_advice = "Correct the request; sending it again will not help"


class BctrlAuthenticationError(BctrlApiError):
    """401: the key is missing or invalid; every other call with it will fail too."""

    default_advice = "Check the API key: api_key= or BCTRL_API_KEY"


class BctrlPermissionError(BctrlApiError):
    """403: this key may not touch this resource."""

    default_advice = "Use a key that has access to this workspace"


class BctrlNotFoundError(BctrlApiError):
    """404: no such workspace or alias, or no such path."""

    default_advice = "Check the workspace id, the alias and base_url"

    @property
    def names_runtime(self) -> bool:
        """Whether the API itself knows no such workspace or alias (contract `runtime.not_found`).

        Something else that does not know the path, such as a proxy or a wrong `base_url`, says 404
        as well, and nothing of whether the runtime runs.
        """
        if self.code is not None:
            return self.code.startswith(("runtime.", "workspace."))
        return (self.body or "").lstrip().startswith("{")


class BctrlConflictError(BctrlApiError):
    """409: the runtime is not in a state that can be stopped."""

    default_advice = "Look at the runtime's status, then call again: it is safe to repeat"

    @property
    def already_stopped(self) -> bool:
        """Whether nothing was running under this alias (contract: `runtime.not_active`)."""
        return self.code == "runtime.not_active"


class BctrlRateLimitError(BctrlApiError):
    """429: too many requests; this one was not carried out.

    Without a `status` it was not even sent: the server had asked all calls to stay away for longer
    (`retry_after`) than this one's patience.
    """

    default_advice = "Send fewer requests a second (rate=), or call again later"


class BctrlServerError(BctrlApiError):
    """5xx: the server or something in front of it failed."""

    default_advice = "Call again: it is safe to repeat"


def is_unanswered(error: BctrlError) -> bool:
    """Return True if the API itself did not answer: no answer, or a gateway's own 502 or 504."""
    if isinstance(error, BctrlNetworkError):
        return error.status is None
    return error.status in _GATEWAY_FAILURES


def session_closed() -> BctrlConfigError:
    """Make the error of a call on a session that is closed."""
    return BctrlConfigError(
        "the session is closed", advice="Make the call inside `async with`, or make a new session"
    )
