"""The one table of failures: what each kind costs, shows, leaves in doubt and becomes.

A failed attempt gives a `Failure`, which is data: its `Kind` is a row of the table. One
exception is made of the last failure of a call, where a user meets it.
"""

# ruff: noqa: PIE796 - equal rows differ in words, and in what apps may do with them.

from __future__ import annotations

import re
from collections.abc import Callable
from enum import Enum
from http import HTTPStatus
from typing import Self, final

import msgspec

from bctrl_async.errors import (
    NOT_FOUND_CODES,
    NOT_RUNNING_CODE,
    BctrlApiError as Api,
    BctrlAuthenticationError as Auth,
    BctrlConfigError as Config,
    BctrlConflictError as Conflict,
    BctrlError as Error,
    BctrlNetworkError as Network,
    BctrlNotFoundError as NotFound,
    BctrlPermissionError as Forbidden,
    BctrlRateLimitError as RateLimit,
    BctrlResponseError as Response,
    BctrlServerError as Server5xx,
    BctrlTimeoutError as Timeout,
    BctrlValidationError as Invalid,
)
from bctrl_async.outcomes import StopResult


class Repeat(Enum):
    """The effect of a request that arrives twice, so when it may be repeated."""

    READ = "none: a request has no effect"
    CONVERGES = "the same as if it had arrived once"
    ONCE = "a second effect: it is sent again only if it had none"


class Cost(Enum):
    """The cost of a failed attempt, and the operations that may be repeated."""

    RUN = "the run, or a target that is not sent: the user must correct something", ()
    CALL = "the call, which would fail again", ()
    IF_READ = "an attempt of a read; else the call, as it was taken", (Repeat.READ,)
    IF_SAFE = "an attempt, if repeating is safe", (Repeat.READ, Repeat.CONVERGES)
    ATTEMPT = "an attempt", tuple(Repeat)
    SLOT = "a slot; an attempt only if no other is in flight", tuple(Repeat)
    PATIENCE = "patience, because the server is busy", tuple(Repeat)

    def __init__(self, _: str, repeats: tuple[Repeat, ...]) -> None:
        self.repeats = repeats


class Server(Enum):
    """The state of the server, as a failed attempt shows it."""

    UP = "it answers"
    DOWN = "it does not answer, or a gateway answers in its place"
    UNCLEAR = "not known: it was not asked, or something else has answered"


class Doubt(Enum):
    """The cases in which a failed attempt may have taken effect."""

    NO = "never"
    YES = "always"
    MAYBE = "if the answer is a gateway's, which may have forwarded the request"


RUN, CALL, IF_READ, IF_SAFE, ATTEMPT, SLOT, PATIENCE = Cost
UP, DOWN, UNCLEAR = Server
NO, YES, MAYBE = Doubt
ALREADY = StopResult.ALREADY_STOPPED.value
UNUSABLE = "no-usable-response"


class Kind(Enum):
    """The kinds of failures.

    `costs`, `server` and `doubt` are about an attempt. The rest is about a call of a
    single attempt: the class of its error, the result of a stop, and the problem that
    an app answers.
    """

    # fmt: off
    # kind            costs     server   doubt  raises     result       problem
    # No request was sent (NO_KEY: its key came too late), or its call was ended.
    MISCONFIGURED   = RUN,      UNCLEAR, NO,    Config,    "not_sent",  "misconfigured"
    INVALID_TARGET  = RUN,      UNCLEAR, NO,    Config,    "invalid",   "invalid-target"
    NOT_ADMITTED    = CALL,     UNCLEAR, NO,    RateLimit, "not_sent",  "rate-limited"
    ABORTED         = CALL,     UNCLEAR, NO,    Error,     "not_sent",  "not-settled"
    NO_KEY          = ATTEMPT,  UNCLEAR, NO,    Timeout,   "not_sent",  "timeout"
    # There was no answer.
    NO_CONNECTION   = ATTEMPT,  DOWN,    NO,    Network,   "not_sent",  UNUSABLE
    UNTRUSTED       = ATTEMPT,  DOWN,    NO,    Network,   "not_sent",  UNUSABLE
    NO_RESOURCES    = SLOT,     UNCLEAR, NO,    Network,   "not_sent",  UNUSABLE
    SLOW_CONNECTION = ATTEMPT,  DOWN,    NO,    Timeout,   "not_sent",  "timeout"
    LOST            = ATTEMPT,  DOWN,    YES,   Network,   "unknown",   UNUSABLE
    SLOW_ANSWER     = ATTEMPT,  DOWN,    YES,   Timeout,   "unknown",   "timeout"
    # The answer is not the API's (NOT_HTTP), or is about another runtime (FOREIGN).
    NOT_HTTP        = ATTEMPT,  UNCLEAR, YES,   Response,  "unknown",   UNUSABLE
    FOREIGN         = ATTEMPT,  UNCLEAR, YES,   Response,  "unknown",   UNUSABLE
    # A redirect; 307 and 308 ask to repeat the request elsewhere (RFC 9110 15.4.8, 9).
    REDIRECT        = CALL,     UP,      YES,   Response,  "unknown",   UNUSABLE
    ELSEWHERE       = CALL,     UP,      NO,    Response,  "rejected",  UNUSABLE
    # A 2xx whose body is of no use (RFC 9110 15.3: the request was accepted).
    PAGE            = CALL,     UP,      YES,   Response,  "unknown",   UNUSABLE
    UNREADABLE      = CALL,     UP,      YES,   Response,  "accepted",  UNUSABLE
    CUT_SHORT       = IF_READ,  UP,      YES,   Network,   "accepted",  UNUSABLE
    SLOW_BODY       = IF_READ,  UP,      YES,   Timeout,   "accepted",  "timeout"
    # An error status, of the contract's errors.md and RFC 9110 15.5 and 15.6.
    INVALID         = CALL,     UP,      MAYBE, Invalid,   "rejected",  "invalid-target"
    NO_ACCESS       = RUN,      UP,      NO,    Auth,      "rejected",  "rejected"
    FORBIDDEN       = CALL,     UP,      NO,    Forbidden, "rejected",  "rejected"
    WRONG_PATH      = CALL,     UP,      NO,    NotFound,  "rejected",  "rejected"
    NOT_FOUND       = CALL,     UP,      NO,    NotFound,  "not_found", "not-found"
    CONFLICT        = CALL,     UP,      MAYBE, Conflict,  "rejected",  "not-stoppable"
    NOT_RUNNING     = CALL,     UP,      NO,    Conflict,  ALREADY,     "not-running"
    REFUSED         = CALL,     UP,      MAYBE, Api,       "rejected",  "rejected"
    TOO_SLOW        = IF_SAFE,  UP,      MAYBE, Api,       "rejected",  "timeout"
    THROTTLED       = PATIENCE, UP,      NO,    RateLimit, "rejected",  "rate-limited"
    SERVER_ERROR    = ATTEMPT,  UP,      YES,   Server5xx, "unknown",   UNUSABLE
    BAD_GATEWAY     = ATTEMPT,  DOWN,    YES,   Server5xx, "unknown",   UNUSABLE
    GATEWAY_TIMEOUT = ATTEMPT,  DOWN,    YES,   Server5xx, "unknown",   "timeout"
    GATEWAY_BUSY    = PATIENCE, DOWN,    YES,   Server5xx, "unknown",   "unavailable"
    BUSY            = PATIENCE, UP,      NO,    Server5xx, "rejected",  "unavailable"
    # fmt: on

    def __new__(cls, *_: object) -> Self:
        """Give each kind a value of its own: equal rows would be one kind."""
        kind = object.__new__(cls)
        kind._value_ = len(cls.__members__)
        return kind

    def __init__(  # noqa: PLR0917 - a row of the table.
        self,
        costs: Cost,
        server: Server,
        doubt: Doubt,
        raises: type[Error],
        result: str,
        problem: str,
    ) -> None:
        self.costs = costs
        self.doubt = doubt
        self.raises = raises
        self.result: StopResult = StopResult(result)
        self.problem = problem
        self.is_throttling: bool = costs is PATIENCE
        # The machine lacks what a connection needs, so the server was not asked.
        self.is_local: bool = costs is SLOT
        self.is_answer: bool = server is UP
        self.is_unanswered: bool = server is DOWN
        # The API says no, whatever its load.
        is_permanent = not costs.repeats
        self.is_refusal: bool = (
            is_permanent and self.is_answer and issubclass(raises, Api)
        )
        self.ends_run: bool = costs is RUN

    @property
    def exit_code(self) -> int:
        """The exit code of the command, if each call fails this way."""
        return 2 if self.ends_run else 1


@final
class Failure(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """The failure of an attempt or of a call; its facts are attributes of `BctrlError`.

    `advice` is None for the advice of the class, and `in_doubt` for what the kind says.
    """

    kind: Kind
    summary: str
    advice: str | None = None
    in_doubt: bool | None = None
    status: int | None = None
    code: str | None = None
    message: str | None = None
    reason_class: str | None = None
    request_id: str | None = None
    hint: str | None = None
    retry_after: float | None = None
    body: str | None = None
    argument: str | None = None
    cause: BaseException | None = None

    @property
    def may_have_worked(self) -> bool:
        """True if the attempt may have taken effect."""
        if self.in_doubt is None:
            return self.kind.doubt is YES
        return self.in_doubt

    @property
    def type(self) -> str:
        """OpenTelemetry's `error.type`: an error status, or an exception's name."""
        if self.status is not None and self.status >= HTTPStatus.BAD_REQUEST:
            return str(self.status)
        return self.kind.raises.__qualname__

    def error(self, **call_facts: object) -> Error:
        """Return the exception of this failure, with other attributes of its call."""
        make: Callable[..., Error] = self.kind.raises
        error = make(**{name: getattr(self, name) for name in _FACTS} | call_facts)
        error.__cause__ = self.cause
        return error

    @classmethod
    def of(cls, error: Error) -> Self:
        """Return the failure of an exception that was raised in place of an attempt."""
        # Its traceback refers to the call, and a waiter may keep the error.
        error.with_traceback(None)
        facts = {name: getattr(error, name) for name in _FACTS}
        if error.advice == type(error).advice:
            facts["advice"] = None
        make: Callable[..., Self] = cls
        in_doubt = error.may_have_worked
        return make(
            kind=kind_of(error), in_doubt=in_doubt, cause=error.__cause__, **facts
        )


_FACTS = frozenset(Failure.__struct_fields__) - {"kind", "in_doubt", "cause"}

is_code: Callable[[str], re.Match[str] | None] = re.compile(
    r"[a-z_]+(?:\.[a-z_]+)+"
).fullmatch
"""Matches a code of the API (contract errors.md); a gateway may send other text."""

_BY_STATUS = {
    307: Kind.ELSEWHERE,
    308: Kind.ELSEWHERE,
    400: Kind.INVALID,
    401: Kind.NO_ACCESS,
    403: Kind.FORBIDDEN,
    404: Kind.WRONG_PATH,
    408: Kind.TOO_SLOW,
    409: Kind.CONFLICT,
    422: Kind.INVALID,
    429: Kind.THROTTLED,
    502: Kind.BAD_GATEWAY,
    503: Kind.GATEWAY_BUSY,
    504: Kind.GATEWAY_TIMEOUT,
}
_BY_CODE = {(Kind.CONFLICT, NOT_RUNNING_CODE): Kind.NOT_RUNNING} | {
    (Kind.WRONG_PATH, code): Kind.NOT_FOUND for code in NOT_FOUND_CODES
}
# The first row with a class is the kind of an error of which no more is known.
_BY_CLASS = {kind.raises: kind for kind in reversed(Kind)}


def kind_of_status(status: int, code: str | None) -> Kind:
    """Return the kind of an answer other than 2xx."""
    if status < HTTPStatus.BAD_REQUEST:
        return _BY_STATUS.get(status, Kind.REDIRECT)
    default = Kind.REFUSED
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        default = Kind.SERVER_ERROR
    return _with_code(_BY_STATUS.get(status, default), code)


def kind_of(error: Error) -> Kind:
    """Return the kind of an exception, even if an app or a journal has made it.

    It has the problem and the exit code of the failure's kind, and the result if it is
    settled.
    """
    if error.status is not None:
        kind = kind_of_status(error.status, error.code)
        # The status may be that of an earlier attempt.
        if type(error) is kind.raises:
            return kind
    if isinstance(error, Config) and error.reason_class == "invalid_input":
        return Kind.INVALID_TARGET
    kinds = (_BY_CLASS[base] for base in type(error).__mro__ if base in _BY_CLASS)
    return _with_code(next(kinds), error.code)


def _with_code(kind: Kind, code: str | None) -> Kind:
    if code is None:
        return kind
    if kind is Kind.GATEWAY_BUSY and is_code(code):
        return Kind.BUSY
    return _BY_CODE.get((kind, code), kind)
