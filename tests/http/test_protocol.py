"""The HTTP protocol, sans-IO: building requests and parsing responses."""

import gzip
import json
import math
import pickle
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from urllib.parse import quote, unquote
from uuid import UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from multidict import CIMultiDict
from runtimes import WIRE, wire
from yarl import URL

from bctrl_async._http import response
from bctrl_async._http.request import checked_headers, path_segment
from bctrl_async.errors import (
    BctrlApiError,
    BctrlAuthenticationError,
    BctrlConfigError,
    BctrlConflictError,
    BctrlError,
    BctrlNotFoundError,
    BctrlPermissionError,
    BctrlRateLimitError,
    BctrlResponseError,
    BctrlServerError,
    BctrlValidationError,
)

KEY = "sk-live-0123456789"
BEARER = f"Bearer {KEY}"
NOW = datetime(2026, 11, 25, 9, 30, tzinfo=UTC)


def parse_invalid(body: bytes, status: int = 200) -> BctrlResponseError:
    with pytest.raises(response.DECODE_ERRORS) as caught:
        response.decode_runtime(body)
    assert isinstance(caught.value, Exception)
    error = response.unreadable(status, "the body", "Runtime", caught.value)
    response.unusable(error, "", body, BEARER)
    return error


def parse_error(
    status: int = 400,
    body: object = b"",
    headers: Mapping[str, str] | None = None,
    authorization: str = BEARER,
) -> BctrlError:
    """Parse an error response; a body that is not bytes is encoded as JSON."""
    return response.parse_error(
        status,
        CIMultiDict(headers or {}).get,
        body if isinstance(body, bytes) else json.dumps(body).encode(),
        authorization,
        now=NOW,
    )


def retry_after(headers: Mapping[str, str]) -> float | None:
    return response.parse_retry_after(CIMultiDict(headers).get, NOW)


def decodings(text: str) -> list[str]:
    """Return `text` percent-decoded zero, one, two, … times, until it no longer changes."""
    decoded = [text]
    while (again := unquote(decoded[-1])) != decoded[-1]:
        decoded.append(again)
    return decoded


def has_dot_segment(text: str) -> bool:
    """Return True if a percent-decoding of `text` has a dot segment."""
    return any(
        segment.partition(";")[0] in {".", ".."}
        for decoded in decodings(text)
        for segment in re.split(r"[/\\]", decoded)
    )


# Text with dots, separators and their percent-encodings, nested to any depth.
tricky_text = st.lists(
    st.sampled_from(
        [".", "..", "/", "\\", "%", "%2e", "%2E", "%2f", "%5c", "%25", "25", ";", "?", "#", "a"]
    )
    | st.characters(codec=None),
    max_size=12,
).map("".join)


class TestPathSegment:
    """Names that are rejected are in test_wire, where nothing of them is sent."""

    @given(tricky_text | st.text() | st.text("%2eE5cCfF.;/\\a3B", max_size=40))
    @example("%25" * 40 + "2e")
    @example("a%2525")
    @example("%%32%65")
    @example("%c3%2e%e9%2f")
    @example("..a/b")
    @example("crm;v=1")
    def test_a_name_arrives_unchanged_and_is_rejected_only_for_a_reason(self, text: str) -> None:
        try:
            segment = path_segment(text, "alias")
        except BctrlConfigError as error:
            is_path = "could be taken for a path" in error.summary
            assert not is_path or has_dot_segment(text) or text.count("%") > 5
            return

        assert not has_dot_segment(text)
        path = f"/v1/workspaces/ws/runtimes/{segment}/stop"
        assert unquote(segment, errors="strict") == text
        assert re.fullmatch(r"[A-Za-z0-9._~%-]+", segment)
        assert URL("https://api.bctrl.ai").with_path(path, encoded=True).raw_path == path

    @pytest.mark.parametrize(
        ("name", "segment"),
        [
            ("crm/eu ä", "crm%2Feu%20%C3%A4"),
            ("...", "..."),
            ("a" * 1_000, "a" * 1_000),
            (UUID("0B7C7A0E54A14C7A9F6E7D9F0A3C1F01"), "0b7c7a0e-54a1-4c7a-9f6e-7d9f0a3c1f01"),
        ],
    )
    def test_a_name_is_one_segment(self, name: str | UUID, segment: str) -> None:
        assert path_segment(name, "alias") == segment

    def test_quoting_agrees_with_the_standard_library(self) -> None:
        printable = "".join(map(chr, range(0x20, 0x7F)))

        assert path_segment(printable, "alias") == quote(printable, safe="")


class TestExtraHeaders:
    def test_valid_headers_are_accepted(self) -> None:
        headers = {
            "x!#$%&'*+.^_`|~-9": "every character of a token",
            "X-Empty": "",
            "X-Words": "two words\tand a tab",
        }
        assert checked_headers(headers) == headers
        assert list(checked_headers({"X": "1", "x": "2"}).values()) == ["2"]

    @pytest.mark.parametrize("name", ["", "X Trace", "X\r\nEvil", "X-\u017f", 1, b"X"])
    def test_an_invalid_header_name_is_rejected(self, name: str) -> None:
        with pytest.raises(BctrlConfigError, match=r"^invalid header name") as caught:
            checked_headers({name: "value"})

        assert len(str(caught.value).splitlines()) == 1

    @pytest.mark.parametrize(
        "value", ["secret\r\nX: 1", "secret\x00", " secret", "secret\t", " ", "secretü", None, 1]
    )
    def test_an_invalid_value_is_rejected_and_not_shown(self, value: str) -> None:
        with pytest.raises(BctrlConfigError) as caught:
            checked_headers({"X-Trace": value})

        assert "invalid value of header 'X-Trace': expected printable ASCII" in str(caught.value)
        assert "secret" not in str(caught.value)

    def test_the_key_and_framing_headers_cannot_be_replaced(self) -> None:
        names = "Authorization authorization Accept-Encoding Connection Content-Length Expect Host"
        for name in [*names.split(), "TE", "Trailer", "Transfer-Encoding", "Upgrade"]:
            with pytest.raises(BctrlConfigError, match=f"the header '{name}' is set by the sess"):
                checked_headers({"X-Trace": "fine", name: "x"})


class TestParseRuntime:
    @pytest.mark.parametrize("cut", ["\\ud83d", "\\udc00", "\\ud83d\\ud83d", "a\\ud83db"])
    def test_a_lone_surrogate_in_text_is_replaced(self, cut: str) -> None:
        runtime = response.decode_runtime(wire(driver="CUT").replace(b"CUT", cut.encode()))

        assert runtime.driver == json.loads(f'"{cut}"').encode(errors="replace").decode()
        assert runtime.status == "stopped"

    @pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
    def test_a_byte_order_mark_is_accepted(self, encoding: str) -> None:
        assert response.decode_runtime(wire().decode().encode(encoding)).alias == "crm"

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"OK",
            wire()[:-1],
            wire() + b"}",
            gzip.compress(wire(), mtime=0),
            json.dumps(WIRE).replace("crm", "ü").encode("latin-1"),
            b"\xff\xfe\x00",
            b'{"a":' * 200_000,
            b'{"summary":{"x":' + b"[" * 500_000 + b"]" * 500_000 + b"}}",
        ],
        ids=lambda body: repr(body[:20]),
    )
    def test_a_body_that_is_not_json_is_an_error_with_its_cause(self, body: bytes) -> None:
        error = parse_invalid(body, status=202)

        assert error.summary == "the server answered 202, but the body is not JSON"
        assert error.__cause__ is not None

    @pytest.mark.parametrize("body", [b"null", b"[]", b'"stopped"'])
    def test_json_that_is_not_a_runtime_is_an_error(self, body: bytes) -> None:
        assert "but the body is not a valid Runtime: Expected" in parse_invalid(body).summary

    @pytest.mark.parametrize("field", list(WIRE))
    def test_an_invalid_field_is_named_despite_a_lone_surrogate(self, field: str) -> None:
        others = {**WIRE, "summary": {"currentDriver": "\ud83d"}}
        missing = {name: value for name, value in others.items() if name != field}

        assert f"missing required field `{field}`" in str(
            parse_invalid(json.dumps(missing).encode())
        )
        for value in (5, None):
            error = parse_invalid(json.dumps({**others, field: value}).encode())
            assert f"`$.{field}`" in error.summary

    @given(st.binary())
    def test_any_bytes_are_an_error_of_ours(self, body: bytes) -> None:
        assert parse_invalid(body).status == 200


class TestErrorClass:
    @pytest.mark.parametrize(
        ("status", "error_class", "may_have_stopped", "foreign_may_have_stopped"),
        [
            (400, BctrlValidationError, False, False),
            (401, BctrlAuthenticationError, False, False),
            (403, BctrlPermissionError, False, False),
            (404, BctrlNotFoundError, False, False),
            (405, BctrlApiError, False, False),
            (408, BctrlApiError, False, True),
            (409, BctrlConflictError, False, True),
            (422, BctrlValidationError, False, True),
            (429, BctrlRateLimitError, False, False),
            (499, BctrlApiError, False, True),
            (500, BctrlServerError, True, True),
            (502, BctrlServerError, True, True),
            (503, BctrlServerError, False, True),
            (504, BctrlServerError, True, True),
            (999, BctrlServerError, True, True),
        ],
    )
    def test_the_status_and_a_code_decide_the_class_and_may_have_stopped(
        self,
        status: int,
        error_class: type[BctrlError],
        *,
        may_have_stopped: bool,
        foreign_may_have_stopped: bool,
    ) -> None:
        """Fault: a gateway's 503 for a stop that took effect was proof that nothing was done."""
        error = parse_error(status, {"code": "some.code", "error": "No."})
        assert (type(error), error.status) == (error_class, status)
        assert error.may_have_stopped is may_have_stopped

        for body in (b"upstream connect error", {"code": 5}, {"code": "unavailable"}):
            foreign = parse_error(status, body)
            assert type(foreign) is error_class
            assert foreign.may_have_stopped is foreign_may_have_stopped

    @pytest.mark.parametrize(
        ("status", "headers"), [(99, {}), (304, {}), (302, {}), (302, {"Location": " \t "})]
    )
    def test_after_any_other_status_the_runtime_may_have_stopped(
        self, status: int, headers: Mapping[str, str]
    ) -> None:
        error = parse_error(status, b"", headers)

        assert type(error) is BctrlResponseError
        assert error.may_have_stopped
        assert re.match(f"the server answered {status} .*, an unexpected status$", error.summary)

    @given(st.integers(300, 999), st.binary(), st.text(), st.text())
    def test_any_response_gives_a_one_line_error_that_can_be_pickled(
        self, status: int, body: bytes, header: str, key: str
    ) -> None:
        error = parse_error(
            status,
            body,
            {"x-request-id": header, "Location": header, "Retry-After": header},
            f"Bearer {key}",
        )

        assert vars(pickle.loads(pickle.dumps(error))) == vars(error)  # noqa: S301
        assert len(str(error).splitlines()) == 1


# C0, C1, zero-width, bidi, line separators, a lone surrogate, a tag, private use.
UNPRINTABLE = [
    *"\x07\x1b\x7f\x85\x9b\u00ad\u200b\u200e\u202e\u2066\u2028\ufeff",
    "\ud800",
    "\U000e0041",
    "\ue000",
]


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
        error = parse_error(400, self.FULL)

        assert (error.code, error.message) == ("request.invalid", "alias is wrong")
        assert error.reason_class == "invalid_input"
        assert error.body == json.dumps(self.FULL)
        assert str(error) == (
            "the server answered 400 request.invalid: alias is wrong (request id req-1). "
            "Look at the list. Correct the request; retrying will not help"
        )

    @pytest.mark.parametrize(
        ("body", "code", "message"),
        [
            ({"error": "words"}, None, "words"),
            ({"code": "c", "error": {"message": "words"}}, "c", "words"),
            ({"error": {"error": {"message": "too deep"}}}, None, None),
            ({"title": "Title", "detail": "detail", "status": 400}, None, "detail"),
            ({"title": "Title", "type": "about:blank"}, None, "Title"),
            ({"error": "error", "message": "message", "detail": "d"}, None, "error"),
            ({"error": "", "message": "message"}, None, "message"),
            ({"error": ["x"], "message": "message"}, None, "message"),
            ({"code": 17, "error": 5, "message": True}, None, None),
            ([{"error": "x"}], None, None),
            ("words", None, "words"),
            (b"upstream connect error\n", None, "upstream connect error"),
            (b" \n ", None, None),
            (b"\n  <!DOCTYPE html>", None, None),
            (b'{"code": "c", "error": "wo', None, '{"code": "c", "error": "wo'),
            (b"\xef\xbb\xbf" + b'{"error": "words"}', None, "words"),
            (b"caf\xe9", None, "caf\ufffd"),
            (b"[" * 900_000, None, "[" * 500),
            (b"9" * 5_000, None, "9" * 500),
        ],
        ids=lambda value: repr(value)[:40],
    )
    def test_code_and_message_are_found_in_a_body_of_any_shape(
        self, body: object, code: str | None, message: str | None
    ) -> None:
        error = parse_error(400, body)

        assert (error.code, error.message) == (code, message)

    def test_all_fields_but_a_code_are_found_in_a_nested_object(self) -> None:
        """A gateway nests its errors, and its code is none of the API's."""
        error = parse_error(400, {"error": self.FULL})

        assert (error.code, error.message) == (None, "alias is wrong")
        assert (error.reason_class, error.request_id) == ("invalid_input", "req-1")
        assert error.hint == "Look at the list"

    def test_without_a_message_the_reason_phrase_is_used(self) -> None:
        assert parse_error(502).summary == "the server answered 502 Bad Gateway"
        assert parse_error(599).summary == "the server answered 599 (no reason given)"

    def test_long_fields_are_truncated(self) -> None:
        huge = "x" * 100_000
        fields = ("code", "error", "reasonClass", "requestId", "hint")

        error = parse_error(400, dict.fromkeys(fields, huge), {"x-request-id": huge})

        assert len(error.body or "") == 2048
        for value in (error.code, error.message, error.reason_class, error.request_id, error.hint):
            assert value == "x" * 500
        assert len(str(error)) < 2500

    def test_a_field_is_one_line_without_control_characters(self) -> None:
        words = " a\nb\r\n\x1b[31mc\x00\x7f\x85d\u2028e\u2029f\tg "

        error = parse_error(400, dict.fromkeys(("code", "error", "requestId", "hint"), words))

        assert error.code == error.message == error.request_id == error.hint == "a b [31mc d e f g"

    @pytest.mark.parametrize("character", UNPRINTABLE)
    def test_no_character_that_reorders_or_hides_text_is_in_an_error(self, character: str) -> None:
        """Fault: bidi controls and zero-width characters of the server passed in error texts."""
        words = f"not{character}ok"
        names = ("code", "error", "reasonClass", "requestId", "hint")

        for error in (
            parse_error(400, dict.fromkeys(names, words)),
            parse_error(400, words.encode(errors="surrogatepass"), {"X-Request-Id": words}),
            parse_error(302, b"", {"Location": words}),
        ):
            shown = [str(error), error.code, error.reason_class, error.request_id, error.hint]
            assert "".join(filter(None, shown)).isprintable()
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
        self, body: object, headers: Mapping[str, str], request_id: str | None
    ) -> None:
        assert parse_error(500, body, headers).request_id == request_id

    @pytest.mark.parametrize(
        "body",
        [
            {"code": KEY, "error": BEARER, "reasonClass": KEY, "requestId": KEY, "hint": KEY},
            {"error": {"code": f"x{KEY}x", "message": f"{KEY}{KEY}"}},
            {KEY: KEY},
            f"no such key: {KEY}".encode(),
            f'{{"error": "{KEY}'.encode(),
            b"\xff" + KEY.encode(),
        ],
    )
    def test_an_echoed_key_is_in_no_attribute_and_in_no_text(self, body: object) -> None:
        headers = {"X-Request-Id": KEY, "X-Bctrl-Request-Id": KEY, "Location": f"/?key={KEY}"}
        for status in (307, 401, 500):
            error = parse_error(status, body, headers)

            assert KEY not in f"{error} {error!r} {vars(error)}"


SOON = "Wed, 25 Nov 2026 09:31:00 GMT"
"""A minute from now."""


class TestRetryAfter:
    @pytest.mark.parametrize(
        ("headers", "seconds"),
        [
            ({}, None),
            ({"Retry-After": "0"}, 0.0),
            ({"Retry-After": " 007 "}, 7.0),
            ({"Retry-After": "1.5"}, 1.5),
            ({"Retry-After": "31536001"}, 31536000.0),
            ({"Retry-After-Ms": "250.5"}, 0.2505),
            ({"retry-after-ms": "9" * 30}, 31536000.0),
            ({"retry-after-ms": "1500", "Retry-After": "2"}, 1.5),
            ({"retry-after-ms": "", "Retry-After": "2"}, 2.0),
            ({"retry-after-ms": "nan", "Retry-After": "2"}, 2.0),
            ({"Retry-After": SOON}, 60.0),
            ({"Retry-After": "Wednesday, 25-Nov-26 09:31:00 GMT"}, 60.0),
            ({"Retry-After": "Wed Nov 25 09:31:00 2026"}, 60.0),
            ({"Retry-After": "Wed, 25 Nov 2026 10:31:00 +0100"}, 60.0),
            ({"Retry-After": "Mon, 01 Jan 0001 00:00:00 GMT"}, 0.0),
            ({"Retry-After": "Fri, 31 Dec 9999 23:59:59 GMT"}, 31536000.0),
            ({"Retry-After": SOON, "Date": "Wed, 25 Nov 2026 09:30:15 GMT"}, 45.0),
            ({"Retry-After": SOON, "Date": "Wed, 32 Nov 2026 09:31:00 GMT"}, 60.0),
        ],
    )
    def test_seconds_milliseconds_and_dates_are_parsed_and_capped_at_a_year(
        self, headers: Mapping[str, str], seconds: float | None
    ) -> None:
        """Fault: a date is compared with a clock that differs from the server's."""
        assert retry_after(headers) == seconds

    @pytest.mark.parametrize(
        "value",
        [
            *("-1", "+5", "1.", ".5", "1e9", "0x10", "1_000", "inf", "nan", "30s", "1, 2"),
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

    # Parts of dates and numbers get deeper into the parser than arbitrary text.
    parts = (
        "Wed, 25 Nov 2026 09:31:00 GMT +0100 -0000 - + : . 99999999999 -5 T e9 inf +99999 \uff11"
    )
    header = st.text() | st.lists(st.sampled_from([*parts.split(), " "]), max_size=9).map(" ".join)

    @given(
        st.fixed_dictionaries(
            {}, optional={"Retry-After": header, "retry-after-ms": header, "Date": header}
        )
    )
    @example({"Retry-After": "Fri, 31 Dec 9999 23:59:59 -2359", "Date": "1 Jan 1 00:00:00 +2359"})
    def test_any_header_gives_none_or_a_finite_wait(self, headers: dict[str, str]) -> None:
        wait = retry_after(headers)

        assert wait is None or (math.isfinite(wait) and wait >= 0)
