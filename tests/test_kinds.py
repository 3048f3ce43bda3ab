"""The table of failures: what follows from a row, and that the docs say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bctrl_async import (
    BctrlApiError,
    BctrlAuthenticationError,
    BctrlConfigError,
    BctrlConflictError,
    BctrlError,
    BctrlNetworkError,
    BctrlNotFoundError,
    BctrlPermissionError,
    BctrlRateLimitError,
    BctrlResponseError,
    BctrlServerError,
    BctrlTimeoutError,
    BctrlValidationError,
    RetryPolicy,
    StopResult,
)
from bctrl_async._calls.results import result_of
from bctrl_async._http.response import _NOT_FORWARDED
from bctrl_async._kinds import Doubt, Failure, Kind, Repeat, kind_of, kind_of_status
from bctrl_async.errors import THROTTLED

ROOT = Path(__file__).parents[1]
STATUSES = {
    Kind.REDIRECT: 302,
    Kind.ELSEWHERE: 307,
    Kind.PAGE: 200,
    Kind.UNREADABLE: 200,
    Kind.CUT_SHORT: 200,
    Kind.SLOW_BODY: 200,
    Kind.INVALID: 400,
    Kind.NO_ACCESS: 401,
    Kind.FORBIDDEN: 403,
    Kind.WRONG_PATH: 404,
    Kind.NOT_FOUND: 404,
    Kind.CONFLICT: 409,
    Kind.NOT_RUNNING: 409,
    Kind.REFUSED: 405,
    Kind.TOO_SLOW: 408,
    Kind.THROTTLED: 429,
    Kind.SERVER_ERROR: 500,
    Kind.BAD_GATEWAY: 502,
    Kind.GATEWAY_TIMEOUT: 504,
    Kind.GATEWAY_BUSY: 503,
    Kind.BUSY: 503,
}
CODES = {
    Kind.NOT_FOUND: "runtime.not_found",
    Kind.NOT_RUNNING: "runtime.not_active",
    Kind.BUSY: "server.busy",
}
every_kind = pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name)


def error_of(kind: Kind) -> BctrlError:
    """Return the error of a stop whose only attempt has failed."""
    failure = Failure(
        kind=kind,
        summary="it failed",
        status=STATUSES.get(kind),
        code=CODES.get(kind),
        reason_class="invalid_input" if kind is Kind.INVALID_TARGET else None,
    )
    return failure.error(
        may_have_stopped=failure.may_have_worked,
        accepted=kind.result is StopResult.ACCEPTED,
    )


@every_kind
def test_an_error_has_the_result_the_problem_and_the_exit_code_of_its_failure(
    kind: Kind,
) -> None:
    error = error_of(kind)

    assert type(error) is kind.raises
    assert result_of(error) is kind.result
    again = kind_of(error)
    assert (again.problem, again.exit_code) == (kind.problem, kind.exit_code)


@every_kind
def test_a_failure_in_doubt_is_no_fact_unless_the_server_took_the_stop(
    kind: Kind,
) -> None:
    is_unsettled = kind.result in {StopResult.UNKNOWN, StopResult.ACCEPTED}

    assert (kind.doubt is Doubt.YES) is is_unsettled
    # What the API did not answer, or answered in doubt, is not an answer that a run can
    # rely on.
    assert not (kind.is_refusal and is_unsettled)


@every_kind
def test_an_answer_has_a_status(kind: Kind) -> None:
    assert (kind in STATUSES) is (kind.is_answer or kind.raises is BctrlServerError)


@pytest.mark.parametrize(
    ("status", "code", "is_unanswered"),
    [
        (500, None, False),
        (502, None, True),
        (503, None, True),
        (503, "server.unavailable", False),
        (503, "words of a gateway", True),
        (504, None, True),
        (404, None, False),
    ],
)
def test_a_gateway_that_reached_no_api_has_not_answered(
    status: int, code: str | None, *, is_unanswered: bool
) -> None:
    assert kind_of_status(status, code).is_unanswered is is_unanswered


MAIN = {
    BctrlError: Kind.ABORTED,
    BctrlConfigError: Kind.MISCONFIGURED,
    BctrlNetworkError: Kind.NO_CONNECTION,
    BctrlTimeoutError: Kind.NO_KEY,
    BctrlResponseError: Kind.NOT_HTTP,
    BctrlApiError: Kind.REFUSED,
    BctrlValidationError: Kind.INVALID,
    BctrlAuthenticationError: Kind.NO_ACCESS,
    BctrlPermissionError: Kind.FORBIDDEN,
    BctrlNotFoundError: Kind.WRONG_PATH,
    BctrlConflictError: Kind.CONFLICT,
    BctrlRateLimitError: Kind.NOT_ADMITTED,
    BctrlServerError: Kind.SERVER_ERROR,
}
"""The kind of each class if no more is known, which is its first row in the table."""


@pytest.mark.parametrize(("error_class", "kind"), MAIN.items())
def test_an_error_of_an_app_has_the_main_kind_of_its_class(
    error_class: type[BctrlError], kind: Kind
) -> None:
    assert kind_of(error_class("made by an app")) is kind


@every_kind
def test_what_costs_an_attempt_or_patience_is_retried_by_default(kind: Kind) -> None:
    """Fault: a new status cost patience in the table, and no policy retried it."""
    if Repeat.CONVERGES in kind.costs.repeats and kind in STATUSES:
        assert STATUSES[kind] in RetryPolicy().statuses, "add it to _MAY_RETRY"
    is_throttled = STATUSES.get(kind) in THROTTLED
    assert kind.is_throttling is is_throttled, (
        "statistics count the statuses of THROTTLED"
    )


ROWS = {
    "no connection": [
        Kind.NO_CONNECTION,
        Kind.NO_RESOURCES,
        Kind.UNTRUSTED,
        Kind.SLOW_CONNECTION,
    ],
    "the connection broke; no answer in time, or no HTTP": [
        Kind.LOST,
        Kind.SLOW_ANSWER,
        Kind.NOT_HTTP,
    ],
    "a 5xx other than 503; a 3xx other than 307 and 308": [
        Kind.SERVER_ERROR,
        Kind.BAD_GATEWAY,
        Kind.GATEWAY_TIMEOUT,
        Kind.REDIRECT,
    ],
    "200 about another runtime, or with a page (HTML, XML)": [Kind.FOREIGN, Kind.PAGE],
    "200 with another unreadable body": [
        Kind.UNREADABLE,
        Kind.CUT_SHORT,
        Kind.SLOW_BODY,
    ],
    "429, and the API's own 503": [Kind.THROTTLED, Kind.BUSY],
    "404 with the `code` `runtime.not_found` or `workspace.not_found`": [
        Kind.NOT_FOUND
    ],
    "409 with the `code` `runtime.not_active`": [Kind.NOT_RUNNING],
    "another 4xx from the API itself": [
        Kind.INVALID,
        Kind.CONFLICT,
        Kind.REFUSED,
        Kind.TOO_SLOW,
    ],
    "the same from a gateway, also 408 and 503": [Kind.GATEWAY_BUSY],
    "307, 308": [Kind.ELSEWHERE],
    "no key, no slot, or the call was ended": [
        Kind.NO_KEY,
        Kind.NOT_ADMITTED,
        Kind.ABORTED,
    ],
    "the session or the key cannot be used": [Kind.MISCONFIGURED],
    "the target cannot be the name of a runtime": [Kind.INVALID_TARGET],
}
"""The rows of the page about outcomes, and their kinds."""
REFUSED = {kind_of_status(status, None) for status in _NOT_FORWARDED | {401, 403, 404}}


def table(page: str, heading: str) -> dict[str, str]:
    """Return the first two cells of each row of a table."""
    text = (
        (ROOT / "docs/reference" / page)
        .read_text("utf-8")
        .partition(f"## {heading}\n")[2]
    )
    rows = re.findall(
        r"^\| (.*?) \| (.*?) \|", text.partition("\n## ")[0], re.MULTILINE
    )
    return dict(rows[1:])


def test_the_page_about_outcomes_has_the_result_of_each_kind() -> None:
    found = table("outcomes.md", "Failures and their results")
    numbers = ", ".join(map(str, sorted(_NOT_FORWARDED | {401, 403})))
    kinds = ROWS | {
        f"{numbers}, and any other 404": sorted(REFUSED, key=lambda kind: kind.value)
    }

    assert found.keys() == kinds.keys()
    for row, result in found.items():
        results = {f"`{kind.result}`" for kind in kinds[row]}
        assert results == {result.partition(",")[0]}, row
    assert {kind for row in kinds.values() for kind in row} == set(Kind)


def test_the_page_about_outcomes_has_each_result() -> None:
    assert list(table("outcomes.md", "Results")) == [
        f"`{result}`" for result in StopResult
    ]


def test_each_result_is_of_one_sort() -> None:
    """Fault: a new result was polled by nobody, and a failure to telemetry."""
    sorts = {
        result: (
            result.is_processed,
            result.needs_poll,
            result.is_accepted,
            result.has_no_effect,
        )
        for result in StopResult
    }

    assert sorts == {
        StopResult.STOPPED: (True, False, False, False),
        StopResult.ACCEPTED: (True, True, True, False),
        StopResult.ALREADY_STOPPED: (True, False, False, False),
        StopResult.NOT_FOUND: (True, False, False, False),
        StopResult.REJECTED: (False, False, False, True),
        StopResult.INVALID: (False, False, False, True),
        StopResult.NOT_SENT: (False, False, False, True),
        StopResult.UNKNOWN: (False, True, False, False),
    }, "say of a new result whether it is processed, polled, taken, or without effect"


def test_the_page_about_problems_has_the_problem_of_each_kind() -> None:
    text = (ROOT / "docs/reference/problems.md").read_text("utf-8")

    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) == {
        kind.problem for kind in Kind
    }
