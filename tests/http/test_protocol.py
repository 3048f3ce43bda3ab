"""Responses of any kind, sans-IO: each becomes a Runtime or one error of ours."""

from __future__ import annotations

import codecs
import gzip
import json
import math
import pickle
import re
from collections.abc import Mapping
from datetime import UTC, datetime

import pytest
from hypothesis import example, given, strategies as st
from multidict import CIMultiDict
from support.runtimes import WIRE, wire

from bctrl_async import (
    BctrlApiError,
    BctrlAuthenticationError,
    BctrlConflictError,
    BctrlError,
    BctrlNotFoundError,
    BctrlPermissionError,
    BctrlRateLimitError,
    BctrlResponseError,
    BctrlServerError,
    BctrlValidationError,
)
from bctrl_async._http import response

KEY = "sk-live-0123456789"
BEARER = f"Bearer {KEY}"
NOW = datetime(2026, 11, 25, 9, 30, tzinfo=UTC)

Headers = Mapping[str, str]
Text = str | None


def parse_invalid(body: bytes, status: int = 200) -> BctrlResponseError:
    with pytest.raises(response.DECODE_ERRORS) as caught:
        response.decode_runtime(body)
    assert isinstance(caught.value, Exception)
    failure = response.unreadable(status, "the body", "Runtime", caught.value)
    error = response.with_body(failure, "", body, BEARER).error()
    assert isinstance(error, BctrlResponseError)
    return error


class TestParseRuntime:
    def test_a_byte_order_mark_before_a_lone_surrogate_is_no_part_of_it(self) -> None:
        body = codecs.BOM_UTF8 + wire(driver="\ud800")

        assert response.decode_runtime(body).driver == "?"

    @pytest.mark.parametrize(
        "cut", [r"\ud83d", r"\udc00", r"\ud83d\ud83d", r"a\ud83db", r"\\ud83d"]
    )
    def test_a_lone_surrogate_in_text_is_replaced(self, cut: str) -> None:
        runtime = response.decode_runtime(
            wire(driver="\ud800 CUT").replace(b"CUT", cut.encode())
        )

        assert (
            runtime.driver
            == "? " + json.loads(f'"{cut}"').encode(errors="replace").decode()
        )
        assert runtime.status == "stopped"

    @pytest.mark.parametrize(
        ("body", "problem"),
        [
            (b"", "not JSON"),
            (wire() + b"}", "not JSON"),
            (gzip.compress(wire(), mtime=0), "not JSON"),
            (json.dumps(WIRE).replace("crm", "ü").encode("latin-1"), "not JSON"),
            (b"\xff\xfe\x00", "not JSON"),
            (b'{"a":' * 200_000, "not JSON"),
            (b'{"summary":{"x":' + b"[" * 500_000 + b"]" * 500_000 + b"}}", "not JSON"),
            (b"[]", "not a valid Runtime: Expected `object`, got `array`"),
        ],
        ids=lambda value: repr(value[:20]),
    )
    def test_any_other_body_is_an_error_with_its_cause(
        self, body: bytes, problem: str
    ) -> None:
        error = parse_invalid(body, status=202)

        assert error.summary == f"the server answered 202, but the body is {problem}"
        assert error.__cause__ is not None

    @pytest.mark.parametrize("field", WIRE)
    def test_an_invalid_field_is_named_despite_a_lone_surrogate(
        self, field: str
    ) -> None:
        fields = {**WIRE, "summary": {"currentDriver": "\ud83d"}, field: 5}
        assert f"`$.{field}`" in parse_invalid(json.dumps(fields).encode()).summary
        del fields[field]
        summary = parse_invalid(json.dumps(fields).encode()).summary
        assert f"missing required field `{field}`" in summary


def parse_error(
    status: int = 400,
    body: object = b"",
    headers: Headers | None = None,
    authorization: str = BEARER,
) -> BctrlError:
    """Parse an error response; a body that is not bytes is encoded as JSON."""
    failure = response.parse_error(
        status,
        CIMultiDict(headers or {}).get,
        body if isinstance(body, bytes) else json.dumps(body).encode(),
        authorization,
        now=NOW,
    )
    return failure.error(may_have_stopped=failure.may_have_worked)


class TestErrorClass:
    @pytest.mark.parametrize(
        ("status", "error_class", "may_have_stopped"),
        [
            (400, BctrlValidationError, "never"),
            (401, BctrlAuthenticationError, "never"),
            (403, BctrlPermissionError, "never"),
            (404, BctrlNotFoundError, "never"),
            (405, BctrlApiError, "never"),
            (408, BctrlApiError, "without a code of the API"),
            (409, BctrlConflictError, "without a code of the API"),
            (422, BctrlValidationError, "without a code of the API"),
            (429, BctrlRateLimitError, "never"),
            (499, BctrlApiError, "without a code of the API"),
            (500, BctrlServerError, "always"),
            (503, BctrlServerError, "without a code of the API"),
            (999, BctrlServerError, "always"),
        ],
    )
    def test_the_status_and_a_code_decide_the_class_and_may_have_stopped(
        self, status: int, error_class: type[BctrlError], may_have_stopped: str
    ) -> None:
        """Fault: a gateway's 503 for a stop with an effect proved that it had none."""
        error = parse_error(status, {"code": "some.code", "error": "No."})
        assert (type(error), error.status) == (error_class, status)
        assert error.may_have_stopped is (may_have_stopped == "always")

        for body in (b"upstream connect error", {"code": 5}, {"code": "unavailable"}):
            foreign = parse_error(status, body)
            assert type(foreign) is error_class
            assert foreign.may_have_stopped is (may_have_stopped != "never")

    def test_the_text_of_a_doubtful_error_does_not_say_that_retrying_will_not_help(
        self,
    ) -> None:
        assert str(parse_error(422)).endswith(
            "Check the runtime's status; retrying is safe"
        )

    @pytest.mark.parametrize(
        ("body", "names_runtime"),
        [
            ({"code": "runtime.not_found"}, True),
            ({"code": "workspace.not_found"}, True),
            ({"code": "route.not_found"}, False),
            ({"Code": "NoSuchKey", "code": "NoSuchKey", "Key": "crm"}, False),
            ({"detail": "runtime.not_found", "code": "not_found"}, False),
            ({"error": {"code": "runtime.not_found"}}, False),
            ([], False),
            (b"<html><h1>404 Not Found</h1></html>", False),
            (b"", False),
        ],
    )
    def test_only_the_api_knows_what_is_missing(
        self, body: object, *, names_runtime: bool
    ) -> None:
        """Fault: JSON in a 404 settles a stop, also of a gateway without a route."""
        error = parse_error(404, body)

        assert isinstance(error, BctrlNotFoundError)
        assert error.names_runtime is names_runtime

    @pytest.mark.parametrize(
        ("status", "headers"),
        [(99, {}), (304, {}), (302, {}), (302, {"Location": " \t "})],
    )
    def test_after_another_status_it_may_have_stopped(
        self, status: int, headers: Headers
    ) -> None:
        error = parse_error(status, b"", headers)

        assert type(error) is BctrlResponseError
        assert error.may_have_stopped
        assert re.match(
            f"the server answered {status} .*, an unexpected status$", error.summary
        )

    # Parts of dates and numbers get deeper into the parser than arbitrary text.
    dates = "Wed, 25 Nov 2026 09:31:00 GMT +0100 -0000 - + : ."
    numbers = "99999999999 -5 T e9 inf +99999 \uff11"
    parts = (*dates.split(), *numbers.split())
    header = st.text() | st.lists(st.sampled_from([*parts, " "]), max_size=9).map(
        " ".join
    )
    names = ("x-request-id", "Location", "Retry-After", "retry-after-ms", "Date")

    @given(
        st.integers(300, 999),
        st.binary(),
        st.fixed_dictionaries({}, optional=dict.fromkeys(names, header)),
        st.text(),
    )
    @example(
        429,
        b"",
        {"Retry-After": "31 Dec 9999 23:59:59 -2359", "Date": "1 Jan 1 +2359"},
        "k",
    )
    def test_any_response_gives_a_one_line_error_that_can_be_pickled(
        self, status: int, body: bytes, headers: Headers, key: str
    ) -> None:
        error = parse_error(status, body, headers, f"Bearer {key}")

        assert vars(pickle.loads(pickle.dumps(error))) == vars(error)  # noqa: S301
        assert len(str(error).splitlines()) == 1
        assert error.retry_after is None or 0 <= error.retry_after < math.inf


TEXTS = ("code", "error", "reasonClass", "requestId", "hint")
# C0, C1, zero-width, bidi, line separators, a lone surrogate, a tag, private use.
BIDI = "\u200e\u202e\u2066"
UNPRINTABLE = (
    f"\x07\x1b\x7f\x85\x9b\u00ad\u200b{BIDI}\u2028\ufeff\ud800\U000e0041\ue000"
)


def texts_of(error: BctrlError) -> list[Text]:
    return [error.code, error.message, error.reason_class, error.request_id, error.hint]


class TestErrorFields:
    FULL: Mapping[str, object] = {
        "code": "request.invalid",
        "error": "alias is wrong",
        "reasonClass": "invalid_input",
        "requestId": "req-1",
        "hint": "Look at the list",
        "details": {"alias": "?"},
    }

    def test_every_field_of_the_contract_is_parsed(self) -> None:
        error = parse_error(400, self.FULL, {"Retry-After": "7"})

        assert texts_of(error) == [self.FULL[name] for name in TEXTS]
        assert (error.body, error.retry_after) == (json.dumps(self.FULL), 7.0)
        assert str(error) == (
            "the server answered 400 request.invalid: alias is wrong (request id "
            "req-1). Look at the list. Correct the request; retrying will not help"
        )

    def test_all_fields_but_a_code_are_found_in_a_nested_object(self) -> None:
        """A gateway nests its errors, and its code is none of the API's."""
        error = parse_error(400, {"error": self.FULL})

        assert texts_of(error) == [None, *(self.FULL[name] for name in TEXTS[1:])]

    @pytest.mark.parametrize(
        ("body", "code", "message"),
        [
            ({"error": "words"}, None, "words"),
            ({"code": "c", "error": {"message": "words"}}, "c", "words"),
            ({"title": "Title", "detail": "detail", "status": 400}, None, "detail"),
            ({"title": "Title", "type": "about:blank"}, None, "Title"),
            ({"error": "error", "message": "message", "detail": "d"}, None, "error"),
            ({"error": "", "message": "message"}, None, "message"),
            ({"code": 17, "error": 5, "message": True}, None, None),
            (b"upstream connect error\n", None, "upstream connect error"),
            (b"\n  <!DOCTYPE html>", None, None),
            (b'{"code": "c", "error": "wo', None, '{"code": "c", "error": "wo'),
            (b"\xef\xbb\xbf" + b'{"error": "words"}', None, "words"),
            (b"caf\xe9", None, "caf\ufffd"),
            (b"[" * 900_000, None, "[" * 500),
            (b"9" * 5_000, None, "9" * 500),
        ],
        ids=lambda value: repr(value)[:40],
    )
    def test_a_body_of_any_shape_is_read(
        self, body: object, code: Text, message: Text
    ) -> None:
        error = parse_error(400, body)

        assert (error.code, error.message) == (code, message)

    def test_without_a_message_the_reason_phrase_is_used(self) -> None:
        assert parse_error(502).summary == "the server answered 502 Bad Gateway"
        assert parse_error(599).summary == "the server answered 599 (no reason given)"

    def test_long_fields_are_truncated(self) -> None:
        huge = "x" * 100_000

        error = parse_error(400, dict.fromkeys(TEXTS, huge), {"x-request-id": huge})

        assert len(error.body or "") == 2048
        assert texts_of(error) == ["x" * 500] * len(TEXTS)
        assert len(str(error)) < 2500

    def test_no_character_that_reorders_hides_or_ends_text_is_in_an_error(self) -> None:
        """Fault: bidi controls and zero-width characters passed in errors."""
        words = f" not\r\n{UNPRINTABLE}ok\t "

        fields = parse_error(400, dict.fromkeys(TEXTS, words))
        text = parse_error(
            400, words.encode(errors="surrogatepass"), {"X-Request-Id": words}
        )
        redirect = parse_error(302, b"", {"Location": words})

        assert texts_of(fields) == ["not ok"] * len(TEXTS)
        assert (text.message or "").startswith("not ")
        for error in (fields, text, redirect):
            assert str(error).isprintable()
            assert "not" in str(error)

    @pytest.mark.parametrize(
        ("body", "headers", "request_id"),
        [
            ({"requestId": "b"}, {"X-Request-Id": "x", "X-Bctrl-Request-Id": "y"}, "b"),
            ({}, {"X-Request-Id": "x", "X-Bctrl-Request-Id": "y"}, "x"),
            ({"requestId": ""}, {"X-Request-Id": " ", "X-Bctrl-Request-Id": "y"}, "y"),
            ({"requestId": 5}, {"x-request-id": "a\tb"}, "a b"),
            ({}, {}, None),
        ],
    )
    def test_a_request_id_in_the_body_takes_precedence(
        self, body: object, headers: Headers, request_id: Text
    ) -> None:
        assert parse_error(500, body, headers).request_id == request_id


SOON = "Wed, 25 Nov 2026 09:31:00 GMT"
"""A minute from now."""


def retry_after(headers: Headers) -> float | None:
    return response.parse_retry_after(CIMultiDict(headers).get, NOW)


class TestRetryAfter:
    @pytest.mark.parametrize(
        ("headers", "seconds"),
        [
            ({}, None),
            ({"Retry-After": "0"}, 0.0),
            ({"Retry-After": " 007 "}, 7.0),
            ({"Retry-After": "1.5"}, 1.5),
            ({"Retry-After": "3601"}, 3600.0),
            ({"Retry-After-Ms": "250.5"}, 0.2505),
            ({"retry-after-ms": "1500", "Retry-After": "2"}, 1.5),
            ({"retry-after-ms": "nan", "Retry-After": "2"}, 2.0),
            ({"Retry-After": SOON}, 60.0),
            ({"Retry-After": "Wednesday, 25-Nov-26 09:31:00 GMT"}, 60.0),
            ({"Retry-After": "Wed, 25 Nov 2026 10:31:00 +0100"}, 60.0),
            ({"Retry-After": "Wed, 25 Nov 2026 09:31:00 -0000"}, 60.0),
            ({"Retry-After": "Mon, 01 Jan 0001 00:00:00 GMT"}, 0.0),
            ({"Retry-After": "Fri, 31 Dec 9999 23:59:59 GMT"}, 3600.0),
            ({"Retry-After": SOON, "Date": "Wed, 25 Nov 2026 09:30:15 GMT"}, 45.0),
            ({"Retry-After": SOON, "Date": "Wed, 32 Nov 2026 09:31:00 GMT"}, 60.0),
        ],
    )
    def test_each_form_is_read_up_to_a_year(
        self, headers: Headers, seconds: float | None
    ) -> None:
        """Fault: a date is compared with a clock that differs from the server's."""
        assert retry_after(headers) == seconds

    @pytest.mark.parametrize(
        "value",
        [
            *(
                "-1",
                "+5",
                "1.",
                ".5",
                "1e9",
                "0x10",
                "1_000",
                "inf",
                "nan",
                "30s",
                "1, 2",
            ),
            "\uff11\uff12",  # Unicode digits, which `float` accepts.
            "9" * 5000,
            "2026-11-25T09:31:00Z",
            "Wed, 25 Nov 2026 25:61:00 GMT",
            "Wed, 25 Nov 99999 09:31:00 GMT",
            "Wed, 25 Nov 2026 09:31:00 +9999999",
        ],
    )
    def test_a_negative_or_invalid_value_is_ignored(self, value: str) -> None:
        assert retry_after({"Retry-After": value}) is None
        assert retry_after({"retry-after-ms": value}) is None
